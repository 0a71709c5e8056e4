"""How the benchmarks run: on which device, and how many rounds. Never while results are wrong, or beside other work."""

import gc

import pytest
import torch

from robustft_kernels.testing import CASES, SETTINGS, Stepper, assert_same_step

from .contenders import versions
from .contest import Ring
from .machine import describe, free_memory, refusal, serving


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"))
    parser.addoption("--threads", default=2, type=int)
    parser.addoption("--seconds", default=3, type=float, help="that a contest takes, unless five rounds take longer")
    parser.addoption("--smoke", action="store_true", help="two rounds of everything small: does it run?")


def pytest_configure(config):
    if why := refusal(torch.device(config.getoption("--device"))):
        pytest.exit(f"nothing to measure: {why}", returncode=0)


def pytest_benchmark_update_machine_info(config, machine_info):
    device = torch.device(config.getoption("--device"))
    machine_info.clear()
    machine_info.update(describe(device), packages=versions(), threads=config.getoption("--threads"))


def check_results(device, methods=(("spd", None), ("ftp", None), ("project", "mars"))):
    """Raises AssertionError if a backend's steps are not the oracle's. Each that may be timed is asked."""
    for backend in (name for name, why in serving(device).items() if not why):
        for method, norm in methods:
            for settings in (SETTINGS[0], SETTINGS[-1]):
                got = Stepper(CASES, settings, method, torch.float32, device=device, norm=norm)
                for _ in range(2):
                    grads, before = got.grads(), got.clone()
                    want = before.clone()
                    want.run_oracle(grads)
                    got.run(backend, grads)
                    assert_same_step(got, want, before, grads)


@pytest.fixture(scope="session")
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session", autouse=True)
def _right_before_fast(device):
    """Nothing is timed while a step is wrong."""
    try:
        check_results(device)
    except AssertionError as error:
        pytest.exit(f"nothing is timed, since a step is not the oracle's: {error}", returncode=3)


@pytest.fixture
def ring(request, benchmark, device):
    """Where contests take place. A benchmark's group is the question that it answers."""
    smoke = request.config.getoption("--smoke")
    benchmark.group = request.node.originalname.removeprefix("bench_")
    return Ring(benchmark, device, request.config.getoption("--seconds"), smoke, 0 if smoke else 60)


@pytest.fixture(autouse=True)
def _threads(request):
    torch.set_num_threads(request.config.getoption("--threads"))
    yield
    torch.compiler.reset()  # it would keep what compiled steps have seen
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@pytest.fixture
def room(device):
    """Skips a benchmark that this machine has no memory for."""

    def check(needed):
        free = free_memory(device)
        if needed > free:
            pytest.skip(f"needs {needed / 1e9:.0f} GB of memory, of which {free / 1e9:.0f} are free")

    return check
