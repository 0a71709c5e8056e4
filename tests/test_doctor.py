"""The command robustft doctor: what it tells of a machine, and what it advises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import robustft_kernels as rft

pytest.importorskip("click")
from robustft_kernels.command import doctor

ROOT = Path(__file__).parent.parent


def test_doctor():
    done = subprocess.run(
        [sys.executable, "-m", "robustft_kernels", "doctor"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert set(rft.backends()) <= set(done.stdout.split())
    assert "backend reference" in done.stdout
    assert ("backend native" in done.stdout) == (not rft.backends()["native"])
    assert torch.__version__ in done.stdout
    assert "times torch's" in done.stdout


def test_advice_names_what_is_missing(monkeypatch):
    ready = {"cuda": "", "triton": "", "native": "it was not built", "reference": ""}
    assert any("it was not built" in line for line in doctor.advice(ready))
    monkeypatch.setattr(doctor, "_cores", lambda: torch.get_num_threads() + 1)
    assert any("OMP_NUM_THREADS" in line for line in doctor.advice({**ready, "native": ""}))
    monkeypatch.setattr(os, "getloadavg", lambda: (1e9, 0.0, 0.0))
    assert any("load" in line for line in doctor.advice({**ready, "native": ""}))
