"""Sweeps of tensors: the kernels for segments that are whole tensors. row_sweeps.py has those for rows.

A program works on one chunk of one tensor. In the two-launch form `step_sweep` makes the base step and measures, and
`pull_sweep` pulls the segments with α ≠ 1. In the one-launch form `ticket_sweep` does both. Its order lets the pull
find its memory still in the cache. Sums are deterministic. The accumulators of a chunk are added in a fixed order, to
one partial for the chunk. Whichever chunk of the segment finishes last folds the partials, in the order of the chunks.
"""

import triton
import triton.language as tl

from .base import read_hyper
from .chunk import (
    ALL,
    ANCHOR,
    CALLERS,
    CHUNKS,
    DITHERED,
    FACTOR,
    FIRST,
    LEARNED,
    NONE,
    NUMEL,
    PARAM,
    PULL_KEY,
    ROW,
    RULE,
    SEGMENT,
    STATE,
    STEP,
    STEP_KEY,
    WIDTH,
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
    rounding_keys,
    scales_of,
    store_moment,
    store_weights,
)
from .decide import RADIUS, STRENGTH, among, decide
from .measure import GRAD_DOT_DELTA, INCONSISTENT, MEASURES, RESULTS, SELECTED, each, fold, measure, totals
from .pull import held, pull


@triton.jit
def extent(chunk, tensor, V: tl.constexpr):
    """Where a chunk begins in its tensor, and its length."""
    begin = (chunk - tl.load(tensor + FIRST)) * V.CHUNK
    return begin, tl.minimum(tl.load(tensor + NUMEL) - begin, V.CHUNK).to(tl.int32)


@triton.jit
def step_count(tensor):
    """How many steps a tensor's state has seen, 0 when nobody counts them."""
    step = tl.load(tensor + STEP)
    t = tl.full((), 0.0, tl.float32)
    if step != 0:
        t = tl.load(step.to(tl.pointer_type(tl.float32)))
    return t


@triton.jit
def this_step(tensor, V: tl.constexpr):
    """The number of this step, from 1. If the base makes no step, it is the number of the step before."""
    t = step_count(tensor)
    if not V.NO_STEP:
        t += 1
    return t


@triton.jit
def count_step(tensor, V: tl.constexpr):
    """Counts the step that has been made."""
    if not V.NO_STEP:
        step = tl.load(tensor + STEP)
        if step != 0:
            tl.store(step.to(tl.pointer_type(tl.float32)), step_count(tensor) + 1)


@triton.jit
def step_span(tensor, grad, begin, n, factor, alpha, hold, linear, keys, scalars,
              VECTOR: tl.constexpr, V: tl.constexpr):  # fmt: skip
    """Makes the base step on n elements from `begin`, VECTOR at a time in each thread. Returns the accumulators of its
    measures.

    If VECTOR is above 1, every address is a multiple of 16, and n is a multiple of VECTOR. So accesses are up to 16
    bytes wide under their mask, and the last block needs no code of its own.
    """
    WIDE: tl.constexpr = VECTOR > 1
    if WIDE:
        n = n // VECTOR * VECTOR  # tells the compiler what divides n
    param, working, anchor = tl.load(tensor + PARAM), tl.load(tensor + WORKING), tl.load(tensor + ANCHOR)
    state0, state1, state2 = tl.load(tensor + STATE), tl.load(tensor + STATE + 1), tl.load(tensor + STATE + 2)
    scales0, scales1, scales2 = scales_of(tensor, V)
    dithered = tl.load(tensor + DITHERED) != 0
    anchored = present(anchor, n, V.ANCHORED)
    kept0 = present(state0, n, V.LAST_STATE if V.STATES == 1 else ALL)
    kept2 = present(state2, n, V.LAST_STATE)
    measures = each(tl.zeros([V.LANES], V.ARITHMETIC))
    for at in range(0, n, V.LANES * VECTOR):
        lane = at + tl.arange(0, V.LANES * VECTOR)
        inside = lane < n
        offsets = begin + lane
        theta = load_weights(param, working, offsets, inside, WIDE, V)
        g = tl.zeros_like(theta)
        if V.HAS_GRADS:
            g = load(grad, offsets, inside, V.GRAD_DTYPE, V.ARITHMETIC, WIDE and V.GRAD_ALIGNED, V.EVICT) * factor
        theta_0 = tl.zeros_like(theta)
        if V.ANCHORED > NONE:
            theta_0 = load(anchor, offsets, lane < anchored, V.ANCHOR_DTYPE, V.ARITHMETIC, WIDE and V.ANCHOR_ALIGNED)
        penalized = g
        if V.RULE_LINEAR != 0:
            penalized = tl.where(linear != 0, g + linear * (theta - theta_0), g)
        s0, s1, s2 = theta_0, theta_0, theta_0
        if V.STATES > 0:
            s0 = load_moment(state0, scales0, offsets, lane < kept0, 0, WIDE, V.EVICT, V)
        if V.STATES > 1:
            s1 = load_moment(state1, scales1, offsets, inside, 1, WIDE, V.EVICT, V)
        if V.STATES > 2:
            s2 = load_moment(state2, scales2, offsets, lane < kept2, 2, WIDE, V.EVICT, V)
        new, s0, s1, s2 = V.BASE(theta, penalized, s0, s1, s2, scalars, V.STATES)
        bits = moment_bits(offsets, begin, keys, V)
        store_moment(state0, scales0, offsets, lane < kept0, s0, bits, 0, WIDE, V.EVICT, V)
        store_moment(state1, scales1, offsets, inside, s1, bits, 1, WIDE, V.EVICT, V)
        store_moment(state2, scales2, offsets, lane < kept2, s2, bits, 2, WIDE, V.EVICT, V)
        new = tl.where(alpha == 1, new, pull(new, theta_0, alpha))
        if V.RULE_CAUTIOUS != 0:
            new = tl.where(hold != 0, held(theta, new, theta_0, hold), new)
        if V.STOCHASTIC:
            new = tl.where(
                dithered, dither(new, random_bits(offsets, begin, keys[PULL_KEY if V.NO_STEP else STEP_KEY]) >> 16), new
            )
        new = as_stored(new, V.PARAM_DTYPE, V.ARITHMETIC)
        written = inside
        if V.NO_STEP:
            written = lane < tl.where((alpha != 1) | (hold != 0), n, 0)
        store_weights(param, working, offsets, written, new, WIDE, V)
        if V.RULE_MEASURES != 0:
            new = tl.where(inside, new, 0.0)  # when eps = 0 the lanes outside are 0/0
            measures = measure(theta, new, g, theta_0, measures, V.LANES)
    return measures


@triton.jit
def pull_span(tensor, begin, n, alpha, keys, VECTOR: tl.constexpr, V: tl.constexpr):
    """The pull on n elements from `begin`. VECTOR is as in `step_span`."""
    WIDE: tl.constexpr = VECTOR > 1
    if WIDE:
        n = n // VECTOR * VECTOR
    param, working, anchor = tl.load(tensor + PARAM), tl.load(tensor + WORKING), tl.load(tensor + ANCHOR)
    dithered = tl.load(tensor + DITHERED) != 0
    anchored = present(anchor, n, V.ANCHORED)
    for at in range(0, n, V.LANES * VECTOR):
        lane = at + tl.arange(0, V.LANES * VECTOR)
        inside = lane < n
        offsets = begin + lane
        theta = load(param, offsets, inside, V.PARAM_DTYPE, V.ARITHMETIC, WIDE)
        theta_0 = tl.zeros_like(theta)
        if V.ANCHORED > NONE:
            theta_0 = load(anchor, offsets, lane < anchored, V.ANCHOR_DTYPE, V.ARITHMETIC, WIDE and V.ANCHOR_ALIGNED)
        new = pull(theta, theta_0, alpha)
        if V.STOCHASTIC:
            new = tl.where(dithered, dither(new, random_bits(offsets, begin, keys[PULL_KEY]) >> 16), new)
        store_weights(param, working, offsets, inside, as_stored(new, V.PARAM_DTYPE, V.ARITHMETIC), WIDE, V)


@triton.jit
def step_scalars(tensor, hyper, live, t, grad_scale, V: tl.constexpr):
    """What the gradient is multiplied with, and the base's scalars at step t."""
    factor, scalars = V.READ(hyper, live, tl.load(tensor + ROW) * V.HYPERS, t, V.ARITHMETIC)
    if grad_scale is not None:
        factor = (factor.to(tl.float64) / tl.load(grad_scale)).to(V.ARITHMETIC)
    return factor, scalars


@triton.jit
def step_chunk(chunk, tensors, grads, owners, hyper, live, partials, counters, ready, results, alphas, grad_scale,
               V: tl.constexpr):  # fmt: skip
    """Sweep 1 on one chunk."""
    i = tl.load(owners + chunk)
    tensor = tensors + i.to(tl.int64) * WIDTH
    begin, n = extent(chunk, tensor, V)
    t = this_step(tensor, V)
    factor, scalars = step_scalars(tensor, hyper, live, t, grad_scale, V)
    unknown = each(tl.full((), float("nan"), tl.float64))
    known = decide_segment(tensor, hyper, live, unknown, V)
    if V.RULE_GIVEN != 0:
        given = tl.load(alphas + tl.load(tensor + SEGMENT))
        known = tl.where(among(tl.load(tensor + RULE), V.RULE_GIVEN), given, known)
    hold = known * 0
    if V.RULE_CAUTIOUS != 0:
        cautious = among(tl.load(tensor + RULE), V.RULE_CAUTIOUS)
        hold, known = tl.where(cautious, 1 - known, 0.0), tl.where(cautious, 1.0, known)
    known, hold = known.to(V.ARITHMETIC), hold.to(V.ARITHMETIC)
    linear = penalty(tensor, hyper, live, V.RULE_LINEAR, V)
    keys = rounding_keys(tensor, t)
    grad = tl.load(grads + i)
    if aligned(tensor, grad, V) & (n % V.VECTOR == 0):
        lanes = step_span(tensor, grad, begin, n, factor, known, hold, linear, keys, scalars, V.VECTOR, V)
    else:
        lanes = step_span(tensor, grad, begin, n, factor, known, hold, linear, keys, scalars, 1, V)
    measures = unknown
    if V.RULE_MEASURES != 0:
        measures = totals(lanes, 0)
    settle(chunk, i, tensor, measures, hyper, live, partials, counters, ready, results, alphas, V)


@triton.jit
def settle(chunk, i, tensor, measures, hyper, live, partials, counters, ready, results, alphas, V: tl.constexpr):
    """The last chunk of a segment to finish decides for it and counts the step. A segment of one chunk is pulled at
    once. This reads anew what step_chunk knew: values kept across its loop would take the loop's registers."""
    chunks = tl.load(tensor + CHUNKS)
    last = chunks == 1
    if chunks > 1:
        for k in tl.static_range(MEASURES):
            tl.store(partials + chunk * MEASURES + k, measures[k])
    # Now the whole program has stored what others will read. It has also read the step count that is written below.
    tl.debug_barrier()
    if chunks > 1:
        last = tl.atomic_add(counters + i, 1, sem="acq_rel") == chunks - 1
        if last:
            measures = fold(partials + tl.load(tensor + FIRST) * MEASURES, chunks, MEASURES, V.LANES)
            tl.store(counters + i, 0)
    if last:
        rule = tl.load(tensor + RULE)
        measured = among(rule, V.RULE_MEASURES)
        known = ()
        for k in tl.static_range(MEASURES):
            known = known + (tl.where(measured, measures[k], float("nan")),)
        alpha = decide_segment(tensor, hyper, live, known, V)
        segment = tl.load(tensor + SEGMENT)
        if V.RULE_GIVEN != 0:
            alpha = tl.where(among(rule, V.RULE_GIVEN), tl.load(alphas + segment), alpha)
        record(results, alphas, segment, segment >= 0, known, alpha, V)
        count_step(tensor, V)
        tl.debug_barrier()
        if ready is not None:
            tl.atomic_xchg(ready + i, 1, sem="release")
        if measured & (chunks == 1) & (alpha != 1):
            pull_chunk(chunk, tensor, alpha, V)


@triton.jit
def record(results, alphas, segment, inside, measures, alpha, V: tl.constexpr):
    """Writes what was found of segments, and counts how often they were selected, and how often ⟨g,d⟩ was above 0."""
    row = results + segment * RESULTS
    for k in tl.static_range(MEASURES):
        value = measures[k]
        if k == GRAD_DOT_DELTA and not V.HAS_GRADS:
            value = value * float("nan")
        tl.store(row + k, value, mask=inside)
    count_where(row + SELECTED, inside, alpha != 1)
    if V.HAS_GRADS:
        count_where(row + INCONSISTENT, inside, measures[GRAD_DOT_DELTA] > 0)
    tl.store(alphas + segment, alpha, mask=inside)


@triton.jit
def count_where(places, inside, happened):
    """Counts a step in those places of results where something happened in it."""
    steps = tl.load(places, mask=inside, other=0.0, cache_modifier=".cg")
    tl.store(places, steps + tl.where(happened, 1.0, 0.0), mask=inside)


@triton.jit
def decide_segment(tensor, hyper, live, measures, V: tl.constexpr):
    """The α of a tensor's rule with its group's hyper-parameters, or the radius that it has learned."""
    terms = read_terms(hyper, live, tl.load(tensor + ROW) * V.HYPERS, V)
    if V.RULE_LEARNS != 0:
        radius = terms[RADIUS]
        learned = tl.load(tensor + LEARNED)
        if learned != 0:
            radius = tl.load(learned.to(tl.pointer_type(tl.float64)))
        own = ()
        for k in tl.static_range(len(V.TERMS)):
            own = own + (radius if k == RADIUS else terms[k],)
        terms = own
    return decide(tl.load(tensor + RULE), measures, terms, V)


@triton.jit
def read_terms(hyper, live, row, V: tl.constexpr):
    """The hyper-parameters that the rules read, as the tuple that `decide` takes."""
    terms = ()
    for k in tl.static_range(len(V.TERMS)):
        value = tl.full((), 0.0, tl.float64)
        if V.TERMS[k] >= 0:
            value = read_hyper(hyper, live, row + V.TERMS[k])
        terms = terms + (value,)
    return terms


@triton.jit
def penalty(tensor, hyper, live, RULES: tl.constexpr, V: tl.constexpr):
    """The strength of a penalty for a tensor under one of these rules, or what a survey made of it. 0 for others."""
    strength = tl.full((), 0.0, V.ARITHMETIC)
    if RULES != 0:
        if among(tl.load(tensor + RULE), RULES):
            column = V.TERMS[STRENGTH]
            strength = read_hyper(hyper, live, tl.load(tensor + ROW) * V.HYPERS + column).to(V.ARITHMETIC)
    if V.RULE_CONFLICT != 0:
        if among(tl.load(tensor + RULE), V.RULE_CONFLICT):
            strength = tl.load(tensor + FACTOR).to(tl.float64, bitcast=True).to(V.ARITHMETIC)
    return strength


@triton.jit
def pull_chunk(chunk, tensor, alpha, V: tl.constexpr):
    """Sweep 2 on one chunk."""
    begin, n = extent(chunk, tensor, V)
    keys = rounding_keys(tensor, step_count(tensor))
    if aligned(tensor, tl.full((), 0, tl.int64), V) & (n % V.VECTOR == 0):
        pull_span(tensor, begin, n, alpha.to(V.ARITHMETIC), keys, V.VECTOR, V)
    else:
        pull_span(tensor, begin, n, alpha.to(V.ARITHMETIC), keys, 1, V)


@triton.jit
def pull_decided(chunk, tensors, owners, alphas, V: tl.constexpr):
    """Sweep 2 on one chunk, if its segment is pulled at all."""
    tensor = tensors + tl.load(owners + chunk).to(tl.int64) * WIDTH
    alpha = tl.load(alphas + tl.load(tensor + SEGMENT))
    if alpha != 1:
        pull_chunk(chunk, tensor, alpha, V)


@triton.jit(do_not_specialize_on_alignment=CALLERS)
def step_sweep(tensors, grads, owners, hyper, live, partials, counters, results, alphas, grad_scale, found_inf,
               V: tl.constexpr):  # fmt: skip
    """Sweep 1: one program for each chunk. Does nothing when found_inf is set."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    step_chunk(tl.program_id(0), tensors, grads, owners, hyper, live, partials, counters, None, results, alphas,
               grad_scale, V)  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=CALLERS)
def pull_sweep(tensors, owners, alphas, found_inf, V: tl.constexpr):
    """Sweep 2: one program for each chunk that may be pulled. Those are the first of the table. The last of them goes
    first, since sweep 1 left it in the cache."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    pull_decided(tl.num_programs(0) - 1 - tl.program_id(0), tensors, owners, alphas, V)


@triton.jit(do_not_specialize_on_alignment=CALLERS)
def ticket_sweep(schedule, cursor, tensors, grads, owners, hyper, live, partials, counters, ready, results, alphas,
                 grad_scale, found_inf, V: tl.constexpr):  # fmt: skip
    """Both sweeps: programs draw the tasks of `schedule` in its order until none is left.

    schedule: how many tasks, how many tensors, then each task, 2·chunk for sweep 1 and 2·chunk + 1 for sweep 2. A task
    of sweep 2 waits for its segment's `ready`. The tasks that it waits for were drawn before it, so running programs
    have them, and it cannot wait forever. The last program to leave resets the cursor and `ready`.
    """
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    tasks = tl.load(schedule)
    ticket = tl.atomic_add(cursor, 1, sem="relaxed")
    while ticket < tasks:
        task = tl.load(schedule + 2 + ticket)
        chunk = task // 2
        if task % 2 == 0:
            step_chunk(chunk, tensors, grads, owners, hyper, live, partials, counters, ready, results, alphas,
                       grad_scale, V)  # fmt: skip
        else:
            i = tl.load(owners + chunk)
            decided = tl.atomic_add(ready + i, 0, sem="acquire")
            while decided == 0:
                decided = tl.atomic_add(ready + i, 0, sem="acquire")
            pull_decided(chunk, tensors, owners, alphas, V)
        ticket = tl.atomic_add(cursor, 1, sem="relaxed")
    left = tl.atomic_add(cursor + 1, 1, sem="acq_rel")
    if left == tl.num_programs(0) - 1:
        tl.store(cursor, 0)
        tl.store(cursor + 1, 0)
        tensors_here = tl.load(schedule + 1)
        for at in range(0, tensors_here, V.LANES):
            i = at + tl.arange(0, V.LANES)
            tl.store(ready + i, 0, mask=i < tensors_here)
