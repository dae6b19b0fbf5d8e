"""A bar for the epoch that is under way, on a terminal; elsewhere nothing, where each epoch prints its line."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any


class EpochBar:
    """Clips done and to do, clips/s, time left, loss, accuracy, and the share of the time spent waiting for data."""

    def __init__(self, title: str, total: int, done: int, waited: float, *, show: bool) -> None:
        """`done` clips of `total`, and `waited` seconds for data, are from before a resumption."""
        self._bar: Any = None
        self._first, self._waited, self._started = done, waited, time.perf_counter()
        if show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(
                *columns, TextColumn("{task.fields[now]}"), console=Console(stderr=True), transient=True
            )
            self._task = self._bar.add_task("", total=total, completed=done, now="")

    def __enter__(self) -> EpochBar:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, seen: int, loss: float, top1: float, waited: float) -> None:
        """`seen` clips so far, their mean loss and accuracy in percent, and seconds waited for data in all."""
        if self._bar:
            seconds = max(time.perf_counter() - self._started, 1e-9)
            rate, wait = (seen - self._first) / seconds, 100 * (waited - self._waited) / seconds
            now = f"{rate:.1f} clips/s  loss {loss:.3f}  top-1 {top1:.1f} %  data wait {wait:.0f} %"
            self._bar.update(self._task, completed=seen, now=now)
