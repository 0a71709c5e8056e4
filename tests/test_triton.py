"""What the Triton backend alone has: its two forms, its host side, and its cost in launches and uploads."""

import os
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

from .test_steps import assert_bits, settled
from .test_wrapper import far, make, run

pytestmark = pytest.mark.skipif(bool(rft.backends()["triton"]), reason=rft.backends()["triton"] or "ready")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "settings", SETTINGS[:1] + SETTINGS[2:3] + SETTINGS[4:5] + SETTINGS[-2:-1], ids=lambda s: s.name
)
def test_one_launch_gives_the_bits_of_two(device, settings, dtype):
    two = settled(CASES, settings, "spd", dtype, device=device)
    for _ in range(2):  # the second finds counters, flags and cursor as the first left them
        one, grads = two.clone(), two.grads()
        two.run("triton", grads)
        one.run("triton_tickets", grads)
        assert_bits(one, two)
    assert (two.alphas < 1).any()


def test_a_prepared_step_repeats(device):
    """Scratch, counters and the ring of uploads are left fit for the next step, in both forms."""
    for backend in ("triton", "triton_tickets"):
        got = settled(CASES[8:13], SETTINGS[0], "spd", torch.float32, device=device)
        want = got.clone()
        run = registry.prepare(backend, got.table())
        for _ in range(3):
            grads = got.grads()
            run(grads)
            want.run("triton", grads)
            assert_bits(got, want)


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


def test_groups_of_one_class_share_their_launches(device, monkeypatch):
    """Also groups with other rules, options and anchors. Other dtypes are another class."""
    from robustft_kernels.triton_kernels import launch

    kernels = []
    monkeypatch.setattr(launch, "launch", lambda kernel, *args, **kwargs: kernels.append(kernel.__name__))
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
        launch, "launch", lambda kernel, programs, *_, **__: launches.append((kernel.__name__, programs))
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


def test_hyper_parameters_in_tensors_are_read_where_they_are(device):
    """float32 or float64, changed in place between steps, without a word to the host. They act as plain numbers do."""
    start = [torch.randn(700, device=device), torch.randn(20000, device=device)]
    lr, strength = torch.tensor(1e-2, device=device), torch.tensor(1.5, dtype=torch.float64, device=device)
    results = []
    for tensors in (True, False):
        params = [nn.Parameter(p.clone()) for p in start]
        optimizer = rft.AdamSPD(params, lr=lr.fill_(1e-2) if tensors else 1e-2, strength=strength if tensors else 1.5,
                                backend="triton")  # fmt: skip
        generator = torch.Generator("cpu").manual_seed(0)
        for t in range(4):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator, device="cpu").to(device)
            if tensors:
                lr.fill_(1e-2 / (t + 1))
            else:
                optimizer.param_groups[0]["lr"] = torch.tensor(1e-2 / (t + 1)).item()
            optimizer.step()
        if tensors:
            (launch,) = optimizer._plans.current.launches
            assert launch.hyper.table[0, 0] == 0, "the host has read the tensor"
        results.append(params)
    assert all(map(torch.equal, *results))


def test_anchored_state_moves_between_backends(device):
    """Step counts go to the device for the Triton backend, and back."""
    param = nn.Parameter(torch.randn(100, device=device))
    first = rft.AdamSPD([param], backend="triton")
    param.grad = torch.randn_like(param)
    first.step()
    assert first.state[param]["step"].device.type == device.type
    second = rft.AdamSPD([param], backend="reference")
    second.load_state_dict(first.state_dict())
    second.step()
    assert second.state[param]["step"] == 2
    first.load_state_dict(second.state_dict())
    first.step()
    assert first.state[param]["step"] == 3


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

    monkeypatch.setattr(launch, "launch", lambda *_, **__: None)
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
            sys.setprofile(lambda frame, event, _: calls.update([frame.f_code] * (event == "call")))
            try:
                optimizer.step()
            finally:
                sys.setprofile(None)
        host = optimizer._plans.current.launches[0]._run._classes[0][0]._row._sent
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


def test_first_arguments_that_fit_nothing(device):
    stepper = Stepper(CASES[7:9], SETTINGS[0], "spd", torch.float32, device=device)
    run = registry.prepare("triton", stepper.table())
    with pytest.raises(ValueError, match="2 params but 1 grads"):
        run(stepper.grads()[:1])
    expected = r"grad of params\[0\], case 'tile, .*', must be of shape \(1105,\) .*, got .* of shape \(1104,\)"
    with pytest.raises(ValueError, match=expected):
        run([g[1:] for g in stepper.grads()])


def test_rows_take_their_own_launches(device, monkeypatch):
    """One for rows that are decided in one program, sweep 2 for those that wait, and a survey for FTP and MARS-SP."""
    from robustft_kernels.triton_kernels import launch

    kernels = []
    monkeypatch.setattr(launch, "launch", lambda kernel, *args, **kwargs: kernels.append(kernel.__name__))
    for options, shape, expected in (
        ({"method": "project", "norm": "mars_rows", "radius": 1.0}, (30, 100), ["row_step"]),
        ({"method": "project", "norm": "mars_rows", "radius": 1.0}, (40000,), ["row_step", "row_pull"]),
        ({"method": "project", "norm": "mars", "radius": 1.0}, (30, 100), ["row_step", "row_pull"]),
        ({"method": "ftp"}, (30, 100), ["row_survey", "row_step"]),
        ({"method": "mars_sp"}, (30, 100), ["row_survey", "row_step"]),
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


def _uninterpreted():
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


@pytest.mark.parametrize("pull", [{"strength": 1.3}, {"method": "project", "radius": 0.1, "norm": "mars_rows"}])
@pytest.mark.parametrize("wrap", [False, True])
def test_telemetry_and_the_wrapper(device, wrap, pull):
    """They are as in the reference, up to the roundings that the two do in different orders."""
    options = {"method": "spd", **pull}
    found = {}
    for backend in ("triton", "reference"):
        params = [nn.Parameter(p.detach().to(device)) for p in make(torch.float32)]
        if wrap:
            optimizer = rft.Anchored(torch.optim.AdamW(params, lr=1e-2), backend=backend, **options)
        else:
            optimizer = rft.AnchoredAdamW(params, lr=1e-2, weight_decay=1e-2, backend=backend, **options)
        run(optimizer, params, steps=4)
        found[backend] = params, optimizer.telemetry()
    assert far(found["triton"][0], found["reference"][0]) <= 16
    for name, of in found["reference"][1].items():
        assert found["triton"][1][name] == pytest.approx(of, abs=1e-4, rel=1e-4, nan_ok=True), name
    assert any(float(of.selections) > 0 for of in found["triton"][1].values())
