"""Stopping a run in order."""

import contextlib
import signal
from collections.abc import Iterator


class Stop:
    """Set when the run is to end after the step in flight."""

    is_set = False


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Turns the first SIGINT or SIGTERM into a flag, so that the step in flight ends and is saved."""
    stop, previous = Stop(), {}

    def handle(signum, frame):
        stop.is_set = True
        signal.signal(signum, previous[signum])  # a second one acts at once

    try:
        for signum in (signal.SIGINT, signal.SIGTERM):
            previous[signum] = signal.signal(signum, handle)
    except ValueError:  # not in the main thread: signals stay with whoever owns it
        pass
    try:
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
