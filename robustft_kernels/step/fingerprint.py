"""What a plan depends on, in a form that two steps can compare."""

from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..backends import native
from ..core.sharding import PLAIN, local, placement_of

PLAIN_TYPES, STRIDED = frozenset(PLAIN), frozenset((torch.strided,))
COLUMNS: tuple[Callable[[Tensor], Any], ...] = (
    *map(attrgetter, ("dtype", "device", "shape")),
    Tensor.stride,
    Tensor.is_neg,
    Tensor._is_zerotensor,
)


def fingerprint(
    params: list[Tensor], kept: list[dict[str, Any]], addresses: bool, last: Hashable | None = None
) -> Hashable:
    """Equal for two calls exactly when a plan that was made at the first still holds at the second.

    last: that of an earlier call. If it is equal, it is returned itself, and takes less time.

    Of each parameter it covers identity, address, shape, strides, dtype, device and how it is sharded. Of its gradient
    it covers all but the address, or that there is none. Of the state in `kept` it covers which objects these are, and
    with `addresses` where their memory is. The caller keeps those objects alive, and how the parameters are sharded.
    """
    if not native.MISSING:
        return native.fingerprint(params, kept, addresses, last if isinstance(last, bytes) else None)
    grads = [p.grad for p in params]
    values = [*chain.from_iterable(map(dict.values, kept))]
    return (
        tuple(map(id, params)),
        _addresses(params),
        _metadata_of(params),
        tuple([grad is None for grad in grads]),
        _metadata_of([grad for grad in grads if grad is not None]),
        tuple(chain.from_iterable(kept)),
        tuple(map(id, values)),
        addresses and _addresses(values),
    )


def forms(tensors: Sequence[Tensor], *, addresses: bool = True) -> Hashable:
    """Equal for two lists exactly when their tensors are alike: in shape, strides, dtype and device, and with
    `addresses` in where their memory is. None if one of them is not a plain tensor."""
    if not PLAIN_TYPES.issuperset(map(type, tensors)):
        return None
    if not native.MISSING:
        return native.forms(list(tensors), addresses)
    return addresses and _addresses(tensors), _metadata_of(tensors)


def _addresses(values: Sequence[Any]) -> tuple[int, ...]:
    if PLAIN_TYPES.issuperset(map(type, values)):
        return tuple(map(Tensor.data_ptr, values))
    return tuple(local(value).data_ptr() if isinstance(value, Tensor) else 0 for value in values)


def _metadata_of(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """`_metadata` of each. For plain tensors by columns: no Python runs for each of them, so it takes half the time."""
    if PLAIN_TYPES.issuperset(map(type, tensors)) and STRIDED.issuperset(map(attrgetter("layout"), tensors)):
        return tuple(tuple(map(column, tensors)) for column in COLUMNS)
    return tuple(map(_metadata, tensors))


def _metadata(tensor: Tensor) -> tuple[Any, ...]:
    here = local(tensor)
    strides = here.stride() if here.layout == torch.strided else None
    read = here.is_neg(), here._is_zerotensor(), type(here) is Tensor
    return here.dtype, here.device, here.layout, tensor.shape, here.shape, strides, placement_of(tensor), read
