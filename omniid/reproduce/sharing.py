"""Several processes at one table: each takes the first thing to do that can be done and that no other is at."""

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

WAIT_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A thing to do once."""

    folder: Path
    """Where it is done; made if it does not exist. Of jobs that share one, one runs at a time."""
    is_done: Callable[[], bool]
    run: Callable[[], object]
    after: Sequence["Job"] = ()
    """What must be done before."""


def share(jobs: Sequence[Job], say: Callable[[str], None]) -> None:
    """Returns when all jobs are done, here or by other processes that share the same ones. What a job raises, `share` does."""
    left, has_said = list(jobs), False
    while left := [job for job in left if not job.is_done()]:
        for job in left:
            if all(one.is_done() for one in job.after) and _run_if_free(job):
                has_said = False
                break
        else:
            if not has_said:
                say("waiting for other processes that work on the same")
                has_said = True
            time.sleep(WAIT_S)


def _run_if_free(job: Job) -> bool:
    with _lock(job.folder) as is_mine:
        if is_mine and not job.is_done():  # it may have been finished since it was asked
            job.run()
        return is_mine


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Whether nobody else holds the folder's lock, which is held until the end then. The kernel frees it, too, when a process
    dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "wb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
