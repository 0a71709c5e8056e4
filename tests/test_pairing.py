"""Where the two sides are not alike: one prefix before all names, and θ₀ in a file."""

import pytest
import torch
from torch import nn

from robustft_kernels.finetune.tpgm import TPGM
from robustft_kernels.finetune.wise import wise_ft, wise_ft_
from tests.test_wise import pair, same_bits


@pytest.mark.parametrize("longer", [0, 1])
def test_one_prefix(longer):
    """A base model and a model with a head: "bert." stands before all names of one side."""
    models = list(pair())
    expected = list(wise_ft(*models, 0.3, buffers="pretrained", exclude="head").values())
    models[longer] = nn.ModuleDict({"bert": models[longer], "classifier": nn.Linear(2, 2)})
    given = dict(exclude=["head", "bert.head", "classifier"])
    out = wise_ft(*models, 0.3, buffers="pretrained", **given)
    assert len(out) == len(expected) + 2 * longer
    assert all(map(torch.equal, out.values(), expected))
    wise_ft_(models[1], models[0], 0.3, buffers="pretrained", **given)
    assert same_bits(models[1].state_dict(), out)
    with pytest.raises(ValueError, match="lacks"):
        wise_ft(*models, 0.3, **given | {"exclude": "head"})


def test_theta_0_from_a_file(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    first, second = pair()
    first = first.to(memory_format=torch.contiguous_format)
    safetensors.save_file(first.state_dict(), tmp_path / "model.safetensors")
    for path in (tmp_path, str(tmp_path / "model.safetensors")):
        assert same_bits(wise_ft(path, second, 0.3), wise_ft(first, second, 0.3))


def test_tpgm_under_a_prefix():
    """θ₀ of a base model, whose names lack the "bert." of the model with a head."""
    model = nn.ModuleDict({"bert": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    base = {name: param.detach() + 1 for name, param in model["bert"].named_parameters()}
    tpgm = TPGM(model, anchor=base, exclude="head")
    assert all(map(torch.equal, tpgm._anchors, base.values()))
