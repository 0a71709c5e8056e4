"""What help(), signatures and repr tell of the public optimizers."""

import copy
import inspect

import pytest
import torch
from torch import nn

import robustft_kernels as rft

NAMED = {"AdamSPD": "spd", "AdamL2SP": "l2sp", "AdamFTP": "ftp", "AdamPGM": "project", "AnchoredAdamW": "none"}
NAMED |= {"SGDSPD": "spd", "SGDL2SP": "l2sp", "SGDFTP": "ftp", "SGDPGM": "project", "AnchoredSGD": "none"}


@pytest.mark.parametrize("name", NAMED)
def test_signatures_have_every_argument(name):
    cls = getattr(rft, name)
    signature = inspect.signature(cls)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    assert {"lr", "weight_decay", "strength", "radius", "anchor", "backend"} <= set(signature.parameters)
    optimizer = cls([nn.Parameter(torch.zeros(3))], radius=1.0)
    (group,) = optimizer.param_groups
    assert group["method"] == NAMED[name]
    for key, parameter in signature.parameters.items():
        assert parameter.annotation is not inspect.Parameter.empty
        if key in group and key not in ("params", "method", "radius"):
            assert group[key] == parameter.default, key
    assert cls([nn.Parameter(torch.zeros(3))], method="none").param_groups[0]["method"] == "none"
    assert type(copy.deepcopy(optimizer)) is cls


def test_users_classes_keep_their_own_arguments():
    class Mine(rft.AdamSPD):
        def __init__(self, params, *, depth, **options):
            super().__init__(params, **options)
            self.depth = depth

    assert Mine([nn.Parameter(torch.zeros(3))], depth=2, lr=1e-2).depth == 2


def test_repr_of_an_optimizer_tells_backend_and_anchors():
    model = nn.Linear(3, 2)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "method": "none"}]
    optimizer = rft.AdamSPD(groups, backend="reference")
    told = repr(optimizer)
    assert told.startswith("AdamSPD (\nBackend: reference (chosen at the first step)\n")
    assert "Parameter Group 0: anchors for 1 of 1 parameters\n" in told
    assert "Parameter Group 1: anchors for 0 of 1 parameters\n" in told
    assert "    method: none\n" in told
    model(torch.ones(1, 3)).sum().backward()
    auto = rft.AdamSPD(groups)
    auto.step()
    serves = "native" if not rft.backends()["native"] else "reference"
    assert f"Backend: auto ({serves})\n" in repr(auto)


def test_repr_of_a_wrapper_tells_anchors():
    wrapped = rft.Anchored(torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=0.1))
    assert repr(wrapped).startswith("Anchored(SGD (\nParameter Group 0: anchors for 2 of 2 parameters\n")
    assert "    method: spd\n" in repr(wrapped)


def test_repr_of_tpgm():
    told = repr(rft.TPGM(nn.Linear(3, 2), norm="mars", lr=0.1))
    assert told == "TPGM(2 parameters, norm='mars', anchor='initial', lr=0.1, radius_penalty=0.0, tv=0.0, calls=0)"
