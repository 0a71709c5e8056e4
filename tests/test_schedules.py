"""Schedules of strength and radius, and RecAdam's: values, tensors, resuming, and what is refused."""

import copy
import math

import pytest
import torch
from torch import nn

import robustft_kernels as rft
from tests.test_state import saved_and_loaded

SHAPES = ((17, 9), (40,), (3, 2, 5))


def make(dtype=torch.float32):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]


def grads(params, t):
    """A stream with a direction that turns at each third step, when momentum goes on. SPD then fires."""
    of = torch.Generator().manual_seed(t)
    return [torch.randn(p.shape, generator=of, dtype=p.dtype) + (1 if t % 3 == 2 else -1) for p in params]


def run(optimizer, params, start, stop, scheduler=None):
    for t in range(start, stop):
        for p, grad in zip(params, grads(params, t), strict=True):
            p.grad = grad
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def falling(t):
    return 1 / (1 + t)


def spd(params, **more):
    return rft.AnchoredAdamW(params, lr=1e-2, method="spd", strength=1.5, **more)


def around(params):
    return rft.Anchored(torch.optim.AdamW(params, lr=1e-2), "spd", strength=1.5)


def sgd_within(params):
    return rft.AnchoredSGD(params, lr=1e-2, momentum=0.9, method="project", radius=0.5)


def momentum_within(params):
    return rft.Anchored(torch.optim.SGD(params, lr=1e-2), "project", radius=0.5, norm="mars_rows")


def as_tensors(params):
    return rft.AdamL2SP(params, lr=1e-2, strength=torch.tensor(30.0))


KINDS = [(spd, "strength"), (around, "strength"), (sgd_within, "radius"), (momentum_within, "radius"),
         (as_tensors, "strength")]  # fmt: skip


@pytest.mark.parametrize(("kind", "key"), KINDS)
def test_a_schedule_is_the_values_set_by_hand(kind, key):
    params, others = make(), make()
    optimizer, by_hand = kind(params), kind(others)
    first = float(by_hand.param_groups[0][key])
    before = optimizer.param_groups[0][key]
    scheduler = rft.StrengthScheduler(optimizer, falling, key)
    for t in range(6):
        expected = first * falling(t)
        assert scheduler.last_epoch == t
        assert scheduler.get_last_value() == [expected]
        assert float(optimizer.param_groups[0][key]) == pytest.approx(expected, rel=1e-7)
        by_hand.param_groups[0][key] = copy.deepcopy(optimizer.param_groups[0][key])
        run(optimizer, params, t, t + 1, scheduler)
        run(by_hand, others, t, t + 1)
        assert all(map(torch.equal, params, others)), t
    assert optimizer.param_groups[0][f"initial_{key}"] == first
    assert (optimizer.param_groups[0][key] is before) == isinstance(before, torch.Tensor)
    constant = make()
    run(kind(constant), constant, 0, 6)
    assert not torch.equal(params[0], constant[0]), "the schedule changed nothing"


@pytest.mark.parametrize("order", ["made, then loaded", "loaded, then made", "scheduler first", "last_epoch"])
@pytest.mark.parametrize(("kind", "key"), KINDS)
def test_resuming_gives_the_same_bits(kind, key, order):
    params = make()
    optimizer = kind(params)
    scheduler = rft.StrengthScheduler(optimizer, falling, key)
    run(optimizer, params, 0, 3, scheduler)
    weights = [p.detach().clone() for p in params]
    of_optimizer, of_scheduler = saved_and_loaded([optimizer.state_dict(), scheduler.state_dict()])
    run(optimizer, params, 3, 7, scheduler)

    resumed = make()
    other = kind(resumed)
    for p, weight in zip(resumed, weights, strict=True):
        p.data.copy_(weight)
    if order in ("loaded, then made", "last_epoch"):
        other.load_state_dict(of_optimizer)
    again = rft.StrengthScheduler(other, falling, key, **({"last_epoch": 2} if order == "last_epoch" else {}))
    if order != "last_epoch":
        again.load_state_dict(of_scheduler)
    if order == "made, then loaded":
        other.load_state_dict(of_optimizer)
    if order == "scheduler first":
        assert float(other.param_groups[0][key]) == pytest.approx(scheduler_value(of_scheduler), rel=1e-7)
        other.load_state_dict(of_optimizer)
    assert again.last_epoch == 3
    run(other, resumed, 3, 7, again)
    assert all(map(torch.equal, params, resumed))
    assert again.get_last_value() == scheduler.get_last_value()


def scheduler_value(state):
    return state["last_values"][0]


def groups(*methods):
    return [{"params": [p], "method": method} for p, method in zip(make(), methods, strict=False)]


def test_which_groups_are_driven():
    optimizer = rft.AnchoredAdamW(groups("spd", "none", "l2sp"), lr=1e-2, strength=2.0)
    scheduler = rft.StrengthScheduler(optimizer, falling)
    scheduler.step()
    assert scheduler.get_last_value() == [1.0, None, 1.0]
    assert [group["strength"] for group in optimizer.param_groups] == [1.0, 2.0, 1.0]
    assert "initial_strength" not in optimizer.param_groups[1]
    only = rft.StrengthScheduler(optimizer, [None, None, lambda t: 3.0 + t])
    assert [group["strength"] for group in optimizer.param_groups] == [1.0, 2.0, 6.0]  # of the initial 2
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "method": "spd"})
    with pytest.raises(ValueError, match=r"4 groups, and the scheduler was made for 3; make it anew.*last_epoch=-1"):
        only.step()
    radii = rft.AdamPGM(
        [("a", nn.Parameter(torch.ones(2))), ("b", nn.Parameter(torch.ones(3)))], radius={"a": 1.0, "b": 2.0}
    )
    assert rft.StrengthScheduler(radii, lambda t: 0.5, "radius").get_last_value() == [0.5, 1.0]


REFUSED = [
    (TypeError, "optimizer is a Linear", lambda o: rft.StrengthScheduler(nn.Linear(1, 1), falling)),
    (ValueError, r"AdamW has no methods in its groups; give .* rft\.Anchored",
     lambda o: rft.StrengthScheduler(torch.optim.AdamW(make()), falling)),
    (ValueError, "key must be 'strength' or 'radius', got 'lr'", lambda o: rft.StrengthScheduler(o, falling, "lr")),
    (ValueError, "no group reads radius: the methods are 'spd', 'none'",
     lambda o: rft.StrengthScheduler(o, falling, "radius")),
    (ValueError, "group 1 has the method 'none', which does not read strength; give None",
     lambda o: rft.StrengthScheduler(o, [falling, falling])),
    (ValueError, "factor has 1 entries for 2 groups", lambda o: rft.StrengthScheduler(o, [falling])),
    (TypeError, "factor must be a function of last_epoch, or a list of them, got a float",
     lambda o: rft.StrengthScheduler(o, 0.5)),
    (TypeError, r"factor\[0\] must be a function", lambda o: rft.StrengthScheduler(o, [0.5, None])),
    (ValueError, "strength of group 0 at last_epoch=0 must be finite and at least 0, got -1.5",
     lambda o: rft.StrengthScheduler(o, lambda t: -1)),
    (ValueError, "the factor of group 0 at last_epoch=0 must be finite, got None",
     lambda o: rft.StrengthScheduler(o, lambda t: None)),
    (ValueError, "group 0 has the method 'spd'; RecAdam's pull is that of 'l2sp'",
     lambda o: rft.RecAdamScheduler(o, 0.1, 100)),
    (ValueError, "no group has the method 'l2sp'",
     lambda o: rft.RecAdamScheduler(rft.AnchoredAdamW(make()), 0.1, 100)),
    (ValueError, "k must be finite and at least 0, got -1", lambda o: rft.RecAdamScheduler(o, -1, 100)),
    (ValueError, "t0 must be finite", lambda o: rft.RecAdamScheduler(o, 1, math.inf)),
    (TypeError, "lr_factor must be a function", lambda o: rft.RecAdamScheduler(o, 1, 100, 0.5)),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), REFUSED, ids=[row[1][:30] for row in REFUSED])
def test_refused(error, message, call):
    optimizer = rft.AnchoredAdamW(groups("spd", "none"), strength=1.5)
    with pytest.raises(error, match=message):
        call(optimizer)
    assert optimizer.param_groups[0]["strength"] == 1.5


def test_a_radius_stays_above_0_and_nothing_is_written_on_an_error():
    optimizer = rft.AnchoredAdamW(groups("project", "project"), radius=2.0)
    scheduler = rft.StrengthScheduler(optimizer, [lambda t: 1 - t / 4, lambda t: 1 - t / 2], "radius")
    scheduler.step()
    with pytest.raises(ValueError, match=r"radius of group 1 at last_epoch=2 must be finite and above 0, got 0\.0"):
        scheduler.step()
    assert scheduler.last_epoch == 1
    assert [group["radius"] for group in optimizer.param_groups] == [1.5, 1.0]
    with pytest.raises(ValueError, match="a schedule of 'strength', and this one is of 'radius'"):
        scheduler.load_state_dict(rft.StrengthScheduler(spd(make()), falling).state_dict())
    with pytest.raises(ValueError, match="drives radius in 1 of 1 groups, and this schedule in 2 of 2"):
        scheduler.load_state_dict(rft.StrengthScheduler(sgd_within(make()), falling, "radius").state_dict())


def recadam(params, anchors, k, t0, strength, lr, steps, factor=lambda t: 1.0, eps=0.0):
    """The released update, written anew: Adam's step times λ, and the decoupled pull times 1 − λ."""
    thetas = [p.detach().clone() for p in params]
    m, v = ([torch.zeros_like(theta) for theta in thetas] for _ in range(2))
    for t in range(1, steps + 1):
        weight = 1 / (1 + math.exp(-k * (t - t0)))
        rate = lr * factor(t - 1)
        for j, (theta, anchor, g) in enumerate(zip(thetas, anchors, grads(thetas, t - 1), strict=True)):
            m[j], v[j] = 0.9 * m[j] + 0.1 * g, 0.999 * v[j] + 0.001 * g * g
            step = m[j] / (1 - 0.9**t) / ((v[j] / (1 - 0.999**t)).sqrt() + eps)
            theta -= rate * weight * step
            theta -= rate * (1 - weight) * strength * (theta - anchor)
    return thetas


@pytest.mark.parametrize(("k", "t0"), [(0.5, 6), (0.0, 3), (2.0, 4), (1.0, 300)])
@pytest.mark.parametrize("wrapped", [False, True])
def test_recadam_makes_the_released_step(k, t0, wrapped):
    def warm(t):
        return min(1.0, (t + 1) / 4)

    params = make(torch.float64)
    anchors = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p in params:
            p += 0.1
    given = dict(k=k, t0=t0, strength=40.0, lr=1e-2, steps=12, factor=warm)
    expected = recadam(params, anchors, **given)
    start = [p.detach().clone() for p in params]
    if wrapped:
        optimizer = rft.Anchored(torch.optim.Adam(params, lr=1e-2, eps=0.0), "l2sp", strength=40.0, anchor=anchors)
    else:
        optimizer = rft.AdamL2SP(params, lr=1e-2, eps=0.0, weight_decay=0.0, strength=40.0, anchor=anchors)
    scheduler = rft.RecAdamScheduler(optimizer, k, t0, warm)
    run(optimizer, params, 0, 12, scheduler)
    for p, theta, before in zip(params, expected, start, strict=True):
        torch.testing.assert_close(p.detach(), theta, rtol=1e-9, atol=1e-10)  # λ is 2e-12 and not 0 at t0 = 300
        assert not torch.allclose(theta, before, rtol=1e-3)
    weight = 1 / (1 + math.exp(-k * (13 - t0)))
    if t0 < 300:
        assert scheduler.get_last_lr() == pytest.approx([1e-2 * weight])
        assert scheduler.get_last_value() == pytest.approx([40 * (1 - weight) / weight])
    late = recadam(start, anchors, **{**given, "t0": t0 + 1})
    assert k in (0, 1) or not torch.allclose(late[0], expected[0], rtol=1e-6), "one step late would pass too"


def test_recadam_leaves_a_head_its_lr_and_resumes():
    def trained(optimizer, scheduler, params, start, stop):
        run(optimizer, params, start, stop, scheduler)
        return optimizer.state_dict(), scheduler.state_dict()

    def made():
        body, head, more = make()
        of = [{"params": [body, more], "method": "l2sp"}, {"params": [head], "method": "none"}]
        optimizer = rft.AnchoredAdamW(of, lr=1e-2, strength=40.0)
        return [body, more, head], optimizer, rft.RecAdamScheduler(optimizer, 0.5, 4, lambda t: 1 - t / 20)

    params, optimizer, scheduler = made()
    saved = saved_and_loaded(trained(optimizer, scheduler, params, 0, 5))
    weights = [p.detach().clone() for p in params]
    run(optimizer, params, 5, 9, scheduler)
    assert scheduler.last_epoch == 9
    assert scheduler.get_last_lr() == pytest.approx([1e-2 * 0.55 / (1 + math.exp(-3)), 1e-2 * 0.55])
    assert scheduler.get_last_value()[1] is None
    assert optimizer.param_groups[1]["strength"] == 40.0
    resumed, other, again = made()
    for p, weight in zip(resumed, weights, strict=True):
        p.data.copy_(weight)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    run(other, resumed, 5, 9, again)
    assert all(map(torch.equal, params, resumed))
