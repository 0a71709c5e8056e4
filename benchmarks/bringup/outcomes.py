"""A plugin of pytest: it tells the outcome of each test at once, and leaves some tests to other processes.

BRINGUP_SHARD=2/8 pytest -p benchmarks.bringup.outcomes        the third of eight shares of the tests
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest

from .items import BROKEN, SHARD, WORDS, Log, breaks

_log = Log()
_found: dict[str, str] = {}


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    place, shares = map(int, os.environ.get(SHARD, "0/1").split("/"))
    mine = [item for k, item in enumerate(items) if k % shares == place and item.nodeid not in _log.begun]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(mine)])
    items[:] = mine


def pytest_runtest_logstart(nodeid: str) -> None:
    _found.clear()
    _found["outcome"] = "ok"
    _log.begin(nodeid)


def pytest_runtest_logreport(report: Any) -> None:
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        why = crash.message if crash else report.longreprtext
        _found.update(outcome="failed", why=why[:WORDS], broken="yes" if breaks(report.longreprtext) else "")
    elif report.skipped and _found["outcome"] == "ok":
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _found.update(outcome="skipped", why=why[:WORDS])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: Any) -> Iterator[None]:
    """Ends the process after a test that broke it, when the terminal has shown why."""
    result = yield
    broken = _found.pop("broken", "")
    _log.end(item.nodeid, **_found)
    if broken:
        os._exit(BROKEN)
    return result
