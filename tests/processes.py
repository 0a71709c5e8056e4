"""What the programs of test_spread.py share. It runs them in several processes, by gloo on the CPU, by NCCL on GPUs."""

import argparse
import faulthandler
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def parser() -> argparse.ArgumentParser:
    """The options of every such program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--store", required=True)
    parser.add_argument("--device", default="cpu")
    return parser


def spawn(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Runs `main` in each of `args.world` processes. On GPUs, each process has its own as the default device."""
    mp.spawn(_process, (main, args), nprocs=args.world)


def _process(rank: int, main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    if args.device == "cuda":
        torch.cuda.set_device(rank)
    torch.set_default_device(args.device)
    backend = "nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{args.store}", world_size=args.world, rank=rank)
    main(args)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may still release tensors, which aborts an interpreter that is being torn down


def randn(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """The same numbers on every device, from a generator on the CPU."""
    return torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device())
