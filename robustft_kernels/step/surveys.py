"""What must be known of all rows of tensors before their step, where the rows are in several processes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.contract import StepTensors
from ..core.exchange import Exchange, Segments
from ..core.methods import MEASURES, RULES
from ..core.sharding import first_row, has_whole_rows, local
from ..core.staging import staged
from .decide import EPS, expanded, fold, lengths_on

DOT, BEFORE = MEASURES.index("grad_dot_delta"), MEASURES.index("before")
ROWS = RULES["observe_rows"]


class RowSurvey:
    """The rows of some tensors, as a sweep under "observe_rows" has measured those that are here.

    Rows that lie whole in one process are folded there first. Those that are cut are summed over all processes.
    """

    def __init__(self, tensors: Sequence[StepTensors], device: torch.device) -> None:
        params = [of.param for of in tensors]
        whole = [has_whole_rows(param) for param in params]
        # The tensors in an order of our own: first those whose rows are cut.
        self._order = sorted(range(len(params)), key=lambda k: whole[k])
        self._back = sorted(range(len(params)), key=lambda place: self._order[place])
        params = [params[k] for k in self._order]
        self._here = [ROWS.segments_of(local(of.param).shape) for of in tensors]
        self._n = whole.count(False)
        self._segments = Segments(params[: self._n], [ROWS] * self._n)
        here = [ROWS.segments_of(local(param).shape) for param in params[self._n :]]
        # Of rows that are known here, once those that are cut are summed.
        self._counts = [*self._segments.counts, *here]
        first = [first_row(param) if param.dim() > 1 else 0 for param in params[self._n :]]
        self._first = staged(torch.tensor([*[0] * self._n, *first], dtype=torch.float64, device="cpu"), device)
        self._sums = Exchange(params, [*(2 * count for count in self._segments.counts), *[1] * len(here)], device)
        self._maxima = Exchange(params, [1] * len(params), device)

    def slopes(self, found: Tensor) -> Tensor:
        """FTP's slope of each tensor, Σᵢ ⟨gᵢ,c'ᵢ⟩ / (Σ|c'ᵢ| + 1e-8)."""
        cut, rows = self._ordered(found[:, [DOT, BEFORE]])
        of_whole = self._slopes(rows, self._counts[self._n :])
        cut = self._segments.scattered(cut)
        sums = self._sums.sum(torch.cat([cut.flatten(), of_whole]))
        of_cut = self._slopes(sums[: cut.numel()].view(cut.shape), self._segments.counts)
        return torch.cat([of_cut, sums[cut.numel() :]])[self._back]

    def _slopes(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        return fold(rows[:, 0] / (rows[:, 1] + EPS), counts, "sum")

    def largest_rows(self, found: Tensor) -> list[Tensor]:
        """Which row here of each tensor is the largest of all, as 0 and 1. If several are, it is the first of them. A
        row of nan is never the largest."""
        cut, rows = self._ordered(found[:, [BEFORE]])
        sizes = torch.cat([self._segments.whole(cut), rows])[:, 0].nan_to_num(nan=-1.0)
        most = self._largest(sizes)
        counts = lengths_on(sizes.device, tuple(self._counts))
        starts = counts.cumsum(0) - counts
        places = torch.arange(len(sizes), dtype=torch.float64, device=sizes.device)
        places += self._expanded(self._first - starts)
        first = -self._largest(torch.where(sizes == self._expanded(most), -places, -torch.inf))
        on = (places == self._expanded(first)).double()
        of_cut = self._segments.parts(on[: sum(self._segments.counts)]).split(self._segments.here)
        of_whole = on[sum(self._segments.counts) :].split(self._counts[self._n :])
        flags = [*of_cut, *of_whole]
        return [flags[place] for place in self._back]

    def _ordered(self, found: Tensor) -> tuple[Tensor, Tensor]:
        """The rows here of tensors whose rows are cut, and of the others."""
        parts = found.split(self._here)
        ordered = [parts[k] for k in self._order]
        none = found[:0]
        return torch.cat([none, *ordered[: self._n]]), torch.cat([none, *ordered[self._n :]])

    def _largest(self, values: Tensor) -> Tensor:
        """The largest value of each tensor in all processes."""
        counts = lengths_on(values.device, tuple(self._counts))
        here = torch.segment_reduce(values, "max", lengths=counts, initial=-torch.inf, unsafe=True)
        return self._maxima.largest(here)

    def _expanded(self, of_tensors: Tensor) -> Tensor:
        return expanded(of_tensors, self._counts)
