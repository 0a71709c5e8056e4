"""Measure: the sums over a segment that a rule decides from."""

import triton
import triton.language as tl


@triton.jit
def sums(values, LANES: tl.constexpr):
    """A block's contribution to each accumulator; each takes neighbours, which one thread holds, so nothing moves."""
    return tl.sum(tl.reshape(values, [LANES, values.shape[0] // LANES]), 1)


@triton.jit
def measure(theta, new, g, anchor, grad_dot_delta, before, gain, LANES: tl.constexpr):
    """Adds a block to ⟨g,d⟩, ‖d‖² and ⟨u, 2d+u⟩ = ‖c‖² − ‖d‖², u = c − d, without the cancellation."""
    d = theta - anchor
    u = new - theta
    grad_dot_delta += sums(g * d, LANES)
    before += sums(d * d, LANES)
    gain += sums(u * (d + d + u), LANES)
    return grad_dot_delta, before, gain


@triton.jit
def measure_rows(theta, new, g, anchor, grad_dot_delta, before, gain, VECTOR: tl.constexpr):
    """Adds a block of [rows, columns] to ⟨g,d⟩, Σ|d| and Σ(|c| − |d|), which is ±u where no sign changes."""
    d = theta - anchor
    u = new - theta
    size = tl.abs(d)
    longer = tl.where(tl.abs(u) <= size, tl.where(d < 0, -u, u), tl.abs(d + u) - size)
    grad_dot_delta += row_sums(g * d, VECTOR)
    before += row_sums(size, VECTOR)
    gain += row_sums(longer, VECTOR)
    return grad_dot_delta, before, gain


@triton.jit
def row_sums(values, VECTOR: tl.constexpr):
    """A block's contribution to the accumulators of each row; each takes VECTOR neighbours."""
    ROWS: tl.constexpr = values.shape[0]
    return tl.sum(tl.reshape(values, [ROWS, values.shape[1] // VECTOR, VECTOR]), 2)


@triton.jit
def total(lanes):
    """The sum of the accumulators, in float64."""
    return tl.sum(lanes.to(tl.float64))


@triton.jit
def fold(partials, chunks, LANES: tl.constexpr):
    """The three sums of a segment's partials. Their order is that of the chunks, whichever was finished first."""
    a, b, c = tl.zeros([LANES], tl.float64), tl.zeros([LANES], tl.float64), tl.zeros([LANES], tl.float64)
    for at in range(0, chunks, LANES):
        chunk = at + tl.arange(0, LANES)
        inside = chunk < chunks
        a += tl.load(partials + chunk * 3, mask=inside, other=0.0, cache_modifier=".cg")  # not from a stale L1
        b += tl.load(partials + chunk * 3 + 1, mask=inside, other=0.0, cache_modifier=".cg")
        c += tl.load(partials + chunk * 3 + 2, mask=inside, other=0.0, cache_modifier=".cg")
    return tl.sum(a), tl.sum(b), tl.sum(c)
