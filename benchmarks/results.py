"""What a run of the benchmarks found. benchmarks/results/ keeps it, report.py draws it, check.py holds others to it."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from .contest import COPY


@dataclass(frozen=True)
class Row:
    """One contest, in one process or in several. question: what it helps to answer. name: the benchmark's, with its
    parameters. told: by a Ring, or by `_joined`.
    """

    question: str
    name: str
    told: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.told[key]

    @property
    def contenders(self) -> dict[str, dict[str, Any]]:
        """By name. There are none if it was no contest."""
        return self.told.get("contenders", {})

    @property
    def processes(self) -> int:
        return self.told.get("processes", 1)

    @property
    def ours(self) -> list[str]:
        """The contenders that are ours."""
        return self.told.get("ours", [self["watched"]])

    def ratio(self, of: str = "") -> list[float]:
        """A contender's time over the baseline's. The default is the one that the contest is about.

        Of one process: the quartiles of its rounds. Of several: the least, the median and the largest of their medians.
        """
        return self.contenders[of or self["watched"]]["ratio"]

    def medians(self, of: str) -> list[float]:
        """Of each process."""
        contender = self.contenders[of]
        return contender.get("medians", [contender["ratio"][1]])

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


def spread(medians: list[float]) -> list[float]:
    """The least, the median and the largest."""
    return [min(medians), median(medians), max(medians)]


def merged(runs: list[Results], order: list[str]) -> Results:
    """The runs of several processes as one, with the rows in this order."""
    rows: dict[str, list[Row]] = {}
    for row in (row for run in runs for row in run.rows):
        rows.setdefault(row.name, []).append(row)
    if unknown := set(rows) - set(order):
        raise ValueError(f"no place for {unknown}")
    return Results(runs[0].machine if runs else {}, [_joined(rows[name]) for name in order if name in rows])


def _joined(rows: list[Row]) -> Row:
    """A contest that several processes have measured."""
    first = rows[0]
    if len(rows) == 1 or not first.contenders:
        return first
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        for name, of in row.contenders.items():
            found.setdefault(name, []).append(of)
    contenders = {name: _contender(ofs) for name, ofs in found.items()}
    absent = {name: why for row in rows for name, why in row.told.get("absent", {}).items() if name not in found}
    busy, trusted = max(row["busy"] for row in rows), all(row["trusted"] for row in rows)
    told = {**first.told, "absent": absent, "busy": busy, "trusted": trusted, "processes": len(rows)}
    return Row(first.question, first.name, {**told, "contenders": contenders})


def _contender(ofs: list[dict[str, Any]]) -> dict[str, Any]:
    """What it came to in each process, as one."""
    medians = [of["ratio"][1] for of in ofs]
    seconds = {key: median(of[key] for of in ofs) for key in ("seconds", "host")}
    return {**ofs[0], "ratio": spread(medians), "medians": medians, **seconds}


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
