"""The norm of all gradients, for clipping: one sweep over them, before those of the step."""

import triton
import triton.language as tl

from .chunk import CHUNKS, FIRST, NUMEL, WIDTH, load
from .measure import sums


@triton.jit
def square_span(grad, begin, n, VECTOR: tl.constexpr, V: tl.constexpr):
    """The accumulators of Σ g² over n elements from `begin`, VECTOR at a time in each thread."""
    WIDE: tl.constexpr = VECTOR > 1
    if WIDE:
        n = n // VECTOR * VECTOR  # tells the compiler what divides n
    squares = tl.zeros([V.LANES], V.ARITHMETIC)
    for at in range(0, n, V.LANES * VECTOR):
        lane = at + tl.arange(0, V.LANES * VECTOR)
        g = load(grad, begin + lane, lane < n, V.GRAD_DTYPE, V.ARITHMETIC, WIDE and V.GRAD_ALIGNED)
        squares += sums(g * g, V.LANES)
    return squares


@triton.jit
def norm_sweep(tensors, grads, owners, partials, counter, squared, V: tl.constexpr):
    """Σ g² of a class of tensors. A gradient is dense, whatever its segments are, so each of its chunks takes a share.
    The last program to finish folds all of them, in their order."""
    chunk = tl.program_id(0)
    i = tl.load(owners + chunk)
    tensor = tensors + i.to(tl.int64) * WIDTH
    grad, numel, chunks = tl.load(grads + i), tl.load(tensor + NUMEL), tl.load(tensor + CHUNKS)
    share = (numel + 16 * chunks - 1) // (16 * chunks) * 16
    begin = (chunk - tl.load(tensor + FIRST)) * share
    n = tl.maximum(tl.minimum(numel - begin, share), 0).to(tl.int32)
    if ((grad % 16 == 0) | (not V.GRAD_ALIGNED)) & (n % V.GRAD_VECTOR == 0):
        squares = square_span(grad, begin, n, V.GRAD_VECTOR, V)
    else:
        squares = square_span(grad, begin, n, 1, V)
    tl.store(partials + chunk, tl.sum(squares.to(tl.float64), 0))
    tl.debug_barrier()
    programs = tl.num_programs(0)
    if tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1:
        tl.store(counter, 0)
        sums_of_chunks = tl.zeros([V.LANES], tl.float64)
        for at in range(0, programs, V.LANES):
            lane = at + tl.arange(0, V.LANES)
            sums_of_chunks += tl.load(partials + lane, mask=lane < programs, other=0.0, cache_modifier=".cg")
        tl.store(squared, tl.sum(sums_of_chunks))
