"""A program, run by test_cuda_host.py. It measures what a step takes of the host, in the CUDA and the Triton backend.

Each number is the least of many, in microseconds, of a prepared step whose gradients have moved, or of a list of its
gradients. Drivers do nothing.

python -m tests.host_program LIBRARY    the driver of counting_driver.c
"""

import ctypes
import sys
import time

import torch
import triton

import robustft_kernels as rft
from robustft_kernels.backends import registry
from robustft_kernels.core.bases import ADAMW, spec_of_hyper
from robustft_kernels.core.contract import StepTable, StepTensors, empty_results

from .fake_driver import NotingDriver
from .ptx.device import feign
from .ptx.driver import SIGNATURES, installed

SIZE, REPEATS = 256, 200


def table_of(tensors: int) -> StepTable:
    """AdamSPD on so many small tensors."""
    values = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, strength=1.0, anchored=1.0)
    hyper = dict.fromkeys(ADAMW.hyper, 0.0) | values
    spec = spec_of_hyper(ADAMW, hyper, "spd")

    def one() -> StepTensors:
        state = {key: torch.zeros(SIZE) for key in ("exp_avg", "exp_avg_sq")}
        return StepTensors(spec, 0, torch.ones(SIZE), torch.zeros(SIZE), state, torch.zeros(()))

    results = empty_results(tensors, torch.device("cpu"))
    return StepTable(
        ADAMW, [one() for _ in range(tensors)], torch.tensor([list(hyper.values())], dtype=torch.float64), *results
    )


def least(backend: str, tensors: int) -> tuple[float, float]:
    """Of a step, and of a list of its gradients made in Python, in turns."""
    table = table_of(tensors)
    run = registry.prepare(backend, table)
    params = [of.param for of in table.tensors]
    turns = [[torch.ones(SIZE) for _ in range(tensors)] for _ in range(2)]
    took = []
    for k in range(REPEATS):
        for param, grad in zip(params, turns[k % 2], strict=True):
            param.grad = grad
        begin = time.perf_counter()
        [param.grad for param in params]
        listed = time.perf_counter()
        run(turns[k % 2])
        took.append((time.perf_counter() - listed, listed - begin))
    step, listing = (1e6 * min(of) for of in zip(*took, strict=True))
    return step, listing


def main() -> None:
    library = ctypes.CDLL(sys.argv[1])
    installed({name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in SIGNATURES})
    feign(NotingDriver())
    for tensors in (256, 2000):
        for backend in ("cuda", "triton"):
            step, listing = least(backend, tensors)
            print(f"{backend}, {tensors}: {step:.2f}")
            print(f"list beside {backend}, {tensors}: {listing:.2f}")
    params = [torch.nn.Parameter(torch.ones(SIZE)) for _ in range(8)]
    optimizer = rft.AdamSPD(params, backend="cuda")
    counters = [getattr(library, f"counted_{what}") for what in ("launches", "copies", "allocations")]
    for _ in range(3):
        before = [count() for count in counters]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    for name, count, was in zip(("launches", "copies", "allocations"), counters, before, strict=True):
        print(f"{name}: {count() - was}")


if __name__ == "__main__":
    assert not triton.knobs.runtime.interpret
    main()
