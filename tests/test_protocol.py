"""The protocol of torch.optim: torch's own inputs for its own optimizers, its schedulers and its averages."""

import io
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils

import robustft_kernels as rft

common = pytest.importorskip("torch.testing._internal.common_optimizers", reason="needs expecttest")

PAIRS = {"AdamW": (torch.optim.AdamW, rft.AnchoredAdamW), "SGD": (torch.optim.SGD, rft.AnchoredSGD)}
INFOS = {info.optim_cls.__name__: info for info in common.optim_db if info.optim_cls.__name__ in PAIRS}
INPUTS = [
    (name, {"lr": 1e-2, "weight_decay": 0.0, **given.kwargs})
    for name, info in INFOS.items()
    for given in info.optim_inputs_func(device="cpu")
]


def twins(name, kwargs, shapes=((), (5,), (17, 9), (40000,)), **own):
    """Equal parameters, and torch's optimizer and ours over them."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    theirs, ours = PAIRS[name]
    return (params, theirs(params, **kwargs)), (copies, ours(copies, **kwargs, **own))


def give(params, t, skip=()):
    generator = torch.Generator().manual_seed(t)
    for k, p in enumerate(params):
        p.grad = None if k in skip else torch.randn(p.shape, generator=generator).to(p.dtype)


def assert_alike(one, other):
    for p, q in zip(one, other, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "kwargs"), INPUTS, ids=str)
def test_torchs_inputs(name, kwargs, backend):
    """Whatever torch gives its own optimizers. Gradients are missing by turns, or zero. There is a state_dict in the
    middle, and a later group."""
    (params, plain), (copies, mine) = twins(name, kwargs, backend=backend)
    late = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    for t in range(8):
        for of, optimizer in ((params, plain), (copies, mine)):
            give(of, t, skip=() if t % 3 else (1, 2))
            if t == 4:
                for p in of:
                    p.grad = torch.zeros_like(p)
            if t == 5:
                new = late[of is copies]
                optimizer.add_param_group({"params": [new], "lr": 0.5})
                of.append(new)
            if t >= 5:
                late[of is copies].grad = torch.ones(3)
            optimizer.step()
            if t == 2:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                optimizer.load_state_dict(torch.load(file, weights_only=True))
            optimizer.zero_grad(set_to_none=bool(t % 2))
        assert_alike(params, copies)


ERRORS = [
    (name, k, given)
    for name, info in INFOS.items()
    for k, given in enumerate(info.optim_error_inputs_func(device="cpu", dtype=torch.float32))
    if "foreach" not in given.optimizer_error_input.kwargs
]


@pytest.mark.parametrize(("name", "k", "given"), ERRORS, ids=lambda x: str(x) if isinstance(x, int | str) else "")
def test_torchs_bad_inputs(name, k, given):
    """What torch refuses, we refuse with the same kind of error. Or we take it if we can: a beta may be a tensor."""
    of = given.optimizer_error_input
    params = [nn.Parameter(torch.randn(2, 3))] if of.params is None else of.params
    if "betas" in of.kwargs and isinstance(given.error_regex, str) and "both floats" in given.error_regex:
        PAIRS[name][1](params, **of.kwargs)
        return
    expected = ValueError if given.error_type is UserWarning else given.error_type
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch only warns of a parameter that is twice in a group
        with pytest.raises(expected):
            PAIRS[name][1](params, **of.kwargs)


SCHEDULERS = {
    "OneCycleLR": (lr_scheduler.OneCycleLR, dict(max_lr=0.05, total_steps=12)),
    "CyclicLR": (lr_scheduler.CyclicLR, dict(base_lr=1e-3, max_lr=0.05, step_size_up=3)),
    "CosineAnnealingWarmRestarts": (lr_scheduler.CosineAnnealingWarmRestarts, dict(T_0=4)),
    "LambdaLR": (lr_scheduler.LambdaLR, dict(lr_lambda=lambda t: 1 / (t + 1))),
    "PolynomialLR": (lr_scheduler.PolynomialLR, dict(total_iters=8)),
    "StepLR": (lr_scheduler.StepLR, dict(step_size=3)),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(name, scheduler):
    """Including momentum, which is cycled with lr. Also resumed in the middle."""
    momentum = {"momentum": 0.9} if name == "SGD" else {}
    runs = twins(name, {"lr": 1e-2, "weight_decay": 0.01, **momentum})
    make, kwargs = SCHEDULERS[scheduler]
    cycled = []
    for of, optimizer in runs:
        schedule = make(optimizer, **kwargs)
        for t in range(11):
            give(of, t)
            optimizer.step()
            schedule.step()
            if t == 5:
                saved = optimizer.state_dict(), schedule.state_dict()
                optimizer.load_state_dict(saved[0])
                schedule.load_state_dict(saved[1])
        group = optimizer.param_groups[0]
        cycled.append((group["lr"], group.get("betas"), group.get("momentum")))
    assert cycled[0] == cycled[1]
    assert_alike(runs[0][0], runs[1][0])


def test_plateau_chained_and_sequential():
    for name in PAIRS:
        runs = twins(name, {"lr": 0.1, "weight_decay": 0.0})
        for of, optimizer in runs:
            plateau = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
            chained = lr_scheduler.ChainedScheduler(
                [lr_scheduler.ConstantLR(optimizer, 0.5, 3), lr_scheduler.ExponentialLR(optimizer, 0.9)]
            )
            for t in range(6):
                give(of, t)
                optimizer.step()
                plateau.step(1.0)
                chained.step()
        assert_alike(runs[0][0], runs[1][0])


@pytest.mark.parametrize("average", [None, swa_utils.get_ema_multi_avg_fn(0.9)], ids=["SWA", "EMA"])
def test_averages_of_the_weights(average):
    """Averages are swapped into the model, and the next step goes on from them, master weights or not."""
    for dtype, master in ((torch.float32, False), (torch.bfloat16, True)):
        torch.manual_seed(0)
        model = nn.Linear(6, 4).to(dtype)
        optimizer = rft.AdamSPD(model.parameters(), lr=1e-2, master_weights=master)
        averaged = swa_utils.AveragedModel(model, multi_avg_fn=average)
        schedule = swa_utils.SWALR(optimizer, swa_lr=5e-3)
        seen = []
        for t in range(5):
            give(model.parameters(), t)
            optimizer.step()
            schedule.step()
            averaged.update_parameters(model)
            seen.append(model.weight.detach().float().clone())
        if average is None:
            slack = 2e-2 if dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(averaged.module.weight.float(), torch.stack(seen).mean(0), rtol=0, atol=slack)
        model.load_state_dict(averaged.module.state_dict())
        was = model.weight.detach().clone()
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
        assert torch.equal(model.weight, was)


def test_state_dict_hooks_and_profiler():
    param = nn.Parameter(torch.ones(3))
    optimizer = rft.AdamSPD([param])
    order = []
    optimizer.register_state_dict_pre_hook(lambda o: order.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, saved: order.append("load") or saved)
    saved = optimizer.state_dict()
    assert saved.pop("extra") == 1
    optimizer.load_state_dict(saved)
    assert order == ["pre", "load"]
    param.grad = torch.ones(3)
    with torch.profiler.profile(acc_events=True) as profile:  # otherwise torch 2.10 warns
        optimizer.step()
    assert any("Optimizer.step#AdamSPD.step" in event.name for event in profile.events())


def test_a_layer_frozen_and_thawed():
    """Its state waits for it. Its deviation is measured from the same anchor."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    optimizer = rft.AdamSPD(model.named_parameters(), lr=1e-2)
    for frozen in (False, True, False):
        model[0].requires_grad_(not frozen)
        was = [p.detach().clone() for p in model[0].parameters()]
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
        same = all(map(torch.equal, was, model[0].parameters()))
        assert same == frozen
    assert optimizer.state[model[0].weight]["step"] == 6
    assert optimizer.state[model[1].weight]["step"] == 9
