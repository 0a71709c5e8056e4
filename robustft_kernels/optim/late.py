"""Anchors that are taken later than the optimizer is made, and weights that are written after it."""

import warnings
from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..core import anchors
from ..core.bases import Group, is_anchored
from ..core.memory import without_memory
from ..core.sharding import local, version_of
from ..core.state import keep_anchor
from ..step.launch import label_of


class LateAnchors:
    """What is settled before the first step of a parameter.

    - A parameter without an anchor takes one, from the weights as they are. It had no memory before, or is new in its
      group. If it stands in for another of its shape, as after `fully_shard`, it takes over that one's anchor.
    - Weights that were written after their copy was taken are an error in most programs, so a warning names them.
    """

    def __init__(self) -> None:
        self._versions = WeakTensorKeyDictionary()  # of weights whose copy no step has used yet
        self._known = WeakTensorKeyDictionary()  # whether a parameter had an anchor when it was added

    def note(self, group: Group, param: Tensor, has_anchor: bool) -> None:
        """Notes that a parameter has been added, or has a new anchor."""
        self._known[param] = has_anchor
        if has_anchor and group["anchor"] == "initial":
            self._versions[param] = version_of(param)

    def forget(self) -> None:
        """Notes that a checkpoint of ours was loaded. The anchors are then what they should be."""
        self._versions = WeakTensorKeyDictionary()

    def settle(
        self, groups: list[Group], known: MutableMapping[Tensor, Tensor], all_groups: list[Group] | None = None
    ) -> None:
        """Takes the anchors that are missing of parameters with a gradient. all_groups: when `groups` are not all.

        Raises ValueError naming one whose anchor cannot be found, RuntimeError naming one without memory.
        """
        for group in groups:
            if not is_anchored(group):
                continue
            for k, param in enumerate(group["params"]):
                if param.grad is None:
                    continue
                if what := without_memory(param):
                    raise RuntimeError(f"{label_of(group, k)} is {what}")
                if param not in known:
                    known[param] = self._taken(group, k, all_groups or groups, known)
                    self._known[param] = True
                elif param in self._versions:
                    self._compare(group, k, known[param])
                self._versions.pop(param, None)

    def _taken(self, group: Group, k: int, groups: list[Group], known: MutableMapping[Tensor, Tensor]) -> Tensor:
        param, label = group["params"][k], label_of(group, k)
        if self._known.get(param):
            raise ValueError(
                f"{label} has lost its anchor with its state; load a checkpoint, or call reanchor() to take the "
                "weights as they are now"
            )
        if param in self._known:
            raise ValueError(
                f"{label} has no anchor for method {group['method']!r}: its group was added with a method that needs "
                "none; choose the method when adding the group, or call reanchor() to take the weights as they are now"
            )
        here = {of for g in groups for of in g["params"]}
        left = next((of for of in known if of not in here and of.shape == param.shape), None)
        if left is not None:
            return keep_anchor(param, known.pop(left), None, group.get("anchor_device"))
        if group["anchor"] != "initial":
            raise ValueError(
                f"{label} has no anchor: it is new in a group whose anchors are {group['anchor']!r}; add it with "
                "add_param_group and an anchor of its own, or call reanchor()"
            )
        return copies([param], group)[0]

    def _compare(self, group: Group, k: int, anchor: Tensor) -> None:
        param = group["params"][k]
        if self._versions[param] == version_of(param):
            return
        if not torch.equal(local(anchor).to(param.device, param.dtype), local(param)):
            warnings.warn(
                f"robustft_kernels: the weights of {label_of(group, k)} were written after their anchor was taken, and "
                "steps will pull them back to what they were before; make the optimizer after the weights are loaded, "
                "or call reanchor()",
                RuntimeWarning,
                stacklevel=2,
            )


def copies(params: list[Tensor], group: Group) -> list[Tensor]:
    """Anchors that are the weights as they are now, as the group has its anchors."""
    dtype, device = group.get("anchor_dtype", anchors.EXACT), group.get("anchor_device")
    _, taken = anchors.resolve("initial", params, None, [], anchored=True, dtype=dtype, device=device)
    assert taken is not None
    return taken


def takes_anchor(param: Tensor) -> bool:
    """Whether a parameter can have an anchor now. What is frozen in integers never has one, and what has no memory yet
    has one from its first step on."""
    return param.is_floating_point() and not without_memory(param)


class AnchorsOfState(MutableMapping[Tensor, Tensor]):
    """The anchors in a state."""

    def __init__(self, state: Any) -> None:
        self._state = state

    def __getitem__(self, param: Tensor) -> Tensor:
        if param not in self._state:  # or it would grow
            raise KeyError(param)
        anchor: Tensor = self._state[param]["anchor"]
        return anchor

    def __setitem__(self, param: Tensor, anchor: Tensor) -> None:
        self._state[param]["anchor"] = anchor

    def __delitem__(self, param: Tensor) -> None:
        del self._state[param]  # with the moments of a parameter that has left

    def __iter__(self) -> Iterator[Tensor]:
        return (param for param, of in self._state.items() if "anchor" in of)

    def __len__(self) -> int:
        return sum(1 for _ in self)
