"""Where modules are found: under their names of 0.3.0 too, and the kernels in a checkout that is not installed."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from robustft_kernels._import_paths import MOVED

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("old", MOVED)
def test_old_modules_are_the_new_ones(old):
    sys.modules.pop(f"robustft_kernels.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"robustft_kernels\.{old} is now robustft_kernels\.{MOVED[old]}"):
        module = importlib.import_module(f"robustft_kernels.{old}")
    new = importlib.import_module(f"robustft_kernels.{MOVED[old]}")
    assert module is new
    assert new.__spec__.name == f"robustft_kernels.{MOVED[old]}"


def test_unknown_modules_are_still_unknown():
    with pytest.raises(ModuleNotFoundError, match=r"robustft_kernels\.magic"):
        importlib.import_module("robustft_kernels.magic")


def test_the_kernels_are_found_in_a_checkout(tmp_path):
    """A link to the package stands for a checkout of which nothing is installed. The kernels lie beside it."""
    pytest.importorskip("triton")
    for folder in ("robustft_kernels", "triton_kernels"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    program = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in repr(f)]\n"
        "import robustft_kernels.triton_kernels.launch as launch; print(launch.__file__)"
    )
    out = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr[-2000:]
    assert out.stdout.strip().endswith("triton_kernels/launch.py")
