"""What a run of the benchmarks found. benchmarks/results/ keeps it, report.py draws it, check.py holds others to it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .contest import COPY


@dataclass(frozen=True)
class Row:
    """One contest. question: what it helps to answer. name: the benchmark's, with its parameters. told: by a Ring."""

    question: str
    name: str
    told: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.told[key]

    @property
    def contenders(self) -> dict[str, dict[str, Any]]:
        """By name. There are none if it was no contest."""
        return self.told.get("contenders", {})

    def ratio(self, of: str = "") -> list[float]:
        """Quartiles of a contender's time over the baseline's. The default is the one that the contest is about."""
        return self.contenders[of or self["watched"]]["ratio"]

    def bytes_say(self, of: str) -> float:
        """What the ratio would be if the bytes alone counted, nan if they are not declared."""
        moved = [self.contenders[name].get("bytes", float("nan")) for name in (of, self["baseline"])]
        return moved[0] / moved[1]

    def bandwidth(self, of: str) -> float:
        """GB/s of the bytes that a contender must move."""
        return self.contenders[of].get("bytes", float("nan")) / self.contenders[of]["seconds"] / 1e9

    def of_copy(self, of: str) -> float:
        """That bandwidth as a share of what a copy reached in this contest."""
        return self.bandwidth(of) / self.bandwidth(COPY)


@dataclass(frozen=True)
class Results:
    """machine: what measured. rows: in the order in which they were measured."""

    machine: dict[str, Any]
    rows: list[Row]

    def of(self, *questions: str) -> list[Row]:
        return [row for row in self.rows if row.question in questions]


def eager_over_ours(row: Row) -> list[float]:
    return row.ratio(f"{row['watched']}, eager")


def read(file: Path) -> Results:
    """From pytest-benchmark's JSON, or from what `write` wrote."""
    content = json.loads(file.read_text())
    if "rows" in content:
        return Results(content["machine"], [Row(**row) for row in content["rows"]])
    rows = [Row(of["group"], of["name"], of["extra_info"]) for of in content["benchmarks"]]
    return Results(content["machine_info"], rows)


def write(results: Results, file: Path) -> None:
    """Keeps the order of the contenders, because tables have it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(f"    {json.dumps(vars(row))}" for row in results.rows)
    file.write_text(f'{{\n  "machine": {json.dumps(results.machine)},\n  "rows": [\n{rows}\n  ]\n}}\n')
