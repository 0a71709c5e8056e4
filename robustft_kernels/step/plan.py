"""The only way from Python objects to tables. A plan is built once, and holds until what it was built from changes. A
step of a valid plan hands the backends new gradients and hyper-parameters, and nothing else."""

from collections.abc import Hashable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..core import state
from ..core.bases import Base, Group, spec_of
from ..core.memory import without_memory
from ..core.methods import Rule
from ..core.sharding import is_flat_part, is_spread, local, spec_of_shards
from ..core.staging import capturing
from .agreement import Agreement
from .fingerprint import fingerprint
from .guard import StepGuard
from .hyper import identities_of
from .launch import Launch, Share, label_of
from .results import Results
from .sharded import ShardedLaunch

CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_


class Plan:
    """One step over all parameter groups: one launch for each device.

    starts: the index of each group's first parameter among all the optimizer's. Needed if these groups are not all.
    results: of all parameters that were ever stepped.
    guard: knows when a step is broken off.
    """

    def __init__(
        self,
        base: Base,
        groups: list[Group],
        kept: Mapping[Tensor, state.ParamState],
        backend: str,
        results: Results,
        guard: StepGuard,
        starts: Sequence[int] | None = None,
    ) -> None:
        self.base, self._results, self._guard = base, results, guard
        self.captured = False
        _refuse_capture()
        specs = list(map(spec_of, groups))
        by_device: dict[torch.device, dict[int, list[int]]] = {}
        for row, group in enumerate(groups):
            for k, param in enumerate(group["params"]):
                if param.grad is None:
                    continue
                _check(param, label_of(group, k), specs[row].rule)
                by_device.setdefault(param.device, {}).setdefault(row, []).append(k)
        starts = starts or [0, *accumulate(len(group["params"]) for group in groups)]
        self.launches: list[Launch] = []
        for device, rows in by_device.items():
            shares = [Share(groups[row], specs[row], places, starts[row]) for row, places in rows.items()]
            kind = ShardedLaunch if any(is_spread(p) for share in shares for p in share.params) else Launch
            self.launches.append(kind(base, shares, kept, backend, device, results))
        self._agreement = Agreement(groups, specs, [of for launch in self.launches for of in launch.tensors])
        self.addresses = any(launch.backend.keeps_addresses for launch in self.launches)
        self.key: tuple[Hashable, ...] = ()
        self.key = self.key_of(base, groups, kept, self)
        # Kept alive, as their ids could be used again. Launches keep the tensors that kernels read.
        specs_of_shards = [spec_of_shards(t) for group in groups for p in group["params"] for t in (p, p.grad)]
        self._alive = [*(tuple(of.values()) for of in kept.values()), *specs_of_shards]

    @staticmethod
    def key_of(
        base: Base, groups: list[Group], kept: Mapping[Tensor, state.ParamState], last: "Plan | None"
    ) -> tuple[Hashable, ...]:
        """What a plan depends on: parameters, gradients (addresses aside), anchors, state and methods. Of the last plan
        it takes whether a backend keeps the addresses of the state and of hyper-parameters in tensors."""
        addresses = last is not None and last.addresses
        structure = []
        for group in groups:
            spec = spec_of(group)
            live = identities_of(group, base, spec) if addresses else ()
            structure.append((spec, group["anchor"], len(group["params"]), live))
        params = [param for group in groups for param in group["params"]]
        known = last.key[-1] if last is not None and last.key else None
        return addresses, tuple(structure), fingerprint(params, list(kept.values()), addresses, known)

    def holds_for(self, groups: list[Group], kept: Mapping[Tensor, state.ParamState], results: Results) -> bool:
        """Whether what the plan depends on is as it was."""
        return results is self._results and self.key == self.key_of(self.base, groups, kept, self)

    @property
    def has_tables(self) -> bool:
        """Whether its launches have the newest numbers of their parameters."""
        return all(launch.tables.lent for launch in self.launches)

    def take_over(self) -> None:
        """Makes ready for a step after one of another plan."""
        _refuse_capture()
        for launch in self.launches:
            self._results.lend(launch.tables)
        self._agreement.renew()

    def run(
        self,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        max_grad_norm: float | Tensor | None = None,
    ) -> Tensor | None:
        """One step, with gradients divided by `grad_scale`. There is none if `found_inf` is not 0.

        With `max_grad_norm`, the gradients of all parameters, once divided, are scaled down to that norm together.
        Returns the norm that they had.

        If a CUDA graph is being captured, the step becomes part of it. Whoever replays the graph needs this plan's
        memory.

        Raises RuntimeError, before anything is written, if processes with shards do not make the same step.
        """
        in_capture = capturing()
        self._agreement.check()
        grad_norm = None
        if max_grad_norm is not None and self.launches:
            grad_scale, grad_norm = self._clip(grad_scale, max_grad_norm)
        for launch in self.launches:
            if in_capture and launch.device.type == "cuda":
                launch.check_capturable()
            launch.begin(grad_scale, found_inf)
        if len(self.launches) == 1 and self.launches[0].at_once:
            self.launches[0].finish()
        else:
            with self._guard.writing():
                for launch in self.launches:
                    launch.finish()
        self.captured |= in_capture
        return grad_norm

    def _clip(self, grad_scale: Tensor | None, max_grad_norm: float | Tensor) -> tuple[Tensor, Tensor]:
        """What to divide the gradients by, and their norm, on the device of the first launch."""
        device = self.launches[0].device
        squares = [launch.squared_norm().to(device, non_blocking=True) for launch in self.launches]
        norm = torch.stack(squares).sum().sqrt()
        if grad_scale is not None:
            grad_scale = grad_scale.to(device, torch.float64, non_blocking=True)
            norm = norm / grad_scale
        excess = ((norm + CLIP_EPS) / max_grad_norm).clamp(min=1)
        return excess if grad_scale is None else excess * grad_scale, norm  # in float64, as some gradients are


def _refuse_capture() -> None:
    if capturing():
        raise RuntimeError(
            "this step needs another plan than the last one, which cannot be made while a CUDA graph is captured; take "
            "a step with the same parameters, and gradients for the same of them, before the capture"
        )


def check_whole(param: Tensor, label: str, rule: Rule) -> None:
    """Raises RuntimeError for a part of a parameter whose rule needs to know the whole."""
    if is_flat_part(param) and (rule.measures or rule.surveys):
        raise RuntimeError(
            f"{label} is a part of FullyShardedDataParallel's (FSDP1) flat parameters, and its method needs the norms "
            "of whole layers; shard the model by torch.distributed.fsdp.fully_shard (FSDP2)"
        )


def _check(param: Tensor, label: str, rule: Rule) -> None:
    grad = param.grad
    assert grad is not None
    if what := without_memory(param) or ("a view that negates when it is read; clone it" if param.is_neg() else ""):
        raise RuntimeError(f"{label} is {what}")
    check_whole(param, label, rule)
    if what := without_memory(grad):
        raise RuntimeError(f"{label} has a gradient that is {what}")
    if grad.layout != torch.strided:
        raise RuntimeError(f"{label} has a sparse gradient ({grad.layout}), which is not supported; make it dense")
    if not grad.is_floating_point():
        raise RuntimeError(f"{label} has a {grad.dtype} gradient; a real floating-point gradient is needed")
    if not state.is_dense(local(param)):
        raise RuntimeError(
            f"{label} has overlapping or gapped memory (shape {tuple(param.shape)}, strides {param.stride()}), which "
            "cannot be updated in place; make it contiguous before giving it to the optimizer"
        )
