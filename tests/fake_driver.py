"""A program, run by test_triton_host.py. It makes optimizer steps through Triton's own host side. The driver has no
GPU, and notes what it is told to launch."""

import torch
import triton
from torch import nn

import robustft_kernels as rft

from .ptx.device import Driver, Utils, feign

launches = []
loaded = []


class NotingUtils(Utils):
    def load_binary(self, name, binary, shared, device):
        loaded.append(name)
        return super().load_binary(name, binary, shared, device)


class Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, grid_x, grid_y, grid_z, stream, function, *args):
        launches.append(f"{function} {grid_x}")


class NotingDriver(Driver):
    utils = NotingUtils()
    launcher_cls = Launcher

    def __getattr__(self, name):
        raise AttributeError(f"the fake driver was asked for {name}")


def main() -> None:
    feign(NotingDriver())
    params = [nn.Parameter(torch.zeros(n)) for n in (20000, 300)]
    optimizer = rft.AdamSPD(params, backend="triton")
    for lr in (1e-3, 2e-3):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        print(", ".join(launches))
        launches.clear()
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(30000)) for _ in range(3)]})
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    print(", ".join(launches))
    print(f"compiled: {len(loaded)}")


if __name__ == "__main__":
    assert not triton.knobs.runtime.interpret
    main()
