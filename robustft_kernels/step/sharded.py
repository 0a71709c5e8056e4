"""A launch over parameters that are sharded over processes. Each process steps and measures what is here. What needs
the sums over all shards is decided after an all-reduce, by all processes alike."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..core import state
from ..core.bases import NO_STEP, Base, GroupSpec, arithmetic_of
from ..core.contract import Run, StepTensors, empty_results
from ..core.exchange import Exchange, Reach
from ..core.methods import MEASURES, METHOD_HYPER, RULES
from ..core.sharding import is_spread, local
from .decide import EPS, LEARN, Terms, expanded, lengths_on, projection
from .hyper import HyperTable
from .launch import Launch, Share, shard_of, split_by_reach
from .no_step import NoStep, deltas_of, observed, pulled, rows_of, whole_of
from .peers import Decision, Part, Peers
from .results import Results, Tables, unless
from .surveys import BEFORE, DOT, RowSurvey


class ShardedLaunch(Launch):
    """The step in three parts, with all-reduces between them.

    - Before anything is written, the slopes of learned radii are summed, MARS-SP finds its largest rows, and DiGraP
      its conflicts.
    - The sweep makes the step. A row that lies whole in one process is decided and pulled there.
    - What is cut is decided from the sums over all shards, and pulled.

    What is decided together depends on those sums alone, and they are the same bits in every process.
    """

    def _in_order(self, shares: Sequence[Share]) -> Sequence[Share]:
        """Splits shares by reach, and puts first what is decided together."""
        return sorted(split_by_reach(shares), key=lambda share: not share.together)

    def _tables(self, results: Results) -> Tables:
        self._peers = Peers(self.shares, sum(share.together for share in self.shares), self.device)
        return self._peers.tables(results, self.device)

    def _hyper_of(self, base: Base, specs: Sequence[GroupSpec]) -> HyperTable:
        """A table that holds a radius of its own for each parameter that learns one."""
        self._learning = [of for of in self.tensors if of.spec.rule.learns and is_spread(of.param)]
        self._radii = torch.ones(len(self._learning), dtype=torch.float64, device=self.device)
        own, addresses = [of.row for of in self._learning], self.backend.keeps_addresses
        groups = [share.group for share in self.shares]
        return HyperTable(base, groups, specs, self.device, addresses=addresses, own=own, radii=self._radii)

    def _prepare(self) -> Run:
        keep = [share.spec.under(RULES["keep"]) for share in self.shares]
        self._no_step_hyper = super()._hyper_of(NO_STEP, keep)
        self._signed, self._projected = (
            [of for of in self.tensors if of.spec.rule.surveys == survey and is_spread(of.param)]
            for survey in ("largest_row", "conflict")
        )
        together = [of for of in self.tensors if self.shares[of.row].together]
        self._place = {of.param: k for k, of in enumerate(self.tensors)}
        self._pull = self._no_step(pulled(together)) if together else None
        if self._learning:
            self._deltas = self._no_step(deltas_of(self._learning)), RowSurvey(self._learning, self.device)
            self._members = self._learning_members()
        if self._signed:
            self._rows = self._no_step(rows_of(self._signed)), RowSurvey(self._signed, self.device)
        if self._projected:
            params = [of.param for of in self._projected]
            self._conflicts = self._no_step(whole_of(self._projected)), Exchange(params, [2] * len(params), self.device)
        self._total = Exchange(self.params, [1] * len(self.params), self.device)
        own_row = {of.param: len(self.shares) + k for k, of in enumerate(self._learning)}
        stepped = [self._stepped(of, own_row) for of in self.tensors]
        self._sums, self._known = empty_results(sum(shard_of(of).segments for of in stepped), self.device)
        return self._whole_step(stepped, self._sums, self._known)

    @property
    def at_once(self) -> bool:
        """As of `Launch`."""
        return super().at_once and self._pull is None and not self._learning

    def _stepped(self, of: StepTensors, own_row: dict[Tensor, int]) -> StepTensors:
        """A parameter under the rule by which the sweep steps it."""
        rule = of.spec.rule
        if self.shares[of.row].together or (rule.surveys in ("largest_row", "conflict") and is_spread(of.param)):
            return observed([of], self.base)[0]
        if of.param in own_row:
            return replace(of.under(RULES[rule.when_learned], self.base), row=own_row[of.param])
        return of

    def _no_step(self, tensors: Sequence[StepTensors]) -> NoStep:
        hyper = self._no_step_hyper
        return NoStep(self.backend, list(map(shard_of, tensors)), hyper.table, hyper.live)

    def begin(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Reads what the step needs, and learns radii. Nothing is written."""
        super().begin(grad_scale, found_inf)
        grads, grad_scale, found_inf = self._begun
        assert grads is not None
        self._no_step_hyper.refresh()
        self._numbers = {key: self.hyper.numbers(key) for key in METHOD_HYPER}
        if self._learning:
            sweep, survey = self._deltas
            sweep([grads[self._place[of.param]] for of in self._learning], grad_scale)
            self._learned = self._learn(survey.slopes(sweep.results))
            self._radii.copy_(self._learned[:, 0])
            self.hyper.take_radii()
        if self._signed or self._projected:
            pushes = {**(self._signs() if self._signed else {})}
            pushes |= self._projections(grads, grad_scale) if self._projected else {}
            self._begun = self._penalized(grads, pushes, grad_scale), grad_scale, found_inf

    def _gradients(self) -> list[Tensor]:
        return self._grads()

    def finish(self) -> None:
        """The step, and the pull of what is decided together."""
        found_inf = self._begun[2]
        super().finish()
        decision = self._peers.decide(self._sums[:, : len(MEASURES)], self._known, self._terms)
        if self._pull is not None:
            self._pull.alphas.copy_(decision.alphas[: self._peers.decided])
            self._pull(found_inf=found_inf)
        if self._learning:
            self._keep_learned(decision, found_inf)
        decision.write(self.tables, found_inf)

    def _terms(self, part: Part) -> Terms:
        """The hyper-parameters of a part, with one radius a segment if they are learned."""
        terms: dict[str, float | Tensor] = {key: of[part.row] for key, of in self._numbers.items()}
        if part.rule.learns and part.share.reach is not Reach.HERE:
            radii = self._radii[self._members[part.row]]
            terms["radius"] = radii if part.share.reach is Reach.ROWS else expanded(radii, part.counts)
        return terms

    def _learning_members(self) -> dict[int, list[int]]:
        """The places among the parameters that learn, by row."""
        members: dict[int, list[int]] = {}
        for k, of in enumerate(self._learning):
            members.setdefault(of.row, []).append(k)
        return members

    def _learn(self, slopes: Tensor) -> Tensor:
        """The learned numbers after this step, [parameters, numbers]. The radius comes first."""
        learned = []
        for row, places in self._members.items():
            of_row = [self._learning[k] for k in places]
            rule = of_row[0].spec.rule
            was = torch.stack([of.state[rule.learns] for of in of_row])
            t = torch.stack([_count_of(of) for of in of_row]).to(self.device, torch.float64)
            terms = {key: of[row] for key, of in self._numbers.items()}
            learned.append(LEARN[rule.name](was, slopes[places], t + 1, terms))
        return torch.cat(learned)

    def _keep_learned(self, decision: Decision, found_inf: Tensor | None) -> None:
        """Keeps what was learned. The radius that is kept is at most the norm of the largest row."""
        for row, places in self._members.items():
            part, new = self._peers.parts[row], self._learned[places]
            most = decision.largest_rows(part)
            some = lengths_on(self.device, tuple(part.counts)) > 0
            new[:, 0] = torch.where(some, torch.minimum(new[:, 0], most + EPS), new[:, 0])
            of_row = [self._learning[k] for k in places]
            kept = [of.state[of.spec.rule.learns] for of in of_row]
            torch._foreach_copy_(kept, list(unless(found_inf, new, torch.stack(kept)).unbind()))

    def _signs(self) -> dict[Tensor, Tensor]:
        """What MARS-SP adds to each gradient: the subgradient on the row of largest Σ|d|."""
        sweep, survey = self._rows
        sweep()
        pushes = {}
        for of, flags in zip(self._signed, survey.largest_rows(sweep.results), strict=True):
            param = local(of.param)
            flags = flags.reshape([-1, *[1] * (param.dim() - 1)] if param.dim() > 1 else [1] * param.dim())
            pushes[of.param] = self._numbers["strength"][of.row] * _delta_of(of).sign() * flags
        return pushes

    def _projections(self, grads: list[Tensor], grad_scale: Tensor | None) -> dict[Tensor, Tensor]:
        """What DiGraP adds to each gradient, from the sums over all shards."""
        sweep, sums = self._conflicts
        sweep([grads[self._place[of.param]] for of in self._projected], grad_scale)
        found = sums.sum(sweep.results[:, [DOT, BEFORE]].flatten()).view(-1, 2)
        pushes = {}
        for of, (dot, size) in zip(self._projected, found, strict=True):
            factor = projection(dot, size, self._numbers["strength"][of.row])
            d = _delta_of(of)
            pushes[of.param] = factor.to(arithmetic_of(d.dtype)) * d
        return pushes

    def _penalized(self, grads: list[Tensor], pushes: dict[Tensor, Tensor], grad_scale: Tensor | None) -> list[Tensor]:
        """The gradients. Those that get a push are copies."""
        grads = list(grads)
        for param, push in pushes.items():
            k = self._place[param]
            sign = -1 if self.shares[self.tensors[k].row].group.get("maximize") else 1
            push = push * sign if grad_scale is None else push * sign * grad_scale
            grads[k] = (grads[k] + push).to(arithmetic_of(param.dtype))
        return grads

    def squared_norm(self) -> Tensor:
        """Σ g² over all shards of all gradients, in float64."""
        norms = torch._foreach_norm(self._grads(), 2, dtype=torch.float64)
        return self._total.total(torch.stack(list(norms)).double().square())


def _count_of(tensors: StepTensors) -> Tensor:
    assert tensors.step is not None
    return tensors.step


def _delta_of(of: StepTensors) -> Tensor:
    """d = θ − θ₀ of what is here, with the master weights for θ."""
    d = local(state.weights_of(of.param, dict(of.state)))
    return d if of.anchor is None else d - local(of.anchor)
