"""Parameters spread over 2 and 4 processes: on the CPU by gloo, and on GPUs by NCCL if there are so many."""

import os
import subprocess
import sys

import pytest
import torch

from robustft_kernels.backends import registry

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")


@pytest.fixture
def launch(device):
    """Runs a program in so many processes. If it fails, its output becomes the test's."""

    def run(program, folder, world, *args):
        if device.type == "cuda" and torch.cuda.device_count() < world:
            pytest.skip(f"needs {world} GPUs")
        command = [sys.executable, "-m", f"tests.{program}", "--store", str(folder / "store"), "--world", str(world)]
        done = subprocess.run(
            [*command, "--device", device.type, *args],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]

    return run


WORLDS = [2, pytest.param(4, marks=pytest.mark.full)]


@pytest.mark.parametrize("world", WORLDS)
def test_any_mesh_equals_one_process(launch, device, tmp_path, world):
    """Every method, on meshes of one and two dimensions, sharded by rows, columns and both, replicated and not. The
    weights are those of one process to rounding, and so are its decisions. All processes have the same bits."""
    names = {"cpu": ["native"], "cuda": ["cuda", "triton", "triton_tickets"]}[device.type]
    backends = [name for name in names if not registry.objection_to(name, device, {torch.float32})]
    assert backends
    launch("spread_program", tmp_path, world, "--backends", *backends)


@pytest.mark.full
def test_the_reference_backend_too(launch, tmp_path):
    launch("spread_program", tmp_path, 2, "--backends", "reference", "--pick", "columns")


@pytest.mark.parametrize("world", WORLDS)
def test_fsdp_ddp_and_tpgm(launch, tmp_path, world):
    """FSDP2 and DDP against one process. Four processes use the hybrid form of FSDP2. Anchors are given whole and in a
    file. Also the functions and TPGM over DTensors."""
    launch("fsdp_program", tmp_path, world, "train", "--folder", str(tmp_path))


def test_processes_that_differ(launch, tmp_path):
    """A gradient that is missing in one process, parameters in another order, telemetry in one process alone. And how
    much is exchanged."""
    launch("broken_program", tmp_path, 2)


@pytest.mark.full
def test_a_process_dies_in_a_step(launch, tmp_path, device):
    """In each of its all-reduces. The step of the others is whole, or not made, or known to be broken off."""
    if device.type == "cuda":
        pytest.skip("a process that dies takes the others along under NCCL")
    launch("broken_program", tmp_path, 2, "--folder", str(tmp_path))


@pytest.mark.full
def test_a_long_run_over_changing_numbers_of_processes(tmp_path):
    """500 steps of up to 8 processes, groups that are frozen and thawed, ten checkpoints, nine resumes. All weights end
    within 1e-9 of what one process does, relative to how far a weight has moved."""
    command = [sys.executable, "-m", "tests.soak_program", "--folder", str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.full
def test_checkpoints_over_numbers_of_processes(launch, tmp_path):
    """torch.distributed.checkpoint. Two processes save, and go on bit for bit. Four, and one, go on to rounding."""
    for k, (what, world) in enumerate((("save", 2), ("resume", 4), ("resume", 1))):
        folder = tmp_path / str(k)
        folder.mkdir()
        launch("fsdp_program", folder, world, what, "--folder", str(tmp_path))
