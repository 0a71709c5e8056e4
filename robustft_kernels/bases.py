"""The base optimizers as the backends see them: hyper-parameters, state, and the schema of their op."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Group = dict[str, Any]

MEASURES = ("grad_dot_delta", "delta_sq", "gain")


def _always(_: Group) -> bool:
    return True


def _amsgrad(group: Group) -> bool:
    return bool(group["amsgrad"])


def _momentum(group: Group) -> bool:
    return bool(group["momentum"] != 0)


def _momentum_or_stochastic(group: Group) -> bool:
    return _momentum(group) or bool(group["stochastic_rounding"])


def arithmetic_of(dtype: torch.dtype) -> torch.dtype:
    """What a parameter of `dtype` is computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Base:
    """A base optimizer, as the backends see it.

    hyper: the columns of a group's row.
    state: the tensors it keeps for a parameter, and in which groups.
    counted: the groups whose parameters keep a step count.
    """

    name: str
    hyper: tuple[str, ...]
    state: tuple[tuple[str, Callable[[Group], bool]], ...]
    counted: Callable[[Group], bool]

    def schema(self, overload: str) -> str:
        mutated = ["params", *(f"{key}s" for key, _ in self.state), "steps", "measures", "alphas"]
        alias = {name: f"Tensor({chr(ord('a') + i)}!)" for i, name in enumerate(mutated)}
        lists = ", ".join(f"{alias[f'{key}s']}[] {key}s" for key, _ in self.state)
        return (
            f"{self.name}_.{overload}({alias['params']}[] params, Tensor[] grads, Tensor[] anchors, {lists}, "
            f"{alias['steps']}[] steps, {alias['measures']} measures, {alias['alphas']} alphas, "
            "Tensor hyper, int[] group_sizes, str[] rules, int[] seeds, "
            "Tensor? grad_scale=None, Tensor? found_inf=None) -> ()"
        )


_COMMON = ("maximize", "anchored", "stochastic_rounding")
ADAMW = Base(
    "adamw",
    hyper=("lr", "beta1", "beta2", "eps", "weight_decay", "strength", "amsgrad", *_COMMON),
    state=(("exp_avg", _always), ("exp_avg_sq", _always), ("max_exp_avg_sq", _amsgrad)),
    counted=_always,
)
SGD = Base(
    "sgd",
    hyper=("lr", "momentum", "dampening", "weight_decay", "strength", "nesterov", *_COMMON),
    state=(("momentum_buffer", _momentum),),
    counted=_momentum_or_stochastic,
)
