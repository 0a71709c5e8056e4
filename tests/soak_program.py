"""A program, run by test_spread.py: a long run over changing numbers of processes, against one process.

Groups are frozen and thawed at random. Every 50 steps a checkpoint is saved, and loaded by another number of processes.
"""

import argparse
import multiprocessing
import os
import random
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

import robustft_kernels as rft

WORLDS = (8, 5, 8, 3, 8, 6, 8, 2, 7, 8)
STEPS = 50  # between two checkpoints
METHODS = (
    dict(method="spd"),
    dict(method="ftp", radius_lr=0.05),
    dict(method="project", norm="mars", radius=0.8),
    dict(method="project", norm="mars_rows", radius=0.4),
    dict(method="spd", norm="mars_rows"),
    dict(method="mars_sp", strength=0.01),
    dict(method="l2sp", strength=0.5),
    dict(method="none"),
)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    widths = (11, 23, 17, 16, 29, 13, 19, 12, 3)
    layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(widths)]
    return nn.Sequential(*layers).double()


def make(model: nn.Sequential) -> rft.AnchoredAdamW:
    groups = [
        {"params": [(f"{k}.{name}", p) for name, p in layer.named_parameters()], **of}
        for k, (layer, of) in enumerate(zip(model, METHODS, strict=True))
    ]
    return rft.AnchoredAdamW(groups, lr=2e-3, weight_decay=0.01, max_grad_norm=5.0)


def train(model: nn.Sequential, optimizer: rft.AnchoredAdamW, steps: range) -> None:
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(16, 11, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (16,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        frozen = random.Random(t // 3).sample(range(len(METHODS)), 3)
        for k in frozen:
            for p in optimizer.param_groups[k]["params"]:
                p.grad = None
        optimizer.step()
        if t % 7 == 0 and (not dist.is_initialized() or dist.get_rank() == t % dist.get_world_size()):
            optimizer.telemetry()  # one process alone


def states(model: nn.Module, optimizer: torch.optim.Optimizer, k: int) -> tuple[dict[str, object], StateDictOptions]:
    """Every other checkpoint is flattened, as torchtitan's are."""
    options = StateDictOptions(flatten_optimizer_state_dict=bool(k % 2))
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    return {"model": model_state, "optimizer": optimizer_state}, options


def segment(rank: int, k: int, folder: str) -> None:
    """Loads checkpoint k - 1, makes 50 steps, and saves checkpoint k."""
    torch.set_num_threads(1)
    world = WORLDS[k]
    dist.init_process_group("gloo", f"file://{folder}/store {k}", world_size=world, rank=rank)
    model = net()
    fully_shard(model[1])
    fully_shard(model)
    optimizer = make(model)
    if k:
        saved, options = states(model, optimizer, k - 1)
        dcp.load(saved, checkpoint_id=f"{folder}/{k - 1}")
        set_state_dict(
            model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=options
        )
    train(model, optimizer, range(k * STEPS, (k + 1) * STEPS))
    dcp.save(states(model, optimizer, k)[0], checkpoint_id=f"{folder}/{k}")
    if k == len(WORLDS) - 1:
        whole = {name: p.full_tensor() for name, p in model.named_parameters()}
        if rank == 0:
            torch.save(whole, f"{folder}/spread")
    dist.barrier()
    os._exit(0)


def alone(folder: str) -> None:
    torch.set_num_threads(1)
    model = net()
    train(model, make(model), range(len(WORLDS) * STEPS))
    torch.save({**dict(model.named_parameters()), "start": net().state_dict()}, f"{folder}/alone")
    os._exit(0)


def main(folder: Path) -> None:
    forked = multiprocessing.get_context("fork")
    lone = forked.Process(target=alone, args=(str(folder),))
    lone.start()
    for k, world in enumerate(WORLDS):
        processes = [forked.Process(target=segment, args=(rank, k, str(folder))) for rank in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert not any(process.exitcode for process in processes), (k, world)
    lone.join()
    want, got = torch.load(folder / "alone"), torch.load(folder / "spread")
    start = want.pop("start")
    for name, of in want.items():
        moved, apart = (of - start[name]).abs().max(), (got[name] - of).abs().max()
        assert apart <= 1e-9 * moved, (name, apart, moved)
        print(f"{name:12} moved {moved:.1e}, apart {apart:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    main(parser.parse_args().folder)
