"""The parameters of one device, as one step of one backend."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..backends import registry
from ..core import state
from ..core.bases import Base, Group, GroupSpec
from ..core.contract import Run, StepTable, StepTensors
from ..core.exchange import Reach, any_infinite, reach_of
from ..core.memory import in_memory, is_lazily_read
from ..core.sharding import is_dtensor, local, placed_as, placement_of
from .hyper import HyperTable
from .results import Results, Tables

CPU = torch.device("cpu")


def label_of(group: Group, k: int) -> str:
    """What messages call parameter `k` of a group: its name, if it has one."""
    names = group.get("param_names")
    if names:
        return f"parameter {names[k]!r}"
    param = group["params"][k]
    return f"parameter {k}" if is_lazy(param) else f"parameter {k} (shape {tuple(param.shape)})"


@dataclass(frozen=True, eq=False)
class Share:
    """The part of a group that a launch steps.

    places: the indices of its parameters in the group.
    first: the index of the group's first parameter among all.
    reach: of the segments of all its parameters, see `split_by_reach`.
    """

    group: Group
    spec: GroupSpec
    places: Sequence[int]
    first: int = 0
    reach: Reach = Reach.HERE

    @property
    def params(self) -> list[Tensor]:
        """Its parameters."""
        return [self.group["params"][k] for k in self.places]

    @property
    def together(self) -> bool:
        """Whether processes decide its α together, and no sweep can."""
        return self.reach is Reach.CUT or (self.reach is Reach.ROWS and self.spec.rule.tied)


def split_by_reach(shares: Sequence[Share]) -> list[Share]:
    """The same shares, but each of parameters with one reach."""
    split = []
    for share in shares:
        reaches = [reach_of(param, share.spec.rule) for param in share.params]
        for reach in Reach:
            if chosen := [k for k, of in zip(share.places, reaches, strict=True) if of is reach]:
                split.append(replace(share, places=chosen, reach=reach))
    return split


def shard_of(tensors: StepTensors) -> StepTensors:
    """The same parameter with the shards that are here in place of DTensors."""
    return replace(
        tensors,
        param=local(tensors.param),
        anchor=None if tensors.anchor is None else local(tensors.anchor),
        state={key: local(of) for key, of in tensors.state.items()},
    )


class Launch:
    """All parameters of one device, prepared for one backend.

    results: of all parameters. The tables of this launch are lent from there.

    tensors: the parameters as the optimizer has them.
    """

    def __init__(
        self,
        base: Base,
        shares: Sequence[Share],
        kept: Mapping[Tensor, state.ParamState],
        backend: str,
        device: torch.device,
        results: Results,
    ) -> None:
        shares = self._in_order(shares)
        self.base, self.device = base, device
        self.shares = shares
        self.params = [param for share in shares for param in share.params]
        # Gradients that lie as their parameters do are taken as they are.
        self._odd = [k for k, p in enumerate(self.params) if p.grad is not None and not _lies_as(p.grad, p)]
        self._are_shards = any(map(is_dtensor, self.params))
        dtypes = {t.dtype for p in self.params for t in (p, p.grad) if t is not None}
        self.backend = registry.choose_backend(backend, device, dtypes)
        self.tensors = [self._gather(share, row, k, kept) for row, share in enumerate(shares) for k in share.places]
        self.tables = self._tables(results)
        self.hyper = self._hyper_of(base, [share.spec for share in shares])
        self._run = self._prepare()

    @property
    def at_once(self) -> bool:
        """Whether all weights and state are written by one call of the backend that nothing interrupts."""
        return self.backend.at_once

    @property
    def results(self) -> Tensor:
        """What the last step found, one row a segment."""
        return self.tables.results

    @property
    def alphas(self) -> Tensor:
        """By how much it pulled, one a segment."""
        return self.tables.alphas

    def _tables(self, results: Results) -> Tables:
        counts = [shard_of(of).segments for of in self.tensors]
        return results.tables(self.params, counts, [False] * len(counts), self.device)

    def _in_order(self, shares: Sequence[Share]) -> Sequence[Share]:
        return shares

    def _gather(self, share: Share, row: int, k: int, kept: Mapping[Tensor, state.ParamState]) -> StepTensors:
        """A parameter with its state, which this completes. Raises ValueError when its anchor is missing."""
        param, spec, base = share.group["params"][k], share.spec, self.base
        of = kept[param]
        state.fill_state(param, of, base, spec, steps_on=self.device if self.backend.keeps_addresses else CPU)
        if spec.anchored and "anchor" not in of:
            raise ValueError(
                f"{label_of(share.group, k)} has no anchor for method {share.group['method']!r}: its group was added "
                "with a method that needs none; choose the method when adding the group"
            )
        return StepTensors(
            spec,
            row,
            param,
            anchor=of["anchor"] if spec.anchored else None,
            state={key: of[key] for key, needed in base.state.items() if needed(spec, param)},
            step=of["step"] if base.counted(spec, param) else None,
            seed=spec.seed << 32 | share.first + k,
            label=label_of(share.group, k),
        )

    def _hyper_of(self, base: Base, specs: Sequence[GroupSpec]) -> HyperTable:
        groups = [share.group for share in self.shares]
        return HyperTable(base, groups, specs, self.device, addresses=self.backend.keeps_addresses)

    def _prepare(self) -> Run:
        return self._whole_step(self.tensors, self.results, self.alphas)

    def _whole_step(self, tensors: Sequence[StepTensors], results: Tensor, alphas: Tensor) -> Run:
        """The base's step over the shards of these tensors that are here."""
        here = list(map(shard_of, tensors))
        return self.backend.prepare(StepTable(self.base, here, self.hyper.table, results, alphas, self.hyper.live))

    def begin(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Reads what the step needs. Nothing is written."""
        self.hyper.refresh()
        grad_scale, found_inf = self._here(grad_scale), self._here(found_inf)
        if found_inf is not None and self._are_shards:
            found_inf = any_infinite(found_inf, self.params)
        self._begun = self._gradients(), grad_scale, found_inf

    def finish(self) -> None:
        """The step. All is written here."""
        self._run(*self._begun)
        del self._begun

    def squared_norm(self) -> Tensor:
        """Σ g² over all gradients, in float64."""
        self.hyper.refresh()
        return self._run.squared_norm(self._gradients())

    def _gradients(self) -> list[Tensor] | None:
        """The gradients as the backend is given them. None: it takes each parameter's own."""
        return self._grads() if self._odd or self._are_shards else None

    def _grads(self) -> list[Tensor]:
        """The gradients that are here, each in memory and spread as its parameter is."""
        grads: list[Tensor] = [param.grad for param in self.params]  # type: ignore[misc]
        odd = {k: in_memory(local(placed_as(grads[k], self.params[k]))) for k in self._odd}
        if self._are_shards:
            grads = [getattr(grad, "_local_tensor", grad) for grad in grads]
        for k, grad in odd.items():
            grads[k] = grad
        return grads

    def _here(self, value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(self.device, non_blocking=True)

    def check_capturable(self) -> None:
        """Raises RuntimeError when a CUDA graph must not hold this launch."""
        if not all(share.spec.capturable for share in self.shares):
            raise RuntimeError("a CUDA graph is being captured, but the optimizer was made with capturable=False")
        if not self.backend.keeps_addresses:
            raise RuntimeError(f"a CUDA graph is being captured, which the {self.backend.name} backend does not permit")


def _lies_as(grad: Tensor, param: Tensor) -> bool:
    """Whether the part of a gradient that is here can be taken as it is."""
    if is_dtensor(grad) != is_dtensor(param) or is_lazily_read(grad):
        return False
    if not is_dtensor(grad):
        return True
    same = placement_of(grad) == placement_of(param)
    return same and type(grad._local_tensor) is Tensor and not is_lazily_read(local(grad))  # type: ignore[attr-defined]
