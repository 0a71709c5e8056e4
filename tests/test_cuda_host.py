"""The host side of the CUDA backend, by a driver that launches nothing: kernels, copies, memory, refusals, and time."""

import ctypes
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import robustft_kernels as rft
from robustft_kernels.backends import built, cuda, native, registry
from robustft_kernels.testing import LEAN_CASES, SETTINGS, Stepper

from .ptx.driver import Driver, feigned

pytestmark = pytest.mark.skipif(bool(native.MISSING), reason=native.MISSING or "ready")
HERE = Path(__file__).parent


class Log(Driver):
    """Notes the kernels of each step."""

    def __init__(self):
        self.kernels = []
        super().__init__(lambda name, programs, threads, parameters: self.kernels.append(name))

    def take(self):
        taken, self.kernels = self.kernels, []
        return taken


@pytest.fixture
def driver():
    with feigned(Log()) as driver:
        yield driver


def optimizer_of(shapes, dtype=torch.float32, base=rft.AdamSPD, **options):
    params = [nn.Parameter(torch.full(shape, 0.1, dtype=dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.ones_like(p)
    return params, base(params, backend="cuda", **options)


SHORT, LONG = (300,), (70000,)
STEPS = {
    "one launch if nothing is longer than a chunk": ([SHORT] * 30, {}, ["step_adamw_f32"]),
    "two for any number": ([SHORT, LONG] * 30, {}, ["step_adamw_f32", "pull_any"]),
    "bf16": ([LONG], dict(dtype=torch.bfloat16), ["step_adamw_bf16", "pull_any"]),
    "f64": ([LONG], dict(dtype=torch.float64), ["step_adamw_any64", "pull_any64"]),
    "f16": ([LONG], dict(dtype=torch.float16), ["step_adamw_any", "pull_any"]),
    "an anchor in bf16": ([LONG], dict(anchor_dtype=torch.bfloat16), ["step_adamw_f32_anchor16", "pull_any"]),
    "an anchor in f16": ([LONG], dict(anchor_dtype=torch.float16), ["step_adamw_any", "pull_any"]),
    "amsgrad": ([SHORT], dict(amsgrad=True), ["step_adamw_any"]),
    "stochastic": ([SHORT], dict(dtype=torch.bfloat16, stochastic_rounding=True), ["step_adamw_any"]),
    "masters": ([SHORT], dict(dtype=torch.bfloat16, master_weights=True), ["step_adamw_any"]),
    "bf16 moments": ([SHORT], dict(state_dtype=torch.bfloat16), ["step_adamw_any"]),
    "8-bit moments": ([(9, 64)], dict(state_dtype="8bit"), ["step_adamw_any8"]),
    "8-bit moments, rows": ([(40, 320)] * 3, dict(state_dtype="8bit", method="ftp"),
                            ["survey_adamw_any", "rows_adamw_any8"]),
    "8-bit moments of what has no blocks": ([SHORT], dict(state_dtype="8bit"), ["step_adamw_f32"]),
    "l2sp": ([LONG], dict(method="l2sp"), ["step_adamw_any"]),
    "no method": ([LONG], dict(method="none"), ["step_adamw_f32"]),
    "SGD": ([LONG], dict(base=rft.SGDSPD, lr=0.1), ["step_sgd_f32", "pull_any"]),
    "rows": ([(40, 300)], dict(norm="mars_rows"), ["rows_adamw_any"]),
    "long rows": ([(2, 70000)], dict(norm="mars_rows"), ["rows_adamw_any", "pull_any"]),
    "one alpha for rows": ([(400, 300)], dict(method="project", norm="mars", radius=1), ["rows_adamw_any", "pull_any"]),
    "FTP": ([(40, 300)] * 3, dict(method="ftp"), ["survey_adamw_any", "rows_adamw_any"]),
    "MARS-SP": ([(40, 300)], dict(method="mars_sp"), ["survey_adamw_any", "rows_adamw_any"]),
    "DiGraP": ([(40, 300)], dict(method="digrap"), ["survey_adamw_any", "step_adamw_any"]),
}  # fmt: skip


@pytest.mark.parametrize("case", STEPS)
def test_launches_and_copies_of_a_step(driver, case):
    """A copy for what never changes, and one for what the first step brings. Then one if something has moved, or a
    schedule has changed a number, and no memory is pinned any more."""
    shapes, options, kernels = STEPS[case]
    params, optimizer = optimizer_of(shapes, **options)
    optimizer.step()
    assert driver.take() == kernels
    assert len(driver.copies) == 2
    pinned = set(driver.pinned)

    def copies():
        driver.copies.clear()
        optimizer.step()
        assert driver.take() == kernels
        return len(driver.copies)

    assert copies() == 0
    params[-1].grad = torch.ones_like(params[-1])
    assert copies() == 1
    optimizer.param_groups[0]["lr"] *= 0.5
    assert copies() == 1
    assert copies() == 0
    assert set(driver.pinned) == pinned


def test_classes_of_dtype_and_of_rows_have_launches_of_their_own(driver):
    one, two = (nn.Parameter(torch.full((40, 1000), 0.1)) for _ in range(2))
    three = nn.Parameter(torch.ones(70000, dtype=torch.bfloat16))
    for p in (one, two, three):
        p.grad = torch.ones_like(p)
    optimizer = rft.AdamSPD([{"params": [one, three]}, {"params": [two], "norm": "mars_rows"}], backend="cuda")
    optimizer.step()
    assert driver.take() == ["step_adamw_f32", "step_adamw_bf16", "rows_adamw_any", "pull_any", "pull_any"]


def test_clipping_is_one_more_launch_and_copy(driver):
    _, optimizer = optimizer_of([SHORT, LONG], max_grad_norm=1.0)
    optimizer.step()
    assert driver.take() == ["norm_any", "step_adamw_f32", "pull_any"]


def test_a_ring_grows_while_copies_are_under_way(driver):
    params, optimizer = optimizer_of([SHORT])
    optimizer.step()
    before = len(driver.pinned)
    driver.pending = True
    for k in range(3):
        params[0].grad = torch.full_like(params[0], k)
        optimizer.step()
        assert len(driver.pinned) == before + k + 1
    driver.pending = False
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert len(driver.pinned) == before + 3


def test_what_a_graph_has_captured_keeps_its_buffer(driver):
    """Its copy runs again at each replay. Memory cannot be pinned under capture, so spares are ready."""
    _, optimizer = optimizer_of([SHORT])
    optimizer.step()
    before = set(driver.pinned)
    driver.copies.clear()
    driver.capturing = True
    for _ in range(8):
        optimizer.step()
    assert len(driver.copies) == 8, "each graph has a copy of its own"
    with pytest.raises(RuntimeError, match=r"have captured 8 sends .* make a step outside between captures"):
        optimizer.step()
    driver.capturing = False
    for copies in (9, 10):
        optimizer.step()
        assert len(driver.copies) == copies, "a replay may have overwritten what was sent"
    assert before < set(driver.pinned), "spares are replaced"
    driver.capturing = True
    optimizer.step()


def test_memory_is_given_back(driver):
    _, optimizer = optimizer_of([SHORT])
    optimizer.step()
    assert driver.pinned
    del optimizer
    assert not driver.pinned


def table(**changed):
    stepper = Stepper(LEAN_CASES, SETTINGS[0], "spd", torch.float32)
    of = stepper.table()
    tensors = [replace(of.tensors[0], **changed), *of.tensors[1:]]
    return replace(of, tensors=tensors), stepper.grads()


WRONG = {
    "a moment of another dtype": (
        lambda t: dict(state={**t.state, "exp_avg": t.state["exp_avg"].half()}),
        "exp_avg of params\\[0\\], case .* must be",
    ),
    "an anchor of another shape": (lambda t: dict(anchor=torch.ones(3, 7)), "anchor of params\\[0\\]"),
    "no moment": (lambda t: dict(state={}), "params\\[0\\], case .* has no exp_avg in its state"),
    "an integer": (lambda t: dict(param=t.param.int()), "params\\[0\\], case .* must be Float or Double"),
    "a step of two numbers": (lambda t: dict(step=torch.zeros(2)), "step of params\\[0\\], case .* must be one Float"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_named_before_anything_is_launched(driver, case):
    change, message = WRONG[case]
    of, _ = table()
    wrong, _ = table(**change(of.tensors[0]))
    with pytest.raises(RuntimeError, match=message):
        registry.prepare("cuda", wrong)
    assert not driver.take()


def test_gradients_that_do_not_fit_are_named(driver):
    of, grads = table()
    run = registry.prepare("cuda", of)
    with pytest.raises(RuntimeError, match="params but 1 grads"):
        run(grads[:1])
    for wrong in (torch.ones(3, 7), grads[-1].int()):
        with pytest.raises(RuntimeError, match=f"grad of params\\[{len(grads) - 1}\\]"):
            run([*grads[:-1], wrong])
    with pytest.raises(TypeError, match="grads\\[0\\] is no tensor"):
        run([None, *grads[1:]])
    assert not driver.take()


def test_gradients_that_lie_otherwise_are_copied_at_each_step(driver):
    """To one place, which the kernels are told of once."""
    of, grads = table()
    k = next(k for k, case in enumerate(LEAN_CASES) if case.name == "channels_last")
    run = registry.prepare("cuda", of)
    for turn in range(2):
        grads[k] = torch.full(grads[k].shape, float(turn))
        run(grads)
        room = run._step.memory()[1]
        assert (room == turn).all()
        assert room.stride() == of.tensors[k].param.stride() != grads[k].stride()
    assert len(driver.copies) == 2


def test_a_failing_driver_is_an_error(driver):
    _, optimizer = optimizer_of([SHORT])
    optimizer.step()
    driver.broken = "cuLaunchKernel"
    with pytest.raises(RuntimeError, match="CUDA's driver cannot launch a kernel: the feigned driver failed"):
        optimizer.step()


def test_kernels_of_other_sources_are_refused(driver):
    """They share the layout of memory with the host, and a file may have been carried here."""
    driver.lacks = "compiled_from_"
    _, optimizer = optimizer_of([SHORT])
    with pytest.raises(RuntimeError, match="compiled from other sources; reinstall"):
        optimizer.step()
    driver.lacks = "step_adamw_f32"
    with pytest.raises(RuntimeError, match="cannot find a kernel"):
        optimizer.step()
    driver.lacks = "none"
    optimizer.step()
    assert driver.take() == ["step_adamw_f32"]


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda, "KERNELS", tmp_path / "none")
    monkeypatch.setattr(built, "record", dict)
    assert "put nvcc on PATH, and then: pip install" in rft.backends()["cuda"]
    (tmp_path / "none").touch()
    assert torch.cuda.is_available() or rft.backends()["cuda"] == "torch sees no GPU"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in rft.backends()["cuda"]
    monkeypatch.setattr(native, "MISSING", "no extension")
    assert rft.backends()["cuda"] == "no extension"


def test_a_driver_that_lacks_a_function_is_refused():
    with pytest.raises(RuntimeError, match="CUDA's driver has no function cuGetErrorName"):
        native.use_kernels(b"", {})
    if not torch.cuda.is_available() and not shutil.which("nvidia-smi"):
        native.use_kernels(b"")
        with pytest.raises(RuntimeError, match="CUDA's driver cannot be loaded"):
            native.try_kernels(0)


def run_program(*args):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.host_program", *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(line.rsplit(": ", 1) for line in done.stdout.splitlines())


@pytest.mark.skipif(not shutil.which("g++"), reason="a driver that counts is compiled by g++")
def test_host_time(tmp_path):
    """What a step takes of the host, over what Python takes beside it to list the gradients, the least of many: at most
    three quarters, and half of what the Triton backend takes. (A machine's speed changes twofold within a run.)"""
    library = tmp_path / "driver.so"
    subprocess.run(
        ["g++", "-x", "c", "-O2", "-shared", "-fPIC", str(HERE / "counting_driver.c"), "-o", str(library)], check=True
    )
    found = run_program(str(library))
    for tensors in (256, 2000):
        ours, theirs = (
            float(found[f"{backend}, {tensors}"]) / float(found[f"list beside {backend}, {tensors}"])
            for backend in ("cuda", "triton")
        )
        assert ours < 0.75, found
        assert ours < 0.5 * theirs, found
    assert (found["launches"], found["copies"], found["allocations"]) == ("1", "1", "0")
    assert ctypes.CDLL(str(library)).counted_launches() == 0, "this process has made no step with it"
