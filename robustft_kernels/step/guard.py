"""Steps that are whole, or known not to be."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGALRM") if hasattr(signal, name)]


class StepGuard:
    """Knows whether a step was broken off between its first write and its last.

    Weights, moments and learned numbers then belong to different steps. No further step is made of them, and they are
    not saved.
    """

    def __init__(self) -> None:
        self._torn = False

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around all writes of a step that is more than one call of a backend."""
        with uninterrupted():
            self._torn = True
            yield
            self._torn = False

    def broke_off(self, torn: bool) -> None:
        """Notes whether a step was broken off."""
        self._torn = torn

    def check(self) -> None:
        """Raises RuntimeError if a step was broken off."""
        if self._torn:
            raise RuntimeError(
                "an earlier step of this optimizer was broken off half-way (by a process that died, a timeout, an "
                "error), so that weights and state do not belong together; load the last checkpoint of both, the "
                "optimizer's by load_state_dict"
            )


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Has Ctrl-C wait for the end of the block. A second one does not wait.

    It is about signals that raise KeyboardInterrupt in this thread. A handler of the user's is left as it is.
    """
    waiting = []
    if threading.current_thread() is threading.main_thread():
        waiting = [of for of in INTERRUPTS if signal.getsignal(of) is signal.default_int_handler]
    came = 0

    def wait(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came += 1
        if came > 1:
            signal.default_int_handler(number, frame)

    try:
        for of in waiting:
            signal.signal(of, wait)
        yield
    finally:
        for of in waiting:
            signal.signal(of, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt
