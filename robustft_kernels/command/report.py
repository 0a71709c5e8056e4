"""How far each tensor of TUNED is from BASE, as numbers, as a table, and as JSON; and the ratios of Model Stock."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite, nan
from statistics import median
from typing import Any

import torch

from .pairs import Pairs
from .source import Source
from .spans import Norm, spans


@dataclass(frozen=True)
class Row:
    """One tensor.

    deviation: n = ‖θ − θ₀‖, in the units of the weights.
    base: ‖θ₀‖ in the same norm.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    deviation: float
    base: float

    @property
    def relative(self) -> float:
        """n / ‖θ₀‖. nan if θ₀ is zero."""
        return self.deviation / self.base if self.base else nan


def measure(base: Source, tuned: Source, pairs: Pairs, norm: str, progress: Callable[[int], object]) -> list[Row]:
    """The rows of all tensors that have a θ₀, in the order of TUNED.

    progress: is told of the bytes of TUNED that were read.
    """
    rows = []
    for name, of in pairs.base_of.items():
        entry = tuned.entries[name]
        moved, size = Norm(norm, entry.shape), Norm(norm, entry.shape)
        for span in spans(entry.shape):
            theta, theta_0 = tuned.read(name, span.start, span.stop), base.read(of, span.start, span.stop)
            moved.add(span, theta, theta_0)
            size.add(span, theta_0, None)
            progress(theta.nbytes)
        rows.append(Row(name, entry.shape, entry.dtype, float(moved.value), float(size.value)))
    return rows


def in_order(rows: list[Row]) -> list[Row]:
    """What is not finite first, then by the relative deviation, the largest first. Without a relative one, by n."""

    def place(row: Row) -> tuple[bool, bool, float]:
        finite = isfinite(row.deviation)
        return finite, not row.base, -(row.relative if row.base else row.deviation) if finite else 0.0

    return sorted(rows, key=place)


def whole(rows: list[Row], norm: str) -> Row:
    """All tensors as one: n² = Σ n² for "l2", the largest n for "mars"."""
    numbers = torch.tensor([[row.deviation, row.base] for row in rows], dtype=torch.float64)
    moved, size = (numbers.square().sum(0).sqrt() if norm == "l2" else numbers.amax(0)).tolist()
    return Row("all tensors", (), "", moved, size)


def table(rows: list[Row], total: Row, top: int) -> str:
    """The first `top` rows (0: all) and the whole, in columns."""
    shown = rows[: top or None]
    lines = [("relative", "deviation", "base", "tensor", "")]
    lines += [
        (f"{row.relative:.3e}", f"{row.deviation:.3e}", f"{row.base:.3e}", row.name, f"{row.dtype} {list(row.shape)}")
        for row in shown
    ]
    lines.append((f"{total.relative:.3e}", f"{total.deviation:.3e}", f"{total.base:.3e}", total.name, ""))
    width = max(len(line[3]) for line in lines)
    text = [f"{a:>10} {b:>10} {c:>10}  {name:<{width}}  {form}".rstrip() for a, b, c, name, form in lines]
    if len(shown) < len(rows):
        text.insert(-1, f"{'':>34}({len(rows) - len(shown)} more: --top 0 shows all)")
    return "\n".join(text)


def as_json(rows: list[Row], total: Row, norm: str, paths: tuple[str, str], pairs: Pairs) -> str:
    """The same as JSON. A number that is not finite is null there."""

    def told(row: Row) -> dict[str, Any]:
        numbers = {"deviation": row.deviation, "base": row.base, "relative": row.relative}
        return {name: number if isfinite(number) else None for name, number in numbers.items()}

    tensors = [{"name": row.name, "shape": list(row.shape), "dtype": row.dtype, **told(row)} for row in rows]
    content = {
        "base": paths[0],
        "tuned": paths[1],
        "norm": norm,
        "all": told(total),
        "tensors": tensors,
        "integers": pairs.integers,
        "excluded": pairs.excluded,
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def ratios_told(ratios: Mapping[str, float]) -> str:
    """The least, the middle and the largest t, and how many tensors have none."""
    known = {name: t for name, t in ratios.items() if isfinite(t)}
    if not known:
        return "t: no tensor moved"
    least, largest = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
    still = len(ratios) - len(known)
    return (
        f"t: from {known[least]:.3f} ({least}) to {known[largest]:.3f} ({largest}), median "
        f"{median(known.values()):.3f}" + (f"; {still} tensors moved in no TUNED" if still else "")
    )


def ratios_as_json(ratios: Mapping[str, float], base: str, tuned: list[str], pairs: Pairs) -> str:
    """The t of all tensors as JSON. null is for one that moved in no TUNED."""
    content = {
        "base": base,
        "tuned": tuned,
        "ratios": {name: t if isfinite(t) else None for name, t in ratios.items()},
        "integers": pairs.integers,
        "excluded": pairs.excluded,
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"
