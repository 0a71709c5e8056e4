"""Schedules of what the methods read: of strength or radius by any function, and RecAdam's of strength and lr."""

from collections.abc import Callable, Sequence
from math import exp
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..core.bases import RANGES, Group
from ..core.methods import rule_of_group
from ..core.ranges import FINITE, NOT_NEGATIVE, check_number

Factor = Callable[[int], float]  # of last_epoch
KEYS = ("strength", "radius")
_FARTHEST = 27.0  # k·(t0 − t) at most. Before that λ is below 2e-12, and the strength would go to infinity


class _Driver:
    """group[key] = initial·factor(last_epoch), for each group that has a factor.

    As torch.optim.lr_scheduler does, it keeps the initial value in the group, and writes into a tensor in place.
    """

    def __init__(self, optimizer: Optimizer, key: str, factors: Sequence[Factor | None], last_epoch: int) -> None:
        self.optimizer, self.key, self.last_epoch = optimizer, key, last_epoch
        self._factors = list(factors)
        self._initial = [None if f is None else self._initial_of(k) for k, f in enumerate(factors)]
        self.step()

    def _initial_of(self, k: int) -> float:
        group = self.optimizer.param_groups[k]
        return float(group.setdefault(f"initial_{self.key}", float(group[self.key])))

    def step(self) -> None:
        epoch, values = self.last_epoch + 1, []
        for k, (factor, initial) in enumerate(zip(self._factors, self._initial, strict=True)):
            values.append(None if factor is None or initial is None else self._value(k, factor(epoch), initial, epoch))
        self._write(values)
        self.last_epoch = epoch

    def _value(self, k: int, factor: Any, initial: float, epoch: int) -> float:
        at = f"of group {k} at last_epoch={epoch}"
        check_number(f"the factor {at}", factor, FINITE)
        value = initial * float(factor)
        check_number(f"{self.key} {at}", value, RANGES[self.key])
        return value

    @torch.no_grad()
    def _write(self, values: list[float | None]) -> None:
        groups = self.optimizer.param_groups
        if len(groups) != len(values):
            raise ValueError(
                f"the optimizer has {len(groups)} groups, and the scheduler was made for {len(values)}; make it "
                f"anew after add_param_group, with last_epoch={self.last_epoch - 1}"
            )
        for group, value in zip(groups, values, strict=True):
            if value is not None and isinstance(group[self.key], Tensor):
                group[self.key].fill_(value)
            elif value is not None:
                group[self.key] = value
        self.last_values = values

    def state_dict(self) -> dict[str, Any]:
        kept = {"key": self.key, "last_epoch": self.last_epoch}
        return {**kept, "initial_values": list(self._initial), "last_values": list(self.last_values)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("key") != self.key:
            raise ValueError(
                f"the state is of a schedule of {state_dict.get('key')!r}, and this one is of {self.key!r}"
            )
        driven = [value is not None for value in state_dict["initial_values"]]
        if driven != [value is not None for value in self._initial]:
            raise ValueError(
                f"the state drives {self.key} in {sum(driven)} of {len(driven)} groups, and this schedule in "
                f"{sum(f is not None for f in self._factors)} of {len(self._factors)}, or in other ones"
            )
        self._write(list(state_dict["last_values"]))
        self._initial, self.last_epoch = list(state_dict["initial_values"]), state_dict["last_epoch"]


class StrengthScheduler:
    """Sets the strength, or the radius, of each group to its initial value times `factor(last_epoch)`.

    It is for them what torch.optim.lr_scheduler.LambdaLR is for lr. Call `step()` after each step of the optimizer, or
    after each epoch. The initial value stays in the group as "initial_strength" or "initial_radius", so the optimizer's
    checkpoint has it. A tensor in the group is written in place, and read once, when the scheduler is made. So a replay
    of a CUDA graph follows the schedule.

    Args:
        optimizer: one of this package, or `Anchored` around another.
        factor: a function of last_epoch, which is 0 at the first step. It drives each group whose method reads the key.
            Or a list with a function for each group, and None for a group that is left alone.
        key: "strength" or "radius".
        last_epoch: the index of the last step that was made, to go on in the middle without a saved state.

    Raises:
        TypeError: something else than an optimizer or a function.
        ValueError: another key, a list of another length, or a function for a group whose method does not read the key.
            Also if no group reads it. From `step`, a factor that leads out of the key's range: a strength is at least
            0, and a radius above 0. Nothing is written then.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        factor: Factor | Sequence[Factor | None],
        key: str = "strength",
        last_epoch: int = -1,
    ) -> None:
        if key not in KEYS:
            raise ValueError(
                f"key must be 'strength' or 'radius', got {key!r}; for lr there is torch.optim.lr_scheduler"
            )
        groups = _groups_of(optimizer)
        reading = [key in _reads(group) for group in groups]
        if not any(reading):
            raise ValueError(f"no group reads {key}: the methods are {_methods(groups)}")
        if callable(factor):
            factors: list[Factor | None] = [factor if reads else None for reads in reading]
        else:
            factors = _listed(factor, groups)
        for k, (given, reads) in enumerate(zip(factors, reading, strict=True)):
            if given is not None and not reads:
                raise ValueError(
                    f"group {k} has the method {groups[k]['method']!r}, which does not read {key}; give None for it"
                )
        self.optimizer = optimizer
        self._driver = _Driver(optimizer, key, factors, last_epoch)

    @property
    def last_epoch(self) -> int:
        """How often `step` was called."""
        return self._driver.last_epoch

    def step(self) -> None:
        """Sets the values of the next step."""
        self._driver.step()

    def get_last_value(self) -> list[float | None]:
        """The value of each group as it was set last. None for a group that is left alone."""
        return list(self._driver.last_values)

    def state_dict(self) -> dict[str, Any]:
        """last_epoch, and the initial and the last values. The functions are not saved."""
        return self._driver.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where a scheduler with the same functions was. The values are written to the groups too, so it may
        come before or after the optimizer's. Raises ValueError for a state of another key or of other groups."""
        self._driver.load_state_dict(state_dict)


class RecAdamScheduler:
    """The annealing of RecAdam, for AdamW with the method "l2sp":

        λ(t) = 1 / (1 + exp(−k·(t − t0))),   t = last_epoch + 1
        lr = initial lr·lr_factor(last_epoch)·λ(t),   strength = γ·(1 − λ(t)) / λ(t) = γ·exp(−k·(t − t0))

    γ is the strength that the optimizer was made with. "l2sp" pulls by strength·lr, so a step becomes

        θ̃ = θ − lr·λ·(the step of Adam),   θ = θ̃ − lr·(1 − λ)·γ·(θ̃ − θ₀)

    which is the step of the authors' released RecAdam. It follows λ·task + (1 − λ)·γ/2·‖θ − θ₀‖², with λ and the
    penalty outside the moments. At first the weights stay near θ₀, and from about t0 on they are fine-tuned freely.

    It drives lr in the groups of "l2sp". In those of "none", such as a head, it sets lr to initial lr·lr_factor. So use
    no other scheduler of lr beside it. Values are kept, written and saved as by `StrengthScheduler`.

    Args:
        optimizer: one of this package, or `Anchored` around another. Each group has the method "l2sp" or "none".
        k: ≥ 0, how sharp the turn is, per step. The paper's code suggests 0.05 to 1, and a γ of 5000.
        t0: the step at which λ is 1/2. It suggests 100 to 1000.
        lr_factor: a schedule of lr beside λ, such as a warm-up, as LambdaLR takes it.
        last_epoch: as in `StrengthScheduler`.

    Where it differs from the released code: `weight_decay` is that of the base, and is scaled by λ as lr is. eps is
    where torch has it. λ is at least 1.9e-12, so that the strength is finite. strength·lr is capped at 1.

    Raises:
        TypeError: something else than an optimizer or a function.
        ValueError: k or t0 out of range, a group with another method, or none with "l2sp". From `step`, an lr_factor
            that leads to an lr below 0.

    Source: RecAdam, Chen et al., EMNLP 2020 (arXiv 2004.12651).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        k: float,
        t0: float,
        lr_factor: Factor | None = None,
        last_epoch: int = -1,
    ) -> None:
        check_number("k", k, NOT_NEGATIVE)
        check_number("t0", t0, FINITE)
        if lr_factor is not None and not callable(lr_factor):
            raise TypeError(f"lr_factor must be a function of last_epoch, got a {type(lr_factor).__name__}")
        groups = _groups_of(optimizer)
        for row, group in enumerate(groups):
            if group["method"] not in ("l2sp", "none"):
                raise ValueError(f"group {row} has the method {group['method']!r}; RecAdam's pull is that of 'l2sp'")
        pulled = [group["method"] == "l2sp" for group in groups]
        if not any(pulled):
            raise ValueError("no group has the method 'l2sp', which is RecAdam's pull")

        def ratio(epoch: int) -> float:  # (1 − λ)/λ
            return exp(min(_FARTHEST, float(k) * (float(t0) - (epoch + 1))))

        def free(epoch: int) -> float:
            return 1.0 if lr_factor is None else float(lr_factor(epoch))

        def annealed(epoch: int) -> float:
            return free(epoch) / (1 + ratio(epoch))

        self.optimizer = optimizer
        self._lr = _Driver(optimizer, "lr", [annealed if l2sp else free for l2sp in pulled], last_epoch)
        self._strength = _Driver(optimizer, "strength", [ratio if l2sp else None for l2sp in pulled], last_epoch)

    @property
    def last_epoch(self) -> int:
        """How often `step` was called."""
        return self._lr.last_epoch

    def step(self) -> None:
        """Sets lr and strength of the next step. Call it after each step of the optimizer."""
        self._lr.step()
        self._strength.step()

    def get_last_lr(self) -> list[float | None]:
        """The lr of each group as it was set last."""
        return list(self._lr.last_values)

    def get_last_value(self) -> list[float | None]:
        """The strength of each group as it was set last. None for a group of "none"."""
        return list(self._strength.last_values)

    def state_dict(self) -> dict[str, Any]:
        """As of `StrengthScheduler`, for lr and for strength. k, t0 and lr_factor are not saved."""
        return {"lr": self._lr.state_dict(), "strength": self._strength.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of `StrengthScheduler`."""
        self._lr.load_state_dict(state_dict["lr"])
        self._strength.load_state_dict(state_dict["strength"])


def _groups_of(optimizer: Optimizer) -> list[Group]:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}, not an optimizer")
    groups: list[Group] = optimizer.param_groups
    if not all("method" in group for group in groups):
        raise ValueError(
            f"{type(optimizer).__name__} has no methods in its groups; give an optimizer of this package, or "
            "rft.Anchored(optimizer, ...)"
        )
    return groups


def _reads(group: Group) -> tuple[str, ...]:
    return rule_of_group(group).reads


def _methods(groups: Sequence[Group]) -> str:
    return ", ".join(repr(name) for name in dict.fromkeys(group["method"] for group in groups))


def _listed(factor: Any, groups: Sequence[Group]) -> list[Factor | None]:
    if not isinstance(factor, list | tuple):
        raise TypeError(f"factor must be a function of last_epoch, or a list of them, got a {type(factor).__name__}")
    if len(factor) != len(groups):
        raise ValueError(f"factor has {len(factor)} entries for {len(groups)} groups; give one for each, or None")
    for k, given in enumerate(factor):
        if given is not None and not callable(given):
            raise TypeError(f"factor[{k}] must be a function of last_epoch or None, got a {type(given).__name__}")
    return list(factor)
