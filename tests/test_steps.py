"""Every backend, method, base and dtype against the oracle in float64, over one table of cases."""

import os
import subprocess
import sys

import pytest
import torch

import robustft_kernels as rft
from robustft_kernels.backends import registry
from robustft_kernels.backends.triton import interpreted
from robustft_kernels.core.contract import StepTable, empty_results
from robustft_kernels.core.methods import MEASURES, RULES, rule_of
from robustft_kernels.testing import (
    CASES,
    CHUNK,
    DTYPES,
    LEAN_CASES,
    ROW_CASES,
    SETTINGS,
    Case,
    Stepper,
    assert_same_step,
)

from .table import ANCHORS, METHOD_NORMS, TABLE, covering

FEW_CASES = tuple(case for case in LEAN_CASES if case.name in ("0-d", "tile, block and tail", "chunk and 1", "5-d"))

native = pytest.mark.skipif(bool(rft.backends()["native"]), reason=rft.backends()["native"])


def tiers(backend, turn):
    """What the tiers step on a backend: lists of cases, rows of the table, which of four steps are compared, a word for
    it, and the mark of its tier.

    The default tier has rows in which all pairs are met. Another `turn` gives other rows. In Triton's interpreter
    those of SPD step lean cases, as its gate should open in some, and so do rows that have every word of every column.
    The others step few. The full tier steps all cases with the former, and lean ones with the others. The reference
    steps lean cases, and all of them in the full tier. The native backend is the fastest, so its full tier has the rest
    of the table.
    """
    rows = covering(turn)
    if slow(backend):
        every_word = covering(turn, rows, 1)
        lean = [row for row in rows if row.method_norm[0] == "spd" or row in every_word]
        few = [row for row in rows if row not in lean]
        default = [(LEAN_CASES, lean, {3}, "lean", ()), (FEW_CASES, few, {3}, "few", ())]
        return [*default, (CASES, lean, {3}, "", pytest.mark.full), (LEAN_CASES, few, {3}, "lean", pytest.mark.full)]
    if backend == "reference":
        return [(LEAN_CASES, rows, {3}, "lean", ()), (CASES, rows, {3}, "", pytest.mark.full)]
    rest = [row for row in TABLE if row not in rows] if backend == "native" else []
    return [(CASES, rows, {0, 3}, "", ()), (CASES, rest, {3}, "", pytest.mark.full)]


def pytest_generate_tests(metafunc):
    if "row" in metafunc.fixturenames:
        params = [
            pytest.param(backend, cases, row, steps, id="-".join(filter(None, (backend, word, *row.names))), marks=tier)
            for turn, backend in enumerate(ready(metafunc.config))
            for cases, rows, steps, word, tier in tiers(backend, turn)
            for row in rows
        ]
        metafunc.parametrize(("on", "cases", "row", "compared"), params)


def ready(config):
    device = torch.device(config.getoption("--device"))
    names = [name for name in registry.BACKENDS if name != "triton_tickets"]
    return [name for name in names if not registry.objection_to(name, device, {torch.float32})]


def slow(backend):
    """Whether a launch takes Triton's interpreter a second."""
    return backend.startswith("triton") and interpreted()


def cases_of(backend):
    """The cases of a test with few rows."""
    return LEAN_CASES if slow(backend) else CASES


def settled(cases, settings, method, dtype, backend="reference", steps=2, **kwargs):
    """A stepper some steps into its trajectory."""
    stepper = Stepper(cases, settings, method, dtype, **kwargs)
    for _ in range(steps):
        stepper.run(backend, stepper.grads())
    return stepper


def assert_bits(got, want):
    for a, b in zip(got.tensors(), want.tensors(), strict=True):
        assert torch.equal(a.nan_to_num(nan=0.125), b.nan_to_num(nan=0.125))


def share_firing(stepper):
    """The share of each tensor's segments that was pulled."""
    return torch.stack([(alphas != 1).double().mean() for alphas in stepper.alphas.split(stepper.segments)])


def test_step_equals_oracle(on, cases, row, compared, device):
    """Compares each of those steps by itself, from where the trajectory stands."""
    (method, norm), settings = row.method_norm, row.settings
    got = Stepper(cases, settings, method, row.dtype, ANCHORS[row.anchor], device=device, norm=norm)
    firing = []
    for t in range(4):
        grads, before = got.grads(), got.clone()
        if t not in compared:
            got.run("reference" if slow(on) else on, grads)
            firing.append(share_firing(got))
            continue
        untouched = [t.clone() for t in (*grads, *got.anchors)]
        want = before.clone()
        want.run_oracle(grads)
        got.run(on, grads)
        assert_same_step(got, want, before, grads)
        assert all(map(torch.equal, (*grads, *got.anchors), untouched)), "a gradient or an anchor was written"
        firing.append(share_firing(got))
    share = torch.stack(firing).nanmean()
    if method == "spd" and settings.hyper.get("momentum") != 0:  # without momentum a step follows g, which leads back
        assert 0.05 < share < 0.6, "the stream should make a good part of the segments fire"
        long = torch.tensor([p.numel() > CHUNK for p in got.params], device=device)
        assert (firing[-1][long] > 0).any(), "a tensor of several chunks should fire when it is compared"
    if method in ("project", "ftp"):
        assert share > 0.1, "the radius should hold back a good part of the segments"


@pytest.mark.lean(keep=lambda dtype, **_: dtype == torch.float32)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("method", "norm"), [(m, n) for m, n in METHOD_NORMS if rule_of(m, n).crosses_rows])
def test_rows_equal_oracle(backend, device, method, norm, dtype):
    """Rows short and long, aligned or not, contiguous or strided, one or none. Some rows have several chunks."""
    cases = ROW_CASES[len(CASES) :]
    got = settled(cases, SETTINGS[0], method, dtype, "reference", device=device, norm=norm)
    grads, before = got.grads(), got.clone()
    want = before.clone()
    want.run_oracle(grads)
    got.run(backend, grads)
    assert_same_step(got, want, before, grads)


@pytest.mark.parametrize("norm", ["l2", "mars_rows"])
def test_the_other_gate_equals_oracle(backend, device, norm):
    """It holds back steps that the paper's gate lets pass, and a segment that begins at its anchor. The steps are those
    of the table. Only what is made of the sums differs."""
    cases = LEAN_CASES[1:7] if norm == "l2" else ROW_CASES[len(CASES) : len(CASES) + 3]
    got = Stepper(cases, SETTINGS[1], "spd", torch.float32, device=device, norm=norm, gate="away")
    got.settings = SETTINGS[1].but(strength=0.6)
    got.anchors[1].copy_(got.params[1])
    firing = []
    for t in range(3):
        grads, before = got.grads(), got.clone()
        want, paper = before.clone(), before.clone()
        want.run_oracle(grads)
        paper.rule = rule_of("spd", norm)
        paper.run_oracle(grads)
        got.run(backend if t in (0, 2) else "reference", grads)
        assert_same_step(got, want, before, grads)
        firing.append((got.alphas != 1, paper.alphas != 1))
    (ours, theirs) = (torch.cat(of) for of in zip(*firing, strict=True))
    assert ours[theirs].all()
    assert (ours & ~theirs).double().mean() > 0.2
    if norm == "l2":
        assert firing[0][0][1]
        assert not firing[0][1][1]


@pytest.mark.lean(keep=lambda settings, **_: settings is SETTINGS[0])
@pytest.mark.parametrize("settings", SETTINGS[:1] + SETTINGS[-1:], ids=lambda s: s.name)
def test_mixed_dtypes_in_one_call(backend, settings):
    """Gradients have another dtype than their parameter, and all dtypes of parameters are side by side."""
    cases = cases_of(backend)
    steppers = [settled(cases, settings, "spd", dtype) for dtype in DTYPES]
    grads = [s.grads(torch.float32) for s in steppers]
    want = [s.clone() for s in steppers]
    for s, g in zip(want, grads, strict=True):
        s.run(backend, g)
    tensors = [s.tensor(i, row) for row, s in enumerate(steppers) for i in range(len(cases))]
    results, alphas = empty_results(len(tensors), steppers[0].device)
    hyper = steppers[0].hyper.repeat(len(DTYPES), 1)
    registry.prepare(backend, StepTable(settings.base, tensors, hyper, results, alphas))(sum(grads, []))
    assert torch.equal(results[:, : len(MEASURES)], torch.cat([s.measures for s in want]))
    assert torch.equal(alphas, torch.cat([s.alphas for s in want]))
    for got, one in zip(steppers, want, strict=True):
        assert all(map(torch.equal, got.params, one.params))


def test_many_at_once_equal_single_calls(backend):
    at_once_equal_single_calls(backend, SETTINGS[0], 40 if slow(backend) else 300)


@pytest.mark.full
@pytest.mark.parametrize("settings", [s for s in SETTINGS if s.hyper.get("momentum") != 0], ids=lambda s: s.name)
def test_many_at_once_equal_single_calls_in_all_settings(backend, settings):
    at_once_equal_single_calls(backend, settings, 100 if slow(backend) else 300)


def at_once_equal_single_calls(backend, settings, tensors):
    generator = torch.Generator("cpu").manual_seed(3)
    sizes = torch.randint(1, 3000, (tensors - 3,), generator=generator, device="cpu").tolist()
    sizes += [3 * CHUNK, 2 * CHUNK + 1, CHUNK]
    cases = tuple(Case(str(n), (n,)) for n in sizes)
    together = settled(cases, settings, "spd", torch.float32)
    grads, alone = together.grads(), together.clone()
    together.run(backend, grads)
    assert (together.alphas < 1).any()
    assert (together.alphas == 1).any()
    for i in range(len(cases)):
        results, alphas = alone.results[i : i + 1], alone.alphas[i : i + 1]
        table = StepTable(settings.base, [alone.tensor(i)], alone.hyper, results, alphas)
        registry.prepare(backend, table)([grads[i]])
    assert_bits(alone, together)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads(backend, dtype):
    if backend not in ("native", "reference"):
        pytest.skip("on a GPU, test_gpu.py asks it; the interpreter runs one program after another")
    cases = (*CASES, Case("large", (40 * CHUNK + 7,)))
    start = settled(cases, SETTINGS[1], "spd", dtype)
    grads, results = start.grads(), []
    # A missing wait shows in few of many runs. torch's own sums split by thread, so it only has to repeat itself.
    for threads in (2, 2) if backend == "reference" else (1, 2, 3, 8, *[4] * 20):
        torch.set_num_threads(threads)
        got = start.clone()
        got.run(backend, grads)
        results.append(got)
    for other in results[1:]:
        assert_bits(other, results[0])


@native
def test_bits_do_not_depend_on_the_instruction_set():
    """Runs each instruction set that this processor has, in a process of its own."""
    program = """
import hashlib
import torch
from robustft_kernels import _native
from robustft_kernels.testing import DTYPES, LEAN_CASES, SETTINGS, Stepper
digest = hashlib.sha256()
for settings in SETTINGS:
    for dtype in DTYPES:
        s = Stepper(LEAN_CASES, settings, "spd", dtype)
        for _ in range(3):
            s.run("native", s.grads())
        for t in s.tensors():
            digest.update(t.double().flatten().numpy().tobytes())
print(_native.ISA, digest.hexdigest())
"""
    seen = {}
    for capability in ("default", "avx2", "avx512"):
        env = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        out = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
        isa, digest = out.stdout.split()
        seen[isa] = digest
    assert "DEFAULT" in seen
    assert len(set(seen.values())) == 1, seen


def test_oracle_tells_methods_apart(backend):
    """Negative controls: another method's step, and SPD without its cap, are not taken for SPD's."""
    settings = SETTINGS[0]
    before = settled(cases_of(backend), settings, "spd", torch.float32)
    grads = before.grads()
    want = before.clone()
    want.run_oracle(grads)
    for wrong in ("keep", "l2sp"):
        got = before.clone()
        got.rule = RULES[wrong]
        got.run(backend, grads)
        with pytest.raises(AssertionError):
            assert_same_step(got, want, before, grads)
    stronger = before.clone()
    stronger.settings = settings.but(strength=1.31)
    stronger.run(backend, grads)
    with pytest.raises(AssertionError):
        assert_same_step(stronger, want, before, grads)


@pytest.mark.parametrize("method", ["spd", "l2sp"])
def test_alpha_is_capped_at_the_anchor(backend, method):
    """If strength·r, or strength·lr, exceeds 1, the weights land on θ₀ and not beyond it."""
    settings = SETTINGS[0]
    got = settled(CASES, settings, method, torch.float32)
    got.settings = settings.but(strength=1e9)
    got.run(backend, got.grads())
    assert ((got.alphas == 0) | (got.alphas == 1)).all()
    assert (got.alphas == 0).sum() > 3
    for alpha, param, anchor in zip(got.alphas, got.params, got.anchors, strict=True):
        if alpha == 0:
            assert torch.equal(param, anchor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_storage_rounds_as_torch_does(backend, dtype):
    """Every 16-bit value survives being widened and narrowed. Floats of every exponent round to nearest, ties to even.
    So do the midpoints between two neighbours, and the neighbours of those."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    middles = (every.float() + torch.nextafter(every, torch.full_like(every, torch.inf)).float()) / 2
    floats = torch.cat(
        [middles, middles.nextafter(torch.tensor(torch.inf)), middles.nextafter(torch.tensor(-torch.inf))]
    )
    floats = torch.cat([floats, torch.arange(0, 2**31, 9973, dtype=torch.int32).view(torch.float32)])
    floats = floats[floats.isfinite() & (floats.abs() < 1e38)]

    settings = SETTINGS[3]
    kept = Stepper((Case("every", tuple(every.shape)),), settings, "none", dtype, anchored=False)
    kept.params = [every.clone()]
    kept.settings = settings.but(lr=0.0)
    kept.run(backend, [torch.zeros_like(every)])
    assert torch.equal(kept.params[0], every)

    pulled = Stepper((Case("floats", tuple(floats.shape)),), settings, "l2sp", dtype, torch.float32)
    pulled.params, pulled.anchors = [torch.zeros_like(floats, dtype=dtype)], [floats]
    pulled.settings = settings.but(strength=1e9)  # onto the anchor
    pulled.run(backend, [torch.zeros_like(floats, dtype=dtype)])
    assert torch.equal(pulled.params[0], floats.to(dtype))


def test_first_step_never_fires(backend):
    settings = SETTINGS[0]
    got = Stepper(cases_of(backend), settings, "spd", torch.float32)
    got.anchors = [case.lay(p) for case, p in zip(got.cases, got.params, strict=True)]
    got.run(backend, got.grads())
    assert (got.alphas == 1).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("settings", SETTINGS[:1] + SETTINGS[4:5], ids=lambda s: s.name)
def test_non_finite_gradient(backend, settings, bad):
    """The base step takes it as torch.optim does. There is no pull, and no trace in the anchor or in other tensors."""
    got = settled(cases_of(backend), settings, "spd", torch.float32)
    grads = got.grads()
    k = next(i for i, case in enumerate(got.cases) if case.name == "several chunks")
    grads[k].view(-1)[CHUNK + 1] = bad
    before, want = got.clone(), got.clone()
    got.run(backend, grads)
    want.run_oracle(grads)
    assert got.alphas[k] == 1
    assert torch.equal(got.params[k].isfinite(), want.params[k].isfinite())
    assert int((~got.params[k].isfinite()).sum()) == 1
    finite = got.params[k].isfinite()
    assert torch.allclose(got.params[k][finite], want.params[k][finite])
    assert all(map(torch.equal, got.anchors, before.anchors))
    assert all(p.isfinite().all() for i, p in enumerate(got.params) if i != k)


def test_without_eps_lanes_that_hold_nothing_stay_out_of_sums(backend, device):
    """The lanes beyond the end of a tensor, or of a row, have 0/0. It is in no measure."""
    for method, norm in (("spd", "l2"), ("spd", "mars_rows")):
        got = settled(LEAN_CASES, SETTINGS[0], method, torch.float32, device=device, norm=norm)
        got.settings = SETTINGS[0].but(eps=0.0)
        grads, before = got.grads(), got.clone()
        want = before.clone()
        want.run_oracle(grads)
        got.run(backend, grads)
        assert got.measures.isfinite().all()
        assert_same_step(got, want, before, grads)


def test_an_infinite_weight_stays_alone(backend):
    """Pulled toward zero it is still infinite, as α·inf is. It touches nothing else."""
    settings = SETTINGS[0]
    got = settled(cases_of(backend), settings, "l2sp", torch.float32, anchored=False)
    k = next(i for i, case in enumerate(got.cases) if case.name == "several chunks")
    got.params[k].view(-1)[CHUNK + 1] = torch.inf
    grads = got.grads()
    grads[k].view(-1)[CHUNK + 1] = 1.0
    want = got.clone()
    want.run_oracle(grads)
    got.run(backend, grads)
    assert got.params[k].view(-1)[CHUNK + 1] == torch.inf
    assert all(map(torch.allclose, got.params, want.params))


def test_neighbours_are_not_touched(backend):
    """Sentinels around each tensor survive a step."""
    settings = SETTINGS[0]
    sizes = (1, 3, 17, 1024 + 5, CHUNK + 3, 3 * CHUNK + 1)
    guard = 32
    arenas = []

    def lay(t):
        arena = torch.full((t.numel() + 2 * guard,), 7.5, dtype=t.dtype)
        arenas.append(arena)
        return arena[guard:-guard].view(t.shape).copy_(t)

    got = settled(tuple(Case(str(n), (n,), lay) for n in sizes), settings, "spd", torch.float32, backend=backend)
    assert (got.alphas < 1).any()
    assert all((a[:guard] == 7.5).all() and (a[-guard:] == 7.5).all() for a in arenas)
