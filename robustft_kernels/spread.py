"""A launch over parameters that are spread over processes: step and measure what is here, sum over all parts, decide
the same everywhere, pull what is here."""

import torch
from torch import Tensor

from . import ops, state
from .bases import MEASURES, STILL, Group
from .decide import EPS, decide, fold, largest, learn, spread
from .launch import CPU, Entries, Launch, Member, columns_of, prepare
from .methods import RULES, rule_of, segments_of
from .sharding import Segments, any_infinite, local, placed_as, total

HALVES = {"observe": "given", "observe_rows": "given_rows", "track_rows": "given_rows"}  # what pulls after what


class SpreadLaunch(Launch):
    """The step in two halves, with one packed all-reduce between them: of ⟨g,d⟩, |d| and |c|−|d| of all segments whose
    rule measures, and of the two sums that FTP's slopes are made of. MARS-SP must know the largest row before the step,
    and has an all-reduce of its own.

    What is decided depends on nothing but those sums, which are the same bits in every process.
    """

    def _in_order(self, entries: Entries) -> Entries:
        """Rules that learn come first, then the others that measure, then the rest."""

        def order(entry: tuple[Group, list[int], int]) -> tuple[bool, bool]:
            rule = RULES[rule_of(entry[0]["method"], entry[0]["norm"])]
            return not rule.learns, not rule.elsewhere

        return sorted(entries, key=order)

    def _prepare(self) -> ops.Run:
        self._decided = [m for m in self.members if RULES[self.rules[m.row]].elsewhere]
        self._learning = [m for m in self.members if RULES[self.rules[m.row]].learns]
        self._signed = [m for m in self.members if self.rules[m.row] == "mars_sp"]
        rules = [RULES[rule].elsewhere or ("keep" if rule == "mars_sp" else rule) for rule in self.rules]
        self._segments = Segments([m.param for m in self._decided], [self.rules[m.row] for m in self._decided])
        self._counts = self._segments.counts
        here = [segments_of(rules[m.row], local(m.param).shape) for m in self.members]
        self._sums, self._known = self._tables(sum(here))
        self._n = sum(self._segments.here)  # segments here that are decided; they come first

        if self._decided:
            self._pull_alphas = self._known[: self._n].clone()
            pulls = [HALVES.get(rule, "") for rule in rules]
            self._pull = self._still(self._decided, pulls, *self._tables(self._n)[:1], self._pull_alphas)
        if self._learning:
            n = sum(self._segments.here[: len(self._learning)])
            self._slopes, alphas = self._tables(n)
            self._survey = self._still(self._learning, ["observe_rows"], self._slopes, alphas, over="delta")
        if self._signed:
            rules_of_signed = ["observe_rows"] * len(self._signed)
            self._rows_of_signed = Segments([m.param for m in self._signed], rules_of_signed)
            self._sizes, alphas = self._tables(sum(self._rows_of_signed.here))
            self._observe = self._still(self._signed, ["observe_rows"], self._sizes, alphas)
        return self._whole_step(rules, self._sums, self._known)

    def _tables(self, n: int) -> tuple[Tensor, Tensor]:
        return (
            torch.zeros(n, len(MEASURES), dtype=torch.float64, device=self.device),
            torch.ones(n, dtype=torch.float64, device=self.device),
        )

    def _still(
        self, members: list[Member], rules: list[str], measures: Tensor, alphas: Tensor, over: str | None = None
    ) -> ops.Run:
        """A half step over these, by rules of their groups (or one for all); over: of their state, in place of them."""
        rules = rules * len(self.groups) if len(rules) == 1 else rules
        members = members if over is None else [_over(m, over) for m in members]
        flags = [columns_of(group, STILL) for group in {m.row: m.group for m in members}.values()]
        hyper = torch.tensor([[float(of[c]) if c in _FLAGS else 0.0 for c in STILL.hyper] for of in flags],
                             dtype=torch.float64, device=CPU)  # fmt: skip
        return prepare(self.backend, STILL, members, rules, measures, alphas, hyper, {})

    def __call__(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        self._refresh()
        grad_scale, found_inf = self._here(grad_scale, found_inf)
        if found_inf is not None:
            found_inf = any_infinite(found_inf, self.params)
        grads = self._grads()
        if self._learning:
            self._survey(grads[: len(self._learning)], grad_scale)
        if self._signed:
            grads = self._penalized(grads, grad_scale)
        self._run(grads, grad_scale, found_inf)
        if not self._decided:
            tell(self.measures, self.alphas, self._sums[:, :3], self._known, found_inf)
            return
        packed = self._sums.new_zeros(self._n, 5 if self._learning else 3)
        packed[:, :3] = self._sums[: self._n, :3]
        if self._learning:
            packed[: len(self._slopes), 3:] = self._slopes[:, :2]
        sums = self._segments.whole(packed)
        alphas = self._decide(sums, found_inf)
        self._pull_alphas.copy_(self._segments.parts(alphas))
        self._pull([], None, found_inf)
        rest = slice(self._n, None)
        sums, alphas = torch.cat([sums[:, :3], self._sums[rest, :3]]), torch.cat([alphas, self._known[rest]])
        tell(self.measures, self.alphas, sums, alphas, found_inf)

    def _decide(self, sums: Tensor, found_inf: Tensor | None) -> Tensor:
        """α of all segments, from their sums over all parts; FTP's radii move on."""
        learned = self._learn(sums, found_inf) if self._learning else None
        alphas, first, k = [], 0, 0
        for row in dict.fromkeys(m.row for m in self._decided):
            group, rule = self.groups[row], self.rules[row]
            counts = self._counts[k : k + sum(m.row == row for m in self._decided)]
            last = first + sum(counts)
            radius = self._number(columns_of(group, self.base)["radius"])
            if learned is not None and RULES[rule].learns:
                radius = spread(learned[k : k + len(counts)], counts)
            strength = self._number(group["strength"])
            alphas.append(decide(rule, sums[first:last], counts, strength, radius))
            first, k = last, k + len(counts)
        return torch.cat(alphas)

    def _learn(self, sums: Tensor, found_inf: Tensor | None) -> Tensor:
        """The radii by which this step projects; what is kept of them is bounded by the largest row."""
        counts = self._counts[: len(self._learning)]
        n = sum(counts)
        slopes = fold(sums[:n, 3] / (sums[:n, 4] + EPS), counts, "sum")
        most = largest(sums[:n, 1] + sums[:n, 2] + EPS, counts)
        kept = [m.kept["radius_state"] for m in self._learning]
        was, t = torch.stack(kept), torch.stack([m.kept["step"] for m in self._learning]).to(self.device, torch.float64)
        columns = [columns_of(m.group, self.base) for m in self._learning]
        hyper = {
            key: torch.stack([torch.as_tensor(self._number(of[key]), dtype=torch.float64) for of in columns]).to(
                self.device, non_blocking=True
            )
            for key in ("k", "radius_lr", "radius_beta1", "radius_beta2")
        }
        new = learn(was, slopes, t, hyper)
        radii = new[:, 0].clone()
        some = torch.tensor([count > 0 for count in counts], device=CPU).to(self.device)
        new[:, 0] = torch.where(some, torch.minimum(radii, most), radii)
        for state_of, value in zip(kept, _unless(found_inf, new, was), strict=True):
            state_of.copy_(value)
        return radii

    def _penalized(self, grads: list[Tensor], grad_scale: Tensor | None) -> list[Tensor]:
        """The gradients, those under MARS-SP as copies with the subgradient on the row of largest Σ|d|, the first of
        such."""
        self._observe([], None, None)
        rows, counts = self._rows_of_signed, self._rows_of_signed.counts
        sizes = rows.whole(self._sizes[:, 1:2])[:, 0].nan_to_num(nan=-1.0)
        places = torch.arange(len(sizes), dtype=torch.float64, device=self.device)
        candidates = torch.where(sizes == spread(fold(sizes, counts, "max"), counts), places, torch.inf)
        first = torch.segment_reduce(
            candidates, "min", lengths=torch.tensor(counts, device=self.device), initial=torch.inf, unsafe=True
        )
        on = rows.parts((places == spread(first, counts)).double()).split(rows.here)
        grads = list(grads)
        of_param = {m.param: k for k, m in enumerate(self.members)}
        for member, flags in zip(self._signed, on, strict=True):
            param, k = local(member.param), of_param[member.param]
            anchored = member.group["anchor"] != "zero"
            d = local(state.weights_of(member.param, member.kept)) - (local(member.kept["anchor"]) if anchored else 0)
            flags = (
                flags.reshape([-1, *[1] * (param.dim() - 1)]) if param.dim() > 1 else flags.reshape([1] * param.dim())
            )
            push = self._number(member.group["strength"]) * d.sign() * flags * (-1 if member.group["maximize"] else 1)
            push = push if grad_scale is None else push * grad_scale
            grads[k] = (grads[k] + push).to(torch.float64 if param.dtype == torch.float64 else torch.float32)
        return grads

    def squared_norm(self) -> Tensor:
        """Σ g² over all parts of all gradients, in float64."""
        norms = torch._foreach_norm(self._grads(), 2, dtype=torch.float64)
        return total([norm**2 for norm in norms], self.params)

    def _grads(self) -> list[Tensor]:
        return [local(placed_as(param.grad, param)) for param in self.params]  # type: ignore[arg-type]

    def _number(self, value: float | Tensor) -> float | Tensor:
        return (
            value.to(self.device, torch.float64, non_blocking=True).reshape(()) if isinstance(value, Tensor) else value
        )


_FLAGS = ("maximize", "anchored", "stochastic_rounding", "master_weights")


def _over(member: Member, key: str) -> Member:
    group = {**member.group, "stochastic_rounding": False, "master_weights": False, "anchor": "zero"}
    return Member(group, member.row, member.kept[key], member.kept, member.seed)


def tell(measures: Tensor, alphas: Tensor, sums: Tensor, decided: Tensor, found_inf: Tensor | None) -> None:
    """Leaves in the tables of a launch what a step found, over all parts, and decided, as a whole step does."""
    told = torch.cat([sums, (measures[:, 3] + (decided != 1))[:, None]], 1)
    measures.copy_(_unless(found_inf, told, measures))
    alphas.copy_(_unless(found_inf, decided, alphas))


def _unless(found_inf: Tensor | None, value: Tensor, old: Tensor) -> Tensor:
    return value if found_inf is None else torch.where(found_inf != 0, old, value)
