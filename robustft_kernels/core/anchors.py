"""Where θ₀ comes from: a copy of the weights at construction, zero (no memory), a file, or tensors of the user's. It is
kept on the parameters' device or in host memory."""

from collections.abc import Mapping, Sequence
from itertools import islice
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from .exchange import agree
from .files import DISK, Path_, read
from .memory import without_memory
from .mistakes import refuse_model
from .names import bare_name, some, under_one_prefix
from .sharding import local
from .state import is_dense, is_reachable, keep_anchor

Anchor = Path_ | Sequence[Tensor] | Mapping[str, Tensor] | None
KINDS = ("initial", "zero", "file", "given")
EXACT = "exact"
NARROWER = (torch.bfloat16, torch.float16, torch.float32)  # what may hold wider weights exactly, best first
PIECE = 2**20  # elements


def resolve(
    spec: Anchor,
    params: list[Tensor],
    names: list[str] | None,
    labels: list[str],
    *,
    anchored: bool,
    dtype: torch.dtype | str | None = EXACT,
    device: str | None = None,
) -> tuple[str, list[Tensor] | None]:
    """What a group's `anchor` means: its kind (of `KINDS`), and one tensor for each parameter.

    spec: "initial" copies the weights as they are now. "zero", or None, keeps nothing. A path names a safetensors file,
        its index, or the directory of either. It is read into memory, and goes by `names`. A sequence is parallel to
        `params`. A mapping goes by `names`. What is given is used as it is, and never written. It is copied only if its
        memory layout, `dtype` or `device` requires that.
    anchored: whether the group's method needs them. If not, no weights are copied and no file is read.
    dtype: of the anchors. "exact" copies the weights in the smallest dtype that holds all of the group exactly, and
        leaves given anchors as they are. None is the parameter's.
    device: None is the parameter's. "cpu" keeps them in host memory, pinned if a GPU is to read them. "disk" leaves
        them in their file, which is mapped.

    Raises ValueError for an unknown word, a missing entry, or a tensor that cannot anchor its parameter, or not from a
    file where `device` asks for that. Raises ImportError for a file without safetensors, and RuntimeError for one that
    is written while it is read.
    """
    kind = "zero" if spec is None else spec if isinstance(spec, str) and spec in KINDS[:2] else "given"
    if kind == "zero" or (not anchored and (kind == "initial" or isinstance(spec, str | PathLike))):
        return ("initial" if kind == "given" else kind), None
    if device == DISK and not (kind == "given" and isinstance(spec, str | PathLike)):
        raise ValueError(
            f"anchor_device='disk' leaves anchors in their file, and the anchor here is {kind!r}: give the path of a "
            "safetensors file, or leave anchor_device None"
        )
    if kind == "initial":
        dtypes = exact_dtypes(params) if dtype == EXACT else [_asked(dtype, param) for param in params]
        copies = zip(params, dtypes, strict=True)
        return kind, [keep_anchor(param, param, own, device, copy=True) for param, own in copies]
    if isinstance(spec, str | PathLike):
        kind, spec = "file", read(spec)
    given = _by_name(spec, names) if isinstance(spec, Mapping) else in_order(spec or (), params)
    for anchor, param, label in zip(given, params, labels, strict=True):
        check_fits(anchor, param, label, anywhere=kind == "file" or device is not None)
        _check_apart(anchor, param, label)
    if kind == "given":
        given = [anchor.detach() for anchor in given]
    return kind, [
        keep_anchor(param, anchor, None if dtype == EXACT else _asked(dtype, param), device, label=label)
        for param, anchor, label in zip(params, given, labels, strict=True)
    ]


def exact_dtypes(params: Sequence[Tensor]) -> list[torch.dtype]:
    """For each of these weights, the smallest dtype that holds all of them exactly. A weight whose own dtype is no
    larger keeps it."""
    for dtype in NARROWER:
        wider = [param.detach() for param in params if param.dtype.itemsize > dtype.itemsize]
        if wider and agree(all(_holds(dtype, local(param)) for param in wider), wider):
            return [dtype if param.dtype.itemsize > dtype.itemsize else param.dtype for param in params]
    return [param.dtype for param in params]


def _holds(dtype: torch.dtype, param: Tensor) -> bool:
    """Whether `dtype` holds these weights exactly. Looks at them piece by piece, until one does not fit."""
    flat = param.as_strided((param.numel(),), (1,)) if is_dense(param) else param.flatten()
    return all(torch.equal(piece.to(dtype).to(piece.dtype), piece) for piece in flat.split(PIECE))


def check_options(dtype: object, device: object) -> None:
    """Raises ValueError for an `anchor_dtype` or `anchor_device` that `resolve` does not know."""
    if not (dtype is None or dtype == EXACT or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)):
        raise ValueError(f"anchor_dtype must be 'exact', None or a floating-point torch.dtype, got {dtype!r}")
    if device not in (None, "cpu", DISK):
        raise ValueError(f"anchor_device must be None (the parameters'), 'cpu' or 'disk', got {device!r}")


def _asked(dtype: torch.dtype | str | None, param: Tensor) -> torch.dtype:
    assert not isinstance(dtype, str)
    return dtype or param.dtype


def _by_name(spec: Mapping[str, Tensor], names: list[str] | None) -> list[Tensor]:
    """The entries of a mapping for these names. What wrappers put into names does not count. Other entries are passed
    over, since a state dict has buffers and second names of tied weights. Names that are missing may all differ by one
    prefix: a base model's checkpoint lacks the "bert." that a model with a head puts before its names."""
    if names is None:
        raise ValueError("an anchor mapping needs named parameters: pass model.named_parameters() as params")
    bare = {bare_name(name): tensor for name, tensor in spec.items()}
    missing = [name for name in names if bare_name(name) not in bare]
    found = under_one_prefix(list(map(bare_name, missing)), bare)
    if found is None:
        raise ValueError(
            f"the anchor mapping lacks {some(missing)}; add what is missing, or give a fresh head a group of its own "
            "with method='none'"
        )
    bare.update({name: bare[key] for name, key in found.items()})
    return [bare[bare_name(name)] for name in names]


def over_groups(spec: Anchor, groups: Sequence[Mapping[str, Any]]) -> list[Anchor]:
    """What each group gets of an anchor that is given for all groups: the anchor itself, or its part of a list. A list
    is parallel to the parameters of the groups without an anchor of their own.

    Raises ValueError for a list of another length, TypeError for a model or a lone tensor.
    """
    check_kind(spec)
    own = ["anchor" in group or "pre" in group for group in groups]
    if spec is None or isinstance(spec, str | PathLike | Mapping):
        return [spec] * len(groups)
    given, counts = list(spec), [0 if its else len(group["params"]) for group, its in zip(groups, own, strict=True)]
    if len(given) != sum(counts):
        raise ValueError(
            f"{len(given)} anchors for {sum(counts)} parameters: a list of anchors is parallel to params, over all "
            "groups without an anchor of their own"
        )
    parts = iter(given)
    return [list(islice(parts, n)) for n in counts]


def check_kind(spec: object) -> None:
    """Raises TypeError for a model, or a tensor that is no list, as an anchor."""
    refuse_model("anchor", spec, "its state_dict() as anchor, and model.named_parameters() as params")
    if isinstance(spec, Tensor):
        raise TypeError("anchor is a tensor; give a list of tensors parallel to params, such as [tensor]")


def in_order(spec: Sequence[Tensor], params: list[Tensor]) -> list[Tensor]:
    """The anchors of a list. Raises ValueError when it is not parallel to the parameters."""
    given = list(spec)
    if len(given) != len(params):
        raise ValueError(f"{len(given)} anchors for {len(params)} parameters: a list of anchors is parallel to params")
    return given


def check_fits(anchor: Tensor, param: Tensor, label: str, *, anywhere: bool = False) -> None:
    """Raises ValueError if `anchor` cannot be that of `param`, called `label`, and TypeError if it is no tensor.
    anywhere: whether it may still be on another device."""
    if not isinstance(anchor, Tensor):
        hint = "; give dict(model.named_parameters()) for pairs" if isinstance(anchor, tuple) else ""
        raise TypeError(f"the anchor of {label} is a {type(anchor).__name__}, not a tensor{hint}")
    if anchor.shape != param.shape:
        raise ValueError(
            f"the anchor of {label} has shape {tuple(anchor.shape)}, the parameter {tuple(param.shape)}; give the "
            "anchors of this very model, in its order, or leave a fresh head out by a group with method='none'"
        )
    if not anywhere and not is_reachable(anchor, param):
        raise ValueError(
            f"the anchor of {label} is on {anchor.device}, the parameter on {param.device}; move it there, or give "
            "anchor_device='cpu' to keep it in host memory"
        )
    if what := without_memory(anchor):
        raise ValueError(f"the anchor of {label} is {what}")
    if not anchor.is_floating_point():
        raise ValueError(f"the anchor of {label} is {anchor.dtype}; a floating-point tensor is needed")


def _check_apart(anchor: Tensor, param: Tensor, label: str) -> None:
    anchor, param = local(anchor), local(param)
    if anchor.numel() and anchor.untyped_storage().data_ptr() == param.untyped_storage().data_ptr():
        raise ValueError(f"the anchor of {label} shares its memory with a parameter and would move along; clone it")
