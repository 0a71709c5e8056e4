"""A program, run by test_ptx.py and `make test-ptx`. It exits with 1 if anything is not as it should be.

python -m tests.ptx translate                   all kernels that ship can be translated
python -m tests.ptx steps [--pick TEXT ...]     the rows of steps.py whose name has these texts equal the oracle
python -m tests.ptx schedules [--count 10]      threads that come in other orders leave the same bits
python -m tests.ptx faults [--pick TEXT ...]    the faults of faults.py are seen

With --of cuda the kernels are those of csrc/cuda, and steps must have the bits of the native backend. One more check:

python -m tests.ptx table --of cuda [--pairs] [--pick TEXT ...]    the same for the table of cases
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import torch

from benchmarks import codegen

from . import cuda, faults, steps
from .device import install
from .harmless import harmful
from .program import Schedule
from .translate import translate


def told(failures: list[str], what: str) -> bool:
    """Prints what failed. Returns whether nothing did."""
    print(f"{'FAILED' if failures else 'ok'}: {what}", *failures, sep="\n    ", flush=True)
    return not failures


def check_translation(_: argparse.Namespace) -> bool:
    """Every kernel of every variant that `benchmarks.codegen` lists."""
    failures, done = [], 0
    for which, kernel, target in codegen.jobs():
        if target == "sm_90":
            shipped = codegen.VARIANTS[which]
            try:
                translate(codegen.compiled(shipped, kernel, codegen.TARGETS[target]).asm["ptx"])
            except Exception as error:  # each says what it is about
                failures.append(f"{shipped.name}, {kernel}: {type(error).__name__}: {error}")
            done += 1
    return told(failures, f"{done - len(failures)} of {done} kernels translate")


def check_steps(options: argparse.Namespace) -> bool:
    """Each row equals the oracle, or native. No thread does what it should not."""
    return _check_rows(options, (cuda if options.of == "cuda" else steps).ROWS)


def check_table(options: argparse.Namespace) -> bool:
    """The same for the rows of the table of cases."""
    return _check_rows(options, cuda.table(options.pairs), brief=True)


def _check_rows(options: argparse.Namespace, rows: Sequence[steps.Row], brief: bool = False) -> bool:
    device, check = (cuda.install(), cuda.check) if options.of == "cuda" else (install(), steps.check)
    rows, fine, launched = [row for row in rows if all(text in row.name for text in options.pick)], 0, set()
    for row in rows:
        failures = harmful(check(device, row))
        launched.update(device.launched)
        if failures or not brief:
            told(failures, f"{row.name}: {', '.join(device.launched)}")
        fine += not failures
    if brief:
        print(f"{fine} of {len(rows)} rows, by {', '.join(sorted(launched))}")
    return fine == len(rows) > 0


def scheduled(rows: Sequence[steps.Row]) -> list[steps.Row]:
    """The rows that are run under several schedules."""
    rows = [
        row for row in rows if row.settings in ("adamw", "adamw, amsgrad, 8-bit state") and row.dtype == torch.float32
    ]
    return [row for row in rows if row.method in ("spd", "ftp") and row.anchor is True and row.how == "a step"]


def check_schedules(options: argparse.Namespace) -> bool:
    """The bits of a step do not depend on which thread and which program comes first."""
    fine, is_cuda = True, options.of == "cuda"
    device, step = (cuda.install(), cuda.step) if is_cuda else (install(), steps.step)
    rows = scheduled((cuda if is_cuda else steps).ROWS)
    for row in rows:
        failures, first = [], None
        for seed in range(options.count):
            device.schedule = Schedule(seed, preempt=(0.0, 0.02, 0.2)[seed % 3], resident=(2, 3, 8)[seed % 3])
            device.seen.clear()
            bits = [of.clone() for of in step(row).tensors()]
            first = first or bits
            if not all(torch.equal(a.nan_to_num(0.125), b.nan_to_num(0.125)) for a, b in zip(first, bits, strict=True)):
                failures.append(f"seed {seed}: other bits")
            failures += harmful(device.seen)
        fine &= told(failures, f"{row.name}: the bits of {options.count} schedules")
    return fine and bool(rows)


def check_faults(options: argparse.Namespace) -> bool:
    """Most faults are seen, and so the tool has power."""
    of = faults.CUDA if options.of == "cuda" else faults.TRITON
    device = of.install()
    caught, survived = [], []
    for fault in faults.all_of(of, device):
        if all(text in fault.name for text in options.pick):
            seen = faults.in_a_fork(lambda fault=fault: fault.seen(of, device))
            (caught if seen else survived).append(fault.name)
            print(f"{'caught' if seen else 'SURVIVED'}: {fault.name}: {seen[0] if seen else ''}", flush=True)
    enough = len(caught) >= 3 * len(survived) and bool(caught)
    return told([] if enough else survived, f"{len(caught)} of {len(caught) + len(survived)} faults are seen")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx", description=__doc__.partition("\n")[0])
    checks: dict[str, Callable[[argparse.Namespace], bool]] = {
        "translate": check_translation, "steps": check_steps, "schedules": check_schedules, "faults": check_faults,
        "table": check_table,
    }  # fmt: skip
    parser.add_argument("what", choices=checks)
    parser.add_argument("--of", choices=("triton", "cuda"), default="triton", help="whose kernels")
    parser.add_argument("--pick", nargs="*", default=[])
    parser.add_argument("--pairs", action="store_true", help="of the table only the rows that meet every pair")
    parser.add_argument("--count", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    return 0 if checks[options.what](options) else 1


if __name__ == "__main__":
    sys.exit(main())
