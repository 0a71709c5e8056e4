"""The order in which the native and the CUDA backend add: the same for any thread, instruction set and GPU."""

import pytest
import torch

from robustft_kernels.backends import native
from robustft_kernels.core.bases import ADAMW, spec_of_hyper
from robustft_kernels.core.contract import StepTable, StepTensors, empty_results

np = pytest.importorskip("numpy")
pytestmark = pytest.mark.skipif(bool(native.MISSING), reason=native.MISSING or "ready")
LANES, BLOCK, CHUNK, GROUP = 16, 256, 16384, 64


def in_order(values):
    total = np.float64(0)
    for value in values:
        total += value
    return total


def of_chunk(terms):
    """Lanes of each block in the type of the terms, blocks in double, and then lanes."""
    lanes = np.zeros(LANES)
    for begin in range(0, len(terms), BLOCK):
        block, sums = terms[begin : begin + BLOCK], np.zeros(LANES, terms.dtype)
        for at in range(0, len(block), LANES):
            few = block[at : at + LANES]
            sums[: len(few)] += few
        lanes += sums.astype(np.float64)
    return in_order(lanes)


def in_groups(values):
    return in_order([in_order(values[at : at + GROUP]) for at in range(0, len(values), GROUP)])


def total(terms):
    return in_groups([of_chunk(terms[at : at + CHUNK]) for at in range(0, len(terms), CHUNK)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [3, 255, 16384, 20160, 32768, 50001, 66 * CHUNK + 5])
def test_sums_have_one_order(dtype, n):
    """At the first step ⟨g,d⟩ and ‖d‖² need nothing of the base step."""
    param, anchor, grad = torch.randn(3, n, generator=torch.Generator().manual_seed(n), dtype=dtype)
    d = (param - anchor).numpy()
    want = total(grad.numpy() * d), total(d * d)
    hyper = dict.fromkeys(ADAMW.hyper, 0.0) | dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, anchored=1.0)
    state = {key: torch.zeros(n, dtype=dtype) for key in ("exp_avg", "exp_avg_sq")}
    results, alphas = empty_results(1, torch.device("cpu"))
    of = StepTensors(spec_of_hyper(ADAMW, hyper, "observe"), 0, param, anchor, state, torch.zeros(()))
    row = torch.tensor([list(hyper.values())], dtype=torch.float64)
    native.prepare(StepTable(ADAMW, [of], row, results, alphas))([grad])
    assert tuple(results[0, :2].tolist()) == want


@pytest.mark.parametrize("tensors", [1, 3, 130])
def test_the_norm_of_gradients_adds_tensors_in_groups(tensors):
    grads = list(torch.randn(tensors, 900, generator=torch.Generator().manual_seed(tensors)))
    hyper = dict.fromkeys(ADAMW.hyper, 0.0)
    spec = spec_of_hyper(ADAMW, hyper, "keep")
    state = {key: torch.zeros(900) for key in ("exp_avg", "exp_avg_sq")}
    of = [StepTensors(spec, 0, torch.zeros(900), None, state, torch.zeros(())) for _ in grads]
    row = torch.tensor([list(hyper.values())], dtype=torch.float64)
    run = native.prepare(StepTable(ADAMW, of, row, *empty_results(tensors, torch.device("cpu"))))
    assert run.squared_norm(grads).item() == in_groups([total((g * g).numpy()) for g in grads])
