"""Fails where a ratio is worse than the one that was kept, beyond the spread of both.

    python -m benchmarks.check NEW.json benchmarks/results/cpu.json        (make bench-check)

Ratios alone are compared: seconds of one machine say nothing of another's. A loss is a ratio whose lower quartile lies
above the kept upper quartile, and whose median is worse by more than 5%. Contests beside which something else was at
work are not judged.
"""

import sys
from pathlib import Path

from .results import Results, Row, read

SLACK = 1.05


def loss(new: Row, old: Row) -> str:
    """What got worse; "" where nothing did. Where ours is the baseline, the others' ratios are to be large."""
    ours_is_baseline = new["watched"] == new["baseline"]
    lines = []
    for name in old.contenders if ours_is_baseline else [old["watched"]]:
        if name in ("copy", new["watched"] if ours_is_baseline else "") or name not in new.contenders:
            continue
        now, then = new.ratio(name), old.ratio(name)
        if ours_is_baseline:
            now, then = ([1 / q for q in reversed(of)] for of in (now, then))
        if now[0] > then[2] and now[1] > SLACK * then[1]:
            lines.append(f"{new.name}: {name} {_told(new.ratio(name))}, kept {_told(old.ratio(name))}")
    return "; ".join(lines)


def _told(quartiles: list[float]) -> str:
    low, middle, high = quartiles
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def compare(new: Results, old: Results) -> tuple[list[str], list[str]]:
    """Losses, and what could not be judged."""
    kept = {row.name: row for row in old.rows}
    losses, unjudged = [], []
    for row in new.rows:
        if row.name not in kept or row.question == "parts" or not row.contenders:
            continue
        if not (row["trusted"] and kept[row.name]["trusted"]):
            unjudged.append(row.name)
        elif lost := loss(row, kept[row.name]):
            losses.append(lost)
    return losses, unjudged


def main(new: Path, old: Path) -> None:
    losses, unjudged = compare(read(new), read(old))
    for name in unjudged:
        print(f"not judged, since something else was at work: {name}")
    if losses:
        raise SystemExit("slower than kept:\n" + "\n".join(losses))
    print("no ratio is worse than kept, beyond the spread")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
