"""On which device the tests run, on which backends, and in which tier.

pytest -m "not (full or exhaustive)"   on the CPU; Triton kernels in its interpreter (make test)
pytest -m full                         what takes long (make test-full)
pytest -m exhaustive                   all of what those two take a sample of (make test-exhaustive)
pytest                                 everything
pytest --device cuda                   the table of cases on the GPU, and what only a GPU can show (make test-gpu)

On a GPU the backends stand side by side. A test that names one is skipped where that is not ready.

A test, or a row of one, is of the full tier if it is marked @pytest.mark.full. Some tests take long in Triton's
interpreter. For these, @pytest.mark.lean(keep=...) leaves the rows whose keep(**parameters) is false to the full tier:
those of the Triton backend, and all if the test is of no other.
"""

import importlib.util
import os
from dataclasses import replace

import pytest
import torch

import robustft_kernels as rft
from robustft_kernels.backends import registry
from robustft_kernels.finetune import projection
from robustft_kernels.step.sweep_cache import SweepCache

from .durations import Durations

FORMS = ("cuda", "triton", "triton_tickets")  # the backends of a GPU
CHOSEN = ("cuda", "triton")  # those that "auto" may take there


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"))
    parser.addoption("--at-most", type=float, default=0, metavar="MINUTES", help="of two cores, or the run fails")


def pytest_configure(config):
    config.pluginmanager.register(Durations(config.getoption("--at-most")), "durations")
    if config.getoption("--device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        quicken_interpreter()
    else:
        need_a_backend()
        torch.set_default_device("cuda")


def need_a_backend():
    """Ends the run if no backend is ready for a GPU. If one is there, and cannot run, that is a failure."""
    found = [registry.BACKENDS[name] for name in CHOSEN]
    reasons = {of.name: of.missing() or of.trial(None) for of in found}
    if all(reasons.values()):
        told = "; ".join(f"{name}: {why}" for name, why in reasons.items())
        pytest.exit(f"nothing to test on a GPU: {told}", returncode=0 if all(of.missing() for of in found) else 1)


class NeedsTriton(pytest.Module):
    """A file of tests that imports Triton, where there is none."""

    def collect(self):
        pytest.skip(registry.BACKENDS["triton"].missing())


def pytest_pycollect_makemodule(module_path, parent):
    if module_path.name.startswith("test_triton") and importlib.util.find_spec("triton") is None:
        return NeedsTriton.from_parent(parent, path=module_path)
    return None


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


def skip_unless_ready(name, device):
    if why := registry.objection_to(name, device, {torch.float32}):
        pytest.skip(f"{name}: {why}")


@pytest.fixture(params=FORMS)
def form(request, device):
    """Each backend of a GPU."""
    skip_unless_ready(request.param, device)
    return request.param


@pytest.fixture
def taken(request, device, monkeypatch):
    """What "auto" takes: on a GPU, each backend that it may take, and on the CPU its own choice."""
    name = request.param
    if name == "auto":
        return registry.choose_backend(name, device, {torch.float32}).name
    skip_unless_ready(name, device)
    take(name, monkeypatch)
    return name


def take(name, monkeypatch):
    """Makes "auto" take a backend. What projections keep is another's, so they begin anew."""
    for other, backend in registry.BACKENDS.items():
        if other != name:
            passed_over = replace(backend, not_chosen=lambda: "it is another's turn in this test")
            monkeypatch.setitem(registry.BACKENDS, other, passed_over)
    for kept in ("SWEEPS", "SWEEPS_OF_COPIES"):
        monkeypatch.setattr(projection, kept, SweepCache())
    monkeypatch.setattr(projection.Ball.__init__, "__defaults__", (projection.SWEEPS,))


@pytest.fixture
def mesh_of_one():
    """A device mesh of this process alone."""
    if not torch.distributed.is_available():
        pytest.skip("torch without torch.distributed")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


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
        params = item.callspec.params if mark else {}
        if mark and params.get("backend", "triton") == "triton" and not mark.kwargs["keep"](**params):
            item.add_marker(pytest.mark.full)


def pytest_generate_tests(metafunc):
    """Every ready backend except the second form of the Triton one, which test_triton.py holds to the oracle."""
    device = torch.device(metafunc.config.getoption("--device"))
    if "taken" in metafunc.fixturenames:
        metafunc.parametrize("taken", CHOSEN if device.type == "cuda" else ["auto"], indirect=True)
    if "backend" in metafunc.fixturenames:
        names = [name for name in registry.BACKENDS if name != "triton_tickets"]
        metafunc.parametrize("backend", [n for n in names if not registry.objection_to(n, device, {torch.float32})])
