"""The benchmarks' whole iterations, on models that are cut short."""

import pytest

from robustft_kernels import ops
from tests.test_benchmarks import smoke

pytest.importorskip("timm")


@pytest.mark.skipif(bool(ops.NATIVE_MISSING), reason=ops.NATIVE_MISSING)
def test_images_a_second(tmp_path):
    (row,) = smoke("end_to_end and ViT", tmp_path).rows
    assert set(row.contenders) == {"torch fused", "AdamSPD, eager", "AdamSPD"}
    assert (row["items"], row["unit"]) == (2, "images")
