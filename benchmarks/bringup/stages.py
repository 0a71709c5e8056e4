"""A stage of a bring-up: programs side by side, each in a process of its own, until they end or their time is over."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .items import BROKEN, FILE, ROOT, WORDS, read

TAIL = 12  # lines of what a program says that are kept
NO_TESTS = 5  # pytest's exit status when nothing was left to run
EVERY = 10.0  # seconds between two records of a stage that runs
GOOD = ("ok", "skipped")


@dataclass(frozen=True)
class Stage:
    """commands: of programs that run side by side, with what each adds to the environment. share: of the time.
    patience: the seconds that one item may take. names: whether items that went well are named, or only counted."""

    name: str
    commands: list[tuple[list[str], dict[str, str]]]
    share: float
    patience: float = 60.0
    names: bool = False


@dataclass
class Worker:
    """One program. If an item kills it, it is started again and goes on with the next item."""

    command: list[str]
    log: Path
    env: dict[str, str]
    failure: str = ""
    _process: Any = None
    _started: float = 0.0
    _known: int = 0

    def start(self) -> None:
        self._known, self._started = len(read(self.log)), time.time()
        with self.log.with_suffix(".txt").open("ab") as said:
            self._process = subprocess.Popen(
                self.command, stdout=said, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT,
                env={**os.environ, **self.env, FILE: str(self.log)}, start_new_session=True,
            )  # fmt: skip

    def works(self, patience: float) -> bool:
        """Whether it still works. Ends an item that takes longer than that."""
        status = self._process.poll()
        lines = read(self.log)
        began = lines[-1]["item"] if lines and lines[-1]["outcome"] == "begun" else ""
        if status is None:
            heard = self.log.stat().st_mtime if self.log.exists() else 0.0
            if time.time() - max(heard, self._started) <= patience:
                return True
            self.kill()
            return self._go_on(began, lines, "hung", f"no end after {patience:.0f} s")
        if began:
            return self._go_on(began, lines, "died", f"exit status {status}: {self.tail(1)}")
        if status == BROKEN:
            return self._go_on("", lines, "", "the process broke before its first item")
        if status not in (0, NO_TESTS) and all(line["outcome"] in (*GOOD, "begun") for line in lines):
            self.failure = f"exit status {status}: {self.tail(1)}"
        return False

    def _go_on(self, item: str, lines: list[dict[str, Any]], outcome: str, why: str) -> bool:
        if item:
            with self.log.open("a") as file:
                file.write(json.dumps({"item": item, "outcome": outcome, "why": why[:WORDS]}) + "\n")
        elif len(lines) == self._known:
            self.failure = why
            return False
        self.start()
        return True

    def kill(self) -> None:
        """Ends it, with all that it has started."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def tail(self, lines: int) -> str:
        said = self.log.with_suffix(".txt")
        text = said.read_text(errors="replace").strip().splitlines() if said.exists() else []
        return "\n".join(text[-lines:])


@dataclass
class Finding:
    """What a stage came to. outcome: "ok", "failed", or "cut" if its time was over first."""

    stage: str
    outcome: str = "running"
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    items: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    tail: str = ""

    def line(self) -> str:
        counts = ", ".join(f"{n} {what}" for what, n in self.counts.items())
        return f"{self.stage}: {self.outcome} in {self.seconds:.0f} s ({counts or 'nothing'})"


def run(stage: Stage, seconds: float, folder: Path, told: Callable[[Finding], None]) -> Finding:
    """Runs a stage for so many seconds at most. `told` gets what was found so far, now and then and at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    workers = []
    for k, (command, env) in enumerate(stage.commands):
        log = folder / f"{stage.name}-{k}.jsonl"
        for old in (log, log.with_suffix(".txt")):
            old.unlink(missing_ok=True)
        workers.append(Worker(command, log, env))
    began = time.monotonic()
    finding, last = Finding(stage.name), began
    try:
        for worker in workers:
            worker.start()
        working = list(workers)
        while working and time.monotonic() - began < seconds:
            time.sleep(0.2)
            working = [worker for worker in working if worker.works(stage.patience)]
            if time.monotonic() - last > EVERY:
                last = time.monotonic()
                _fill(finding, stage, workers, last - began)
                told(finding)
    finally:
        for worker in workers:
            worker.kill()
    _fill(finding, stage, workers, time.monotonic() - began)
    bad = finding.problems or not finding.counts
    finding.outcome = "cut" if working else "failed" if bad else "ok"
    told(finding)
    return finding


def _fill(finding: Finding, stage: Stage, workers: list[Worker], seconds: float) -> None:
    ends: dict[str, dict[str, Any]] = {}
    for worker in workers:
        ends.update((line["item"], {**line}) for line in read(worker.log))
    finding.seconds, finding.counts, finding.items, finding.problems = round(seconds, 1), {}, {}, {}
    for name, line in ends.items():
        outcome = line.pop("outcome")
        line.pop("item")
        outcome = "not ended" if outcome == "begun" else outcome
        finding.counts[outcome] = finding.counts.get(outcome, 0) + 1
        if outcome not in (*GOOD, "not ended"):
            finding.problems[name] = f"{outcome}: {line.get('why', '')}"
        if stage.names:
            finding.items[name] = {"outcome": outcome, **line}
        elif outcome == "not ended":
            finding.items[name] = {"outcome": outcome}
    for k, worker in enumerate(workers):
        if worker.failure:
            finding.problems[f"program {k}"] = worker.failure
    finding.tail = "\n".join(filter(None, (worker.tail(TAIL) for worker in workers[:1])))
