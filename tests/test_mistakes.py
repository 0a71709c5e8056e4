"""Typical mistakes of a first trial. Each is answered by a message that says what to do."""

import inspect
import warnings

import pytest
import torch
from torch import nn

import robustft_kernels as rft
from robustft_kernels.core.mistakes import near


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def other():
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))


def same_iterator_twice(m):
    params = m.parameters()
    rft.AdamSPD([{"params": params}, {"params": params, "method": "none"}])


def used_up(m):
    params = m.parameters()
    rft.AdamSPD(params)
    rft.AdamSPD(params)


def frozen(m):
    rft.AdamSPD(m.requires_grad_(False).parameters()).step()


def body_of(state):
    return {name: of for name, of in state.items() if name.startswith("0.")}


# What is written, what is raised, and what the message has to say, the remedy last.
MISTAKES = {
    "wrong keyword": (lambda m: rft.AdamSPD(m.parameters(), strenght=1.0), TypeError, ["write 'strength'"]),
    "another program's keyword": (
        lambda m: rft.SGDSPD(m.parameters(), learning_rate=1e-3), TypeError, ["'learning_rate'", "write 'lr'"],
    ),
    "unknown keyword": (
        lambda m: rft.AdamFTP(m.parameters(), fused=True), TypeError, ["AdamFTP has no argument 'fused'", "radius_lr"],
    ),
    "lr as text": (lambda m: rft.AdamSPD(m.parameters(), lr="1e-3"), TypeError, ["lr", "'1e-3'", "float()"]),
    "lr as text in a group": (
        lambda m: rft.AdamSPD([{"params": m.parameters(), "lr": "1e-3"}]), TypeError, ["lr", "'1e-3'", "float()"],
    ),
    "no lr": (lambda m: rft.AdamSPD(m.parameters(), lr=None), ValueError, ["lr must be finite and at least 0"]),
    "no eps": (lambda m: rft.AdamSPD(m.parameters(), eps=None), ValueError, ["eps must be finite and at least 0"]),
    "no strength": (
        lambda m: rft.AdamPGM(m.parameters(), radius=1.0, strength=None), ValueError, ["strength must be finite"],
    ),
    "one beta": (
        lambda m: rft.AdamSPD(m.parameters(), betas=0.9), ValueError, ["betas must be two numbers, such as (0.9"],
    ),
    "a list of one radius": (
        lambda m: rft.AdamPGM(m.parameters(), radius=[1.0]), ValueError, ["1 radii for 4 parameters", "or a mapping"],
    ),
    "model for parameters": (rft.AdamSPD, TypeError, ["params is a model (Sequential)", "give model.parameters()"]),
    "model in a group": (lambda m: rft.AdamSPD([{"params": m}]), TypeError, ["give model.parameters()"]),
    "state dict for parameters": (
        lambda m: rft.AdamSPD(m.state_dict()), TypeError, ["params is a mapping", "model.named_parameters()"],
    ),
    "iterator used up": (used_up, ValueError, ["empty parameter list", "call it anew"]),
    "iterator in two groups": (same_iterator_twice, ValueError, ["two groups have the same iterator", "anew"]),
    "group without params": (
        lambda m: rft.AdamSPD([{"param": m.parameters()}]), ValueError, ["no 'params'", "{'params': model.parameters"],
    ),
    "misspelt key of a group": (
        lambda m: rft.AdamSPD([{"params": m.parameters(), "metod": "none"}]), ValueError, ["'metod'", "write 'method'"],
    ),
    "misspelt key of a wrapped group": (
        lambda m: rft.Anchored(torch.optim.AdamW([{"params": m.parameters(), "strenght": 2.0}])), ValueError,
        ["'strenght'", "write 'strength'"],
    ),
    "misspelt key of a late group": (
        lambda m: rft.AdamSPD(m[0].parameters()).add_param_group({"params": m[1].parameters(), "anchors": "zero"}),
        ValueError, ["'anchors'", "write 'anchor'"],
    ),
    "misspelt method": (
        lambda m: rft.AnchoredAdamW(m.parameters(), method="sdp"), ValueError, ["'sdp'", "choose one of 'none', 'spd'"],
    ),
    "radius missing": (lambda m: rft.AdamPGM(m.parameters()), ValueError, ["'project' needs radius, finite and above"]),
    "model for anchors": (
        lambda m: rft.AdamSPD(m.parameters(), anchor=m), TypeError, ["anchor is a model", "give its state_dict()"],
    ),
    "model for a group's anchors": (
        lambda m: rft.AdamSPD([{"params": m.parameters(), "anchor": m}]), TypeError, ["give its state_dict()"],
    ),
    "model for a wrapper's anchors": (
        lambda m: rft.Anchored(torch.optim.AdamW(m.parameters()), anchor=m), TypeError, ["give its state_dict()"],
    ),
    "tensor for anchors": (
        lambda m: rft.AdamSPD(m.parameters(), anchor=torch.zeros(4)), TypeError, ["anchor is a tensor", "give a list"],
    ),
    "pairs for anchors": (
        lambda m: rft.AdamSPD(m.named_parameters(), anchor=m.named_parameters()), TypeError,
        ["'0.weight' is a tuple", "dict(model.named_parameters())"],
    ),
    "anchors by name, parameters without": (
        lambda m: rft.AdamSPD(m.parameters(), anchor=m.state_dict()), ValueError, ["pass model.named_parameters()"],
    ),
    "anchors of another model": (
        lambda m: rft.AdamSPD(m.named_parameters(), anchor=other().state_dict()), ValueError,
        ["'0.weight' has shape (5, 3), the parameter (4, 3)", "anchors of this very model"],
    ),
    "head not excluded under FTP": (
        lambda m: rft.AdamFTP(m.named_parameters(), anchor=body_of(m.state_dict())), ValueError,
        ["lacks '1.weight', '1.bias'", "a group of its own with method='none'"],
    ),
    "weights themselves as anchors": (
        lambda m: rft.AdamSPD(m.parameters(), anchor=list(m.parameters())), ValueError, ["would move along; clone it"],
    ),
    "FTP around another optimizer": (
        lambda m: rft.Anchored(torch.optim.AdamW(m.parameters()), method="ftp"), ValueError, ["use AnchoredAdamW"],
    ),
    "a class to wrap": (lambda m: rft.Anchored(torch.optim.AdamW), TypeError, ["wraps a torch.optim.Optimizer"]),
    "TPGM without validation data": (
        lambda m: rft.TPGM(m).update(lambda batch: m(batch).sum(), None), ValueError,
        ["batches is empty; at least one validation batch"],
    ),
    "TPGM over parameters": (lambda m: rft.TPGM(m.parameters()), TypeError, ["needs the model, or pairs of name"]),
    "TPGM over an optimizer": (
        lambda m: rft.TPGM(rft.AdamSPD(m.parameters())), TypeError, ["needs the model", "got AdamSPD"],
    ),
    "TPGM with a model for anchors": (lambda m: rft.TPGM(m, anchor=m), TypeError, ["give its state_dict()"]),
    "deviation of a model": (lambda m: rft.deviation(m, m), TypeError, ["params is a model", "model.parameters()"]),
    "deviation from a model": (
        lambda m: rft.deviation(m.parameters(), m), TypeError, ["anchors is a model", "model.parameters()"],
    ),
    "deviation of a state dict": (lambda m: rft.deviation(m.state_dict(), None), TypeError, ["give lists of tensors"]),
    "everything frozen": (frozen, RuntimeWarning, ["step() changes nothing", "frozen; set requires_grad=True"]),
    "step without backward": (
        lambda m: rft.AdamSPD(m.parameters()).step(), RuntimeWarning, ["none of the 4", "loss.backward() before"],
    ),
    "wrapped step without backward": (
        lambda m: rft.Anchored(torch.optim.AdamW(m.parameters())).step(), RuntimeWarning, ["loss.backward()"],
    ),
    "strength as weight decay": (
        lambda m: rft.AdamSPD(m.parameters(), weight_decay=1.4), UserWarning,
        ["weight_decay=1.4 is decay toward zero", "give strength=1.4"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_by_what_to_do(mistake):
    write, kind, words = MISTAKES[mistake]
    with pytest.warns(kind) if issubclass(kind, Warning) else pytest.raises(kind) as caught:
        write(model())
    (message,) = [str(of.message) for of in caught] if issubclass(kind, Warning) else [str(caught.value)]
    assert all(word in message for word in words), message


USERS = (
    "name", "lr_scale", "lr_mult", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "layer_id",
    "fused", "foreach", "differentiable", "decoupled_weight_decay", "use_muon", "eps2", "weight_decay_mult", "rank",
    "lr_decay", "beta1", "label", "normalize", "momentum_decay", "rho", "scale_parameter", "warmup_init", "d_coef",
    "group_name",
)  # fmt: skip


def test_keys_of_the_users_own_are_kept():
    """torch.optim takes any key, and timm, schedulers and other optimizers put theirs there."""
    for cls in (rft.AdamSPD, rft.SGDSPD):
        of = cls([{"params": model().parameters(), **dict.fromkeys(USERS, 1)}])
        assert set(USERS) <= set(of.param_groups[0])
    wrapped = torch.optim.AdamW([{"params": model().parameters(), **dict.fromkeys(USERS, 1)}])
    assert set(USERS) <= set(rft.Anchored(wrapped).param_groups[0])


def test_groups_of_every_optimizer_of_torch_are_taken():
    params = [nn.Parameter(torch.zeros(3, 4))]
    ours = rft.AdamSPD(params).defaults
    for cls in vars(torch.optim).values():
        if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer:
            slips = {key for key in cls(params).defaults if near(key, ours) not in ("", key)}
            assert slips <= {"etas"}, cls  # Rprop's, which mean nothing to AdamW


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("metod", "method"), ("methods", "method"), ("strenght", "strength"), ("raduis", "radius"), ("nrom", "norm"),
        ("LR", "lr"), ("weight-decay", "weight_decay"), ("weigth_decay", "weight_decay"), ("beta", "betas"),
        ("anchor_devcie", "anchor_device"), ("radius_beta", "radius_betas"), ("maximise", "maximize"),
    ],
)  # fmt: skip
def test_slips_are_known(key, meant):
    assert near(key, rft.AdamSPD(model().parameters()).defaults) == meant


def test_a_step_without_gradients_is_told_once_and_only_if_there_never_was_one(recwarn):
    warnings.simplefilter("always")
    m = model()
    optimizer = rft.AdamSPD(m.parameters())
    optimizer.step()
    optimizer.step()
    assert len(recwarn) == 1
    m(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert len(recwarn) == 1


def test_steps_that_usually_find_no_gradient_are_not_told():
    """Closures may skip a batch. A step in the backward pass leaves none."""
    m = model()
    for optimizer in (rft.AdamSPD(m.parameters()), rft.Anchored(torch.optim.AdamW(m.parameters()))):
        assert optimizer.step(lambda: 1.0) == 1.0
    optimizer = rft.AdamSPD(m.parameters())
    with rft.StepInBackward(optimizer):
        m(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    optimizer = rft.AdamSPD([{"params": []}])  # as a process has whose parameters are elsewhere
    optimizer.step()


def test_decay_is_told_once_and_only_of_methods_with_a_strength():
    m = model()
    groups = [{"params": [p]} for p in m.parameters()]
    with pytest.warns(UserWarning, match="strength=1.4") as caught:
        rft.AdamSPD(groups, weight_decay=1.4)
    assert len(caught) == 1
    rft.AnchoredAdamW(m.parameters(), weight_decay=1.4)
    rft.AdamPGM(m.parameters(), weight_decay=1.4, radius=1.0)
    rft.AdamSPD(m.parameters(), weight_decay=0.3)
