"""What a program of a bring-up tells while it runs: a line of JSON when an item begins, and one when it ends.

A program that died or hung in an item is started again with the same file. It goes on with the items that have not
begun.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FILE = "BRINGUP_LOG"
SHARD = "BRINGUP_SHARD"  # which share of the tests a process takes: "2/8" is the third of eight
TINY = "BRINGUP_TINY"  # set: as little as possible of everything
BROKEN = 70  # the exit status when the process can no longer use its GPU
WORDS = 300  # characters of a reason


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of a file. The last may have been cut off."""
    lines = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def breaks(why: str) -> bool:
    """Whether an error leaves a process without its GPU, so that all that follows would fail too."""
    return any(sign in why for sign in ("CUDA error", "device-side assert", "AcceleratorError", "CUDA driver error"))


def tiny() -> bool:
    return TINY in os.environ


class Log:
    """The file that the environment names. Without one, lines are printed."""

    def __init__(self) -> None:
        self._file = Path(os.environ[FILE]) if FILE in os.environ else None
        self.begun = {line["item"] for line in read(self._file)} if self._file else set()

    def begin(self, item: str) -> None:
        self._write({"item": item, "outcome": "begun"})

    def end(self, item: str, outcome: str = "ok", **found: Any) -> None:
        self._write({"item": item, "outcome": outcome, **found})

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is None:
            print(json.dumps(line), flush=True)
            return
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def each(self, items: Mapping[str, Callable[[], dict[str, Any] | None]]) -> None:
        """Runs the items that have not begun. What they return is told. An error ends its item, and the program too if
        it breaks the process."""
        for name, run in items.items():
            if name in self.begun:
                continue
            self.begin(name)
            try:
                found = run() or {}
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
                traceback.print_exc()
                self.end(name, "failed", why=why[:WORDS])
                if breaks(why):
                    sys.exit(BROKEN)
            else:
                self.end(name, **found)
