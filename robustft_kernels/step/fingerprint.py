"""What a plan depends on, in a form that two steps can compare."""

from typing import Any

import torch
from torch import Tensor

from ..backends import native
from ..core.sharding import is_dtensor, local, placement_of


def fingerprint(params: list[Tensor], kept: list[dict[str, Any]], addresses: bool) -> object:
    """Equal for two calls exactly when a plan that was made at the first still holds at the second.

    Of each parameter it covers identity, address, shape, strides, dtype and device. Of its gradient it covers all but
    the address, or that there is none. Of the state in `kept` it covers which objects these are, and with `addresses`
    where their memory is. The caller keeps those objects alive.
    """
    if not native.MISSING and not any(map(is_dtensor, params)):
        return native.fingerprint(params, kept, addresses)
    of_params = [
        (id(p), local(p).data_ptr(), _metadata(p), None if p.grad is None else _metadata(p.grad)) for p in params
    ]
    of_state = [(key, id(value), addresses and _address(value)) for of in kept for key, value in of.items()]
    return of_params, of_state


def _address(value: object) -> int:
    return local(value).data_ptr() if isinstance(value, Tensor) else 0


def _metadata(tensor: Tensor) -> tuple[Any, ...]:
    strides = tensor.stride() if tensor.layout == torch.strided else None
    read = tensor.is_neg(), tensor._is_zerotensor()
    return tensor.dtype, tensor.device, tensor.layout, tensor.shape, strides, placement_of(tensor), read
