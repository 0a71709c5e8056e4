"""What README.md and docs/costs.md quote of the results, in tables and sentences. `make bench` writes it there."""

import re

from .contenders import BASELINE
from .markdown import told
from .results import Results, Row, eager_over_ours

COLUMNS = {
    "AdamSPD": "AdamSPD",
    "our AdamW": "AdamW (none)",
    "DeepSpeed's CPUAdam": "DeepSpeed CPUAdam",
    "torch foreach": "torch foreach",
}
ROWS = {  # how the first cell begins, and the benchmark
    "ResNet-50, fp32": "bench_peers[ResNet-50-torch.float32]",
    "Swin-T, fp32": "bench_peers[Swin-T-torch.float32]",
    "ViT-B/16, fp32": "bench_peers[ViT-B/16-torch.float32]",
    "ViT-B/16, bf16": "bench_peers[ViT-B/16-torch.bfloat16]",
    "LLaMA-7B, LoRA r=8, fp32": "bench_peers[LLaMA-7B, LoRA r=8-torch.float32]",
    "10,000 tensors, 10M parameters, fp32": "bench_tensors[10000]",
}
FIGURE = r"[\d.]+ \([\d.]+–[\d.]+\)"


def quoted(text: str, results: Results) -> str:
    """The text with the figures of these results. Those of contests that they do not have stay."""
    rows = {row.name: row for row in results.rows}
    return _sentences(_tables(text, rows), rows)


def _tables(text: str, rows: dict[str, Row]) -> str:
    lines, head = text.splitlines(keepends=True), []
    for k, line in enumerate(lines):
        cells = line.strip().strip("|").split("|")
        if not line.startswith("|"):
            head = []
        elif not head:
            head = [COLUMNS.get(cell.strip(), "") for cell in cells]
        else:
            row = next((rows.get(name) for label, name in ROWS.items() if cells[0].strip().startswith(label)), None)
            for column, name in enumerate(head):
                if row and name and row["baseline"] == BASELINE:
                    cells[column] = f" {told(row.ratio(name)) if name in row.contenders else '–'} "
                    lines[k] = f"|{'|'.join(cells)}|\n"
    return "".join(lines)


def _sentences(text: str, rows: dict[str, Row]) -> str:
    def put(before: str, ratio: list[float] | None, after: str = "") -> None:
        nonlocal text
        if ratio:
            text = re.sub(f"({before}){FIGURE}({after})", rf"\g<1>{told(ratio)}\g<2>", text, count=1)

    def eager(model: str) -> list[float] | None:
        row = rows.get(f"bench_eager[AdamSPD-{model}]")
        return row and eager_over_ours(row)

    iteration = rows.get("bench_end_to_end[ViT-B/16]")
    put(r"loop[^.]*?\stook\s", eager("ViT-B/16"))
    put(r"On\sthe\sadapters\sit\stook\s", eager("LLaMA-7B, LoRA r=8"))
    put(r"costs\s", iteration and iteration.ratio("AdamSPD"), r"\sof\sone\swith\sAdamW")
    put(r"With\sthe\sloop\sit\scosts\s", iteration and iteration.ratio("AdamSPD, eager"))
    most = max((row.processes for row in rows.values()), default=1)
    spread = f"range over {most} processes" if most > 1 else "quartiles"
    return re.sub(r"median \((?:quartiles|range over \d+ processes)\)", f"median ({spread})", text)
