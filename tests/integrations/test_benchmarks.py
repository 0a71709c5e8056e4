"""The benchmarks' whole iterations, on models that are cut short."""

import pytest

import robustft_kernels as rft
from tests.test_benchmarks import smoke

pytest.importorskip("timm")


@pytest.mark.skipif(bool(rft.backends()["native"]), reason=rft.backends()["native"])
def test_images_a_second(tmp_path):
    (row,) = smoke("end_to_end and ViT", tmp_path).rows
    assert set(row.contenders) == {"torch fused", "AdamSPD, eager", "AdamSPD"}
    assert (row["items"], row["unit"]) == (2, "images")
