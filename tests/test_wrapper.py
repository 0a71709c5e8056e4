"""Anchored: equal to the fused optimizers, right around a user's own optimizer, and otherwise like the wrapped one."""

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, AdamW

import robustft_kernels as rft
from robustft_kernels.optim.wrapper import Anchored
from robustft_kernels.step.no_step import NoStep
from tests.no_reads import NoReads

SHAPES = [(), (3,), (5, 7), (120, 130), (40000,), (8, 4, 3, 3), (0,), (3, 0)]
# Away from the anchor, or back while the momentum still leads away.
TURNS = (-3.0, -3.0, 0.5, -3.0, 0.5, -3.0, 0.4, 0.5)
each_backend = pytest.mark.parametrize("served_by", [n for n in ("native", "reference") if not rft.backends()[n]])


class Lion(torch.optim.Optimizer):
    """Chen et al., 2023, as a user would write it. how: what else it does to its parameters."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.9), how="in place", **defaults):
        super().__init__(params, dict(lr=lr, betas=betas, **defaults))
        self.how = how

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for k, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                update = group["lr"] * m.lerp(p.grad, 1 - group["betas"][0]).sign()
                m.lerp_(p.grad, 1 - group["betas"][1])
                if self.how == "in place":
                    p.sub_(update)
                else:
                    p.data = p.data - update
                if self.how == "replaced":
                    group["params"][k] = nn.Parameter(p.detach().clone())
                if self.how == "transposed":
                    p.data = p.data.t().contiguous().t()

    def slow(self):
        return "slow"


def make(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, device="cpu").to(dtype)) for s in shapes]


def give_grads(params, t, maximize=False):
    """Gradients do not depend on what the parameters are now. Once these have moved, ⟨g,d⟩ is far from 0."""
    for k, p in enumerate(params):
        fixed, noise = torch.Generator().manual_seed(k), torch.Generator().manual_seed(1000 * t + k)
        away = torch.randn(p.shape, generator=fixed, device="cpu")
        away += 0.1 * torch.randn(p.shape, generator=noise, device="cpu")
        p.grad = (TURNS[t % len(TURNS)] * (-away if maximize else away)).to(p)


def run(optimizer, params, steps=8, start=0, maximize=False):
    for t in range(start, start + steps):
        give_grads(params, t, maximize)
        optimizer.step()
    return params


def far(got, want):
    """The largest difference of a parameter, in units of the last place of its largest weight, if that is over 1."""
    scale = [torch.finfo(w.dtype).eps * max([1.0, *w.detach().abs().flatten().tolist()]) for w in want]
    return max(float((a - b).detach().abs().max()) / s for a, b, s in zip(got, want, scale, strict=True) if a.numel())


TWINS = [
    (AdamW, dict(weight_decay=0.1), dict(strength=1.3)),
    (AdamW, dict(weight_decay=0.0, amsgrad=True, maximize=True), dict(norm="mars_rows")),
    (AdamW, dict(weight_decay=0.0), dict(strength=torch.tensor(2.0), anchor="zero")),
    (SGD, dict(momentum=0.9), dict(strength=1.3)),
    (SGD, dict(momentum=0.9, weight_decay=0.1), dict(strength=0.7, norm="mars_rows")),
    (AdamW, dict(weight_decay=0.0), dict(method="project", radius=0.05)),
    (AdamW, dict(weight_decay=0.1), dict(method="project", radius=0.05, norm="mars")),
    (SGD, dict(), dict(method="project", radius=torch.tensor(0.1), norm="mars_rows")),
    (AdamW, dict(lr=torch.tensor(0.02, dtype=torch.float64), weight_decay=0.0), dict(method="l2sp", strength=3.0)),
]


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("plain", "base", "pull"), TWINS)
def test_equals_the_fused_optimizers(plain, base, pull, dtype, served_by):
    """Up to roundings. The base has a dozen in each step, 4 ulps as in test_optimizers. The pull is strength times the
    difference of two norms that feel the same roundings."""
    base, pull = {"lr": 1e-2, **base}, {"method": "spd", **pull}
    maximize = base.get("maximize", False)
    ours = (rft.AnchoredAdamW if plain is AdamW else rft.AnchoredSGD)(mine := make(dtype), **base, **pull)
    wrapped = Anchored(plain(other := make(dtype), **base), backend=served_by, **pull)
    run(ours, mine, maximize=maximize)
    run(wrapped, other, maximize=maximize)
    allowed = len(TURNS) * 4 * (1 + float(pull.get("strength", 1)))
    assert far(other, mine) <= allowed
    free = make(dtype)
    assert far(run(plain(free, **base), free, maximize=maximize), mine) > 100 * allowed  # it was pulled
    told = wrapped.telemetry()
    for name, of in ours.telemetry().items():
        near = 1e4 * torch.finfo(dtype).eps  # those ulps, for a c that is a hundredth of θ
        assert told[name] == pytest.approx(of, abs=near, rel=near, nan_ok=True), name


def pulled(theta, before, anchor, grad, lr, method, norm="l2", strength=1.0, radius=None):
    """θ₀ + αc, as README and papers have it, row by row."""
    rows = norm != "l2" and theta.dim() > 1
    c, d, g = (x.reshape(len(x) if rows else 1, -1) for x in (theta - anchor, before - anchor, grad))
    size = torch.linalg.vector_norm if norm == "l2" else (lambda x: x.abs().sum())
    if method == "l2sp":
        alpha = [1 - strength * lr for _ in c]
    elif method == "project":
        sizes = [float(size(row)) for row in c]
        alpha = [min(1, radius / n) for n in ([max(sizes)] * len(c) if norm == "mars" else sizes)]
    else:
        fires = [float((up * old).sum()) > 0 for up, old in zip(g, d, strict=True)]
        ratios = [float(1 - size(old) / size(new)) * fire for new, old, fire in zip(c, d, fires, strict=True)]
        alpha = [1 - min(1, strength * max(0, r)) for r in ratios]
    return anchor + (torch.tensor(alpha, dtype=c.dtype).unsqueeze(1) * c).reshape(theta.shape), alpha


@each_backend
@pytest.mark.parametrize(
    "pull",
    [
        dict(method="spd", strength=1.0),
        dict(method="spd", strength=30.0),
        dict(method="spd", norm="mars_rows", strength=1.5),
        dict(method="project", radius=0.02),
        dict(method="project", norm="mars", radius=0.02),
        dict(method="project", norm="mars_rows", radius=0.02),
        dict(method="l2sp", strength=5.0),
    ],
)
def test_around_an_optimizer_of_ones_own(pull, served_by):
    shapes = [s for s in SHAPES if 0 not in s]
    params, plain = make(torch.float64, shapes), make(torch.float64, shapes)
    anchors = [p.detach().clone() for p in plain]
    wrapped, lion = Anchored(Lion(params, lr=1e-3), backend=served_by, **pull), Lion(plain, lr=1e-3)
    alphas = []
    for t in range(len(TURNS)):
        run(wrapped, params, 1, start=t)
        before = [p.detach().clone() for p in plain]
        run(lion, plain, 1, start=t)
        for p, old, anchor in zip(plain, before, anchors, strict=True):
            p.data, alpha = pulled(p.detach(), old, anchor, p.grad, 1e-3, **pull)
            alphas += alpha
        # The pull is strength times a difference of norms, each of which feels some ulps of the weights.
        assert far(params, plain) <= 64 * pull.get("strength", 1)
    assert any(alpha < 1 for alpha in alphas)
    assert pull["method"] == "l2sp" or any(alpha == 1 for alpha in alphas)
    assert pull.get("strength") != 30 or min(alphas) == 0  # the cap


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_parameters(dtype, served_by):
    """The fused form rounds to nearest as often. So the two differ by at most one neighbour more at each step."""
    for anchor in ("initial", [p.detach().float() for p in make(dtype)]):
        mine, other = make(dtype), make(dtype)
        pull = dict(method="project", radius=0.3, norm="mars_rows", anchor=anchor)
        run(rft.AnchoredSGD(mine, lr=1e-2, backend=served_by, **pull), mine)
        run(wrapped := Anchored(SGD(other, lr=1e-2), backend=served_by, **pull), other)
        assert far(other, mine) <= len(TURNS)
        assert wrapped.telemetry()["3"].selections > 1


@each_backend
def test_settings_may_change_between_steps(served_by):
    changes = [
        dict(method="spd", strength=torch.tensor(1.5), radius=torch.tensor(0.1)),
        dict(strength=torch.tensor(0.5), lr=2e-2),
        dict(method="project"),
        dict(radius=torch.tensor(0.08)),
        dict(radius=0.06, norm="mars_rows"),
        dict(method="l2sp", norm=None),
        dict(strength=4.0, lr=torch.tensor(1e-2, dtype=torch.float64)),
        dict(method="spd"),
        dict(strength=1.5, lr=1e-2),
        dict(method="l2sp"),  # the method alone, beside plain numbers
        dict(method="spd"),
    ]
    fused = rft.AdamSPD(mine := make(torch.float64), lr=1e-2, backend=served_by)
    wrapped = Anchored(AdamW(other := make(torch.float64), lr=1e-2, weight_decay=0.0), backend=served_by)
    for t, change in enumerate(changes):
        for optimizer, params in ((fused, mine), (wrapped, other)):
            optimizer.param_groups[0].update(change)
            run(optimizer, params, 1, start=t)
        assert far(other, mine) <= 8 * 4 * 5


def test_closure():
    """SPD measures the gradients that it makes."""
    results = []
    for closed in (False, True):
        params = make()
        wrapped = Anchored(SGD(params, lr=1e-2, momentum=0.9))
        for t in range(len(TURNS)):

            def closure(params=params, t=t):
                assert torch.is_grad_enabled()
                give_grads(params, t)
                return 7.0

            if closed:
                for p in params:
                    p.grad = None
                assert wrapped.step(closure) == 7.0
            else:
                closure()
                wrapped.step()
        results.append(params)
    assert all(map(torch.equal, *results))
    with pytest.raises(RuntimeError, match="Lion did not call its closure"):
        Anchored(Lion(make())).step(lambda: 0.0)


def test_optimizer_that_evaluates_several_times():
    """The first evaluation counts: it is at the weights before the step."""
    p = make(torch.float64, [(5, 7)])[0]
    target, anchor, grads = torch.randn(5, 7, dtype=torch.float64), p.detach() - 1, []
    wrapped = Anchored(LBFGS([p], lr=0.01, max_iter=4), anchor=[anchor])

    def closure():
        wrapped.zero_grad()
        loss = ((p - target) ** 2).sum()
        loss.backward()
        grads.append(p.grad.clone())
        return loss

    before = p.detach().clone()
    wrapped.step(closure)
    assert len(grads) > 1
    measured = wrapped._results[p][0][0]
    assert float(measured[0]) == pytest.approx(float((grads[0] * (before - anchor)).sum()))
    assert float(measured[1]) == pytest.approx(float((before - anchor).square().sum()))


@each_backend
@pytest.mark.filterwarnings("ignore:robustft_kernels. step.. changes nothing")
def test_groups_and_missing_gradients(served_by):
    """Each parameter's trajectory depends on its own gradients and group alone. "none" equals the wrapped one."""
    rows = [
        dict(method="none", lr=1e-3),
        dict(strength=2.0),
        dict(method="l2sp", strength=5.0),
        dict(anchor="zero"),
        dict(method="project", radius=0.05),
        dict(norm="mars_rows", strength=torch.tensor(1.5)),
    ]
    present = [(0, 1, 2, 3, 4, 5), (0, 1, 2), (), (1, 2, 3, 4, 5), (1, 3, 5), (0, 3, 5), (0, 1, 2, 3, 4, 5)]

    def go(which, wrap):
        params = make()[:6]
        groups = [{"params": [params[i]], **rows[i]} for i in which]
        optimizer = AdamW(groups[:-1] or groups, lr=1e-2)
        optimizer = Anchored(optimizer, backend=served_by) if wrap else optimizer
        if len(groups) > 1:
            optimizer.add_param_group(groups[-1])
        for t, there in enumerate(present):
            give_grads(params, t)
            for i, p in enumerate(params):
                if i not in there:
                    p.grad = None
            optimizer.step()
        return [params[i] for i in which]

    together = go(range(6), wrap=True)
    for i, p in enumerate(together):
        assert torch.equal(p, go([i], wrap=True)[0]), rows[i]
        assert torch.equal(p, go([i], wrap=False)[0]) == (i == 0), rows[i]


def test_what_the_wrapped_one_may_do_to_its_parameters(monkeypatch):
    """New memory of the same form is found. Anything else is an error that names the parameter."""
    init, prepared = NoStep.__init__, []
    monkeypatch.setattr(NoStep, "__init__", lambda self, *args: prepared.append(self) or init(self, *args))
    want = run(Anchored(Lion(params := make(), lr=1e-3), strength=1.5), params)
    assert len(prepared) == 3  # before the step, after it, and the pull: once and for all
    wrapped = Anchored(Lion(moved := make(), lr=1e-3, how="moved"), strength=1.5)
    assert all(map(torch.equal, run(wrapped, moved, 1), run(Anchored(Lion(p := make(), lr=1e-3)), p, 1)))
    assert len(prepared) == 3 + 6 + 3
    assert all(map(torch.equal, run(wrapped, moved, 7, start=1), want))
    for how, message in (
        ("replaced", r"replaced parameter 'w' in its step"),
        ("transposed", r"changed the form \(shape, strides, dtype or device\) of parameter 'w'"),
    ):
        w = make(shapes=[(5, 7)])
        with pytest.raises(RuntimeError, match=message):
            run(Anchored(Lion([("w", w[0])], how=how)), w, 1)


def test_model_changed_between_steps():
    """Anchors follow another dtype and layout, and a parameter that takes the place of another. Another shape is an
    error, and so is a group that was not added here. Then no step is made."""
    model = nn.Conv2d(4, 6, 3)
    params = list(model.parameters())
    wrapped = Anchored(SGD(model.named_parameters(), lr=1e-2, momentum=0.9))
    model.double().to(memory_format=torch.channels_last)
    run(wrapped, params, 4)
    assert all(p.isfinite().all() and p.dtype == torch.float64 for p in params)
    params[0].data, kept = torch.ones(6, 4), params[0].detach().clone()
    before = params[1].detach().clone()
    with pytest.raises(RuntimeError, match=r"parameter 'weight' has shape \(6, 4\), its anchor \(6, 4, 3, 3\)"):
        run(wrapped, params, 1)
    params[0].data = kept
    anchor = wrapped.state[params[0]]["anchor"].clone()
    wrapped.param_groups[0]["params"][0] = new = nn.Parameter(kept.clone())
    run(wrapped, [new, params[1]], 1)  # in the place of another of its shape
    assert torch.equal(wrapped.state[new]["anchor"], anchor)
    before = params[1].detach().clone()
    wrapped.optimizer.add_param_group({"params": [("head", params[0])]})
    with pytest.raises(RuntimeError, match=r"add groups with Anchored\.add_param_group"):
        run(wrapped, [new, *params], 1)
    assert torch.equal(params[1], before)


@each_backend
@pytest.mark.parametrize("norm", ["l2", "mars_rows"])
def test_nothing_is_read_by_the_host(norm, served_by):
    params = make()
    wrapped = Anchored(SGD(params, lr=1e-2, momentum=0.9), norm=norm, strength=torch.ones(1), backend=served_by)
    for t in range(4):
        give_grads(params, t)
        with NoReads():
            wrapped.step()
    assert any(of.selections for of in wrapped.telemetry().values())


W = nn.Parameter(torch.zeros(5, 7))
BAD = [
    (dict(method="ftp"), r"'ftp' works within the step, which is not ours here: use AnchoredAdamW or AnchoredSGD"),
    (dict(method="l2sp_coupled"), "use AnchoredAdamW or AnchoredSGD"),
    (dict(method="mars_sp"), "use AnchoredAdamW or AnchoredSGD"),
    (dict(method="digrap"), "use AnchoredAdamW or AnchoredSGD"),
    (dict(method="l2sp_cautious"), "use AnchoredAdamW or AnchoredSGD"),
    (dict(method="sdp"), "unknown method 'sdp'"),
    (dict(norm="mars"), "method 'spd' does not go with norm='mars'"),
    (dict(norm="l3"), "norm='l3'"),
    (dict(gate="shut"), "unknown gate 'shut': choose 'inconsistent' or 'away'"),
    (dict(strength=-1.0), "strength must be finite and at least 0, got -1.0"),
    (dict(strength=float("nan")), "strength must be finite"),
    (dict(strength=torch.ones(2)), r"strength must be one number, got a tensor of shape \(2,\)"),
    (dict(strength=None), "method 'spd' needs strength"),
    (dict(method="project"), "method 'project' needs radius"),
    (dict(method="project", radius=0), "radius must be finite and above 0, got 0"),
    (dict(anchor="start"), "unknown anchor 'start'"),
    (dict(anchor=[torch.zeros(5, 6)]), r"the anchor of parameter 'w' has shape \(5, 6\)"),
    (dict(anchor={"v": torch.zeros(5, 7)}), "the anchor mapping lacks 'w'"),
]


@pytest.mark.parametrize(("kwargs", "message"), BAD)
def test_bad_settings_change_nothing(kwargs, message):
    inner = SGD([("w", W)], lr=0.1)
    keys = set(inner.param_groups[0])
    with pytest.raises(ValueError, match=message):
        Anchored(inner, **kwargs)
    assert set(inner.param_groups[0]) == keys
    with pytest.raises(ValueError, match=message):
        Anchored(SGD([{"params": [("w", W)], **kwargs}]))
    wrapped = Anchored(SGD([("first", nn.Parameter(torch.ones(3)))]))
    with pytest.raises(ValueError, match=message):
        wrapped.add_param_group({"params": [("w", W)], **kwargs})
    assert len(wrapped.param_groups) == 1
    run(wrapped, wrapped.param_groups[0]["params"], 1)


def test_more_bad_input():
    with pytest.raises(TypeError, match=r"wraps a torch\.optim\.Optimizer, not a Linear"):
        Anchored(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="AnchoredSGD has methods and anchors of its own"):
        Anchored(rft.AnchoredSGD([W]))
    with pytest.raises(ValueError, match="Lion has a hyper-parameter 'norm' of its own"):
        Anchored(Lion([W], norm=2))
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        Anchored(SGD([W]), backend="gpu")
    with pytest.raises(ValueError, match="method 'l2sp' needs lr"):
        Anchored(Lion([W], lr=None), "l2sp")
    with pytest.raises(ValueError, match=r"parameter 'z' is torch\.complex64"):
        Anchored(SGD([("z", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))]))
    with pytest.raises(ValueError, match="1 anchors for 2 parameters: a list of anchors is parallel to params"):
        Anchored(SGD([{"params": [W]}, {"params": make(shapes=[(3,)])}]), anchor=[torch.zeros(5, 7)])
    w = nn.Parameter(torch.ones(5, 7))
    wrapped = Anchored(SGD([("w", w)], lr=0.1))
    w.grad = torch.ones(5, 7).to_sparse()
    with pytest.raises(RuntimeError, match=r"parameter 'w' has a torch\.sparse_coo torch\.float32 gradient"):
        wrapped.step()
    w.grad = torch.ones(5, 7)
    wrapped.param_groups[0]["strength"] = -1
    with pytest.raises(ValueError, match="strength must be finite"):
        wrapped.step()
    assert torch.equal(w, torch.ones(5, 7))
