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
    parser.addoption("--seconds", default=0.8, type=float, help="that a contest takes, unless a few rounds take longer")
    parser.addoption(
        "--patience", default=4, type=float, help="seconds to wait until other programs let the machine go"
    )
    parser.addoption("--checked", action="store_true", help="another process has held the steps to the oracle")
    parser.addoption("--smoke", action="store_true", help="two rounds of everything small: does it run?")


def pytest_configure(config):
    config.addinivalue_line("markers", "once(reason): measured in one process, for that reason")
    config.addinivalue_line("markers", "once_on_cpu(reason): the same, where a GPU does not take long")
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
def _right_before_fast(request, device):
    """Nothing is timed while a step is wrong."""
    if request.config.getoption("--checked"):
        return
    try:
        check_results(device)
    except AssertionError as error:
        pytest.exit(f"nothing is timed, since a step is not the oracle's: {error}", returncode=3)


@pytest.fixture(scope="session")
def patience(request):
    """The seconds that are left for all contests of this process."""
    return [0.0 if request.config.getoption("--smoke") else request.config.getoption("--patience")]


@pytest.fixture
def ring(request, benchmark, device, patience):
    """Where contests take place. A benchmark's group is the question that it answers."""
    benchmark.group = request.node.originalname.removeprefix("bench_")
    if marks := [*request.node.iter_markers("once"), *request.node.iter_markers("once_on_cpu")]:
        benchmark.extra_info["once"] = marks[0].args[0]
    option = request.config.getoption
    ring = Ring(benchmark, device, option("--seconds"), option("--smoke"), patience[0])
    yield ring
    patience[0] = ring.patience


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
