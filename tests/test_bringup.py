"""The first run on a GPU, tried without one: its stages, its programs on the CPU, and what a bare machine lacks."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import robustft_kernels as rft
from benchmarks.bringup import __main__ as bringup
from benchmarks.bringup import build, facts, items, page, timings
from benchmarks.bringup.stages import Finding, Stage, run

ROOT = Path(__file__).parent.parent
# What `make install` brings beside torch, Triton, pytest and numpy (which Triton's interpreter needs).
ABSENT = ("tqdm", "hypothesis", "pybind11", "ninja", "xdist", "pytest_benchmark", "expecttest", "matplotlib", "sklearn",
          "safetensors", "PIL", "scipy")  # fmt: skip
BARE = f"""
from importlib.machinery import PathFinder
class OfABareMachine:  # no function, since pytest makes it an attribute of a class
    find = PathFinder.find_spec
    def __call__(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT} else self.find(name, path, target)
PathFinder.find_spec = OfABareMachine()
"""
needs_triton = pytest.mark.skipif(bool(rft.backends()["triton"]), reason=rft.backends()["triton"] or "ready")


@pytest.fixture
def bare(tmp_path):
    """The environment of processes for which ABSENT cannot be imported. pytest looks for no plugins, as those that are
    installed are not those of a bare machine."""
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BARE)
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return {**env, "PYTHONPATH": str(folder), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def program(text, folder, name="program"):
    """A program of a stage that needs no torch."""
    file = folder / f"{name}.py"
    file.write_text(f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\n"
                    f"from benchmarks.bringup.items import *\n{text}")  # fmt: skip
    return [sys.executable, str(file)], {}


def found_by(text, folder, seconds=20.0, patience=10.0):
    told = []
    stage = Stage("it", [program(text, folder)], 1, patience, names=True)
    finding = run(stage, seconds, folder / "logs", lambda of: told.append(of.outcome))
    assert told[-1] == finding.outcome
    return finding


def test_an_item_that_fails_or_dies_does_not_end_the_rest(tmp_path):
    text = """
def fail(): raise ValueError("not so")
def break_(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def die(): print("a last word", flush=True); os._exit(3)
Log().each({"good": lambda: {"n": 1}, "bad": fail, "breaks": break_, "dies": die, "last": lambda: None})
"""
    finding = found_by(text, tmp_path)
    assert finding.outcome == "failed"
    assert finding.counts == {"ok": 2, "failed": 2, "died": 1}
    assert finding.items["good"] == {"outcome": "ok", "n": 1}
    assert finding.problems["bad"] == "failed: ValueError: not so"
    assert "illegal memory access" in finding.problems["breaks"]
    assert finding.problems["dies"] == "died: exit status 3: a last word"
    assert (tmp_path / "logs" / "it-0.txt").read_text().count("Traceback") == 2


def test_an_item_that_hangs_is_ended_with_what_it_started(tmp_path):
    text = f"""
import subprocess
def hang():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
    child.wait()
Log().each({{"hangs": hang, "last": lambda: None}})
"""
    finding = found_by(text, tmp_path, patience=2.0)
    assert finding.problems == {"hangs": "hung: no end after 2 s"}
    assert finding.items["last"]["outcome"] == "ok"
    child = Path("/proc", (tmp_path / "child").read_text(), "stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_a_stage_is_cut_when_its_time_is_over(tmp_path):
    finding = found_by('Log().each({"good": lambda: None, "long": lambda: time.sleep(600)})', tmp_path, seconds=2.0)
    assert finding.outcome == "cut"
    assert finding.counts == {"ok": 1, "not ended": 1}
    assert finding.seconds < 10


def test_a_program_that_cannot_begin_is_told(tmp_path):
    finding = found_by("raise SystemExit('no such thing')", tmp_path)
    assert finding.outcome == "failed"
    assert finding.problems == {"program 0": "exit status 1: no such thing"}


def test_tests_are_shared_out_and_told_one_by_one(tmp_path):
    """And a test that breaks its process costs no other test."""
    (tmp_path / "test_it.py").write_text("""
import pytest
@pytest.mark.parametrize("k", range(5))
def test_good(k): pass
def test_bad(): assert 1 == 2
def test_breaks(): raise RuntimeError("CUDA error: misaligned address")
def test_skipped(): pytest.skip("no reason")
@pytest.mark.parametrize("k", range(2))
def test_later(k): pass
""")
    commands = bringup.tests([str(tmp_path / "test_it.py")], "cuda", 2, False)
    commands = [([of for of in command if of not in ("--device", "cuda")], env) for command, env in commands]
    finding = run(Stage("tests", commands, 1), 60, tmp_path / "logs", lambda of: None)
    assert finding.counts == {"ok": 7, "failed": 2, "skipped": 1}, finding
    assert [why for name, why in finding.problems.items() if "bad" in name] == ["failed: assert 1 == 2"]
    assert all("test_good" not in name for name in finding.items)  # counted only


@pytest.fixture
def two_stages(tmp_path, monkeypatch):
    """Two stages in place of the real ones: the first fails and is slow, the second has a word to say."""
    texts = 'Log().each({"slow": lambda: time.sleep(600)})', 'Log().each({"it": lambda: {"facts": {"word": "yes"}}})'
    todo = [Stage(name, [program(text, tmp_path, name)], share, names=True)
            for name, text, share in zip(("first", "facts"), texts, (1, 9), strict=True)]  # fmt: skip
    monkeypatch.setattr(bringup, "stages", lambda device, tiny: list(todo))
    monkeypatch.setattr(sys, "argv", ["bringup", "--minutes", "0.3", "--out", str(tmp_path / "out")])
    monkeypatch.setattr(bringup.signal, "signal", lambda *_: None)
    return tmp_path / "out"


def test_both_files_are_written_after_each_stage(two_stages, monkeypatch, capsys):
    kept = []
    add = bringup.Record.add

    def noted(record, finding):
        add(record, finding)
        kept.append((json.loads((two_stages / "bringup.json").read_text()), (two_stages / "bringup.md").read_text()))

    monkeypatch.setattr(bringup.Record, "add", noted)
    assert bringup.main() == 1
    (first, page_first), (both, page_both) = kept
    assert list(first["stages"]) == ["first"]
    assert first["stages"]["first"]["outcome"] == "cut"
    assert "| first | cut |" in page_first
    assert [of["outcome"] for of in both["stages"].values()] == ["cut", "ok"]
    assert "- it: word yes" in page_both
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["first", "facts", "written"]
    assert not list(two_stages.glob("*.new"))


def test_a_page_that_cannot_be_drawn_costs_nothing_else(two_stages, monkeypatch):
    monkeypatch.setattr(page, "page_of", lambda record: 1 / 0)
    bringup.main()
    assert "ZeroDivisionError" in (two_stages / "bringup.md").read_text()
    assert len(json.loads((two_stages / "bringup.json").read_text())["stages"]) == 2


def test_without_a_gpu_it_says_so_and_stops(tmp_path, monkeypatch, capsys):
    text = 'log = Log()\nlog.begin("a GPU")\nlog.end("a GPU", "failed", why="torch sees no GPU")'
    todo = [Stage(name, [program(text, tmp_path)], 1, names=True) for name in ("facts", "later")]
    monkeypatch.setattr(bringup, "stages", lambda device, tiny: list(todo))
    monkeypatch.setattr(sys, "argv", ["bringup", "--out", str(tmp_path / "out")])
    monkeypatch.setattr(bringup.signal, "signal", lambda *_: None)
    assert bringup.main() == 0
    assert "torch sees no GPU" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "out" / "bringup.json").read_text())["stages"]) == ["facts"]


@pytest.mark.full
@needs_triton
def test_end_to_end_on_a_bare_machine(bare, tmp_path):
    """Facts, steps and timings, in Triton's interpreter."""
    if metadata.version("triton").startswith("3.6.") and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 needs numpy below 2.4")
    command = [sys.executable, "-m", "benchmarks.bringup", "--device", "cpu", "--tiny", "--minutes", "5", "--out",
               str(tmp_path / "out"), "--only", "smoke", "gpu", "timings"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "out" / "bringup.json").read_text())
    found = record["stages"]
    assert {name: of["outcome"] for name, of in found.items()} == dict.fromkeys(
        ("facts", "smoke", "gpu", "timings"), "ok"
    )
    assert set(found["gpu"]["counts"]) == {"skipped"}
    absent = rft.backends()["cuda"]
    assert found["smoke"]["items"].pop("cuda, all methods") == {"outcome": "skipped", "why": absent}
    assert {of["outcome"] for of in found["smoke"]["items"].values()} == {"ok"}
    (timed,) = found["timings"]["items"].values()
    assert set(timed["contenders"]) == {"torch fused", "AdamSPD", "AdamSPD, one launch", "AdamSPD, eager", "copy"}
    assert all(of["device"] > 0 and of["seconds"] > 0 for of in timed["contenders"].values())
    assert set(timed["sweeps"]) == {"step_sweep", "pull_sweep", "ticket_sweep"}
    assert timed["fired"] > 0
    assert timed["absent"] == {"AdamSPD, CUDA": absent}
    text = (tmp_path / "out" / "bringup.md").read_text()
    assert "No GPU was at work" in text
    assert "Predictions" not in text
    assert f"- smoke, cuda, all methods: skipped: {absent}" in text
    assert f"AdamSPD, CUDA: {absent}" in text
    assert f"cuda is not ready ({absent}), triton is ready" in text
    assert "| host time: µs until the call returns | torch fused | AdamSPD |" in text


@pytest.mark.parametrize(
    "files",
    [
        "tests/test_steps.py tests/test_precision.py tests/test_triton.py tests/test_gpu.py tests/test_gpu_cuda.py "
        "tests/test_spread.py",
        "benchmarks.bringup.timings",
    ],
)
def test_nothing_on_the_way_needs_what_is_absent(bare, files):
    """Collects what `make test-gpu` runs, and imports what `bringup` runs."""
    collect = ["-m", "pytest", "--collect-only", "-q", *files.split()]
    command = collect if files.startswith("tests") else ["-c", f"import {files}"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_a_step_needs_no_numpy(bare, tmp_path):
    (tmp_path / "bare" / "sitecustomize.py").write_text(BARE.replace("('tqdm'", "('numpy', 'tqdm'"))
    text = """
import warnings
warnings.simplefilter("ignore")  # torch says that there is no numpy
import torch, robustft_kernels as rft
from robustft_kernels.testing import CASES, SETTINGS, Stepper
from tests.table import covering
p = torch.nn.Parameter(torch.ones(40000))
optimizer = rft.AdamSPD([p], backend="reference")
for _ in range(2):
    p.grad = torch.ones_like(p)
    optimizer.step()
assert optimizer.telemetry()["0"].deviation > 0
stepper = Stepper(CASES, SETTINGS[0], "spd", torch.float32)
stepper.run("reference", stepper.grads())
assert len(covering(0)) > 50
"""
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def built(monkeypatch, said, path="/bin"):
    """What the build comes to without an extension, when setup.py says that."""
    monkeypatch.setattr(build, "fresh", lambda: False)
    monkeypatch.setattr(build, "missing", lambda: "the C++ extension cannot be imported")
    monkeypatch.setattr(build.shutil, "which", {"/bin": lambda name: f"/bin/{name}", "": lambda name: None}[path])
    monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: SimpleNamespace(stderr=said))
    return build.build()


def test_a_build_says_why_there_is_no_extension(monkeypatch):
    with pytest.raises(RuntimeError, match=r"setup\.py: it goes on WITHOUT the native backend: CompileError"):
        built(monkeypatch, "noise\nit goes on WITHOUT the native backend: CompileError\nnoise")
    with pytest.raises(RuntimeError, match=r"setup\.py: ValueError: invalid pyproject"):
        built(monkeypatch, "Traceback\nValueError: invalid pyproject")
    left_out = built(monkeypatch, "", path="")
    assert left_out["outcome"] == "skipped"
    finding = Finding("build", "ok", 1.0, {"skipped": 1}, {"C++ extension": left_out})
    record = {"device": "cpu", "minutes": 9.0, "began": "now", "stages": {"build": vars(finding)}}
    assert "- build, C++ extension: skipped: no C++ compiler" in page.page_of(record)


class Event:
    """A mark of a feigned stream, which passes a millisecond each time."""

    now = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.now += 1
        self.at = Event.now

    def synchronize(self):
        assert self.at <= Event.now

    def elapsed_time(self, end):
        return float(end.at - self.at)


def test_the_clock_of_a_gpu(monkeypatch):
    waits = []
    for name, of in (("Event", Event), ("synchronize", lambda: None), ("_sleep", waits.append)):
        monkeypatch.setattr(torch.cuda, name, of)
    clock = timings.Clock(torch.device("cuda"))
    entrants = {name: SimpleNamespace(prepare=lambda: None, step=lambda: None) for name in ("a", "b")}
    found = timings.on_device(entrants, clock, {"a": 1e-3, "b": 1.0}, 5)
    assert found == {name: [1e-3] * 5 for name in "ab"}
    assert waits[:2] == [int(2.1e-3 * timings.CYCLES), int(2e-2 * timings.CYCLES)]


def test_the_facts_of_a_gpu(monkeypatch):
    of = {"major": 9, "minor": 0, "total_memory": 85e9, "multi_processor_count": 132, "L2_cache_size": 5e7}
    known = SimpleNamespace(**of, memory_clock_rate=2619000, memory_bus_width=5120)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: known)
    assert facts.gpu_facts()["peak, GB/s"] == 3352
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(**of))
    assert facts.peak() == 0


def test_the_largest_lists_leave_out_what_has_no_room():
    n, free = 1_235_814_400, 83e9
    taken, absent = timings.with_room(timings.contenders(torch.float32, {}), n, torch.float32, free)
    assert list(taken) == ["torch fused", "AdamSPD", "AdamSPD, CUDA"]
    needed = {"AdamSPD, one launch": 20, "AdamSPD, eager": 40}
    assert absent == {name: f"needs {gigabytes} GB beside the others" for name, gigabytes in needed.items()}
    taken, absent = timings.with_room(timings.contenders(torch.bfloat16, {}), n, torch.bfloat16, free)
    assert {"AdamSPD, one launch", "AdamSPD, bf16 moments"} <= set(taken)
    assert not timings.with_room(timings.contenders(torch.float32, {}), 10**6, torch.float32, free)[1]


def test_fewer_steps_than_after_which_nothing_fires():
    from benchmarks.contest import ROUNDS, WARM_UP

    assert ROUNDS[1] + WARM_UP >= 3 * timings.STEPS + WARM_UP


def test_predictions_are_those_of_the_docs():
    docs = (ROOT / "docs" / "architecture.md").read_text()
    told = re.findall(r"^\| (.+) \| (.+) \| ([\d.]+ to [\d.]+) \|$", docs, flags=re.M)
    assert told == [(of.on, of.what, f"{of.low:g} to {of.high:g}") for of in page.PREDICTIONS]
    assert {of.on for of in page.PREDICTIONS} < set(timings.LISTS)


def test_measured_stands_beside_predicted():
    sweep = {"seconds": [3.4e-3, 3.41e-3, 3.5e-3], "bytes": 32 * 304326632, "of peak": 0.9}
    of = {"contenders": {"AdamSPD": {"device_ratio": [1.1, 1.15, 1.2]}}, "sweeps": {"step_sweep": sweep}}
    rows = [prediction.row({page.VIT_L: of}) for prediction in page.PREDICTIONS]
    assert [row[-2:] for row in rows[:5]] == [
        ["3.41", "as predicted"], ["90", "above"], ["–", "not measured"], ["1.15", "below"], ["–", "not measured"]
    ]  # fmt: skip


def test_every_share_fits_the_time():
    """Stages that end early leave their time to the later ones."""
    names = [stage.name for stage in bringup.stages("cuda", False)]
    assert names == ["facts", "build", "smoke", "table", "gpu", "timings"]
    assert sum(stage.share for stage in bringup.stages("cuda", False)) == 9 * 60


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_what_runs_on_a_gpu_installs_nothing():
    command = ["make", "-n", "-C", str(ROOT), "bringup", "test-gpu", "bench-gpu"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "-m pytest --device cuda" in told
    assert "tests/test_gpu.py" in told
    assert "tests/test_gpu_cuda.py" in told
    assert "pip" not in told.split()


def test_the_metadata_suits_setuptools_75():
    """It takes no licence by name in pyproject.toml, and no project.license-files."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not isinstance(project.get("license"), str)
    assert "license-files" not in project
    assert "license" in project["dynamic"]


def test_lines_that_were_cut_off_are_passed_over(tmp_path):
    (tmp_path / "log").write_text('{"item": "a", "outcome": "begun"}\n{"item": "a", "outc')
    assert items.read(tmp_path / "log") == [{"item": "a", "outcome": "begun"}]
    assert Finding("it", "ok", 3.2, {"ok": 2}).line() == "it: ok in 3 s (2 ok)"
