"""`python -m benchmarks.timed_study --seconds 240 --set model.width=1`: as much of a study as that time allows.

For a GPU that is lent for minutes, on a machine without Prefect and MLflow. What it runs is the study's own: videos,
shards, then trainings and evaluations, several at once (PASNET_TRAININGS), those first that are wanted most. None is
begun that is not expected to end in time, and at the end those that run are stopped. The page, by `pasnet report` as of
any study, says of a row without a number that the time was over. Called again with the same folder, it goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import shards
from pasnet.cli import overrides
from pasnet.execute import run_evaluation, run_pose_training, run_training, trainings_at_once
from pasnet.results import collect, finish
from pasnet.study import D0_EMBEDDED, EMBEDDED, EMBEDDED_SETS, Job, Shards, Study, jobs, make_synthetic, pose_job

OVER = "the time that was given to the study was over"
FIRST = ("A", "A+pool(I)+pool(F)", "A+E*A", "Conv(A,I)", "A+pool(I)", "Conv(A,E*A)", "Conv(A,I,F)")  # of twice-finetune
KEEP = 20  # seconds for the page and the archive
LARGE = {".pt", ".safetensors", ".tar", ".avi"}  # what the archive is without


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line, runs the study, prints its rows, and packs it if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.timed_study", description=__doc__)
    parser.add_argument("--out", default="runs/timed-study")
    parser.add_argument("--preset", default="science")
    parser.add_argument("--data", action="append", default=[], help="as of `pasnet plan`; default: the preset's")
    parser.add_argument("--tables", nargs="*", default=[])
    parser.add_argument("--seconds", type=float, required=True, help="from now, all included")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="that make videos and shards")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--tar", type=Path, help="archive of the study's folder without weights, videos and frames")
    asked = parser.parse_args(argv)
    ends = time.monotonic() + asked.seconds
    os.environ["PASNET_LOG_MODELS"] = "0"
    study = Study(
        out=asked.out,
        preset=asked.preset,
        data=tuple(asked.data),
        tables=tuple(asked.tables),
        pretrain=EMBEDDED,
        overrides=overrides(asked.set),
    )
    if study.size.rehearse:
        parser.error(f"preset {asked.preset} fetches its weights from a server that only the Prefect flow starts")
    seconds: dict[str, float] = {}
    d0, *on = (packed(study, source, asked.workers, seconds) for source in (D0_EMBEDDED, *dict.fromkeys(study.data)))
    todo, started = jobs(study, on, d0), time.monotonic()
    failures = Conductor(tasks(study, todo, d0), ends - KEEP).run()
    seconds["trainings and evaluations"] = round(time.monotonic() - started, 1)
    # a job of its own dataset has failed where either of its two tasks has
    reasons = {job.folder: reason for job in todo for name in names_of(job) if (reason := failures.get(name))}
    records = collect(study, on, todo, reasons, d0)
    finish(study, [*on, d0], records, seconds, "")
    for row in records:
        number = f"{row['top1']:.2f} %" if row["status"] == "done" else f"{row['status']}: {row['reason']}"
        print(f"{row['table']}  {row['title']}, {row['strategy']}: {number}")
    if asked.tar:
        pack(study.root, asked.tar)
    print(", ".join(f"{name} {value} s" for name, value in seconds.items()))


def packed(study: Study, source: str, workers: int, seconds: dict[str, float]) -> Shards:
    """The shards of a dataset, its videos made first where it is embedded; as flows/prepare.py, without tasks."""
    started = time.monotonic()
    embedded = source in (D0_EMBEDDED, *EMBEDDED_SETS)
    root = make_synthetic(study, source, shards.ffmpeg_exe(), workers) if embedded else Path(source)
    dataset = shards.scan(*shards.find_dataset(root))
    if source == D0_EMBEDDED:
        dataset = dataclasses.replace(dataset, name=D0_EMBEDDED)
    folder = study.root / "shards" / dataset.name
    shards.build(dataset, folder, workers=workers)
    seconds[f"videos and shards of {dataset.name}"] = round(time.monotonic() - started, 1)
    return Shards.of(folder)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One process: what it is called, what must have ended before, how much it is wanted (the least most)."""

    name: str
    after: tuple[str, ...]
    kind: str  # tasks of a kind are expected to take as long as the longest of them so far
    rank: tuple[int, int]
    run: Callable[[], object]


def names_of(job: Job) -> tuple[str, ...]:
    """Of a job's tasks; no row needs D0's test list."""
    return (job.folder,) if job.training.on == "D0" else (job.folder, f"evaluate {job.folder}")


def tasks(study: Study, todo: Sequence[Job], d0: Shards) -> list[Task]:
    """All there is to do: D0 and the pose network first, then a row that is trained before another that is not."""
    found = []
    if pose := pose_job(study, d0):
        run = lambda: run_pose_training(pose)  # noqa: E731
        found.append(Task(name=pose.folder, after=(), kind="pose", rank=(0, 0), run=run))
    for job in todo:
        style, twice = job.training.fusion, job.training.strategy in ("eco", "twice-finetune")
        rank = 0 if job.training.on == "D0" else 2 + (FIRST.index(style) if twice and style in FIRST else len(FIRST))
        needs = tuple(folder for folder in (job.parent, job.pose) if folder)
        kind = f"{'PAS-Net' if job.pose else 'ECO'}, {job.config.optim.epochs} epochs"
        train, *evaluate = names_of(job)
        found.append(
            Task(name=train, after=needs, kind=kind, rank=(0 if rank == 0 else 2, rank), run=_of(run_training, job))
        )
        for name in evaluate:
            found.append(
                Task(name=name, after=(train,), kind="evaluation", rank=(1, rank), run=_of(run_evaluation, job))
            )
    return found


def _of(function: Callable[[Job], object], job: Job) -> Callable[[], object]:
    return lambda: function(job)


class Conductor:
    """Runs tasks after what they start from, the most wanted of those that can start, until a time."""

    def __init__(self, todo: Sequence[Task], ends: float) -> None:
        """`ends`: by time.monotonic()."""
        self.pending, self.ends = sorted(todo, key=lambda task: task.rank), ends
        self.changed = threading.Condition()
        self.running: set[str] = set()
        self.done: set[str] = set()
        self.failures: dict[str, str] = {}
        self.took: dict[str, float] = {}  # the longest, by kind

    def run(self) -> dict[str, str]:
        """{name: why not} of the tasks that were not done."""
        began = time.monotonic()
        with self.changed:
            while (self.pending or self.running) and (left := self.ends - time.monotonic()) > 0:
                self._begin()
                self.changed.wait(min(left, 1))
            for task in self.pending:
                self.failures[task.name] = OVER
            stopped, self.pending = set(self.running), []
            for name in stopped:
                self.failures[name] = OVER
        if stopped:
            _stop_all()
            with self.changed:
                self.changed.wait_for(lambda: not self.running, timeout=KEEP / 2)
        print(f"{len(self.done)} tasks done in {time.monotonic() - began:.0f} s, {len(self.failures)} not", flush=True)
        return self.failures

    def _begin(self) -> None:
        for task in list(self.pending):
            if lost := next((name for name in task.after if name in self.failures), None):
                self.failures[task.name] = self.failures[lost]
                self.pending.remove(task)
            elif self.done.issuperset(task.after) and len(self.running) < trainings_at_once():
                self.pending.remove(task)
                follows = self.took.get("evaluation", 0.0) if task.kind != "evaluation" else 0.0
                if time.monotonic() + self.took.get(task.kind, 0.0) + follows > self.ends:
                    self.failures[task.name] = OVER
                else:
                    self.running.add(task.name)
                    threading.Thread(target=self._work, args=(task,), daemon=True).start()

    def _work(self, task: Task) -> None:
        began, reason = time.monotonic(), ""
        try:
            task.run()
        except Exception as error:
            reason = str(error) or type(error).__name__
        with self.changed:
            took = time.monotonic() - began
            self.running.discard(task.name)
            if not reason:
                self.done.add(task.name)
                self.failures.pop(task.name, None)  # it ended while it was being stopped
                self.took[task.kind] = max(took, self.took.get(task.kind, 0.0))
            else:
                self.failures.setdefault(task.name, reason)  # of one that was stopped we know better
            print(f"{took:6.1f} s  {task.name}{f': {reason}' if reason else ''}", flush=True)
            self.changed.notify_all()


def _stop_all() -> None:
    """Asks all that this process group runs, but us, to save and end."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)


def pack(root: Path, target: Path) -> None:
    """An archive of the study's folder without what is large: whole, or not there at all."""
    scratch = target.with_name(target.name + ".tmp")
    base = root.resolve()
    with tarfile.open(scratch, "w:gz", compresslevel=6) as archive:
        for path in sorted(base.rglob("*")):
            name = path.relative_to(base)
            if path.is_file() and path.suffix not in LARGE and (name.parts[0] != "data" or path.suffix == ".json"):
                archive.add(path, f"{root.name}/{name}", recursive=False)
    os.replace(scratch, target)


if __name__ == "__main__":
    if os.getpgrp() != os.getpid():
        os.setpgrp()  # a group of its own: what started us is not to be stopped with what we started
    main()
