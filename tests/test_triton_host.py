"""The host side of the Triton backend: the order of tasks, classes of tensors, launches and uploads, and their cost."""

import gc
import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
from robustft_kernels.triton_kernels.table import SPARES, DeviceRow
from torch import nn

import robustft_kernels as rft
from robustft_kernels.backends import native, registry
from robustft_kernels.backends import triton as triton_backend
from robustft_kernels.testing import CASES, SETTINGS, Stepper
from robustft_kernels.testing.cases import misaligned

from .test_steps import settled

pytestmark = pytest.mark.skipif(bool(rft.backends()["triton"]), reason=rft.backends()["triton"] or "ready")


def test_schedule_never_waits_for_what_comes_later():
    from robustft_kernels.triton_kernels.launch import schedule

    for lag in (0, 3, 1000):
        tasks = schedule([4, 5, 11], 11, 17, lag)
        assert sorted(tasks) == sorted([2 * c for c in range(17)] + [2 * c + 1 for c in range(11)])
        for begin, end in ((0, 4), (4, 5), (5, 11)):
            last_step = max(tasks.index(2 * c) for c in range(begin, end))
            pulls = [tasks.index(2 * c + 1) for c in range(begin, end)]
            assert min(pulls) > last_step
            assert pulls == sorted(pulls, reverse=True)
    assert schedule([], 0, 3, 8) == [0, 2, 4]


VIT_L = [1024 * 4096, 4096, 4096 * 1024, 1024, 3072 * 1024, 3072, 1024 * 1024, 1024, *[1024] * 4] * 24


def test_between_a_step_and_its_pull_little_passes():
    """In the one-launch form, on an H100 with ViT-L's tensors. Counted are the bytes of θ and θ₀ that sweep 1 touches
    from a chunk's step to its pull. g, m and v leave the cache first, by their eviction policy. Half of 50 MB of cache
    belongs to the other half of the SMs, so up to 40 MB may hope to be found."""
    from robustft_kernels.triton_kernels.chunk import SHORT_CHUNK
    from robustft_kernels.triton_kernels.launch import LAG, PROGRAMS, schedule

    sizes = sorted(VIT_L, key=lambda n: n <= SHORT_CHUNK)
    chunks = [-(-n // SHORT_CHUNK) for n in sizes]
    ends = [sum(chunks[: k + 1]) for k, n in enumerate(sizes) if n > SHORT_CHUNK]
    passed, stepped = 0, {}
    worst = {}
    owner = [k for k, n in enumerate(chunks) for _ in range(n)]
    for task in schedule(ends, ends[-1], sum(chunks), LAG * PROGRAMS * 132):
        chunk = task // 2
        if task % 2 == 0:
            stepped[chunk] = passed
            passed += 8 * min(SHORT_CHUNK, sizes[owner[chunk]])
        else:
            size = sizes[owner[chunk]]
            worst[size] = max(worst.get(size, 0), passed - stepped[chunk])
    assert worst.keys() == {n for n in VIT_L if n > SHORT_CHUNK}
    assert all(between < 40e6 for size, between in worst.items() if size < 3.2e6), worst
    assert all(between < 48e6 for between in worst.values()), worst


@pytest.mark.parametrize("stream", ["grad", "anchor"])
def test_only_what_is_not_aligned_is_read_in_narrow_accesses(device, stream):
    """As a gradient in a bucket of DDP behind an odd parameter. Gradients may come to lie so at any step, and are then
    narrow for their class. A tensor whose anchor lies so is a class of its own."""
    values = [torch.randn(40000, device=device) for _ in range(2)]
    anchors = [torch.zeros_like(of) for of in values]
    if stream == "anchor":
        anchors[0] = misaligned(anchors[0])
    params = [nn.Parameter(of) for of in values]
    optimizer = rft.AdamSPD(params, anchor=anchors, backend="triton")

    def counted_on():
        optimizer.step()
        variants = [of.table.variant for of in optimizer._plans.current.launches[0]._run._classes]
        return sorted((v.GRAD_ALIGNED.value, v.ANCHOR_ALIGNED.value) for v in variants)

    for p in params:
        p.grad = torch.randn_like(p)
    if stream == "anchor":
        assert counted_on() == [(True, False), (True, True)]
        return
    assert counted_on() == [(True, True)]
    params[0].grad = misaligned(params[0].grad)
    assert counted_on() == [(False, True)]
    params[0].grad = params[0].grad.clone()
    assert counted_on() == [(True, True)]


def test_groups_of_one_class_share_their_launches(device, monkeypatch):
    """Also groups with other rules, options and anchors. Other dtypes are another class."""
    from robustft_kernels.triton_kernels import launch

    kernels = []
    monkeypatch.setattr(launch, "started_by", lambda kernel, *_: lambda *_: kernels.append(kernel.__name__))
    params = [nn.Parameter(torch.randn(40000, device=device)) for _ in range(5)]
    groups = [
        {"params": params[:1], "method": "none", "amsgrad": True},
        {"params": params[1:2], "method": "spd"},
        {"params": params[2:3], "method": "l2sp", "anchor": "zero", "maximize": True},
        {"params": params[3:4], "method": "spd", "anchor": [torch.zeros(40000, device=device)], "weight_decay": 0.1},
    ]
    optimizer = rft.AnchoredAdamW(groups, backend="triton")
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert kernels == ["step_sweep", "pull_sweep"]
    params[4].data = params[4].data.bfloat16()
    params[4].grad = torch.randn_like(params[4])
    optimizer.add_param_group({"params": params[4:], "method": "none"})
    kernels.clear()
    optimizer.step()
    assert kernels == ["step_sweep", "pull_sweep", "step_sweep"]


@pytest.mark.parametrize("form", ["triton", "triton_tickets"])
@pytest.mark.parametrize("tensors", [1, 150, 2000])
def test_launches_and_uploads_do_not_grow_with_tensors(device, monkeypatch, form, tensors):
    """With a mock launcher. The number of launches does not depend on the number of tensors. A steady step builds no
    table. It uploads one row if a gradient moved or a hyper-parameter changed, else none."""
    from robustft_kernels.triton_kernels import launch, table

    launches, built = [], []
    monkeypatch.setattr(
        launch, "started_by", lambda kernel, programs, *_: lambda *_: launches.append((kernel.__name__, programs))
    )
    init = table.Table.__init__
    monkeypatch.setattr(table.Table, "__init__", lambda self, *args: (built.append(self), init(self, *args))[1])
    params = [nn.Parameter(torch.zeros(16384 + 1, device=device)) for _ in range(tensors)]
    optimizer = rft.AdamSPD(params, backend=form)
    expected = ["step_sweep", "pull_sweep"] if form == "triton" else ["ticket_sweep"]
    sends = 0
    for moved, lr, uploads in ((True, 1e-3, 1), (True, 1e-3, 1), (False, 1e-3, 0), (False, 5e-4, 1), (True, 2e-4, 1)):
        if moved:
            kept = [p.grad for p in params]  # otherwise the allocator gives their addresses again
            for p in params:
                p.grad = torch.zeros_like(p)
        optimizer.param_groups[0]["lr"] = lr
        launches.clear()
        optimizer.step()
        assert [name for name, _ in launches] == expected
        assert len(built) == 1
        sends += uploads
        assert built[0]._row.sends == sends
    if form == "triton":
        assert launches[0][1] == 2 * tensors
    del kept


def test_each_captured_send_has_a_buffer_of_its_own(monkeypatch):
    """A GPU is feigned. Graphs replay their copies later, so what one sent must not be overwritten by the next."""
    monkeypatch.setattr(DeviceRow, "_slot", lambda row: (torch.zeros(row.device.numel(), dtype=torch.int64), Done()))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    row, capturing = DeviceRow(4, torch.device("cpu")), False
    row._cuda = True

    def send(value):
        buffer = row.host()
        buffer.fill_(value)
        row.send()
        return buffer

    send(-1)  # outside, which makes the spare buffers
    capturing = True
    sent = [send(k) for k in range(SPARES)]
    assert [int(buffer[0]) for buffer in sent] == list(range(SPARES))
    with pytest.raises(RuntimeError, match="make a step outside between captures"):
        row.host()
    capturing = False
    send(-1)
    capturing = True
    send(SPARES)
    assert [int(buffer[0]) for buffer in sent] == list(range(SPARES))


class Done:
    """An event that has passed."""

    def query(self):
        return True

    def record(self):
        pass


def test_without_the_extension_no_python_runs_for_each_tensor(device, monkeypatch):
    """The calls of Python functions in a steady step, with gradients that move. Each took a microsecond for each of
    2,000 tensors."""
    from robustft_kernels.triton_kernels import launch

    monkeypatch.setattr(launch, "started_by", lambda *_: lambda *_: None)
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(native, "MISSING", "for this test")

    def calls_of(tensors):
        params = [nn.Parameter(torch.zeros(30, device=device)) for _ in range(tensors)]
        optimizer, calls, kept = rft.AdamSPD(params, backend="triton"), Counter(), []
        for _ in range(3):
            kept.append([torch.zeros_like(p) for p in params])
            for p, grad in zip(params, kept[-1], strict=True):
                p.grad = grad
            calls.clear()
            gc.disable()  # or what it calls back, hypothesis among others, is counted
            sys.setprofile(lambda frame, event, _: calls.update([frame.f_code] * (event == "call")))
            try:
                optimizer.step()
            finally:
                sys.setprofile(None)
                gc.enable()
        host = optimizer._plans.current.launches[0]._run._classes[0].table._row._sent
        assert host[:tensors].tolist() == [p.grad.data_ptr() for p in params]
        return calls

    assert calls_of(20) == calls_of(50)


def test_a_slow_host_is_told_once(device, monkeypatch):
    stepper = Stepper(CASES[:4], SETTINGS[0], "spd", torch.float32, device=device)
    monkeypatch.setattr(triton_backend, "MISSING", "no compiler")
    monkeypatch.setattr(triton_backend, "interpreted", lambda: False)
    triton_backend._tell_of_slow_host.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"the C\+\+ extension is absent \(no compiler\)"):
        triton_backend.prepare(stepper.table(), tickets=False)
    triton_backend.prepare(stepper.table(), tickets=True)  # a second warning would be an error


def test_rows_take_their_own_launches(device, monkeypatch):
    """One for rows that are decided in one program, sweep 2 for those that wait, and a survey for FTP and MARS-SP."""
    from robustft_kernels.triton_kernels import launch

    kernels = []
    monkeypatch.setattr(launch, "started_by", lambda kernel, *_: lambda *_: kernels.append(kernel.__name__))
    for options, shape, expected in (
        ({"method": "project", "norm": "mars_rows", "radius": 1.0}, (30, 100), ["row_step"]),
        ({"method": "project", "norm": "mars_rows", "radius": 1.0}, (40000,), ["row_step", "row_pull"]),
        ({"method": "project", "norm": "mars", "radius": 1.0}, (30, 100), ["row_step", "row_pull"]),
        ({"method": "ftp"}, (30, 100), ["row_survey", "row_step"]),
        ({"method": "mars_sp"}, (30, 100), ["row_survey", "row_step"]),
        ({"method": "digrap"}, (30, 100), ["survey_sweep", "step_sweep"]),
    ):
        param = nn.Parameter(torch.randn(shape, device=device))
        param.grad = torch.randn_like(param)
        kernels.clear()
        rft.AnchoredAdamW([param], backend="triton", **options).step()
        assert kernels == expected, options


def test_the_whole_host_side_up_to_the_driver():
    """Triton's own binding, specialisation and compilation for sm_90, with a driver that launches nothing. The two
    kernels of a class are compiled once, and serve changed lr, other shapes and more tensors too."""
    out = subprocess.run(
        [sys.executable, "-m", "tests.fake_driver"], capture_output=True, text=True, check=False, env=_uninterpreted()
    )
    assert out.returncode == 0, out.stderr[-4000:]
    assert out.stdout.splitlines() == [
        "step_sweep 3, pull_sweep 2",
        "step_sweep 3, pull_sweep 2",
        "step_sweep 9, pull_sweep 8",
        "compiled: 2",
    ]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_kernels_start_through_tritons_own_c_code(tmp_path):
    """It takes addresses for tensors. A libcuda that does nothing tells what it was given."""
    program = """
import torch
from torch import nn
import robustft_kernels as rft
from tests.ptx.device import feign
from tests.trial_program import driver
feign(driver())
params = [nn.Parameter(torch.zeros(20000))]
optimizer = rft.AdamSPD(params, backend="triton")
for _ in range(2):
    params[0].grad = torch.zeros_like(params[0])
    optimizer.step()
table = optimizer._plans.current.launches[0]._run._classes[0].table
print(table.tensors.data_ptr(), table.grads.data_ptr(), table.owners.data_ptr())
"""
    folder = str(tmp_path)
    subprocess.run([sys.executable, "-m", "tests.trial_program", folder], check=True, env=_uninterpreted())
    env = {**_uninterpreted(), "TRITON_LIBCUDA_PATH": folder, "LD_LIBRARY_PATH": folder, "TOLD": "2"}
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=env)
    assert out.returncode == 0, out.stderr[-4000:]
    tensors, grads, owners = out.stdout.split()
    step, pull = f"launched 2 {tensors} {grads}", f"launched 2 {tensors} {owners}"
    assert [line for line in out.stderr.splitlines() if line.startswith("launched")] == [step, pull, step, pull]


def _uninterpreted():
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def test_a_kernel_is_looked_up_once_for_each_kind_of_call(device, monkeypatch):
    """A gradient scaler may come, and go, and clipping brings another dtype. Each is compiled for anew, and found
    again."""
    from robustft_kernels.triton_kernels import launch

    found, real = [], launch.started_by
    monkeypatch.setattr(
        launch, "started_by", lambda kernel, *rest: (found.append(kernel.__name__), real(kernel, *rest))[1]
    )
    got = settled(CASES[8:13], SETTINGS[0], "spd", torch.float32, device=device)
    run, grads = registry.prepare("triton", got.table()), got.grads()
    none, single, double = None, torch.ones((), device=device), torch.ones((), dtype=torch.float64, device=device)
    for scale, inf, more in (
        (none, none, ["step_sweep", "pull_sweep"]),
        (none, none, []),
        (single, none, ["step_sweep"]),
        (double, none, ["step_sweep"]),
        (single, torch.zeros_like(single), ["step_sweep", "pull_sweep"]),
        (single.clone(), torch.zeros_like(single), []),
        (none, none, []),
    ):
        found.clear()
        run(grads, scale, inf)
        assert found == more


def test_starting_a_kernel_asks_the_driver_alone():
    """Once a kernel is compiled, Triton's own look-up does not run again."""
    program = """
from tests.fake_driver import NotingDriver, feign, launches
from robustft_kernels.triton_kernels import launch
import torch, triton
from torch import nn
import robustft_kernels as rft
feign(NotingDriver())
params = [nn.Parameter(torch.zeros(20000))]
optimizer = rft.AdamSPD(params, backend="triton")
def step():
    params[0].grad = torch.zeros_like(params[0])
    optimizer.step()
step()
def never(*args, **kwargs):
    raise AssertionError("Triton looked a kernel up again")
triton.runtime.jit.JITFunction.run = never
step()
print(launches)
"""
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=_uninterpreted()
    )
    assert out.returncode == 0, out.stderr[-4000:]
    assert out.stdout.strip() == str(["step_sweep 2", "pull_sweep 2"] * 2)
