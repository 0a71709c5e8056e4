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
from ..core.memory import in_memory, is_lazily_read
from ..core.sharding import local
from .hyper import HyperTable
from .results import Results, carried_over

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
    """

    group: Group
    spec: GroupSpec
    places: Sequence[int]
    first: int = 0

    @property
    def params(self) -> list[Tensor]:
        """Its parameters."""
        return [self.group["params"][k] for k in self.places]


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

    known: the results of earlier steps, by parameter. They are copied into the tables of this launch, and `known` then
        refers to those.

    tensors: the parameters as the optimizer has them.
    results, alphas: what the last step found, one row a segment.
    """

    def __init__(
        self,
        base: Base,
        shares: Sequence[Share],
        kept: Mapping[Tensor, state.ParamState],
        backend: str,
        device: torch.device,
        known: Results,
    ) -> None:
        shares = self._in_order(shares)
        self.base, self.device = base, device
        self.shares = shares
        self.params = [param for share in shares for param in share.params]
        self._lazy = [k for k, p in enumerate(self.params) if p.grad is not None and is_lazily_read(p.grad)]
        dtypes = {t.dtype for p in self.params for t in (p, p.grad) if t is not None}
        self.backend = registry.choose_backend(backend, device, dtypes)
        self.tensors = [self._gather(share, row, k, kept) for row, share in enumerate(shares) for k in share.places]
        counts = [of.segments for of in self.tensors]
        self.results, self.alphas = carried_over(self.params, counts, device, known)
        self.hyper = self._hyper_of(base, [share.spec for share in shares])
        self._run = self._prepare()

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
            state={key: of[key] for key, needed in base.state.items() if needed(spec, param.dtype)},
            step=of["step"] if base.counted(spec, param.dtype) else None,
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

    def __call__(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        self.hyper.refresh()
        self._run(self._grads(), *self._here(grad_scale, found_inf))

    def squared_norm(self) -> Tensor:
        """Σ g² over all gradients, in float64."""
        self.hyper.refresh()
        return self._run.squared_norm(self._grads())

    def _grads(self) -> list[Tensor]:
        grads = [param.grad for param in self.params]
        for k in self._lazy:
            grads[k] = in_memory(grads[k])  # type: ignore[arg-type]
        return grads  # type: ignore[return-value]

    def _here(self, *scaler: Tensor | None) -> list[Tensor | None]:
        return [None if t is None else t.to(self.device, non_blocking=True) for t in scaler]

    def check_capturable(self) -> None:
        """Raises RuntimeError when a CUDA graph must not hold this launch."""
        if not all(share.spec.capturable for share in self.shares):
            raise RuntimeError("a CUDA graph is being captured, but the optimizer was made with capturable=False")
        if not self.backend.keeps_addresses:
            raise RuntimeError(f"a CUDA graph is being captured, which the {self.backend.name} backend does not permit")
