"""How a GPU is used: several of them, streams, a scaler in a graph, checkpoints that move, the wrapper.

make test-gpu. All but the tests of what only a GPU has run on the CPU too. There the two GPUs are one, a stream does
what it is told at once, and a graph is the function that it was captured from.
"""

import io
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import robustft_kernels as rft
from robustft_kernels.backends import registry

SIZES = (5, 300, 20_000)


@pytest.fixture
def two(device):
    """Two GPUs, the first of which is the current one."""
    if device.type == "cpu":
        return [device, device]
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return [torch.device("cuda", 0), torch.device("cuda", 1)]


def make(*places, sizes=SIZES):
    """Parameters that take turns on these devices."""
    generator = torch.Generator("cpu").manual_seed(0)
    start = [torch.randn(n, generator=generator, device="cpu") for n in sizes]
    return [nn.Parameter(p.to(places[k % len(places)])) for k, p in enumerate(start)]


def grads_of(params, t):
    """Gradients that lead back to where the parameters began at every third step, so that SPD pulls there."""
    generator = torch.Generator("cpu").manual_seed(100 + t)
    turn = -1.0 if t % 3 == 2 else 1.0
    draws = [torch.rand(p.shape, generator=generator, device="cpu") for p in params]
    return [turn * (0.1 + draw).to(p) for draw, p in zip(draws, params, strict=True)]


def give_grads(params, t):
    for p, g in zip(params, grads_of(params, t), strict=True):
        p.grad = g


def run(optimizer, params, steps, start=0):
    for t in range(start, start + steps):
        give_grads(params, t)
        optimizer.step()


def assert_bits(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.detach().cpu(), b.detach().cpu())


def sync(*devices):
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


# Several GPUs


def test_parameters_on_another_gpu_than_the_current_one(two, backend):
    found = []
    for place in two:
        params = make(place)
        optimizer = rft.AdamSPD(params, lr=1e-2, backend=backend)
        run(optimizer, params, steps=4)
        assert all(optimizer.state[p]["exp_avg"].device == p.device == params[0].device for p in params)
        found.append(([*params, *(optimizer.state[p]["exp_avg"] for p in params)], optimizer.telemetry()))
        if place.type == "cuda":
            assert torch.cuda.current_device() == 0
    assert_bits(found[1][0], found[0][0])
    assert found[1][1] == found[0][1]
    assert any(of.selections for of in found[0][1].values())


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 3.0}], ids=["plain", "clipped"])
def test_one_optimizer_over_two_gpus(two, backend, options):
    """With a scaler on the first, which finds a gradient of the second infinite."""
    found = []
    for places in (two, two[:1]):
        params = make(*places)
        optimizer = rft.AdamSPD(params, lr=1e-2, backend=backend, **options)
        scaler = torch.amp.GradScaler(two[0].type, init_scale=256.0)
        scaler.scale(torch.ones((), device=two[0]))
        for t in range(5):
            give_grads(params, t)
            if t == 1:
                params[1].grad[3] = torch.inf
            before = [p.detach().clone() for p in params]
            scaler.step(optimizer)
            scaler.update()
            assert all(map(torch.equal, params, before)) == (t == 1)
        assert all(float(optimizer.state[p]["step"]) == 4 for p in params)
        assert scaler.get_scale() == 128.0
        found.append(params)
    if options:  # the norm is a sum over both
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-6, atol=1e-7)
    else:
        assert_bits(*found)


# Streams


class AtOnce:
    """A stream of the CPU."""

    def wait_stream(self, other):
        pass


def streams_on(device, count):
    return [torch.cuda.Stream(device) if device.type == "cuda" else AtOnce() for _ in range(count)]


def on(stream):
    return nullcontext() if isinstance(stream, AtOnce) else torch.cuda.stream(stream)


def test_a_step_is_made_on_the_stream_that_calls_it(device, backend):
    """Gradients come from another stream, and come late. Steps take turns on two streams, and on the default one."""
    plain, late = make(device), make(device)
    there = rft.AdamSPD(plain, lr=1e-2, backend=backend)
    run(there, plain, steps=6)

    optimizer = rft.AdamSPD(late, lr=1e-2, backend=backend)
    maker, *callers = streams_on(device, 3)
    callers.append(torch.cuda.default_stream(device) if device.type == "cuda" else AtOnce())
    values = [grads_of(late, t) for t in range(6)]
    noise = torch.randn(4000 if device.type == "cuda" else 2, 2, device=device)
    for p in late:
        p.grad = torch.full_like(p, torch.nan)
    sync(device)
    last = maker
    for t in range(6):
        caller = callers[t % 3]
        maker.wait_stream(last)
        with on(maker):
            for _ in range(100):
                noise @ noise.T
            for p, g in zip(late, values[t], strict=True):
                p.grad.copy_(g)
        caller.wait_stream(maker)
        with on(caller):
            optimizer.step()
        last = caller
    sync(device)
    assert_bits(late, plain)
    assert_bits([optimizer.state[p]["exp_avg"] for p in late], [there.state[p]["exp_avg"] for p in plain])


# Graphs


def replayable(device, step):
    """A function that does what `step` does. It was called once before, and then captured."""
    if device.type == "cpu":
        step()
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 2.0}], ids=["plain", "clipped"])
def test_a_replayed_step_skips_what_the_scaler_finds_infinite(device, backend, options):
    """The scaler's search for an infinite gradient, the step and the scaler's update are all in the graph."""
    if device.type == "cuda" and not registry.BACKENDS[backend].keeps_addresses:
        pytest.skip("this backend refuses to be captured")
    params, steps, scalers = [], [], []
    for _ in range(2):
        params.append(make(device))
        optimizer = rft.AdamSPD(params[-1], lr=1e-2, backend=backend, capturable=True, **options)
        scalers.append(torch.amp.GradScaler(device.type, init_scale=256.0, growth_interval=2))
        scalers[-1].scale(torch.ones((), device=device))
        for p in params[-1]:
            p.grad = torch.zeros_like(p)

        def step(optimizer=optimizer, scaler=scalers[-1]):
            scaler.step(optimizer)
            scaler.update()

        steps.append(step)

    def fill(t):
        for of in params:
            for p, g in zip(of, grads_of(of, t), strict=True):
                p.grad.copy_(256 * g)
            if t in (2, 3):
                of[1].grad[7] = torch.inf

    fill(0)
    steps[0]()
    steps[1] = replayable(device, steps[1])
    for t in range(1, 7):
        fill(t)
        before = [p.detach().clone() for p in params[1]]
        for step in steps:
            step()
        assert_bits(params[1], params[0])
        assert all(map(torch.equal, params[1], before)) == (t in (2, 3))
        assert scalers[1].get_scale() == scalers[0].get_scale()
    assert float(optimizer.state[params[1][0]]["step"]) == 5
    assert scalers[0].get_scale() == 256.0  # doubled at step 1, halved twice, doubled at step 5


# Checkpoints


@pytest.mark.lean(keep=lambda ours, mapped, **_: mapped == (ours is rft.AdamFTP))
@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("way", ["here to here", "here to CPU", "CPU to here"])
@pytest.mark.parametrize("ours", [rft.AdamSPD, rft.AdamFTP])
def test_a_checkpoint_moves(device, backend, ours, way, mapped):
    """It goes on with the same bits on the same device, and with the same numbers on another."""
    source, target = (torch.device("cpu") if of == "CPU" else device for of in way.split(" to "))
    params = make(source, sizes=SIZES[:2])
    optimizer = ours(params, lr=1e-2, backend=backend if source == device else "reference")
    run(optimizer, params, steps=3)
    file = io.BytesIO()
    torch.save({"model": params, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, map_location=target if mapped else None, weights_only=True)
    moved = [nn.Parameter(p.detach().to(target)) for p in loaded["model"]]
    resumed = ours(moved, lr=3.0, backend=backend if target == device else "reference")
    resumed.load_state_dict(loaded["optimizer"])
    for p, q in zip(params, moved, strict=True):
        kept = optimizer.state[p]
        assert kept.keys() == resumed.state[q].keys()
        for key, value in kept.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(resumed.state[q][key].cpu(), value.cpu()), key
                assert key in ("step", "anchor_digest") or resumed.state[q][key].device == q.device, key
    run(optimizer, params, steps=3, start=3)
    run(resumed, moved, steps=3, start=3)
    if source == target:
        assert_bits(moved, params)
    for p, q in zip(params, moved, strict=True):
        torch.testing.assert_close(q.cpu(), p.cpu(), rtol=1e-5, atol=1e-6)


# Around others, inside backward, compiled


def test_the_wrapper_around_a_fused_step_under_a_scaler(device, backend):
    """It is near AnchoredAdamW, and skips an infinite gradient."""
    mine, other, free = make(device), make(device), make(device)
    ours = rft.AdamSPD(mine, lr=1e-2, strength=1.3, backend=backend)
    inner = torch.optim.AdamW(other, lr=1e-2, weight_decay=0.0, fused=True)
    wrapped = rft.Anchored(inner, strength=1.3, backend=backend)
    plain = torch.optim.AdamW(free, lr=1e-2, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(device.type, init_scale=64.0)
    scaler.scale(torch.ones((), device=device))
    for t in range(6):
        for params in (mine, other, free):
            give_grads(params, t)
        for p in other:
            p.grad.mul_(64)
        ours.step()
        plain.step()
        if t == 3:
            held = [p.grad.clone() for p in other]
            other[1].grad[0] = torch.inf
            before = [p.detach().clone() for p in other]
            scaler.step(wrapped)
            scaler.update(64.0)
            assert all(map(torch.equal, other, before))
            for p, g in zip(other, held, strict=True):
                p.grad = g
        scaler.step(wrapped)
        scaler.update()
    for a, b, c in zip(other, mine, free, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert float((c - b).detach().abs().max()) > 1e-3, "nothing was pulled"
    assert {name: of.selections for name, of in wrapped.telemetry().items()} == {
        name: of.selections for name, of in ours.telemetry().items()
    }


def net(device):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 3)).to(device)


def train(model, optimizer, device, step=None, steps=4):
    generator = torch.Generator("cpu").manual_seed(3)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 12, generator=generator, device="cpu").to(device)
        model(x).square().mean().backward()
        (step or optimizer.step)()
    return list(model.parameters())


def test_steps_inside_backward(device, backend):
    """On a GPU, autograd runs them in a thread of its own."""
    ordinary, inside = net(device), net(device)
    want = train(ordinary, rft.AdamSPD(ordinary.parameters(), lr=1e-2, backend=backend), device)
    optimizer = rft.AdamSPD(inside.parameters(), lr=1e-2, backend=backend)
    with rft.StepInBackward(optimizer):
        assert_bits(train(inside, optimizer, device), want)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # of torch's own
def test_a_compiled_step(device, backend):
    eager, compiled = net(device), net(device)
    want = train(eager, rft.AdamSPD(eager.parameters(), lr=1e-2, backend=backend), device)
    optimizer = rft.AdamSPD(compiled.parameters(), lr=1e-2, backend=backend)
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend="eager")
    assert_bits(train(compiled, optimizer, device, step), want)
    torch._dynamo.reset()


@pytest.mark.parametrize("beside", ["cpu", "model"])
def test_wise_ft(device, beside, taken):
    """The pre-trained weights lie on the CPU, or where the model is. The numbers are those of the CPU."""
    model, plain = net(device), net("cpu")
    pretrained = {name: p.detach().to(device if beside == "model" else "cpu") for name, p in model.named_parameters()}
    pretrained = {name: p.clone() for name, p in pretrained.items()}
    with torch.no_grad():
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            p.add_(0.5)
            q.copy_(p)
    tuned = [p.detach().clone() for p in model.parameters()]
    x = torch.linspace(-1, 1, 24, device="cpu").reshape(2, 12)

    @torch.no_grad()
    def loss(of):
        return float(of(x.to(next(of.parameters()).device)).square().mean())

    results = [rft.wise_sweep(of, pretrained, loss, alphas=(0, 0.5, 1), progress=False) for of in (model, plain)]
    assert results[0] == pytest.approx(results[1], rel=1e-3)
    assert len(set(results[1].values())) == 3
    assert_bits(model.parameters(), tuned)
    rft.wise_ft_(model, pretrained, alpha=0)
    assert_bits(model.parameters(), pretrained.values())


def test_without_a_c_compiler_triton_does_not_serve(device, tmp_path):
    """The CUDA backend needs none. Where it is not ready, the reference serves."""
    if device.type != "cuda":
        pytest.skip("needs a GPU; test_trial.py feigns one")
    if why := rft.backends()["triton"]:
        pytest.skip(f"triton: {why}")
    program = """
import warnings
import torch
import robustft_kernels as rft
param = torch.nn.Parameter(torch.ones(30, device="cuda"))
param.grad = torch.ones_like(param)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    optimizer = rft.AdamSPD([param])
    optimizer.step(), optimizer.step()
assert (param < 1).all()
warned = [str(of.message) for of in caught if "robustft" in str(of.message)]
served = optimizer._plans.current.launches[0].backend.name
if rft.backends()["cuda"]:
    assert served == "reference"
    assert ["Failed to find C compiler" in of for of in warned] == [True], warned
else:
    assert (served, warned) == ("cuda", [])
try:
    rft.AdamSPD([param], backend="triton").step()
except RuntimeError as error:
    assert "Failed to find C compiler" in str(error)
else:
    raise AssertionError("Triton ran")
"""
    env = {k: v for k, v in os.environ.items() if k != "CC"} | {"PATH": "", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], env=env, check=True)
