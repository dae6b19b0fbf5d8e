"""Raw videos -> finished shard folders, one task per shard (a task per video would swamp Prefect's database).

NO_CACHE: the work itself knows what is done (shards/pack.py compares digests with the files that are there), and
Prefect's cache would hash 13,320 videos per task and then believe in files that are gone.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.utilities.annotations import quote

import shards
from flows.gauge import Gauge
from pasnet.study import D0_EMBEDDED, EMBEDDED, EMBEDDED_SETS, Shards, Study, make_synthetic
from shards import Dataset, DecodeSettings
from shards.pack import ShardPlan, check_owner, check_space, finished_part, write_notes

MAX_FAILED = 0.01  # share of damaged videos past which the data, or the decoder, is not what it should be


@task(task_run_name="videos {source}", cache_policy=NO_CACHE)
def videos(study: Study, source: str, workers: int) -> Dataset:
    """The dataset in a folder, held against its split lists; embedded ones are generated first."""
    root = make_synthetic(study, source, shards.ffmpeg_exe(), workers) if source in EMBEDDED_SETS else Path(source)
    dataset = shards.scan(*shards.find_dataset(root))
    lists = f"{len(dataset.missing)} of {dataset.listed} listed ones missing" if dataset.missing else "none missing"
    print(f"  {dataset.name}: {len(dataset.videos)} videos, {lists}", flush=True)
    return dataset


@task(task_run_name="pack {plan.name}", cache_policy=NO_CACHE)
def pack(plan: ShardPlan, folder: Path, settings: DecodeSettings) -> int:
    """Decodes and packs one shard; how many of its videos failed."""
    return len(shards.build_shard(plan, folder, settings)["failures"])


@task(task_run_name="index {dataset.name}", cache_policy=NO_CACHE)
def index(
    dataset: Dataset,
    plans: tuple[ShardPlan, ...],
    folder: Path,
    settings: DecodeSettings,
    known: Mapping[str, dict[str, Any]],
) -> Shards:
    """Closes the folder: index, failures, manifest. The failures are shown as a Prefect artifact too."""
    try:
        shards.finish(dataset, plans, folder, settings, max_failed=MAX_FAILED, known=known)
    finally:
        rows = shards.failures(folder)
        if rows:
            shown = [{**row, "detail": row["detail"][-500:]} for row in rows]  # the end of what ffmpeg said
            create_table_artifact(shown, key=f"failures-{dataset.name}", description="Videos that could not be decoded")
    return Shards.of(folder)


def prepare(study: Study, dataset: Dataset, workers: int) -> Shards:
    """All tasks of one dataset's shards, `workers` of them at a time; none for a shard that is finished."""
    settings = DecodeSettings()
    folder = study.root / "shards" / dataset.name
    started = time.perf_counter()
    with shards.locked(folder):
        check_owner(dataset, folder)
        plans = shards.plan(dataset, settings)
        write_notes(dataset, plans, folder, settings, max_failed=MAX_FAILED)
        known = {plan.name: part for plan in plans if (part := finished_part(plan, folder)) is not None}
        todo = [plan for plan in plans if plan.name not in known]
        check_space(dataset, settings, folder, len(todo) / len(plans))
        packed = Gauge(f"{dataset.name}: shards packed")
        packing: list[PrefectFuture[int]] = []
        packed(100 * (1 - len(todo) / len(plans)))
        try:
            for number, plan in enumerate(todo):
                if number >= workers:
                    packing[number - workers].result()  # a shard that cannot be written (a full disk) ends the packing
                    packed(100 * (1 - (len(todo) - number + workers - 1) / len(plans)))
                packing.append(pack.submit(quote(plan), folder, settings))
            for future in packing:
                future.result()
        finally:
            for future in packing:
                future.wait()  # the folder stays locked while a task writes into it
        # quoted: Prefect looks for tasks' results in all that a task is given, and 13,320 videos are much to look at
        done = index(quote(dataset), quote(plans), folder, settings, quote(known))
        packed(100)
    rate = done.videos / max(time.perf_counter() - started, 1e-9)
    print(
        f"  {done.dataset}: {done.videos} videos, {done.frames} frames, {done.failed} set aside, {rate:.1f} videos/s",
        flush=True,
    )
    return done


@task(task_run_name="videos of D0", cache_policy=NO_CACHE)
def d0_videos(study: Study, workers: int) -> Dataset:
    """The videos to learn from beforehand, under a name of their own; the embedded ones are generated first."""
    if study.d0 == EMBEDDED:
        root = make_synthetic(study, D0_EMBEDDED, shards.ffmpeg_exe(), workers)
        return dataclasses.replace(shards.scan(*shards.find_dataset(root)), name=D0_EMBEDDED)
    found = shards.scan(*shards.find_dataset(Path(study.d0)))
    return dataclasses.replace(found, name=f"{found.name}-d0")


def prepare_d0(study: Study, workers: int) -> Shards | None:
    """The shards of D0, packed where `pretrain` names videos; None where the study has no D0."""
    if not study.d0:
        return None
    if (Path(study.d0) / "manifest.json").is_file():
        return Shards.of(Path(study.d0))
    return prepare(study, d0_videos(study, workers), workers)
