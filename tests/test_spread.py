"""Parameters spread over processes: 2 and 4 of them on the CPU, by gloo."""

import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")


def launch(program, tmp_path, *args, timeout=900, **env):
    """The program in processes of its own; its output, if it fails, is the test's."""
    command = [sys.executable, "-m", f"tests.{program}", "--store", str(tmp_path / "store"), *args]
    run = subprocess.run(
        command, env={**os.environ, **env, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=timeout
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.mark.parametrize("world", [2, 4])
def test_any_mesh_equals_one_process(tmp_path, world):
    """Every method, on meshes of one and two dimensions, sharded by rows, columns and both, replicated and not: the
    weights of one process to rounding, its decisions, and the same bits everywhere."""
    launch("spread_program", tmp_path, "--world", str(world))


def test_the_reference_backend_too(tmp_path):
    launch("spread_program", tmp_path, "--world", "2", "--backends", "reference", "--pick", "columns")


@pytest.mark.parametrize("world", [2, 4])
def test_fsdp_ddp_and_tpgm(tmp_path, world):
    """FSDP2, by four processes in its hybrid form, and DDP against one process; anchors given whole and in a file; the
    functions and TPGM over DTensors."""
    launch("fsdp_program", tmp_path, "train", "--world", str(world), "--folder", str(tmp_path))


def test_checkpoints_over_numbers_of_processes(tmp_path):
    """torch.distributed.checkpoint: two processes save, and go on bit for bit; four, and one, go on to rounding."""
    for k, (what, world) in enumerate((("save", 2), ("resume", 4), ("resume", 1))):
        folder = tmp_path / str(k)
        folder.mkdir()
        launch("fsdp_program", folder, what, "--world", str(world), "--folder", str(tmp_path))
