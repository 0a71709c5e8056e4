"""What `optimizer.state` shows to others.

torch.distributed.checkpoint asks `if optimizer.state:`. If there is none, it makes a step with zero gradients. It loads
a flattened checkpoint by the keys that it finds in the state. So a state completes itself when it is asked whether it
holds anything. No step is made, and no key is missing.
"""

import re
from collections import ChainMap, defaultdict
from collections.abc import Container, Iterator, Mapping, MutableMapping
from typing import Any, cast
from weakref import WeakMethod

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..backends.digests import copy_for
from ..core.bases import Group
from ..core.sharding import is_flat_part

Complete = WeakMethod[Any]  # weak, or the optimizer and its state would refer to each other


class CompletingState(defaultdict[Tensor, dict[str, Any]]):
    """The state of an `AnchoredOptimizer`. Copies and pickles are plain dictionaries."""

    def __init__(self, complete: Complete, state: Mapping[Tensor, dict[str, Any]]) -> None:
        super().__init__(dict, state)
        self._complete = complete

    def __bool__(self) -> bool:
        complete = self._complete()
        if complete is not None:
            complete()
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        return defaultdict, (dict, dict(self))


class AnchorAndDigest(Mapping[str, Tensor]):
    """The "anchor" of a parameter and its "anchor_digest", which is taken when it is read."""

    def __init__(self, param: Tensor, anchor: Tensor, *, digest: bool) -> None:
        self._param, self._anchor = param, anchor
        self._keys = ("anchor", "anchor_digest") if digest and not is_flat_part(param) else ("anchor",)

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        return self._anchor if key == "anchor" else copy_for(self._anchor, self._param)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class StateWithAnchors(MutableMapping[Tensor, MutableMapping[str, Any]]):
    """The state of a wrapped optimizer, with the "anchor" of each parameter. What is written goes to the optimizer.

    digests: whether the anchors' digests are shown too.
    """

    def __init__(self, optimizer: Optimizer, anchors: Mapping[Tensor, Tensor], *, digests: bool) -> None:
        self._optimizer, self._anchors, self._digests = optimizer, anchors, digests

    def __getitem__(self, param: Tensor) -> MutableMapping[str, Any]:
        own: dict[str, Any] = self._optimizer.state[param]
        anchor = self._anchors.get(param)
        if anchor is None:
            return own
        return ChainMap(own, cast(Any, AnchorAndDigest(param, anchor, digest=self._digests)))

    def get(self, param: Tensor, default: Any = None) -> Any:
        return self[param] if param in self else default  # noqa: SIM401 - or the wrapped one's defaultdict would grow

    def __setitem__(self, param: Tensor, value: MutableMapping[str, Any]) -> None:
        self._optimizer.state[param] = {key: value[key] for key in value if key not in ("anchor", "anchor_digest")}

    def __delitem__(self, param: Tensor) -> None:
        del self._optimizer.state[param]

    def __iter__(self) -> Iterator[Tensor]:
        yield from self._optimizer.state
        yield from (param for param in self._anchors if param not in self._optimizer.state)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, param: object) -> bool:
        return param in self._optimizer.state or param in self._anchors

    def __bool__(self) -> bool:
        if not any(self._optimizer.state.values()):
            begin(self._optimizer)
        return True


@torch.no_grad()
def begin(optimizer: Optimizer) -> None:
    """Makes the state of an optimizer that has none, as torch.distributed.checkpoint does: by a step with lr = 0 and
    gradients of zero. Does nothing if a parameter has a gradient."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if any(param.grad is not None for param in params):
        return
    rates = [(group, group["lr"]) for group in optimizer.param_groups if "lr" in group]
    for param in params:
        if param.requires_grad:
            param.grad = torch.zeros_like(param)
    try:
        for group, lr in rates:
            group["lr"] = torch.zeros_like(lr) if isinstance(lr, Tensor) else 0.0
        optimizer.step()
    finally:
        for group, lr in rates:
            group["lr"] = lr
        for param in params:
            param.grad = None


def with_anchors(text: str, groups: list[Group], anchors: Container[Tensor]) -> str:
    """The text of an optimizer as torch.optim has it, with the numbers of parameters and anchors of each group."""

    def told(heading: re.Match[str]) -> str:
        params = groups[int(heading[1])]["params"]
        return f"{heading[0]}: anchors for {sum(param in anchors for param in params)} of {len(params)} parameters"

    return re.sub(r"^Parameter Group (\d+)$", told, text, flags=re.MULTILINE)
