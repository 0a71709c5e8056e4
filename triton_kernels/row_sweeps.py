"""Sweeps of rows: the kernels that are launched when every segment is a row, an index of dimension 0.

A program works on one chunk of one tensor. A chunk is several whole rows, or a part of one row. A tile takes a few
whole rows at a time, a warp each. Rows that depend on nothing else are decided and pulled at once, while they are in
the cache. Other rows lie in several chunks, or share the α of the largest row. They wait for the last program of their
tensor, and sweep 2 pulls them. A survey goes first when the step must know something of all rows: the slope of the last
delta, or the largest row.
"""

import triton
import triton.language as tl

from .chunk import CALLERS, CHUNKS, FIRST, LEARNED, NUMEL, ROW, ROWS, RULE, SEGMENT, WIDTH, rounding_keys
from .decide import ROW_EPS, among
from .measure import BEFORE, GAIN, MEASURES, RESULTS, SELECTED, each, of_size, size_of
from .rows import fold_rows, piece, pull_rows, step_rows, survey_rows, wide
from .sweeps import (
    count_step,
    count_where,
    decide_segment,
    penalty,
    read_terms,
    record,
    step_count,
    step_scalars,
    this_step,
)

SURVEYED = tl.constexpr(3)  # what the survey leaves of a chunk: the slope; the size of the largest row, and which it is


@triton.jit
def known_alpha(tensor, alphas, row, rows, TILE: tl.constexpr, V: tl.constexpr):
    """The alphas of TILE rows that are known before the sweep: the caller's, or 1. Only `rows` of the rows exist."""
    i = tl.arange(0, TILE)
    alpha = tl.full([TILE], 1.0, tl.float64)
    if V.RULE_GIVEN != 0:
        given = tl.where(among(tl.load(tensor + RULE), V.RULE_GIVEN), rows, 0)
        alpha = tl.load(alphas + tl.load(tensor + SEGMENT) + row + i, mask=i < given, other=1.0)
    return alpha


@triton.jit
def decide_rows(tensor, hyper, live, measures, V: tl.constexpr):
    """The alphas of rows. They are 1 when their tensor has one α for all rows, because that is decided last."""
    alpha = decide_segment(tensor, hyper, live, measures, V)
    if V.RULE_TIED != 0:
        alpha = tl.where(among(tl.load(tensor + RULE), V.RULE_TIED), 1.0, alpha)
    return alpha


@triton.jit
def step_piece(chunk, tensor, grad, hyper, live, partials, largest, results, alphas, grad_scale, VECTOR: tl.constexpr,
               V: tl.constexpr):  # fmt: skip
    """Sweep 1 on one chunk, and sweep 2 on the rows that need not wait."""
    row, count, begin, n, parts = piece(chunk, tensor, V)
    t = this_step(tensor, V)
    factor, scalars = step_scalars(tensor, hyper, live, t, grad_scale, V)
    sign = penalty(tensor, hyper, live, V.RULE_SIGN, V)
    rule, segment = tl.load(tensor + RULE), tl.load(tensor + SEGMENT) + row
    keys = rounding_keys(tensor, t)
    if parts > 1:
        known = known_alpha(tensor, alphas, row, 1, 1, V)
        measures = step_rows(tensor, grad, row, 1, begin, n, factor, known, sign, largest, keys, scalars, 1, VECTOR, V)
        for k in tl.static_range(MEASURES):
            tl.store(partials + (chunk + tl.arange(0, 1)) * MEASURES + k, measures[k])
    else:
        i = tl.arange(0, V.TILE)
        for first in range(0, count, V.TILE):
            rows = count - first
            known = known_alpha(tensor, alphas, row + first, rows, V.TILE, V)
            measures = step_rows(tensor, grad, row + first, rows, 0, n, factor, known, sign, largest, keys, scalars,
                                 V.TILE, VECTOR, V)  # fmt: skip
            if among(rule, V.RULE_MEASURES):
                alpha = decide_rows(tensor, hyper, live, measures, V)
                record(results, alphas, segment + first + i, i < rows, measures, alpha, V)
                tl.debug_barrier()  # another thread may pull what one has stored
                pull_rows(tensor, row + first, rows, 0, n, alpha, keys, V.TILE, VECTOR, V)
            elif V.RULE_GIVEN != 0:
                if among(rule, V.RULE_GIVEN):
                    nan = each(tl.full([V.TILE], float("nan"), tl.float64))
                    record(results, alphas, segment + first + i, i < rows, nan, known, V)


@triton.jit
def conclude(tensor, hyper, live, partials, results, alphas, V: tl.constexpr):
    """What is left for the last program of a tensor: rows in several chunks, the α of the largest row, the upper bound
    of a learned radius, and the step count."""
    rows, rule, segment = tl.load(tensor + ROWS), tl.load(tensor + RULE), tl.load(tensor + SEGMENT)
    parts = tl.maximum((tl.load(tensor + NUMEL) // tl.maximum(rows, 1) + V.CHUNK - 1) // V.CHUNK, 1)
    lanes = tl.arange(0, V.LANES)
    if among(rule, V.RULE_MEASURES):
        most = tl.full([V.LANES], 0.0, tl.float64)
        for row in range(0, rows, V.LANES):
            inside = row + lanes < rows
            if parts > 1:
                measures = fold_rows(tensor, row, rows, parts, partials, MEASURES, V.LANES)
                alpha = decide_rows(tensor, hyper, live, measures, V)
                record(results, alphas, segment + row + lanes, inside, measures, alpha, V)
                n = size_of(measures)
            else:
                of_row = results + (segment + row + lanes) * RESULTS
                n = tl.load(of_row + BEFORE, mask=inside, other=0.0, cache_modifier=".cg")
                n += tl.load(of_row + GAIN, mask=inside, other=0.0, cache_modifier=".cg")
            most = tl.maximum(most, tl.where(inside, tl.where(n < float("inf"), n, float("inf")), 0.0))
        n = tl.max(most)
        if V.RULE_TIED != 0:
            if among(rule, V.RULE_TIED):
                alpha = decide_segment(tensor, hyper, live, of_size(n), V)
                for row in range(0, rows, V.LANES):
                    inside = row + lanes < rows
                    tl.store(alphas + segment + row + lanes, alpha + lanes * 0, mask=inside)
                    count_where(results + (segment + row + lanes) * RESULTS + SELECTED, inside, alpha != 1)
        if V.RULE_LEARNS != 0:
            if among(rule, V.RULE_LEARNS) & (rows > 0):
                radius = tl.load(tensor + LEARNED).to(tl.pointer_type(tl.float64))
                tl.store(radius, tl.minimum(tl.load(radius), n + ROW_EPS))
    else:
        nan = each(tl.full([V.LANES], float("nan"), tl.float64))
        if among(rule, V.RULE_GIVEN) == 0:
            one = tl.full([V.LANES], 1.0, tl.float64)
            record(results, alphas, segment + lanes, lanes < 1, nan, one, V)
        elif parts > 1:
            for row in range(0, rows, V.LANES):
                inside = row + lanes < rows
                alpha = tl.load(alphas + segment + row + lanes, mask=inside, other=1.0)
                record(results, alphas, segment + row + lanes, inside, nan, alpha, V)
    count_step(tensor, V)


@triton.jit(do_not_specialize_on_alignment=CALLERS)
def row_survey(tensors, grads, owners, hyper, live, partials, counters, largest, grad_scale, found_inf,
               V: tl.constexpr):  # fmt: skip
    """Sweep 0: one program for each chunk. A tensor's last program learns from the slope, or names the largest row."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    chunk = tl.program_id(0)
    i = tl.load(owners + chunk)
    tensor = tensors + i.to(tl.int64) * WIDTH
    rule = tl.load(tensor + RULE)
    if among(rule, V.RULE_SURVEYS) == 0:
        return
    grad = tl.load(grads + i)
    t = step_count(tensor) + 1
    factor, _scalars = step_scalars(tensor, hyper, live, t, grad_scale, V)
    row, count, begin, n, parts = piece(chunk, tensor, V)
    slope = tl.full((), 0.0, tl.float64)
    size = tl.full((), -1.0, tl.float64)
    which = tl.full((), 0.0, tl.float64)
    TALL: tl.constexpr = V.TILE
    if parts > 1:
        if wide(tensor, grad, n, V):
            a, b = survey_rows(tensor, grad, row, 1, begin, n, factor, 1, V.VECTOR, V)
        else:
            a, b = survey_rows(tensor, grad, row, 1, begin, n, factor, 1, 1, V)
        slope, size = tl.sum(a), tl.sum(b)
    else:
        lanes = tl.arange(0, TALL)
        for first in range(0, count, TALL):
            rows = count - first
            if wide(tensor, grad, n, V):
                a, b = survey_rows(tensor, grad, row + first, rows, 0, n, factor, TALL, V.VECTOR, V)
            else:
                a, b = survey_rows(tensor, grad, row + first, rows, 0, n, factor, TALL, 1, V)
            inside = lanes < rows
            slope += tl.sum(tl.where(inside, a / (b + ROW_EPS), 0.0))
            b = tl.where(inside & (b == b), b, -1.0)
            most = tl.max(b)
            at = tl.min(tl.where(b == most, lanes, TALL))
            which = tl.where(most > size, (row + first + at).to(tl.float64), which)
            size = tl.maximum(size, most)
    tl.store(partials + chunk * SURVEYED, slope)
    tl.store(partials + chunk * SURVEYED + 1, size)
    tl.store(partials + chunk * SURVEYED + 2, which)
    tl.debug_barrier()
    chunks = tl.load(tensor + CHUNKS)
    if tl.atomic_add(counters + i, 1, sem="acq_rel") == chunks - 1:
        tl.store(counters + i, 0)
        all_rows = tl.load(tensor + ROWS)
        slope, size, which = tl.full((), 0.0, tl.float64), tl.full((), -1.0, tl.float64), tl.full((), 0.0, tl.float64)
        lanes = tl.arange(0, V.LANES)
        first = partials + tl.load(tensor + FIRST) * SURVEYED
        for at in range(0, tl.where(parts > 1, all_rows, chunks), V.LANES):
            k = at + lanes
            if parts > 1:
                a, b, _which = fold_rows(tensor, at, all_rows, parts, partials, SURVEYED, V.LANES)
                slope += tl.sum(tl.where(k < all_rows, a / (b + ROW_EPS), 0.0))
                b = tl.where((k < all_rows) & (b == b), b, -1.0)
                w = k.to(tl.float64)
            else:
                there = k < chunks
                slope += tl.sum(tl.load(first + k * SURVEYED, mask=there, other=0.0, cache_modifier=".cg"))
                b = tl.load(first + k * SURVEYED + 1, mask=there, other=-1.0, cache_modifier=".cg")
                w = tl.load(first + k * SURVEYED + 2, mask=there, other=0.0, cache_modifier=".cg")
            most = tl.max(b)
            at_most = tl.min(tl.where(b == most, w, float("inf")))
            which = tl.where(most > size, at_most, which)
            size = tl.maximum(size, most)
        tl.store(largest + i, which.to(tl.int64))
        learn(tensor, rule, slope, t, hyper, live, V)


@triton.jit
def learn(tensor, rule, slope, t, hyper, live, V: tl.constexpr):
    """Learns from the slope, if a tensor's rule does."""
    for k in tl.static_range(len(V.RULES)):
        if V.NUMBERS[k] > 0:
            if rule == k:
                at = tl.load(tensor + LEARNED).to(tl.pointer_type(tl.float64))
                learned = ()
                for j in tl.static_range(V.NUMBERS[k]):
                    learned = learned + (tl.load(at + j),)
                terms = read_terms(hyper, live, tl.load(tensor + ROW) * V.HYPERS, V)
                new = V.LEARN[k](learned, slope, t, terms)
                tl.debug_barrier()
                for j in tl.static_range(V.NUMBERS[k]):
                    tl.store(at + j, new[j])


@triton.jit(do_not_specialize_on_alignment=CALLERS)
def row_step(tensors, grads, owners, hyper, live, partials, counters, largest, results, alphas, grad_scale, found_inf,
             V: tl.constexpr):  # fmt: skip
    """Sweep 1: one program for each chunk. Does nothing when found_inf is set."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    chunk = tl.program_id(0)
    i = tl.load(owners + chunk)
    tensor = tensors + i.to(tl.int64) * WIDTH
    grad = tl.load(grads + i)
    largest_row = tl.load(largest + i)
    _row, _count, _begin, n, _parts = piece(chunk, tensor, V)
    if wide(tensor, grad, n, V):
        step_piece(chunk, tensor, grad, hyper, live, partials, largest_row, results, alphas, grad_scale, V.VECTOR, V)
    else:
        step_piece(chunk, tensor, grad, hyper, live, partials, largest_row, results, alphas, grad_scale, 1, V)
    tl.debug_barrier()
    if tl.atomic_add(counters + i, 1, sem="acq_rel") == tl.load(tensor + CHUNKS) - 1:
        tl.store(counters + i, 0)
        conclude(tensor, hyper, live, partials, results, alphas, V)


@triton.jit(do_not_specialize_on_alignment=CALLERS)
def row_pull(tensors, owners, alphas, found_inf, V: tl.constexpr):
    """Sweep 2: one program for each chunk that may be pulled. Those are the first of the table. The last of them goes
    first, since sweep 1 left it in the cache."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    tensor = tensors + tl.load(owners + chunk).to(tl.int64) * WIDTH
    row, count, begin, n, _parts = piece(chunk, tensor, V)
    keys = rounding_keys(tensor, step_count(tensor))
    i = tl.arange(0, V.TILE)
    for first in range(0, count, V.TILE):
        rows = count - first
        alpha = tl.load(alphas + tl.load(tensor + SEGMENT) + row + first + i, mask=i < rows, other=1.0)
        if tl.min(tl.where(alpha != 1, 0, 1)) == 0:
            if wide(tensor, tl.full((), 0, tl.int64), n, V):
                pull_rows(tensor, row + first, rows, begin, n, alpha, keys, V.TILE, V.VECTOR, V)
            else:
                pull_rows(tensor, row + first, rows, begin, n, alpha, keys, V.TILE, 1, V)
