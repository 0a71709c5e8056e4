"""The contract of the generated code, held without a GPU: kernels compiled ahead of time for four of them."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from robustft_kernels import ops

pytestmark = pytest.mark.skipif("triton is not installed" in ops.backends()["triton"], reason="needs triton")


@pytest.fixture(scope="module")
def kernels():
    """What benchmarks/codegen.py found. Its own process: here Triton interprets."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.codegen", "--json"]
    out = subprocess.run(
        command, cwd=Path(__file__).parent.parent, env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(out.stdout)


def named(row):
    return f"{row['kernel']} of {row['variant']} for {row['target']}"


def test_every_kernel_compiles_for_every_gpu(kernels):
    assert {row["target"] for row in kernels} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {row["dtype"] for row in kernels} == {"fp32", "bf16", "fp16", "fp64"}
    names = {row["variant"] for row in kernels}
    assert len(names) >= 25
    for name in names:
        of_one = sorted(row["kernel"] for row in kernels if row["variant"] == name)
        expected = {"rows": ["row_pull", "row_step", "row_survey"], "norm": ["norm_sweep"]}
        assert of_one == sorted(4 * expected.get(name[:4], ["pull_sweep", "step_sweep", "ticket_sweep"])), name


def test_nothing_spills_and_no_float_is_added_atomically(kernels):
    older = tuple(map(int, version("triton").split(".")[:2])) < (3, 9)  # it spills some words of the one-launch form
    for row in kernels:
        assert row["spills"] == 0 or (older and row["kernel"] == "ticket_sweep" and row["spills"] < 16), named(row)
        assert row["float_atomics"] == 0, named(row)


def test_half_of_an_sms_threads_are_resident(kernels):
    """Three eighths with master weights or bfloat16 moments, a quarter in float64 and by rows, an eighth in both."""
    from benchmarks.codegen import occupancy

    for row in kernels:
        if row["target"] == "sm_90":
            expected = 0.5 / 2 ** ((row["dtype"] == "fp64") + row["variant"].startswith("rows"))
            if "master" in row["variant"] or "bf16 moments" in row["variant"]:
                expected = min(expected, 0.375)
            assert occupancy(row["registers"], row["threads"]) >= expected, (named(row), row["registers"])


def test_accesses_are_16_bytes_wide(kernels):
    """Each of θ, g, θ₀ and the moments is loaded, and θ and the moments stored, by one instruction for what a thread
    takes, moments beside 16-bit weights by two; each pull has its own for θ and θ₀, and sweep 1 contains a pull."""
    pulls = {"step_sweep": 1, "pull_sweep": 1, "ticket_sweep": 2}
    seen = 0
    for row in kernels:
        dtype = row["dtype"]
        if row["variant"] == f"adamw, {dtype}, anchor {dtype}" and dtype != "fp64" and row["target"] != "gfx942":
            moments = 2 if dtype == "fp32" else 4
            step = row["kernel"] != "pull_sweep"
            wide = {
                k: sum(n for access, n in row["accesses"].items() if access.startswith(k) and ".v4.b32" in access)
                for k in ("ld", "st")
            }
            assert wide["ld"] == step * (3 + moments) + 2 * pulls[row["kernel"]], named(row)
            assert wide["st"] == step * (1 + moments) + pulls[row["kernel"]], named(row)
            seen += 1
        elif row["variant"] == f"rows, adamw, {dtype}, anchor {dtype}" and row["target"] != "gfx942":
            width = {"fp32": ".v4.b32", "fp64": ".v2.b64"}.get(dtype, ".v2.b32")
            assert any(width in access for access in row["accesses"]), named(row)
    assert seen == 27  # three dtypes, kernels and targets


def test_accesses_are_wide_on_amd(kernels):
    for row in kernels:
        if row["target"] == "gfx942" and row["variant"] in ("adamw, fp32, anchor fp32", "adamw, bf16, anchor bf16"):
            wide = [access for access in row["accesses"] if access.endswith("dwordx4")]
            assert {access.split("_")[1] for access in wide} == {"load", "store"}, named(row)
