"""The torch.optim side: equality with torch, plans, groups, anchors, bad input."""

import copy
import pickle

import pytest
import torch
from torch import nn

import robustft_kernels as rft
from robustft_kernels.optim import anchored

SHAPES = [(), (3,), (5, 7), (300, 130), (40000,), (8, 4, 3, 3)]


def make(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def give_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def run(optimizer, params, steps=5, start=0):
    for t in range(start, start + steps):
        give_grads(params, 100 + t)
        optimizer.step()


TWINS = [
    (rft.AnchoredAdamW, torch.optim.AdamW, dict(lr=1e-2, weight_decay=0.1)),
    (
        rft.AnchoredAdamW,
        torch.optim.AdamW,
        dict(lr=torch.tensor(1e-2, dtype=torch.float64), betas=(0.8, 0.95), weight_decay=0.3),
    ),
    (rft.AnchoredAdamW, torch.optim.AdamW, dict(lr=1e-2, amsgrad=True, maximize=True, weight_decay=0.0, eps=1e-5)),
    (rft.AnchoredAdamW, torch.optim.Adam, dict(lr=1e-2)),
    (rft.AnchoredSGD, torch.optim.SGD, dict(lr=1e-2)),
    (rft.AnchoredSGD, torch.optim.SGD, dict(lr=1e-2, momentum=0.9, weight_decay=0.1)),
    (rft.AnchoredSGD, torch.optim.SGD, dict(lr=1e-2, momentum=0.9, dampening=0.3, maximize=True)),
    (rft.AnchoredSGD, torch.optim.SGD, dict(lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("ours", "theirs", "kwargs"), TWINS)
def test_none_equals_torch(backend, ours, theirs, kwargs, dtype):
    mine, other = make(dtype=dtype), make(dtype=dtype)
    run(ours(mine, backend=backend, **kwargs), mine)
    run(theirs(other, foreach=False, **kwargs), other)
    eps = torch.finfo(dtype).eps
    for a, b in zip(mine, other, strict=True):
        # five steps of a dozen roundings of operands about 1; updates of 1e-2 amplify a moment's rounding little
        assert (a - b).abs().max() <= 5 * 4 * eps * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.0, 0.0)])
def test_without_decay_moments_are_torchs(backend, betas):
    """Each gradient is a million times smaller than the one before."""
    mine, other, options = make(), make(), dict(lr=1e-2, betas=betas, weight_decay=0.0)
    optimizer, plain = rft.AnchoredAdamW(mine, backend=backend, **options), torch.optim.AdamW(other, **options)
    for t in range(3):
        give_grads(mine, t)
        for p, q in zip(mine, other, strict=True):
            p.grad *= 10.0 ** (6 - 6 * t)
            q.grad = p.grad.clone()
        optimizer.step()
        plain.step()
        for p, q in zip(mine, other, strict=True):
            a, b = optimizer.state[p], plain.state[q]
            assert torch.equal(a["exp_avg"], b["exp_avg"])
            torch.testing.assert_close(a["exp_avg_sq"], b["exp_avg_sq"], rtol=1e-6, atol=0)
            assert (p - q).abs().max() <= 3 * 4 * torch.finfo(p.dtype).eps * q.abs().max().clamp(min=1)


def test_groups_mix_methods_in_one_launch(backend):
    params = make()
    start = [p.detach().clone() for p in params]
    groups = [
        {"params": params[:2], "method": "none", "lr": 1e-3},
        {"params": params[2:4], "method": "spd", "strength": 2.0},
        {"params": params[4:5], "method": "l2sp", "strength": 5.0},
        {"params": params[5:], "method": "spd", "anchor": "zero", "amsgrad": True},
    ]
    optimizer = rft.AnchoredAdamW(groups, lr=1e-2, backend=backend)
    run(optimizer, params)
    (launch,) = optimizer._plans.current.launches
    assert len(launch.params) == len(params)
    for group, first in zip(groups, (0, 2, 4, 5), strict=True):  # each group alone gives the same bits
        alone = [nn.Parameter(start[i].clone()) for i in range(first, first + len(group["params"]))]
        single = rft.AnchoredAdamW([{**group, "params": alone}], lr=1e-2, backend=backend)
        for t in range(5):
            give_grads(params, 100 + t)
            for p, i in zip(alone, range(first, len(params)), strict=False):
                p.grad = params[i].grad
            single.step()
        assert all(torch.equal(p, params[first + k]) for k, p in enumerate(alone))
    assert ["anchor" in optimizer.state[p] for p in params] == [False, False, True, True, True, False]


@pytest.mark.parametrize("cls", [rft.AdamSPD, rft.AdamL2SP, rft.SGDSPD])
def test_named_optimizers_are_their_method(cls, backend):
    mine, other = make(), make()
    base = rft.AnchoredSGD if cls is rft.SGDSPD else rft.AnchoredAdamW
    method = "l2sp" if cls is rft.AdamL2SP else "spd"
    run(cls(mine, 1e-2, strength=1.5, backend=backend), mine)
    run(base(other, 1e-2, method=method, strength=1.5, backend=backend), other)
    assert all(map(torch.equal, mine, other))
    plain = make()
    run(base(plain, 1e-2, backend=backend), plain)
    if cls is not rft.SGDSPD:  # without momentum it never moves away against its gradient
        assert not all(map(torch.equal, mine, plain))


@pytest.mark.filterwarnings("ignore:robustft_kernels. step.. changes nothing")
def test_late_and_missing_gradients(backend):
    """Each parameter's trajectory depends on its own gradients alone."""
    together = make()
    optimizer = rft.AdamSPD(together, lr=1e-2, backend=backend)
    present = [(0, 1, 2, 3, 4), (0, 1, 2), (), (1, 2, 3, 4, 5), (5,), (0, 1, 2, 3, 4, 5)]
    for t, which in enumerate(present):
        give_grads(together, t)
        for i, p in enumerate(together):
            if i not in which:
                p.grad = None
        optimizer.step()
    for i, start in enumerate(make()):
        alone = rft.AdamSPD([start], lr=1e-2, backend=backend)
        for t, which in enumerate(present):
            grads = make()
            give_grads(grads, t)
            start.grad = grads[i].grad if i in which else None
            alone.step()
        assert torch.equal(start, together[i]), i
        assert optimizer.state[together[i]]["step"] == sum(i in which for which in present)


def test_plan_is_built_once_and_again_when_it_must_be(backend, monkeypatch):
    built = []

    class Counting(anchored.Plan):
        def __init__(self, *args):
            built.append(1)
            super().__init__(*args)

    monkeypatch.setattr(anchored, "Plan", Counting)
    params = make()
    optimizer = rft.AdamSPD(params, lr=1e-2, backend=backend)

    def builds(change=lambda: None):
        give_grads(params, 0)
        change()
        before = len(built)
        optimizer.step()
        return len(built) - before

    other = torch.randn(130, 300).t()
    assert builds() == 1
    assert builds() == 0
    assert builds(lambda: optimizer.param_groups[0].update(lr=1e-3, strength=2.0)) == 0
    assert builds(lambda: setattr(params[0], "grad", None)) == 1
    assert builds() == 0
    assert builds(lambda: setattr(params[0], "grad", None)) == 0  # sets of gradients that take turns
    assert builds(lambda: setattr(params[3], "grad", other)) == 1
    assert builds() == 0
    if backend != "triton":
        assert builds(lambda: optimizer.param_groups[0].update(lr=torch.tensor(1e-3))) == 0
    assert builds(lambda: setattr(params[3], "data", params[3].data.t().contiguous().t())) == 1
    assert builds(lambda: optimizer.state[params[2]].update(anchor=torch.zeros(5, 7))) == 1
    assert builds(lambda: optimizer.state[params[2]].update(exp_avg=torch.zeros(5, 7))) == 1
    assert builds(lambda: optimizer.param_groups[0].update(method="l2sp")) == 1
    assert builds(lambda: optimizer.load_state_dict(optimizer.state_dict())) == 1
    assert builds() == 0


def test_strided_parameters_and_gradients(backend):
    """Layout changes nothing but the order in memory. A gradient of other strides is brought to its parameter's."""
    lays = [
        lambda t: t,
        lambda t: t.clone(memory_format=torch.channels_last),
        lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    ]
    results = []
    for lay_param in lays:
        for lay_grad in lays:
            p = nn.Parameter(lay_param(make([(16, 8, 5, 9)])[0].detach()))
            anchor = lay_grad(p.detach() + 0.1)
            optimizer = rft.AdamSPD([p], lr=1e-2, weight_decay=0.1, anchor=[anchor], backend=backend)
            for t in range(4):
                give_grads([p], t)
                p.grad = lay_grad(p.grad)
                optimizer.step()
            results.append(p.detach().clone())
    for other in results[1:]:  # sums run in memory order, so α may differ in its last bits
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-6)


BAD = [
    (dict(lr=-1.0), "lr must be finite and at least 0"),
    (dict(lr=float("nan")), "lr must be finite"),
    (dict(lr=torch.zeros(2)), "lr must be one number"),
    (dict(betas=(1.0, 0.9)), r"betas\[0\] must be in \[0, 1\)"),
    (dict(betas=(0.9, -0.1)), r"betas\[1\] must be in \[0, 1\)"),
    (dict(betas=(0.9,)), "betas must be two numbers"),
    (dict(eps=-1e-8), "eps must be"),
    (dict(weight_decay=-0.1), "weight_decay must be"),
    (dict(strength=-1.0), "strength must be"),
    (dict(strength=float("inf")), "strength must be"),
    (dict(method="sdp"), "unknown method 'sdp': choose one of 'none', 'spd', 'l2sp'"),
    (dict(backend="gpu"), "unknown backend 'gpu'"),
    (dict(anchor="start"), "unknown anchor 'start'"),
    (dict(anchor=[]), "0 anchors for 1 parameters"),
    (dict(anchor=[torch.zeros(3)]), r"the anchor of parameter 0 .* has shape \(3,\), the parameter \(5, 7\)"),
    (dict(anchor=[torch.zeros(5, 7, dtype=torch.long)]), "is torch.int64; a floating-point tensor"),
    (dict(anchor=[torch.zeros(5, 7, dtype=torch.complex64)]), "is torch.complex64; a floating-point tensor"),
    (dict(anchor=[torch.zeros(5, 7, device="meta")]), "is on meta, the parameter on cpu"),
    (dict(anchor=["theta"]), "is a str, not a tensor"),
    (dict(anchor={"w": torch.zeros(5, 7)}), "needs named parameters"),
]


@pytest.mark.parametrize(("kwargs", "message"), BAD)
def test_bad_arguments(kwargs, message):
    backend_free = {k: v for k, v in kwargs.items() if k != "backend"}
    with pytest.raises((ValueError, TypeError), match=message):
        rft.AdamSPD(make([(5, 7)]), **kwargs)
    if backend_free:  # also refused in a group, and nothing of it stays behind
        optimizer = rft.AdamSPD(make([(3,)]))
        with pytest.raises((ValueError, TypeError), match=message):
            optimizer.add_param_group({"params": make([(5, 7)]), **backend_free})
        assert len(optimizer.param_groups) == 1


def test_more_bad_input():
    w = make([(5, 7)])[0]
    with pytest.raises(ValueError, match="empty parameter list"):
        rft.AdamSPD([])
    with pytest.raises(ValueError, match="shares its memory with a parameter"):
        rft.AdamSPD([w], anchor=[w])
    with pytest.raises(ValueError, match="the same parameter twice"), pytest.warns(UserWarning, match="duplicate"):
        rft.AdamSPD([w, w])
    with pytest.raises(ValueError, match="both 'anchor' and 'pre'"):
        rft.AdamSPD([{"params": [w], "pre": None, "anchor": "zero"}])
    with pytest.raises(ValueError, match="backend is chosen for the whole optimizer"):
        rft.AdamSPD([{"params": [w], "backend": "native"}])
    with pytest.raises(ValueError, match=r"parameter 'z' is torch\.complex64"):
        rft.AdamSPD([("z", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))])
    with pytest.raises(ValueError, match="nesterov needs a momentum"):
        rft.SGDSPD([w], nesterov=True)
    with pytest.raises(ValueError, match=r"the anchor mapping lacks 'b'"):
        rft.AdamSPD([{"params": [("a", w), ("b", make([(2,)])[0])], "anchor": {"a": torch.zeros(5, 7)}}])


def test_bad_gradients_change_nothing(backend):
    good, bad = make([(5, 7), (5, 7)])
    optimizer = rft.AdamSPD([("good", good), ("bad", bad)], backend=backend)
    start = [good.detach().clone(), bad.detach().clone()]
    good.grad = torch.ones(5, 7)
    bad.grad = torch.ones(5, 7).to_sparse()
    with pytest.raises(RuntimeError, match="parameter 'bad' has a sparse gradient"):
        optimizer.step()
    assert torch.equal(good, start[0])
    assert torch.equal(bad, start[1])
    bad.grad = torch.ones(5, 7)
    optimizer.step()
    optimizer.param_groups[0]["method"] = "tpgm?"
    with pytest.raises(ValueError, match=r"unknown method 'tpgm\?'"):
        optimizer.step()


def test_overlapping_parameter_is_refused(backend):
    p = nn.Parameter(torch.zeros(3).expand(4, 3))
    optimizer = rft.AnchoredAdamW([("tied", p)], backend=backend)
    p.grad = torch.ones(4, 3)
    with pytest.raises(RuntimeError, match="parameter 'tied' has overlapping or gapped memory"):
        optimizer.step()


def test_method_that_lacks_its_anchor(backend):
    params = make([(5, 7)])
    optimizer = rft.AnchoredAdamW(zip(["w"], params, strict=True), backend=backend)
    run(optimizer, params, 1)
    optimizer.param_groups[0]["method"] = "spd"
    with pytest.raises(ValueError, match="parameter 'w' has no anchor for method 'spd'"):
        run(optimizer, params, 1)


def test_users_groups_are_left_as_given():
    params = make([(5, 7)])
    groups = [{"params": params, "pre": [torch.zeros(5, 7)]}]
    for _ in range(2):
        rft.AdamSPD(groups)
    assert set(groups[0]) == {"params", "pre"}


def test_closure_scheduler_and_hooks(backend):
    params = make([(5, 7)])
    optimizer = rft.AdamSPD(params, lr=1e-2, backend=backend)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure():
        optimizer.zero_grad()
        loss = (params[0] ** 2).sum()
        loss.backward()
        return loss

    losses = []
    for _ in range(4):
        losses.append(float(optimizer.step(closure).detach()))
        scheduler.step()
    assert losses == sorted(losses, reverse=True)
    assert calls == ["pre", "post"] * 4
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_momentum_that_comes_late(backend):
    """A schedule raises momentum from 0. The buffer starts with its first gradient, as in torch."""
    mine, other = make(), make()
    ours = rft.AnchoredSGD(mine, lr=1e-2, backend=backend)
    theirs = torch.optim.SGD(other, lr=1e-2, foreach=False)
    for t in range(4):
        for optimizer, params in ((ours, mine), (theirs, other)):
            optimizer.param_groups[0]["momentum"] = 0.9 if t >= 2 else 0.0
            run(optimizer, params, 1, start=t)
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_momentum_that_comes_late_where_steps_are_counted(backend):
    """The buffer's steps count. Its first gradient is not dampened, however many steps were rounded before."""
    params = make(dtype=torch.bfloat16)
    optimizer = rft.AnchoredSGD(params, lr=1e-2, dampening=0.5, stochastic_rounding=True, backend=backend)
    run(optimizer, params, 2)
    optimizer.param_groups[0]["momentum"] = 0.9
    run(optimizer, params, 1, start=2)
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], p.grad.float()) for p in params)


def test_the_default_device_is_left_alone(backend):
    """We make nothing there. The numbers of a step are the same under another default."""
    results = []
    for default in ("cpu", "meta"):
        params = make()
        grads = [torch.full_like(p, 0.1) for p in params]
        with torch.device(default):
            optimizer = rft.AnchoredAdamW(params, lr=1e-2, method="spd", stochastic_rounding=True, backend=backend)
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.step()
        results.append(params)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_live_on_their_own(backend, duplicate):
    params = make()
    optimizer = rft.AdamSPD(params, lr=1e-2, backend=backend, save_anchors=False)
    run(optimizer, params, 2)
    twin = duplicate(optimizer)
    theirs = twin.param_groups[0]["params"]
    run(optimizer, params, 3, start=2)
    assert not torch.equal(theirs[3], params[3])
    run(twin, theirs, 3, start=2)
    assert all(map(torch.equal, theirs, params))
    assert (twin.backend, twin.save_anchors) == (backend, False)


def test_model_moved_to_another_dtype_layout_after_construction(backend):
    """`model.to(...)` keeps the parameters and swaps their memory: state and anchors follow."""
    model = nn.Conv2d(4, 6, 3)
    optimizer = rft.AdamSPD(model.parameters(), lr=1e-2, backend=backend)
    model.to(memory_format=torch.channels_last)
    model.double()
    params = list(model.parameters())
    run(optimizer, params, 3)
    assert all(p.isfinite().all() and p.dtype == torch.float64 for p in params)
