"""On which device the tests run, and on which backends.

pytest                  on the CPU; Triton kernels in its interpreter
pytest --device cuda    the table of cases on the GPU, and what only a GPU can show (make test-gpu)
"""

import os

import pytest
import torch

from robustft_kernels import ops


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"))


def pytest_configure(config):
    if config.getoption("--device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        quicken_interpreter()
    elif missing := ops.backends()["triton"]:
        pytest.exit(f"nothing to test on a GPU: {missing}", returncode=0)
    else:
        torch.set_default_device("cuda")


def quicken_interpreter():
    """Triton's interpreter patches triton.language at each call of a device function; once a launch is enough."""
    if ops.backends()["triton"]:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch, probes = interpreter._patch_builtin, {}

    def patch_once(package, *args):
        if package not in probes:
            probes[package] = next(n for n in dir(package) if tl.core.is_builtin(getattr(package, n)))
        if tl.core.is_builtin(getattr(package, probes[package])):
            patch(package, *args)

    interpreter._patch_builtin = patch_once


@pytest.fixture
def device(request):
    """Where the tensors of a test lie."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def _two_threads():
    """More than one thread wherever the machine has them, and the same number for every test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def pytest_generate_tests(metafunc):
    """Every ready backend, but for the second form of the Triton one, which test_triton.py holds to the bits of the
    first."""
    if "backend" in metafunc.fixturenames:
        device = torch.device(metafunc.config.getoption("--device"))
        names = [name for name in ops.FASTEST_FIRST if name != "triton_tickets"]
        metafunc.parametrize("backend", [n for n in names if not ops.objection_to(n, device, {torch.float32})])
