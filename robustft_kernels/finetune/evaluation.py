"""Evaluating a model in the middle of its training: batches one after the other, and everything restored afterwards."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.unsharded import resharded


class Feed:
    """Hands out batches one by one, and begins again at their end. Given the same object, it goes on where it was.

    taken: how many batches it has handed out since it began. If the first object is a list or tuple, it starts there.
    """

    def __init__(self, taken: int = 0) -> None:
        self.taken = taken
        self._source: Iterable[Any] | None = None
        self._left: Iterator[Any] = iter(())

    def next(self, batches: Iterable[Any]) -> Any:
        """The next batch. Raises ValueError if there is none, or none any more."""
        indexed = isinstance(batches, list | tuple)
        if batches is not self._source:
            self.taken = self.taken if indexed and self._source is None else 0
            self._source, self._left = batches, iter(batches)
        if isinstance(batches, list | tuple) and batches:
            self.taken = self.taken % len(batches) + 1
            return batches[self.taken - 1]
        batch = next(self._left, self)
        if batch is self and self.taken:
            self._left = iter(batches)
            batch = next(self._left, self)
        if batch is self:
            raise ValueError(
                f"batches ended after {self.taken} and cannot begin again; pass a list or a loader"
                if self.taken
                else "batches is empty; at least one validation batch is needed"
            )
        self.taken += 1
        return batch


@contextmanager
def as_found(model: nn.Module | None, params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yields copies of `params`. At the end it restores the params, training flags, buffers and torch's random
    states."""
    modules = [] if model is None else [(m, m.training, dict(m._buffers)) for m in model.modules()]
    buffers = [b for _, _, own in modules for b in own.values() if b is not None and not _is_expanded(b)]
    values = [buffer.detach().clone() for buffer in buffers]
    theta = [param.detach().clone() for param in params]
    device = params[0].device

    def restore() -> None:
        put(params, theta)
        put(buffers, values)
        for module, training, own in modules:
            module.training = training
            module._buffers.update(own)

    beside_cpu = {} if device.type == "cpu" else {"device_type": device.type}
    with torch.random.fork_rng([device] if beside_cpu else [], **beside_cpu):
        try:
            yield theta
        finally:
            try:
                restore()
            except BaseException:  # a second Ctrl-C
                restore()
                raise


def evaluation_mode(model: nn.Module | None) -> None:
    """Sets the flags one by one, because `train()` and `eval()` of some modules move weights."""
    for module in () if model is None else model.modules():
        module.training = False


@torch.no_grad()
def put(targets: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Writes each value into its target, and lets autocast forget what it has cast."""
    for target, value in zip(resharded(targets), values, strict=True):
        target.copy_(value)
    torch.clear_autocast_cache()


def _is_expanded(tensor: Tensor) -> bool:
    """Whether elements share memory, so that nothing can have written it in place."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
