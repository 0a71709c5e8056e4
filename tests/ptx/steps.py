"""Steps by the compiled kernels, each compared with the oracle: one row for each way in which kernels differ."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from robustft_kernels.backends import registry
from robustft_kernels.core.contract import StepTable
from robustft_kernels.testing import LEAN_CASES, ROW_CASES, SETTINGS, Stepper, assert_same_step

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
BY_NAME = {settings.name: settings for settings in SETTINGS}
# Rows of 1, in runs, in one chunk and in several; short, long and strided.
BY_ROWS = tuple(case for case in ROW_CASES if case.name in (
    "0-d", "empty matrix", "one row", "rows of 1", "rows of 37", "long odd rows", "transposed", "rows in runs of 37",
    "tile, block and tail", "rows of 768", "misaligned matrix",
))  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A step. anchor: as of Stepper. tickets: in the one-launch form. how: what is asked of it besides."""

    method: str
    norm: str | None
    settings: str
    dtype: torch.dtype
    anchor: bool | torch.dtype = True
    tickets: bool = False
    how: str = "a step"

    @property
    def name(self) -> str:
        """What tells it from the others."""
        anchor = {True: "", False: ", zero"}.get(self.anchor, f", {self.anchor} anchor")
        form = ", one launch" * self.tickets
        return f"{self.method} {self.norm}, {self.settings}, {self.dtype}{anchor}{form}, {self.how}".replace(
            "torch.", ""
        )

    @property
    def backend(self) -> str:
        return "triton_tickets" if self.tickets else "triton"

    def settled(self) -> Stepper:
        """A stepper three steps into its trajectory, where SPD fires."""
        by_rows = self.norm in ("mars", "mars_rows")
        stepper = Stepper(
            BY_ROWS if by_rows else LEAN_CASES, BY_NAME[self.settings], self.method, self.dtype, self.anchor,
            norm=self.norm,
        )  # fmt: skip
        for _ in range(3):
            stepper.run("reference", stepper.grads())
        return stepper


NATIVE, TINY = "bits of native", "bits of native, subnormal moments"
ROWS = (
    Row("spd", "l2", "adamw", F32),
    Row("spd", "l2", "adamw", F32, tickets=True),
    Row("spd", "l2", "adamw", BF16),
    Row("spd", "l2", "adamw", F16, tickets=True),
    Row("spd", "l2", "adamw", F64),
    Row("spd", "l2", "adamw", F32, False),
    Row("spd", "l2", "adamw", F32, BF16),
    Row("spd", "l2", "adamw, amsgrad, maximize", F32),
    Row("spd", "l2", "adamw, stochastic", BF16),
    Row("spd", "l2", "adamw, amsgrad, bf16 state", F32),
    Row("spd", "l2", "adamw, amsgrad, bf16 state", BF16),
    Row("spd", "l2", "adamw, master", BF16),
    Row("spd", "l2", "adamw, master", F16, tickets=True),
    Row("spd", "l2", "sgd, bf16 state, master", BF16),
    Row("spd", "l2", "adamw, amsgrad, 8-bit state", F32),
    Row("ftp", "mars_rows", "sgd, 8-bit state, master", BF16),
    Row("spd", "l2", "sgd, momentum, dampening", F32),
    Row("spd", "l2", "sgd, stochastic", BF16, tickets=True),
    Row("project", "l2", "adamw, decay", F32),
    Row("project", "l2", "sgd, decay", F64),
    Row("l2sp", None, "adamw", F16),
    Row("l2sp_coupled", None, "sgd, nesterov, maximize", BF16),
    Row("l2sp_cautious", None, "adamw", F32),
    Row("digrap", None, "adamw", F32),
    Row("digrap", None, "adamw, master", BF16, tickets=True),
    Row("none", None, "adamw", F32, False),
    Row("spd", "mars_rows", "adamw", F32),
    Row("spd", "mars_rows", "adamw, stochastic", BF16),
    Row("project", "mars_rows", "adamw, master", BF16),
    Row("project", "mars", "adamw", F32),
    Row("project", "mars", "sgd, momentum, dampening", F64),
    Row("ftp", "mars_rows", "adamw", F32),
    Row("ftp", "mars_rows", "adamw, amsgrad, bf16 state", BF16),
    Row("mars_sp", "mars", "adamw", F32),
    Row("spd", "l2", "adamw", F32, how="gradients are unscaled"),
    Row("spd", "l2", "adamw", F32, tickets=True, how="gradients are unscaled"),
    Row("ftp", "mars_rows", "adamw", BF16, how="gradients are unscaled"),
    Row("spd", "l2", "adamw", F32, how="skipped"),
    Row("ftp", "mars_rows", "adamw", F32, how="skipped"),
    Row("spd", "l2", "adamw", F32, how="lr is a tensor"),
    Row("none", None, "adamw", F32, False, how=NATIVE),
    Row("none", None, "adamw", F32, False, how=TINY),
    Row("l2sp", None, "adamw, amsgrad, maximize", F32, how=NATIVE),
    Row("l2sp", None, "adamw", BF16, how=NATIVE),
    Row("l2sp", None, "sgd, momentum, dampening", F32, how=NATIVE),
    Row("l2sp", None, "adamw", F64, how=NATIVE),
    Row("spd", "l2", "adamw", F32, how="norm"),
    Row("spd", "l2", "adamw", BF16, how="norm"),
)


def step(row: Row) -> Stepper:
    """Makes the row's step. Raises AssertionError saying what differs from the oracle's."""
    got = row.settled()
    grads, before = got.grads(), got.clone()
    if row.how == "norm":
        _norm(row, got, grads)
        return got
    if row.how in (NATIVE, TINY):
        _as_native(row, got, grads)
        return got
    want = before.clone()
    scaled, options = given(row, grads)
    table = with_live_lr(got.table()) if row.how == "lr is a tensor" else got.table()
    registry.prepare(row.backend, table)(scaled, **options)
    if row.how == "skipped":
        assert all(map(torch.equal, got.tensors(), want.tensors())), "a step that is skipped has written"
        return got
    want.run_oracle(grads)
    assert_same_step(got, want, before, grads)
    return got


def given(row: Row, grads: list[torch.Tensor]) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The gradients and the other arguments of a row's step."""
    if row.how == "gradients are unscaled":
        options = {"grad_scale": torch.tensor(1024.0), "found_inf": torch.zeros(())}
        return [grad * 1024 for grad in grads], options  # exact
    return grads, {"found_inf": torch.ones(())} if row.how == "skipped" else {}


def made_tiny(got: Stepper, grads: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients whose squares are subnormal, for a step without eps and without history."""
    got.settings = got.settings.but(eps=0.0)
    for of in (*got.states["exp_avg"], *got.states["exp_avg_sq"]):
        of.zero_()
    return [grad * 2.0**-66 for grad in grads]


def _as_native(row: Row, got: Stepper, grads: list[torch.Tensor]) -> None:
    """Roots and divisions are exact, so a step whose α needs no sums has the bits of the native backend's. Also where
    v is subnormal and eps is 0: an approximate root of v is 0 there, and the step infinite."""
    grads = made_tiny(got, grads) if row.how == TINY else grads
    want = got.clone()
    want.run("native", grads)
    got.run(row.backend, grads)
    known = [[of.nan_to_num(nan=0.125) for of in stepper.tensors()] for stepper in (got, want)]  # no rule measures
    assert all(map(torch.equal, *known)), "not the bits of the native backend"
    if row.how == TINY:
        moments = [of.reshape(-1) for of in got.states["exp_avg_sq"]]
        assert any(((of > 0) & (of < torch.finfo(of.dtype).tiny)).any() for of in moments), "no moment is subnormal"
        finite = [param.reshape(-1)[of > 0].isfinite() for param, of in zip(got.params, moments, strict=True)]
        assert all(of.all() for of in finite), "a subnormal moment was taken for 0"


def with_live_lr(table: StepTable) -> StepTable:
    """The same table, but the learning rate is in a tensor, and a wrong one in the table."""
    column = table.base.hyper.index("lr")
    lr, hyper = table.hyper[0, column].clone(), table.hyper.clone()
    hyper[0, column] = 99
    return StepTable(table.base, table.tensors, hyper, table.results, table.alphas, {column: lr})


def _norm(row: Row, got: Stepper, grads: list[torch.Tensor]) -> None:
    found = registry.prepare(row.backend, got.table()).squared_norm(grads)
    want = registry.prepare("reference", got.clone().table()).squared_norm([grad.double() for grad in grads])
    torch.testing.assert_close(found, want.to(found.dtype), rtol=1e-6, atol=0)


def check(device: Any, row: Row, step: Callable[[Row], Stepper] = step) -> list[str]:
    """What is wrong with a row's step: a line each."""
    device.seen.clear()
    device.launched.clear()
    try:
        step(row)
    except AssertionError as error:
        return [f"wrong: {error}", *device.seen]
    return list(device.seen)
