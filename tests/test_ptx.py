"""The compiled kernels, run on the CPU (tests/ptx). `make test-ptx` takes all of it."""

import ctypes
import importlib.util
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from .ptx import samples
from .ptx.instructions import UnknownInstructionError
from .ptx.program import Program, Schedule
from .ptx.translate import translate
from .table import METHOD_NORMS

HERE = "the compiled kernels run where there are Linux and g++"
pytestmark = pytest.mark.skipif(platform.system() != "Linux" or not shutil.which("g++"), reason=HERE)
with_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton compiles these kernels")
with_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc compiles these kernels")
# Words that the names of rows have. Each row is met by one of these.
STEPS = ("spd l2, adamw", "spd l2, sgd", "l2sp", "project", "none", "spd mars_rows", "ftp", "mars_sp", "digrap")


def run(*args):
    """The output of a program of its own, as Triton is in its interpreter here."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ptx", *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@with_triton
def test_a_step_equals_the_oracle():
    """Two classes of tensors: one of them has an anchor that is not aligned."""
    said = run("steps", "--pick", "spd l2, adamw, float32, a step")
    assert said == "ok: spd l2, adamw, float32, a step: step_sweep, pull_sweep, step_sweep, pull_sweep\n"


@with_triton
def test_a_missing_barrier_is_seen():
    assert run("faults", "--pick", "step_sweep, no barrier 0").splitlines()[-1] == "ok: 1 of 1 faults are seen"


def module(body, parameters=".param .u64 p"):
    return f".visible .entry f(\n{parameters}\n)\n.reqntid 32\n{{\n{body}\nret;\n}}\n"


@pytest.mark.parametrize(
    ("ptx", "message"),
    [
        ("frobnicate.b32 %r1, %r2;", "frobnicate.b32 %r1, %r2"),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r5];", "ldmatrix.sync.aligned.m8n8"),
        ("add.rz.f32 %r1, %r2, %r3;", "add.rz.f32 %r1, %r2, %r3: rz"),
        ("add.hi.s32 %r1, %r2, %r3;", "add.hi.s32"),
        ("rcp.approx.ftz.f32 %r1, %r2;", "rcp.approx.ftz.f32"),
        ("bar.sync 1;", "bar.sync 1"),
        ("bar.sync 0, 64;", "bar.sync 0, 64"),
        ("ld.global.acquire.sys.b32 %r1, [%rd1];", "sys"),
        ("ld.const.b32 %r1, [%rd1];", "ld.const.b32"),
        ("st.param.b32 [p], %r1;", "st.param.b32 .*a kernel's parameter is written"),
        ("atom.add.u32 %r1, [%rd1], 1;", "atom.add.u32 .*a generic address"),
        ("setp.lt.ftz.f32 %p1, %r2, %r3;", "setp.lt.ftz.f32 %p1"),
        ("setp.lt.s32 %p1, %r2, %r3, %p2;", "setp.lt.s32 %p1"),
        ("cvt.s32.f32 %r1, %r2;", "cvt.s32.f32 .*how it is rounded"),
        ("cvt.rn.f16.f64 %h1, %d1;", "cvt.rn.f16.f64"),
        ("mov.u64 %rd1, table;", "mov.u64 %rd1, table"),
        ("brx.idx %r1, targets;", "brx.idx %r1"),
        ("call.uni (r), vprintf, (a, b);", "call of vprintf"),
        ("call %rd1, (a), prototype;", "call %rd1"),
        (".local .align 8 .b8 depot[8];", ".local .align 8"),
    ],
)
def test_an_unknown_instruction_is_named(ptx, message):
    with pytest.raises(UnknownInstructionError, match=message):
        translate(module(ptx))


def test_a_kernel_is_picked_by_its_name():
    two = "".join(f".visible .entry {name}()\n.maxntid 64, 1, 1\n{{ ret; }}\n" for name in ("one", "two"))
    assert [translate(two, name).name for name in ("one", "two")] == ["one", "two"]
    with pytest.raises(ValueError, match="a module with one kernel is needed, this has 2"):
        translate(two)
    with pytest.raises(ValueError, match="of three, the module has 0"):
        translate(two, "three")


def test_threads_have_one_number():
    with pytest.raises(ValueError, match="f does not say how many threads it has"):
        translate(module("").replace(".reqntid 32", ""))
    with pytest.raises(ValueError, match="threads have one number here"):
        translate(module("").replace(".reqntid 32", ".maxntid 32, 2, 1"))


def test_instructions_give_what_the_manual_says():
    count = len(samples.RESULTS)
    given = (ctypes.c_uint64 * count)(*(number & (1 << 64) - 1 for _, number, _ in samples.RESULTS))
    results = (ctypes.c_uint64 * count)()
    spans = [(ctypes.addressof(of), ctypes.addressof(of) + 8 * count) for of in (given, results)]
    assert Program(samples.of_results())(1, 0, [begin for begin, _ in spans], spans, Schedule()) == []
    wrong = [
        (statements, hex(result))
        for (statements, _, expected), result in zip(samples.RESULTS, results, strict=True)
        if result != expected & (1 << 64) - 1
    ]
    assert not wrong


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """The PTX of `samples.SUMS`, with a barrier or without."""
    folder = tmp_path_factory.mktemp("sums")
    source = folder / "sums.cu"
    source.write_text(samples.SUMS)
    return {
        barrier: samples.compiled(source, folder / "sums.ptx", f"-DBARRIER={barrier}")
        for barrier in ("__syncthreads()", "")
    }


def summed(ptx, kernel, seed=0, negative=False):
    """What a run of a kernel says, and its sums."""
    numbers, result = (ctypes.c_double * 64)(*range(64)), (ctypes.c_double * 64)()
    spans = [(ctypes.addressof(of), ctypes.addressof(of) + 8 * 64) for of in (numbers, result)]
    args = struct.pack("QQq?7x", *(begin for begin, _ in spans), 3, negative)
    return Program(ptx, kernel)(1, 0, args, spans, Schedule(seed)), list(result)


@with_nvcc
def test_functions_and_generic_addresses(sums):
    """A struct is a parameter, and a function gets its address, one of shared memory and one of global memory."""
    ptx = sums["__syncthreads()"]
    assert "call.uni" in ptx
    assert ".shared .align" in ptx
    assert "cvta.param.u64" in ptx
    assert "ld.f64" in ptx, "of a generic address"
    expected = [3 * 2 * float(sum(range(4 * group, 4 * group + 4))) for group in range(16)]
    assert summed(ptx, "sums") == ([], expected + [0.0] * 48)
    assert summed(ptx, "sums", seed=1, negative=True)[1][:16] == [-of for of in expected]


@with_nvcc
def test_a_race_through_a_generic_address_is_seen(sums):
    said, _ = summed(sums[""], "sums")
    assert said
    assert all(line.startswith("race: sums.cu:") and "threads of one program" in line for line in said)
    assert any("(read)" in line and " ld.f64 " in line and "st.shared.f64 (write)" in line for line in said), said


@with_nvcc
def test_a_generic_address_has_bounds(sums):
    said, result = summed(sums["__syncthreads()"], "past_the_end")
    assert len(said) == 1
    assert said[0].startswith("out of bounds: sums.cu:")
    assert said[0].endswith(" ld.f64")
    assert result[:32] == [float(2 * k + 1) for k in range(31)] + [31.0]


def test_a_parameter_is_read_by_a_generic_address_and_not_written():
    body = """.reg .b64 %d<4>; mov.b64 %d1, p; cvta.param.u64 %d2, %d1; ld.u64 %d3, [%d2 + 8]; st.u64 [%d2], %d3;
        ld.param.u64 %d3, [%d1]; ld.u32 %d3, [%d2 + 2]; ld.param.u64 %d3, [p + 16];"""
    program = Program(module(body, ".param .align 8 .b8 p[16]"))
    assert program(1, 0, bytes(16), [], Schedule()) == [
        "a parameter is written: ? st.u64",
        "misaligned: ? ld.u32",
        "out of bounds: ? ld.param.u64",
    ]
    with pytest.raises(ValueError, match="f has 16 bytes of parameters, 8 are given"):
        program(1, 0, bytes(8), [], Schedule())


def test_bytes_that_a_load_does_not_use_may_lie_outside():
    declared = ".reg .b32 %r<4>; .shared .align 16 .b8 room[12];"
    load = "ld.shared.v4.u32 {%r0, %r1, %r2, %r3}, [room];"
    for pragma, said in (('.pragma "used_bytes_mask 4095";', []), ("", ["out of bounds: ? ld.shared.v4.u32"])):
        assert Program(module(f"{declared} {pragma} {load}"))(1, 0, [0], [], Schedule()) == said


@with_nvcc
def test_cuda_kernels_have_no_approximate_instruction_and_fuse_nothing():
    """As the bits of the native backend demand. Roots and divisions are rounded to nearest, and nothing is flushed."""
    from .ptx.cuda import ptx

    found = set(re.findall(r"^\s+(?:@!?%p\d+\s+)?([a-z]\w*(?:\.\w+)+)", ptx(), re.M))
    assert {"div.rn.f32", "sqrt.rn.f32", "div.rn.f64"} <= found
    assert not [name for name in found if re.search(r"^(fma|mad\.rn)|approx|ftz|\bfull\b", name)]


@with_nvcc
@with_triton
def test_a_cuda_step_has_the_bits_of_native():
    """By tensors, by rows in one piece and in several, after a survey, and without one thread in another's way."""
    said = run("steps", "--of", "cuda", "--pick", "adamw, float32, a step").splitlines()
    assert len(said) >= 5
    assert all(line.startswith("ok: ") for line in said)
    for kernel in ("step_adamw_f32", "rows_adamw_any", "survey_adamw_any", "pull_any"):
        assert any(kernel in line for line in said)


@pytest.mark.full
@with_nvcc
@with_triton
def test_a_barrier_that_the_cuda_kernels_lack_is_seen():
    assert run("faults", "--of", "cuda", "--pick", "step_adamw_f32, no barrier 2").splitlines()[-1] == (
        "ok: 1 of 1 faults are seen"
    )


@pytest.mark.full
@with_nvcc
def test_all_cuda_kernels_translate_and_compile():
    from .ptx.cuda import ptx

    names = samples.kernels(ptx())
    assert len(names) >= 24
    for name in names:
        Program(ptx(), name)


@pytest.mark.full
@with_nvcc
@with_triton
@pytest.mark.parametrize("what", ["steps", "schedules"])
def test_cuda_kernels(what):
    run(what, "--of", "cuda")


@pytest.mark.exhaustive
@with_nvcc
@with_triton
def test_faults_of_the_cuda_kernels_are_seen():
    run("faults", "--of", "cuda")


@pytest.mark.full
@with_nvcc
@with_triton
def test_rows_that_meet_every_pair_have_the_bits_of_native():
    run("table", "--of", "cuda", "--pairs")


@pytest.mark.exhaustive
@with_nvcc
@with_triton
@pytest.mark.parametrize("method", ["-".join(map(str, method_norm)) for method_norm in METHOD_NORMS])
def test_the_whole_table_has_the_bits_of_native(method):
    run("table", "--of", "cuda", "--pick", " ".join(method.split("-")) + ",")


@with_triton
@pytest.mark.full
def test_all_kernels_translate():
    run("translate")


@with_triton
def test_the_pages_tell_how_much_is_run():
    from tests.ptx import cuda, steps
    from tests.ptx.__main__ import scheduled

    def told(page):
        return " ".join((Path(__file__).parents[1] / "docs" / page).read_text().split())

    to_oracle = [row for row in steps.ROWS if row.how in ("a step", "gradients are unscaled", "lr is a tensor")]
    words = ("no", "one", "two", "three", "four", "five", "six")
    codegen, pairs = told("codegen.md"), f"{len(cuda.table(pairs=True))} rows of the table of cases"
    assert f"{len(to_oracle)} steps equal the oracle" in codegen
    assert f"the same bits in {words[len(scheduled(steps.ROWS))]} steps" in codegen
    assert f"In {words[len(scheduled(cuda.ROWS))]} rows, ten orders" in told("architecture.md")
    assert pairs in told("architecture.md")
    assert pairs in told("limits.md")
    assert f"all {len(cuda.table()):,} rows whose settings act in their dtype" in told("limits.md")


@with_triton
def test_a_race_for_the_scale_of_a_block_does_no_harm():
    """A race for codes would, and so would one of two writes."""
    from robustft_kernels.triton_kernels import eight_bit

    from tests.ptx.harmless import harmful

    lines = Path(eight_bit.__file__).read_text().splitlines()

    def line(text):
        (number,) = (k for k, line in enumerate(lines, 1) if text in line)
        return f"eight_bit.py:{number} from 200"

    def race(one, other):
        return f"race: {one} with {other}, threads of one program"

    written = line("tl.store(scales") + " st.global.b8 (write)"
    known, codes = line("e = tl.load(scales"), line("k = tl.load(pointer")
    assert harmful([race(written, f"{known} ld.global.b8 (read)")]) == []
    for other in (f"{codes} ld.global.b8 (read)", f"{known} ld.global.b8 (write)", written):
        assert harmful([race(written, other)])
    assert harmful([race(line("tl.store(pointer") + " st.global.b8 (write)", f"{known} ld.global.b8 (read)")])


@with_triton
def test_every_row_is_of_some_part():
    from tests.ptx.steps import ROWS

    assert len(ROWS) >= 24
    assert all(sum(part in row.name for part in STEPS) == 1 for row in ROWS), "no row is met twice"


@with_triton
@pytest.mark.full
@pytest.mark.parametrize("part", STEPS)
def test_steps_equal_the_oracle(part):
    run("steps", "--pick", part)


@with_triton
@pytest.mark.full
def test_bits_do_not_depend_on_the_schedule():
    run("schedules")


@with_triton
@pytest.mark.exhaustive
def test_faults_are_seen():
    run("faults")
