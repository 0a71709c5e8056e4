"""Fails where a ratio is worse than the one that was kept, beyond what changes from process to process.

    python -m benchmarks.check NEW.json benchmarks/results/cpu.json        (part of make bench-check)

Only ratios are compared: seconds of one machine say nothing of another's. A loss is a ratio whose range over the new
processes lies above that over the kept ones, and whose median is worse by more than 5%. Each range has three numbers.
If nothing changed, three lie above three others in one case of 20, and six above three in one of 84. So passes.py takes
three more processes where something seems lost, and the 5% must be exceeded too. What was kept of one process has no
range, and the quartiles of its rounds take its place. They are too narrow, so 5% become 15% there.

A contest is not judged if something else was at work beside it. Nor is it judged if a copy ran at another speed than
when it was kept. Then ratios of what waits for memory and of what computes are not the same. On another machine, keep
its own results first (make bench).
"""

import sys
from pathlib import Path

from .contest import COPY
from .results import Results, Row, read

SLACK, SLACK_OF_ONE = 1.05, 1.15
ALIKE = 0.85, 1.18  # speeds of a copy, new over kept


def loss(new: Row, old: Row) -> str:
    """What got worse, or "" if nothing did. When ours is the baseline, the others' ratios should be large."""
    ours_is_baseline = new["baseline"] in new.ours
    slack = SLACK if min(new.processes, old.processes) > 1 else SLACK_OF_ONE
    names = [name for name in old.contenders if name not in new.ours] if ours_is_baseline else new.ours
    lines = []
    for name in names:
        if name == COPY or name not in new.contenders or name not in old.contenders:
            continue
        now, then = new.ratio(name), old.ratio(name)
        if ours_is_baseline:
            now, then = ([1 / q for q in reversed(of)] for of in (now, then))
        if now[0] > then[2] and now[1] > slack * then[1]:
            lines.append(f"{new.name}: {name} {_told(new.ratio(name))}, kept {_told(old.ratio(name))}")
    return "; ".join(lines)


def _told(of: list[float]) -> str:
    low, middle, high = of
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def why_not(new: Row, old: Row) -> str:
    """Why the two cannot be compared, or "" if they can."""
    if not (new["trusted"] and old["trusted"]):
        return "something else was at work"
    if COPY in new.contenders and COPY in old.contenders:
        now, then = new.bandwidth(COPY), old.bandwidth(COPY)
        if not ALIKE[0] < now / then < ALIKE[1]:
            return f"a copy ran at {now:.0f} GB/s, when it was kept at {then:.0f}"
    return ""


def compare(new: Results, old: Results) -> tuple[dict[str, str], list[str], int]:
    """The losses by contest, what could not be judged and why, and how many could be judged."""
    kept = {row.name: row for row in old.rows}
    losses, unjudged, judged = {}, [], 0
    for row in new.rows:
        if row.name not in kept or row.question == "parts" or not row.contenders:
            continue
        if why := why_not(row, kept[row.name]):
            unjudged.append(f"{row.name}: {why}")
            continue
        judged += 1
        if lost := loss(row, kept[row.name]):
            losses[row.name] = lost
    return losses, unjudged, judged


def main(new: Path, old: Path) -> None:
    losses, unjudged, judged = compare(read(new), read(old))
    for line in unjudged:
        print(f"not judged, {line}")
    if losses:
        raise SystemExit("slower than kept:\n" + "\n".join(losses.values()))
    if not judged:
        raise SystemExit("nothing could be judged; keep this machine's own results first: make bench")
    print(f"of {judged} contests no ratio is worse than kept, beyond the spread")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
