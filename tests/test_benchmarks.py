"""The benchmarks measure what they say, refuse what is wrong, and the page tells what was found."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import robustft_kernels as rft
from benchmarks import machine, memory, report
from benchmarks.check import compare
from benchmarks.contenders import CHOICES, METHODS, PEERS, TORCH, Contender
from benchmarks.contest import ROUNDS, WARM_UP, Field, Stepper, Times
from benchmarks.results import Results, Row, read, write
from benchmarks.shapes import MODELS, SMOKE, numel
from robustft_kernels.backends import registry

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "benchmarks" / "results" / "cpu.json"
needs_native = pytest.mark.skipif(bool(rft.backends()["native"]), reason=rft.backends()["native"])
COMMAND = [sys.executable, "-m", "pytest", "benchmarks", "-o", "python_files=bench_*.py", "-o",
           "python_functions=bench_*", "-o", "filterwarnings=ignore", "--smoke", "--benchmark-quiet"]  # fmt: skip


def test_models_have_as_many_parameters_as_is_known():
    known = {"ResNet-50": 25_557_032, "Swin-T": 28_288_354, "ViT-B/16": 86_567_656, "ViT-L/16": 304_326_632,
             "ViT-H/14": 632_045_800, "LLaMA-7B, LoRA r=8": 8_388_608, "LLaMA-1B": 1_235_814_400}  # fmt: skip
    assert {name: numel(shapes) for name, shapes in MODELS.items()} == known


@pytest.mark.parametrize(
    ("contender", "dtype", "fired", "expected"),
    [
        (TORCH["torch fused"], torch.float32, 0, 28),
        (TORCH["torch fused"], torch.bfloat16, 0, 14),
        (METHODS["AdamW (none)"], torch.float32, 1, 28),
        (METHODS["AdamSPD"], torch.float32, 0, 32),
        (METHODS["AdamSPD"], torch.float32, 1, 44),
        (METHODS["AdamSPD"], torch.bfloat16, 0.5, 27),
        (METHODS["AdamSPD, by rows"], torch.float32, 1, 32),
        (METHODS["MARS-SP"], torch.float32, 0, 40),
        (METHODS["AdamFTP"], torch.float32, 1, 40),
        (CHOICES["float32"]['AdamSPD, anchor="zero"'], torch.float32, 1, 36),
        (CHOICES["float32"]["AdamSPD, bf16 anchor"], torch.float32, 0, 30),
        (CHOICES["bfloat16"]["AdamSPD, bf16 moments"], torch.bfloat16, 0, 16),
        (CHOICES["bfloat16"]["AdamSPD, master weights"], torch.bfloat16, 0, 32),
        (CHOICES["bfloat16"]["AdamSPD, by rows, master weights"], torch.bfloat16, 1, 32),
        (CHOICES["bfloat16"]["AdamSPD, bf16 moments, stochastic rounding"], torch.bfloat16, 0, 16),
        (CHOICES["bfloat16"]["AdamSPD, 8-bit moments"], torch.bfloat16, 0, 12),
        (PEERS["torchao, 8-bit"], torch.float32, 0, 16),
    ],
)
def test_bytes_are_those_of_the_design(contender, dtype, fired, expected):
    assert contender.moves([10**6], dtype, fired) == expected * 10**6


@needs_native
@pytest.mark.parametrize(
    ("dtype", "contender"),
    [
        (torch.float32, METHODS["AdamSPD"]),
        (torch.bfloat16, METHODS["AdamSPD"]),
        (torch.bfloat16, CHOICES["bfloat16"]["AdamSPD, bf16 moments"]),
    ],
    ids=["float32", "bfloat16", "bfloat16, bf16 moments"],
)
@pytest.mark.parametrize("fire", [0.0, 0.5, 1.0])
def test_as_much_fires_as_was_asked_for_round_after_round(fire, dtype, contender):
    on = Field([(50, 100)] * 40 + [(7,)], dtype, torch.device("cpu"), fire)
    stepper = Stepper(contender, on)
    fired = []
    for _ in range(1 + WARM_UP + ROUNDS[1]):
        stepper.prepare()
        stepper.step()
        on.turn()
        fired.append(stepper.fired())
    assert fired[0] == 0
    assert all(abs(share - fire) < 0.03 for share in fired[1:]), fired


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_to_fire_can_be_held_back(dtype):
    """With what is counted of the bytes: without firing, those of sweep 1 alone."""
    on = Field([(50, 400)] * 40, dtype, torch.device("cpu"), 0.5)
    stepper = Stepper(METHODS["AdamSPD"], on)
    for t, firing in enumerate((True, True, False, False, True, True)):
        if t:
            on.let_fire(firing)
        stepper.prepare()
        stepper.step()
        on.turn()
        expected = 0.5 if firing and t else 0.0
        assert stepper.fired() == pytest.approx(expected, abs=0.03)
        assert stepper.moved() == pytest.approx(METHODS["AdamSPD"].moves(on.sizes, dtype, expected), rel=0.02)


def test_host_and_wall_are_told_apart():
    times = Times()
    times.add(lambda: sum(range(10**5)), torch.device("cpu"))
    assert 0 < times.host[0] <= times.wall[0]


def test_other_processes_are_noticed():
    others = machine.Others()
    busy = [sys.executable, "-c", "import time; t = time.time()\nwhile time.time() < t + 1: pass"]
    subprocess.run(busy, check=True)
    if not machine._ticks():
        pytest.skip("this system does not tell how busy it is")
    assert others.cores() > 0.3


def test_what_is_not_installed_says_so(monkeypatch):
    contender = Contender(lambda params: None, "no_such_package")
    assert contender.missing(torch.device("cpu")) == "no_such_package is not installed"
    monkeypatch.setitem(memory.CHOICES, "it", (torch.float32, contender))
    with pytest.raises(SystemExit, match="no_such_package is not installed"):
        memory.main("it", "cpu")


@needs_native
def test_nothing_is_timed_that_is_wrong(monkeypatch):
    from benchmarks.conftest import check_results

    check_results(torch.device("cpu"))
    right = registry.BACKENDS["native"]

    def wrong(table):
        run = right.prepare(table)

        def step(*args):
            run(*args)
            table.tensors[0].param.mul_(1.001)

        return step

    monkeypatch.setitem(registry.BACKENDS, "native", replace(right, prepare=wrong))
    with pytest.raises(AssertionError):
        check_results(torch.device("cpu"))


def row(name, ratio, watched="ours", baseline="torch fused", trusted=True, speed=1e9, processes=3, **told):
    contenders = {"ours": {"ratio": ratio}, "torch fused": {"ratio": [1, 1, 1]}}
    if baseline == "ours":
        contenders = {"ours": {"ratio": [1, 1, 1]}, "eager": {"ratio": ratio}}
    contenders["copy"] = {"ratio": [9, 9, 9], "seconds": 1.0, "bytes": speed}
    told = {"contenders": contenders, "watched": watched, "baseline": baseline, "trusted": trusted, **told}
    return Row("methods", name, {**told, "processes": processes})


@pytest.mark.parametrize(
    ("new", "old", "lost"),
    [
        (row("a", [1.3, 1.4, 1.5]), row("a", [1.0, 1.1, 1.2]), True),
        (row("a", [1.15, 1.4, 1.5]), row("a", [1.0, 1.1, 1.2]), False),  # the ranges overlap
        (row("a", [1.12, 1.13, 1.14]), row("a", [1.09, 1.1, 1.11]), False),  # by 3%
        (row("a", [1.49, 1.51, 1.52]), row("a", [1.30, 1.32, 1.35]), True),
        (row("a", [1.49, 1.51, 1.52], processes=1), row("a", [1.30, 1.32, 1.35], processes=1), False),  # it has been so
        (row("a", [1.6, 1.61, 1.62]), row("a", [1.30, 1.32, 1.35], processes=1), True),
        (row("a", [0.5, 0.6, 0.7]), row("a", [1.0, 1.1, 1.2]), False),
        (row("new", [9, 9, 9]), row("a", [1, 1, 1]), False),
        (row("a", [3, 4, 4.5], baseline="ours"), row("a", [5, 6, 7], baseline="ours"), True),
        (row("a", [8, 9, 9.5], baseline="ours"), row("a", [5, 6, 7], baseline="ours"), False),
        (row("a", [9, 9, 9], watched="torch fused", ours=["ours"]), row("a", [1, 1, 1]), True),  # not watched, but ours
        (row("a", [9, 9, 9], watched="copy", ours=["absent"]), row("a", [1, 1, 1]), False),
    ],
)
def test_a_loss_beyond_the_spread_fails(new, old, lost):
    losses, unjudged, judged = compare(Results({}, [new]), Results({}, [old]))
    assert (list(losses), unjudged, judged) == ([new.name] * lost, [], int(new.name == old.name))


@pytest.mark.parametrize(
    ("other", "why"), [({"trusted": False}, "something else was at work"), ({"speed": 1.4e9}, "a copy ran at 1 GB/s")]
)
def test_what_was_not_measured_alike_is_not_judged(other, why):
    new, old = row("a", [9, 9, 9], **other), row("a", [1, 1, 1])
    losses, (line,), judged = compare(Results({}, [new]), Results({}, [old]))
    assert (losses, judged) == ({}, 0)
    assert why in line


def smoke(pick, folder):
    found = folder / "found.json"
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # not a worker's
    command = [*COMMAND, "-k", pick, f"--benchmark-json={found}"]
    run = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return read(found)


@needs_native
@pytest.mark.parametrize(
    ("choice", "state"),
    [
        pytest.param("float32: torch fused", 8, marks=pytest.mark.full),
        ("float32: AdamSPD", 12),
        pytest.param('float32: AdamSPD, anchor="zero"', 8, marks=pytest.mark.full),
        pytest.param("float32: AdamSPD, weights from a bf16 checkpoint", 10, marks=pytest.mark.full),
        ("float32: AdamSPD, anchors in a file", 8),
        ("bfloat16: AdamSPD, master weights, bf16 moments", 10),
    ],
)
def test_memory_is_that_of_the_state(choice, state):
    found = memory.found(choice, "cpu", smoke=True)
    assert found["state"] == pytest.approx(state, abs=0.01), found
    batch = 64 * 4096 / numel(SMOKE)  # Linux counts the pages of a process in batches of this size
    assert 0 < found["kept"] <= found["peak"] + batch


@needs_native
def test_a_smoke_run_and_its_report(tmp_path):
    """Every kind of contest, on tensors of a few thousand elements."""
    picks = {
        "peers": "ResNet", "others": "ResNet", "eager": "Res", "methods": "methods", "tensors": "100", "fire": "fire",
        "parameters": "1-", "threads": "threads", "parts": "parts", "projections": "projections", "tpgm": "not run",
        "precision": "precision", "memory": "bfloat16 and fused", "eight_bit": "eight",
    }  # fmt: skip
    results = smoke(" or ".join(f"({question} and {which})" for question, which in picks.items()), tmp_path)
    assert {row.question for row in results.rows} == set(picks)
    assert all(row["parameters"] == numel(SMOKE) for row in results.rows)
    write(results, tmp_path / "kept.json")
    kept = read(tmp_path / "kept.json")
    assert kept == results
    assert [list(row.contenders) for row in kept.rows] == [list(row.contenders) for row in results.rows]
    report.write_page(results, tmp_path / "benchmarks.md")
    text = (tmp_path / "benchmarks.md").read_text()
    assert "| AdamFTP |" in text
    assert "{" not in text
    assert len(list(tmp_path.glob("benchmarks-*.png"))) == 5


def test_the_page_tells_what_was_kept(tmp_path):
    results = read(KEPT)
    assert json.loads(KEPT.read_text())["machine"]["commit"]
    report.write_page(results, tmp_path / "benchmarks.md")
    assert (tmp_path / "benchmarks.md").read_text() == (ROOT / "docs" / "benchmarks.md").read_text()
