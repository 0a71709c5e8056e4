"""A program, run by test_triton.py. It makes optimizer steps through Triton's own host side. The driver has no GPU, and
notes what it is told to launch."""

from dataclasses import replace

import torch
import triton
from robustft_kernels.triton_kernels import table
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import robustft_kernels as rft
from robustft_kernels.backends import registry

launches = []
loaded = []


class Utils:
    def load_binary(self, name, binary, shared, device):
        loaded.append(name)
        return name, name, 64, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}


class Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, grid_x, grid_y, grid_z, stream, function, *args):
        launches.append(f"{function} {grid_x}")


class Driver:
    utils = Utils()
    launcher_cls = Launcher

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def __getattr__(self, name):
        raise AttributeError(f"the fake driver was asked for {name}")


def main() -> None:
    driver.set_active(Driver())
    backend = replace(registry.BACKENDS["triton"], missing=lambda: "", device_type=lambda: "")
    registry.BACKENDS["triton"] = backend
    table.gpu_of = lambda _: ("cuda", 90)
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
