"""What the tests cost: a table of CPU seconds by file, printed at the end, and a limit on their sum.

It counts CPU seconds because they stay the same on a machine that is busy with something else. They do not on one that
is slower, or throttled, by a factor of two within an hour. So the limit is in minutes of a standard core, and the speed
of this one is sampled between tests.

A program that a test runs and waits for counts as the test's. The forks that run the examples of README and docs
(test_demo.py) are not counted. This is a plugin of pytest, which conftest.py registers.
"""

import os
import time
from collections import Counter

import pytest

CORES = 2  # the limit is in minutes of a machine with so many
STANDARD = 10_000_000  # turns of the loop below that a standard core makes in a second
TURNS, EVERY = 100_000, 10  # of a sample, and seconds from one to the next
REST = "imports, collection and pytest itself"


def cpu_seconds():
    """The CPU seconds of this process, and of those that it has waited for."""
    return sum(os.times()[:4])


def sample():
    """The CPU seconds of a loop of so many turns."""
    begin, total = time.process_time(), 0
    for i in range(TURNS):
        total += i * i % 7
    return time.process_time() - begin


class Durations:
    """limit: the minutes that all tests may take, 0 for no limit."""

    def __init__(self, limit):
        self.limit, self.seconds, self.tests = limit, Counter(), Counter()
        self.samples, self.sampled = [sample()], time.monotonic()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        if time.monotonic() > self.sampled + EVERY:
            self.samples.append(sample())
            self.sampled = time.monotonic()
        begin = cpu_seconds()
        try:
            return (yield)
        finally:
            self.seconds[item.location[0]] += cpu_seconds() - begin
            self.tests[item.location[0]] += 1

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        """A worker of pytest-xdist has ended. Its controller adds what the worker counted."""
        seconds, tests, samples = getattr(node, "workeroutput", {}).get("durations", ({}, {}, []))
        self.seconds.update(seconds)
        self.tests.update(tests)
        self.samples += samples

    @pytest.hookimpl(tryfirst=True)  # before the controller waits for its workers: it has their seconds already
    def pytest_sessionfinish(self, session):
        controls = session.config.getoption("dist", "no") != "no"
        self.seconds[REST] += cpu_seconds() - (0 if controls else sum(self.seconds.values()))
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["durations"] = dict(self.seconds), dict(self.tests), self.samples
        elif self.minutes > self.limit > 0:
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED

    @property
    def minutes(self):
        """Of standard cores."""
        return self.minutes_here * self.speed

    @property
    def minutes_here(self):
        return sum(self.seconds.values()) / 60 / CORES

    @property
    def speed(self):
        """Of this core over a standard one."""
        return TURNS / STANDARD * len(self.samples) / sum(self.samples)

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("CPU seconds")
        for file, seconds in self.seconds.most_common():
            terminalreporter.write_line(f"{seconds:8.1f}  {file} ({self.tests[file]})")
        here = f"{self.minutes_here:.1f} here, at {self.speed:.2f} of a standard core's speed"
        line = f"{self.minutes:.1f} minutes of {CORES} cores ({here})"
        if self.minutes > self.limit > 0:
            terminalreporter.write_line(f"{line}: FAILED, since the limit is {self.limit:g}", red=True)
        else:
            terminalreporter.write_line(f"{line}, of {self.limit:g} at most" if self.limit else line)
