"""Frozen parameters have no copy of their weights. They take their anchor when they are trained first."""

import copy
import io

import pytest
import torch
from torch import nn

import robustft_kernels as rft


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))


def adam(model, **options):
    return rft.AdamSPD(model.named_parameters(), lr=1e-2, **options)


def around(model, **options):
    return rft.Anchored(torch.optim.AdamW(model.named_parameters(), lr=1e-2), **options)


def train(model, optimizer, steps=3):
    for t in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=torch.Generator().manual_seed(t))).square().mean().backward()
        optimizer.step()


def anchors_of(model, optimizer):
    return [optimizer.state[p]["anchor"] for p in model.parameters() if "anchor" in optimizer.state.get(p, {})]


@pytest.fixture(params=[adam, around], ids=["own", "around"])
def make(request):
    return request.param


def test_frozen_weights_cost_nothing(make):
    model = net()
    model[0] = nn.Linear(6, 6)
    model[0].requires_grad_(False)
    optimizer = make(model)
    assert len(anchors_of(model, optimizer)) == 2
    train(model, optimizer)
    assert len(anchors_of(model, optimizer)) == 2
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    alone = io.BytesIO()
    of_head = nn.Sequential(nn.Identity(), nn.Linear(6, 2))
    trained = make(of_head)
    train(of_head, trained)
    torch.save(trained.state_dict(), alone)
    assert len(saved.getvalue()) < len(alone.getvalue()) + 1000


def test_a_thawed_layer_is_anchored_where_it_began(make):
    """As if it had its anchor from the beginning, bit for bit."""
    results = []
    for frozen in (True, False):
        model = net()
        model[0].requires_grad_(not frozen)
        optimizer = make(model)
        model[0].requires_grad_(False)
        start = [p.detach().clone() for p in model.parameters()]
        train(model, optimizer)
        model[0].requires_grad_(True)
        train(model, optimizer)
        assert all(map(torch.equal, anchors_of(model, optimizer), start))
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *results))


def test_weights_written_while_they_were_frozen_count_and_are_told(make):
    model = net()
    model[0].requires_grad_(False)
    optimizer = make(model)
    train(model, optimizer)
    with torch.no_grad():
        model[0].weight.mul_(2)
    was = model[0].weight.detach().clone()
    model[0].requires_grad_(True)
    with pytest.warns(RuntimeWarning, match="'0.weight' were written while it was frozen.*give anchor=") as caught:
        train(model, optimizer)
    assert len(caught) == 1
    assert torch.equal(optimizer.state[model[0].weight]["anchor"], was)


def test_weights_written_with_the_same_numbers_are_not_told(make):
    """As when a model is loaded again, or evaluated with other weights and put back."""
    model = net()
    model[0].requires_grad_(False)
    optimizer = make(model)
    model[0].load_state_dict({name: of.clone() for name, of in model[0].state_dict().items()})
    model[0].requires_grad_(True)
    train(model, optimizer)


@pytest.mark.parametrize("thaw", ["before", "after"])
def test_a_checkpoint_goes_on(make, thaw):
    """Saved before or after thawing, and loaded into an optimizer that was made frozen, at other weights."""
    model = net()
    start = [p.detach().clone() for p in model.parameters()]
    model[0].requires_grad_(False)
    optimizer = make(model)
    train(model, optimizer)
    if thaw == "before":
        model[0].requires_grad_(True)
        train(model, optimizer)
    weights, saved = {k: v.clone() for k, v in model.state_dict().items()}, copy.deepcopy(optimizer.state_dict())
    other = net()
    other[0].requires_grad_(False)
    resumed = make(other)
    other.load_state_dict(weights)
    resumed.load_state_dict(saved)
    for of, its in ((model, optimizer), (other, resumed)):
        of[0].requires_grad_(True)
        train(of, its)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert all(map(torch.equal, anchors_of(other, resumed), start))


@pytest.mark.parametrize("save_anchors", [False, "digest"])
def test_what_checkpoints_lack_is_kept_from_the_beginning(save_anchors):
    model = net()
    model[0].requires_grad_(False)
    assert len(anchors_of(model, adam(model, save_anchors=save_anchors))) == 4


def test_given_anchors_are_kept_from_the_beginning(make):
    model = net()
    model[0].requires_grad_(False)
    given = {name: p.detach() + 1 for name, p in model.named_parameters()}
    optimizer = make(model, anchor=given)
    assert all(map(torch.equal, anchors_of(model, optimizer), given.values()))


def test_reanchor_takes_what_is_trained_and_what_had_an_anchor(make):
    model = net()
    model[0].requires_grad_(False)
    optimizer = make(model)
    train(model, optimizer)
    optimizer.reanchor()
    assert len(anchors_of(model, optimizer)) == 2
    model[0].requires_grad_(True)
    train(model, optimizer)
    model[0].requires_grad_(False)
    optimizer.reanchor()
    assert all(map(torch.equal, anchors_of(model, optimizer), model.parameters()))


def test_a_step_in_backward_after_thawing():
    model = net()
    model[0].requires_grad_(False)
    optimizer = adam(model)
    start = model[0].weight.detach().clone()
    model[0].requires_grad_(True)
    with rft.StepInBackward(optimizer):
        model(torch.ones(2, 6)).sum().backward()
    assert torch.equal(optimizer.state[model[0].weight]["anchor"], start)


@pytest.mark.parametrize(("options", "dtype"), [({}, torch.bfloat16), ({"anchor_dtype": torch.float16}, torch.float16)])
@pytest.mark.parametrize("written", [False, True])
def test_late_anchors_have_the_dtype_that_was_asked_for(options, dtype, written):
    """An exact one is chosen while the weights are frozen. If they are written then, it is the weights' own, since
    processes may not agree on another any more."""
    model = net().bfloat16().float()
    model[0].requires_grad_(False)
    optimizer = adam(model, **options)
    if written:
        model[0].load_state_dict({name: of.clone() for name, of in model[0].state_dict().items()})
    model[0].requires_grad_(True)
    start = model[0].weight.detach().clone()
    train(model, optimizer)
    anchor = optimizer.state[model[0].weight]["anchor"]
    assert anchor.dtype == (torch.float32 if written and not options else dtype)
    assert torch.equal(anchor.to(torch.float32), start.to(anchor.dtype).float())


def test_an_anchor_that_is_lost_after_thawing_is_told():
    model = net()
    model[0].requires_grad_(False)
    optimizer = adam(model)
    model[0].requires_grad_(True)
    train(model, optimizer)
    del optimizer.state[model[0].weight]
    with pytest.raises(ValueError, match=r"'0\.weight' has lost its anchor"):
        train(model, optimizer)


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own imports
def test_sharded_weights_are_thawed_as_whole_ones_are(mesh):
    from torch.distributed.fsdp import fully_shard

    results = []
    for sharded in (False, True):
        model = net()
        model[0].requires_grad_(False)
        if sharded:
            for layer in (*model, model):
                fully_shard(layer, mesh=mesh)
        optimizer = adam(model)
        for frozen in (True, False):
            for layer in model if sharded else ():
                layer.reshard()
            model[0].requires_grad_(not frozen)
            train(model, optimizer)
        for layer in model if sharded else ():
            layer.reshard()
        held = [*model.parameters(), *anchors_of(model, optimizer)]
        assert len(held) == 8
        results.append([(of.full_tensor() if sharded else of).detach() for of in held])
    assert all(map(torch.equal, *results))
