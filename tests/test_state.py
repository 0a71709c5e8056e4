"""What outlives a step: dtypes, round trips, torch's checkpoints, memory."""

import io
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import robustft_kernels as rft
from robustft_kernels.core import state
from tests.test_optimizers import give_grads, make, run
from tests.test_steps import slow

KINDS = [
    (rft.AdamSPD, dict(lr=1e-2, weight_decay=0.1, amsgrad=True)),
    (rft.AdamSPD, dict(lr=1e-2, anchor="zero")),
    (rft.AdamL2SP, dict(lr=1e-2, strength=3.0)),
    (rft.AnchoredAdamW, dict(lr=1e-2)),
    (rft.SGDSPD, dict(lr=1e-2, momentum=0.9, dampening=0.1)),
    (rft.SGDSPD, dict(lr=1e-2)),
    (rft.AdamFTP, dict(lr=1e-2)),
    (rft.AdamPGM, dict(lr=1e-2, radius=0.1, norm="mars_rows")),
    (rft.AnchoredAdamW, dict(lr=1e-2, method="mars_sp", strength=0.1)),
    (rft.AnchoredSGD, dict(lr=1e-2, method="l2sp_coupled", momentum=0.9)),
    (rft.AdamSPD, dict(lr=1e-2, master_weights=True)),
    (rft.AdamSPD, dict(lr=1e-2, state_dtype=torch.bfloat16, amsgrad=True)),
    (rft.AdamSPD, dict(lr=1e-2, state_dtype="8bit")),
    (rft.SGDFTP, dict(lr=1e-2, momentum=0.9, state_dtype=torch.bfloat16, master_weights=True)),
]


def saved_and_loaded(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def copies(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


@pytest.mark.lean(keep=lambda dtype, kwargs, **_: dtype == torch.bfloat16 and kwargs in (KINDS[0][1], KINDS[-1][1]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("cls", "kwargs"), KINDS)
def test_resume_equals_no_interruption(backend, cls, kwargs, dtype):
    params, steps = make(dtype=dtype), 2 if slow(backend) else 3
    optimizer = cls(params, backend=backend, **kwargs)
    run(optimizer, params, steps)
    checkpoint = saved_and_loaded(optimizer.state_dict())
    resumed = copies(params)
    other = cls(resumed, backend=backend, lr=0.5, radius=9.0)  # what differs here is overwritten
    other.load_state_dict(checkpoint)
    for p, q in zip(params, resumed, strict=True):
        for key, value in optimizer.state.get(p, {}).items():
            loaded = other.state[q][key]
            assert torch.equal(loaded, value)
            assert loaded.dtype == value.dtype
            assert loaded.data_ptr() != value.data_ptr()
    run(optimizer, params, steps, start=steps)
    run(other, resumed, steps, start=steps)
    assert all(map(torch.equal, params, resumed))


def test_state_dtypes():
    params = make(dtype=torch.bfloat16)
    optimizer = rft.AdamSPD(params, lr=1e-2, anchor=[p.detach().float() for p in params])
    run(optimizer, params, 1)
    kept = optimizer.state[params[3]]
    assert {k: v.dtype for k, v in kept.items()} == dict.fromkeys(
        ("anchor", "exp_avg", "exp_avg_sq", "step"), torch.float32
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("theirs", "ours", "kwargs"),
    [
        (torch.optim.AdamW, rft.AdamSPD, {}),
        (torch.optim.AdamW, rft.AdamSPD, {"amsgrad": True}),
        (torch.optim.SGD, rft.SGDSPD, {"momentum": 0.9}),
        (torch.optim.SGD, rft.SGDSPD, {}),
    ],
)
def test_loads_torch_checkpoints(backend, theirs, ours, kwargs, dtype):
    params = make(dtype=dtype)
    pretrained = copies(params)
    plain = theirs(params, lr=3e-3, **kwargs)
    run(plain, params, 3)
    mine = copies(params)
    optimizer = ours(mine, strength=2.0, anchor=[p.detach() for p in pretrained], backend=backend)
    optimizer.load_state_dict(saved_and_loaded(plain.state_dict()))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["method"], group["strength"], group["anchor"]) == (3e-3, "spd", 2.0, "given")
    for p, q, start in zip(params, mine, pretrained, strict=True):
        kept = optimizer.state[q]
        assert torch.equal(kept["anchor"], start)
        for key, value in plain.state[p].items():
            if value is not None:
                assert torch.equal(kept[key], value.float()), key
                assert kept[key].dtype == torch.float32
    group["method"] = "none"
    run(optimizer, mine, 2, start=3)
    run(plain, params, 2, start=3)
    for a, b in zip(mine, params, strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(a, b, rtol=16 * eps, atol=16 * eps)


def test_interchanges_with_torch():
    """Ours also loads into torch.optim.AdamW. That then goes on as we would with method="none"."""
    params = make()
    optimizer = rft.AnchoredAdamW(params, lr=1e-2, weight_decay=0.1)
    run(optimizer, params, 3)
    theirs = copies(params)
    plain = torch.optim.AdamW(theirs, foreach=False)
    group = {**plain.state_dict()["param_groups"][0], "lr": 1e-2, "weight_decay": 0.1}
    plain.load_state_dict({**saved_and_loaded(optimizer.state_dict()), "param_groups": [group]})
    run(plain, theirs, 2, start=3)
    run(optimizer, params, 2, start=3)
    for a, b in zip(params, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_anchors_may_stay_behind(backend):
    params = make()
    optimizer = rft.AdamSPD(params, lr=1e-2, backend=backend, save_anchors=False)
    assert set(optimizer.state_dict()["state"][0]) == {"exp_avg", "exp_avg_sq", "step"}
    run(optimizer, params, 2)
    checkpoint = saved_and_loaded(optimizer.state_dict())
    assert all("anchor" not in of for of in checkpoint["state"].values())
    resumed = copies(params)
    other = rft.AdamSPD(resumed, anchor=[p.detach() for p in make()], backend=backend)
    other.load_state_dict(checkpoint)
    run(optimizer, params, 2, start=2)
    run(other, resumed, 2, start=2)
    assert all(map(torch.equal, params, resumed))


def test_loading_checks_first():
    params = make()
    names = [f"w{i}" for i in range(len(params))]
    optimizer = rft.AdamSPD(zip(names, params, strict=True), lr=1e-2)
    run(optimizer, params, 1)
    good = saved_and_loaded(optimizer.state_dict())

    def assert_refused(checkpoint, message):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(checkpoint)
        assert all(
            torch.equal(optimizer.state[p]["exp_avg"], good["state"][i]["exp_avg"]) for i, p in enumerate(params)
        )
        assert optimizer.param_groups[0]["lr"] == 1e-2

    other = saved_and_loaded(good)
    other["state"][2]["exp_avg"] = torch.zeros(7, 5)
    assert_refused(other, r"'exp_avg' of parameter 'w2' has shape \(7, 5\), the parameter's is \(5, 7\)")
    other = saved_and_loaded(good)
    other["state"][3]["anchor"] = torch.zeros(4)
    assert_refused(other, "'anchor' of parameter 'w3'")
    other = saved_and_loaded(good)
    other["param_groups"][0]["param_names"][1] = "v1"
    assert_refused(other, "parameter names differ, first 'v1' for 'w1'")
    other = saved_and_loaded(good)
    other["param_groups"].append(other["param_groups"][0])
    assert_refused(other, "different number of parameter groups")
    adam = torch.optim.Adam(copies(params), weight_decay=0.1).state_dict()
    assert_refused(adam, "torch.optim.Adam with a coupled weight_decay")


def test_users_load_hooks_see_the_whole_and_the_last_word():
    params = make()
    optimizer = rft.AdamSPD(params, lr=1e-2)
    run(optimizer, params, 1)
    seen = []

    def halve(_, checkpoint):
        return {**checkpoint, "param_groups": [{**g, "lr": 5e-3} for g in checkpoint["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[params[3]]["exp_avg"].clone()))
    optimizer.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 5e-3
    assert torch.equal(seen[0], optimizer.state[params[3]]["exp_avg"])


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (torch.zeros(4, 5), True),
        (torch.zeros(4, 5).t(), True),
        (torch.zeros(2, 3, 4, 5).permute(2, 0, 3, 1), True),
        (torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), True),
        (torch.zeros(4, 1, 5)[:, :, :].as_strided((4, 1, 5), (5, 99, 1)), True),
        (torch.zeros(0, 5).t(), True),
        (torch.zeros(()), True),
        (torch.zeros(4, 6)[:, ::2], False),
        (torch.zeros(4, 6)[:, :3], False),
        (torch.zeros(3).expand(4, 3), False),
        (torch.zeros(10).as_strided((4, 3), (2, 1)), False),
    ],
)
def test_is_dense(tensor, dense):
    assert state.is_dense(tensor) is dense


@pytest.mark.skipif(
    sys.platform != "linux" or bool(rft.backends()["native"]), reason="measures the native backend on Linux"
)
@pytest.mark.parametrize(("anchor", "copies_kept"), [("initial", 3), ("zero", 2)])
def test_memory_is_two_moments_and_an_anchor(anchor, copies_kept):
    """The peak of three steps, above the weights and gradients, is the state. There is no full-size temporary."""
    program = f"""
import re
import torch, robustft_kernels as rft
def peak():  # of this process alone: ru_maxrss begins with that of the one that started it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
n = 24 * 2**20
small = torch.nn.Parameter(torch.full((1000,), 0.1))
small.grad = torch.ones(1000)
rft.AdamSPD([small], backend="native").step()
params = [torch.nn.Parameter(torch.full((n // 2,), 1.1)) for _ in range(2)]
for p in params:
    p.grad = torch.full_like(p, 0.5)
before = peak()
optimizer = rft.AdamSPD(params, lr=1e-3, anchor={anchor!r}, backend="native")
for sign in (-1, -1, 1):
    for p in params:
        p.grad.fill_(sign * 0.5)
    optimizer.step()
fired = float(optimizer._plans.current.launches[0].alphas.min()) < 1
kept = sum(t.numel() * 4 for of in optimizer.state.values() for t in of.values())
print((peak() - before) / (4 * n), kept / (4 * n), fired)
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert float(out[1]) == pytest.approx(copies_kept, abs=1e-6)
    assert copies_kept - 0.05 < float(out[0]) < copies_kept + 0.1
    assert out[2] == "True"


def test_first_gradient_after_loading(backend):
    """A parameter that had no state in the checkpoint starts its own."""
    params = make()
    optimizer = rft.AdamSPD(params, lr=1e-2, backend=backend)
    give_grads(params, 0)
    params[1].grad = None
    optimizer.step()
    optimizer.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    run(optimizer, params, 1, start=1)
    assert optimizer.state[params[1]]["step"] == 1
    assert optimizer.state[params[0]]["step"] == 2


def test_state_whose_memory_moved_is_found(backend):
    """An offloader does this: it swaps the storage under the same tensor."""
    results = []
    for moved in (False, True):
        params = make()
        optimizer = rft.AdamSPD(params, backend=backend)
        run(optimizer, params, steps=1)
        if moved:
            for p in params:
                for value in optimizer.state[p].values():
                    value.data = value.data.clone()
        run(optimizer, params, steps=2, start=1)
        results.append([t for p in params for t in (p, *optimizer.state[p].values())])
    assert all(map(torch.equal, *results))


def test_a_kill_in_the_midst_of_a_save_loses_at_most_that_save(tmp_path):
    """Saves to a file beside, which then takes the name. The process may die at any time. What has the name goes on bit
    for bit as if nothing had happened."""
    program = """
import os, sys, torch
from tests.test_state import from_scratch
params, optimizer = from_scratch()
from tests.test_optimizers import run
for t in range(1, 10**6):
    run(optimizer, params, 1, start=t)
    saved = {"t": t, "params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}
    torch.save(saved, sys.argv[1] + ".new")
    os.replace(sys.argv[1] + ".new", sys.argv[1])
"""
    file = tmp_path / "checkpoint"
    for wait in (0.0, 0.013, 0.05):
        process = subprocess.Popen([sys.executable, "-c", program, str(file)])
        while not file.exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(wait)
        process.kill()
        process.wait()
        saved = torch.load(file, weights_only=True)
        file.unlink()
        params, optimizer = from_scratch()
        run(optimizer, params, saved["t"], start=1)
        assert all(map(torch.equal, params, saved["params"]))
        resumed, other = from_scratch()
        other.load_state_dict(saved["optimizer"])
        with torch.no_grad():
            for p, q in zip(resumed, saved["params"], strict=True):
                p.copy_(q)
        run(optimizer, params, 2, start=saved["t"] + 1)
        run(other, resumed, 2, start=saved["t"] + 1)
        assert all(map(torch.equal, params, resumed))


def from_scratch():
    torch.set_num_threads(1)
    params = make(dtype=torch.bfloat16)
    return params, rft.AdamFTP(params, lr=1e-2, master_weights=True, state_dtype=torch.bfloat16)
