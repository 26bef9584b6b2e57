"""What SIGINT and SIGTERM do while a command runs.

- Both stop it: as KeyboardInterrupt, so that every `finally` runs and no temporary file is left.
- Inside `Interrupts.deferred` the first one is remembered and acknowledged on stderr, and the loop over chunks, or over
  steps of a training, ends when the one at hand is done; a second one stops at once.
- Inside `uninterrupted` both wait until the block is done: for renames that belong together.

Only the main thread of a process can do this; in others all of it does nothing.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPING = b"\nstopping when what is at hand is done; a second signal stops at once\n"


class Interrupts:
    """Handlers for as long as its `with` block runs."""

    def __init__(self):
        self.requested = False  # a stop was asked for
        self._patient = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.requested = self.requested, True
        if again or not self._patient:
            raise KeyboardInterrupt
        with contextlib.suppress(OSError):  # no one listens any more
            os.write(2, STOPPING)  # `print` cannot begin inside a print that was interrupted

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """The first signal is remembered in `requested`; whoever runs the block looks there where it can stop."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Both signals wait until the block is done. For a few renames, not for work."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[tuple[int, FrameType | None]] = []
    before = {number: signal.signal(number, lambda *caught: waiting.append(caught)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number, _ in waiting[:1]:
            signal.raise_signal(number)
