"""What the state dicts of this package share: names, groups, anchors; how they are saved, checked and loaded."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from .anchors import check_digest, digest
from .bases import Group
from .state import check_loadable, copy_beside


def check_names(ours: Sequence[str] | None, theirs: Sequence[str] | None) -> None:
    """Raises ValueError naming the first of a checkpoint's parameter names that differs from ours, if both have any."""
    if ours and theirs and list(ours) != list(theirs):
        pairs = zip(ours, theirs, strict=False)
        first = next(((a, b) for a, b in pairs if a != b), (len(ours), len(theirs)))
        raise ValueError(f"the checkpoint's parameter names differ, first {first[1]!r} for {first[0]!r}")


def complete_group(group: Group, saved: Group, keys: Collection[str], *, has_anchors: bool) -> Group:
    """A saved group with those of our `keys` that it lacks. Raises ValueError when its parameter names differ.

    has_anchors: whether the checkpoint has anchors of its parameters. If not, those that are here stay, and so does
    their kind.
    """
    check_names(group.get("param_names"), saved.get("param_names"))
    merged = {**{key: group[key] for key in keys}, **saved}
    if merged["anchor"] != "zero" and not has_anchors:
        merged["anchor"] = group["anchor"]
    return merged


def with_anchor(saved: Mapping[str, Any], anchor: Tensor | None, how: bool | str) -> dict[str, Any]:
    """One parameter's saved state with its anchor. how: True for the tensor, "digest" for its SHA-256, or False."""
    bare = without_anchor(saved)
    if anchor is None or how is False:
        return bare
    return {**bare, "anchor_digest": digest(anchor)} if how == "digest" else {**bare, "anchor": anchor}


def without_anchor(saved: Mapping[str, Any]) -> dict[str, Any]:
    """One parameter's saved state without its anchor."""
    return {key: value for key, value in saved.items() if key not in ("anchor", "anchor_digest")}


def check_saved(param: Tensor, label: str, saved: Mapping[str, Any], present: Tensor | None) -> None:
    """Raises ValueError when one parameter's saved state cannot be loaded: tensors of another shape, or the digest of
    another anchor than the one that is `present`."""
    check_loadable(param, label, saved)
    if "anchor_digest" in saved:
        check_digest(present, saved["anchor_digest"], label)


def loaded_anchor(param: Tensor, anchor: Tensor) -> Tensor:
    """A copy of a saved anchor beside its parameter, in the dtype that it has."""
    return copy_beside(param, anchor)
