"""What comes from the network: official archives and public weights, a task each, only where the study asks for them.

shards/fetch.py and pasnet/download.py do the work: they resume, check and use what is there. They try a server again by
themselves while a download gets further; the tasks' own retries are for a network that is away for minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture

from pasnet import download
from pasnet.study import WEIGHTS
from shards.fetch import fetch
from shards.unpack import FetchError


def _may_pass(_task: Any, _run: Any, state: Any) -> bool:
    """Whether to try again: a server that did not answer, not a file that is the wrong one or wants a browser."""
    return isinstance(state.result(raise_on_failure=False), FetchError)


RETRIES, DELAY = 2, 60  # seconds


@task(
    task_run_name="fetch {folder}",
    cache_policy=NO_CACHE,
    retries=RETRIES,
    retry_delay_seconds=DELAY,
    retry_condition_fn=_may_pass,
)
def fetch_dataset(folder: str, mirrors: Sequence[str]) -> None:
    """The official archives of the dataset that `folder` is named after, unpacked there, every listed video found."""
    path = Path(folder)
    try:
        found = fetch(path.name, path, mirrors=mirrors, progress=_Shown(path.name))
    except FetchError as error:
        raise FetchError(f"{error}; or take what is there, with fetch=false") from error
    print(f"  {folder}: {len(found.videos)} videos, all that the split lists name", flush=True)


@task(
    task_run_name="fetch weights {name}",
    cache_policy=NO_CACHE,
    retries=RETRIES,
    retry_delay_seconds=DELAY,
    retry_condition_fn=_may_pass,
)
def fetch_weights(name: str, mirrors: Sequence[str]) -> None:
    """Public weights, by their name in pasnet/registry.py, into weights/."""
    found = download.fetch(name, Path(WEIGHTS), mirrors=mirrors, progress=_Shown(name))
    print("\n".join(f"  {line}" for line in found.lines), flush=True)


def obtain(datasets: Sequence[str], weights: Sequence[str], mirrors: Sequence[str]) -> None:
    """All of them at once. Raises what the first that failed raised, when all have ended."""
    begun: list[PrefectFuture[None]] = [fetch_dataset.submit(folder, mirrors) for folder in datasets]
    begun += [fetch_weights.submit(name, mirrors) for name in weights]
    for future in begun:
        future.wait()
    for future in begun:
        future.result()


class _Shown:
    """Progress of a download for a log, every tenth, and as an artifact, every hundredth."""

    def __init__(self, name: str) -> None:
        self.name, self.last = name, -1
        self.artifact: Any = None

    def __call__(self, what: str, done: int, total: int | None) -> None:
        percent = 100 * done // total if total else 0
        if percent == self.last:
            return
        if percent // 10 != self.last // 10:
            print(f"  {what}: {percent} %", flush=True)
        self.last = percent
        if self.artifact is None:
            self.artifact = create_progress_artifact(percent, description=f"{self.name}: fetched")
        else:
            update_progress_artifact(self.artifact, percent)
