"""What processes tell each other of a step's measures, and what all of them decide by it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.exchange import Exchange, Reach, Segments
from ..core.methods import MEASURES, Rule
from ..core.sharding import local
from ..core.staging import staged
from .decide import Terms, decide, decide_by_size, expanded, fold, largest, size_of
from .launch import Share
from .results import Results, Tables, unless, write

TOLD = 3  # sums over the rows of a parameter that are for telemetry; the last is of rules with a gate alone


def _told_of(rule: Rule) -> int:
    """How many of them a rule has. Those that compare with what was before the step are those with a gate."""
    return TOLD if rule.compares else TOLD - 1


@dataclass(eq=False)
class Part:
    """The segments of a share.

    row: of its group's hyper-parameters.
    at: its segments among all that are here.
    here, counts: how many segments each parameter has here, and over all processes.
    decided: whether α is decided in torch. If not, the sweep has decided it.
    """

    share: Share
    row: int
    at: slice
    here: Sequence[int]
    counts: Sequence[int]
    decided: bool

    @property
    def rule(self) -> Rule:
        """The rule of the share."""
        return self.share.spec.rule

    @property
    def by_size(self) -> bool:
        """Whether processes must know the largest row of each parameter, to decide or to learn."""
        return self.rule.tied or bool(self.rule.learns)


class Peers:
    """What becomes of the measures that a sweep has left, one row a segment that is here.

    shares: those of a launch, each with one reach. The first `decided` of them are decided here.

    Nothing is exchanged but the sums of segments that are cut, and of parameters whose rows are spread the largest row
    and two or three sums over the rows. Those sums are for telemetry.
    """

    def __init__(self, shares: Sequence[Share], decided: int, device: torch.device) -> None:
        self.parts: list[Part] = []
        at = 0
        for row, share in enumerate(shares):
            rule = share.spec.rule
            here = [rule.segments_of(local(param).shape) for param in share.params]
            counts = [rule.segments_of(param.shape) for param in share.params]
            self.parts.append(Part(share, row, slice(at, at + sum(here)), here, counts, row < decided))
            at += sum(here)
        self._cut = [part for part in self.parts if part.share.reach is Reach.CUT]
        self._rows = [part for part in self.parts if part.share.reach is Reach.ROWS]
        cut, rows = ([param for part in parts for param in part.share.params] for parts in (self._cut, self._rows))
        self._segments = Segments(cut, [part.rule for part in self._cut for _ in part.share.params])
        told = [_told_of(part.rule) for part in self._rows for _ in part.share.params]
        sizes = [*(len(MEASURES) * count for count in self._segments.counts), *told]
        self._sums = Exchange([*cut, *rows], sizes, device)
        self._maxima = Exchange(rows, [1] * len(rows), device)
        counts = [count for part in self._rows for count in part.counts]
        self._counts_of_rows = staged(torch.tensor(counts, dtype=torch.float64, device="cpu"), device)
        self.decided = sum(sum(part.here) for part in self.parts if part.decided)  # segments here

    def tables(self, results: Results, device: torch.device) -> Tables:
        """Tables for what the steps leave."""
        params: list[Tensor] = []
        counts: list[int] = []
        told: list[bool] = []
        for part in self.parts:
            params += part.share.params
            counts += part.counts if part.share.reach is Reach.CUT else part.here
            told += [part.share.reach is Reach.ROWS] * len(part.here)
        return results.tables(params, counts, told, device)

    def decide(self, found: Tensor, known: Tensor, terms: Callable[[Part], Terms]) -> "Decision":
        """What follows from the measures that were found, [segments here, measures], and from the alphas that the sweep
        decided."""
        alphas = known.clone()
        for part in self.parts:
            if part.decided and not part.share.together:
                alphas[part.at] = decide(part.rule, found[part.at], part.here, terms(part))
        sums, shares, sizes = self._exchange(found, alphas)
        whole: dict[Part, tuple[Tensor, Tensor]] = {}  # of parts that are cut: sums and alphas over all processes
        of_parts = sums.split([sum(part.counts) for part in self._cut])
        for part, of_part in zip(self._cut, of_parts, strict=True):
            whole[part] = of_part, decide(part.rule, of_part, part.counts, terms(part))
        if self._cut:
            parts = self._segments.parts(torch.cat([of for _, of in whole.values()]))
            for part, of_part in zip(self._cut, parts.split([sum(part.here) for part in self._cut]), strict=True):
                alphas[part.at] = of_part
        told = []
        of_rows = [len(part.here) for part in self._rows]
        for part, of_part, size in zip(self._rows, shares.split(of_rows), sizes.split(of_rows), strict=True):
            if part.by_size:
                by_size = decide_by_size(part.rule, size, terms(part))
                size = by_size * size
            if part.share.together:
                alphas[part.at] = expanded(by_size, part.here)
                of_part = torch.stack([by_size, (by_size != 1).double(), of_part[:, 2]], 1)
            told.append(torch.cat([size[:, None], of_part], 1))
        return Decision(
            self.parts, found, alphas, whole, told, dict(zip(self._rows, sizes.split(of_rows), strict=True))
        )

    def _exchange(self, found: Tensor, alphas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sums of all segments that are cut, [segments, measures]. Of parameters whose rows are spread: the mean α
        and the shares of rows with α ≠ 1 and with ⟨g,d⟩ > 0, [parameters, 3]. And Σ|c| of the largest row, pulled
        unless that decides."""
        cut = torch.cat([found[part.at] for part in self._cut]) if self._cut else found[:0]
        table = self._segments.scattered(cut)
        if not self._rows:
            return self._sums.sum(table.flatten()).view(table.shape), table[:0, :TOLD], table[:0, 0]
        of_rows, maxima = [], []
        for part in self._rows:
            m, alpha = dict(zip(MEASURES, found[part.at].T, strict=True)), alphas[part.at]
            counted = (alpha, (alpha != 1).double(), (m["grad_dot_delta"] > 0).double())[: _told_of(part.rule)]
            of_rows.append(torch.stack([fold(of, part.here, "sum") for of in counted], 1))
            maxima.append(largest(size_of(m) if part.by_size else size_of(m) * alpha, part.here))
        sums = self._sums.sum(torch.cat([table.flatten(), *map(torch.flatten, of_rows)]))
        summed = sums[table.numel() :].split([of.numel() for of in of_rows])
        means = torch.cat(
            [pad(s.view(of.shape), (0, TOLD - of.shape[1])) for s, of in zip(summed, of_rows, strict=True)]
        )
        means = means / self._counts_of_rows[:, None].clamp(min=1)
        return sums[: table.numel()].view(table.shape), means, self._maxima.largest(torch.cat(maxima))


@dataclass(eq=False)
class Decision:
    """What was decided.

    alphas: of all segments here.
    sizes: Σ|c| of the largest row of each parameter of a part whose rows are spread.
    """

    parts: Sequence[Part]
    found: Tensor
    alphas: Tensor
    whole: dict[Part, tuple[Tensor, Tensor]]
    told: Sequence[Tensor]
    sizes: dict[Part, Tensor]

    def write(self, tables: Tables, found_inf: Tensor | None) -> None:
        """Writes what the step leaves. Nothing changes when `found_inf` is not 0."""
        each = [self.whole.get(part, (self.found[part.at], self.alphas[part.at])) for part in self.parts]
        sums, alphas = (torch.cat(list(of)) for of in zip(*each, strict=True))
        write(tables, sums, alphas, found_inf)
        if self.told:
            told = torch.cat(list(self.told))
            new = torch.cat([told[:, :3], tables.told[:, 3:] + told[:, 2:]], 1)
            tables.told.copy_(unless(found_inf, new, tables.told))

    def largest_rows(self, part: Part) -> Tensor:
        """Σ|c| of the largest row of each parameter of a spread part, over all processes. It is infinite if one is not
        finite."""
        if part in self.sizes:
            return self.sizes[part]
        return largest(size_of(dict(zip(MEASURES, self.whole[part][0].T, strict=True))), part.counts)
