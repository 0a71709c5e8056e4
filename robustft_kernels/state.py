"""What outlives a step: which tensors a parameter keeps, in which dtype and layout, and how they are loaded."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .bases import RADIUS_STATE, Base, Row, arithmetic_of, delta_dtype_of

ParamState = dict[str, Any]


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory without gaps or overlaps, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(tensor.stride(), tensor.shape, strict=True) if sz != 1):
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether equal offsets in memory hold equal indices; strides of dimensions of size 1 do not matter."""
    strides = zip(a.stride(), b.stride(), a.shape, strict=True)
    return a.numel() == 0 or all(p == q for p, q, size in strides if size != 1)


def beside(param: Tensor, value: Tensor) -> Tensor:
    """`value` on `param`'s device in its memory layout: itself where it is so already, else a copy."""
    if value.device == param.device and same_layout(value, param):
        return value
    return copy_beside(param, value)


def copy_beside(param: Tensor, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy of `value` on `param`'s device in its memory layout."""
    return torch.empty_like(param, dtype=dtype or value.dtype, requires_grad=False).copy_(value.detach())


def prepare(param: Tensor, kept: ParamState, base: Base, row: Row, steps_on: torch.device) -> None:
    """Gives `kept` what `base` keeps for a parameter of a group: zeros at first, later brought to its layout.

    The step count is a float32 on `steps_on`.
    """
    for key, drawn in base.state:
        if not drawn(row):
            continue
        if key == "radius_state":
            zeros = torch.zeros(len(RADIUS_STATE), dtype=torch.float64, device=param.device)
            kept[key] = kept.get(key, zeros).to(param.device)
        elif key in kept:
            kept[key] = beside(param, kept[key])
        else:
            kept[key] = torch.zeros_like(param, dtype=dtype_of(key, param), requires_grad=False)
            if key == "momentum_buffer":
                kept.pop("step", None)  # it counts the updates of the buffer
    if base.counted(row):
        count = kept.get("step", torch.zeros((), dtype=torch.float32, device=steps_on))
        kept["step"] = count.to(steps_on)
    if "anchor" in kept:
        kept["anchor"] = beside(param, kept["anchor"])


def dtype_of(key: str, param: Tensor) -> torch.dtype:
    """In what the state `key` of a parameter is kept: moments in float32 (float64), FTP's delta in bfloat16 (float64),
    a learned radius in float64."""
    if key == "radius_state":
        return torch.float64
    return delta_dtype_of(param.dtype) if key == "delta" else arithmetic_of(param.dtype)


def check_loadable(param: Tensor, label: str, saved: Mapping[str, Any]) -> None:
    """Raises ValueError where a saved tensor does not have the shape of its parameter."""
    for key, value in saved.items():
        expected = (len(RADIUS_STATE),) if key == "radius_state" else tuple(param.shape)
        if isinstance(value, Tensor) and key != "step" and tuple(value.shape) != expected:
            raise ValueError(
                f"loaded state {key!r} of {label} has shape {tuple(value.shape)}, the parameter's is {expected}: "
                "the checkpoint belongs to another model, or its parameters come in another order"
            )


def load(param: Tensor, saved: Mapping[str, Any]) -> ParamState:
    """A copy of one parameter's saved state, in the dtypes kept here: moments as `prepare` makes them, the anchor as
    it was saved. Takes what torch.optim saves: bfloat16 moments, absent buffers, buffers without a step count."""
    loaded: ParamState = {}
    for key, value in saved.items():
        if value is None:
            continue
        if key == "step":
            loaded[key] = torch.tensor(float(value), dtype=torch.float32, device="cpu")
        elif key == "radius_state":
            loaded[key] = value.to(param.device, torch.float64, copy=True)
        elif isinstance(value, Tensor) and value.is_floating_point():
            loaded[key] = copy_beside(param, value, value.dtype if key == "anchor" else dtype_of(key, param))
        else:
            loaded[key] = value
    if "momentum_buffer" in loaded:
        loaded.setdefault("step", torch.ones((), dtype=torch.float32, device="cpu"))
    return loaded
