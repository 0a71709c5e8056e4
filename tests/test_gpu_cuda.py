"""The CUDA backend on a GPU has the bits of the native backend on a CPU.

make test-gpu. On a CPU the native backend takes its place, which tries the test itself. What shows it without a GPU is
in test_ptx.py and test_cuda_host.py.
"""

from dataclasses import replace

import pytest
import torch

from robustft_kernels.backends import native, registry

from .conftest import skip_unless_ready

try:
    from .ptx.cuda import assert_same_bits
    from .ptx.steps import ROWS, TINY, given, made_tiny, with_live_lr
except ImportError as error:
    pytest.skip(f"the rows of tests/ptx cannot be imported: {error}", allow_module_level=True)

pytestmark = pytest.mark.skipif(bool(native.MISSING), reason=native.MISSING or "ready")
CPU = torch.device("cpu")
EACH = tuple(dict.fromkeys(replace(row, tickets=False) for row in ROWS))  # one launch or two is Triton's choice


def table_of(row, stepper, device):
    if row.how != "lr is a tensor" or device.type == "cpu":
        return stepper.table()
    table = with_live_lr(stepper.table())
    return replace(table, live={at: number.to(device) for at, number in table.live.items()})


@pytest.mark.parametrize("row", EACH, ids=lambda row: row.name)
def test_bits_of_the_native_backend(row, device):
    backend = "cuda" if device.type == "cuda" else "native"
    skip_unless_ready(backend, device)
    with CPU:
        want = row.settled()
        grads = want.grads()
        grads = made_tiny(want, grads) if row.how == TINY else grads
    got = want.clone(device)
    there = got.laid(grads)
    if row.how == "norm":
        norms = [
            registry.prepare(on, of.table()).squared_norm(its)
            for on, of, its in (("native", want, grads), (backend, got, there))
        ]
        assert float(norms[0]) == float(norms[1]) > 0
        return
    with CPU:
        scaled, options = given(row, grads)
    registry.prepare("native", want.table())(scaled, **options)
    with device:
        scaled, options = given(row, there)
        table = table_of(row, got, device)
    before = [of.clone() for of in got.params]
    registry.prepare(backend, table)(scaled, **options)
    assert all(map(torch.equal, got.params, before)) == (row.how == "skipped")
    assert_same_bits(got.clone(CPU), want)
