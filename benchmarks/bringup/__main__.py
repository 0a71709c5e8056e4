"""The first run on a GPU, in one command and a few minutes.

    python -m benchmarks.bringup        (make bringup)

It needs python, torch, pytest, and Triton or the kernels of the CUDA backend. Those are compiled where there is nvcc; a
machine without it takes the robustft_kernels/_sweeps.fatbin that another made of the same sources. It installs nothing
and asks no network. Its stages are facts of the machine, the build of the C++ extension and those kernels, one step of
each method, the table of cases, what only a GPU can show, and timings. Backends stand side by side, and one that is not
there is named with the reason. Each stage has a share of the time, and is cut when that is over. Programs of their own
do the work, so none can take this one with it. After each stage OUT/bringup.json and OUT/bringup.md are written anew,
and a run that is cut off keeps what it had.

With --device cpu all of it runs in Triton's interpreter, on small tensors. That tries the program itself. The CUDA
backend is left out there.
"""

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .items import ROOT, SHARD, TINY
from .stages import Finding, Stage, run

TABLE = [f"tests/test_{name}.py" for name in ("triton", "triton_host", "precision", "steps")]  # the longest last
GPU = sorted(str(file.relative_to(ROOT)) for file in (ROOT / "tests").glob("test_gpu*.py"))
QUICK = "test_a_prepared_step_repeats or test_schedule or (test_step_equals_oracle and reference)"


def program(name: str, *args: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.bringup.{name}", *args]


def tests(files: list[str], device: str, shares: int, tiny: bool) -> list[tuple[list[str], dict[str, str]]]:
    """pytest on these files, in so many processes. A warning does not fail a test here: a new torch may have new
    ones."""
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.bringup.outcomes", "-p", "no:cacheprovider",
               "-o", "filterwarnings=default", "--device", device, "-rfE", "--tb=short", *files]  # fmt: skip
    if device == "cpu":
        command += ["-m", "not full", *(["-k", QUICK] if tiny and files == TABLE else [])]
    return [(command, {SHARD: f"{k}/{shares}"}) for k in range(shares)]


def stages(device: str, tiny: bool) -> list[Stage]:
    cores = os.cpu_count() or 1
    few, many = (1, 1) if tiny else (max(1, min(4, cores // 2)), max(1, min(12, cores * 3 // 4)))
    return [
        Stage("facts", [(program("facts", device), {})], 25, names=True),
        Stage("build", [(program("build"), {})], 125, patience=600, names=True),
        Stage(
            "smoke",
            [(program("smoke", device, str(k), str(many)), {}) for k in range(many)],
            55,
            patience=45,
            names=True,
        ),
        Stage("table", tests(TABLE, device, many, tiny), 105, patience=90),
        Stage("gpu", tests(GPU[:1] if tiny else GPU, device, few, tiny), 90, patience=120),
        Stage("timings", [(program("timings", device), {})], 140, patience=75, names=True),
    ]


class Record:
    """What was found so far, in two files."""

    def __init__(self, folder: Path, device: str, minutes: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.content: dict[str, Any] = {"device": device, "minutes": minutes, "began": time.strftime("%F %T %z")}
        self.content["stages"] = {}

    def add(self, finding: Finding) -> None:
        self.content["stages"][finding.stage] = asdict(finding)
        _replace(self._folder / "bringup.json", json.dumps(self.content, indent=1, ensure_ascii=False))
        try:
            from .page import page_of  # it imports torch, and all that is to be tried

            page = page_of(self.content)
        except Exception as error:
            page = f"The page cannot be drawn: {type(error).__name__}: {error}. bringup.json has all of it.\n"
        _replace(self._folder / "bringup.md", page)


def _replace(file: Path, text: str) -> None:
    """Writes a file as a whole or not at all."""
    fresh = file.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(file)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bringup", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--minutes", type=float, default=9.0, help="that all stages together take at most")
    parser.add_argument("--out", type=Path, default=Path("results"), help="the folder for what is written")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="these stages, and facts")
    parser.add_argument("--tiny", action="store_true", help="as little as possible of each stage")
    options = parser.parse_args()
    ends = time.monotonic() + 60 * options.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(124))  # so that what runs is ended too
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    if options.tiny:
        os.environ[TINY] = "1"
    out = options.out.resolve()
    record = Record(out, options.device, options.minutes)
    todo = stages(options.device, options.tiny)
    if unknown := set(options.only) - {stage.name for stage in todo}:
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(stage.name for stage in todo)}")
    todo = [stage for stage in todo if not options.only or stage.name in ("facts", *options.only)]
    fine = True
    while todo:
        left, shares = ends - time.monotonic(), sum(stage.share for stage in todo)
        stage = todo.pop(0)
        found = run(stage, max(0.0, left * stage.share / shares), out / "bringup", record.add)
        print(
            found.line(),
            *(f"    {name}: {why}" for name, why in list(found.problems.items())[:5]),
            sep="\n",
            flush=True,
        )
        if found.problems.get("a GPU"):
            print("nothing to measure; --device cpu tries the program itself")
            return 0
        fine &= found.outcome == "ok"
    print(f"written: {out / 'bringup.md'}, {out / 'bringup.json'}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
