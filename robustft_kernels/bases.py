"""The base optimizers as the backends see them: hyper-parameters, state, and the schema of their op."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .methods import RULES

Group = dict[str, Any]
Row = Mapping[str, Any]  # a group, or its row of hyper-parameters; with its "rule"

MEASURES = ("grad_dot_delta", "before", "gain", "selected")  # of a segment; the last counts the steps with α ≠ 1
RADIUS_STATE = ("radius", "exp_avg", "exp_avg_sq")  # a learned radius, and the moments of its gradient


def _always(_: Row) -> bool:
    return True


def _amsgrad(row: Row) -> bool:
    return bool(row["amsgrad"])


def _momentum(row: Row) -> bool:
    return bool(row["momentum"] != 0)


def _learns(row: Row) -> bool:
    return RULES[row["rule"]].learns


def _sgd_counts(row: Row) -> bool:
    return _momentum(row) or _learns(row) or bool(row["stochastic_rounding"])


def _never(_: Row) -> bool:
    return False


def arithmetic_of(dtype: torch.dtype) -> torch.dtype:
    """What a parameter of `dtype` is computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def delta_dtype_of(dtype: torch.dtype) -> torch.dtype:
    """In what FTP keeps c: it serves as a direction, which bfloat16 gives at half the memory and with float's range."""
    return torch.float64 if dtype == torch.float64 else torch.bfloat16


@dataclass(frozen=True)
class Base:
    """A base optimizer, as the backends see it.

    hyper: the columns of a group's row.
    state: the tensors it keeps for a parameter, and in which groups.
    counted: the groups whose parameters keep a step count.
    """

    name: str
    hyper: tuple[str, ...]
    state: tuple[tuple[str, Callable[[Row], bool]], ...]
    counted: Callable[[Row], bool]

    def schema(self, overload: str) -> str:
        mutated = ["params", *(f"{key}s" for key, _ in self.state), "steps", "measures", "alphas"]
        alias = {name: f"Tensor({chr(ord('a') + i)}!)" for i, name in enumerate(mutated)}
        lists = "".join(f"{alias[f'{key}s']}[] {key}s, " for key, _ in self.state)
        return (
            f"{self.name}_.{overload}({alias['params']}[] params, Tensor[] grads, Tensor[] anchors, {lists}"
            f"{alias['steps']}[] steps, {alias['measures']} measures, {alias['alphas']} alphas, "
            "Tensor hyper, int[] group_sizes, str[] rules, int[] seeds, "
            "Tensor? grad_scale=None, Tensor? found_inf=None) -> ()"
        )


# What the methods read, and flags.
_COMMON = (
    "strength", "radius", "k", "radius_lr", "radius_beta1", "radius_beta2",
    "maximize", "anchored", "stochastic_rounding",
)  # fmt: skip
_LEARNED = (("delta", _learns), ("radius_state", _learns))
ADAMW = Base(
    "adamw",
    hyper=("lr", "beta1", "beta2", "eps", "weight_decay", "amsgrad", *_COMMON),
    state=(("exp_avg", _always), ("exp_avg_sq", _always), ("max_exp_avg_sq", _amsgrad), *_LEARNED),
    counted=_always,
)
SGD = Base(
    "sgd",
    hyper=("lr", "momentum", "dampening", "weight_decay", "nesterov", *_COMMON),
    state=(("momentum_buffer", _momentum), *_LEARNED),
    counted=_sgd_counts,
)
# No step at all: θ̃ = θ. Gradients may be left out, and ⟨g, d⟩ is then nan.
STILL = Base("still", hyper=("lr", *_COMMON), state=(), counted=_never)
BASES = (ADAMW, SGD, STILL)
