"""A program that makes one step of each method on each backend of a GPU, and compares it with the oracle.

python -m benchmarks.bringup.smoke cuda [SHARE OF]
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from robustft_kernels import METHODS
from robustft_kernels.backends import registry
from robustft_kernels.backends.triton import interpreted
from robustft_kernels.testing import CASES, LEAN_CASES, SETTINGS, Stepper, assert_same_step

from .items import Log, tiny

FORMS = ("cuda", "triton", "triton_tickets")
DTYPES = (torch.float32, torch.bfloat16)


def step(form: str, method: str, norm: str | None, dtype: torch.dtype, device: torch.device) -> None:
    """Raises AssertionError if the step is not the oracle's."""
    cases = LEAN_CASES[2:6] if interpreted() and form != "cuda" else CASES
    got = Stepper(cases, SETTINGS[0], method, dtype, device=device, norm=norm)
    for _ in range(2):  # so that the step has a trajectory behind it
        got.run("reference", got.grads())
    grads, before = got.grads(), got.clone()
    want = before.clone()
    want.run_oracle(grads)
    got.run(form, grads)
    assert_same_step(got, want, before, grads)


def absent(form: str, device: torch.device) -> str:
    """Why a backend is not here for the device, or "". It is not tried: one that is here and cannot run has failed."""
    backend = registry.BACKENDS[form]
    other = backend.device_type() != device.type
    return backend.missing() or (f"it serves {backend.device_type()} tensors" if other else "")


def items(device: torch.device) -> dict[str, Callable[[], dict[str, Any] | None]]:
    """A step of each method on each backend. One that is not here is one item, which is skipped."""
    why = {form: absent(form, device) for form in FORMS}
    all_: dict[str, Callable[[], dict[str, Any] | None]] = {
        f"{form}, all methods": partial(dict, outcome="skipped", why=reason) for form, reason in why.items() if reason
    }
    steps = {
        f"{method}, {norm or 'no norm'}, {str(dtype)[6:]}, {form}": partial(step, form, method, norm, dtype, device)
        for dtype in DTYPES
        for method, row in METHODS.items()
        for norm in row.rules
        for form in FORMS
        if not why[form]
    }
    return {**all_, **{name: of for name, of in steps.items() if not tiny() or name.startswith("spd, l2, float32")}}


def main(device: str, share: str = "0", of: str = "1") -> None:
    torch.set_num_threads(1)
    all_ = items(torch.device(device))
    Log().each({name: all_[name] for name in list(all_)[int(share) :: int(of)]})


if __name__ == "__main__":
    main(*sys.argv[1:])
