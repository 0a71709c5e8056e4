"""The demo at small sizes, what it and the linear model show, and every example of README and docs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.linear import run as linear

ROOT = Path(__file__).parent.parent


def test_demo_small(tmp_path):
    command = [sys.executable, "-m", "examples.digits.run", "--seeds", "2", "--steps", "12", "--pretrain-steps", "16"]
    command += ["--lr", "1e-3", "--cache", tmp_path / "cache", "--out", tmp_path / "out"]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [line.split("|")[1:-1] for line in first.stdout.splitlines() if line.startswith("| 0.001")]
    deviation = {row[1].strip(): float(row[-1]) for row in rows}
    assert len(deviation) == 16
    assert 0 < deviation["AdamSPD, λ=2"] <= deviation["AdamSPD, λ=1"] <= deviation["AdamW"]
    for nearer in ("L2-SP, λ=10", "PGM, γ=0.3", "TPGM, each step", "FTP, k=1", "WiSE-FT, α=0.5", "LP-FT"):
        assert deviation[nearer] < deviation["AdamW"], nearer
    assert deviation["TPGM, once"] <= deviation["AdamW"]
    assert deviation["LP"] == 0
    pictures = sorted((tmp_path / "out").glob("*.png"))
    assert [p.name for p in pictures] == ["digits-id-ood.png", "digits-layers.png"]
    assert all(p.stat().st_size > 10_000 for p in pictures)
    assert "pre-train" in first.stderr
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pre-train" not in second.stderr  # cached
    assert rows == [line.split("|")[1:-1] for line in second.stdout.splitlines() if line.startswith("| 0.001")]


def test_robust_methods_show_on_real_data(tmp_path):
    """What a short run can hold: SPD deviates less than AdamW, and TPGM is more accurate out of distribution."""
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
    """The expected loss, and the farther the pre-trained weights are from their aim, the larger the best α."""
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


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code, tmp_path):
    """Each block of README and docs stands alone, so that it can be pasted."""
    subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", code], cwd=tmp_path, check=True)
