"""What the compilers make of the Triton kernels: registers, memory, the width of every access. It needs no GPU.

    python -m benchmarks.codegen            a table of what is kept
    python -m benchmarks.codegen --write    compiles all anew, and writes facts and table (make codegen)

Each is compiled for sm_80, sm_90, sm_100 and gfx942. The facts are kept in results/codegen.json, with the compiler's
version and a digest of the source. So tests/test_codegen.py need not compile to hold the kernels to them. `VARIANTS`
are the corners of what `variant_of` can ask for: both bases with and without their optional state, and every storage
dtype. Anchors are present, of another dtype, zero, or mixed. The options that take registers are among them.
"""

import argparse
import io
import json
import re
import subprocess
import tempfile
import tokenize
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import triton
from robustft_kernels.triton_kernels import norm, row_sweeps, sweeps
from robustft_kernels.triton_kernels.chunk import CALLERS
from robustft_kernels.triton_kernels.variant import Dtypes, Variant, options_of, variant_of
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from robustft_kernels.core.bases import ADAMW, NO_STEP, SGD, Base
from robustft_kernels.core.methods import RULES

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "benchmarks" / "results" / "codegen.json"
PAGE = ROOT / "docs" / "codegen.md"
HOST = ("__init__.py", "launch.py", "table.py", "variant.py")  # no line of these is compiled
KERNELS = tuple(path for path in sorted(ROOT.glob("triton_kernels/*.py")) if path.name not in HOST)
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
NAMES = {F32: "fp32", F64: "fp64", BF16: "bf16", F16: "fp16"}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# One kernel for all of each, as groups may mix them.
_CHOOSING = [rule for rule in RULES.values() if (rule.pulls or rule.surveys) and not rule.given]
_RARE = [
    rule.name for rule in RULES.values() if rule.penalty == "linear" or rule.cautious
]  # they need code of their own
TENSOR_RULES = ("keep", *sorted(rule.name for rule in _CHOOSING if not rule.crosses_rows and rule.name not in _RARE))
ROW_RULES = tuple(sorted(rule.name for rule in _CHOOSING if rule.crosses_rows))
RARE_RULES = tuple(_RARE)
ARGUMENTS = {
    "schedule": "*i32", "cursor": "*i32", "tensors": "*i64", "grads": "*i64", "owners": "*i32", "hyper": "*fp64",
    "live": "*i64", "partials": "*fp64", "counters": "*i32", "ready": "*i32", "results": "*fp64", "alphas": "*fp64",
    "grad_scale": "*fp32", "found_inf": "*fp32", "largest": "*i64", "counter": "*i32", "squared": "*fp64",
}  # fmt: skip


@dataclass(frozen=True)
class Shipped:
    """A variant by what asks for it.

    options: a gradient scaler, and hyper-parameters in tensors. mixed: only some tensors have an anchor and the last of
    the states. coupled: rules with a linear penalty, and cautious ones, are among the others. rows: the kernels for
    segments that are rows. low: bfloat16 moments. coded: moments in 8 bits. master: float32 master weights. norm: the
    kernel for the norm of the gradients. narrow: gradients at any address.
    """

    base: Base
    states: int
    param: torch.dtype
    anchor: torch.dtype | None
    stochastic: bool = False
    options: bool = False
    mixed: bool = False
    coupled: bool = False
    rows: bool = False
    low: bool = False
    coded: bool = False
    master: bool = False
    norm: bool = False
    narrow: bool = False

    @property
    def name(self) -> str:
        state = {("adamw", 3): " amsgrad", ("sgd", 1): " momentum"}.get((self.base.name, self.states), "")
        anchor = "zero" if self.anchor is None else NAMES[self.anchor]
        if self.norm:
            return f"norm of {NAMES[self.param]} gradients"
        extras = ", stochastic" * self.stochastic + ", scaler, tensor lr" * self.options
        extras += ", mixed" * self.mixed + ", coupled" * self.coupled
        extras += (
            ", bf16 moments" * self.low
            + ", 8-bit moments" * self.coded
            + ", master" * self.master
            + ", gradients anywhere" * self.narrow
        )
        return f"{'rows, ' * self.rows}{self.base.name}{state}, {NAMES[self.param]}, anchor {anchor}{extras}"

    @property
    def bytes(self) -> tuple[int, ...]:
        """What each sweep moves for a parameter. Sweep 1 reads θ, g, θ₀ and the state, and writes θ and the state.
        Sweep 2 pulls. By rows this is FTP, which moves the most. Its survey reads g and the delta, and its sweep 1
        writes the delta too."""
        size, anchor = self.param.itemsize, 0 if self.anchor is None else self.anchor.itemsize
        moment, delta = (8, 8) if self.param == F64 else (1 if self.coded else 2 if self.low else 4, 2)
        step, pull = 3 * size + anchor + 2 * moment * self.states, 2 * size + anchor
        if self.norm:
            return (size,)
        if self.master:  # read and written beside the weights; of the two, the pull reads the master alone
            step, pull = step + 8, 8 + size + anchor
        return (size + delta, step + delta, pull) if self.rows else (step, pull)

    @property
    def kernels(self) -> dict[str, Any]:
        if self.norm:
            return {"norm_sweep": norm.norm_sweep}
        if self.rows:
            return {name: getattr(row_sweeps, name) for name in ("row_survey", "row_step", "row_pull")}
        return {name: getattr(sweeps, name) for name in ("step_sweep", "pull_sweep", "ticket_sweep")}

    def variant(self, kernel: str) -> Variant:
        return variant_of(
            self.base,
            Dtypes(
                F32 if self.master else self.param,
                self.param,
                self.anchor or self.param,
                torch.int8 if self.coded else BF16 if self.low else F64 if self.param == F64 else F32,
                self.param if self.master else None,
            ),
            states=(self.states - self.mixed, self.states),
            rules=ROW_RULES if self.rows else TENSOR_RULES + RARE_RULES * self.coupled,
            stochastic=self.stochastic,
            anchored=(self.anchor is not None and not self.mixed, self.anchor is not None),
            one_launch=kernel == "ticket_sweep",
            unaligned=frozenset({"grad"} if self.narrow else ()),
        )


VARIANTS = [
    Shipped(base, states, param, anchor)
    for base, states in ((ADAMW, 2), (ADAMW, 3), (SGD, 0), (SGD, 1))
    for param in (F32, BF16, F64)
    for anchor in (param, None)
]
VARIANTS += [
    Shipped(ADAMW, 2, F16, F16),
    Shipped(SGD, 1, F16, F16),
    Shipped(ADAMW, 2, F32, BF16),
    Shipped(ADAMW, 2, BF16, F32),
    Shipped(ADAMW, 2, BF16, BF16, stochastic=True),
    Shipped(SGD, 1, BF16, BF16, stochastic=True),
    Shipped(ADAMW, 3, F32, F32, options=True),
    Shipped(ADAMW, 3, BF16, BF16, stochastic=True, options=True),
    Shipped(ADAMW, 2, BF16, BF16, options=True),
    Shipped(ADAMW, 3, F32, F32, mixed=True),
    Shipped(ADAMW, 3, BF16, BF16, mixed=True),
    Shipped(SGD, 1, F32, F32, mixed=True),
    Shipped(ADAMW, 3, F32, F32, coupled=True),
    Shipped(ADAMW, 2, BF16, BF16, coupled=True),
    Shipped(SGD, 1, BF16, BF16, coupled=True),
]
VARIANTS += [
    Shipped(base, states, param, anchor, rows=True)
    for base, states in ((ADAMW, 2), (SGD, 1))
    for param in (F32, BF16, F64)
    for anchor in (param, None)
]
VARIANTS += [
    Shipped(ADAMW, 3, F32, F32, rows=True),
    Shipped(ADAMW, 2, F16, F16, rows=True),
    Shipped(ADAMW, 3, BF16, BF16, stochastic=True, options=True, rows=True),
    Shipped(NO_STEP, 0, F32, F32, rows=True),
    Shipped(NO_STEP, 0, F32, F32),
]
VARIANTS += [
    Shipped(ADAMW, 2, F32, BF16, low=True),
    Shipped(ADAMW, 3, BF16, BF16, low=True, stochastic=True),
    Shipped(ADAMW, 2, BF16, BF16, master=True),
    Shipped(ADAMW, 2, F16, F16, master=True, options=True),
    Shipped(ADAMW, 2, BF16, BF16, low=True, master=True),
    Shipped(SGD, 1, BF16, BF16, low=True, master=True),
    Shipped(ADAMW, 2, BF16, BF16, low=True, master=True, rows=True),
    Shipped(ADAMW, 2, F32, F32, low=True, rows=True),
    Shipped(ADAMW, 2, F32, F32, narrow=True),
    Shipped(ADAMW, 2, BF16, BF16, narrow=True),
    Shipped(ADAMW, 2, BF16, BF16, rows=True, narrow=True),
    Shipped(ADAMW, 2, BF16, BF16, low=True),
    Shipped(ADAMW, 2, BF16, BF16, coded=True),
    Shipped(ADAMW, 3, BF16, BF16, coded=True, stochastic=True),
    Shipped(ADAMW, 2, F32, F32, coded=True, rows=True),
]
VARIANTS += [Shipped(SGD, 0, param, None, norm=True) for param in (F32, BF16, F64)]


def compiled(shipped: Shipped, kernel: str, target: GPUTarget) -> Any:
    """The kernel as Triton compiles it ahead of time."""
    variant, function = shipped.variant(kernel), shipped.kernels[kernel]
    options = options_for(variant, target)
    absent = () if shipped.options else ("live", "grad_scale", "found_inf")
    names = function.arg_names
    signature = {name: "constexpr" if name == "V" or name in absent else ARGUMENTS[name] for name in names}
    constants = {
        (i,): variant if name == "V" else None for i, name in enumerate(names) if signature[name] == "constexpr"
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name] != "constexpr" and name not in CALLERS
    }
    return triton.compile(ASTSource(function, signature, constants, aligned), target=target, options=options)


def options_for(variant: Variant, target: GPUTarget) -> dict[str, Any]:
    """How the variant is compiled for the target."""
    return options_of(variant, (target.backend, target.arch if target.backend == "cuda" else 0))


def configuration(which: int, kernel: str, target: str) -> list[Any]:
    """What a job is compiled for, as text."""
    shipped = VARIANTS[which]
    variant = shipped.variant(kernel)
    fields = {name: _told(value) for name, value in vars(variant).items() if name != "CODE"}
    arguments = [ARGUMENTS.get(name, "") for name in shipped.kernels[kernel].arg_names]
    return [kernel, target, shipped.options, fields, arguments, options_for(variant, TARGETS[target])]


def _told(value: Any) -> str:
    """A field of a variant: a number, a dtype, the name of a device function, or several."""
    if isinstance(value, tuple):
        return ", ".join(map(_told, value))
    return str(getattr(value, "value", None) if hasattr(value, "value") else value.__name__)


def facts(job: tuple[int, str, str]) -> dict[str, Any]:
    """What one kernel of one variant came to on one target."""
    which, kernel, target = job
    shipped = VARIANTS[which]
    binary = compiled(shipped, kernel, TARGETS[target])
    found: dict[str, Any] = {
        "variant": shipped.name, "kernel": kernel, "target": target, "dtype": NAMES[shipped.param],
        "bytes": shipped.bytes,
        "dynamic_shared": binary.metadata.shared, "threads": binary.metadata.num_warps * TARGETS[target].warp_size,
    }  # fmt: skip
    if target.startswith("gfx"):
        text = binary.asm["amdgcn"]
        found |= {
            "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]),
            "spills": int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1]),
            "float_atomics": len(re.findall(r"(?:global|buffer|flat)_atomic_\w*f(?:16|32|64)", text)),
            "accesses": dict(Counter(re.findall(r"\b(?:global|buffer)_(?:load|store)_\w+", text))),
        }
        return found
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, sass = _cuobjdump("--dump-resource-usage", file.name), _cuobjdump("-sass", file.name)
    return found | {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "static_shared": int(re.search(r"SHARED:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "float_atomics": len(re.findall(r"\b(?:atom|red)\.[\w.:]*\.(?:f|bf)(?:16|32|64)", binary.asm["ptx"])),
        "accesses": dict(Counter(re.findall(r"\b(?:ld|st)\.global[\w.:]*", binary.asm["ptx"]))),
        "approximate": len(re.findall(r"\b(?:div|rcp|sqrt|rsqrt)\.(?:approx|full)", binary.asm["ptx"])),
        "barriers": sum(loop.count("bar.sync") for loop in vector_loops(binary.asm["ptx"])),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+\S", sass, flags=re.M)),
    }


def vector_loops(ptx: str) -> list[str]:
    """The innermost loops that access global memory by vectors."""
    lines = ptx.splitlines()
    labels = {m[1]: at for at, line in enumerate(lines) if (m := re.match(r"(\$\w+):", line))}
    ends = [
        (labels[m[1]], at) for at, line in enumerate(lines) if (m := re.search(r"\bbra(?:\.uni)?\s+(\$\w+);", line))
    ]
    loops = [(begin, end) for begin, end in ends if begin <= end]
    inner = [loop for loop in loops if not any(o != loop and loop[0] <= o[0] and o[1] <= loop[1] for o in loops)]
    bodies = ["\n".join(lines[begin:end]) for begin, end in inner]
    return [body for body in bodies if re.search(r"\b(?:ld|st)\.global[\w.:]*\.v\d", body)]


def _cuobjdump(*args: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, *args], capture_output=True, text=True, check=True).stdout


def occupancy(registers: int, threads: int) -> float:
    """The share of an sm_90 SM's 2,048 threads that is resident. Its 65,536 registers go to warps 256 at a time."""
    of_warp = -(-registers * 32 // 256) * 256
    programs = 65536 // (of_warp * (threads // 32))
    return min(1.0, programs * threads / 2048)


def table(found: list[dict[str, Any]]) -> str:
    """A table in Markdown with one row for each variant, on sm_90."""
    lines = [
        "| variant | bytes a parameter, sweep by sweep | registers: sweep 1, 2, one launch; by rows: survey, 1, 2 "
        "| occupancy | shared memory |",
        "|---|---|---|---|---|",
    ]
    by_variant: dict[str, dict[str, dict[str, Any]]] = {}
    for row in found:
        if row["target"] == "sm_90":
            by_variant.setdefault(row["variant"], {})[row["kernel"]] = row
    for name, kernels in by_variant.items():
        step = next(kernels[k] for k in ("row_step", "step_sweep", "norm_sweep") if k in kernels)
        lines.append(
            f"| {name} | {' + '.join(map(str, step['bytes']))} | "
            f"{', '.join(str(kernel['registers']) for kernel in kernels.values())} | "
            f"{occupancy(step['registers'], step['threads']):.0%} | "
            f"{(step['static_shared'] + step['dynamic_shared']) / 1024:.1f} KiB |"
        )
    return "\n".join(lines)


def code_of(source: str) -> str:
    """The tokens of a Python source without comments and docstrings, which change no kernel."""
    kept, fresh = [], True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL) or (token.type == tokenize.STRING and fresh):
            continue
        fresh = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        kept.append(token.string.strip() or tokenize.tok_name[token.type])
    return " ".join(kept)


def digest() -> str:
    """Changes with everything that `facts` depends on: the code of the kernels, and what each is compiled for."""
    code = {path.name: code_of(path.read_text()) for path in KERNELS}
    asked = [configuration(*job) for job in jobs()]
    return sha256(json.dumps([code, asked]).encode()).hexdigest()


def jobs() -> list[tuple[int, str, str]]:
    """Every kernel of every variant for every target."""
    return [(k, kernel, target) for k, of in enumerate(VARIANTS) for kernel in of.kernels for target in TARGETS]


def compile_all(first: int = 0, every: int = 1) -> list[dict[str, Any]]:
    """The facts of all jobs, or of every so many from the first. All take some half an hour of CPU time."""
    asked = jobs()[first::every]
    with ProcessPoolExecutor() as pool:
        found = pool.map(facts, asked, chunksize=4)
        return list(tqdm(found, total=len(asked), desc="kernels", leave=False, disable=None))


def read() -> dict[str, Any]:
    """What is kept: "triton", the compiler's version, "source", the digest, and "kernels", a row of facts for each."""
    kept: dict[str, Any] = json.loads(KEPT.read_text())
    return kept


def write(found: list[dict[str, Any]]) -> None:
    """One line for each kernel, so that a change shows which kernels it concerns."""
    rows = ",\n".join(json.dumps(row) for row in found)
    KEPT.write_text(f'{{"triton": "{triton.__version__}", "source": "{digest()}", "kernels": [\n{rows}\n]}}\n')


def page(text: str) -> str:
    """The page with the table of what is kept in place of its own."""
    kept = read()
    head, _, rest = text.partition("<!-- table -->\n")
    told = f"Triton {kept['triton']}, sm_90:\n\n{table(kept['kernels'])}"
    return f"{head}<!-- table -->\n{told}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        write(compile_all())
        PAGE.write_text(page(PAGE.read_text()))
    else:
        print(table(read()["kernels"]))


if __name__ == "__main__":
    main()
