"""A program, run by test_spread.py in several processes: real FSDP2, DDP and distributed checkpoints, and TPGM."""

import argparse
import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.functional import cross_entropy

import robustft_kernels as rft
from robustft_kernels.backends import digests

from .processes import parser, randn, spawn


def around(params: object, lr: float, **pull: object) -> rft.Anchored:
    return rft.Anchored(torch.optim.AdamW(params, lr=lr), **pull)


KINDS = {
    "spd": (rft.AdamSPD, {}),
    "clipped": (rft.AdamSPD, dict(max_grad_norm=0.05)),  # fully_shard makes an equal mesh for each layer
    "ftp": (rft.AdamFTP, {}),
    "ftp, zero": (rft.AdamFTP, dict(anchor="zero")),
    "bf16 state": (rft.AdamSPD, dict(state_dtype=torch.bfloat16)),
    "8-bit state": (rft.AdamSPD, dict(state_dtype="8bit")),
    "around spd": (around, {}),
    "around project": (around, dict(method="project", norm="mars", radius=0.05)),
    "sgd": (rft.SGDPGM, dict(momentum=0.9, radius=0.02)),
}
# A shard draws bits of its own. Steps of lr 1e-2 may each be off by what rounding makes of a moment.
SLACK = {"bf16 state": 5e-4, "8-bit state": 5e-3}


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(13, 32), nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, 7), nn.Tanh(), nn.Linear(7, 3))


def sharded(model: nn.Sequential, world: int, head_in_root: bool = False) -> nn.Sequential:
    mesh = (
        init_device_mesh(torch.get_default_device().type, (2, 2), mesh_dim_names=("replicas", "shards"))
        if world == 4
        else None
    )
    for layer in model[:-1] if head_in_root else model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def batch(t: int) -> tuple[torch.Tensor, torch.Tensor]:
    """It is the same in every process, so that one process alone has the same gradients."""
    generator = torch.Generator().manual_seed(t)
    return randn((16, 13), generator), randn((16, 3), generator).argmax(1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for t in steps:
        x, y = batch(t)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


def full(model: nn.Module) -> list[torch.Tensor]:
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]


def assert_close(got: list[torch.Tensor], want: list[torch.Tensor], what: str, slack: float = 2e-5) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= slack, (what, (a - b).abs().max())


def make(kind: str, model: nn.Module, **kwargs: object) -> torch.optim.Optimizer:
    cls, own = KINDS[kind]
    return cls(model.named_parameters(), lr=1e-2, **{**own, **kwargs})


def check_training(world: int) -> None:
    """FSDP2 (HSDP with four) and DDP make the steps of one process."""
    for kind in KINDS:
        alone, spread, replicated = (net(0) for _ in range(3))
        spread = sharded(spread, world)
        replicated = nn.parallel.DistributedDataParallel(replicated)
        models = {"alone": alone, "fsdp": spread, "ddp": replicated}
        optimizers = {name: make(kind, model) for name, model in models.items()}
        for name, model in models.items():
            train(model, optimizers[name], range(5))
        slack = SLACK.get(kind, 2e-5)
        assert_close(full(spread), full(alone), f"fsdp, {kind}", slack)
        assert_close(full(replicated), full(alone), f"ddp, {kind}")
        if kind == "spd":
            check_loaded_anchors(optimizers["fsdp"], world)
        told = torch.tensor([of.deviation for of in optimizers["fsdp"].telemetry().values()], dtype=torch.float64)
        want = torch.tensor([of.deviation for of in optimizers["alone"].telemetry().values()], dtype=torch.float64)
        torch.testing.assert_close(told, want, rtol=1e-2 if kind == "bf16 state" else 1e-3, atol=1e-5)


def check_loaded_anchors(optimizer: rft.AdamSPD, world: int) -> None:
    """The anchors of a checkpoint take the place of others, which are sharded alike."""
    fresh = make("spd", sharded(net(9), world))
    fresh.load_state_dict(optimizer.state_dict())
    for one, other in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert torch.equal(one["anchor"].full_tensor(), other["anchor"].full_tensor())


def check_given_anchors(world: int, folder: Path) -> None:
    """Anchors given as whole tensors on every process, or in a file, are spread as the parameters are."""
    pretrained = net(1).state_dict()
    weights = dict(pretrained)
    anchors: list[object] = [weights]
    try:
        from safetensors.torch import save_file
    except ImportError:
        pass
    else:
        if dist.get_rank() == 0:
            save_file(weights, folder / "model.safetensors")
        dist.barrier()
        anchors.append(folder)
    alone = net(0)
    train(alone, make("spd", alone, anchor=weights), range(4))
    for anchor in anchors:
        model = sharded(net(0), world)
        optimizer = make("spd", model, anchor=anchor)
        train(model, optimizer, range(4))
        assert_close(full(model), full(alone), f"anchor {type(anchor).__name__}")
        saved = copy.deepcopy(optimizer.state_dict())
        for of, whole in zip(saved["state"].values(), weights.values(), strict=True):
            assert torch.equal(of["anchor_digest"].cpu(), digests.digest(whole))
            assert ("anchor" in of) == (anchor is not folder)
        optimizer.load_state_dict(saved)
        if anchor is not folder:  # one process has damaged a shard, and all refuse it
            if dist.get_rank() == 1:
                saved["state"][0]["anchor"].to_local()[0, 0] += 1
            with pytest.raises(ValueError, match=r"the checkpoint's anchor of parameter '0\.weight' is damaged"):
                optimizer.load_state_dict(saved)
    if folder in anchors:  # a shard is a copy
        with pytest.raises(ValueError, match=r"anchor_device='disk' .* '0\.weight' .* shards, which are copies"):
            make("spd", sharded(net(0), world), anchor=folder, anchor_device="disk")


def check_functions(world: int) -> None:
    """deviation, project_, interpolate_ and project over DTensors."""
    for norm in ("l2", "mars", "mars_rows"):
        alone, model = net(0), sharded(net(0), world)
        anchors = [p.detach().clone() for p in net(1).parameters()]
        mine, theirs = list(model.parameters()), list(alone.parameters())
        got, want = rft.deviation(mine, anchors, norm), rft.deviation(theirs, anchors, norm)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        rft.project_(mine, anchors, 0.5, norm)
        rft.project_(theirs, anchors, 0.5, norm)
        assert_close(full(model), full(alone), f"project_ {norm}", 1e-6)
        rft.interpolate_(mine, anchors, 0.3)
        rft.interpolate_(theirs, anchors, 0.3)
        assert_close(full(model), full(alone), "interpolate_", 1e-6)


def check_tpgm(world: int) -> None:
    """All processes have the radii of one process, and everything else is as it was."""
    for norm, extra in (("l2", dict(init="half_min")), ("mars_rows", dict(radius_penalty=0.1))):
        learned = []
        for model in (net(0), sharded(net(0), world)):
            anchors = {name: p.detach().clone() for name, p in net(1).named_parameters()}
            tpgm = rft.TPGM(model, norm=norm, anchor=anchors, lr=0.05, **extra)
            marker = torch.zeros_like(next(model.parameters()))
            next(model.parameters()).grad = marker
            before = [p.clone() for p in full(model)]
            tpgm.update(lambda b, model=model: cross_entropy(model(b[0]), b[1]), [batch(t) for t in range(3)], steps=4)
            assert all(map(torch.equal, full(model), before))
            assert next(model.parameters()).grad is marker
            tpgm.project_()
            learned.append((full(model), torch.stack(list(tpgm.radii.values()))))
        assert_close(learned[1][0], learned[0][0], f"TPGM {norm}", 1e-4)
        torch.testing.assert_close(learned[1][1], learned[0][1], rtol=1e-4, atol=1e-5)
        radii = [torch.zeros_like(learned[1][1]) for _ in range(world)]
        dist.all_gather(radii, learned[1][1])
        assert all(torch.equal(radii[0], other) for other in radii)


def after_evaluation(model: nn.Module, given: dict[str, torch.Tensor], what: str) -> list[torch.Tensor]:
    """Evaluates a model, does something with it, and evaluates it again. Returns what that gave, and the weights."""
    listed = list(model.named_parameters())
    tpgm = rft.TPGM(model, anchor=given, lr=0.05, init="half_min")
    x, y = batch(0)
    with torch.no_grad():
        model(x)
    if what.endswith("copies"):  # where FSDP2 has made any
        listed = list(model.named_parameters())
    if what.startswith("TPGM"):
        if what != "TPGM":
            tpgm = rft.TPGM(listed if "pairs" in what else model, anchor=given, lr=0.05, init="half_min")
        tpgm.update(lambda b: cross_entropy(model(b[0]), b[1]), [batch(t) for t in range(3)], steps=4)
        tpgm.project_()
    elif what.startswith("functions"):
        params = [param for _, param in listed]
        rft.project_(params, list(given.values()), 0.3)
        rft.interpolate_(params, list(given.values()), 0.7)
    else:
        optimizer = rft.AdamSPD(listed, lr=1e-2, anchor=given)
        cross_entropy(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        out = model(x)
    model.state_dict()  # leaves the shards in the model
    return [out, *full(model)]


def check_after_evaluation(world: int) -> None:
    """An evaluation leaves unsharded copies in an FSDP2 model. What is done then is done to the shards, and the next
    forward pass sees it. Among four processes, it may also leave shards over two."""
    whats = ["TPGM", "TPGM made then", "TPGM of pairs", "TPGM of pairs, copies", "functions", "functions, copies"]
    for what in [*whats, "optimizer, copies"]:
        given = {name: p.detach().clone() for name, p in net(1).named_parameters()}
        want = after_evaluation(net(0), given, what)
        models = [sharded(net(0), world, head_in_root=True)] + (
            [fully_shard(net(0), reshard_after_forward=2)] if world == 4 else []
        )
        for model in models:
            assert_close(after_evaluation(model, given, what), want, f"{what}, after an evaluation", 1e-4)


def check_partition() -> None:
    """ZeroRedundancyOptimizer gives each process some of the parameters. Steps are those of one process. A norm over
    all gradients is refused."""
    alone, replica = net(0), nn.parallel.DistributedDataParallel(net(0))
    partition = ZeroRedundancyOptimizer(replica.parameters(), rft.AdamFTP, lr=1e-2)
    train(alone, rft.AdamFTP(alone.parameters(), lr=1e-2), range(5))
    train(replica, partition, range(5))
    assert_close(full(replica), full(alone), "ZeroRedundancyOptimizer")
    with pytest.raises(ValueError, match=r"max_grad_norm would clip .* call torch\.nn\.utils\.clip_grad_norm_"):
        ZeroRedundancyOptimizer(replica.parameters(), rft.AdamSPD, max_grad_norm=1.0)


def check_replicas(world: int) -> None:
    """Under DDP, with batches of their own, all replicas learn the radii of one process with all batches. Steps in
    backward are refused, whichever was made first."""
    learned = []
    for model in (net(0), nn.parallel.DistributedDataParallel(net(0))):
        anchors = {name: p.detach().clone() for name, p in net(1).named_parameters()}
        tpgm = rft.TPGM(model, anchor=anchors, lr=0.05, init="half_min")
        rows = slice(None) if not learned else slice(dist.get_rank() * 16 // world, (dist.get_rank() + 1) * 16 // world)
        batches = [tuple(of[rows] for of in batch(t)) for t in range(3)]
        tpgm.update(lambda b, model=model: cross_entropy(model(b[0]), b[1]), batches, steps=4)
        learned.append(torch.stack(list(tpgm.radii.values())))
    torch.testing.assert_close(learned[1], learned[0], rtol=1e-4, atol=1e-5)
    radii = [torch.zeros_like(learned[1]) for _ in range(world)]
    dist.all_gather(radii, learned[1])
    assert all(torch.equal(radii[0], other) for other in radii)

    refused = r"parameter '0\.weight' is under DistributedDataParallel"
    alone = net(0)
    before = [p.detach().clone() for p in alone.parameters()]
    inside = rft.StepInBackward(rft.AdamSPD(alone.parameters()))
    replica = nn.parallel.DistributedDataParallel(alone)
    for what in (lambda: replica(batch(0)[0]).sum().backward(), lambda: rft.StepInBackward(inside._optimizer)):
        with pytest.raises(RuntimeError, match=refused):
            what()
    assert all(map(torch.equal, alone.parameters(), before))


def save(world: int, folder: Path) -> None:
    """Three steps, a checkpoint, three more steps. Keeps the last weights for those that go on from the checkpoint."""
    for kind in KINDS:
        model = sharded(net(0), world)
        optimizer = make(kind, model)
        train(model, optimizer, range(3))
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / kind)
        train(model, optimizer, range(3, 6))
        whole = full(model)
        if dist.get_rank() == 0:
            torch.save(whole, folder / f"{kind}.pt")
        dist.barrier()


def resume(world: int, folder: Path, same: bool) -> None:
    """Begins with other weights. The checkpoint replaces them and their anchors, with any number of processes."""
    for kind in KINDS:
        model = net(7) if world == 1 else sharded(net(7), world)
        optimizer = make(kind, model)
        weights, state = get_state_dict(model, optimizer)
        content = {"model": weights, "optimizer": state}
        dcp.load(content, checkpoint_id=folder / kind)
        set_state_dict(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
        train(model, optimizer, range(3, 6))
        want = torch.load(folder / f"{kind}.pt")
        if same:
            assert all(map(torch.equal, full(model), want)), f"{kind}: resumed differs"
        assert_close(full(model), want, f"{kind}, {world} processes", SLACK.get(kind, 2e-5))


def main(args: argparse.Namespace) -> None:
    world, folder = args.world, Path(args.folder)
    if args.what == "train":
        check_training(world)
        check_given_anchors(world, folder)
        check_functions(world)
        check_tpgm(world)
        check_after_evaluation(world)
        check_replicas(world)
        check_partition()
    elif args.what == "save":
        save(world, folder)
        resume(world, folder, same=True)
    else:
        resume(world, folder, same=False)


if __name__ == "__main__":
    options = parser()
    options.add_argument("what", choices=("train", "save", "resume"))
    options.add_argument("--folder", required=True)
    spawn(main, options.parse_args())
