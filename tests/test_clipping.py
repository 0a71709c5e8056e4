"""max_grad_norm: the norm of all gradients inside the step, against torch.nn.utils.clip_grad_norm_."""

import pytest
import torch
from torch import nn

import robustft_kernels as rft
from robustft_kernels.backends import registry
from robustft_kernels.testing import CHUNK, SETTINGS, Stepper

from .test_steps import cases_of, slow

SHAPES = [(0,), (1,), (77,), (2 * CHUNK + 5,), (64, 512), (7, 3, 5)]


def params_of(dtypes, device):
    shapes = [SHAPES[k % len(SHAPES)] for k in range(2 * len(SHAPES))]
    return [
        nn.Parameter(torch.randn(shape, device=device).to(dtypes[k % len(dtypes)])) for k, shape in enumerate(shapes)
    ]


@pytest.mark.lean(keep=lambda method, dtypes, **_: method == "spd" or len(dtypes) == 2)
@pytest.mark.parametrize("max_norm", [0.5, 1e9])
@pytest.mark.parametrize(
    "dtypes", [[torch.float32], [torch.float64], [torch.bfloat16, torch.float32], [torch.float16]], ids=str
)
@pytest.mark.parametrize("method", ["spd", "ftp", "none"])
def test_as_clip_grad_norm(backend, device, method, dtypes, max_norm):
    """The norm and the steps are the same, whether it clips or not. Gradients stay as they were."""
    if slow(backend) and (method == "none" or dtypes == [torch.float16]):
        pytest.skip("the interpreter is slow")
    torch.manual_seed(0)
    ours = params_of(dtypes, device)
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]

    def make(params, **kwargs):
        groups = [{"params": params[:7]}, {"params": params[7:], "method": "none"}]
        return rft.AnchoredAdamW(groups, lr=1e-2, method=method, backend=backend, **kwargs)

    inside, outside = make(ours, max_grad_norm=max_norm), make(theirs)
    for _ in range(2 if slow(backend) else 4):
        grads = [torch.randn_like(p) for p in ours]
        for p, q, g in zip(ours, theirs, grads, strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        total = torch.linalg.vector_norm(torch.cat([g.double().flatten() for g in grads]))
        if all(dtype.itemsize > 2 for dtype in dtypes):
            nn.utils.clip_grad_norm_(theirs, max_norm)
        else:  # clip_grad_norm_ would round the gradients that it scales
            outside.grad_scale = ((total + 1e-6) / max_norm).clamp(min=1).float()
        inside.step()
        outside.step()
        torch.testing.assert_close(inside.grad_norm, total, rtol=1e-6, atol=0)
        assert all(torch.equal(p.grad, g) for p, g in zip(ours, grads, strict=True))
    for p, q in zip(ours, theirs, strict=True):
        if max_norm > 1e6:
            assert torch.equal(p, q), "what needs no clipping keeps its bits"
        torch.testing.assert_close(p, q, rtol=2 * torch.finfo(p.dtype).eps, atol=1e-6)


def test_with_a_gradient_scaler(backend, device):
    """The norm is that of the unscaled gradients. With found_inf nothing moves."""
    p = nn.Parameter(torch.ones(300, device=device))
    optimizer = rft.AnchoredSGD([p], lr=1.0, max_grad_norm=1.0, backend=backend)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    scaler.scale(torch.zeros((), device=device))
    p.grad = torch.full_like(p, 1024.0)
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(optimizer.grad_norm.float(), torch.tensor(300.0**0.5, device=device))
    torch.testing.assert_close(p.detach(), 1 - torch.ones(300, device=device) / 300**0.5, rtol=1e-5, atol=1e-6)
    was = p.detach().clone()
    p.grad = torch.full_like(p, torch.inf)
    scaler.step(optimizer)
    assert torch.equal(p, was)


def test_the_limit_may_be_a_tensor_and_change(backend, device):
    p = nn.Parameter(torch.zeros(4, device=device))
    optimizer = rft.AnchoredSGD([p], lr=1.0, max_grad_norm=torch.tensor(2.0, device=device), backend=backend)
    for limit in (2.0, 0.5):
        optimizer.max_grad_norm.fill_(limit)
        p.data.zero_()
        p.grad = torch.full_like(p, 3.0)
        optimizer.step()
        torch.testing.assert_close(p.detach().norm(), torch.tensor(limit, device=device), rtol=1e-5, atol=1e-5)
    optimizer.max_grad_norm = None
    p.grad = torch.full_like(p, 3.0)
    optimizer.step()
    assert optimizer.grad_norm is None


def test_squares_of_every_layout(backend, device):
    """Gradients that are dense in any order, expanded or empty. A repetition gives the same bits."""
    stepper = Stepper(cases_of(backend), SETTINGS[0], "spd", torch.float32, device=device)
    run = registry.prepare(backend, stepper.table())
    grads = stepper.grads()
    exact = sum((g.double() ** 2).sum() for g in grads)
    torch.testing.assert_close(run.squared_norm(grads), exact, rtol=1e-6, atol=0)
    assert torch.equal(run.squared_norm(grads), run.squared_norm(grads))
    expanded = [g if g.dim() < 2 else torch.ones((), device=device).expand(g.shape) for g in grads]
    run = registry.prepare(backend, stepper.table())
    exact = sum((g.double() ** 2).sum() for g in expanded)
    torch.testing.assert_close(run.squared_norm(expanded), exact, rtol=1e-6, atol=0)


def test_own_gradients_are_found(backend, device):
    """Without a list, a step and a norm take each parameter's own gradient, also one that lies otherwise."""
    want, got = (Stepper(cases_of(backend), SETTINGS[0], "spd", torch.float32, device=device) for _ in range(2))
    grads = want.grads()
    for param, grad in zip(got.params, grads, strict=True):
        param.grad = grad.clone(memory_format=torch.contiguous_format)
    prepared = [registry.prepare(backend, of.table()) for of in (want, got)]
    norms = [run.squared_norm(of) for run, of in zip(prepared, (grads, None), strict=True)]
    torch.testing.assert_close(*norms, rtol=1e-6, atol=0)  # one lies otherwise, and is summed in another order
    prepared[0](grads)
    prepared[1](None)
    for a, b in zip(want.tensors(), got.tensors(), strict=True):
        assert torch.equal(a, b)
    got.params[3].grad = None
    with pytest.raises((RuntimeError, ValueError), match=f"{got.cases[3].name}.* has lost its gradient"):
        prepared[1](None)
