"""On every backend, the default tier meets all pairs of the table of cases. The sizes reach every path."""

from itertools import combinations

import torch

from robustft_kernels.testing import CASES, CHUNK, DTYPES, LEAN_CASES, SETTINGS, Stepper

from .table import ANCHORS, METHOD_NORMS, TABLE, covering
from .test_steps import ready, tiers


def default_rows(backend, turn):
    return [row for _, rows, _, _, mark in tiers(backend, turn) if not mark for row in rows]


def test_the_default_tier_meets_every_pair_on_every_backend(pytestconfig):
    for turn, backend in enumerate(ready(pytestconfig)):
        rows = default_rows(backend, turn)
        for one, other in combinations(range(4), 2):
            met = {(row.names[one], row.names[other]) for row in rows}
            for pair in {(row.names[one], row.names[other]) for row in TABLE}:
                assert pair in met, f"{pair} is not met on {backend}"


def test_what_acts_in_few_dtypes_meets_every_method_there(pytestconfig):
    """Stochastic rounding acts on bfloat16, master weights on 16 bits. Elsewhere they meet a method in name only."""
    stochastic = [s.name for s in SETTINGS if s.hyper["stochastic_rounding"]]
    masters = [s.name for s in SETTINGS if s.hyper["master_weights"]]
    assert len(stochastic) >= 3
    assert len(masters) >= 2
    for turn, backend in enumerate(ready(pytestconfig)):
        rows = default_rows(backend, turn)
        for method_norm in METHOD_NORMS:
            of = {(row.settings.name, row.dtype) for row in rows if row.method_norm == method_norm}
            assert all((name, torch.bfloat16) in of for name in stochastic), (backend, method_norm)
            assert all((name, d) in of or (name, e) in of for name in masters for d, e in [DTYPES[2:]])


def test_the_table_is_whole():
    anchored = len(METHOD_NORMS) - 1  # "none" has no anchor
    assert len(TABLE) == (anchored * len(ANCHORS) + 1) * len(SETTINGS) * len(DTYPES)
    assert len({row.names for row in TABLE}) == len(TABLE)


def test_a_covering_is_small():
    """There must be as many rows as there are pairs of the two longest columns. 15% more are allowed."""
    pairs = len({row.names[::2] for row in TABLE})
    for turn in range(3):
        assert pairs <= len(covering(turn)) <= 1.15 * pairs
    assert covering(0) != covering(1)


def test_cases_reach_the_vector_path_its_tail_and_several_chunks():
    for cases in (CASES, LEAN_CASES):
        sizes = [torch.Size(case.shape).numel() for case in cases]
        assert {0, 1, 3} <= set(sizes)
        assert max(sizes) > 3 * CHUNK
        assert any(size > CHUNK and size % 16 for size in sizes)
        assert {torch.Size(case.shape).numel() > CHUNK for case in cases if case.name == "misaligned"} == {True}
    assert sum(-(-size // CHUNK) for size in sizes) <= 18


def test_options_that_do_not_act_change_no_bit(backend):
    """Stochastic rounding of weights that are not bfloat16, and masters of weights that are not 16 bits long."""
    cases = LEAN_CASES[3:5]
    for settings in SETTINGS:
        for dtype in DTYPES:
            if settings.acts_on(dtype):
                continue
            results = []
            for options in ({}, {"stochastic_rounding": 0, "master_weights": 0}):
                own = settings.but(**options)
                stepper = Stepper(cases, own, "spd", dtype)
                for _ in range(2):
                    stepper.run(backend, stepper.grads())
                results.append([*stepper.params, *sum(stepper.states.values(), []), stepper.alphas])
            assert all(map(torch.equal, *results)), (settings.name, dtype)
