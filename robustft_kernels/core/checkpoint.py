"""What the state dicts of this package share: names, groups and anchors, and how they are saved, checked and loaded."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .bases import DTYPE_OPTIONS, Group, as_dtype
from .files import DISK
from .names import bare_name

# The version of the bits that rounding draws. A saved seed has it above its own 32 bits: a key of its own would be one
# that torch.distributed.checkpoint misses in older checkpoints. Up to 0.3.0 it was 1, and no checkpoint said so.
RANDOM_BITS = 2


def check_names(ours: Sequence[str] | None, theirs: Sequence[str] | None) -> None:
    """Raises ValueError naming the first of a checkpoint's parameter names that differs from ours, if both have any.
    What wrappers put into names does not count."""
    if ours and theirs and list(map(bare_name, ours)) != list(map(bare_name, theirs)):
        pairs = zip(ours, theirs, strict=False)
        first = next(((a, b) for a, b in pairs if bare_name(a) != bare_name(b)), (len(ours), len(theirs)))
        raise ValueError(f"the checkpoint's parameter names differ, first {first[1]!r} for {first[0]!r}")


def complete_group(group: Group, saved: Group, keys: Collection[str], *, has_anchors: bool) -> Group:
    """A saved group, with those of our `keys` that it lacks added. Raises ValueError when its parameter names differ.

    has_anchors: whether the checkpoint has anchors of its parameters. If not, those that are here stay, and so do
        their kind and their place. Those of a checkpoint are never on disk.
    """
    check_names(group.get("param_names"), saved.get("param_names"))
    drawn, seed = divmod(saved.get("seed", 0), 2**32)
    if "seed" in saved:
        saved = {**saved, "seed": seed}
    if _draws(saved) and drawn != RANDOM_BITS:
        warnings.warn(
            "robustft_kernels: the checkpoint was written by a version that draws other random bits for stochastic "
            f"rounding (version {max(1, drawn)}, here {RANDOM_BITS}). The run goes on as well as it would there, but "
            "not with the same last bits",
            UserWarning,
            stacklevel=2,
        )
    merged = {**{key: group[key] for key in keys if key in group}, **saved}
    if "method" in saved and "gate" not in saved:  # it means the first, see methods.gate_key
        merged.pop("gate", None)
    for key in DTYPE_OPTIONS:
        if key in merged:
            merged[key] = as_dtype(key, merged[key])
    if merged["anchor"] != "zero" and not has_anchors:
        merged.update({key: group[key] for key in ("anchor", "anchor_device") if key in group})
    elif merged.get("anchor_device") == DISK:
        merged["anchor_device"] = None
    return merged


def plain_group(group: Group) -> Group:
    """A group to be saved, with its dtypes by name. torch.distributed.checkpoint takes only numbers, text and
    tensors. If it is rounded stochastically, its seed notes the version of the bits."""
    texts = {
        key: str(group[key]).removeprefix("torch.") for key in DTYPE_OPTIONS if isinstance(group.get(key), torch.dtype)
    }
    return {**group, **texts, **({"seed": group["seed"] + (RANDOM_BITS << 32)} if _draws(group) else {})}


def _draws(group: Group) -> bool:
    """Whether random bits are drawn for a group of ours."""
    low = as_dtype("state_dtype", group.get("state_dtype", torch.float32)) != torch.float32
    return bool("method" in group and (group.get("stochastic_rounding") or low))


def with_anchor(
    saved: Mapping[str, Any], anchor: Tensor | None, digest: Tensor | None, *, own: bool = True
) -> dict[str, Any]:
    """One parameter's saved state with its anchor, the anchor's digest, or both.

    own: whether the tensor is the optimizer's. If it is the user's, the state gets a copy. torch.distributed.checkpoint
        loads into the tensors that it finds.
    """
    added = without_anchor(saved)
    if anchor is not None:
        added["anchor"] = anchor if own else anchor.detach().clone()
    if digest is not None:
        added["anchor_digest"] = digest
    return added


def without_anchor(saved: Mapping[str, Any]) -> dict[str, Any]:
    """One parameter's saved state without its anchor."""
    return {key: value for key, value in saved.items() if key not in ("anchor", "anchor_digest")}


def present(saved: Mapping[str, Any]) -> dict[str, Any]:
    """One parameter's saved state without what torch.distributed.checkpoint did not find. It puts {} in those
    places."""
    missing = [key for key, value in saved.items() if value is None or (isinstance(value, dict) and not value)]
    return {key: value for key, value in saved.items() if key not in missing}
