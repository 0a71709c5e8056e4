"""What the programs that test_spread.py runs in several processes begin with: by gloo on the CPU, by NCCL on GPUs."""

import torch
import torch.distributed as dist


def join(rank: int, world: int, store: str, device: str) -> None:
    """Makes this process one of so many, and `device` (its own GPU, for "cuda") the default."""
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    torch.set_default_device(device)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", f"file://{store}", world_size=world, rank=rank)


def randn(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """The same numbers on every device; of a generator on the CPU."""
    return torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device())
