"""On which device the tests run, on which backends, and in which tier.

pytest -m "not full"    on the CPU; Triton kernels in its interpreter (make test)
pytest -m full          what takes long (make test-full)
pytest                  both
pytest --device cuda    the table of cases on the GPU, and what only a GPU can show (make test-gpu)

A test, or a row of one, is of the full tier if it is marked @pytest.mark.full. Some tests take long in Triton's
interpreter. For these, @pytest.mark.lean(keep=...) leaves the rows whose keep(**parameters) is false to the full tier.
"""

import os
from dataclasses import replace

import pytest
import torch

import robustft_kernels as rft
from robustft_kernels.backends import registry

from .durations import Durations


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"))
    parser.addoption("--at-most", type=float, default=0, metavar="MINUTES", help="of two cores, or the run fails")


def pytest_configure(config):
    config.pluginmanager.register(Durations(config.getoption("--at-most")), "durations")
    if config.getoption("--device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        quicken_interpreter()
    elif missing := registry.BACKENDS["triton"].missing():
        pytest.exit(f"nothing to test on a GPU: {missing}", returncode=0)
    elif fault := registry.BACKENDS["triton"].trial(None):
        pytest.exit(fault, returncode=1)
    else:
        torch.set_default_device("cuda")


def quicken_interpreter():
    """Triton's interpreter patches triton.language at each call of a device function. Once per launch is enough.
    It also looks for integers that overflow, as no compiled kernel does; the hash of stochastic rounding has many.
    Triton 3.6's is mended for newer numpy."""
    if rft.backends()["triton"]:
        return
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    patch, probes = interpreter._patch_builtin, {}

    def patch_once(package, *args):
        if package not in probes:
            probes[package] = next(n for n in dir(package) if tl.core.is_builtin(getattr(package, n)))
        if tl.core.is_builtin(getattr(package, probes[package])):
            patch(package, *args)

    def patch_tensor(tensor, scope, patch=interpreter._patch_lang_tensor):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_builtin = patch_once
    if triton.__version__.startswith("3.6."):  # it takes int() of an array, which numpy refuses since 2.4
        interpreter._patch_lang_tensor = patch_tensor
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)


@pytest.fixture
def device(request):
    """Where the tensors of a test lie."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def _one_thread():
    """Every core has a worker already. Tests about threads set the number of threads themselves."""
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") != "cpu":
        return
    for item in items:
        mark = item.get_closest_marker("lean")
        if mark and item.callspec.params["backend"] == "triton" and not mark.kwargs["keep"](**item.callspec.params):
            item.add_marker(pytest.mark.full)


def pytest_generate_tests(metafunc):
    """Every ready backend except the second form of the Triton one, which test_triton.py holds to the oracle."""
    if "backend" in metafunc.fixturenames:
        device = torch.device(metafunc.config.getoption("--device"))
        names = [name for name in registry.BACKENDS if name != "triton_tickets"]
        metafunc.parametrize("backend", [n for n in names if not registry.objection_to(n, device, {torch.float32})])
