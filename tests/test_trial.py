"""Triton is tried once before it serves a GPU: "auto" falls back with the reason, and by name it is an error."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

import robustft_kernels as rft
from robustft_kernels.backends import registry
from robustft_kernels.backends import triton as triton_backend

pytestmark = pytest.mark.skipif("not installed" in rft.backends()["triton"], reason="needs triton")
GPU = torch.device("cuda", 0)


def ask(*args, **env):
    """What trial_program finds, and its stderr."""
    env = {**{k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CC")}, **env}
    command = [sys.executable, "-m", "tests.trial_program", *args]
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-4000:]
    return json.loads(out.stdout or "{}"), out.stderr


def assert_falls_back(found, reason):
    assert reason in found["backends"]
    assert found["auto"] == "reference"
    (warning,) = found["warnings"]
    assert "the slow reference backend serves the cuda parameters (cuda: " in warning
    assert "; triton: " in warning
    assert reason in warning
    assert reason in found["named"]


def test_without_a_c_compiler(tmp_path):
    """Triton builds its launcher by one. It had been chosen all the same, and the first step broke off."""
    folders = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path), "PATH": str(tmp_path)}
    found, stderr = ask(**folders)
    assert_falls_back(found, "Failed to find C compiler")
    assert "install gcc or clang, or name a compiler in CC" in found["named"]
    assert "launched" not in stderr
    found, _ = ask(**folders, CC=str(tmp_path / "no-such-compiler"))
    assert_falls_back(found, "no-such-compiler")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_one_launch_a_process_through_tritons_own_c_code(tmp_path):
    ask(str(tmp_path))
    folder = str(tmp_path)
    found, stderr = ask(TRITON_CACHE_DIR=folder, TRITON_LIBCUDA_PATH=folder, LD_LIBRARY_PATH=folder)
    assert found == {"backends": "", "auto": "triton", "named": "", "warnings": []}
    assert stderr.count("launched 1\n") == 1


def test_a_triton_that_cannot_be_imported(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('libtriton.so: undefined symbol')")
    found, _ = ask(PYTHONPATH=str(tmp_path))
    assert_falls_back(found, "ImportError: libtriton.so: undefined symbol")


def test_neither_an_import_nor_the_cpu_starts_a_trial(device):
    if device.type != "cpu":
        pytest.skip("backends() starts CUDA where there is a GPU, as it says")
    program = """
import sys
import torch
import robustft_kernels as rft
param = torch.nn.Parameter(torch.ones(3))
param.grad = torch.ones(3)
rft.AdamSPD([param]).step()
rft.backends()
assert "robustft_kernels.triton_kernels" not in sys.modules
assert not torch.cuda.is_initialized()
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], env=env, check=True)


@pytest.fixture
def tried(monkeypatch):
    """The number of launches. A GPU is feigned, and the interpreter is hidden."""
    launches = []
    monkeypatch.setattr(triton_backend, "_launch_nothing", lambda: launches.append(1))
    monkeypatch.setattr(triton_backend, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    triton_backend._try_on.cache_clear()
    yield launches
    triton_backend._try_on.cache_clear()


def test_tried_once_on_each_gpu_that_is_served(tried):
    for index in (1, 1, 0, 1):
        assert registry.choose_backend("auto", torch.device("cuda", index), {torch.float32}).name == "triton"
    assert len(tried) == 2


def test_not_tried_for_what_it_does_not_serve(tried):
    registry.choose_backend("auto", torch.device("cpu"), {torch.float32})
    assert "float8" in registry.objection_to("triton", GPU, {torch.float8_e5m2})
    rft.AdamSPD([torch.nn.Parameter(torch.ones(3))], backend="triton")  # no device is served yet
    assert not tried


def test_not_tried_in_the_interpreter(tried, monkeypatch):
    monkeypatch.setattr(triton_backend, "interpreted", lambda: True)
    assert triton_backend.trial(GPU) == triton_backend.trial() == ""
    assert not tried


def test_not_tried_while_torch_compile_traces(tried, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # or the compiler looks for one

    def traced(x):
        return x + len(triton_backend.trial(GPU))

    torch._dynamo.reset()
    assert torch.compile(traced, backend="eager", fullgraph=True)(torch.ones(())) == 1
    torch._dynamo.reset()
    assert not tried


def test_a_fork_without_cuda_is_told_and_not_remembered(tried, monkeypatch):
    """As in a worker that was forked after CUDA had started."""

    def refuse():
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    with monkeypatch.context() as forked:
        forked.setattr(torch.cuda, "init", refuse)
        assert "Cannot re-initialize CUDA" in triton_backend.trial(GPU)
        assert "Cannot re-initialize CUDA" in rft.backends()["triton"]
    assert triton_backend.trial(GPU) == ""
    assert len(tried) == 1
