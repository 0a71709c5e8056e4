"""Anchored as an optimizer among others: groups' anchors, checkpoints, copies, hooks, schedulers, scaler."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

import robustft_kernels as rft
from robustft_kernels.optim.around import Around
from robustft_kernels.optim.wrapper import Anchored
from tests.test_state import saved_and_loaded
from tests.test_wrapper import SHAPES, TURNS, Lion, each_backend, far, give_grads, make, run

KINDS = [
    (AdamW, dict(lr=1e-2, amsgrad=True), dict(strength=1.5)),
    (AdamW, dict(lr=1e-2), dict(anchor="zero")),
    (SGD, dict(lr=1e-2, momentum=0.9), dict(norm="mars_rows")),
    (Lion, dict(lr=1e-3), dict(method="project", radius=0.02)),
]


def twin(cls, kwargs, params, pull, **other):
    return Anchored(cls(params, **{**kwargs, **other}), **pull)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("cls", "kwargs", "pull"), KINDS)
def test_resume_equals_no_interruption(cls, kwargs, pull, dtype):
    params = make(dtype)
    wrapped = twin(cls, kwargs, params, pull)
    for p in params[3:]:
        give_grads([p], 0)
    wrapped.step()  # the first three have no state yet
    run(wrapped, params[2:], 2, start=1)
    resumed = [nn.Parameter(p.detach() + 1) for p in params]
    other = twin(cls, kwargs, resumed, {}, lr=0.5)  # what differs here is overwritten
    run(other, resumed, 1)
    for p, q in zip(params, resumed, strict=True):
        q.data.copy_(p.detach())
    other.load_state_dict(wrapped.state_dict())
    memory = [{a.data_ptr() for a in o._anchors.values() if a.numel()} for o in (wrapped, other)]
    assert memory[0].isdisjoint(memory[1])
    other.load_state_dict(saved_and_loaded(wrapped.state_dict()))  # torch's own loading shares the moments
    assert other.param_groups[0]["lr"] == kwargs["lr"]
    kept, as_there = other.optimizer.state, wrapped.optimizer.state
    assert [kept.get(q) is None for q in resumed] == [as_there.get(p) is None for p in params]
    assert not any("anchor" in of for of in kept.values())
    for p, q in zip(params, resumed, strict=True):
        assert (p in wrapped._anchors) == (q in other._anchors) == (pull.get("anchor") != "zero")
        if p in wrapped._anchors:
            assert torch.equal(wrapped._anchors[p], other._anchors[q])
    run(wrapped, params, 5, start=3)
    run(other, resumed, 5, start=3)
    assert all(map(torch.equal, params, resumed))


def test_checkpoints_of_and_for_the_wrapped_one():
    params = make()
    run(plain := AdamW(params, lr=3e-3), params, 3)
    anchors = [torch.zeros_like(p, dtype=torch.float64) for p in params]
    wrapped = Anchored(AdamW(params), strength=2.0, anchor=anchors)
    wrapped.load_state_dict(saved_and_loaded(plain.state_dict()))
    group = wrapped.param_groups[0]
    assert (group["lr"], group["method"], group["strength"], group["anchor"]) == (3e-3, "spd", 2.0, "given")
    assert all(wrapped._anchors[p].data_ptr() == anchor.data_ptr() for p, anchor in zip(params, anchors, strict=True))
    saved = saved_and_loaded(wrapped.state_dict())
    assert all(of["anchor"].dtype == torch.float64 for of in saved["state"].values())
    plain.load_state_dict(saved)  # torch takes it as its own
    lean = Anchored(AdamW(params), "l2sp", save_anchors=False).state_dict()
    assert not any("anchor" in of for of in lean["state"].values())
    zero = Anchored(AdamW(params), anchor="zero")
    zero.load_state_dict(lean)
    assert [zero.param_groups[0][key] for key in ("anchor", "method")] == ["zero", "l2sp"]
    run(zero, params, 1)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_live_on_their_own(duplicate):
    params = make()
    wrapped = Anchored(AdamW(params, lr=1e-2), strength=1.5, backend="reference")
    run(wrapped, params, 3)
    other = duplicate(wrapped)
    theirs = other.param_groups[0]["params"]
    run(wrapped, params, 5, start=3)
    assert not torch.equal(theirs[3], params[3])
    run(other, theirs, 5, start=3)
    assert all(map(torch.equal, theirs, params))
    assert (other.backend, other.save_anchors) == ("reference", True)


def test_hooks_and_the_rest_of_an_optimizer():
    params, calls = make(), []
    inner = Lion(params)
    wrapped = Anchored(inner)
    assert isinstance(wrapped, torch.optim.Optimizer)
    assert wrapped.defaults == inner.defaults
    assert {p: {k: of[k] for k in of if not k.startswith("anchor")} for p, of in wrapped.state.items()} == inner.state
    assert wrapped.param_groups is inner.param_groups
    assert wrapped.slow() == "slow"
    assert "Lion" in repr(wrapped)
    assert not hasattr(wrapped, "fast")
    for name, optimizer in (("outer", wrapped), ("inner", inner)):
        optimizer.register_step_pre_hook(lambda o, *_, name=name: calls.append(f"{name} step"))
        optimizer.register_step_post_hook(lambda o, *_, name=name: calls.append(f"{name} stepped"))
        optimizer.register_state_dict_pre_hook(lambda o, name=name: calls.append(f"{name} save"))
        optimizer.register_load_state_dict_post_hook(lambda o, name=name: calls.append(f"{name} loaded"))
    wrapped.register_state_dict_post_hook(lambda o, saved: {**saved, "epoch": 3})
    wrapped.register_load_state_dict_pre_hook(lambda o, saved: calls.append(saved["epoch"]))
    run(wrapped, params, 1)
    wrapped.load_state_dict(wrapped.state_dict())
    assert calls == [
        "outer step", "inner step", "inner stepped", "outer stepped",
        "outer save", "inner save", 3, "inner loaded", "outer loaded",
    ]  # fmt: skip
    wrapped.zero_grad()
    assert all(p.grad is None for p in params)


def test_loading_checks_first():
    params = make(shapes=[(5, 7), (3,)])
    wrapped = Anchored(AdamW(zip(["w", "b"], params, strict=True), lr=1e-2))
    run(wrapped, params, 1)
    good = saved_and_loaded(wrapped.state_dict())
    bad = [copy.deepcopy(good) for _ in range(4)]
    bad[0]["state"][1]["anchor"] = torch.zeros(4)
    bad[1]["param_groups"][0]["param_names"][1] = "v"
    bad[2]["param_groups"][0]["method"] = "ftp"
    bad[3]["param_groups"].append(bad[3]["param_groups"][0])
    messages = (
        "'anchor' of parameter 'b'",
        "names differ, first 'v' for 'b'",
        "'ftp' works within",
        "different number",
    )
    for checkpoint, message in zip(bad, messages, strict=True):
        checkpoint["param_groups"][0]["lr"] = 5.0
        with pytest.raises(ValueError, match=message):
            wrapped.load_state_dict(checkpoint)
        assert wrapped.param_groups[0]["lr"] == 1e-2
        assert torch.equal(wrapped.state[params[0]]["exp_avg"], good["state"][0]["exp_avg"])


def test_schedulers_work_on_either():
    results = []
    for on_wrapped in (False, True):
        params = make()
        inner = AdamW(params, lr=1e-2)
        wrapped = Anchored(inner, "l2sp", strength=10.0)
        scheduler = CosineAnnealingLR(inner if on_wrapped else wrapped, 8)
        for t in range(8):
            run(wrapped, params, 1, start=t)
            scheduler.step()
        assert inner.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
        results.append(params)
    assert all(map(torch.equal, *results))
    fused = rft.AdamL2SP(params := make(), lr=1e-2, weight_decay=0.01, strength=10.0)
    scheduler = CosineAnnealingLR(fused, 8)
    for t in range(8):
        run(fused, params, 1, start=t)
        scheduler.step()
    assert far(params, results[0]) < 100
    without = Anchored(AdamW(params := make(), lr=1e-2), "l2sp", strength=10.0)
    assert far(run(without, params), results[0]) > 1e3


@each_backend
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("pull", [dict(strength=1.5), dict(method="l2sp", strength=5.0)])
def test_gradient_scaler(pull, fused, served_by):
    """The scaler's path if the wrapped optimizer unscales, and if it does not. With an infinite gradient there is
    neither a step nor a pull."""
    results = []
    for scale in (1.0, 1024.0):
        params = make()
        wrapped = Anchored(AdamW(params, lr=1e-2, fused=fused), backend=served_by, **pull)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for t in range(len(TURNS)):
            give_grads(params, t)
            for p in params:
                p.grad = scaler.scale(p.grad)
            scaler.step(wrapped)
            scaler.update(scale)
        measures = [wrapped._results[p][0].nan_to_num() for p in params]
        results.append([*(p.detach().clone() for p in params), *measures])
        give_grads(params, TURNS.index(0.4))
        params[2].grad[0, 0] = torch.inf
        scaler.step(wrapped)
        assert all(map(torch.equal, params, results[-1]))
    assert all(map(torch.equal, *results))
    assert far(results[0][: len(SHAPES)], run(AdamW(plain := make(), lr=1e-2, fused=fused), plain)) > 1e3


def test_anchors_for_all_groups():
    """A list runs through the groups that have none of their own. A mapping passes over those of method "none"."""
    a, b, c = make(shapes=[(5, 7), (3,), (2,)])
    given = [torch.zeros(5, 7), torch.zeros(2)]
    rows = ((("a", a), {}), (("b", b), {"anchor": "zero"}), (("c", c), {"method": "none"}))

    def plain():
        return SGD([{"params": [pair], **kwargs} for pair, kwargs in rows])

    wrapped = Anchored(plain(), anchor=given)
    assert [wrapped._anchors[p].data_ptr() for p in (a, c)] == [t.data_ptr() for t in given]
    assert [group["anchor"] for group in wrapped.param_groups] == ["given", "zero", "given"]
    wrapped = Anchored(plain(), anchor={"a": given[0]}, norm="mars_rows")
    assert set(wrapped._anchors) == {a}
    assert [group["norm"] for group in wrapped.param_groups] == ["mars_rows", "mars_rows", None]


def test_a_new_tensor_of_a_number_needs_no_new_plan(monkeypatch):
    """On the CPU, where no backend keeps its address. The number counts at once."""
    made, init = [], Around.__init__
    monkeypatch.setattr(Around, "__init__", lambda self, *args: made.append(1) or init(self, *args))
    params = make(shapes=[(5, 7)])
    wrapped = Anchored(SGD(params, lr=torch.tensor(0.0)), "l2sp", strength=1.0, anchor="zero")
    run(wrapped, params, 1)
    before = params[0].detach().clone()
    wrapped.param_groups[0].update(lr=torch.tensor(0.5), strength=torch.tensor(2.0))
    params[0].grad = torch.zeros_like(params[0])
    wrapped.step()
    assert len(made) == 1
    assert (params[0] == 0).all()
    assert before.any()
