"""A tensor in spans that fit in memory: how it divides, and its norm from those of its spans."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..finetune.projection import deviation

SPAN = 2**20  # elements of each checkpoint that are in memory at once, and in the cache from the read to the write


@dataclass(frozen=True)
class Span:
    """The elements from `start` to `stop` of a tensor, flat: `rows` whole rows from row `row` on, or a part of one."""

    start: int
    stop: int
    row: int
    rows: int

    def by_row(self, flat: Tensor) -> Tensor:
        """Its elements as [rows, elements of a row]."""
        return flat.view(self.rows, -1)

    @property
    def its_rows(self) -> slice:
        return slice(self.row, self.row + self.rows)


def rows_of(shape: tuple[int, ...]) -> int:
    """How many rows a tensor has. Below two dimensions it is one row, as in `deviation`."""
    return shape[0] if len(shape) > 1 else 1


def spans(shape: tuple[int, ...]) -> Iterator[Span]:
    """The spans of a tensor, in order. They have whole rows, unless a row is longer than a span."""
    if not prod(shape):
        return
    rows = rows_of(shape)
    length = prod(shape) // rows
    at_once = SPAN // length
    if at_once:
        for row in range(0, rows, at_once):
            some = min(at_once, rows - row)
            yield Span(row * length, (row + some) * length, row, some)
        return
    for row in range(rows):
        end = (row + 1) * length
        for start in range(row * length, end, SPAN):
            yield Span(start, min(start + SPAN, end), row, 1)


class Norm:
    """n = ‖θ − θ₀‖ of a tensor whose spans are added one by one. `deviation` measures each.

    "l2": n² = Σ n² of the spans. "mars_rows": nᵢ = Σ nᵢ of the spans that have a part of row i. "mars": n = maxᵢ nᵢ.
    """

    def __init__(self, norm: str, shape: tuple[int, ...]) -> None:
        self.norm = norm
        self._sums = torch.zeros(1 if norm == "l2" else rows_of(shape), dtype=torch.float64)

    def add(self, span: Span, theta: Tensor, theta_0: Tensor | None) -> None:
        """Adds a span of both, flat. None is zero."""
        theta_0_rows = None if theta_0 is None else [span.by_row(theta_0)]
        if self.norm == "l2":
            self._sums += torch.as_tensor(deviation([span.by_row(theta)], theta_0_rows)).square()
        else:
            self._sums[span.its_rows] += deviation([span.by_row(theta)], theta_0_rows, "mars_rows")[0]

    @property
    def value(self) -> Tensor:
        """n in float64: one element, or for "mars_rows" one for each row. 0 for a tensor without elements."""
        if self.norm == "l2":
            return self._sums.sqrt()
        if self.norm == "mars":
            return self._sums.max().reshape(1) if len(self._sums) else torch.zeros(1, dtype=torch.float64)
        return self._sums
