"""Rows, the indices of dimension 0: how those of a tensor divide into chunks, and what is done to a few at a time."""

import triton
import triton.language as tl

from .chunk import (
    ALL,
    ANCHOR,
    DELTA,
    DITHERED,
    FIRST,
    NO_HINT,
    NONE,
    NUMEL,
    PARAM,
    PULL_KEY,
    ROWS,
    SOME,
    STATE,
    STEP_KEY,
    STRIDE,
    WORKING,
    aligned,
    as_stored,
    dither,
    load,
    load_moment,
    load_weights,
    moment_bits,
    present,
    random_bits,
    scales_of,
    store,
    store_moment,
    store_weights,
)  # fmt: skip
from .measure import each, measure_rows, plus, row_sums, totals
from .pull import pull


@triton.jit
def piece(chunk, tensor, V: tl.constexpr):
    """What a chunk is: its first row, how many rows, where it begins in a row, its length there, and how many parts a
    row has."""
    rows = tl.load(tensor + ROWS)
    length = tl.load(tensor + NUMEL) // tl.maximum(rows, 1)
    place = chunk - tl.load(tensor + FIRST)
    parts = tl.maximum((length + V.CHUNK - 1) // V.CHUNK, 1)
    together = tl.where(parts > 1, 1, V.CHUNK // tl.maximum(length, 1))
    row = tl.where(parts > 1, place // parts, place * together)
    begin = tl.where(parts > 1, place % parts * V.CHUNK, 0)
    count = tl.minimum(rows - row, together).to(tl.int32)
    return row, count, begin, tl.minimum(length - begin, V.CHUNK).to(tl.int32), parts


@triton.jit
def places(tensor, row, begin, at, n, TILE: tl.constexpr, VECTOR: tl.constexpr, V: tl.constexpr):
    """The offsets of a block of TILE rows, the places before them that `random_bits` takes, and which of its columns
    exist.

    s is the stride of dimension 0. Element e of row i, counted in the order of memory, lies at
    (e // s)·(s·rows) + i·s + e % s. This holds for any dense layout. If VECTOR is above 1, rows are contiguous and
    their length is a multiple of it.
    """
    stride = tl.load(tensor + STRIDE)
    lane = at + tl.arange(0, V.LANES // TILE * VECTOR)
    e = begin + lane
    if VECTOR > 1:
        stride = stride // VECTOR * VECTOR  # tells the compiler what divides it
    else:
        e = e // stride * (stride * tl.load(tensor + ROWS)) + e % stride
    start = ((row + tl.arange(0, TILE)) * stride)[:, None]
    offsets = start + e[None, :]
    if VECTOR == 1:
        start = offsets
    return offsets, start, lane < n


@triton.jit
def wide(tensor, grad, n, V: tl.constexpr):
    """Whether n elements of a row can be taken VECTOR at a time: the rows are contiguous, and all begin so aligned."""
    rows, stride = tl.load(tensor + ROWS), tl.load(tensor + STRIDE)
    contiguous = (stride % V.VECTOR == 0) & (stride * rows == tl.load(tensor + NUMEL))
    return aligned(tensor, grad, V) & contiguous & (n % V.VECTOR == 0)


@triton.jit
def step_rows(tensor, grad, row, rows, begin, n, factor, known, sign, largest, keys, scalars,
              TILE: tl.constexpr, VECTOR: tl.constexpr, V: tl.constexpr):  # fmt: skip
    """Makes the base step on n elements from `begin` of TILE rows from `row`, of which only `rows` exist. Returns their
    measures."""
    WIDE: tl.constexpr = VECTOR > 1
    if WIDE:
        n = n // VECTOR * VECTOR
    param, working, anchor = tl.load(tensor + PARAM), tl.load(tensor + WORKING), tl.load(tensor + ANCHOR)
    state0, state1, state2 = tl.load(tensor + STATE), tl.load(tensor + STATE + 1), tl.load(tensor + STATE + 2)
    scales0, scales1, scales2 = scales_of(tensor, V)
    delta, dithered = tl.load(tensor + DELTA), tl.load(tensor + DITHERED) != 0
    i = tl.arange(0, TILE)
    anchored = i < present(anchor, rows, V.ANCHORED)
    kept0 = i < present(state0, rows, V.LAST_STATE if V.STATES == 1 else ALL)
    kept2 = i < present(state2, rows, V.LAST_STATE)
    kept_delta = i < present(delta, rows, SOME)
    SHARE: tl.constexpr = V.LANES // TILE
    measures = each(tl.zeros([TILE, SHARE], V.ARITHMETIC))
    for at in range(0, n, SHARE * VECTOR):
        offsets, start, columns = places(tensor, row, begin, at, n, TILE, VECTOR, V)
        inside = (i < rows)[:, None] & columns[None, :]
        theta = load_weights(param, working, offsets, inside, WIDE, V)
        g = tl.zeros_like(theta)
        if V.HAS_GRADS:
            g = load(grad, offsets, inside, V.GRAD_DTYPE, V.ARITHMETIC, WIDE and V.GRAD_ALIGNED) * factor
        theta_0 = tl.zeros_like(theta)
        if V.ANCHORED > NONE:
            there = anchored[:, None] & columns[None, :]
            theta_0 = load(anchor, offsets, there, V.ANCHOR_DTYPE, V.ARITHMETIC, WIDE and V.ANCHOR_ALIGNED)
        penalized = g
        if V.RULE_SIGN != 0:
            d = theta - theta_0
            on = ((row + i) == largest)[:, None]
            penalized = g + tl.where(on & (d > 0), sign, 0.0) - tl.where(on & (d < 0), sign, 0.0)
        s0, s1, s2 = theta_0, theta_0, theta_0
        if V.STATES > 0:
            s0 = load_moment(state0, scales0, offsets, kept0[:, None] & columns[None, :], 0, WIDE, NO_HINT, V)
        if V.STATES > 1:
            s1 = load_moment(state1, scales1, offsets, inside, 1, WIDE, NO_HINT, V)
        if V.STATES > 2:
            s2 = load_moment(state2, scales2, offsets, kept2[:, None] & columns[None, :], 2, WIDE, NO_HINT, V)
        new, s0, s1, s2 = V.BASE(theta, penalized, s0, s1, s2, scalars, V.STATES)
        bits = moment_bits(offsets, start, keys, V)
        store_moment(state0, scales0, offsets, kept0[:, None] & columns[None, :], s0, bits, 0, WIDE, NO_HINT, V)
        store_moment(state1, scales1, offsets, inside, s1, bits, 1, WIDE, NO_HINT, V)
        store_moment(state2, scales2, offsets, kept2[:, None] & columns[None, :], s2, bits, 2, WIDE, NO_HINT, V)
        new = tl.where((known == 1)[:, None], new, pull(new, theta_0, known.to(V.ARITHMETIC)[:, None]))
        if V.STOCHASTIC:
            key = keys[PULL_KEY if V.NO_STEP else STEP_KEY]
            new = tl.where(dithered, dither(new, random_bits(offsets, start, key) >> 16), new)
        new = as_stored(new, V.PARAM_DTYPE, V.ARITHMETIC)
        written = inside
        if V.NO_STEP:
            written = inside & (known != 1)[:, None]
        store_weights(param, working, offsets, written, new, WIDE, V)
        if V.TRACKS:
            c = as_stored(new - theta_0, V.DELTA_DTYPE, V.ARITHMETIC)
            store(delta, offsets, kept_delta[:, None] & columns[None, :], c, V.DELTA_DTYPE, WIDE)
        if V.RULE_MEASURES != 0:
            new = tl.where(inside, new, 0.0)  # when eps = 0 the lanes outside are 0/0
            measures = measure_rows(theta, new, g, theta_0, measures, VECTOR)
    return totals(measures, 1)


@triton.jit
def pull_rows(tensor, row, rows, begin, n, alpha, keys, TILE: tl.constexpr, VECTOR: tl.constexpr, V: tl.constexpr):
    """Pulls such rows by their alphas. An α of 1 leaves its row alone."""
    WIDE: tl.constexpr = VECTOR > 1
    if WIDE:
        n = n // VECTOR * VECTOR
    param, working, anchor = tl.load(tensor + PARAM), tl.load(tensor + WORKING), tl.load(tensor + ANCHOR)
    dithered = tl.load(tensor + DITHERED) != 0
    i = tl.arange(0, TILE)
    pulled = (i < rows) & (alpha != 1)
    anchored = i < present(anchor, rows, V.ANCHORED)
    for at in range(0, n, V.LANES // TILE * VECTOR):
        offsets, start, columns = places(tensor, row, begin, at, n, TILE, VECTOR, V)
        inside = pulled[:, None] & columns[None, :]
        theta = load(param, offsets, inside, V.PARAM_DTYPE, V.ARITHMETIC, WIDE)
        theta_0 = tl.zeros_like(theta)
        if V.ANCHORED > NONE:
            there = anchored[:, None] & columns[None, :]
            theta_0 = load(anchor, offsets, there, V.ANCHOR_DTYPE, V.ARITHMETIC, WIDE and V.ANCHOR_ALIGNED)
        new = pull(theta, theta_0, alpha.to(V.ARITHMETIC)[:, None])
        if V.STOCHASTIC:
            new = tl.where(dithered, dither(new, random_bits(offsets, start, keys[PULL_KEY]) >> 16), new)
        store_weights(param, working, offsets, inside, as_stored(new, V.PARAM_DTYPE, V.ARITHMETIC), WIDE, V)


@triton.jit
def survey_rows(tensor, grad, row, rows, begin, n, factor, TILE: tl.constexpr, VECTOR: tl.constexpr, V: tl.constexpr):
    """⟨g, c⟩ and Σ|c| of such rows. c is the delta of the last step. For a tensor that keeps none: 0 and Σ|d|."""
    WIDE: tl.constexpr = VECTOR > 1
    if WIDE:
        n = n // VECTOR * VECTOR
    param, working, anchor = tl.load(tensor + PARAM), tl.load(tensor + WORKING), tl.load(tensor + ANCHOR)
    delta = tl.load(tensor + DELTA)
    i = tl.arange(0, TILE)
    anchored = i < present(anchor, rows, V.ANCHORED)
    SHARE: tl.constexpr = V.LANES // TILE
    dots, sizes = tl.zeros([TILE, SHARE], V.ARITHMETIC), tl.zeros([TILE, SHARE], V.ARITHMETIC)
    for at in range(0, n, SHARE * VECTOR):
        offsets, _start, columns = places(tensor, row, begin, at, n, TILE, VECTOR, V)
        inside = (i < rows)[:, None] & columns[None, :]
        if delta != 0:
            c = load(delta, offsets, inside, V.DELTA_DTYPE, V.ARITHMETIC, WIDE)
            g = load(grad, offsets, inside, V.GRAD_DTYPE, V.ARITHMETIC, WIDE and V.GRAD_ALIGNED) * factor
            dots += row_sums(c * g, VECTOR)
            sizes += row_sums(tl.abs(c), VECTOR)
        else:
            d = load_weights(param, working, offsets, inside, WIDE, V)
            if V.ANCHORED > NONE:
                there = anchored[:, None] & columns[None, :]
                d -= load(anchor, offsets, there, V.ANCHOR_DTYPE, V.ARITHMETIC, WIDE and V.ANCHOR_ALIGNED)
            sizes += row_sums(tl.abs(d), VECTOR)
    return tl.sum(dots.to(tl.float64), 1), tl.sum(sizes.to(tl.float64), 1)


@triton.jit
def fold_rows(tensor, row, rows, parts, partials, COUNT: tl.constexpr, LANES: tl.constexpr):
    """COUNT sums of each of LANES rows from `row`. Each row lies in `parts` chunks, which are added in their order."""
    i = row + tl.arange(0, LANES)
    first = partials + (tl.load(tensor + FIRST) + i * parts) * COUNT
    folded = ()
    for _ in tl.static_range(COUNT):
        folded = folded + (tl.zeros([LANES], tl.float64),)
    for part in range(0, parts):
        folded = plus(folded, first + part * COUNT, i < rows, COUNT)
    return folded
