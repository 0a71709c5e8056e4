"""FSDP2 in one process, with the unsharded copies that an evaluation leaves in a model. test_spread.py has several
processes."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import robustft_kernels as rft

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch's own imports
]
X, Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3


@pytest.fixture(autouse=True)
def _one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def sharded(seed=0):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(net(seed), mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))


def evaluated(seed=0):
    """A sharded model after an evaluation."""
    model = sharded(seed)
    output(model)
    assert not hasattr(model[0].weight, "placements")
    return model


@torch.no_grad()
def output(model):
    return model(X)


def loss_of(model):
    return nn.functional.cross_entropy(model(X), Y)


def weights(model):
    """By name. The model holds its shards afterwards."""
    return {name: shard.full_tensor().clone() for name, shard in model.state_dict().items()}


CHOICES = {
    "linear_probe": (lambda m: rft.linear_probe(m, "2"), {"2.weight", "2.bias"}),
    "bitfit": (lambda m: rft.bitfit(m, m[2]), {"0.bias", "1.bias", "2.weight", "2.bias"}),
    "partial_fusion": (lambda m: rft.partial_fusion(m, "2"), {"1.weight", "1.bias", "2.weight", "2.bias"}),
    "layerwise_decay": (lambda m: rft.layerwise_decay(m, 0.1, 0.5, list(m)), set(net(0).state_dict())),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_groups_are_of_shards(choice):
    (make, trained), model = CHOICES[choice], evaluated()
    optimizer = torch.optim.SGD(make(model), lr=0.1)
    before = weights(model)
    loss_of(model).backward()
    optimizer.step()
    assert {name for name, value in weights(model).items() if not torch.equal(value, before[name])} == trained


@pytest.mark.parametrize("make", [sharded, evaluated])
def test_flags_are_kept_on_shards(make):
    """Whether the first evaluation comes before, or within."""
    model = make()
    with rft.keep_requires_grad(model):
        rft.linear_probe(model, "2")
        output(model)
    loss_of(model).backward()
    assert all(param.grad is not None for param in model.parameters())


def test_an_update_that_breaks_off():
    """The loss fails amid a forward pass, with copies of the projected weights in the model."""
    model = sharded()
    tpgm = rft.TPGM(model, anchor="zero", init=0.1)
    want, calls = net(0)(X), []

    def failing(*_):
        calls.append(1)
        raise KeyboardInterrupt

    handle = model[2].register_forward_pre_hook(failing)
    with pytest.raises(KeyboardInterrupt):
        tpgm.update(lambda _: loss_of(model), [None])
    handle.remove()
    assert calls
    assert torch.equal(output(model), want)


def test_reading_leaves_a_forward_pass_alone():
    """It would otherwise lose the copies that it needs."""
    model, alone = evaluated(), net(0)
    pretrained, seen = list(net(1).parameters()), []
    model[0].register_forward_hook(lambda *_: seen.append(rft.deviation(model.parameters(), pretrained)))
    model[0].register_forward_hook(lambda *_: seen.append(rft.project(model.parameters(), pretrained, 0.3)))
    assert torch.equal(output(model), alone(X))
    torch.testing.assert_close(seen[0], rft.deviation(alone.parameters(), pretrained))
    for got, want in zip(seen[1], rft.project(alone.parameters(), pretrained, 0.3), strict=True):
        torch.testing.assert_close(got.full_tensor(), want)


def test_copies_that_were_freed():
    """As parameters, and as anchors. Their shards are there."""
    model, pretrained = evaluated(), evaluated(1)
    copies, anchors = list(model.parameters()), list(pretrained.parameters())
    model.reshard()
    pretrained.reshard()
    want = rft.deviation(net(0).parameters(), net(1).parameters())
    torch.testing.assert_close(rft.deviation(copies, anchors), want)
    tpgm = rft.TPGM([(str(k), copy) for k, copy in enumerate(copies)])
    rft.interpolate_(copies, anchors, 0.5)
    torch.testing.assert_close(rft.deviation(copies, anchors), want / 2)
    assert all(map(torch.equal, tpgm._params, model.parameters()))


def test_an_optimizer_around_another():
    """Its parameters are the other's, which cannot be exchanged. Those of a new group can."""
    model = evaluated()
    refused = r"parameter '0\.weight' is an unsharded copy.*; call reshard\(\)"
    with pytest.raises(ValueError, match=refused):
        rft.Anchored(torch.optim.SGD(model.named_parameters(), lr=0.1))
    model.reshard()
    named = list(model.named_parameters())
    optimizer = rft.Anchored(torch.optim.SGD(named[:1], lr=0.1))
    output(model)
    optimizer.add_param_group({"params": list(model.named_parameters())[1:]})
    held = [param for group in optimizer.param_groups for param in group["params"]]
    assert all(a is b for a, (_, b) in zip(held, named, strict=True))


def test_one_parameter_in_two_forms():
    model = evaluated()
    copy = model[0].weight
    optimizer = rft.AdamSPD([copy])
    assert optimizer.param_groups[0]["params"][0] is model[0].weight is not copy
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": copy})
