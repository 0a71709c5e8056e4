"""Every backend, method, base and dtype against the oracle in float64, over one table of cases."""

import os
import subprocess
import sys

import pytest
import torch

from robustft_kernels import METHODS, ops, reference
from robustft_kernels.bases import STILL, arithmetic_of
from robustft_kernels.methods import RULES, rule_of
from robustft_kernels.testing import CASES, CHUNK, DTYPES, ROW_CASES, SETTINGS, Case, Stepper, assert_same_step

ANCHORS = {"anchor of its dtype": True, "bf16 anchor": torch.bfloat16, "f32 anchor": torch.float32, "zero": False}
METHOD_NORMS = [(method, norm) for method, row in METHODS.items() for norm in row.rules]
TABLE = [
    (*method_norm, anchor, settings, dtype)
    for method_norm in METHOD_NORMS
    for anchor in ANCHORS
    if METHODS[method_norm[0]].anchored or anchor == "zero"
    for settings in SETTINGS
    for dtype in DTYPES
]
native = pytest.mark.skipif(bool(ops.NATIVE_MISSING), reason=ops.NATIVE_MISSING)


def pytest_generate_tests(metafunc):
    """Half of the table for the native backend; for the others, which take longer, a fourth of it (of rows in Triton's
    interpreter a sixteenth), in which any method still meets every anchor, setting and dtype."""
    if "row" in metafunc.fixturenames:
        columns = (METHOD_NORMS, list(ANCHORS), SETTINGS, DTYPES)
        rows = []
        for backend in ready(metafunc.config):
            for method, norm, *rest in TABLE:
                i, j, k, m = (column.index(x) for column, x in zip(columns, ((method, norm), *rest), strict=True))
                long = slow(backend) and RULES[rule_of(method, norm)].by_rows
                if (i + 3 * j + k + 2 * m) % (2 if backend == "native" else 16 if long else 4) == 0:
                    name = "-".join(map(str, (backend, method, norm, rest[0], rest[1].name, rest[2])))
                    rows.append(pytest.param((backend, method, norm, *rest), id=name))
        metafunc.parametrize("row", rows)


def prepare_of(backend, settings):
    return ops.PREPARE[backend][settings.base.name]


def ready(config):
    device = torch.device(config.getoption("--device"))
    names = [name for name in ops.FASTEST_FIRST if name != "triton_tickets"]
    return [name for name in names if not ops.objection_to(name, device, {torch.float32})]


def slow(backend):
    """Whether a launch takes Triton's interpreter a second."""
    return backend.startswith("triton") and ops.interpreted()


def settled(cases, settings, method, dtype, backend="reference", steps=2, **kwargs):
    """A stepper some steps into its trajectory."""
    stepper = Stepper(cases, settings, method, dtype, **kwargs)
    for _ in range(steps):
        stepper.run(prepare_of(backend, settings), stepper.grads())
    return stepper


def assert_bits(got, want):
    for a, b in zip(got.tensors(), want.tensors(), strict=True):
        assert torch.equal(a.nan_to_num(nan=0.125), b.nan_to_num(nan=0.125))


def test_step_equals_oracle(row, device):
    backend, method, norm, anchor, settings, dtype = row
    got = Stepper(CASES, settings, method, dtype, ANCHORS[anchor], device=device, norm=norm)
    firing = []
    for t in range(4):
        grads, before = got.grads(), got.clone()
        if slow(backend) and t not in (0, 3):
            got.run(prepare_of("reference", settings), grads)
            firing.append(got.alphas.clone())
            continue
        untouched = [t.clone() for t in (*grads, *got.anchors)]
        want = before.clone()
        want.run_oracle(grads)
        got.run(prepare_of(backend, settings), grads)
        assert_same_step(got, want, before, grads)
        assert all(map(torch.equal, (*grads, *got.anchors), untouched)), "a gradient or an anchor was written"
        firing.append(got.alphas.clone())
    share = float((torch.cat(firing) != 1).double().mean())
    if method == "spd" and settings.hyper.get("momentum") != 0:  # without momentum a step goes where g says: back
        assert 0.1 < share < 0.6, "the stream should make a good part of the segments fire"
    if method in ("project", "ftp"):
        assert share > 0.1, "the radius should hold back a good part of the segments"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("method", "norm"), [(m, n) for m, n in METHOD_NORMS if RULES[rule_of(m, n)].by_rows or m == "mars_sp"]
)
def test_rows_equal_oracle(backend, device, method, norm, dtype):
    """Short and long rows, several chunks of one, aligned or not, contiguous or strided, one or none."""
    cases = ROW_CASES[len(CASES) :]
    got = settled(cases, SETTINGS[0], method, dtype, "reference", device=device, norm=norm)
    grads, before = got.grads(), got.clone()
    want = before.clone()
    want.run_oracle(grads)
    got.run(prepare_of(backend, SETTINGS[0]), grads)
    assert_same_step(got, want, before, grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("anchor", ["anchor of its dtype", "zero"])
@pytest.mark.parametrize("rule", ["observe", "observe_rows"])
def test_measures_without_a_step(backend, device, rule, anchor, dtype):
    """The base "still": ⟨g,c⟩ and the size of c, of the whole or of rows, with gradients and without; nothing moves."""
    cases = ROW_CASES[5:] if not slow(backend) else ROW_CASES[12:]
    of = Stepper(cases, SETTINGS[0], "none", dtype, ANCHORS[anchor], device=device)
    of.rule = rule
    grads, untouched = of.grads(), [p.clone() for p in of.params]
    hyper = torch.tensor(
        [[float(c == "anchored" and of.anchored) for c in STILL.hyper]], dtype=torch.float64, device="cpu"
    )
    eps = torch.finfo(arithmetic_of(dtype)).eps
    for given in (grads, []):
        measures = torch.zeros(sum(of.segments), 4, dtype=torch.float64, device=device)
        alphas = torch.ones(sum(of.segments), dtype=torch.float64, device=device)
        anchors = of.anchors if of.anchored else []
        ops.prepare(backend, STILL, of.params, anchors, [], [], measures, alphas, hyper, [len(cases)], [rule], [])(
            given
        )
        first = 0
        for case, p, a, g, n in zip(cases, of.params, of.anchors, grads, of.segments, strict=True):
            c = p.double() - (a.double() if of.anchored else 0)
            size = c.abs() if rule == "observe_rows" else c * c
            found = measures[first : first + n].T
            for name, got, exact in (("dot", found[0], g.double() * c), ("size", found[1], size)):
                if name == "dot" and not given:
                    assert got.isnan().all(), case.name
                    continue
                want, slack = (reference.segments(x, rule).sum(1) for x in (exact, 32 * eps * exact.abs()))
                assert ((got - want).abs() <= slack).all(), (case.name, name)
            first += n
        assert (measures[:, 2:] == 0).all()
    assert all(map(torch.equal, of.params, untouched))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["given", "given_rows"])
def test_pull_by_given_alphas(backend, device, rule, dtype):
    """The base "still": θ₀ at α = 0, whatever θ is; untouched at 1; between, what the formula says."""
    cases = ROW_CASES[5:] if not slow(backend) else ROW_CASES[12:]
    of = Stepper(cases, SETTINGS[0], "none", dtype, torch.float32, device=device)
    of.rule, before = rule, [p.clone() for p in of.params]
    n = sum(of.segments)
    alphas = torch.tensor([0.0, 1.0, 0.37, 0.9], dtype=torch.float64, device=device).repeat(n)[:n]
    given, measures = alphas.clone(), torch.zeros(n, 4, dtype=torch.float64, device=device)
    hyper = torch.tensor([[float(c == "anchored") for c in STILL.hyper]], dtype=torch.float64, device="cpu")
    ops.prepare(backend, STILL, of.params, of.anchors, [], [], measures, alphas, hyper, [len(cases)], [rule], [])([])
    assert torch.equal(alphas, given)
    assert torch.equal(measures[:, 3], (given != 1).double())
    first = 0
    for case, p, p0, a, k in zip(cases, of.params, before, of.anchors, of.segments, strict=True):
        alpha = given[first : first + k].reshape([-1, *[1] * (p.dim() - 1)] if p.dim() else [])
        want = torch.where(alpha == 1, p0.double(), a.double() + alpha * (p0.double() - a.double()))
        slack = torch.finfo(dtype).eps * want.abs() + 1e-6
        assert ((p.double() - want).abs() <= slack).all(), case.name
        assert torch.equal(torch.where(alpha == 1, p, 0), torch.where(alpha == 1, p0, 0)), case.name
        assert torch.equal(torch.where(alpha == 0, p, 0), torch.where(alpha == 0, a.to(dtype), 0)), case.name
        first += k


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["project", "project_mars", "project_rows"])
def test_projection_without_a_step(backend, device, rule, dtype):
    """The base "still": within the radius of each tensor, from the table or where a tensor on the device holds it."""
    cases = ROW_CASES[5:] if not slow(backend) else ROW_CASES[12:]
    of = Stepper(cases, SETTINGS[0], "none", dtype, torch.float32, device=device)
    of.rule, before = rule, [p.clone() for p in of.params]
    segments, wanted, inside, radii = sum(of.segments), [], [], []
    for k, (p, a) in enumerate(zip(before, of.anchors, strict=True)):
        c = p.double() - a.double()
        rows = reference.segments(c, "project_rows").abs().sum(1)
        n = {"project": c.square().sum().sqrt(), "project_mars": max(rows, default=c.sum()), "project_rows": rows}[rule]
        radii.append(float(n.sum()) / max(n.numel(), 1) * (0.0, 0.6, 1.01)[k % 3])
        alpha = (radii[-1] / n).clamp(max=1)
        by_row = rule == "project_rows" and p.dim() > 0
        alpha = alpha.reshape([-1, *[1] * (p.dim() - 1)] if by_row else [])
        wanted.append(torch.where(alpha == 1, p.double(), a.double() + alpha * c))
        inside.append(alpha == 1)
    hyper = torch.zeros(len(cases), len(STILL.hyper), dtype=torch.float64)
    hyper[:, STILL.hyper.index("anchored")] = 1
    column = STILL.hyper.index("radius")
    live = {}
    if ops.keeps_addresses(backend):
        held = torch.tensor(radii, dtype=torch.float64, device=device)
        live["live"] = {k * len(STILL.hyper) + column: radius for k, radius in enumerate(held.unbind())}
    else:
        hyper[:, column] = torch.tensor(radii, dtype=torch.float64)
    measures = torch.zeros(segments, 4, dtype=torch.float64, device=device)
    alphas = torch.ones(segments, dtype=torch.float64, device=device)
    n = len(cases)
    ops.prepare(
        backend, STILL, of.params, of.anchors, [], [], measures, alphas, hyper, [1] * n, [rule] * n, [], **live
    )([])
    of_sums = 64 * torch.finfo(arithmetic_of(dtype)).eps  # a lane adds 64 elements of a block
    for case, p, p0, a, want, kept in zip(cases, of.params, before, of.anchors, wanted, inside, strict=True):
        slack = torch.finfo(dtype).eps * want.abs() + of_sums * (want.abs() + a.double().abs())
        assert ((p.double() - want).abs() <= slack).all(), case.name
        assert torch.equal(torch.where(kept, p, 0), torch.where(kept, p0, 0)), case.name


@pytest.mark.parametrize("settings", SETTINGS[:1] + SETTINGS[-1:], ids=lambda s: s.name)
def test_mixed_dtypes_in_one_call(backend, settings):
    """A gradient dtype other than the parameter's, and all parameter dtypes side by side."""
    steppers = [settled(CASES, settings, "spd", dtype) for dtype in DTYPES]
    grads = [s.grads(torch.float32) for s in steppers]
    want = [s.clone() for s in steppers]
    for s, g in zip(want, grads, strict=True):
        s.run(prepare_of(backend, settings), g)
    joined = [
        sum(lists, [])
        for lists in zip(*([s.params, s.anchors, *s.states.values(), s.steps] for s in steppers), strict=True)
    ]
    n = len(joined[0])
    measures, alphas = torch.zeros(n, 4, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    hyper, rules = steppers[0].args()[-4].repeat(len(DTYPES), 1), ["spd"] * len(DTYPES)
    seeds = sum((s.args()[-1] for s in steppers), [])
    prepare_of(backend, settings)(*joined, measures, alphas, hyper, [len(CASES)] * len(DTYPES), rules, seeds)(
        sum(grads, [])
    )
    assert torch.equal(measures[:, :3], torch.cat([s.measures for s in want])[:, :3])
    assert torch.equal(alphas, torch.cat([s.alphas for s in want]))
    for got, one in zip(steppers, want, strict=True):
        assert all(map(torch.equal, got.params, one.params))


@pytest.mark.parametrize("settings", [s for s in SETTINGS if s.hyper.get("momentum") != 0], ids=lambda s: s.name)
def test_300_at_once_equal_300_single_calls(backend, settings):
    generator = torch.Generator("cpu").manual_seed(3)
    sizes = torch.randint(1, 3000, (297,), generator=generator, device="cpu").tolist() + [
        3 * CHUNK,
        2 * CHUNK + 1,
        CHUNK,
    ]
    cases = tuple(Case(str(n), (n,)) for n in sizes)
    together = settled(cases, settings, "spd", torch.float32)
    grads, alone = together.grads(), together.clone()
    together.run(prepare_of(backend, settings), grads)
    assert (together.alphas < 1).any()
    assert (together.alphas == 1).any()
    anchors, *states, steps, measures, alphas, hyper, _, rules, seeds = alone.args()
    for i in range(len(cases)):
        lists = ([x[i]] if x else [] for x in (anchors, *states, steps))
        prepare_of(backend, settings)(
            [alone.params[i]], *lists, measures[i : i + 1], alphas[i : i + 1], hyper, [1], rules, seeds[i : i + 1]
        )([grads[i]])
    assert_bits(alone, together)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_threads(backend, dtype):
    cases = (*CASES, Case("large", (40 * CHUNK + 7,)))
    start = settled(cases, SETTINGS[1], "spd", dtype)
    grads, results = start.grads(), []
    for threads in (1, 2, 3, 8, 2):
        torch.set_num_threads(threads)
        got = start.clone()
        got.run(prepare_of(backend, SETTINGS[1]), grads)
        results.append(got)
    if backend == "reference":  # torch's own sums split by thread; it only has to repeat itself
        results = [results[1], results[4]]
    for other in results[1:]:
        assert_bits(other, results[0])


@native
def test_bits_do_not_depend_on_the_instruction_set():
    """Runs what this processor has; each instruction set in a process of its own."""
    program = """
import hashlib
import torch
from robustft_kernels import _native, ops
from robustft_kernels.testing import CASES, DTYPES, SETTINGS, Stepper
digest = hashlib.sha256()
for settings in SETTINGS:
    for dtype in DTYPES:
        s = Stepper(CASES, settings, "spd", dtype)
        for _ in range(3):
            s.run(ops.PREPARE["native"][settings.base.name], s.grads())
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
    before = settled(CASES, settings, "spd", torch.float32)
    grads = before.grads()
    want = before.clone()
    want.run_oracle(grads)
    for wrong in ("keep", "l2sp"):
        got = before.clone()
        got.rule = wrong
        got.run(prepare_of(backend, settings), grads)
        with pytest.raises(AssertionError):
            assert_same_step(got, want, before, grads)
    stronger = before.clone()
    stronger.settings = type(settings)("", settings.base, {**settings.hyper, "strength": 1.31})
    stronger.run(prepare_of(backend, settings), grads)
    with pytest.raises(AssertionError):
        assert_same_step(stronger, want, before, grads)


@pytest.mark.parametrize("method", ["spd", "l2sp"])
def test_alpha_is_capped_at_the_anchor(backend, method):
    """Where strength·r, or strength·lr, exceeds 1 the weights land on θ₀ and not beyond it."""
    settings = SETTINGS[0]
    got = settled(CASES, settings, method, torch.float32)
    got.settings = type(settings)("", settings.base, {**settings.hyper, "strength": 1e9})
    got.run(prepare_of(backend, settings), got.grads())
    assert ((got.alphas == 0) | (got.alphas == 1)).all()
    assert (got.alphas == 0).sum() > 3
    for alpha, param, anchor in zip(got.alphas, got.params, got.anchors, strict=True):
        if alpha == 0:
            assert torch.equal(param, anchor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_storage_rounds_as_torch_does(backend, dtype):
    """Every 16-bit value survives being widened and narrowed; floats of every exponent, the midpoints between two
    neighbours and their neighbours round to nearest, ties to even."""
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
    kept.settings = type(settings)("", settings.base, {**settings.hyper, "lr": 0.0})
    kept.run(prepare_of(backend, settings), [torch.zeros_like(every)])
    assert torch.equal(kept.params[0], every)

    pulled = Stepper((Case("floats", tuple(floats.shape)),), settings, "l2sp", dtype, torch.float32)
    pulled.params, pulled.anchors = [torch.zeros_like(floats, dtype=dtype)], [floats]
    pulled.settings = type(settings)("", settings.base, {**settings.hyper, "strength": 1e9})  # onto the anchor
    pulled.run(prepare_of(backend, settings), [torch.zeros_like(floats, dtype=dtype)])
    assert torch.equal(pulled.params[0], floats.to(dtype))


def test_first_step_never_fires(backend):
    settings = SETTINGS[0]
    got = Stepper(CASES, settings, "spd", torch.float32)
    got.anchors = [case.lay(p) for case, p in zip(CASES, got.params, strict=True)]
    got.run(prepare_of(backend, settings), got.grads())
    assert (got.alphas == 1).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("settings", SETTINGS[:1] + SETTINGS[4:5], ids=lambda s: s.name)
def test_non_finite_gradient(backend, settings, bad):
    """The base step takes it as torch.optim does; no pull, no trace in the anchor or in other tensors."""
    got = settled(CASES, settings, "spd", torch.float32)
    grads = got.grads()
    k = next(i for i, case in enumerate(CASES) if case.name == "several chunks")
    grads[k].view(-1)[CHUNK + 1] = bad
    before, want = got.clone(), got.clone()
    got.run(prepare_of(backend, settings), grads)
    want.run_oracle(grads)
    assert got.alphas[k] == 1
    assert torch.equal(got.params[k].isfinite(), want.params[k].isfinite())
    assert int((~got.params[k].isfinite()).sum()) == 1
    finite = got.params[k].isfinite()
    assert torch.allclose(got.params[k][finite], want.params[k][finite])
    assert all(map(torch.equal, got.anchors, before.anchors))
    assert all(p.isfinite().all() for i, p in enumerate(got.params) if i != k)


def test_an_infinite_weight_stays_alone(backend):
    """Pulled toward zero it is still infinite, as α·inf is, and nothing else is touched by it."""
    settings = SETTINGS[0]
    got = settled(CASES, settings, "l2sp", torch.float32, anchored=False)
    k = next(i for i, case in enumerate(CASES) if case.name == "several chunks")
    got.params[k].view(-1)[CHUNK + 1] = torch.inf
    grads = got.grads()
    grads[k].view(-1)[CHUNK + 1] = 1.0
    want = got.clone()
    want.run_oracle(grads)
    got.run(prepare_of(backend, settings), grads)
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
