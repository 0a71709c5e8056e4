"""Writes the page of the benchmarks and its pictures from what a run found.

python -m benchmarks.report NEW.json --keep benchmarks/results/cpu.json --page docs/benchmarks.md        (make bench)
"""

import argparse
from collections.abc import Callable
from itertools import product
from pathlib import Path
from textwrap import fill

from . import pictures
from .contenders import BASELINE
from .contest import COPY
from .markdown import number, table, told
from .quotes import quoted
from .results import Results, Row, eager_over_ours, read, spread, write
from .shapes import MODELS

FEW = 8  # names that a sentence can hold


def processes(results: Results) -> str:
    """How often contests were measured, and what the numbers in parentheses are."""
    contests = [row for row in results.rows if row.contenders]
    most = max((row.processes for row in contests), default=1)
    if most == 1:
        return (
            "All of it was measured in one process. The tables give the median over its rounds, with the quartiles in\n"
            "parentheses. Another process can differ by more than these say."
        )
    why: dict[str, list[str]] = {}
    for row in results.rows:
        if "once" in row.told:
            why.setdefault(row["once"], []).append(row.told.get("model", row.question))
    once = [f"- {', '.join(dict.fromkeys(names))}: {reason}" for reason, names in why.items()]
    short = [row.name for row in contests if "once" not in row.told and row.processes < most]
    return "\n".join(
        [
            f"Each contest took place in {most} processes, spread over the run. The tables give the median of their",
            "medians, with the least and the largest of these in parentheses. A few took place in one process.",
            "For these, the parentheses have the quartiles of its rounds, which say less:",
            "", *once,
            *([f"\nIn fewer processes, as some failed: {', '.join(short)}."] if short else []),
        ]
    )  # fmt: skip


def peers(results: Results, dtype: str, question: str = "peers") -> str:
    """A row for each contender, a column for each model: over torch fused."""
    rows = [row for row in results.of(question) if row["dtype"] == dtype]
    names = list(dict.fromkeys(name for row in rows for name in row.contenders if name not in (COPY, BASELINE)))
    names.sort(key=lambda name: not pictures.is_ours(name))
    cells = [[name, *(told(row.ratio(name)) if name in row.contenders else "–" for row in rows)] for name in names]
    return table([f"{dtype}: over {BASELINE}", *(row["model"] for row in rows)], cells)


def absent(results: Results) -> str:
    why = {name: reason for row in results.rows for name, reason in row.told.get("absent", {}).items()}
    seen = {(row["model"], row["dtype"]) for row in results.of("peers")}
    for model, dtype in product(MODELS, ("float32", "bfloat16")):
        if (model, dtype) not in seen:
            why[f"{model}, {dtype}"] = "too little memory, or other lists answer the same"
    return "\n".join(f"- {name}: {reason}" for name, reason in why.items()) or "- none"


def by_bytes(rows: list[Row], labels: Callable[[Row, str], str]) -> str:
    """Measured beside what the bytes say; all rows against the same."""
    cells = []
    for row in rows:
        for name in row.contenders:
            if name not in (COPY, row["baseline"]):
                cells.append(
                    [labels(row, name), told(row.ratio(name)), number(row.bytes_say(name)),
                     number(row.bandwidth(name), "{:.0f}"), number(row.of_copy(name), "{:.0%}")]
                )  # fmt: skip
    over = f"over {rows[0]['baseline']}" if rows else ""
    return table(["", over, "bytes say", "GB/s", "of a copy"], cells)


def eager(results: Results) -> str:
    cells = [[row["model"], row["watched"], told(eager_over_ours(row))] for row in results.of("eager", "tpgm")]
    return table(["", "", "eager / ours"], cells)


def end_to_end(results: Results) -> str:
    cells = []
    for row in results.of("end_to_end"):
        speeds = [f"{row['items'] / of['seconds']:.3g}" for of in row.contenders.values()]
        ratios = [told(row.ratio(name)) for name in row.contenders if name != row["baseline"]]
        cells.append([row["model"], row["unit"], *speeds, *ratios])
    names = list(row.contenders) if cells else []
    over = [f"time of {name} over {row['baseline']}" for name in names if name != row["baseline"]]
    return table(["", "a second", *names, *over], cells)


def tpgm_run(results: Results) -> str:
    lines = []
    for row in results.of("tpgm_run"):
        train, project = row["steps"]
        run = f"On {row['model']}, a run is {train} steps of training, {project} on the radii, and the projection."
        lines.append(f"{run}\nIt takes {told(row.ratio())} times as long as the {train} alone.")
    return "\n".join(lines) or "Not measured here."


def memory(results: Results) -> str:
    rows = results.of("memory")
    cells = [[row["choice"], *(f"{row[key]:.1f}" for key in ("state", "kept", "peak"))]
             for row in rows if "missing" not in row.told]  # fmt: skip
    missing = [f"- {row['choice']}: {row['missing']}" for row in rows if "missing" in row.told]
    return table(["bytes a parameter", "state", "kept", "peak"], cells) + "\n\n" + "\n".join(missing)


def growth(results: Results, question: str, label: str, value: Callable[[Row], str]) -> str:
    cells = [[value(row), told(row.ratio()), f"{1e3 * row.contenders['AdamSPD']['seconds']:.3g}"]
             for row in results.of(question)]  # fmt: skip
    return table([label, f"AdamSPD over {BASELINE}", "ms, here"], cells)


def parts(results: Results) -> str:
    cells = []
    for row in results.of("parts"):
        whole, call, one = map(row.medians, pictures.PARTS)
        before = [1 - c / w for c, w in zip(call, whole, strict=True)]
        first = [o / w for o, w in zip(one, whole, strict=True)]
        second = [1 - b - f for b, f in zip(before, first, strict=True)]
        step = row.contenders["whole step"]
        beside = BASELINE in row.contenders
        cells.append(
            [row["model"], told(row.ratio("whole step")) if beside else "–",
             number(row.bytes_say("whole step")) if beside else "–", f"{1e3 * step['seconds']:.3g}",
             f"{step['host'] / step['seconds']:.0%}", share(before), share(first), share(second)]
        )  # fmt: skip
    over = f"over {BASELINE}"
    head = ["", over, "bytes say", "ms, here", "until the call returns", "before the backend", "sweep 1", "sweep 2"]
    return table(head, cells)


def share(of: list[float]) -> str:
    """Of a step, by process: the median, with the range if there is one."""
    low, middle, high = (100 * value for value in spread(of))
    return f"{middle:.0f}%" if len(of) == 1 else f"{middle:.0f}% ({low:.0f}–{high:.0f}%)"


def losses(results: Results) -> str:
    """Where a peer's AdamW beats our fastest AdamSPD, beyond the spread."""
    lines = []
    for row in results.of("peers", "others", "compiled"):
        mine = min((name for name in row.contenders if name.startswith("AdamSPD")), key=lambda name: row.ratio(name)[1])
        for name in row.contenders:
            known = row.question != "peers" and name == BASELINE  # in a contest of more processes
            if name == COPY or known or pictures.is_ours(name):
                continue
            if row.ratio(name)[2] < row.ratio(mine)[0]:
                pair = ", ".join(f"{who} {told(row.ratio(who))}" for who in (name, mine))
                lines.append(f"- {row['model']}, {row['dtype']}: {pair}")
    return "\n".join(lines) or "- none"


def write_page(results: Results, page: Path) -> None:
    """The words of benchmarks.md.in with what was measured in place of their fields; its pictures beside it."""
    machine = dict(results.machine)
    others = {name: version for name, version in machine.pop("packages").items() if name != "torch"}
    packages = ", ".join(f"{name} {version}" for name, version in others.items())
    untrusted = [row.name for row in results.rows if not row["trusted"]]
    copies = sorted(row.bandwidth(COPY) for row in results.rows if COPY in row.contenders and row["parameters"] > 2**24)
    fields = {
        "machine": ", ".join(f"{key} {value}" for key, value in machine.items() if value),
        "packages": fill(f"Other packages: {packages or 'none'}.", 120),
        "copy": f"{copies[len(copies) // 2]:.0f}" if copies else "?",
        "untrusted": (", ".join(untrusted) or "none") if len(untrusted) <= FEW else f"{len(untrusted)} of all",
        "processes": processes(results),
        "losses": losses(results),
        "peers_f32": peers(results, "float32"),
        "peers_bf16": peers(results, "bfloat16"),
        "others": "\n\n".join(
            [
                *(peers(results, dtype, "others") for dtype in ("float32", "bfloat16")),
                peers(results, "float32", "compiled"),
            ]
        )
        if results.of("others", "compiled")
        else "In these results they are in the tables above.",
        "eight_bit": by_bytes(results.of("eight_bit"), lambda row, name: f"{row['dtype']}: {name}")
        if results.of("eight_bit")
        else "Not measured here.",
        "vit": next((row["model"] for row in results.of("methods") if "model" in row.told), "ViT-B/16"),
        "absent": absent(results),
        "methods": by_bytes(results.of("methods", "reference"), lambda row, name: name),
        "precision": by_bytes(results.of("precision"), lambda row, name: f"{row['dtype']}: {name}"),
        "eager": eager(results),
        "parameters": growth(
            results, "parameters", "parameters", lambda row: f"{row['parameters'] >> 20} Mi, {row['dtype']}"
        ),
        "tensors": growth(results, "tensors", "tensors", lambda row: f"{row['tensors']:,}"),
        "fire": growth(results, "fire", "of the elements fire", lambda row: f"{row['fired']:.0%}"),
        "threads": growth(results, "threads", "threads", lambda row: f"{row['threads']}"),
        "parts": parts(results),
        "projections": by_bytes(results.of("projections"), lambda row, name: name),
        "end_to_end": end_to_end(results),
        "tpgm_run": tpgm_run(results),
        "memory": memory(results),
        "page": page.stem,
    }
    text = Path(__file__).with_name("benchmarks.md.in").read_text()
    for key, value in fields.items():
        text = text.replace(f"{{{key}}}", value)
    page.write_text(text)
    for name, draw in pictures.PICTURES.items():
        draw(results, page.with_name(f"{page.stem}-{name}.png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("found", type=Path)
    parser.add_argument("--keep", type=Path, help="where the ratios are kept that check.py holds to")
    parser.add_argument("--page", type=Path, help="the page to write, docs/benchmarks.md")
    parser.add_argument("--quote", type=Path, nargs="*", default=[], help="the texts whose figures are to be renewed")
    args = parser.parse_args()
    results = read(args.found)
    if args.keep:
        write(results, args.keep)
    if args.page:
        write_page(results, args.page)
    for text in args.quote:
        text.write_text(quoted(text.read_text(), results))


if __name__ == "__main__":
    main()
