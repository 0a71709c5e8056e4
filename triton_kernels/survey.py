"""Sweep 0 of tensors: what a step must know of a whole tensor. row_sweeps.py has that of rows."""

import triton
import triton.language as tl

from .chunk import (
    ANCHOR,
    CALLERS,
    CHUNKS,
    FACTOR,
    FIRST,
    NONE,
    PARAM,
    ROW,
    RULE,
    WIDTH,
    WORKING,
    aligned,
    load,
    load_weights,
    present,
)
from .decide import among, conflict
from .measure import fold, sums
from .sweeps import extent, read_terms, step_scalars, this_step

SUMS = tl.constexpr(2)  # of a chunk: ⟨g,d⟩ and ‖d‖²


@triton.jit
def survey_span(tensor, grad, begin, n, factor, VECTOR: tl.constexpr, V: tl.constexpr):
    """The accumulators of ⟨g,d⟩ and ‖d‖² over n elements from `begin`. VECTOR is as in `step_span`."""
    WIDE: tl.constexpr = VECTOR > 1
    if WIDE:
        n = n // VECTOR * VECTOR
    param, working, anchor = tl.load(tensor + PARAM), tl.load(tensor + WORKING), tl.load(tensor + ANCHOR)
    anchored = present(anchor, n, V.ANCHORED)
    dots, squares = tl.zeros([V.LANES], V.ARITHMETIC), tl.zeros([V.LANES], V.ARITHMETIC)
    for at in range(0, n, V.LANES * VECTOR):
        lane = at + tl.arange(0, V.LANES * VECTOR)
        inside = lane < n
        offsets = begin + lane
        d = load_weights(param, working, offsets, inside, WIDE, V)
        g = load(grad, offsets, inside, V.GRAD_DTYPE, V.ARITHMETIC, WIDE and V.GRAD_ALIGNED) * factor
        if V.ANCHORED > NONE:
            d -= load(anchor, offsets, lane < anchored, V.ANCHOR_DTYPE, V.ARITHMETIC, WIDE and V.ANCHOR_ALIGNED)
        dots += sums(g * d, V.LANES)
        squares += sums(d * d, V.LANES)
    return dots, squares


@triton.jit(do_not_specialize_on_alignment=CALLERS)
def survey_sweep(tensors, grads, owners, hyper, live, partials, counters, grad_scale, found_inf, V: tl.constexpr):
    """One program for each chunk. A tensor's last program works out the factor of its penalty."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    chunk = tl.program_id(0)
    i = tl.load(owners + chunk)
    tensor = tensors + i.to(tl.int64) * WIDTH
    if among(tl.load(tensor + RULE), V.RULE_CONFLICT) == 0:
        return
    begin, n = extent(chunk, tensor, V)
    factor, _scalars = step_scalars(tensor, hyper, live, this_step(tensor, V), grad_scale, V)
    grad = tl.load(grads + i)
    if aligned(tensor, grad, V) & (n % V.VECTOR == 0):
        dots, squares = survey_span(tensor, grad, begin, n, factor, V.VECTOR, V)
    else:
        dots, squares = survey_span(tensor, grad, begin, n, factor, 1, V)
    tl.store(partials + chunk * SUMS, tl.sum(dots.to(tl.float64), 0))
    tl.store(partials + chunk * SUMS + 1, tl.sum(squares.to(tl.float64), 0))
    tl.debug_barrier()
    chunks = tl.load(tensor + CHUNKS)
    if tl.atomic_add(counters + i, 1, sem="acq_rel") == chunks - 1:
        tl.store(counters + i, 0)
        dot, size = fold(partials + tl.load(tensor + FIRST) * SUMS, chunks, SUMS, V.LANES)
        of_d = conflict(dot, size, read_terms(hyper, live, tl.load(tensor + ROW) * V.HYPERS, V))
        tl.store(tensor + FACTOR, of_d.to(tl.int64, bitcast=True))
