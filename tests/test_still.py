"""Halves of a step: the base "still", which measures or pulls alone, and two halves against one whole."""

import pytest
import torch

from robustft_kernels import ops, reference
from robustft_kernels.bases import STILL, arithmetic_of
from robustft_kernels.decide import decide
from robustft_kernels.methods import RULES, rule_of
from robustft_kernels.testing import DTYPES, ROW_CASES, SETTINGS, Stepper

from .table import METHOD_NORMS
from .test_steps import prepare_of, settled, slow


@pytest.mark.lean(keep=lambda dtype, anchored, **_: dtype == (torch.bfloat16 if anchored else torch.float32))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("rule", ["observe", "observe_rows"])
def test_measures_without_a_step(backend, device, rule, anchored, dtype):
    """The base "still": ⟨g,c⟩ and the size of c, of the whole or of rows, with gradients and without; nothing moves."""
    cases = ROW_CASES[5:] if not slow(backend) else ROW_CASES[12:]
    of = Stepper(cases, SETTINGS[0], "none", dtype, anchored, device=device)
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


HALVED = [(method, norm) for method, norm in METHOD_NORMS if RULES[rule_of(method, norm)].elsewhere]


HALVED_SETTINGS = [s for s in SETTINGS if s.stochastic or s.hyper["master_weights"]] + [SETTINGS[0]]


@pytest.mark.lean(
    keep=lambda method, norm, settings, **_: (
        HALVED_SETTINGS[HALVED.index((method, norm)) % len(HALVED_SETTINGS)] is settings
    )
)
@pytest.mark.parametrize("settings", HALVED_SETTINGS, ids=lambda s: s.name)
@pytest.mark.parametrize(("method", "norm"), HALVED)
def test_two_halves_are_a_whole(backend, device, settings, method, norm):
    """Step and measure, decide in torch, pull as told: the bits of one step, wherever α is; FTP with the radius that
    the whole step learned."""
    cases = ROW_CASES[5:] if not slow(backend) else ROW_CASES[20:24]
    first = "reference" if slow(backend) else backend
    whole = settled(cases, settings, method, torch.bfloat16, first, norm=norm, device=device)
    half, grads = whole.clone(), whole.grads()
    whole.run(prepare_of(backend, settings), grads)

    rule, hyper = whole.rule, {**settings.hyper, "anchored": 1.0}
    half.rule, radius_states = RULES[rule].elsewhere, half.states["radius_state"]
    half.states["radius_state"] = []
    half.run(prepare_of(backend, settings), grads)
    radius = hyper["radius"]
    if radius_states:
        assert all(map(torch.equal, half.states["delta"], whole.states["delta"]))
        learned = [s[0] for s in whole.states["radius_state"]]
        radius = torch.stack(learned).repeat_interleave(torch.tensor(half.segments, device=device))
    alphas = decide(rule, half.measures, half.segments, hyper["strength"], radius)
    assert torch.equal(half.measures[:, :3], whole.measures[:, :3])
    torch.testing.assert_close(alphas, whole.alphas, rtol=1e-12, atol=1e-12)
    row = torch.tensor([[hyper.get(c, 0.0) for c in STILL.hyper]], dtype=torch.float64, device="cpu")
    steps = half.steps if settings.stochastic else []
    given = whole.alphas.clone()
    ops.prepare(
        backend, STILL, half.params, half.anchors, half.states["master"], steps, torch.zeros_like(half.measures), given,
        row, [len(cases)], ["given_rows" if RULES[rule].by_rows else "given"], half.args()[-1],
    )([])  # fmt: skip
    for name in ("params", "steps"):
        assert all(map(torch.equal, getattr(half, name), getattr(whole, name))), name
    assert all(map(torch.equal, half.states["master"], whole.states["master"]))
