"""The loops that benchmarks measure against do what the optimizers do."""

import pytest
import torch

import robustft_kernels as rft
from benchmarks import loops


@pytest.mark.parametrize(("loop", "ours"), [(loops.LoopSPD, rft.AdamSPD), (loops.LoopFTP, rft.AdamFTP)])
def test_loop_is_the_optimizer(loop, ours):
    torch.manual_seed(0)
    anchors = [torch.randn(20, 300), torch.randn(7)]
    params, theirs = ([torch.nn.Parameter(a.clone()) for a in anchors] for _ in range(2))
    fused, plain = ours(params, lr=1e-2), loop(theirs, 1e-2, anchors)
    for _ in range(30):
        for p, q in zip(params, theirs, strict=True):
            p.grad = torch.randn_like(p) + p.detach()
            q.grad = p.grad.clone()
        fused.step()
        plain.step()
    for p, q, a in zip(params, theirs, anchors, strict=True):
        assert not torch.equal(p, a)
        assert torch.allclose(p, q, rtol=0, atol=1e-5)  # thirty steps of float32 rounding; FTP keeps c in bfloat16


def test_loop_of_tpgm_has_its_slopes():
    torch.manual_seed(0)
    model = torch.nn.Linear(30, 20)
    params = list(model.parameters())
    anchors = [p.detach() + 0.1 * torch.randn_like(p) for p in params]
    grads = [torch.randn_like(p) for p in params]
    radii = torch.nn.ParameterList(torch.tensor(0.05) for _ in params)
    loops.loop_update(model, anchors, torch.optim.SGD(radii, lr=0.0), grads)
    gamma = [torch.tensor(0.05, requires_grad=True) for _ in params]
    projected = rft.project(params, anchors, gamma)
    torch.autograd.backward(projected, grads)
    for radius, ours in zip(radii, gamma, strict=True):
        assert float(radius.grad) == pytest.approx(float(ours.grad), rel=1e-5)
