"""One training and its evaluation as tasks. The work itself happens in a process that the task starts."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.futures import PrefectFuture

from pasnet.study import Job, run_evaluation, run_training

GPU = "gpu"  # the limit's name: `prefect gcl update gpu --limit 2` lets two trainings run at once


def ensure_gpu_limit() -> None:
    """Creates the concurrency limit with one slot, unless the user has made it already."""
    with get_client(sync_client=True) as client:
        if not any(limit.name == GPU for limit in client.read_global_concurrency_limits(limit=200)):
            client.upsert_global_concurrency_limit_by_name(GPU, 1)


@task(task_run_name="train {job.title}", cache_policy=NO_CACHE)
def train(job: Job, tracking_uri: str) -> str:
    """The folder of the finished training."""
    with concurrency(GPU, occupy=1, strict=True):
        run_training(job, tracking_uri)
    return job.folder


@task(task_run_name="evaluate {job.title}", cache_policy=NO_CACHE)
def evaluate(job: Job) -> str:
    """The folder of the evaluated training."""
    with concurrency(GPU, occupy=1, strict=True):
        run_evaluation(job)
    return job.folder


def run_jobs(jobs: Sequence[Job], tracking_uri: str) -> dict[str, str]:
    """Runs every job after its parent; {folder: what went wrong} for those that failed or whose parent did.

    A failed training stops only what starts from it.
    """
    trained: dict[str, PrefectFuture[str]] = {}
    evaluated: dict[str, PrefectFuture[str]] = {}
    for job in jobs:  # parents come first
        trained[job.folder] = train.submit(job, tracking_uri, wait_for=[trained[job.parent]] if job.parent else None)
        evaluated[job.folder] = evaluate.submit(job, wait_for=[trained[job.folder]])
    failures = {}
    for folder, future in evaluated.items():
        future.wait()
        if not future.state.is_completed():
            cause = trained[folder].state if not trained[folder].state.is_completed() else future.state
            failures[folder] = str(cause.message or cause.name)
    return failures
