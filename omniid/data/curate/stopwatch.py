"""Where the time of a video goes."""

import time
from collections import Counter


class Stopwatch:
    """Seconds by kind of work: each lap counts from the one before."""

    def __init__(self) -> None:
        self.seconds: Counter = Counter()
        self.frames = 0
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] += now - self._last
        self._last = now

    def frame(self) -> None:
        self.frames += 1
