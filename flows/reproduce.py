"""@flow(name="pasnet"): the study as a graph of tasks, on one screen.

    videos -> pack (one per shard) -> index -> train ECO -> train PAS-Net -> evaluate -> track -> report
    with a D0 before that: its videos, shards, pose network, ECO (and, for strategy "recent", PAS-Net)

Deployments of this one flow, with other parameters, are in prefect.yaml. `python -m flows` runs it without a server.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from flows.experiment import run_jobs
from flows.obtain import obtain
from flows.parameters import Positive, PresetName, Seed, Split, Table, check
from flows.prepare import prepare, prepare_d0, videos
from flows.rehearse import rehearse
from pasnet import tracking
from pasnet.execute import IDLE, RUNNING, StudyError, idle, trainings_at_once
from pasnet.planning import lines, plan
from pasnet.results import collect, finish, links_page
from pasnet.study import EMBEDDED_SETS, Shards, Study, check_datasets, jobs, pose_job
from shards import Dataset


# validate_parameters: `check` does it, in words
# Threads that wait, most of them: each training has its evaluation behind it, and those that start from it.
@flow(name="pasnet", task_runner=ThreadPoolTaskRunner(max_workers=64), log_prints=False, validate_parameters=False)
def pasnet(
    data: list[str] | None = None,
    out: str = "runs/study",
    preset: PresetName = "full",
    tables: list[Table] | None = None,
    fusions: list[str] | None = None,
    splits: list[Split] = [1],  # noqa: B006  Prefect shows the default in its form
    seeds: list[Seed] = [0],  # noqa: B006
    num_segments: Positive | None = None,
    eco_weights: str = "",
    pose_weights: str = "",
    pretrain: str = "",
    overrides: dict[str, Any] | None = None,
    workers: Positive = 2,
    fetch: bool = False,
    mirrors: list[str] | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Raw videos to results table.

    Args:
        data: dataset folders (videos/ and official split lists), or "synthetic" and "synthetic-hmdb" for the embedded
            sets; none means the preset's.
        out: folder for everything that is written; a second run in it does only what is missing.
        preset: "full" is the paper's size, "science" an hour on two cores, "smoke" minutes, "tiny" seconds.
        tables: table-1 .. table-5, figure-2, and strategies and equal-epochs (ours); none means the preset's.
        fusions: styles as in Table II; none means the preset's.
        splits: official splits to run.
        seeds: seeds to run.
        num_segments: K for every row instead of the paper's.
        eco_weights: ECO-Lite Kinetics checkpoint, a file or a name as in `pasnet weights fetch` (then weights/ has it);
            empty means our own from `pretrain`, else a random start.
        pose_weights: OpenPose body checkpoint, likewise.
        pretrain: a set to learn from beforehand (D0): "synthetic", or a folder of videos or shards; "none"; empty means
            the preset's.
        overrides: any setting of pasnet/config.py, such as {"optim.epochs": 2}; {"pose.steps": 500} is one of the
            training of our own pose network.
        workers: shards that are packed at the same time, each with an ffmpeg of its own.
        fetch: download first what is not there: data folders named ucf101, hmdb51 or jhmdb, and weights given by name.
        mirrors: base addresses that are asked first, as <mirror>/<file name>.
        dry_run: show what would be done (trainings in order, work, hours, disk) and do nothing, as `pasnet plan`.
    """
    asked = check(locals())
    if asked.dry_run:
        return show_plan(asked.planned())
    trainings_at_once()  # a bad value is better found before the videos are decoded
    seconds: dict[str, float] = {}
    gone: dict[str, str] = {}
    if asked.fetch:
        with stage("fetch", seconds):
            obtain([], asked.weights_to_fetch, asked.mirrors or ())  # what all rows want, and the smaller files
            gone = obtain(asked.datasets_to_fetch, [], asked.mirrors or ())
    lost = {Path(folder).name: f"not fetched: {reason}" for folder, reason in gone.items()}
    if left := [source for source in asked.sources if source not in gone]:
        asked = asked.model_copy(update={"data": left})
    else:
        raise StudyError(in_words(lost))
    study, workers = asked.study(), asked.workers
    if study.narrowed:
        print(f"  {study.narrowed}; name others with fusions", flush=True)
    with stage("videos", seconds):
        datasets = [videos(study, source, workers) for source in study.data if source not in EMBEDDED_SETS]
        used = used_sets(study, datasets, lost)
        made = [videos(study, source, workers) for source in study.data if source in used & set(EMBEDDED_SETS)]
        datasets += [rehearse(each) for each in made] if study.size.rehearse else made
    with stage("shards", seconds):
        shards = packed(study, [dataset for dataset in datasets if dataset.name in used], workers, lost)
        d0 = prepare_d0(study, workers)
    todo, pose = jobs(study, shards, d0, lost), pose_job(study, d0)
    uri = tracking.default_uri(study.root)
    begun, before = time.monotonic(), len(RUNNING)
    with stage("training and evaluation", seconds):
        failures = run_jobs(todo, uri, pose)
    if started := len(RUNNING) - before:
        conducting = idle(begun, time.monotonic())
        seconds[IDLE] = round(conducting, 1)
        print(f"  {started} processes started; {conducting / started:.2f} s each to conduct them", flush=True)
    with stage("tracking and report", seconds):
        results = collect(study, shards, todo, failures, d0, lost)
        page = publish(study, [*shards, *([d0] if d0 else [])], results, seconds, uri)
    create_markdown_artifact(page, key="results", description="Ours beside the paper's")
    create_markdown_artifact(links_page(study.root, uri), key="mlflow", description="The rows' runs in MLflow")
    if failures:
        first, reason = next(iter(failures.items()))
        failed = sum(job.folder in failures for job in todo)
        also = f"; {in_words(lost)}" if lost else ""
        raise StudyError(f"{failed} of {len(todo)} trainings failed, such as {first}: {reason}{also}")
    if lost:
        raise StudyError(in_words(lost))
    return {"results": str(study.root / "results.json"), "seconds": seconds}


@task(cache_policy=NO_CACHE)
def publish(
    study: Study, shards: list[Shards], results: list[dict[str, Any]], seconds: dict[str, float], uri: str
) -> str:
    """MLflow runs, results.json and RESULTS.md; returns the page."""
    return finish(study, shards, results, seconds, uri, flow_run_id=str(flow_run.id or ""))


def used_sets(study: Study, datasets: Sequence[Dataset], lost: Mapping[str, str]) -> set[str]:
    """Which sets the study runs on: `datasets`, and of the embedded ones, which are made only then. Nothing stands in
    for a set that could not be had (`lost`: {name: reason}); StudyError with the reasons where nothing is left. Raises
    ConfigError as check_datasets does."""
    named = [(dataset.name, dataset.usable_splits) for dataset in datasets]
    named += [(source, (1, 2, 3)) for source in study.data if source in EMBEDDED_SETS]
    used = check_datasets(study, [*named, *((name, (1, 2, 3)) for name in lost)]) - lost.keys()
    if not used:
        raise StudyError(in_words(lost))
    return used


def packed(study: Study, datasets: Sequence[Dataset], workers: int, lost: dict[str, str]) -> list[Shards]:
    """The shards of each. One that cannot be packed, or of which damaged videos leave a subset without any, goes into
    `lost` and costs its own rows alone; StudyError where that leaves nothing."""
    made = []
    for dataset in datasets:
        try:
            of = prepare(study, dataset, workers)
            if empty := [split for split in study.splits if split not in of.splits]:
                raise StudyError(f"no train or no test video of split {empty[0]} could be decoded")
            made.append(of)
        except Exception as error:  # of any kind: too many damaged videos, a full disk
            lost[dataset.name] = f"not packed: {str(error) or type(error).__name__}"
            print(f"  {dataset.name}: {lost[dataset.name]}", flush=True)
            last = error
    if not made:
        raise StudyError(in_words(lost)) from last
    return made


def in_words(lost: Mapping[str, str]) -> str:
    """Each dataset that could not be had, and why."""
    return "; ".join(f"{name}: {reason}" for name, reason in lost.items())


def show_plan(study: Study) -> dict[str, Any]:
    """Prints the plan, and keeps it as an artifact of the run."""
    planned = plan(study)
    said = "\n".join(lines(planned))
    print(said, flush=True)
    create_markdown_artifact(f"```\n{said}\n```", key="plan", description="What the study would do")
    return {"plan": planned}


@contextmanager
def stage(name: str, seconds: dict[str, float]) -> Any:
    """Announces a stage and notes how long it took."""
    print(f"== {name}", flush=True)
    started = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - started, 1)
