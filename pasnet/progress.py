"""Bars for the epoch or evaluation that is under way, on a terminal; elsewhere nothing: each epoch prints its line."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self


class ClipBar:
    """Clips done and to do, clips/s, time left."""

    def __init__(self, title: str, total: int, done: int = 0, *, show: bool) -> None:
        """`done` clips of `total` are from before a resumption."""
        self._bar: Any = None
        self._first, self._started = done, time.perf_counter()
        if show and sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
            except ImportError:  # a bar is not worth a training; the epochs' lines are there without
                return
            columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(
                *columns, TextColumn("{task.fields[now]}"), console=Console(stderr=True), transient=True
            )
            self._task = self._bar.add_task("", total=total, completed=done, now="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, seen: int, more: str = "") -> None:
        """`seen` clips so far, and what else there is to say."""
        if self._bar:
            rate = (seen - self._first) / max(time.perf_counter() - self._started, 1e-9)
            self._bar.update(self._task, completed=seen, now=f"{rate:.1f} clips/s{more}")


class EpochBar(ClipBar):
    """With loss, accuracy, and the share of the time spent waiting for data."""

    def __init__(self, title: str, total: int, done: int, waited: float, *, show: bool) -> None:
        """`done` clips of `total`, and `waited` seconds for data, are from before a resumption."""
        super().__init__(title, total, done, show=show)
        self._waited = waited

    def close_step(self, seen: int, loss: float, top1: float, waited: float) -> None:
        """`seen` clips so far, their mean loss and accuracy in percent, and seconds waited for data in all."""
        wait = (waited - self._waited) / max(time.perf_counter() - self._started, 1e-9)
        self.show(seen, f"  loss {loss:.3f}  top-1 {top1:.1f} %  data wait {100 * wait:.0f} %")
