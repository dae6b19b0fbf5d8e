"""One training and its evaluation as tasks. The work itself happens in a process that the task starts."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture

from flows.gauge import Gauge
from flows.rehearse import rehearse_weights
from pasnet.execute import run_evaluation, run_pose_training, run_training
from pasnet.study import Job, PoseJob


@task(task_run_name="train {job.title}", cache_policy=NO_CACHE)
def train_pose(job: PoseJob) -> str:
    """The folder of our own pose network."""
    run_pose_training(job)
    if job.rehearse:
        rehearse_weights(job)
    return job.folder


@task(task_run_name="train {job.title}", cache_policy=NO_CACHE)
def train(job: Job, tracking_uri: str) -> str:
    """The folder of the finished training."""
    run_training(job, tracking_uri)
    return job.folder


@task(task_run_name="evaluate {job.title}", cache_policy=NO_CACHE)
def evaluate(job: Job) -> str:
    """The folder of the evaluated training."""
    run_evaluation(job)
    return job.folder


def run_jobs(jobs: Sequence[Job], tracking_uri: str, pose: PoseJob | None = None) -> dict[str, str]:
    """Runs every job after what it starts from; {folder: what went wrong} for those that failed, or could not start.

    A failed training stops only what starts from it, whose reason is then the same. How many run at once is settled by
    `training_slot`.
    """
    trained: dict[str, PrefectFuture[str]] = {}
    evaluated: dict[str, PrefectFuture[str]] = {}
    own_pose = train_pose.submit(pose) if pose else None
    if pose and own_pose:
        trained[pose.folder] = own_pose
    for job in jobs:  # parents come first
        parents = [trained[folder] for folder in (job.parent, job.pose) if folder]
        trained[job.folder] = train.submit(job, tracking_uri, wait_for=parents)
        evaluated[job.folder] = evaluate.submit(job, wait_for=[trained[job.folder]])
    failures: dict[str, str] = {}
    gauge = Gauge("trainings and evaluations")
    gauge(0)
    if pose and own_pose:
        own_pose.wait()
        if not own_pose.state.is_completed():
            failures[pose.folder] = _reason(own_pose)
            print(f"    FAILED {failures[pose.folder]}", flush=True)
    for number, job in enumerate(jobs):
        gauge(100 * number / len(jobs))
        evaluated[job.folder].wait()
        if evaluated[job.folder].state.is_completed():
            continue
        lost = [folder for folder in (job.parent, job.pose) if folder and not trained[folder].state.is_completed()]
        ended = trained[job.folder] if not trained[job.folder].state.is_completed() else evaluated[job.folder]
        # of a training that was not begun Prefect knows no more than that
        failures[job.folder] = f"not begun, since {failures[lost[0]]}" if lost else _reason(ended)
        if not lost:
            print(f"    FAILED {failures[job.folder]}", flush=True)
    gauge(100)
    return failures


def _reason(future: PrefectFuture[str]) -> str:
    found = future.state.result(raise_on_failure=False)
    return str(found) if isinstance(found, BaseException) else str(future.state.message or future.state.name)
