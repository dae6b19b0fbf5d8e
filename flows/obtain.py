"""What comes from the network: official archives and public weights, a task each, only where the study asks for them.

shards/fetch.py and pasnet/download.py do the work: they resume, check and use what is there. They try a server again by
themselves while a download gets further; the tasks' own retries are for a network that is away for minutes. A study of
several datasets goes on without one that is not to be had; without its weights it would be another study.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture

from flows.gauge import Gauge
from pasnet import download
from pasnet.registry import Source as PublicWeights
from pasnet.study import WEIGHTS
from shards import Dataset
from shards.fetch import Source, fetch
from shards.unpack import FetchError, UnreachableError


def _may_pass(_task: Any, _run: Any, state: Any) -> bool:
    """Whether to try again: a server that did not answer, not a file that is the wrong one or wants a browser."""
    return isinstance(state.result(raise_on_failure=False), UnreachableError)


AGAIN: Any = {"cache_policy": NO_CACHE, "retries": 2, "retry_delay_seconds": 60, "retry_condition_fn": _may_pass}
WEIGHTS_LOCK = threading.Lock()  # pasnet/download.py refuses a second one in the same folder


@task(task_run_name="fetch {folder}", **AGAIN)
def fetch_dataset(folder: str, mirrors: Sequence[str], source: Source | None = None) -> Dataset:
    """The archives of `source`, else the official ones of the dataset that `folder` is named after, unpacked there;
    every listed video is found. Raises FetchError as shards/fetch.py does."""
    path = Path(folder)
    try:
        found = fetch(source or path.name, path, mirrors=mirrors, progress=_Shown(path.name))
    except FetchError as error:
        if source:
            raise
        raise type(error)(f"{error}; or take what is there, with fetch=false") from error
    print(f"  {folder}: {len(found.videos)} videos, all that the split lists name", flush=True)
    return found


@task(task_run_name="fetch weights {name}", **AGAIN)
def fetch_weights(
    name: str, mirrors: Sequence[str], source: PublicWeights | None = None, folder: str = WEIGHTS
) -> None:
    """`source`, else the public weights of that name in pasnet/registry.py, into `folder`. Raises WeightsError and
    FetchError as pasnet/download.py does."""
    with WEIGHTS_LOCK:
        found = download.fetch(source or name, Path(folder), mirrors=mirrors, progress=_Shown(name))
    print("\n".join(f"  {line}" for line in found.lines), flush=True)


def obtain(datasets: Sequence[str], weights: Sequence[str], mirrors: Sequence[str]) -> dict[str, str]:
    """All of them at once, weights one after another: {folder: reason} of the datasets that could not be fetched.

    When all have ended. Raises what the first weights that could not be fetched raised.
    """
    sets: list[PrefectFuture[Dataset]] = [fetch_dataset.submit(folder, mirrors) for folder in datasets]
    files: list[PrefectFuture[None]] = [fetch_weights.submit(name, mirrors) for name in weights]
    for future in files:
        future.wait()
    for dataset in sets:
        dataset.wait()
    for future in files:
        future.result()
    reasons = {}
    for folder, dataset in zip(datasets, sets, strict=True):
        try:
            dataset.result()
        except Exception as error:
            reasons[folder] = str(error) or type(error).__name__
    return reasons


class _Shown:
    """Progress of a download for a log and as an artifact: where a step begins and ends, and between them every tenth
    and every hundredth, but no line within two seconds of another and no artifact within one.

    A server of Prefect's that does not take an artifact stops no download; it is then asked every tenth only, since it
    may let us wait.
    """

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.gauge, self.clock, self.last = Gauge(f"{name}: fetched"), clock, -1
        self.step = ""
        self.said = self.shown = clock()

    def __call__(self, what: str, done: int, total: int | None) -> None:
        percent, begins = 100 * done // total if total else 0, what != self.step
        if percent == self.last and not begins:
            return
        now, edge, tenth = self.clock(), begins or percent == 100, percent // 10 != self.last // 10
        self.step, self.last = what, percent
        if edge or (tenth and now - self.said >= 2):
            self.said = now
            print(f"  {what}: {percent} %", flush=True)
        if not edge and (now - self.shown < 1 or (self.gauge.failed and not tenth)):
            return
        self.shown = now
        self.gauge(percent)
