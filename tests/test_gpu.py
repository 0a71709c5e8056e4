"""What only a GPU can show: repeatable bits, CUDA graphs, no synchronisation, large tensors, the sanitizers.

make test-gpu
"""

import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import robustft_kernels as rft
from robustft_kernels.testing import CASES, SETTINGS, Case

from .test_steps import assert_bits, settled


@pytest.fixture(autouse=True)
def _on_a_gpu(device):
    if device.type != "cuda":
        pytest.skip("needs a GPU: make test-gpu")


LARGE = (*CASES, Case("large", (3_000_001,)), Case("many chunks", (400 * 16384,)))


def optimizer_of(form, sizes=(5, 300, 40_000, 1_000_003), dtype=torch.float32, **kwargs):
    generator = torch.Generator("cpu").manual_seed(0)
    params = [nn.Parameter(torch.randn(n, generator=generator, device="cpu").to("cuda", dtype)) for n in sizes]
    return params, rft.AdamSPD(params, backend=form, **kwargs)


def give_grads(params, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, device="cuda").to(p.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["adamw, decay", "adamw, amsgrad, bf16 state", "adamw, master"])
def test_bits_repeat_50_times(form, dtype, name):
    """Beside other work, chunks arrive in another order each time."""
    settings = next(settings for settings in SETTINGS if settings.name == name)
    start = settled(LARGE, settings, "spd", dtype)
    grads, first = start.grads(), start.clone()
    first.run(form, grads)
    assert (first.alphas < 1).any()
    noise, beside = torch.randn(2000, 2000), torch.cuda.Stream()
    for _ in range(50):
        again = start.clone()
        torch.cuda.synchronize()
        with torch.cuda.stream(beside):
            noise @ noise
        again.run(form, grads)
        assert_bits(again, first)


OPTIONS = {
    "plain": {},
    "clipped": {"max_grad_norm": 3.0},
    "master": {"dtype": torch.bfloat16, "master_weights": True},
    "bf16 state": {"state_dtype": torch.bfloat16},
    "host anchors": {"anchor_device": "cpu"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_replayed_graph_follows_lr_and_gradients(form, options):
    eager, plain = optimizer_of(form, **options)
    captured, graphed = optimizer_of(form, lr=torch.tensor(1e-3, device="cuda"), capturable=True, **options)
    lr = graphed.param_groups[0]["lr"]
    static = [torch.zeros_like(p) for p in captured]

    def both(t, run):
        plain.param_groups[0]["lr"] = torch.tensor(1e-2 / (t + 1)).item()
        lr.fill_(1e-2 / (t + 1))
        give_grads(eager, t)
        for g, p, q in zip(static, eager, captured, strict=True):
            g.copy_(p.grad)
            q.grad = g
        plain.step()
        run()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both(0, graphed.step)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.step()
    for t in range(1, 6):
        both(t, graph.replay)
        assert all(map(torch.equal, captured, eager))
    both(6, graphed.step)  # without the graph again; the graph stays fit for more
    both(7, graph.replay)
    assert all(map(torch.equal, captured, eager))
    assert float(graphed.state[captured[0]]["step"]) == 8


def test_graphs_captured_in_a_row_keep_their_own_gradients(form):
    """Without a step between their captures. And two steps in one capture. Then with a step between captures, and
    replays in another order."""
    eager, plain = optimizer_of(form)
    captured, graphed = optimizer_of(form, capturable=True)
    sets = [[torch.randn_like(p) for p in eager] for _ in range(2)]

    def step(params, optimizer, *which):
        for k in which:
            for p, g in zip(params, sets[k], strict=True):
                p.grad = g
            optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(captured, graphed, 0)
    torch.cuda.current_stream().wait_stream(side)
    step(eager, plain, 0)
    graphs = []
    for which in ((0,), (1,), (0, 1)):
        graphs.append((torch.cuda.CUDAGraph(), which))
        with torch.cuda.graph(graphs[-1][0]):
            step(captured, graphed, *which)
    for graph, which in graphs:
        graph.replay()
        step(eager, plain, *which)
        assert all(map(torch.equal, captured, eager)), which
    step(captured, graphed, 1)
    step(eager, plain, 1)
    graphs.append((torch.cuda.CUDAGraph(), (1, 0)))
    with torch.cuda.graph(graphs[-1][0]):
        step(captured, graphed, 1, 0)
    for graph, which in reversed(graphs):
        graph.replay()
        step(eager, plain, *which)
        step(captured, graphed, 0)
        step(eager, plain, 0)
        assert all(map(torch.equal, captured, eager)), which


def test_capture_must_be_permitted(form):
    params, optimizer = optimizer_of(form)
    give_grads(params, 0)
    optimizer.step()
    counter = torch.zeros(())
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        counter.add_(1)  # otherwise the graph is empty, and warns
        with pytest.raises(RuntimeError, match="capturable=False"):
            optimizer.step()


def keep_busy():
    """Gives the GPU half a second of work. Returns the mark at its end."""
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)
    end = torch.cuda.Event()
    end.record()
    return end


def test_a_steady_step_neither_waits_nor_allocates(form):
    """Even with gradients that move, a schedule, and the tensors of a gradient scaler. torch tells of its own waits
    alone, so the GPU is busy too: six steps are under way before it comes to the first."""
    params, optimizer = optimizer_of(form, sizes=(300,) * 200 + (100_000,) * 5)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    streams = [[torch.randn_like(p) for p in params] for _ in range(3)]

    def step(t):
        for p, g in zip(params, streams[t % 3], strict=True):
            p.grad = g
        optimizer.param_groups[0]["lr"] = 1e-3 / (t + 1)
        optimizer.step()

    for t in range(6):
        step(t)
    keep_busy()
    for t in range(6, 12):  # room for what so many steps send is made once
        step(t)
    end = keep_busy()
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    try:
        with warnings.catch_warnings():  # one says that the mode is a prototype
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        for t in range(12, 18):
            step(t)
        assert not end.query(), "the host has waited for the GPU"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated


def test_anchors_in_host_memory_give_the_bits_of_those_on_the_device(form):
    near, there = optimizer_of(form)
    far, host = optimizer_of(form, anchor_device="cpu")
    anchors = [host.state[p]["anchor"] for p in far]
    assert all(anchor.is_cpu and anchor.is_pinned() for anchor in anchors)
    for t in range(5):
        give_grads(near, t)
        for p, q in zip(near, far, strict=True):
            q.grad = p.grad
        there.step()
        host.step()
        assert all(map(torch.equal, far, near))
    assert any(of.selections for of in host.telemetry().values())


def test_clipping_is_that_of_torch(form):
    """The norm agrees to the rounding of torch's float32 sum of 10⁶ squares. Ours is in float64."""
    mine, clipping = optimizer_of(form, max_grad_norm=3.0)
    theirs, clipped = optimizer_of(form)
    for t in range(3):
        give_grads(mine, t)
        for p, q in zip(mine, theirs, strict=True):
            q.grad = p.grad.clone()
        clipping.step()
        norm = nn.utils.clip_grad_norm_(theirs, 3.0)
        clipped.step()
        assert clipping.grad_norm.is_cuda
        torch.testing.assert_close(clipping.grad_norm.float(), norm, rtol=1e-5, atol=0)
        for p, q in zip(mine, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_more_than_2_to_the_31_elements(form):
    n = 2**31 + 77
    if torch.cuda.mem_get_info()[0] < 5 * 2 * n:
        pytest.skip("needs 22 GB of free GPU memory")
    param = nn.Parameter(torch.full((n,), 2.0, dtype=torch.bfloat16))
    anchor = torch.full((n,), 1.0, dtype=torch.bfloat16)
    optimizer = rft.SGDSPD([param], lr=0.5, strength=1e10, anchor=[anchor], backend=form)
    # All entries but a few move away from the anchor. Those few are in the middle and beyond 2³¹. They are so far out
    # that they do not move as stored, and they make ⟨g, d⟩ positive.
    param.grad = torch.full((n,), -1.0, dtype=torch.bfloat16)
    places = [5, 2**31 - 1, 2**31, n - 1]
    param.data[places] = 2.0**31
    param.grad[places] = 2.0
    optimizer.step()
    (launch,) = optimizer._plans.current.launches
    firing, delta_sq, gain = launch.measures[0].tolist()
    assert firing == pytest.approx(8 * (2.0**31 - 1) - (n - 4), rel=1e-5)
    assert delta_sq == pytest.approx(4 * (2.0**31 - 1) ** 2 + (n - 4), rel=1e-5)
    assert gain == pytest.approx((n - 4) * (1.5**2 - 1), rel=1e-3)
    alpha = float(launch.alphas[0])
    values = param.detach()
    before, after = delta_sq**0.5, (delta_sq + gain) ** 0.5
    assert alpha == pytest.approx(1 - 1e10 * gain / (before + after) / after, rel=1e-6)
    assert 0.2 < alpha < 0.3
    for k in (0, 6, 2**31 - 2, 2**31 + 1, n - 2):
        assert float(values[k]) == pytest.approx(1 + alpha * 1.5, rel=2**-8)
    for k in places:
        assert float(values[k]) == pytest.approx(alpha * 2.0**31, rel=2**-7)
    assert (values[2**31 + 1 : n - 1] == values[0]).all()


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool, form):
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    program = """
import sys
import torch
from robustft_kernels.testing import CASES, SETTINGS
from tests.test_steps import settled
torch.set_default_device("cuda")
for dtype in (torch.float32, torch.bfloat16):
    for settings, method, norm in ((SETTINGS[0], "spd", "l2"), (SETTINGS[2], "spd", "l2"), (SETTINGS[0], "ftp", None)):
        settled(CASES, settings, method, dtype, backend=sys.argv[1], norm=norm)
torch.cuda.synchronize()
"""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", program, form]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stdout[-3000:] + out.stderr[-3000:]
