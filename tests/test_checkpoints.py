"""Checkpoints of earlier versions load, and training goes on as it would have there."""

from pathlib import Path

import pytest
import torch

from . import checkpoints

FILES = sorted((Path(__file__).parent / "data").glob("*.pt"))


@pytest.mark.parametrize("name", checkpoints.CASES)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_earlier_checkpoints_go_on(file, name):
    """Equal up to the roundings of other processors. What is random is a function of the saved seed."""
    saved = torch.load(file, weights_only=True)[name]
    after = checkpoints.continued(name, saved)
    for key, weights in saved["after"].items():
        assert not torch.equal(weights, saved["weights"][key]), f"{key} has not moved"
        tolerance = 4 * torch.finfo(weights.dtype).eps
        torch.testing.assert_close(
            after[key], weights, rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_there_are_checkpoints_of_0_3_0():
    assert "0.3.0" in [file.stem for file in FILES]
