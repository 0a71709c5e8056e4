"""The contract of the generated code, held without a GPU: kernels compiled ahead of time for four of them.

What they came to is kept in benchmarks/results/codegen.json. Here the file is held to the contract and to the source.
One kernel is compiled to see that the file tells the truth. The full tier compiles a seventh of them, and
`make test-exhaustive` all.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

import robustft_kernels as rft

pytestmark = pytest.mark.skipif("triton is not installed" in rft.backends()["triton"], reason="needs triton")
codegen = pytest.importorskip("benchmarks.codegen", reason="needs triton", exc_type=ImportError)
EVERY = 7  # kernels in their list. It shares no divisor with three kinds and four GPUs, so all of these are met
LIVE = ("adamw, bf16, anchor bf16", "step_sweep", "sm_90")


@pytest.fixture(scope="module")
def kept():
    return codegen.read()


def compiled_anew(program, folder):
    """What the program prints of the module `codegen`. It runs in its own process, since Triton interprets in this one,
    and with an empty cache."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", f"import json\nfrom benchmarks import codegen\nprint(json.dumps({program}))"]
    env["TRITON_CACHE_DIR"] = str(folder)
    out = subprocess.run(command, cwd=codegen.ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(out.stdout)


def named(row):
    return f"{row['kernel']} of {row['variant']} for {row['target']}"


def every_kernel_is_there_for_every_gpu(kernels, _):
    assert {row["target"] for row in kernels} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {row["dtype"] for row in kernels} == {"fp32", "bf16", "fp16", "fp64"}
    names = {row["variant"] for row in kernels}
    assert len(names) >= 25
    for name in names:
        of_one = sorted(row["kernel"] for row in kernels if row["variant"] == name)
        expected = {"rows": ["row_pull", "row_step", "row_survey"], "norm": ["norm_sweep"]}
        assert of_one == sorted(4 * expected.get(name[:4], ["pull_sweep", "step_sweep", "ticket_sweep"])), name


def nothing_spills_and_no_float_is_added_atomically(kernels, _):
    """The one-launch form spills a few words in some variants."""
    for row in kernels:
        assert row["spills"] <= (4 if row["kernel"] == "ticket_sweep" else 0), named(row)
        assert row["float_atomics"] == 0, named(row)


NEEDS_MORE = ("master", "bf16 moments", "gradients anywhere", "coupled")
WITH_MOMENTS = ("step_sweep", "ticket_sweep", "row_step")


def half_of_an_sms_threads_are_resident(kernels, _):
    """Three eighths in the one-launch form and where much is kept in registers. A quarter in float64, with 8-bit
    moments, by rows, and with amsgrad that only some have. An eighth by rows in float64 or with 8-bit moments."""
    for row in kernels:
        if row["target"] == "sm_90":
            wide = row["dtype"] == "fp64" or ("8-bit" in row["variant"] and row["kernel"] in WITH_MOMENTS)
            expected = 0.5 / 2 ** (wide + row["variant"].startswith("rows"))
            if row["kernel"] == "ticket_sweep" or any(word in row["variant"] for word in NEEDS_MORE):
                expected = min(expected, 0.375)
            if "amsgrad" in row["variant"] and "mixed" in row["variant"]:
                expected = min(expected, 0.25)
            assert codegen.occupancy(row["registers"], row["threads"]) >= expected, (named(row), row["registers"])


def nothing_moves_between_threads_in_a_loop(kernels, _):
    """All streams are in one layout, so no loop over elements waits at a barrier. Only 8-bit moments do, whose blocks
    are compared."""
    for row in kernels:
        if row["target"] != "gfx942" and not ("8-bit" in row["variant"] and row["kernel"] in WITH_MOMENTS):
            assert row["barriers"] == 0, named(row)


def roots_and_divisions_are_exact(kernels, _):
    for row in kernels:
        if row["target"] != "gfx942":
            assert row["approximate"] == 0, named(row)


def accesses_are_wide(kernels, _):
    """A thread takes four neighbours. One instruction loads what it takes of θ, g, θ₀ or a moment, and one stores what
    it takes of θ or a moment: 16 bytes in float32, 8 in 16 bits. Each pull has its own for θ and θ₀, and sweep 1
    contains a pull. Gradients that may lie anywhere are narrow alone."""
    pulls = {"step_sweep": 1, "pull_sweep": 1, "ticket_sweep": 2}
    seen = 0
    for row in kernels:
        dtype, kernel = row["dtype"], row["kernel"]
        name = f"adamw, {dtype}, anchor {dtype}"
        narrow = row["variant"] == f"{name}, gradients anywhere"
        if (row["variant"] == name or narrow) and dtype != "fp64" and row["target"] != "gfx942":
            step = kernel != "pull_sweep"
            expected = {
                ("ld", "weights"): step * (3 - narrow) + 2 * pulls[kernel], ("st", "weights"): step + pulls[kernel],
                ("ld", "moments"): 2 * step, ("st", "moments"): 2 * step,
            }  # fmt: skip
            width = {"weights": ".v4.b32" if dtype == "fp32" else ".v2.b32", "moments": ".v4.b32"}
            for way in ("ld", "st"):
                found = dict.fromkeys(width.values(), 0)
                wanted = dict(found)
                for of in ("weights", "moments"):
                    wanted[width[of]] += expected[way, of]
                    found[width[of]] = sum(
                        n for access, n in row["accesses"].items() if access.startswith(way) and width[of] in access
                    )
                assert found == wanted, named(row)
            seen += 1
        elif row["variant"] == f"rows, adamw, {dtype}, anchor {dtype}" and row["target"] != "gfx942":
            width = {"fp32": ".v4.b32", "fp64": ".v2.b64"}.get(dtype, ".v2.b32")
            assert any(width in access for access in row["accesses"]), named(row)
    assert seen == 45  # three dtypes, and two of them with gradients anywhere; three kernels and targets


def accesses_are_wide_on_amd(kernels, _):
    for row in kernels:
        if row["target"] == "gfx942" and row["variant"] in ("adamw, fp32, anchor fp32", "adamw, bf16, anchor bf16"):
            width = "dwordx4" if row["dtype"] == "fp32" else "dwordx2"
            wide = [access for access in row["accesses"] if access.endswith(width)]
            assert {access.split("_")[1] for access in wide} == {"load", "store"}, named(row)


CONTRACT = [
    every_kernel_is_there_for_every_gpu,
    nothing_spills_and_no_float_is_added_atomically,
    half_of_an_sms_threads_are_resident,
    nothing_moves_between_threads_in_a_loop,
    roots_and_divisions_are_exact,
    accesses_are_wide,
    accesses_are_wide_on_amd,
]


@pytest.mark.parametrize("holds", CONTRACT, ids=lambda holds: holds.__name__)
def test_what_is_kept_holds_the_contract(kept, holds):
    holds(kept["kernels"], kept["triton"])


def test_what_is_kept_is_of_this_source(kept, tmp_path):
    assert kept["source"] == compiled_anew("codegen.digest()", tmp_path), (
        "a kernel has changed, and its facts have not: run `make codegen`"
    )
    page = codegen.PAGE.read_text()
    assert page == codegen.page(page), "docs/codegen.md does not tell what is kept: run `make codegen`"


def test_comments_alone_need_no_new_facts():
    one = 'def f(x):\n    """What."""\n    return x + 1\n'
    same = '# More\ndef f(x):\n    """Other words."""\n\n    return x + 1  # and more\n'
    assert codegen.code_of(one) == codegen.code_of(same)
    for other in (one.replace("+", "-"), one.replace("1", "2"), one.replace("    return", "return")):
        assert codegen.code_of(one) != codegen.code_of(other)


def test_one_kernel_compiled_anew(kept, tmp_path):
    """Facts are compared if the compiler is the one of the kept facts. Another one may allot registers otherwise."""
    name, kernel, target = LIVE
    which = next(k for k, shipped in enumerate(codegen.VARIANTS) if shipped.name == name)
    found = compiled_anew(f"codegen.facts(({which}, {kernel!r}, {target!r}))", tmp_path)
    (expected,) = (row for row in kept["kernels"] if (row["variant"], row["kernel"], row["target"]) == LIVE)
    assert found["spills"] == found["float_atomics"] == 0
    if kept["triton"] == version("triton"):
        assert found == expected


@pytest.mark.full
def test_a_seventh_compiled_anew(kept, tmp_path):
    """Which ones changes with the source."""
    if kept["triton"] != version("triton"):
        pytest.skip(f"the facts are of Triton {kept['triton']}")
    first = int(kept["source"], 16) % EVERY
    assert compiled_anew(f"codegen.compile_all({first}, {EVERY})", tmp_path) == kept["kernels"][first::EVERY]


@pytest.mark.exhaustive
def test_all_compiled_anew(kept, tmp_path):
    found = compiled_anew("codegen.compile_all()", tmp_path)
    for holds in CONTRACT:
        holds(found, version("triton"))
    if kept["triton"] == version("triton"):
        assert found == kept["kernels"]
