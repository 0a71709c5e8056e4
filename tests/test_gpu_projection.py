"""What only a GPU can show of projections: no synchronisation, CUDA graphs, streams.

make test-gpu
"""

import warnings
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

import robustft_kernels as rft
from robustft_kernels.backends import registry
from robustft_kernels.core.methods import NORMS

from .plain_projection import norms_of, oracle

SHAPES = ((300, 40), (5,), (), (0, 3), (40_001,), (7, 20_000))


@pytest.fixture(autouse=True)
def _on_a_gpu(device):
    if device.type != "cuda":
        pytest.skip("needs a GPU: make test-gpu")


pytestmark = pytest.mark.usefixtures("taken")  # each backend in turn


@contextmanager
def no_waiting(busy=False):
    """Raises RuntimeError where torch would make the host wait. busy: the GPU has half a second of work first, and an
    AssertionError tells of any wait for it."""
    torch.cuda.synchronize()
    end = torch.cuda.Event()
    if busy:
        torch.cuda._sleep(10**9)
        end.record()
    try:
        with warnings.catch_warnings():  # one says that the mode is a prototype
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        yield
        assert not busy or not end.query(), "the host has waited for the GPU"
    finally:
        torch.cuda.set_sync_debug_mode("default")


def pair(seed=0, dtype=torch.float32, shapes=SHAPES):
    rng = torch.Generator("cpu").manual_seed(seed)
    return tuple([torch.randn(s, generator=rng, device="cpu").to("cuda", dtype) for s in shapes] for _ in range(2))


def radii_for(params, anchors, norm, share=0.6):
    """A radius for each tensor, a float64 on the GPU. Two of three tensors are outside."""
    n = [norms_of(p.double() - a.double(), norm) for p, a in zip(params, anchors, strict=True)]
    return torch.stack([share * k.amax() if k.numel() and i % 3 else k.new_tensor(1e6) for i, k in enumerate(n)])


def expected(params, anchors, radii, norm):
    """By the oracle, on the CPU."""
    tensors = zip(params, anchors, radii.cpu(), strict=True)
    return [oracle(p.detach().cpu().double(), a.cpu().double(), r, norm) for p, a, r in tensors]


def assert_near(params, wanted, dtype=torch.float32):
    for p, want in zip(params, wanted, strict=True):
        torch.testing.assert_close(p.detach().cpu().double(), want, rtol=torch.finfo(dtype).eps * 2, atol=1e-5)


def assert_norms(found, params, anchors, norm):
    for n, p, a in zip(found, params, anchors, strict=True):
        want = norms_of(p.detach().cpu().double() - a.cpu().double(), norm)
        torch.testing.assert_close(n.cpu(), want, rtol=1e-5, atol=1e-12)


def warm(*calls):
    """Makes each call once, on another stream, as one does before a capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_neither_the_first_call_waits_nor_a_later_one(norm, dtype):
    params, anchors = pair(dtype=dtype)
    radii = radii_for(params, anchors, norm)
    wanted = expected(params, anchors, radii, norm)
    gamma, weights = radii.clone().requires_grad_(), [torch.randn_like(p) for p in params]
    for _ in range(2):
        copies = [p.clone() for p in params]
        with no_waiting():
            found = rft.deviation(params, anchors, norm)
            projected = rft.project(params, anchors, gamma, norm)
            loss = sum((w * q).sum(dtype=torch.float64) for w, q in zip(weights, projected, strict=True))
            (slope,) = torch.autograd.grad(loss, gamma)
            rft.project_(copies, anchors, radii, norm)
            rft.project_(copies, anchors, 1e6, norm)
            rft.project_(copies, anchors, [1e6] * len(params), norm)
            rft.interpolate_(copies, anchors, 1.0)
        assert_norms(found, params, anchors, norm)
        assert_near(projected, wanted, dtype)
        assert all(map(torch.equal, copies, projected))
        assert slope.count_nonzero() >= 2


@pytest.mark.parametrize("norm", NORMS)
def test_a_steady_call_builds_no_table(norm, monkeypatch, taken):
    params, anchors = pair()
    radii = radii_for(params, anchors, norm)

    def calls():
        rft.deviation(params, anchors, norm)
        rft.project_(params, anchors, radii, norm)
        rft.interpolate_(params, anchors, radii.clamp(max=1))

    calls()
    monkeypatch.setitem(registry.BACKENDS, taken, replace(registry.BACKENDS[taken], prepare=None))
    if taken == "triton":
        from robustft_kernels.triton_kernels import table

        monkeypatch.setattr(table, "Table", None)
        monkeypatch.setattr(table.DeviceRow, "__init__", None)
    with no_waiting(busy=True):
        calls()


@pytest.mark.parametrize("norm", NORMS)
def test_a_replayed_graph_follows_radii_and_weights(norm):
    params, anchors = pair()
    radii = radii_for(params, anchors, norm)
    start = [p.clone() for p in params]
    warm(
        lambda: rft.project_(params, anchors, radii, norm),
        lambda: rft.deviation(params, anchors, norm),
    )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rft.project_(params, anchors, radii, norm)
        found = rft.deviation(params, anchors, norm)
    for turn in range(1, 4):
        for p, s in zip(params, start, strict=True):
            p.copy_(s * turn)
        radii.copy_(radii_for(params, anchors, norm, share=0.2 * turn))
        wanted = expected(params, anchors, radii, norm)
        graph.replay()
        assert_near(params, wanted)
        assert_norms(found, params, anchors, norm)
        for seed in range(20):  # others take its place among those that are kept
            others, theirs = pair(seed, shapes=((seed + 1, 3),))
            assert_norms(rft.deviation(others, theirs, norm), others, theirs, norm)


def test_a_number_stays_as_it_was_captured():
    params, anchors = pair(shapes=((30, 4),))
    warm(lambda: rft.project_(params, anchors, 0.5))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rft.project_(params, anchors, 0.25)
    params[0].copy_(anchors[0] + 1)
    graph.replay()
    torch.testing.assert_close(
        rft.deviation(params, anchors), torch.tensor([0.25], dtype=torch.float64), rtol=1e-4, atol=0
    )


def test_what_was_not_prepared_cannot_be_captured():
    params, anchors = pair()
    before, counter = [p.clone() for p in params], torch.zeros(())
    rft.project_(before, anchors, 1e6)
    radius = torch.ones((), device="cpu")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        counter.add_(1)  # otherwise the graph is empty, and warns
        with pytest.raises(RuntimeError, match="make the same call once before the capture"):
            rft.project_(params, anchors, 0.5)
        with pytest.raises(RuntimeError, match="make the same call once before the capture"):
            rft.deviation(params, anchors, "mars")
        with pytest.raises(RuntimeError, match="keep radii and alphas in tensors on the device"):
            rft.project_(before, anchors, radius)
    assert all(map(torch.equal, params, before))


@pytest.mark.parametrize("norm", NORMS)
def test_tpgm(norm):
    """It waits only at the end of an update. A graph's projection reads the radii that an update has learned since."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 300), nn.Tanh(), nn.Linear(300, 10))
    anchors = [p.detach().clone() for p in model.parameters()]
    batch, labels = torch.randn(32, 64), torch.randint(0, 10, (32,))
    tpgm = rft.TPGM(model, norm=norm, init=0.05, lr=0.02)

    def train(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn_like(p)

    train(1)
    with no_waiting():
        tpgm.project_()
        tpgm.project_()
    params = list(model.parameters())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tpgm.project_()
    for turn in range(2, 5):
        train(turn)
        before = torch.stack(list(tpgm.radii.values()))
        tpgm.update(lambda of: nn.functional.cross_entropy(model(of[0]), of[1]), [(batch, labels)], steps=3)
        radii = torch.stack(list(tpgm.radii.values()))
        assert not torch.equal(radii, before)
        wanted = expected(params, anchors, radii, norm)
        graph.replay()
        assert_near(params, wanted)


def test_streams_do_not_share_their_scratch():
    params, anchors = pair(shapes=((2000, 2000), (3_000_001,)))
    want = rft.deviation(params, anchors)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    found = []
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(rft.deviation(params, anchors))
    torch.cuda.synchronize()
    assert all(torch.equal(of, want) for of in found)


def test_radii_of_the_host_keep_their_slope():
    params, anchors = pair()
    for radius in (torch.tensor(0.5, device="cpu"), torch.full((len(params),), 0.5, device="cpu")):
        here, there = radius.clone().requires_grad_(), radius.to("cuda").requires_grad_()
        for gamma in (here, there):
            sum(q.square().sum() for q in rft.project(params, anchors, gamma)).backward()
        assert here.grad.is_cpu
        torch.testing.assert_close(here.grad, there.grad.cpu())
        assert here.grad.count_nonzero()
