"""One training and its evaluation as tasks. The work itself happens in a process that the task starts."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture

from pasnet.execute import run_evaluation, run_pose_training, run_training
from pasnet.study import Job, PoseJob


@task(task_run_name="train {job.title}", cache_policy=NO_CACHE)
def train_pose(job: PoseJob) -> str:
    """The folder of our own pose network."""
    run_pose_training(job)
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

    A failed training stops only what starts from it. How many run at once is settled by `training_slot`.
    """
    trained: dict[str, PrefectFuture[str]] = {}
    evaluated: dict[str, PrefectFuture[str]] = {}
    own_pose = train_pose.submit(pose) if pose else None
    if pose and own_pose:
        trained[pose.folder] = own_pose
    for job in jobs:  # parents come first
        before = [trained[folder] for folder in (job.parent, job.pose) if folder]
        trained[job.folder] = train.submit(job, tracking_uri, wait_for=before)
        evaluated[job.folder] = evaluate.submit(job, wait_for=[trained[job.folder]])
    failures = {}
    if pose and own_pose:
        own_pose.wait()
        if not own_pose.state.is_completed():
            failures[pose.folder] = str(own_pose.state.message or own_pose.state.name)
            print(f"    FAILED {failures[pose.folder]}", flush=True)
    for folder, future in evaluated.items():
        future.wait()
        if not future.state.is_completed():
            cause = trained[folder].state if not trained[folder].state.is_completed() else future.state
            failures[folder] = str(cause.message or cause.name)
            print(f"    FAILED {failures[folder]}", flush=True)
    return failures
