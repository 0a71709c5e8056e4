"""A launch over parameters that are sharded over processes. Each process steps and measures what is here. After the
sums over all shards, all decide the same, and each pulls what is here."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core import state
from ..core.bases import NO_STEP
from ..core.contract import Run, StepTensors, empty_results
from ..core.memory import in_memory
from ..core.methods import MEASURES, METHOD_HYPER, RULES
from ..core.sharding import Segments, any_infinite, local, placed_as, total
from .decide import EPS, LEARN, decide, expanded, fold, largest
from .hyper import terms_of
from .launch import CPU, Launch, Share, shard_of
from .no_step import NoStep, deltas_of, observed, pulled, rows_of
from .results import unless, write

DOT, BEFORE, GAIN = (MEASURES.index(name) for name in ("grad_dot_delta", "before", "gain"))


class ShardedLaunch(Launch):
    """The step in two halves, with one all-reduce between them. It sums the measures of all segments whose rule waits
    for them, and the two sums that FTP's slopes are made of. MARS-SP must know the largest row before the step, and has
    an all-reduce of its own.

    What is decided depends on those sums alone, and they are the same bits in every process.
    """

    def _in_order(self, shares: Sequence[Share]) -> Sequence[Share]:
        """Puts rules that learn first, then the others that wait for their measures, then the rest."""
        return sorted(shares, key=lambda share: (not share.spec.rule.learns, not share.spec.rule.waits))

    def _prepare(self) -> Run:
        keep = [share.spec.under(RULES["keep"]) for share in self.shares]
        self._no_step_hyper = self._hyper_of(NO_STEP, keep)
        self._decided = [of for of in self.tensors if of.spec.rule.waits]
        self._learning = [of for of in self.tensors if of.spec.rule.learns]
        self._signed = [of for of in self.tensors if of.spec.rule.surveys == "largest_row"]
        halves = observed(self.tensors, self.base)
        self._sums, self._known = empty_results(sum(shard_of(of).segments for of in halves), self.device)
        self._segments = Segments([of.param for of in self._decided], [of.spec.rule for of in self._decided])
        self._n = sum(self._segments.here)  # decided segments that are here, which come first
        if self._decided:
            self._pull = self._no_step(pulled(self._decided))
        if self._learning:
            self._survey = self._no_step(deltas_of(self._learning))
        if self._signed:
            rows = rows_of(self._signed)
            self._rows_of_signed = Segments([of.param for of in rows], [of.spec.rule for of in rows])
            self._observe = self._no_step(rows)
        return self._whole_step(halves, self._sums, self._known)

    def _no_step(self, tensors: Sequence[StepTensors]) -> NoStep:
        hyper = self._no_step_hyper
        return NoStep(self.backend, list(map(shard_of, tensors)), hyper.table, hyper.live)

    def __call__(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        self.hyper.refresh()
        self._no_step_hyper.refresh()
        self._terms = [terms_of(share.group, self.base, share.spec, self.device) for share in self.shares]
        grad_scale, found_inf = self._here(grad_scale, found_inf)
        if found_inf is not None:
            found_inf = any_infinite(found_inf, self.params)
        grads = self._grads()
        if self._learning:
            self._survey(grads[: len(self._learning)], grad_scale)
        if self._signed:
            grads = self._penalized(grads, grad_scale)
        self._run(grads, grad_scale, found_inf)
        n = len(MEASURES)
        found, sums, alphas = self._sums[:, :n], self._sums[:0, :n], self._known[:0]
        if self._decided:
            sums, alphas = self._decide(found[: self._n], found_inf)
            self._pull.alphas.copy_(self._segments.parts(alphas))
            self._pull(found_inf=found_inf)
        rest = slice(self._n, None)
        sums, alphas = torch.cat([sums, found[rest]]), torch.cat([alphas, self._known[rest]])
        write(self.results, self.alphas, sums, alphas, found_inf)

    def _decide(self, here: Tensor, found_inf: Tensor | None) -> tuple[Tensor, Tensor]:
        """The measures of all decided segments over all shards, and their alphas, from the measures of what is here.
        Learned radii are updated."""
        n = here.shape[1]
        packed = here
        if self._learning:
            packed = here.new_zeros(len(here), n + 2)
            packed[:, :n] = here
            survey = self._survey.results
            packed[: len(survey), n:] = survey[:, [DOT, BEFORE]]
        sums = self._segments.whole(packed)
        learned = self._learn(sums[:, :n], sums[:, n:], found_inf) if self._learning else None
        alphas, first, k = [], 0, 0
        for row in dict.fromkeys(of.row for of in self._decided):
            rule = self.shares[row].spec.rule
            counts = self._segments.counts[k : k + len(self.shares[row].places)]
            last = first + sum(counts)
            terms = dict(self._terms[row])
            if learned is not None and rule.learns:
                terms["radius"] = expanded(learned[k : k + len(counts)], counts)
            alphas.append(decide(rule, sums[first:last, :n], counts, terms))
            first, k = last, k + len(counts)
        return sums[:, :n], torch.cat(alphas)

    def _learn(self, sums: Tensor, of_deltas: Tensor, found_inf: Tensor | None) -> Tensor:
        """The radii by which this step projects. The radius that is kept is at most the norm of the largest row."""
        counts = self._segments.counts[: len(self._learning)]
        n = sum(counts)
        slopes = fold(of_deltas[:n, 0] / (of_deltas[:n, 1] + EPS), counts, "sum")
        most = largest(sums[:n, BEFORE] + sums[:n, GAIN] + EPS, counts)
        some = torch.tensor([count > 0 for count in counts], device=CPU).to(self.device)
        radii = torch.empty_like(most)
        by_rule: dict[str, list[int]] = {}
        for k, of in enumerate(self._learning):
            by_rule.setdefault(of.spec.rule.name, []).append(k)
        for name, places in by_rule.items():
            members = [self._learning[k] for k in places]
            kept = [of.state[of.spec.rule.learns] for of in members]
            was, t = torch.stack(kept), torch.stack([_count_of(of) for of in members])
            t = t.to(self.device, torch.float64)
            terms = {key: self._numbers(members, key) for key in METHOD_HYPER}
            new = LEARN[name](was, slopes[places], t, terms)
            radii[places] = of_rule = new[:, 0].clone()
            new[:, 0] = torch.where(some[places], torch.minimum(of_rule, most[places]), of_rule)
            for state_of, value in zip(kept, unless(found_inf, new, was), strict=True):
                state_of.copy_(value)
        return radii

    def _numbers(self, tensors: Sequence[StepTensors], key: str) -> Tensor:
        """One hyper-parameter of each of these tensors, on the device."""
        numbers = [self._terms[of.row][key] for of in tensors]
        stacked = torch.stack([torch.as_tensor(number, dtype=torch.float64) for number in numbers])
        return stacked.to(self.device, non_blocking=True)

    def _penalized(self, grads: list[Tensor], grad_scale: Tensor | None) -> list[Tensor]:
        """The gradients. Those under MARS-SP are copies, with the subgradient on the row of largest Σ|d|. If several
        rows are largest, it is on the first of them."""
        self._observe()
        rows, counts = self._rows_of_signed, self._rows_of_signed.counts
        sizes = rows.whole(self._observe.results[:, [BEFORE]])[:, 0].nan_to_num(nan=-1.0)
        places = torch.arange(len(sizes), dtype=torch.float64, device=self.device)
        candidates = torch.where(sizes == expanded(fold(sizes, counts, "max"), counts), places, torch.inf)
        first = torch.segment_reduce(
            candidates, "min", lengths=torch.tensor(counts, device=self.device), initial=torch.inf, unsafe=True
        )
        on = rows.parts((places == expanded(first, counts)).double()).split(rows.here)
        grads = list(grads)
        of_param = {of.param: k for k, of in enumerate(self.tensors)}
        for of, flags in zip(self._signed, on, strict=True):
            param, k = local(of.param), of_param[of.param]
            d = local(state.weights_of(of.param, dict(of.state)))
            d = d if of.anchor is None else d - local(of.anchor)
            flags = flags.reshape([-1, *[1] * (param.dim() - 1)] if param.dim() > 1 else [1] * param.dim())
            sign = -1 if self.shares[of.row].group.get("maximize") else 1
            push = self._terms[of.row]["strength"] * d.sign() * flags * sign
            push = push if grad_scale is None else push * grad_scale
            grads[k] = (grads[k] + push).to(torch.float64 if param.dtype == torch.float64 else torch.float32)
        return grads

    def squared_norm(self) -> Tensor:
        """Σ g² over all shards of all gradients, in float64."""
        norms = torch._foreach_norm(self._grads(), 2, dtype=torch.float64)
        return total([norm**2 for norm in norms], self.params)

    def _grads(self) -> list[Tensor]:
        return [in_memory(local(placed_as(param.grad, param))) for param in self.params]  # type: ignore[arg-type]


def _count_of(tensors: StepTensors) -> Tensor:
    assert tensors.step is not None
    return tensors.step
