"""Sweeps that make no step, but only measure or only pull. And two halves against one whole."""

from dataclasses import replace

import pytest
import torch

from robustft_kernels.backends import reference, registry
from robustft_kernels.core.bases import NO_STEP, arithmetic_of
from robustft_kernels.core.methods import MEASURES, METHOD_HYPER, RULES, rule_of
from robustft_kernels.step.decide import decide, expanded, fold
from robustft_kernels.step.no_step import NoStep, observed, pulled
from robustft_kernels.testing import DTYPES, ROW_CASES, SETTINGS, Stepper

from .table import METHOD_NORMS
from .test_steps import settled, slow


def tensors_of(stepper, rule):
    """A stepper's tensors under a rule, as a sweep that makes no step takes them."""
    tensors = [stepper.tensor(i).under(RULES[rule], NO_STEP) for i in range(len(stepper.params))]
    return [replace(of, spec=replace(of.spec, stochastic_rounding=False)) for of in tensors]


def hyper_rows(n=1, **values):
    """Rows of hyper-parameters for such a sweep, all alike."""
    row = [[float(values.get(column, 0)) for column in NO_STEP.hyper]] * n
    return torch.tensor(row, dtype=torch.float64, device="cpu")


@pytest.mark.lean(keep=lambda dtype, anchored, **_: dtype == (torch.bfloat16 if anchored else torch.float32))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("rule", ["observe", "observe_rows"])
def test_measures_without_a_step(backend, device, rule, anchored, dtype):
    """⟨g,c⟩ and the size of c, of the whole or of rows, with gradients and without. Nothing moves."""
    cases = ROW_CASES[5:] if not slow(backend) else ROW_CASES[12:]
    of = Stepper(cases, SETTINGS[0], "none", dtype, anchored, device=device)
    of.rule = RULES[rule]
    grads, untouched = of.grads(), [p.clone() for p in of.params]
    eps = torch.finfo(arithmetic_of(dtype)).eps
    for given in (grads, []):
        sweep = NoStep(registry.BACKENDS[backend], tensors_of(of, rule), hyper_rows(anchored=of.anchored))
        sweep(given)
        first = 0
        for case, p, a, g, n in zip(cases, of.params, of.anchors, grads, of.segments, strict=True):
            c = p.double() - (a.double() if of.anchored else 0)
            size = c.abs() if rule == "observe_rows" else c * c
            found = sweep.results[first : first + n].T
            for name, got, exact in (("dot", found[0], g.double() * c), ("size", found[1], size)):
                if name == "dot" and not given:
                    assert got.isnan().all(), case.name
                    continue
                want, slack = (reference.segments(x, of.rule).sum(1) for x in (exact, 32 * eps * exact.abs()))
                assert ((got - want).abs() <= slack).all(), (case.name, name)
            first += n
        assert (sweep.results[:, 2 : len(MEASURES) + 1] == 0).all()
    assert all(map(torch.equal, of.params, untouched))


@pytest.mark.lean(keep=lambda dtype, rule, **_: dtype == (torch.bfloat16 if rule == "given_rows" else torch.float32))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["given", "given_rows"])
def test_pull_by_given_alphas(backend, device, rule, dtype):
    """At α = 0 it gives θ₀, whatever θ is. At α = 1 nothing is touched. In between it gives what the formula says."""
    cases = ROW_CASES[5:] if not slow(backend) else ROW_CASES[12:]
    of = Stepper(cases, SETTINGS[0], "none", dtype, torch.float32, device=device)
    of.rule, before = RULES[rule], [p.clone() for p in of.params]
    n = sum(of.segments)
    alphas = torch.tensor([0.0, 1.0, 0.37, 0.9], dtype=torch.float64, device=device).repeat(n)[:n]
    given = alphas.clone()
    sweep = NoStep(registry.BACKENDS[backend], tensors_of(of, rule), hyper_rows(anchored=1), alphas=alphas)
    sweep()
    assert torch.equal(alphas, given)
    assert torch.equal(sweep.results[:, len(MEASURES)], (given != 1).double())
    first = 0
    for case, p, p0, a, k in zip(cases, of.params, before, of.anchors, of.segments, strict=True):
        alpha = given[first : first + k].reshape([-1, *[1] * (p.dim() - 1)] if p.dim() else [])
        want = torch.where(alpha == 1, p0.double(), a.double() + alpha * (p0.double() - a.double()))
        slack = torch.finfo(dtype).eps * want.abs() + 1e-6
        assert ((p.double() - want).abs() <= slack).all(), case.name
        assert torch.equal(torch.where(alpha == 1, p, 0), torch.where(alpha == 1, p0, 0)), case.name
        assert torch.equal(torch.where(alpha == 0, p, 0), torch.where(alpha == 0, a.to(dtype), 0)), case.name
        first += k


@pytest.mark.lean(keep=lambda dtype, rule, **_: dtype == torch.bfloat16 or (rule, dtype) == ("project", torch.float32))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["project", "project_mars", "project_rows"])
def test_projection_without_a_step(backend, device, rule, dtype):
    """Each tensor ends within its radius. The table holds the radius, or a tensor on the device does."""
    cases = ROW_CASES[5:] if not slow(backend) else ROW_CASES[12:]
    of = Stepper(cases, SETTINGS[0], "none", dtype, torch.float32, device=device)
    before = [p.clone() for p in of.params]
    wanted, inside, radii = [], [], []
    for k, (p, a) in enumerate(zip(before, of.anchors, strict=True)):
        c = p.double() - a.double()
        rows = reference.segments(c, RULES["project_rows"]).abs().sum(1)
        n = {"project": c.square().sum().sqrt(), "project_mars": max(rows, default=c.sum()), "project_rows": rows}[rule]
        radii.append(float(n.sum()) / max(n.numel(), 1) * (0.0, 0.6, 1.01)[k % 3])
        alpha = (radii[-1] / n).clamp(max=1)
        by_row = rule == "project_rows" and p.dim() > 0
        alpha = alpha.reshape([-1, *[1] * (p.dim() - 1)] if by_row else [])
        wanted.append(torch.where(alpha == 1, p.double(), a.double() + alpha * c))
        inside.append(alpha == 1)
    hyper, live = hyper_rows(len(cases), anchored=1), {}
    column = NO_STEP.hyper.index("radius")
    if registry.BACKENDS[backend].keeps_addresses:
        held = torch.tensor(radii, dtype=torch.float64, device=device)
        live = {k * len(NO_STEP.hyper) + column: radius for k, radius in enumerate(held.unbind())}
    else:
        hyper[:, column] = torch.tensor(radii, dtype=torch.float64)
    tensors = [replace(of, row=k) for k, of in enumerate(tensors_of(of, rule))]
    NoStep(registry.BACKENDS[backend], tensors, hyper, live)()
    of_sums = 64 * torch.finfo(arithmetic_of(dtype)).eps  # a lane adds 64 elements of a block
    for case, p, p0, a, want, kept in zip(cases, of.params, before, of.anchors, wanted, inside, strict=True):
        slack = torch.finfo(dtype).eps * want.abs() + of_sums * (want.abs() + a.double().abs())
        assert ((p.double() - want).abs() <= slack).all(), case.name
        assert torch.equal(torch.where(kept, p, 0), torch.where(kept, p0, 0)), case.name


HALVED = [(method, norm) for method, norm in METHOD_NORMS if rule_of(method, norm).waits]
HALVED_SETTINGS = [s for s in SETTINGS if s.stochastic or s.hyper["master_weights"]] + [SETTINGS[0]]


def halved_lean(method, norm, settings, **_):
    """A method in one norm, each with other settings."""
    own = HALVED_SETTINGS[HALVED.index((method, norm)) % len(HALVED_SETTINGS)] is settings
    return own and (method, norm) in (("spd", "l2"), ("project", "mars"), ("ftp", "mars_rows"))


@pytest.mark.lean(keep=halved_lean)
@pytest.mark.parametrize("settings", HALVED_SETTINGS, ids=lambda s: s.name)
@pytest.mark.parametrize(("method", "norm"), HALVED)
def test_two_halves_are_a_whole(backend, device, settings, method, norm):
    """Step and measure, decide in torch, pull as told. This gives the bits of one step, if α is the same. FTP has the
    radius that the whole step learned."""
    cases = ROW_CASES[5:] if not slow(backend) else ROW_CASES[20:24]
    first = "reference" if slow(backend) else backend
    whole = settled(cases, settings, method, torch.bfloat16, first, norm=norm, device=device)
    half, grads = whole.clone(), whole.grads()
    whole.run(backend, grads)

    rule = whole.rule
    tensors = [half.tensor(i) for i in range(len(cases))]
    table = replace(half.table(), tensors=observed(tensors, settings.base))
    registry.prepare(backend, table)(grads)
    terms = {key: settings.hyper[key] for key in METHOD_HYPER}
    if rule.learns:
        assert all(map(torch.equal, half.states["delta"], whole.states["delta"]))
        learned = torch.stack([numbers[0] for numbers in whole.states[rule.learns]])
        terms["radius"] = expanded(learned, half.segments)
    alphas = decide(rule, half.measures, half.segments, terms)
    assert torch.equal(half.measures, whole.measures)
    torch.testing.assert_close(alphas, whole.alphas, rtol=1e-12, atol=1e-12)
    hyper = hyper_rows(**{**settings.hyper, "anchored": 1})
    NoStep(registry.BACKENDS[backend], pulled(tensors), hyper, alphas=whole.alphas.clone())()
    for name in ("params", "steps"):
        assert all(map(torch.equal, getattr(half, name), getattr(whole, name))), name
    assert all(map(torch.equal, half.states["master"], whole.states["master"]))


def test_counts_are_sent_to_the_device_once(monkeypatch):
    """On a GPU the host would wait for each."""
    values, counts = torch.arange(6, dtype=torch.float64), [3, 0, 3]
    want = fold(values, counts, "sum"), expanded(values[:3], counts)
    monkeypatch.setattr(torch, "tensor", None)
    assert all(map(torch.equal, want, (fold(values, counts, "sum"), expanded(values[:3], list(counts)))))
    assert want[0].tolist() == [3, 0, 12]
