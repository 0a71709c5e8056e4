"""What outlives a step: the tensors that a parameter keeps, their dtypes and layouts, and how they are loaded."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from .bases import KEPT, Base, GroupSpec, state_dtype_of, state_shape_of
from .eight_bit import SCALE, decoded, encode, is_scale, zero_scales
from .files import DISK, file_of, files_of, note
from .memory import is_lazily_read
from .methods import LEARNED
from .sharding import local, placed_as, placement_of, same_memory

ParamState = dict[str, Any]
DIGEST_BYTES = 32


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory without gaps or overlaps, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(tensor.stride(), tensor.shape, strict=True) if sz != 1):
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether equal offsets in memory hold equal indices. Strides of dimensions of size 1 do not matter."""
    strides = zip(a.stride(), b.stride(), a.shape, strict=True)
    return a.numel() == 0 or all(p == q for p, q, size in strides if size != 1)


def beside(param: Tensor, value: Tensor) -> Tensor:
    """`value` on `param`'s device in its memory layout: itself if it is so already, else a copy."""
    if (
        not is_lazily_read(value)
        and value.device == param.device
        and same_layout(value, param)
        and placement_of(value) == placement_of(param)
    ):
        return value
    return copy_beside(param, value)


def copy_beside(param: Tensor, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of `value` on `param`'s device in its memory layout."""
    copy = torch.empty_like(param, dtype=dtype or value.dtype, requires_grad=False)
    return copy.copy_(placed_as(value.detach(), param))


def is_reachable(anchor: Tensor, param: Tensor) -> bool:
    """Whether a step on `param` can read `anchor` where it lies: on its device, or in host memory pinned for it."""
    return anchor.device == param.device or (anchor.device.type == "cpu" and anchor.is_pinned())


def keep_anchor(
    param: Tensor,
    anchor: Tensor,
    dtype: torch.dtype | None,
    device: str | None,
    *,
    copy: bool = False,
    label: str = "a parameter",
) -> Tensor:
    """`anchor` in `param`'s memory layout and of `dtype` (None: its own). It is itself if it is so already, and not in
    the pages of a file. Else, or with `copy`, it is a copy.

    device: None is the parameter's. "cpu" is host memory, pinned if a GPU is to read it. "disk" leaves the anchor in
        the pages of its file.

    Raises ValueError if an anchor cannot stay on disk, and RuntimeError if its file was written since it was mapped.
    """
    dtype = dtype or anchor.dtype
    if device == DISK:
        return _on_disk(param, anchor, dtype, label)
    there = param.device if device is None else torch.device(device)
    pin = there.type == "cpu" and param.device.type == "cuda"
    file, anchor = file_of(anchor), placed_as(anchor, param)
    fits = (
        not is_lazily_read(anchor) and anchor.device == there and anchor.dtype == dtype and same_layout(anchor, param)
    )
    if fits and not copy and file is None and (not pin or anchor.is_pinned()):
        return anchor
    kept = torch.empty_like(param, dtype=dtype, device=there, requires_grad=False, pin_memory=pin)
    if file is None:
        return kept.copy_(anchor.detach())
    file.check()
    kept.copy_(anchor.detach())
    file.check()  # or a part of what was copied may be of another time
    return kept


def _on_disk(param: Tensor, anchor: Tensor, dtype: torch.dtype, label: str) -> Tensor:
    """`anchor` in the pages of its file, spread as `param` is."""
    file, what = file_of(anchor), ""
    placed = anchor if file is None else placed_as(anchor, param)
    here, all_of_it = local(placed), local(anchor)
    if file is None:
        what = "is not in a file"
    elif param.device.type != "cpu":
        what = f"would have to be on {param.device}, as the parameter is"
    elif dtype != anchor.dtype:
        what = f"is {anchor.dtype} in the file, and anchor_dtype asks for {dtype}"
    elif here.numel() and here.untyped_storage().data_ptr() != all_of_it.untyped_storage().data_ptr():
        what = "is cut to the parameter's shards, which are copies"
    elif not same_layout(here, local(param)):
        what = "has another memory layout in the file than the parameter"
    if file is None or what:
        raise ValueError(
            f"anchor_device='disk' cannot leave the anchor of {label} in a file: it {what}; leave anchor_device None, "
            "which reads it into memory"
        )
    if placed is not anchor:
        note(placed, file)
    return placed


def weights_of(param: Tensor, kept: ParamState) -> Tensor:
    """What the next step begins from: the master, as far as the parameter still shows it. Elsewhere the parameter
    counts."""
    master = kept.get("master")
    return param if master is None else torch.where(master.to(param.dtype) == param, master, param.to(master.dtype))


def bring_moment(param: Tensor, kept: ParamState, key: str, dtype: torch.dtype) -> None:
    """Brings a moment, or other numbers of a parameter, to its device and memory layout and to `dtype`. What is there
    already stays the same tensor.

    Codes stay as they are if they lie in memory as the parameter does. If not, or if `dtype` asks for other numbers,
    they are decoded, and encoded to nearest.
    """
    value, scales = kept[key], kept.pop(key + SCALE, None)
    if scales is not None:
        if value.dtype == dtype and same_layout(value, param):
            kept[key] = beside(param, value)
            like = zero_scales(param)
            kept[key + SCALE] = beside(like, scales)
            return
        value = decoded(value, scales)
    if dtype.is_floating_point:
        kept[key] = beside(param, value.to(dtype))
        return
    kept[key], kept[key + SCALE] = torch.empty_like(param, dtype=dtype, requires_grad=False), zero_scales(param)
    encode(copy_beside(param, value, torch.float32), kept[key], kept[key + SCALE])


def fill_state(param: Tensor, kept: ParamState, base: Base, spec: GroupSpec, steps_on: torch.device) -> None:
    """Adds what a parameter of such a group keeps and `kept` lacks: zeros, and for master weights the weights. Brings
    what is there to the parameter's device and memory layout.

    The step count is a float32 on `steps_on`.
    """
    for key, needed in base.state.items():
        if not needed(spec, param):
            if key == "master":
                kept.pop(key, None)
            continue
        dtype = state_dtype_of(key, param, spec.state_dtype)
        if is_scale(key):
            if key not in kept:
                kept[key] = zero_scales(param)
        elif key in LEARNED:
            zeros = torch.zeros(state_shape_of(key, param), dtype=dtype, device=param.device)
            kept[key] = kept.get(key, zeros).to(param.device)
        elif key in kept:
            bring_moment(param, kept, key, dtype)
        elif key == "master":
            kept[key] = copy_beside(param, param, dtype)
        else:
            kept[key] = torch.zeros_like(param, dtype=dtype, requires_grad=False)
            if key == "momentum_buffer":
                kept.pop("step", None)  # it counts the updates of the buffer, which is new
    if base.counted(spec, param):
        count = kept.get("step", torch.zeros((), dtype=torch.float32, device=steps_on))
        kept["step"] = count.to(steps_on)
    if "anchor" in kept:
        kept["anchor"] = keep_anchor(param, kept["anchor"], None, spec.anchor_device)


def check_loadable(param: Tensor, label: str, saved: Mapping[str, Any]) -> None:
    """Raises ValueError if a saved tensor does not have the shape that this parameter's state has."""
    for key, value in saved.items():
        if key not in KEPT - {"step"} and key != "anchor_digest":
            continue
        expected = (DIGEST_BYTES,) if key == "anchor_digest" else state_shape_of(key, param)
        if isinstance(value, Tensor) and tuple(value.shape) != expected:
            raise ValueError(
                f"loaded state {key!r} of {label} has shape {tuple(value.shape)}, the parameter's is {expected}: "
                "the checkpoint belongs to another model, or its parameters come in another order"
            )


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether two anchors have the same dtype, place and elements. One whose file was written has none."""
    if any(not file.is_intact() for file in files_of((a, b))):
        return False
    alike = a.dtype == b.dtype and a.device == b.device and placement_of(a) == placement_of(b)
    return same_memory(a, b) or (alike and torch.equal(local(a), local(b)))


def load(param: Tensor, saved: Mapping[str, Any], spec: GroupSpec, present: Tensor | None) -> ParamState:
    """A copy of one parameter's saved state, in the dtypes that are kept here. The anchor keeps the dtype in which it
    was saved. If it equals `present`, the anchor that is here, that one stays. So a move does not double it.

    Takes what torch.optim saves: bfloat16 moments, absent buffers, buffers without a step count.
    """
    loaded: ParamState = {}
    for key, value in saved.items():
        if value is None or key == "anchor_digest":
            continue
        if key == "step":
            loaded[key] = torch.tensor(float(value), dtype=torch.float32, device="cpu")
        elif key in LEARNED:
            loaded[key] = value.to(param.device, torch.float64, copy=True)
        elif key == "anchor" and present is not None and same_numbers(value, present):
            loaded[key] = present
        elif key == "anchor":
            loaded[key] = keep_anchor(param, value, None, spec.anchor_device, copy=True)
        elif key in KEPT:
            if not is_scale(key):  # those come with their moments
                loaded.update(_moment(param, key, saved, state_dtype_of(key, param, spec.state_dtype)))
        else:  # a user's own
            loaded[key] = value.to(param.device, copy=True) if isinstance(value, Tensor) else deepcopy(value)
    if "momentum_buffer" in loaded:
        loaded.setdefault("step", torch.ones((), dtype=torch.float32, device="cpu"))
    return loaded


def _moment(param: Tensor, key: str, saved: Mapping[str, Any], dtype: torch.dtype) -> ParamState:
    """A copy of a saved moment, and of its scales if it is kept with scales here."""
    if dtype.is_floating_point and key + SCALE not in saved:
        return {key: copy_beside(param, saved[key], dtype)}
    copied = {part: saved[part].clone() for part in (key, key + SCALE) if saved.get(part) is not None}
    bring_moment(param, copied, key, dtype)
    return copied
