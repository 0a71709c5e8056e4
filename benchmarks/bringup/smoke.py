"""A program that makes one step of each method on each form of the Triton backend, and compares it with the oracle.

python -m benchmarks.bringup.smoke cuda [SHARE OF]
"""

import sys
from functools import partial

import torch

from robustft_kernels import METHODS
from robustft_kernels.backends.triton import interpreted
from robustft_kernels.testing import CASES, LEAN_CASES, SETTINGS, Stepper, assert_same_step

from .items import Log, tiny

FORMS = ("triton", "triton_tickets")
DTYPES = (torch.float32, torch.bfloat16)


def step(form: str, method: str, norm: str | None, dtype: torch.dtype, device: torch.device) -> None:
    """Raises AssertionError if the step is not the oracle's."""
    cases = LEAN_CASES[2:6] if interpreted() else CASES
    got = Stepper(cases, SETTINGS[0], method, dtype, device=device, norm=norm)
    for _ in range(2):  # so that the step has a trajectory behind it
        got.run("reference", got.grads())
    grads, before = got.grads(), got.clone()
    want = before.clone()
    want.run_oracle(grads)
    got.run(form, grads)
    assert_same_step(got, want, before, grads)


def main(device: str, share: str = "0", of: str = "1") -> None:
    torch.set_num_threads(1)
    items = {
        f"{method}, {norm or 'no norm'}, {str(dtype)[6:]}, {form}": partial(
            step, form, method, norm, dtype, torch.device(device)
        )
        for dtype in DTYPES
        for method, row in METHODS.items()
        for norm in row.rules
        for form in FORMS
    }
    names = [name for name in items if not tiny() or name.startswith("spd, l2, float32")]
    Log().each({name: items[name] for name in names[int(share) :: int(of)]})


if __name__ == "__main__":
    main(*sys.argv[1:])
