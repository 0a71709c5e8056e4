"""Sweeps of rows: the kernels that are launched where every segment is a row, an index of dimension 0.

A program works on one chunk of one tensor: several whole rows, which a tile takes a few at a time, a warp each, or a
part of one. Rows that depend on nothing else are decided and pulled at once, while they are in the cache; those that
lie in several chunks, or share the alpha of the largest, wait for the last program of their tensor, and sweep 2 pulls
them. A survey goes before, where the step must know something of all rows: FTP's slope, or the largest row.
"""

import triton
import triton.language as tl

from .base import power, read_hyper
from .chunk import CHUNKS, FIRST, GROUP, INDEX, NUMEL, RADIUS, ROWS, RULE, WIDTH, rounding_keys
from .decide import ROW_EPS, learn
from .rows import fold_rows, piece, pull_rows, step_rows, survey_rows, wide
from .sweeps import MEASURES, count_step, decide_segment, penalty, record, step_count, step_scalars, this_step


@triton.jit
def known_alpha(tensor, alphas, row, rows, V: tl.constexpr):
    """The alphas of rows that are known before the sweep: the caller's, or 1."""
    i = tl.arange(0, V.TILE)
    alpha = tl.full([V.TILE], 1.0, tl.float64)
    if V.GIVEN >= 0:
        given = tl.where(tl.load(tensor + RULE) == V.GIVEN, rows, 0)
        alpha = tl.load(alphas + tl.load(tensor + INDEX) + row + i, mask=i < given, other=1.0)
    return alpha


@triton.jit
def step_piece(chunk, tensor, grad, hyper, live, partials, largest, measures, alphas, grad_scale, VECTOR: tl.constexpr,
               V: tl.constexpr):  # fmt: skip
    """Sweep 1 on one chunk, and sweep 2 on rows that need nothing more."""
    row, count, begin, n, parts = piece(chunk, tensor, V)
    t = this_step(tensor, V)
    factor, scalars = step_scalars(tensor, hyper, live, t, grad_scale, V)
    sign = penalty(tensor, hyper, live, V.SIGNED, V)
    rule, index = tl.load(tensor + RULE), tl.load(tensor + INDEX)
    keys = rounding_keys(tensor, t)
    if parts > 1:
        known = tl.full([1], 1.0, tl.float64)
        if V.GIVEN >= 0:
            if rule == V.GIVEN:
                known = tl.load(alphas + index + row + tl.arange(0, 1))
        a, b, c = step_rows(tensor, grad, row, 1, begin, n, factor, known, sign, largest, keys, scalars, 1, VECTOR, V)
        part = partials + (chunk + tl.arange(0, 1)) * 3
        tl.store(part, a)
        tl.store(part + 1, b)
        tl.store(part + 2, c)
    else:
        i = tl.arange(0, V.TILE)
        for first in range(0, count, V.TILE):
            rows = count - first
            known = known_alpha(tensor, alphas, row + first, rows, V)
            a, b, c = step_rows(tensor, grad, row + first, rows, 0, n, factor, known, sign, largest, keys, scalars,
                                V.TILE, VECTOR, V)  # fmt: skip
            segment = index + row + first + i
            if rule < V.MEASURED:
                alpha = decide_segment(tensor, hyper, live, a, b, c, V)
                if rule == V.TIED:
                    alpha = alpha * 0 + 1
                record(measures, alphas, segment, i < rows, a, b, c, alpha, V)
                tl.debug_barrier()  # what one thread has stored another may pull
                pull_rows(tensor, row + first, rows, 0, n, alpha, keys, V.TILE, VECTOR, V)
            elif V.GIVEN >= 0:
                nan = tl.full([V.TILE], float("nan"), tl.float64)
                if rule == V.GIVEN:
                    record(measures, alphas, segment, i < rows, nan, nan, nan, known, V)


@triton.jit
def conclude(tensor, hyper, live, partials, measures, alphas, V: tl.constexpr):
    """What is left to the last program of a tensor: rows in several chunks, the alpha of the largest row, the radius's
    upper bound, the step count."""
    rows, rule, index = tl.load(tensor + ROWS), tl.load(tensor + RULE), tl.load(tensor + INDEX)
    parts = tl.maximum((tl.load(tensor + NUMEL) // tl.maximum(rows, 1) + V.CHUNK - 1) // V.CHUNK, 1)
    lanes = tl.arange(0, V.LANES)
    if rule < V.MEASURED:
        most = tl.full([V.LANES], 0.0, tl.float64)
        for row in range(0, rows, V.LANES):
            inside = row + lanes < rows
            at = measures + (index + row + lanes) * MEASURES
            if parts > 1:
                a, b, c = fold_rows(tensor, row, rows, parts, partials, V.LANES)
                alpha = decide_segment(tensor, hyper, live, a, b, c, V)
                if rule == V.TIED:
                    alpha = alpha * 0 + 1
                record(measures, alphas, index + row + lanes, inside, a, b, c, alpha, V)
                n = b + c
            else:
                n = tl.load(at + 1, mask=inside, other=0.0, cache_modifier=".cg")
                n += tl.load(at + 2, mask=inside, other=0.0, cache_modifier=".cg")
            most = tl.maximum(most, tl.where(inside, tl.where(n < float("inf"), n, float("inf")), 0.0))
        n = tl.max(most)
        if V.TIED >= 0:
            if rule == V.TIED:
                alpha = decide_segment(tensor, hyper, live, n * 0, n, n * 0, V)
                for row in range(0, rows, V.LANES):
                    inside = row + lanes < rows
                    tl.store(alphas + index + row + lanes, alpha + lanes * 0, mask=inside)
                    at = measures + (index + row + lanes) * MEASURES + 3
                    count = tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
                    tl.store(at, count + tl.where(alpha != 1, 1.0, 0.0), mask=inside)
        if V.LEARNED >= 0:
            radius = tl.load(tensor + RADIUS).to(tl.pointer_type(tl.float64))
            if rule == V.LEARNED:
                if rows > 0:
                    tl.store(radius, tl.minimum(tl.load(radius), n + ROW_EPS))
    else:
        nan = tl.full([V.LANES], float("nan"), tl.float64)
        if rule != V.GIVEN:
            one = tl.full([V.LANES], 1.0, tl.float64)
            record(measures, alphas, index + lanes, lanes < 1, nan, nan, nan, one, V)
        elif parts > 1:
            for row in range(0, rows, V.LANES):
                inside = row + lanes < rows
                alpha = tl.load(alphas + index + row + lanes, mask=inside, other=1.0)
                record(measures, alphas, index + row + lanes, inside, nan, nan, nan, alpha, V)
    count_step(tensor, V)


@triton.jit
def row_survey(tensors, grads, owners, hyper, live, partials, counters, largest, grad_scale, found_inf,
               V: tl.constexpr):  # fmt: skip
    """Sweep 0: one program a chunk. The last of a tensor makes the step of its radius, or names its largest row."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    chunk = tl.program_id(0)
    i = tl.load(owners + chunk)
    tensor = tensors + i.to(tl.int64) * WIDTH
    rule = tl.load(tensor + RULE)
    if (rule != V.LEARNED) & (rule != V.SIGNED):
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
        if wide(tensor, grad, V) & (n % V.VECTOR == 0):
            a, b = survey_rows(tensor, grad, row, 1, begin, n, factor, 1, V.VECTOR, V)
        else:
            a, b = survey_rows(tensor, grad, row, 1, begin, n, factor, 1, 1, V)
        slope, size = tl.sum(a), tl.sum(b)
    else:
        lanes = tl.arange(0, TALL)
        for first in range(0, count, TALL):
            rows = count - first
            if wide(tensor, grad, V):
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
    tl.store(partials + chunk * 3, slope)
    tl.store(partials + chunk * 3 + 1, size)
    tl.store(partials + chunk * 3 + 2, which)
    tl.debug_barrier()
    chunks = tl.load(tensor + CHUNKS)
    if tl.atomic_add(counters + i, 1, sem="acq_rel") == chunks - 1:
        tl.store(counters + i, 0)
        all_rows = tl.load(tensor + ROWS)
        slope, size, which = tl.full((), 0.0, tl.float64), tl.full((), -1.0, tl.float64), tl.full((), 0.0, tl.float64)
        lanes = tl.arange(0, V.LANES)
        first = partials + tl.load(tensor + FIRST) * 3
        for at in range(0, tl.where(parts > 1, all_rows, chunks), V.LANES):
            k = at + lanes
            if parts > 1:
                a, b, _gain = fold_rows(tensor, at, all_rows, parts, partials, V.LANES)
                slope += tl.sum(tl.where(k < all_rows, a / (b + ROW_EPS), 0.0))
                b = tl.where((k < all_rows) & (b == b), b, -1.0)
                w = k.to(tl.float64)
            else:
                there = k < chunks
                slope += tl.sum(tl.load(first + k * 3, mask=there, other=0.0, cache_modifier=".cg"))
                b = tl.load(first + k * 3 + 1, mask=there, other=-1.0, cache_modifier=".cg")
                w = tl.load(first + k * 3 + 2, mask=there, other=0.0, cache_modifier=".cg")
            most = tl.max(b)
            at_most = tl.min(tl.where(b == most, w, float("inf")))
            which = tl.where(most > size, at_most, which)
            size = tl.maximum(size, most)
        tl.store(largest + i, which.to(tl.int64))
        if rule == V.LEARNED:
            radius = tl.load(tensor + RADIUS).to(tl.pointer_type(tl.float64))
            group = tl.load(tensor + GROUP) * V.HYPERS
            k, lr = read_hyper(hyper, live, group + V.LEARN), read_hyper(hyper, live, group + V.LEARN + 1)
            beta1, beta2 = read_hyper(hyper, live, group + V.LEARN + 2), read_hyper(hyper, live, group + V.LEARN + 3)
            new, m, v = learn(tl.load(radius), tl.load(radius + 1), tl.load(radius + 2), slope, t, k, lr, beta1, beta2,
                              power(beta1, t), power(beta2, t))  # fmt: skip
            tl.debug_barrier()
            tl.store(radius, new)
            tl.store(radius + 1, m)
            tl.store(radius + 2, v)


@triton.jit
def row_step(tensors, grads, owners, hyper, live, partials, counters, largest, measures, alphas, grad_scale, found_inf,
             V: tl.constexpr):  # fmt: skip
    """Sweep 1: one program a chunk. Does nothing where found_inf is set."""
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    chunk = tl.program_id(0)
    i = tl.load(owners + chunk)
    tensor = tensors + i.to(tl.int64) * WIDTH
    grad = tl.load(grads + i)
    largest_row = tl.load(largest + i)
    _row, _count, _begin, n, _parts = piece(chunk, tensor, V)
    if wide(tensor, grad, V) & (n % V.VECTOR == 0):
        step_piece(chunk, tensor, grad, hyper, live, partials, largest_row, measures, alphas, grad_scale, V.VECTOR, V)
    else:
        step_piece(chunk, tensor, grad, hyper, live, partials, largest_row, measures, alphas, grad_scale, 1, V)
    tl.debug_barrier()
    if tl.atomic_add(counters + i, 1, sem="acq_rel") == tl.load(tensor + CHUNKS) - 1:
        tl.store(counters + i, 0)
        conclude(tensor, hyper, live, partials, measures, alphas, V)


@triton.jit
def row_pull(tensors, owners, alphas, found_inf, V: tl.constexpr):
    """Sweep 2: one program for each chunk of the first so many, the last first, since sweep 1 left it in the cache."""
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
        alpha = tl.load(alphas + tl.load(tensor + INDEX) + row + first + i, mask=i < rows, other=1.0)
        if tl.min(tl.where(alpha != 1, 0, 1)) == 0:
            if wide(tensor, 0, V) & (n % V.VECTOR == 0):
                pull_rows(tensor, row + first, rows, begin, n, alpha, keys, V.TILE, V.VECTOR, V)
            else:
                pull_rows(tensor, row + first, rows, begin, n, alpha, keys, V.TILE, 1, V)
