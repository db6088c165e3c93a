"""A progress line on stderr: done of all, rate, time to go."""

from __future__ import annotations

import sys
import time


class Progress:
    """Call with (done, total). On a terminal one line that is rewritten, else a line each ten seconds.

    The rate leaves out what was done at the first call, e.g. before an interruption.
    """

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._start: tuple[float, int] | None = None
        self._last = 0.0
        self._width = 0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._start is None:
            self._start, self._last = (now, done), now
        terminal = sys.stderr.isatty()
        if done < total and now - self._last < (0.2 if terminal else 10.0):
            return
        self._last = now
        elapsed = now - self._start[0]
        rate = (done - self._start[1]) / elapsed if elapsed > 0 else 0.0
        line = f"{done:,} of {total:,} {self._unit}"
        line += f", {rate:,.0f}/s" if rate >= 1 else ""
        line += f", {_clock((total - done) / rate)} to go" if rate > 0 and done < total else ""
        if terminal:
            print(f"\r{line:<{self._width}}", end="\n" if done == total else "", file=sys.stderr, flush=True)
            self._width = len(line)
        else:
            print(line, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
