"""The structure of the project: imports go one way, the wheel holds what it should, the native code is as claimed."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import robustft_kernels as rft

from . import mutants, prose

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "robustft_kernels"
# Folders, and the modules in each: from what users import down to what imports nothing of ours.
STACK = {
    "": ("__main__", "timm", "__init__"),
    "command": (
        "entry",
        "cli",
        "doctor",
        "picture",
        "report",
        "blends",
        "spans",
        "pairs",
        "opening",
        "shards",
        "torch_file",
        "output",
        "source",
    ),
    "callbacks": ("huggingface", "lightning", "shared"),
    "optim": (
        "schedules",
        "for_model",
        "named",
        "optimizers",
        "wrapper",
        "wrappable",
        "wrapping",
        "around",
        "in_backward",
        "anchored",
        "keeping",
        "late",
        "shown_state",
    ),
    " ": ("telemetry",),
    "finetune": (
        "tpgm",
        "radii",
        "slopes",
        "soups",
        "wise",
        "pairing",
        "by_radius",
        "param_groups",
        "evaluation",
        "prefixes",
        "projection",
    ),
    "testing": ("tolerances", "stepper", "cases"),
    "step": (
        "plan",
        "sweep_cache",
        "plans",
        "guard",
        "sharded",
        "peers",
        "surveys",
        "agreement",
        "launch",
        "no_step",
        "anchor_sizes",
        "hyper",
        "results",
        "decide",
        "fingerprint",
        "ops",
    ),
    "backends": (
        "digests",
        "registry",
        "cuda",
        "triton",
        "native",
        "built",
        "reference",
        "reference_rounding",
        "backend",
    ),
    "core": (
        "checkpoint",
        "anchors",
        "mistakes",
        "names",
        "state",
        "contract",
        "bases",
        "files",
        "memory",
        "exchange",
        "eight_bit",
        "sharding",
        "unsharded",
        "staging",
        "ranges",
        "methods",
    ),
    "  ": ("_import_paths",),
}
ORDER = [f"{folder.strip()}.{name}".strip(".") for folder, names in STACK.items() for name in names]
TRITON_STACK = (
    "launch",
    "table",
    "variant",
    "row_sweeps",
    "survey",
    "sweeps",
    "rows",
    "norm",
    "pull",
    "decide",
    "measure",
    "chunk",
    "eight_bit",
    "base",
)
TORCH_OPTIM = (
    "optim.anchored",
    "optim.keeping",
    "optim.wrapper",
    "optim.wrappable",
    "optim.wrapping",
    "optim.in_backward",
    "optim.schedules",
    "optim.shown_state",
)
needs_native = pytest.mark.skipif(bool(rft.backends()["native"]), reason=rft.backends()["native"])


def module_of(path):
    """A file's dotted name within the package, or "triton_kernels" and its name."""
    root = PACKAGE if path.is_relative_to(PACKAGE) else ROOT
    return ".".join(path.relative_to(root).with_suffix("").parts)


def imports_of(path):
    """The dotted names, within the package, of the modules that a file imports."""
    here = module_of(path).split(".")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*here[: len(here) - node.level], *(node.module or "").split(".")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "robustft_kernels":
            base = node.module.split(".")[1:]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            yield from (name.partition(".")[2] for name in names if name.startswith("robustft_kernels."))
            continue
        module = ".".join(filter(None, base))
        if module in ORDER or module.startswith("triton_kernels."):
            yield module
        else:  # a folder, or the package: what is imported from it are modules
            yield from (f"{module}.{alias.name}".strip(".") for alias in node.names)


def test_imports_point_down_the_stack():
    files = {module_of(path): path for path in PACKAGE.rglob("*.py")}
    assert {name for name in files if not name.endswith(".__init__")} == set(ORDER)
    for name in ORDER:
        below = {*ORDER[ORDER.index(name) + 1 :], "_native"}
        upward = {of for of in imports_of(files[name]) if of.split(".")[0] != "triton_kernels"} - below
        assert not upward, f"{name} imports {upward}, which is not below it"


def test_triton_kernels_know_the_core_alone():
    files = {path.stem: path for path in (ROOT / "triton_kernels").glob("*.py")}
    assert set(files) == {"__init__", *TRITON_STACK}
    for name in TRITON_STACK:
        below = {f"triton_kernels.{of}" for of in TRITON_STACK[TRITON_STACK.index(name) + 1 :]}
        upward = {of for of in imports_of(files[name]) if not of.startswith("core.")} - below
        assert not upward, f"triton_kernels/{name}.py imports {upward}, which is not below it"


def test_every_door_has_one_file():
    """torch.optim, the extension and the Triton kernels are each known to few files."""
    for path in PACKAGE.rglob("*.py"):
        text, name = path.read_text(), module_of(path)
        assert ("from torch.optim" in text) == (name in TORCH_OPTIM)
        assert ("import _native" in text) == (name == "backends.native")
        assert ("triton_kernels." in text) == (name == "backends.triton"), name
    assert "robustft_kernels" not in (ROOT / "csrc" / "bindings.cpp").read_text()


def test_files_and_classes_stay_readable():
    for pattern in (
        "robustft_kernels/**/*.py",
        "triton_kernels/*.py",
        "csrc/**/*.*",
        "tests/*.py",
        "examples/**/*.py",
        "benchmarks/*.py",
    ):
        for path in ROOT.glob(pattern):
            text = path.read_text()
            assert len(text.splitlines()) <= 400, path
            for node in ast.walk(ast.parse(text)) if path.suffix == ".py" else ():
                if isinstance(node, ast.ClassDef):
                    assert node.end_lineno - node.lineno < 200, (path, node.name)


def test_sentences_stay_short():
    """Of README and docs: 12 words on average, none over 35."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    lengths = {page.name: prose.measured(page.read_text()) for page in pages}
    assert sum(mean for mean, *_ in lengths.values()) / len(lengths) <= 12
    for page, (mean, long, most) in lengths.items():
        assert mean <= 14, page
        assert long <= 0.05, page
        assert most <= 35, page


@pytest.mark.full
def test_wheel_without_a_compiler_installs_and_says_so(tmp_path):
    """Neither a top-level triton_kernels nor csrc; no compiler means no native backend, not no package."""
    env = {**os.environ, "CXX": "no-such-compiler", "CC": "no-such-compiler", "PIP_NO_CACHE_DIR": "1"}
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.so", "*.egg-info", "__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    built = subprocess.run(command, env=env, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    assert "installing WITHOUT the native backend" in built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"robustft_kernels"}
    assert {f"robustft_kernels/triton_kernels/{name}.py" for name in ("__init__", *TRITON_STACK)} <= set(names)
    assert "robustft_kernels/py.typed" in names
    assert not [name for name in names if "csrc" in name or name.endswith((".so", ".cpp", ".h"))]

    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, tmp_path / "site"], check=True)
    program = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "Editable" not in repr(f)]  # or the checkout's extension is found
import warnings, torch, robustft_kernels as rft, robustft_kernels.triton_kernels
assert rft.__file__.startswith("SITE"), rft.__file__
print(rft.backends()["native"])
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    optimizer = rft.AdamSPD([p])
    optimizer.step(), optimizer.step()
print([str(w.message) for w in caught])
""".replace("SITE", str(tmp_path / "site"))
    out = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert "a C++20 compiler (g++ or clang++) is needed" in out[0]
    assert "pip install --force-reinstall" in out[0]
    assert out[1].count("slow reference backend serves the cpu parameters") == 1


@needs_native
def test_one_openmp_runtime():
    """With a second one, the threads of both would spin."""
    program = "import torch, robustft_kernels; print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    runtimes = {line.split()[-1] for line in maps.splitlines() if re.search(r"lib(gomp|omp|iomp5)[-.\w]*\.so", line)}
    assert len(runtimes) == 1, runtimes


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None or os.uname().machine != "x86_64", reason="needs g++ on x86-64")
@pytest.mark.parametrize(("unit", "width"), [("baseline", 16), ("avx2", 32), ("avx512", 64)])
def test_arithmetic_fills_the_registers(unit, width, tmp_path):
    """Holds the compiler to floats and doubles side by side, in registers of the instruction set's full width."""
    flags = re.search(r"FLAGS = (\[.*?\])", (ROOT / "setup.py").read_text(), flags=re.S).group(1)
    command = ["g++", "-std=c++20", "-fPIC", "-fopenmp", *ast.literal_eval(flags)]
    source = ROOT / "csrc" / "cpu" / f"sweeps_{unit}.cpp"
    subprocess.run([*command, "-S", source, "-o", tmp_path / "out.s"], capture_output=True, check=True)
    lines = re.findall(r"^\tv?(add|sub|mul|div|sqrt)(p[sd]|ss)\t(.*)", (tmp_path / "out.s").read_text(), flags=re.M)
    register = {16: "%xmm", 32: "%ymm", 64: "%zmm"}[width]
    packed = [(op, kind) for op, kind, operands in lines if kind != "ss" and register in operands]
    narrower = [line for line in lines if line[1] != "ss" and register not in line[2]]
    assert len(narrower) < len(packed) / 50, narrower  # conversions and folds
    for op in ("add", "sub", "mul", "div", "sqrt"):
        assert {(op, "ps"), (op, "pd")} <= set(packed), op
    assert not [line for line in lines if line[0] in ("mul", "sqrt") and line[1] == "ss"]
    subprocess.run(["g++", "-c", tmp_path / "out.s", "-o", tmp_path / "out.o"], check=True)
    symbols = subprocess.run(
        ["nm", "-C", "--defined-only", tmp_path / "out.o"], capture_output=True, text=True, check=True
    ).stdout
    external = [s for s in symbols.splitlines() if re.search(r" [A-SU-Z] ", s) and " r " not in s.lower()]
    assert len(external) == 1, external  # the table: code for one instruction set must not be linked for another


def test_every_mutant_fits_the_sources():
    """A row that no longer fits stops all of them, and they run seldom."""
    mutants.check(mutants.MUTANTS)
