"""Stopping a run in order."""

import contextlib
import os
import signal
from collections.abc import Iterator


class Stop:
    """Set when the run is to end after the step in flight."""

    is_set = False


@contextlib.contextmanager
def stop_on_signal(notice: str = "") -> Iterator[Stop]:
    """Turns the first SIGINT or SIGTERM into a flag, so that the step in flight ends and is saved; says `notice` then."""
    stop, previous = Stop(), {}

    def handle(signum, frame):
        if notice and not stop.is_set:
            os.write(2, f"\n{notice}\n".encode())  # unbuffered: the signal may have come in the middle of a print
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


def leave_signals_to_parent(worker: int) -> None:
    """For the loader's processes: Ctrl-C and torchrun signal the whole group, but the step in flight needs its batch."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
