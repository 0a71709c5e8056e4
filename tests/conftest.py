import pytest
import torch

from robustft_kernels import ops


@pytest.fixture(autouse=True)
def _two_threads():
    """More than one thread wherever the machine has them, and the same number for every test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        ready = [name for name, missing in ops.backends().items() if not missing]
        metafunc.parametrize("backend", ready)
