"""What a plan depends on, in a form that two steps can compare."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ..backends import native
from ..core.sharding import local, placement_of


def fingerprint(params: list[Tensor], kept: list[dict[str, Any]], addresses: bool) -> Hashable:
    """Equal for two calls exactly when a plan that was made at the first still holds at the second.

    Of each parameter it covers identity, address, shape, strides, dtype, device and how it is sharded. Of its gradient
    it covers all but the address, or that there is none. Of the state in `kept` it covers which objects these are, and
    with `addresses` where their memory is. The caller keeps those objects alive, and how the parameters are sharded.
    """
    if not native.MISSING:
        return native.fingerprint(params, kept, addresses)
    of_params = tuple(
        (id(p), local(p).data_ptr(), _metadata(p), p.grad is not None and _metadata(p.grad)) for p in params
    )
    of_state = tuple((key, id(value), addresses and _address(value)) for of in kept for key, value in of.items())
    return of_params, of_state


def _address(value: object) -> int:
    return local(value).data_ptr() if isinstance(value, Tensor) else 0


def _metadata(tensor: Tensor) -> tuple[Any, ...]:
    here = local(tensor)
    strides = here.stride() if here.layout == torch.strided else None
    read = here.is_neg(), here._is_zerotensor(), type(here) is Tensor
    return here.dtype, here.device, here.layout, tensor.shape, here.shape, strides, placement_of(tensor), read
