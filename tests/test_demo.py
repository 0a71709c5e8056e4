"""The demo at small sizes, what it and the linear model show, and every example of README and docs."""

import multiprocessing
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from examples.digits.methods import METHODS
from examples.linear import run as linear

ROOT = Path(__file__).parent.parent


@pytest.mark.full
def test_demo_small(tmp_path):
    command = [sys.executable, "-m", "examples.digits.run", "--seeds", "2", "--steps", "12", "--pretrain-steps", "16"]
    command += ["--lr", "1e-3", "--cache", tmp_path / "cache", "--out", tmp_path / "out"]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [line.split("|")[1:-1] for line in first.stdout.splitlines() if line.startswith("| 0.001")]
    deviation = {row[1].strip(): float(row[-1]) for row in rows}
    assert deviation.keys() == METHODS.keys()
    assert 0 < deviation["AdamSPD, λ=2"] <= deviation["AdamSPD, λ=1"] <= deviation["AdamW"]
    for nearer in ("L2-SP, λ=10", "PGM, γ=0.3", "TPGM, each step", "FTP, k=1", "WiSE-FT, α=0.5", "LP-FT", "RecAdam"):
        assert deviation[nearer] < deviation["AdamW"], nearer
    assert deviation["TPGM, once"] <= deviation["AdamW"]
    assert deviation["LP"] == 0
    pictures = sorted((tmp_path / "out").glob("*.png"))
    assert [p.name for p in pictures] == ["digits-id-ood.png", "digits-layers.png"]
    assert all(p.stat().st_size > 10_000 for p in pictures)
    assert "pre-train" in first.stderr
    again = [*command, "--methods", "AdamW", "AdamSPD, λ=1", "FTP, k=1"]
    second = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pre-train" not in second.stderr  # cached
    found = [line.split("|")[1:-1] for line in second.stdout.splitlines() if line.startswith("| 0.001")]
    assert [row[1].strip() for row in found] == again[-3:]
    assert all(row in rows for row in found)


@pytest.mark.full
def test_robust_methods_show_on_real_data(tmp_path):
    """This much holds in a short run: SPD deviates less than AdamW. TPGM is more accurate out of distribution."""
    command = [sys.executable, "-m", "examples.digits.run", "--methods", "AdamW", "AdamSPD, λ=1", "TPGM, each step"]
    command += ["--seeds", "1", "--steps", "200", "--pretrain-steps", "600", "--lr", "3e-3"]
    command += ["--cache", tmp_path / "cache", "--out", tmp_path / "out"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [line.split("|")[1:-1] for line in run.stdout.splitlines() if line.startswith("| 0.003")]
    deviation = {row[1].strip(): float(row[-1]) for row in rows}
    ood = {row[1].strip(): float(row[3].split("±")[0]) for row in rows}
    assert deviation["AdamSPD, λ=1"] < deviation["AdamW"]
    assert ood["TPGM, each step"] > ood["AdamW"]


def test_linear_model_stays_under_its_bound():
    """The expected loss does. And the farther the pre-trained weights are from their aim, the larger is the best α."""
    rows = linear.measure(problems=2, draws=200)
    assert all((row["losses"] <= row["bounds"]).all() for row in rows)
    for seed in (0, 1):
        best, learned = ([row[key] for row in rows if row["seed"] == seed] for key in ("best", "learned"))
        assert best == sorted(best)
        assert best[-1] > 4 * best[0]
        assert learned == pytest.approx([row["best of draw"] for row in rows if row["seed"] == seed], abs=0.05)


EXAMPLES = [
    pytest.param(code, id=f"{page.name}-{k}")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for k, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S))
]


def test_readme_has_examples():
    assert len(EXAMPLES) >= 3


@pytest.fixture(scope="module")
def forks():
    """Makes processes, as forks of one process. That one has imported torch, with what its first optimizer imports, and
    has done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "robustft_kernels", "tests.test_demo"])
    return context


def run_example(code, folder):
    """Does what `python -W error::RuntimeWarning -c code` would, in this process. What it says goes to a file."""
    os.chdir(folder)
    said = os.open("said", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    warnings.resetwarnings()
    warnings.simplefilter("error", RuntimeWarning)
    exec(compile(code, "example", "exec"), {"__name__": "__main__"})


def outcome(forks, code, folder):
    """The exit status of an example, and what it said."""
    process = forks.Process(target=run_example, args=(code, folder))
    process.start()
    process.join(timeout=300)
    process.kill()
    return process.exitcode, (folder / "said").read_text()


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(forks, code, tmp_path):
    """Each block of README and docs stands alone, so that it can be pasted."""
    status, said = outcome(forks, code, tmp_path)
    assert status == 0, said


@pytest.mark.parametrize(
    "wrong", ["print(rft)", "import numpy\nnumpy.log(numpy.zeros(3))"], ids=["an import forgotten", "a warning"]
)
def test_an_example_that_fails_is_found(forks, wrong, tmp_path):
    status, said = outcome(forks, wrong, tmp_path)
    assert status == 1
    assert re.search("NameError|RuntimeWarning", said)
