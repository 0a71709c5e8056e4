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
