"""Measure: the sums over a segment that a rule decides from, as a tuple in the order of `methods.MEASURES`.

The size of a tensor is ‖·‖². The size of a row is Σ|·|. A new measure is one more entry in what `measure` and
`measure_rows` return.
"""

import triton
import triton.language as tl

from ..core import methods

MEASURES = tl.constexpr(len(methods.MEASURES))
RESULTS = tl.constexpr(len(methods.RESULTS))
SELECTED, INCONSISTENT = (tl.constexpr(methods.RESULTS.index(name)) for name in ("selected", "inconsistent"))
GRAD_DOT_DELTA, BEFORE, GAIN = (
    tl.constexpr(methods.MEASURES.index(name)) for name in ("grad_dot_delta", "before", "gain")
)


@triton.jit
def each(value):
    """The measures when every one is `value`."""
    measures = ()
    for _ in tl.static_range(MEASURES):
        measures = measures + (value,)
    return measures


@triton.jit
def of_size(n):
    """The measures of a segment of size n that has not moved."""
    measures = ()
    for k in tl.static_range(MEASURES):
        measures = measures + (n if k == BEFORE else n * 0,)
    return measures


@triton.jit
def size_of(measures):
    """The size of c."""
    return measures[BEFORE] + measures[GAIN]


@triton.jit
def sums(values, LANES: tl.constexpr):
    """A block's contribution to each accumulator. Each takes neighbours that one thread holds, so nothing moves."""
    return tl.sum(tl.reshape(values, [LANES, values.shape[0] // LANES]), 1)


@triton.jit
def row_sums(values, VECTOR: tl.constexpr):
    """A block's contribution to the accumulators of each row. Each takes VECTOR neighbours."""
    ROWS: tl.constexpr = values.shape[0]
    return tl.sum(tl.reshape(values, [ROWS, values.shape[1] // VECTOR, VECTOR]), 2)


@triton.jit
def measure(theta, new, g, anchor, measures, LANES: tl.constexpr):
    """Adds a block to ⟨g,d⟩, ‖d‖² and ⟨u, 2d+u⟩, u = c − d. The last is ‖c‖² − ‖d‖² without the cancellation."""
    d = theta - anchor
    u = new - theta
    return (
        measures[GRAD_DOT_DELTA] + sums(g * d, LANES),
        measures[BEFORE] + sums(d * d, LANES),
        measures[GAIN] + sums(u * (d + d + u), LANES),
    )


@triton.jit
def measure_rows(theta, new, g, anchor, measures, VECTOR: tl.constexpr):
    """Adds a block of [rows, columns] to ⟨g,d⟩, Σ|d| and Σ(|c| − |d|). |c| − |d| is ±u when no sign changes."""
    d = theta - anchor
    u = new - theta
    size = tl.abs(d)
    longer = tl.where(tl.abs(u) <= size, tl.where(d < 0, -u, u), tl.abs(d + u) - size)
    return (
        measures[GRAD_DOT_DELTA] + row_sums(g * d, VECTOR),
        measures[BEFORE] + row_sums(size, VECTOR),
        measures[GAIN] + row_sums(longer, VECTOR),
    )


@triton.jit
def totals(measures, AXIS: tl.constexpr):
    """The measures from their accumulators, in float64."""
    total = ()
    for k in tl.static_range(MEASURES):
        total = total + (tl.sum(measures[k].to(tl.float64), AXIS),)
    return total


@triton.jit
def fold(partials, chunks, COUNT: tl.constexpr, LANES: tl.constexpr):
    """COUNT sums of a segment's partials. They are added in the order of the chunks, whichever finished first."""
    lanes = ()
    for _ in tl.static_range(COUNT):
        lanes = lanes + (tl.zeros([LANES], tl.float64),)
    for at in range(0, chunks, LANES):
        chunk = at + tl.arange(0, LANES)
        lanes = plus(lanes, partials + chunk * COUNT, chunk < chunks, COUNT)
    total = ()
    for k in tl.static_range(COUNT):
        total = total + (tl.sum(lanes[k]),)
    return total


@triton.jit
def plus(totals, partials, inside, COUNT: tl.constexpr):
    """Adds one more partial to the sums: COUNT neighbours in memory. Other programs have written them, so the load must
    not find a stale line in L1."""
    more = ()
    for k in tl.static_range(COUNT):
        more = more + (totals[k] + tl.load(partials + k, mask=inside, other=0.0, cache_modifier=".cg"),)
    return more
