"""Repeats the benchmarks in processes of their own, since a ratio changes from process to process.

    python -m benchmarks.passes results/bench.json [-k ...]                                              (make bench)
    python -m benchmarks.passes results/bench.json --against benchmarks/results/cpu.json [-k ...]    (make bench-check)

A pass is all contests once. It deals them anew to fresh processes, so that a contest comes after others and finds other
memory. A process for each would be better still, but to start one takes four seconds. After the first passes come the
contests that are measured in one process alone: a mark says why. What is not known here is given to pytest.

With --against, a contest that lost is measured in three more processes before it counts as lost.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from random import Random

from . import check
from .results import Results, merged, read, write

PASSES = 3
SHARE = 9  # contests a process
IMPORTING = ("bench_peers", "bench_eight_bit")
SECONDS_ONCE = 2.5  # for a contest whose spread is that of its rounds
ROOT = Path(__file__).parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-o", "python_files=bench_*.py", "-o", "python_functions=bench_*",
          "-o", "filterwarnings=ignore", "-p", "no:cacheprovider"]  # fmt: skip
WRONG, NONE_CHOSEN = 3, 5  # exit codes: of benchmarks/conftest.py, and of pytest


def dealt(names: list[str], turn: int, share: int = SHARE) -> list[list[str]]:
    """A pass: the contests in an order of its own, divided among as few processes as that allows, as evenly.

    Those that import other packages go together, as that takes seconds in each process.
    """
    order = list(names)
    Random(turn).shuffle(order)
    importing = [name for name in order if any(question in name for question in IMPORTING)]
    rest = [name for name in order if name not in importing]
    return [*_parts(importing, share), *_parts(rest, share)]


def _parts(names: list[str], share: int) -> list[list[str]]:
    count = -(-len(names) // share)
    return [names[k::count] for k in range(count)]


class Run:
    """Processes of pytest with these arguments, and what they have found."""

    def __init__(self, args: list[str]) -> None:
        self._args, self._checked = args, False
        self.found: list[Results] = []
        self.failed: list[str] = []

    def names(self, marks: str) -> list[str]:
        """The contests that have such marks, as pytest names them, in the order of the files."""
        listed = self._run("benchmarks", "--collect-only", "-m", marks, *self._args, capture=True)
        if listed.returncode not in (0, NONE_CHOSEN):
            raise SystemExit(listed.stdout + listed.stderr)
        if "nothing to measure" in (said := listed.stdout + listed.stderr):
            print(said)
            sys.exit(0)
        return [line for line in listed.stdout.splitlines() if line.startswith("benchmarks/") and "::" in line]

    def process(self, what: str, names: list[str], *options: str) -> None:
        """Measures these contests in a process."""
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "found.json")
            if self._checked:
                options = ("--checked", *options)
            done = self._run(*names, "--benchmark-quiet", "-rs", f"--benchmark-json={file}", *options, *self._args)
            if done.returncode == WRONG:
                raise SystemExit(WRONG)
            self._checked = True
            if done.returncode:
                self.failed.append(f"{what} (exit code {done.returncode})")
            if file.exists() and file.stat().st_size:
                self.found.append(read(file))
        print(f"{what}: {len(names)} contests, {time.monotonic() - began:.0f} s", flush=True)

    def passes(self, names: list[str], turns: Iterable[int], between: Iterable[list[str]] = ()) -> None:
        """All contests in each turn. After each of the first turns, some that are measured once."""
        once = list(between)
        for turn in turns:
            shares = dealt(names, turn)
            for k, share in enumerate(shares, 1):
                self.process(f"pass {turn + 1}, process {k} of {len(shares)}", share)
            if once:
                self.process("once", once.pop(0), f"--seconds={SECONDS_ONCE}")
        for rest in once:
            self.process("once", rest, f"--seconds={SECONDS_ONCE}")

    def results(self, names: list[str]) -> Results:
        return merged(self.found, [name.partition("::")[2] for name in names])

    @staticmethod
    def _run(*args: str, capture: bool = False) -> "subprocess.CompletedProcess[str]":
        # A child of a test is no test: pytest's variables are not for it.
        alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        return subprocess.run([*PYTEST, *args], cwd=ROOT, env=alone, capture_output=capture, text=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the file that gets what was found")
    parser.add_argument("--passes", type=int, default=PASSES)
    parser.add_argument("--against", type=Path, help="what was kept: exits with 1 if something is slower")
    args, rest = parser.parse_known_args()
    args.out.unlink(missing_ok=True)
    began = time.monotonic()
    run = Run(rest)
    marks = "once" if "cuda" in rest or "--device=cuda" in rest else "once or once_on_cpu"
    names, once = run.names(f"not ({marks})"), [] if args.against else run.names(marks)
    run.passes(names, range(args.passes), [part for part in (once[::2], once[1::2]) if part])
    results = run.results([*names, *once])
    if args.against:
        kept = read(args.against)
        if lost := check.compare(results, kept)[0]:
            again = [name for name in names if name.partition("::")[2] in lost]
            run.passes(again, range(args.passes, 2 * args.passes))
            results = run.results(names)
    write(results, args.out)
    print(f"{len(results.rows)} contests in {time.monotonic() - began:.0f} s", flush=True)
    if run.failed:
        raise SystemExit("failed: " + "; ".join(run.failed))
    if args.against:
        check.main(args.out, args.against)


if __name__ == "__main__":
    main()
