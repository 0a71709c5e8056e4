"""The account of CPU seconds: by file, summed over workers. A limit makes the run fail."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from . import durations as module
from .durations import REST, Durations


def session(dist="no", **config):
    return SimpleNamespace(exitstatus=0, config=SimpleNamespace(getoption=lambda *_: dist, **config))


def run_one(durations, file, work):
    running = durations.pytest_runtest_protocol(SimpleNamespace(location=(file, 0, "")))
    next(running)
    work()
    with pytest.raises(StopIteration):
        running.send(True)


def busy():
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass


def test_a_file_has_the_seconds_of_its_tests_and_of_their_programs():
    durations = Durations(0)
    run_one(durations, "busy", busy)
    run_one(durations, "idle", lambda: time.sleep(0.2))
    program = "import time\nwhile time.process_time() < 0.2: pass"
    run_one(durations, "program", lambda: subprocess.run([sys.executable, "-c", program], check=True))
    assert 0.15 < durations.seconds["busy"] < 0.5
    assert durations.seconds["idle"] < 0.1
    assert durations.seconds["program"] > 0.15
    assert durations.tests == {"busy": 1, "idle": 1, "program": 1}


def test_workers_tell_their_controller():
    controller = Durations(0)
    for _ in range(2):
        worker = Durations(0)
        run_one(worker, "busy", busy)
        ended = session(workeroutput={})
        worker.pytest_sessionfinish(ended)
        assert ended.config.workeroutput["durations"][0][REST] > 0
        controller.pytest_testnodedown(SimpleNamespace(workeroutput=ended.config.workeroutput))
    controller.pytest_testnodedown(SimpleNamespace())  # one that has crashed
    assert controller.tests["busy"] == 2
    assert controller.seconds["busy"] > 0.3
    told = controller.minutes
    controller.pytest_sessionfinish(session("worksteal"))
    assert controller.minutes > told, "its own seconds are added"


def test_minutes_are_of_a_standard_core(monkeypatch):
    """A core at half the speed has twice the minutes. Samples of all workers count alike, and one is taken in time."""
    monkeypatch.setattr(module, "sample", lambda: 0.02)
    worker = Durations(0)
    worker.sampled -= module.EVERY
    run_one(worker, "busy", busy)
    assert worker.samples == [0.02, 0.02]
    ended = session(workeroutput={})
    worker.pytest_sessionfinish(ended)
    monkeypatch.setattr(module, "sample", lambda: 0.005)
    controller = Durations(0)
    controller.pytest_testnodedown(SimpleNamespace(workeroutput=ended.config.workeroutput))
    assert controller.speed == pytest.approx(3 / (2 * 2 + 0.5))
    assert controller.minutes == pytest.approx(controller.minutes_here * controller.speed)


@pytest.mark.parametrize(("limit", "status"), [(0, 0), (1e6, 0), (1e-6, pytest.ExitCode.TESTS_FAILED)])
def test_a_run_beyond_its_limit_fails(limit, status):
    durations, ended = Durations(limit), session()
    run_one(durations, "busy", busy)
    durations.pytest_sessionfinish(ended)
    assert ended.exitstatus == status
