"""Anchors that are taken later than the optimizer is made, and weights that are written after it."""

import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from itertools import compress
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..backends.digests import sums_here
from ..core import anchors
from ..core.anchors import Anchor
from ..core.bases import Group, is_anchored
from ..core.files import DISK
from ..core.memory import without_memory
from ..core.sharding import is_flat_part, local, version_of
from ..core.state import keep_anchor
from ..step.launch import label_of

TAKEN = "Anchors are the weights as they are now, at the first step; to have others, give them as anchor="
KEPT = (
    "Anchors are the weights as they were then, before a state of torch.optim was loaded; if those are not θ₀, call "
    "reanchor() or give anchor="
)
THAWED = (
    "Its anchor is the weights as they are now, at its first step; if those are not θ₀, give anchor=, or load a "
    "checkpoint that has the anchor"
)


class LateAnchors:
    """What is settled before the first step of a parameter.

    - A parameter without an anchor takes one, from the weights as they are. It had no memory before, or is new in its
      group. If it stands at the place of another of its shape, as after `fully_shard`, it takes over that one's anchor.
    - A frozen parameter has no copy of its weights. It takes one when it is trained first. A warning says so if they
      were written meanwhile.
    - "initial" are the weights at the first step. Where they were written after the optimizer was made, as by programs
      that load weights last, the copy is taken anew. If a state of torch.optim was loaded too, a run goes on, and the
      copy stays. A warning says once which it was.
    """

    def __init__(self) -> None:
        self._goes_on = self._told = False
        self._versions = WeakTensorKeyDictionary()  # of weights whose copy no step has used yet
        # Of frozen parameters that have no anchor yet: their version, sums that tell their numbers, and the anchor's
        # dtype. Processes agree on that while all are here: not all may have a gradient later.
        self._frozen = WeakTensorKeyDictionary()
        # Of parameters that were added: the index of the group, that in the group, and whether they had an anchor.
        self._known = WeakTensorKeyDictionary()

    def note(self, row: int, group: Group, anchored: Mapping[Tensor, Tensor]) -> None:
        """Notes that the parameters of group `row` have been added, or have new anchors."""
        waits = is_anchored(group) and group["anchor"] == "initial"
        frozen = [p for p in group["params"] if waits and takes_anchor(p) and p not in anchored]
        for param, dtype in zip(frozen, dtypes_of(frozen, group), strict=True):
            sums = None if is_flat_part(param) else sums_here(param)
            self._frozen[param] = version_of(param), sums, dtype
        for k, param in enumerate(group["params"]):
            if param in anchored:
                self._frozen.pop(param, None)
            if takes_anchor(param) and param not in self._frozen:
                self._known[param] = row, k, param in anchored
            if param in anchored and group["anchor"] == "initial":
                self._versions[param] = version_of(param)

    def retake(self, groups: list[Group], known: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """New anchors, the weights as they are now, for all groups that have any. A frozen parameter takes none, unless
        it has one."""
        self._goes_on = self._told = False
        taken: dict[Tensor, Tensor] = {}
        for row, group in enumerate(groups):
            if is_anchored(group):
                params = [p for p in group["params"] if takes_anchor(p) and (p.requires_grad or p in known)]
                group["anchor"] = "initial"
                if group.get("anchor_device") == DISK:
                    group["anchor_device"] = None
                taken.update(zip(params, copies(params, group), strict=True))
                self.note(row, group, taken)
        return taken

    def loaded(self, groups: list[Group]) -> None:
        """Notes that a checkpoint with these groups was loaded. The anchors of ours are what they should be."""
        if any("method" in group for group in groups):
            self._versions = WeakTensorKeyDictionary()
        self._goes_on = True

    def settle(self, groups: list[Group], known: MutableMapping[Tensor, Tensor]) -> None:
        """`settle_one` for all parameters with a gradient."""
        for row, group in enumerate(groups):
            for k, param in enumerate(group["params"]):
                if param.grad is not None:
                    self.settle_one(groups, row, k, known)

    def settle_one(self, groups: list[Group], row: int, k: int, known: MutableMapping[Tensor, Tensor]) -> None:
        """Takes the anchor of parameter k of group `row`, if it needs one and has none.

        Raises ValueError naming a parameter whose anchor cannot be found, RuntimeError naming one without memory.
        """
        group = groups[row]
        if "method" not in group or not is_anchored(group):  # a group without is refused by name later
            return
        param = group["params"][k]
        if what := without_memory(param):
            raise RuntimeError(f"{label_of(group, k)} is {what}")
        if param not in known:
            known[param] = self._taken(groups, row, k, known)
            self._known[param] = row, k, True
            if param in self._frozen and self._was_other(param):
                self._tell(f"of {label_of(group, k)} were written while it was frozen. {THAWED}")
        elif param in self._versions and self._written(param, known[param]):
            if not self._goes_on:
                known[param] = copies([param], group)[0]
            kept = KEPT if self._goes_on else TAKEN
            self._tell(f"of {label_of(group, k)} were written after the optimizer was made. {kept}")
        self._versions.pop(param, None)
        if self._frozen.pop(param, None) is not None:
            self._known[param] = row, k, True

    def _taken(self, groups: list[Group], row: int, k: int, known: MutableMapping[Tensor, Tensor]) -> Tensor:
        group = groups[row]
        param, label = group["params"][k], label_of(group, k)
        *_, had_anchor = self._known.get(param, (False,))
        if had_anchor:
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
        left = next((of for of in known if of not in here and self._stood_at(of, row, k, param)), None)
        if left is not None:
            kept = keep_anchor(param, known[left], None, group.get("anchor_device"), label=label)
            del known[left]
            return kept
        if group["anchor"] != "initial":
            raise ValueError(
                f"{label} has no anchor: it is new in a group whose anchors are {group['anchor']!r}; add it with "
                "add_param_group and an anchor of its own, or call reanchor()"
            )
        if param in self._frozen and group.get("anchor_dtype", anchors.EXACT) == anchors.EXACT:
            version, _, dtype = self._frozen[param]
            group = {**group, "anchor_dtype": dtype if version == version_of(param) else None}
        return copies([param], group)[0]

    def _stood_at(self, other: Tensor, row: int, k: int, param: Tensor) -> bool:
        return other.shape == param.shape and self._known.get(other, ())[:2] == (row, k)

    def _written(self, param: Tensor, anchor: Tensor) -> bool:
        """Whether a parameter holds other numbers than when its copy was taken."""
        if self._versions[param] == version_of(param):
            return False
        return not torch.equal(local(anchor).to(param.device, param.dtype), local(param))

    def _was_other(self, param: Tensor) -> bool:
        """Whether a parameter that was frozen holds other numbers than then."""
        version, sums, _ = self._frozen[param]
        return bool(version != version_of(param) and (sums is None or not torch.equal(sums, sums_here(param))))

    def _tell(self, what: str) -> None:
        if not self._told:
            warnings.warn(f"robustft_kernels: the weights {what}", RuntimeWarning, stacklevel=2)
        self._told = True


def resolved(
    spec: Anchor, group: Group, *, anchored: bool, waits: bool, **options: Any
) -> tuple[str, dict[Tensor, Tensor]]:
    """The kind of a group's anchors, and the anchor of each parameter that can have one now; see `anchors.resolve`.

    waits: whether frozen parameters take no copy of their weights yet.
    """
    anchors.check_kind(spec)
    params, names = group["params"], group.get("param_names")
    waits = waits and isinstance(spec, str) and spec == "initial"
    takes = [takes_anchor(param) and (param.requires_grad or not waits) for param in params]
    labels = [label_of(group, k) for k in compress(range(len(params)), takes)]
    if not isinstance(spec, str | PathLike | Mapping | None):
        spec = list(compress(anchors.in_order(spec, params), takes))
    params, names = list(compress(params, takes)), None if names is None else list(compress(names, takes))
    kind, tensors = anchors.resolve(spec, params, names, labels, anchored=anchored, **options)
    return kind, {} if tensors is None else dict(zip(params, tensors, strict=True))


def copies(params: list[Tensor], group: Group) -> list[Tensor]:
    """Anchors that are the weights as they are now, as the group has its anchors."""
    dtype, device = group.get("anchor_dtype", anchors.EXACT), group.get("anchor_device")
    _, taken = anchors.resolve("initial", params, None, [], anchored=True, dtype=dtype, device=device)
    assert taken is not None
    return taken


def dtypes_of(params: list[Tensor], group: Group) -> list[Any]:
    """For each of these parameters the `anchor_dtype` that its copy will have."""
    dtype = group.get("anchor_dtype", anchors.EXACT)
    return list(anchors.exact_dtypes(params)) if dtype == anchors.EXACT else [dtype] * len(params)


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
