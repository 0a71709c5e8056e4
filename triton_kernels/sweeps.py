"""Sweeps of tensors: the kernels that are launched where every segment is a whole tensor; rows.py has those for rows.

A program works on one chunk of one tensor. In the two-launch form `step_sweep` makes the base step and measures, and
`pull_sweep` pulls the segments with α ≠ 1; in the one-launch form `ticket_sweep` does both, in an order in which the
pull finds its memory still in the cache. Sums are deterministic: accumulators of a chunk in a fixed order, one partial
a chunk, folded by whichever chunk of the segment is the last to finish, in the order of the chunks.
"""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from .. import bases
from .base import adamw, adamw_scalars, read_hyper, sgd, sgd_scalars, still, still_scalars
from .chunk import (
    ALL,
    ANCHOR,
    CHUNKS,
    DITHERED,
    FIRST,
    GROUP,
    INDEX,
    NONE,
    NUMEL,
    PARAM,
    PULL_KEY,
    RADIUS,
    RULE,
    STATE,
    STEP,
    STEP_KEY,
    WIDTH,
    WORKING,
    as_stored,
    dither,
    keep_moments,
    load,
    load_weights,
    present,
    random_bits,
    rounding_keys,
    store,
    store_weights,
    weights_at,
)
from .decide import decide
from .measure import fold, measure, total
from .pull import pull

BASES = {"adamw": (adamw_scalars, adamw), "sgd": (sgd_scalars, sgd), "still": (still_scalars, still)}
MEASURES = tl.constexpr(len(bases.MEASURES))


@dataclass(frozen=True, eq=False)  # table.variant_of makes each once, so that a launch need not compare fields
class Variant:
    """What a kernel is compiled for. Every field is a tl.constexpr, a device function or a tuple of such.

    READ, BASE: the base's two functions; STILL: whether it makes no step; GRADED: whether there are gradients. HYPERS:
    columns of a group's row; LR, STRENGTH, RADIUS, and LEARN, the first of four for learning a radius: places in it.
    STATES: the tensors of state, at most; KEPT: which tensors have the last of them; ANCHORED: which have an anchor
    (NONE, SOME or ALL). RULES: those in use, first the MEASURED ones that wait for measures; GIVEN, COUPLED, SIGNED,
    TIED, LEARNED: the places among them of those that are special, or −1; TRACKED: whether any keeps its delta.
    STOCHASTIC: whether any tensor's weights are rounded so. MASTERED: whether param is the master of weights to work
    with. P, W, G, A, S, D, T: dtypes of param, those weights, grad, anchor, moments, delta, and the arithmetic. CHUNK:
    elements of a program. LANES: accumulators. ROWS: whether segments are rows; TILE: how many of them share the
    accumulators. VECTOR: neighbours that one thread takes at once. CODE: names the source, so that no older code is
    taken for it.
    """

    READ: Any
    BASE: Any
    STILL: Any
    GRADED: Any
    HYPERS: Any
    LR: Any
    STRENGTH: Any
    RADIUS: Any
    LEARN: Any
    STATES: Any
    KEPT: Any
    RULES: Any
    MEASURED: Any
    GIVEN: Any
    COUPLED: Any
    SIGNED: Any
    TIED: Any
    LEARNED: Any
    TRACKED: Any
    STOCHASTIC: Any
    MASTERED: Any
    ANCHORED: Any
    P: Any
    W: Any
    G: Any
    A: Any
    S: Any
    D: Any
    T: Any
    CHUNK: Any
    LANES: Any
    ROWS: Any
    TILE: Any
    VECTOR: Any
    CODE: Any


@triton.jit
def extent(chunk, tensor, V: tl.constexpr):
    """Where a chunk begins in its tensor, and its length."""
    begin = (chunk - tl.load(tensor + FIRST)) * V.CHUNK
    return begin, tl.minimum(tl.load(tensor + NUMEL) - begin, V.CHUNK).to(tl.int32)


@triton.jit
def step_count(tensor):
    """The steps that a tensor's state has seen, 0 where nobody counts them."""
    step = tl.load(tensor + STEP)
    t = tl.full((), 0.0, tl.float32)
    if step != 0:
        t = tl.load(step.to(tl.pointer_type(tl.float32)))
    return t


@triton.jit
def this_step(tensor, V: tl.constexpr):
    """The number of the step that is made, from 1; where none is, of that before it."""
    t = step_count(tensor)
    if not V.STILL:
        t += 1
    return t


@triton.jit
def count_step(tensor, V: tl.constexpr):
    """Counts the step that has been made."""
    if not V.STILL:
        step = tl.load(tensor + STEP)
        if step != 0:
            tl.store(step.to(tl.pointer_type(tl.float32)), step_count(tensor) + 1)


@triton.jit
def step_span(tensor, grad, begin, n, factor, alpha, linear, keys, scalars, VECTOR: tl.constexpr, V: tl.constexpr):
    """The base step on n elements from `begin`, VECTOR at a time in each thread; the accumulators of what it measured.

    With VECTOR above 1 every address is a multiple of 16 and n of VECTOR: all accesses are 16 bytes wide under their
    mask, and the last block needs no code of its own.
    """
    WIDE: tl.constexpr = VECTOR > 1
    if WIDE:
        n = n // VECTOR * VECTOR  # tells the compiler
    param, working, anchor = tl.load(tensor + PARAM), tl.load(tensor + WORKING), tl.load(tensor + ANCHOR)
    state0, state1, state2 = tl.load(tensor + STATE), tl.load(tensor + STATE + 1), tl.load(tensor + STATE + 2)
    dithered = tl.load(tensor + DITHERED) != 0
    anchored = present(anchor, n, V.ANCHORED)
    kept0 = present(state0, n, V.KEPT if V.STATES == 1 else ALL)
    kept2 = present(state2, n, V.KEPT)
    grad_dot_delta, before, gain = tl.zeros([V.LANES], V.T), tl.zeros([V.LANES], V.T), tl.zeros([V.LANES], V.T)
    for at in range(0, n, V.LANES * VECTOR):
        lane = at + tl.arange(0, V.LANES * VECTOR)
        inside = lane < n
        offsets = begin + lane
        theta = load_weights(param, working, offsets, inside, WIDE, V)
        g = tl.zeros_like(theta)
        if V.GRADED:
            g = load(grad, offsets, inside, V.G, V.T, WIDE) * factor
        theta_0 = tl.zeros_like(theta)
        if V.ANCHORED > NONE:
            theta_0 = load(anchor, offsets, lane < anchored, V.A, V.T, WIDE)
        penalized = g
        if V.COUPLED >= 0:
            penalized = g + linear * (theta - theta_0)
        s0, s1, s2 = theta_0, theta_0, theta_0
        if V.STATES > 0:
            s0 = load(state0, offsets, lane < kept0, V.S, V.T, WIDE)
        if V.STATES > 1:
            s1 = load(state1, offsets, inside, V.S, V.T, WIDE)
        if V.STATES > 2:
            s2 = load(state2, offsets, lane < kept2, V.S, V.T, WIDE)
        new, s0, s1, s2 = V.BASE(theta, penalized, s0, s1, s2, scalars, V.STATES)
        s0, s1, s2 = keep_moments(s0, s1, s2, offsets, keys, V)
        if V.STATES > 0:
            store(state0, offsets, lane < kept0, s0, V.S, WIDE)
        if V.STATES > 1:
            store(state1, offsets, inside, s1, V.S, WIDE)
        if V.STATES > 2:
            store(state2, offsets, lane < kept2, s2, V.S, WIDE)
        new = tl.where(alpha == 1, new, pull(new, theta_0, alpha))
        if V.STOCHASTIC:
            new = tl.where(
                dithered, dither(new, random_bits(offsets, keys[PULL_KEY if V.STILL else STEP_KEY]) >> 16), new
            )
        new = as_stored(new, V.P, V.T)
        written = inside
        if V.STILL:
            written = lane < tl.where(alpha != 1, n, 0)
        store_weights(param, working, offsets, written, new, WIDE, V)
        if V.MEASURED > 0:
            new = tl.where(inside, new, 0.0)  # where eps = 0 the lanes outside are 0/0
            grad_dot_delta, before, gain = measure(theta, new, g, theta_0, grad_dot_delta, before, gain, V.LANES)
    return grad_dot_delta, before, gain


@triton.jit
def pull_span(tensor, begin, n, alpha, keys, VECTOR: tl.constexpr, V: tl.constexpr):
    """The pull on n elements from `begin`; VECTOR as in `step_span`."""
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
        theta = load(param, offsets, inside, V.P, V.T, WIDE)
        theta_0 = tl.zeros_like(theta)
        if V.ANCHORED > NONE:
            theta_0 = load(anchor, offsets, lane < anchored, V.A, V.T, WIDE)
        new = pull(theta, theta_0, alpha)
        if V.STOCHASTIC:
            new = tl.where(dithered, dither(new, random_bits(offsets, keys[PULL_KEY]) >> 16), new)
        store_weights(param, working, offsets, inside, as_stored(new, V.P, V.T), WIDE, V)


@triton.jit
def step_scalars(tensor, hyper, live, t, grad_scale, V: tl.constexpr):
    """What the gradient is multiplied with, and the base's scalars at step t."""
    factor, scalars = V.READ(hyper, live, tl.load(tensor + GROUP) * V.HYPERS, t, V.T)
    if grad_scale is not None:
        factor = factor / tl.load(grad_scale).to(V.T)
    return factor, scalars


@triton.jit
def step_chunk(chunk, tensors, grads, owners, hyper, live, partials, counters, ready, measures, alphas, grad_scale,
               V: tl.constexpr):  # fmt: skip
    """Sweep 1 on one chunk."""
    i = tl.load(owners + chunk)
    tensor = tensors + i.to(tl.int64) * WIDTH
    begin, n = extent(chunk, tensor, V)
    t = this_step(tensor, V)
    factor, scalars = step_scalars(tensor, hyper, live, t, grad_scale, V)
    nan = tl.full((), float("nan"), tl.float64)
    known = decide_segment(tensor, hyper, live, nan, nan, nan, V)
    if V.GIVEN >= 0:
        known = tl.where(tl.load(tensor + RULE) == V.GIVEN, tl.load(alphas + tl.load(tensor + INDEX)), known)
    known = known.to(V.T)
    linear = penalty(tensor, hyper, live, V.COUPLED, V)
    keys = rounding_keys(tensor, t)
    grad = tl.load(grads + i)
    addresses = grad | weights_at(tensor, V) | tl.load(tensor + ANCHOR)
    addresses |= tl.load(tensor + STATE) | tl.load(tensor + STATE + 1) | tl.load(tensor + STATE + 2)
    if (addresses % 16 == 0) & (n % V.VECTOR == 0):
        a, b, c = step_span(tensor, grad, begin, n, factor, known, linear, keys, scalars, V.VECTOR, V)
    else:
        a, b, c = step_span(tensor, grad, begin, n, factor, known, linear, keys, scalars, 1, V)
    grad_dot_delta, before, gain = nan, nan, nan
    if V.MEASURED > 0:
        grad_dot_delta, before, gain = total(a), total(b), total(c)
    settle(chunk, i, tensor, grad_dot_delta, before, gain, hyper, live, partials, counters, ready, measures, alphas,
           V)  # fmt: skip


@triton.jit
def settle(chunk, i, tensor, grad_dot_delta, before, gain, hyper, live, partials, counters, ready, measures, alphas,
           V: tl.constexpr):  # fmt: skip
    """The last chunk of a segment to finish decides for it and counts the step; a segment of one chunk is pulled at
    once. Reads anew what step_chunk knew: values kept across its loop would take the loop's registers."""
    chunks = tl.load(tensor + CHUNKS)
    last = chunks == 1
    if chunks > 1:
        tl.store(partials + chunk * 3, grad_dot_delta)
        tl.store(partials + chunk * 3 + 1, before)
        tl.store(partials + chunk * 3 + 2, gain)
    # The whole program has stored what others will read, and read the step count that is written below.
    tl.debug_barrier()
    if chunks > 1:
        last = tl.atomic_add(counters + i, 1, sem="acq_rel") == chunks - 1
        if last:
            first = partials + tl.load(tensor + FIRST) * 3
            grad_dot_delta, before, gain = fold(first, chunks, V.LANES)
            tl.store(counters + i, 0)
    if last:
        measured = tl.load(tensor + RULE) < V.MEASURED
        nan = tl.full((), float("nan"), tl.float64)
        grad_dot_delta = tl.where(measured, grad_dot_delta, nan)
        before = tl.where(measured, before, nan)
        gain = tl.where(measured, gain, nan)
        alpha = decide_segment(tensor, hyper, live, grad_dot_delta, before, gain, V)
        row = tl.load(tensor + INDEX)
        if V.GIVEN >= 0:
            alpha = tl.where(tl.load(tensor + RULE) == V.GIVEN, tl.load(alphas + row), alpha)
        record(measures, alphas, row, row >= 0, grad_dot_delta, before, gain, alpha, V)
        count_step(tensor, V)
        tl.debug_barrier()
        if ready is not None:
            tl.atomic_xchg(ready + i, 1, sem="release")
        if measured & (chunks == 1) & (alpha != 1):
            pull_chunk(chunk, tensor, alpha, V)


@triton.jit
def record(measures, alphas, segment, inside, grad_dot_delta, before, gain, alpha, V: tl.constexpr):
    """What was found of segments, and how often they have been selected."""
    row = measures + segment * MEASURES
    if not V.GRADED:
        grad_dot_delta = before * float("nan")
    tl.store(row, grad_dot_delta, mask=inside)
    tl.store(row + 1, before, mask=inside)
    tl.store(row + 2, gain, mask=inside)
    count = tl.load(row + 3, mask=inside, other=0.0)
    tl.store(row + 3, count + tl.where(alpha != 1, 1.0, 0.0), mask=inside)
    tl.store(alphas + segment, alpha, mask=inside)


@triton.jit
def decide_segment(tensor, hyper, live, grad_dot_delta, before, gain, V: tl.constexpr):
    """The alpha of a tensor's rule with its group's hyper-parameters, or the radius that it has learned."""
    row = tl.load(tensor + GROUP) * V.HYPERS
    lr, strength = read_hyper(hyper, live, row + V.LR), read_hyper(hyper, live, row + V.STRENGTH)
    radius = read_hyper(hyper, live, row + V.RADIUS)
    if V.LEARNED >= 0:
        learned = tl.load(tensor + RADIUS)
        if learned != 0:
            radius = tl.load(learned.to(tl.pointer_type(tl.float64)))
    return decide(tl.load(tensor + RULE), grad_dot_delta, before, gain, strength, lr, radius, V)


@triton.jit
def penalty(tensor, hyper, live, RULE_OF: tl.constexpr, V: tl.constexpr):
    """The strength of a penalty for tensors under the rule of this place, 0 for others."""
    strength = tl.full((), 0.0, V.T)
    if RULE_OF >= 0:
        if tl.load(tensor + RULE) == RULE_OF:
            strength = read_hyper(hyper, live, tl.load(tensor + GROUP) * V.HYPERS + V.STRENGTH).to(V.T)
    return strength


@triton.jit
def pull_chunk(chunk, tensor, alpha, V: tl.constexpr):
    """Sweep 2 on one chunk."""
    begin, n = extent(chunk, tensor, V)
    keys = rounding_keys(tensor, step_count(tensor))
    addresses = weights_at(tensor, V) | tl.load(tensor + ANCHOR)
    if (addresses % 16 == 0) & (n % V.VECTOR == 0):
        pull_span(tensor, begin, n, alpha.to(V.T), keys, V.VECTOR, V)
    else:
        pull_span(tensor, begin, n, alpha.to(V.T), keys, 1, V)


@triton.jit
def pull_decided(chunk, tensors, owners, alphas, V: tl.constexpr):
    """Sweep 2 on one chunk, if its segment is pulled at all."""
    tensor = tensors + tl.load(owners + chunk).to(tl.int64) * WIDTH
    alpha = tl.load(alphas + tl.load(tensor + INDEX))
    if alpha != 1:
        pull_chunk(chunk, tensor, alpha, V)


@triton.jit
def step_sweep(tensors, grads, owners, hyper, live, partials, counters, measures, alphas, grad_scale, found_inf,
               V: tl.constexpr):  # fmt: skip
    """Sweep 1: one program a chunk. Does nothing where found_inf is set."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    step_chunk(tl.program_id(0), tensors, grads, owners, hyper, live, partials, counters, None, measures, alphas,
               grad_scale, V)  # fmt: skip


@triton.jit
def pull_sweep(tensors, owners, alphas, found_inf, V: tl.constexpr):
    """Sweep 2: one program for each chunk of the first so many, the last first, since sweep 1 left it in the cache."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    pull_decided(tl.num_programs(0) - 1 - tl.program_id(0), tensors, owners, alphas, V)


@triton.jit
def ticket_sweep(schedule, cursor, tensors, grads, owners, hyper, live, partials, counters, ready, measures, alphas,
                 grad_scale, found_inf, V: tl.constexpr):  # fmt: skip
    """Both sweeps: programs draw the tasks of `schedule` in its order until none is left.

    schedule: how many tasks, how many tensors, then each task, 2·chunk for sweep 1 and 2·chunk + 1 for sweep 2. A task
    of sweep 2 waits for its segment's `ready`; those it waits for are in the hands of running programs, having been
    drawn before, so that it cannot wait forever. The last program to leave resets the cursor and `ready`.
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
            step_chunk(chunk, tensors, grads, owners, hyper, live, partials, counters, ready, measures, alphas,
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
