"""The contract of the CUDA kernels' code, read from the installed file: registers, spills, accesses, barriers."""

import importlib.util
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from robustft_kernels.backends.cuda import KERNELS

GPUS = ("sm_80", "sm_90", "sm_100")
# Kernels for plain tensors, and what they read and write of four neighbours: weights, gradient and anchor, moments.
WIDTHS = {"f32": (128, 128, 128), "f32_anchor16": (128, 128, 64), "bf16": (64, 64, 64)}
MOMENTS = {"adamw": 2, "sgd": 1}
PLAIN = [(base, kind) for base in MOMENTS for kind in WIDTHS]


def tool():
    """cuobjdump, which Triton brings."""
    found = importlib.util.find_spec("triton")
    brought = found and Path(found.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return shutil.which("cuobjdump") or (str(brought) if brought and brought.exists() else None)


pytestmark = pytest.mark.skipif(not KERNELS.exists() or not tool(), reason="needs the compiled kernels and cuobjdump")


@cache
def resources():
    """Of each kernel on each GPU: registers, bytes of the stack, and of local memory, as the file says."""
    said = subprocess.run([tool(), "-res-usage", KERNELS], capture_output=True, text=True, check=True).stdout
    found, gpu, name = {}, "", ""
    for line in said.splitlines():
        gpu = line.split()[-1] if line.startswith("arch =") else gpu
        name = line.split()[-1].rstrip(":") if "Function " in line else name
        if match := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            found[gpu, name] = tuple(map(int, match.groups()))
    return found


@cache
def code(kernel, gpu):
    """Its instructions: place, name and operands."""
    command = [tool(), "-sass", "-arch", gpu, "-fun", kernel, KERNELS]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", said)
    return [(int(place, 16), name, operands.strip()) for place, name, operands in lines]


def loops(kernel, gpu):
    """The instructions of each loop that has none inside."""
    instructions = code(kernel, gpu)
    ends = [
        (int(match[1], 16), place)
        for place, name, operands in instructions
        if name.startswith("BRA") and (match := re.search(r"0x([0-9a-f]+)$", operands)) and int(match[1], 16) <= place
    ]
    inner = [a for a in ends if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in ends)]
    return [[name for place, name, _ in instructions if begin <= place <= end] for begin, end in inner]


def accesses(names, what):
    """How wide those are of a loop that read ("LDG") or write ("STG"), in bits."""
    widths = [(re.search(r"\.(64|128|U?16|U8)\b", name) or "32") for name in names if name.startswith(what)]
    return sorted(int(of[1].lstrip("U")) if of != "32" else 32 for of in widths)


def test_every_kernel_is_there_for_every_gpu():
    names = {name for _, name in resources()}
    assert {gpu for gpu, _ in resources()} >= set(GPUS)
    assert all((gpu, name) in resources() for gpu in GPUS for name in names)
    for base in MOMENTS:
        assert {f"step_{base}_{kind}" for kind in (*WIDTHS, "any", "any8", "any64")} <= names
        assert f"rows_{base}_any8" in names
        assert {f"{what}_{base}_{kind}" for what in ("rows", "survey") for kind in ("any", "any64")} <= names
    others = ("pull", "norm", "step_no_step", "rows_no_step")
    assert {f"{what}_{kind}" for what in others for kind in ("any", "any64")} <= names


def test_nothing_spills():
    spilled = {at: of for at, of in resources().items() if of[1:] != (0, 0)}
    assert not spilled


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(("base", "kind"), PLAIN)
def test_half_of_the_threads_are_resident(gpu, base, kind):
    """64 registers for each, of the 65,536 of an SM."""
    assert resources()[gpu, f"step_{base}_{kind}"][0] <= 64


@pytest.mark.parametrize("gpu", GPUS)
def test_the_rest_has_a_quarter(gpu):
    assert all(registers <= 128 for (on, _), (registers, *_) in resources().items() if on == gpu)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(("base", "kind"), PLAIN)
def test_accesses_of_the_loop_over_elements(gpu, base, kind):
    """Four neighbours at once, of each stream: 16 bytes of float32, and 8 of bfloat16. In that loop there is no barrier
    and no local memory."""
    moments = [128] * MOMENTS[base]
    weights, gradient, anchor = WIDTHS[kind]
    written = sorted([weights, *moments])
    wide = [of for of in loops(f"step_{base}_{kind}", gpu) if accesses(of, "STG") == written]
    assert len(wide) == 1
    read = accesses(wide[0], "LDG")
    for width in (64, 128):
        assert read.count(width) == [weights, gradient, anchor, *moments].count(width), read
    assert not [name for name in wide[0] if re.match("BAR|LDL|STL|ATOM|RED", name)]


@pytest.mark.parametrize("gpu", GPUS)
def test_no_float_is_added_atomically(gpu):
    for kernel in ("step_adamw_f32", "rows_adamw_any", "norm_any"):
        atomic = {name for _, name, _ in code(kernel, gpu) if re.match("ATOM|RED", name)}
        assert atomic, "programs of a tensor count each other"
        assert not [name for name in atomic if re.search(r"\.F(16|32|64)|FADD|BF16", name)]
