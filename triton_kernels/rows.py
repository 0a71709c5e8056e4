"""The row measure: nᵢ = Σ|cᵢ| of every row of every tensor, in one launch, deterministic like the sweeps.

A row is an index of dimension 0; a tensor of less than two dimensions is one row. A program works on one chunk: a part
of one row, or several whole rows, which a tile takes a few at a time, a warp each.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..state import same_layout
from .chunk import ALL, CHUNK, INTERPRETED, LANES, NONE, load
from .table import DTYPES, gpu_of, options_of

COLUMNS = ("param", "anchor", "first", "rows", "length", "stride", "out", "counter")
PARAM, ANCHOR, FIRST, ROWS, LENGTH, STRIDE, OUT, COUNTER = map(tl.constexpr, range(len(COLUMNS)))
WIDTH = tl.constexpr(len(COLUMNS))
TILE = 8


@dataclass(frozen=True, eq=False)  # made once each, by variant_of
class Variant:
    """What the kernel is compiled for: dtypes of param, anchor and arithmetic, whether there are anchors, the elements
    of a chunk, accumulators, rows of a tile, and neighbours that a thread takes at once."""

    P: Any
    A: Any
    T: Any
    ANCHORED: Any
    CHUNK: Any
    LANES: Any
    TILE: Any
    VECTOR: Any


@triton.jit
def row_sums(tensor, row, rows, begin, n, TILE: tl.constexpr, VECTOR: tl.constexpr, V: tl.constexpr):
    """Σ|c| of n elements from `begin` of TILE rows from `row`, of which `rows` exist.

    Element e of row i, counted in the order of memory, lies at (e // s)·(s·rows) + i·s + e % s, where s is the stride
    of dimension 0: any dense layout. With VECTOR above 1 rows are contiguous, addresses multiples of 16 bytes, and the
    length of a row one of VECTOR.
    """
    WIDE: tl.constexpr = VECTOR > 1
    stride, all_rows = tl.load(tensor + STRIDE), tl.load(tensor + ROWS)
    if WIDE:
        n, stride = n // VECTOR * VECTOR, stride // VECTOR * VECTOR  # tells the compiler
    param, anchor = tl.load(tensor + PARAM), tl.load(tensor + ANCHOR)
    SHARE: tl.constexpr = V.LANES // TILE
    i = tl.arange(0, TILE)
    lanes = tl.zeros([TILE, SHARE], V.T)
    for at in range(0, n, SHARE * VECTOR):
        lane = at + tl.arange(0, SHARE * VECTOR)
        e = begin + lane
        if not WIDE:
            e = e // stride * (stride * all_rows) + e % stride
        offsets = ((row + i) * stride)[:, None] + e[None, :]
        inside = (i < rows)[:, None] & (lane < n)[None, :]
        c = load(param, offsets, inside, V.P, V.T, WIDE)
        if V.ANCHORED > NONE:
            c -= load(anchor, offsets, inside, V.A, V.T, WIDE)
        lanes += tl.sum(tl.reshape(tl.abs(c), [TILE, SHARE, VECTOR]), 2)
    return tl.sum(lanes.to(tl.float64), 1)


@triton.jit
def whole_rows(tensor, row, rows, n, norms, VECTOR: tl.constexpr, V: tl.constexpr):
    """The norms of `rows` rows from `row`."""
    for first in range(0, rows, V.TILE):
        i = first + tl.arange(0, V.TILE)
        sums = row_sums(tensor, row + first, rows - first, 0, n, V.TILE, VECTOR, V)
        tl.store(norms + row + i, sums, mask=i < rows)


@triton.jit
def part_of_row(tensor, part, row, begin, parts, partials, counters, norms, VECTOR: tl.constexpr, V: tl.constexpr):
    """One chunk of a long row; the last of them to finish folds them, in their order."""
    n = tl.minimum(tl.load(tensor + LENGTH) - begin, V.CHUNK).to(tl.int32)
    tl.store(partials + part, tl.sum(row_sums(tensor, row, 1, begin, n, 1, VECTOR, V)))
    tl.debug_barrier()
    counter = counters + tl.load(tensor + COUNTER) + row
    if tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1:
        first = partials + part - begin // V.CHUNK
        lanes = tl.zeros([V.LANES], tl.float64)
        for at in range(0, parts, V.LANES):
            i = at + tl.arange(0, V.LANES)
            lanes += tl.load(first + i, mask=i < parts, other=0.0, cache_modifier=".cg")
        tl.store(norms + row, tl.sum(lanes))


@triton.jit
def row_sweep(tensors, owners, partials, counters, out, V: tl.constexpr):
    """The only kernel: one program a chunk."""
    chunk = tl.program_id(0)
    tensor = tensors + tl.load(owners + chunk).to(tl.int64) * WIDTH
    all_rows, length = tl.load(tensor + ROWS), tl.load(tensor + LENGTH)
    norms = out + tl.load(tensor + OUT)
    place = chunk - tl.load(tensor + FIRST)
    parts = (length + V.CHUNK - 1) // V.CHUNK
    addresses = tl.load(tensor + PARAM) | tl.load(tensor + ANCHOR)
    wide = (addresses % 16 == 0) & (length % V.VECTOR == 0) & (tl.load(tensor + STRIDE) == length)
    if parts > 1:
        row, begin = place // parts, place % parts * V.CHUNK
        if wide:
            part_of_row(tensor, chunk, row, begin, parts, partials, counters, norms, V.VECTOR, V)
        else:
            part_of_row(tensor, chunk, row, begin, parts, partials, counters, norms, 1, V)
    else:
        together = V.CHUNK // length
        row = place * together
        rows = tl.minimum(all_rows - row, together).to(tl.int32)
        if wide:
            whole_rows(tensor, row, rows, length.to(tl.int32), norms, V.VECTOR, V)
        else:
            whole_rows(tensor, row, rows, length.to(tl.int32), norms, 1, V)


@cache
def variant_of(param: torch.dtype, anchor: torch.dtype | None) -> Variant:
    """The kernel for such tensors; None: the anchor is zero."""
    c = tl.constexpr
    return Variant(
        P=c(DTYPES[param]),
        A=c(DTYPES[anchor or param]),
        T=c(tl.float64 if param == torch.float64 else tl.float32),
        ANCHORED=NONE if anchor is None else ALL,
        CHUNK=c(CHUNK),
        LANES=c(8 * LANES if INTERPRETED else LANES),
        TILE=c(TILE),
        VECTOR=c(16 // param.itemsize),
    )


def row_norms(params: list[Tensor], anchors: list[Tensor] | None) -> list[Tensor]:
    """nᵢ = Σ|θᵢ − θ₀ᵢ| of each tensor's rows, in float64. anchors: parallel to `params` and laid out alike; None: 0.

    One launch for each pair of dtypes. Raises ValueError for a dtype or a layout that the kernel does not take.
    """
    norms = [torch.zeros(p.shape[0] if p.dim() > 1 else 1, dtype=torch.float64, device=p.device) for p in params]
    classes: dict[tuple[torch.dtype, torch.dtype | None], list[int]] = {}
    for k, param in enumerate(params):
        anchor = None if anchors is None else anchors[k]
        for tensor in (param, *(() if anchor is None else (anchor,))):
            if tensor.dtype not in DTYPES:
                raise ValueError(f"robustft: the Triton backend does not take {tensor.dtype}")
            if tensor.shape != param.shape or tensor.device != param.device or not same_layout(tensor, param):
                raise ValueError("robustft: an anchor has not the device, shape and strides of its param")
        if param.numel():
            classes.setdefault((param.dtype, None if anchor is None else anchor.dtype), []).append(k)
    for dtypes, of in classes.items():
        counts = [norms[k].numel() for k in of]
        flat = _measure([params[k] for k in of], anchors and [anchors[k] for k in of], counts, variant_of(*dtypes))
        for k, part in zip(of, flat.split(counts), strict=True):
            norms[k] = part
    return norms


def _measure(params: list[Tensor], anchors: list[Tensor] | None, counts: list[int], variant: Variant) -> Tensor:
    """The norms of all rows, tensor after tensor, of which `counts` says how many each has."""
    device = params[0].device
    table: list[list[int]] = []
    owners: list[int] = []
    out = counters = 0
    for k, (param, rows) in enumerate(zip(params, counts, strict=True)):
        length = param.numel() // rows
        stride = param.stride(0) if rows > 1 else length
        anchor = anchors[k].data_ptr() if anchors else 0
        table.append([param.data_ptr(), anchor, len(owners), rows, length, stride, out, counters])
        owners += [k] * (rows * -(-length // CHUNK) if length > CHUNK else -(-rows // (CHUNK // length)))
        out += rows
        counters += rows if length > CHUNK else 0
    norms = torch.zeros(out, dtype=torch.float64, device=device)
    row_sweep[(len(owners),)](
        torch.tensor(table, dtype=torch.int64, device=device),
        torch.tensor(owners, dtype=torch.int32, device=device),
        torch.full((len(owners),), torch.nan, dtype=torch.float64, device=device),
        torch.zeros(max(counters, 1), dtype=torch.int32, device=device),
        norms,
        V=variant,
        **options_of(variant, gpu_of(device)),
    )
    return norms
