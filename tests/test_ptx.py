"""The compiled kernels, run on the CPU (tests/ptx). The default tier takes a few of what `make test-ptx` takes."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys

import pytest

HERE = "the compiled kernels run where there are Triton, Linux and g++"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or platform.system() != "Linux" or not shutil.which("g++"), reason=HERE
)
# Words that the names of rows have. Each row is met by one of these.
STEPS = ("spd l2, adamw", "spd l2, sgd", "l2sp", "project", "none", "spd mars_rows", "ftp", "mars_sp")


def run(*args):
    """The output of a program of its own, as Triton is in its interpreter here."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ptx", *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_a_step_equals_the_oracle():
    """Two classes of tensors: one of them has an anchor that is not aligned."""
    said = run("steps", "--pick", "spd l2, adamw, float32, a step")
    assert said == "ok: spd l2, adamw, float32, a step: step_sweep, pull_sweep, step_sweep, pull_sweep\n"


def test_a_missing_barrier_is_seen():
    assert run("faults", "--pick", "step_sweep, no barrier 0").splitlines()[-1] == "ok: 1 of 1 faults are seen"


@pytest.mark.parametrize(
    ("ptx", "message"),
    [
        ("frobnicate.b32 %r1, %r2;", "frobnicate.b32 %r1, %r2"),
        ("add.rz.f32 %r1, %r2, %r3;", "rz"),
        ("bar.sync 1;", r"bar.sync \['1'\]"),
        ("ld.global.acquire.sys.b32 %r1, [%rd1];", "sys"),
        ("setp.lt.and.f32 %p1, %r1, %r2, %p2;", "setp.lt.and.f32 %p1"),
    ],
)
def test_an_unknown_instruction_is_named(ptx, message):
    from tests.ptx.instructions import UnknownInstructionError
    from tests.ptx.translate import translate

    module = f".visible .entry f(\n.param .u64 p\n)\n.reqntid 32\n{{\n{ptx}\nret;\n}}\n"
    with pytest.raises(UnknownInstructionError, match=message):
        translate(module)


@pytest.mark.full
def test_all_kernels_translate():
    run("translate")


def test_every_row_is_of_some_part():
    from tests.ptx.steps import ROWS

    assert len(ROWS) >= 24
    assert all(sum(part in row.name for part in STEPS) == 1 for row in ROWS), "no row is met twice"


@pytest.mark.full
@pytest.mark.parametrize("part", STEPS)
def test_steps_equal_the_oracle(part):
    run("steps", "--pick", part)


@pytest.mark.full
def test_bits_do_not_depend_on_the_schedule():
    run("schedules")


@pytest.mark.full
def test_faults_are_seen():
    run("faults")
