"""Moments in 8 bits: how they lie in memory, and how they become numbers and come back.

A block is `BLOCK` neighbours within a row. Each of its elements is a code k, and the block has a scale 2^(e − 127), of
which the byte e is kept (E8M0 of the OCP Microscaling formats, 255 for nan). A code stands for ±k² units of the scale:

    first moments   int8,  |k| ≤ 127:   x = sign(k)·k²·2⁻¹⁴·2^(e − 127)
    second moments  uint8, k ≤ 255:     x = k²·2⁻¹⁶·2^(e − 127)

The square spreads the codes evenly over √x, so that small numbers beside a large one keep their size. A second moment
above 0 never becomes 0, which would make an Adam step as large as 1/ε.
"""

import torch
from torch import Tensor

from .sharding import has_whole_rows, is_dtensor, local

EIGHT_BIT = "8bit"
BLOCK = 32
SCALE = "_scale"  # ends the key of the scales of a moment
_SIGNED = ("exp_avg", "momentum_buffer")
_LEVELS = {torch.int8: (127, 14), torch.uint8: (255, 16)}  # the largest k, and how many bits its square has
_NAN = 255


def is_scale(key: str) -> bool:
    """Whether the state `key` holds the scales of a moment."""
    return key.endswith(SCALE)


def dtype_of_codes(key: str) -> torch.dtype:
    """That of the codes of a moment: int8 if it has a sign."""
    return torch.int8 if key in _SIGNED else torch.uint8


def in_blocks(param: Tensor) -> bool:
    """Whether moments of a parameter can be in 8 bits: its rows, the indices of dimension 0, are blocks that lie side
    by side in memory, and no process has only part of a row."""
    if param.dim() < 2 or param.dtype == torch.float64 or not param.numel():
        return False
    length = param.numel() // param.shape[0]
    apart = param.shape[0] > 1 and param.stride(0) != length
    return length % BLOCK == 0 and not apart and has_whole_rows(param)


def shape_of_scales(param: Tensor) -> tuple[int, ...]:
    """One row for each of the parameter's, with a scale for each block."""
    rows = param.shape[0] if param.dim() else 1
    return rows, param.numel() // max(rows, 1) // BLOCK


def zero_scales(param: Tensor) -> Tensor:
    """Scales of moments that are zero, spread as the parameter is."""
    rows, blocks = shape_of_scales(param)
    if not is_dtensor(param):
        return torch.zeros(rows, blocks, dtype=torch.uint8, device=param.device)
    from torch.distributed.tensor import DTensor

    here = local(param)
    return DTensor.from_local(
        torch.zeros(here.shape[0], blocks, dtype=torch.uint8, device=here.device),
        param.device_mesh,  # type: ignore[attr-defined]
        param.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=torch.Size((rows, blocks)),
        stride=(blocks, 1),
    )


def decoded(codes: Tensor, scales: Tensor) -> Tensor:
    """The numbers, in float32, in the layout of their codes."""
    out = torch.empty_like(codes, dtype=torch.float32)
    k, e = _blocks(local(codes)), local(scales).reshape(-1, 1).to(torch.int32)
    k, bits = k.float(), _LEVELS[codes.dtype][1]
    scale = torch.where(e == _NAN, torch.nan, (e << 23).view(torch.float32))
    _blocks(local(out)).copy_(k * k.abs() * 2.0**-bits * scale)
    return out


def encode(values: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Writes the codes and scales that are nearest to float32 numbers. They lie in memory as the codes do."""
    most, bits = _LEVELS[codes.dtype]
    x = _blocks(local(values))
    largest = x.abs().amax(1, keepdim=True)
    # What the largest code stands for, a last place aside, still belongs to this scale.
    e = ((largest * (2.0**bits / most**2 * (1 - 2.0**-20))).view(torch.int32) >> 23) + 1
    finite = largest.isfinite()
    e = torch.where(finite, e.clamp(1, 253), _NAN)
    squares = torch.where(finite, x.abs(), 0) * (254 - e << 23).view(torch.float32) * 2.0**bits
    k = squares.sqrt().floor().clamp(max=most)
    k = (k + (squares - k * k > k + 0.5)).clamp(max=most)
    if codes.dtype == torch.uint8:
        k = torch.where(finite & (x > 0), k.clamp(min=1), k)
    _blocks(local(codes)).copy_(k * x.sign().nan_to_num())
    local(scales).view(-1, 1).copy_(e)


def _blocks(tensor: Tensor) -> Tensor:
    """A tensor's memory, a row for each block."""
    return tensor.as_strided((tensor.numel() // BLOCK, BLOCK), (BLOCK, 1))
