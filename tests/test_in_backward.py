"""Steps inside the backward pass: the bits of ordinary ones, and less memory."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import robustft_kernels as rft
from robustft_kernels.testing import CHUNK


def net(dtype=torch.float32):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(40, 3 * CHUNK // 40), nn.Tanh(), nn.Linear(3 * CHUNK // 40, 20))
    return nn.Sequential(body, nn.LayerNorm(20), nn.Linear(20, 3)).to(dtype)


@pytest.mark.parametrize(
    ("kwargs", "dtype"),
    [
        (dict(method="spd", weight_decay=0.1), torch.float32),
        (dict(method="spd", norm="mars_rows", amsgrad=True), torch.float32),
        (dict(method="ftp"), torch.float32),
        (dict(method="project", radius=0.05, norm="mars"), torch.float32),
        (dict(method="mars_sp", strength=0.01), torch.float32),
        (dict(method="spd", stochastic_rounding=True, seed=5), torch.bfloat16),
        (dict(method="spd", state_dtype=torch.bfloat16, master_weights=True), torch.bfloat16),
    ],
)
@pytest.mark.parametrize("served_by", ["auto", "reference"])  # a launch of one tensor is like any other
def test_bit_for_bit(served_by, kwargs, dtype):
    """With a scheduler, and parameters without a gradient, frozen and thawed, or tied. At the end hooks are removed."""
    results = []
    for inside in (False, True):
        model = net(dtype)
        model[2].weight = nn.Parameter(model[0][2].weight.detach()[:3, :20].clone())
        unused = nn.Parameter(torch.ones(3, dtype=dtype))
        model[1].bias.requires_grad_(False)
        groups = [
            {"params": [*model[0].named_parameters(), ("unused", unused)]},
            {"params": list(model[1:].named_parameters()), "lr": 1e-2, "method": "none", "norm": None},
        ]
        optimizer = rft.AnchoredAdamW(groups, lr=1e-3, backend=served_by, **kwargs)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        hooks = rft.StepInBackward(optimizer) if inside else None
        for t in range(6):
            if t == 4 and inside:
                hooks.remove()
            if t == 3:
                model[1].bias.requires_grad_(True)
            x = torch.randn(8, 40, generator=torch.Generator().manual_seed(t)).to(dtype)
            hidden = model[1](model[0](x))
            (model[2](hidden).float().square().mean() + model[2](-hidden).float().abs().mean()).backward()
            if inside and t < 3:
                assert all(p.grad is None for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        told = optimizer.telemetry()
        kept = [t for p in model.parameters() for k, t in sorted(optimizer.state[p].items())]
        results.append([*model.parameters(), *kept, torch.tensor([told[n].selections for n in told])])
    assert all(map(torch.equal, *results))
    assert len(results[0]) == len(results[1]) > 20


def test_what_does_not_go_with_it():
    param = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="max_grad_norm needs all gradients at once"):
        rft.StepInBackward(rft.AdamSPD([param], max_grad_norm=1.0))
    optimizer = rft.AdamSPD([param])
    scaler = torch.amp.GradScaler("cpu")
    with rft.StepInBackward(optimizer):
        scaler.scale(param.sum()).backward()
        with pytest.raises(RuntimeError, match="a GradScaler steps an optimizer whose parameters were stepped"):
            scaler.step(optimizer)
    param.sum().backward()
    assert param.grad is not None, "no hook is left"


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's account of its memory")
def test_gradients_take_the_memory_of_a_few():
    """12 layers of 4 MB. This saves the 48 MB of their gradients, less those of two at a time."""
    program = """
import re, sys, torch, robustft_kernels as rft
torch.set_num_threads(1)
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(12)))
optimizer = rft.AdamSPD(model.parameters(), lr=1e-4, anchor_dtype=None)
if sys.argv[1] == "inside":
    rft.StepInBackward(optimizer)
for p in model.parameters():
    p.grad = torch.zeros_like(p)
    optimizer.step()
    p.grad = None
before = peak()
model(torch.randn(4, 1024)).square().mean().backward()
optimizer.step()
print(peak() - before)
"""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system
    ordinary, inside = (
        float(subprocess.run([sys.executable, "-c", program, how], stdout=subprocess.PIPE, check=True, env=env).stdout)
        for how in ("ordinary", "inside")
    )
    assert ordinary > 40
    assert inside < ordinary - 32
