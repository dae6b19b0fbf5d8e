"""`python -m benchmarks.timed_study --seconds 240 --set model.width=1`: as much of a study as that time allows.

For a GPU that is lent for minutes, on a machine without Prefect and MLflow. What it runs is the study's own: videos,
shards, then trainings and evaluations, several at once (PASNET_TRAININGS), those first that are wanted most. None is
begun that is not expected to end in time, and at the end those that run are stopped. The page, which `pasnet report`
takes as any study's, lists rows without a number as not run. Called again with the same folder, it goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import shards
from pasnet.cli import call, overrides
from pasnet.config import ConfigError
from pasnet.execute import (
    StudyError,
    run_evaluation,
    run_pose_training,
    run_training,
    stop_all,
    trained,
    trainings_at_once,
)
from pasnet.predictions import evaluated
from pasnet.results import collect, finish
from pasnet.study import D0_EMBEDDED, EMBEDDED, EMBEDDED_SETS, Job, Shards, Study, jobs, make_synthetic, pose_job

OVER = "the time that was given to the study was over"
FIRST = ("A", "A+pool(I)+pool(F)", "A+E*A", "Conv(A,I)", "A+pool(I)", "Conv(A,E*A)", "Conv(A,I,F)")  # of twice-finetune
KEEP = 20  # seconds for the page and the archive
LARGE = {".pt", ".safetensors", ".tar", ".avi", ".tmp"}  # what the archive is without


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command line and runs the study; exit code 1 where something failed for another reason than time."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.timed_study", description=__doc__)
    parser.add_argument("--out", default="runs/timed-study")
    parser.add_argument("--preset", default="science")
    parser.add_argument("--data", action="append", default=[], help="as of `pasnet plan`; default: the preset's")
    parser.add_argument("--tables", nargs="*", default=[])
    parser.add_argument("--seconds", type=float, required=True, help="from now, all included")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="that make videos and shards")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--tar", type=Path, help="archive of the study's folder without weights, videos and frames")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        code = call(_study, parser.parse_args(argv))
    finally:
        stop_all("the study was stopped", patience=KEEP / 2)
    sys.exit(code)


def _study(asked: argparse.Namespace) -> None:
    ends = time.monotonic() + asked.seconds - KEEP
    os.environ["PASNET_LOG_MODELS"] = "0"
    trainings_at_once()  # raises before anything is made
    study = Study(
        out=asked.out,
        preset=asked.preset,
        data=tuple(asked.data),
        tables=tuple(asked.tables),
        pretrain=EMBEDDED,
        overrides=overrides(asked.set),
    )
    if study.size.rehearse:
        raise ConfigError(f"preset {asked.preset} fetches its weights from a server that only the Prefect flow starts")
    if asked.tar:
        asked.tar.parent.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    sources = (D0_EMBEDDED, *dict.fromkeys(study.data))
    d0, *on = (packed(study, source, asked.workers, seconds, ends) for source in sources)
    todo, started = jobs(study, on, d0), time.monotonic()
    conductor = Conductor(tasks(study, todo, d0), ends, results_there(study, todo, d0))
    failures = conductor.run()
    seconds["trainings and evaluations"] = round(time.monotonic() - started, 1)
    reasons = {job.folder: reason for job in todo for name in names_of(job) if (reason := failures.get(name))}
    records = collect(study, on, todo, reasons, d0)
    for record in records:
        if OVER in record.get("reason", ""):
            record |= {"status": "not run", "reason": OVER}
    finish(study, [*on, d0], records, seconds, "")
    for row in records:
        number = f"{row['top1']:.2f} %" if row["status"] == "done" else f"{row['status']}: {row['reason']}"
        print(f"{row['table']}  {row['title']}, {row['strategy']}: {number}")
    if asked.tar:
        pack(study.root, asked.tar)
    print(", ".join(f"{name} {value} s" for name, value in seconds.items()))
    if broken := {name: reason for name, reason in failures.items() if OVER not in reason}:
        raise StudyError(
            f"{len(broken)} of {len(conductor.done) + len(failures)} failed; {next(iter(broken.values()))}"
        )


def packed(study: Study, source: str, workers: int, seconds: dict[str, float], ends: float) -> Shards:
    """The shards of a dataset, its videos made first where it is embedded; as flows/prepare.py, without tasks.

    Raises StudyError when the time is over: there is nothing to report on yet.
    """
    started = time.monotonic()

    def in_time(*_: object) -> None:
        if time.monotonic() > ends:
            raise StudyError(f"{OVER} before its shards were packed; called again, it goes on")

    in_time()
    embedded = source in (D0_EMBEDDED, *EMBEDDED_SETS)
    root = make_synthetic(study, source, shards.ffmpeg_exe(), workers) if embedded else Path(source)
    dataset = shards.scan(*shards.find_dataset(root))
    if source == D0_EMBEDDED:
        dataset = dataclasses.replace(dataset, name=D0_EMBEDDED)
    folder = study.root / "shards" / dataset.name
    shards.build(dataset, folder, workers=workers, on_video=in_time)
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
    """Of a job's tasks, training and evaluation; no row needs D0's test list."""
    return (job.folder,) if job.training.on == "D0" else (job.folder, f"evaluate {job.folder}")


def tasks(study: Study, todo: Sequence[Job], d0: Shards) -> list[Task]:
    """All there is to do: D0 and the pose network first, then a row that is trained before another that is not."""
    found = []
    if pose := pose_job(study, d0):
        run = partial(run_pose_training, pose)
        found.append(Task(name=pose.folder, after=(), kind="pose", rank=(0, 0), run=run))
    for job in todo:
        of, optim = job.training, job.config.optim
        wanted = of.strategy in ("eco", "twice-finetune") and of.fusion in FIRST
        rank = 0 if of.on == "D0" else 1 + (FIRST.index(of.fusion) if wanted else len(FIRST))
        needs = tuple(folder for folder in (job.parent, job.pose) if folder)
        size = f"{of.dataset}, K = {job.config.data.num_segments}, {'PAS-Net' if job.pose else 'ECO'}"
        train, *evaluate = names_of(job)
        kind, stage = f"{optim.epochs} epochs of {size}", 0 if of.on == "D0" else 2
        found.append(Task(name=train, after=needs, kind=kind, rank=(stage, rank), run=partial(run_training, job)))
        for name in evaluate:
            run = partial(run_evaluation, job)
            found.append(Task(name=name, after=(train,), kind=f"evaluation of {size}", rank=(1, rank), run=run))
    return found


def results_there(study: Study, todo: Sequence[Job], d0: Shards) -> set[str]:
    """The names of the tasks that an earlier call has done."""
    pose = pose_job(study, d0)
    found = {job.folder for job in todo if trained(job)} | ({pose.folder} if pose and trained(pose) else set())
    return found | {f"evaluate {job.folder}" for job in todo if evaluated(Path(job.folder) / "evaluation")}


class Conductor:
    """Runs tasks after what they start from, the most wanted of those that can start, until a time."""

    def __init__(self, todo: Sequence[Task], ends: float, done: Collection[str] = ()) -> None:
        """`ends`: by time.monotonic(). `done`: names of those that need not be run."""
        self.pending = sorted((task for task in todo if task.name not in done), key=lambda task: task.rank)
        self.ends, self.done = ends, set(done)
        self.changed = threading.Condition()
        self.running: set[str] = set()
        self.failures: dict[str, str] = {}
        self.took: dict[str, float] = {}  # the longest, by kind

    def run(self) -> dict[str, str]:
        """{name: why not} of the tasks that were not done."""
        with self.changed:
            while (self.pending or self.running) and (left := self.ends - time.monotonic()) > 0:
                self._begin()
                self.changed.wait(min(left, 1))
            over = [*self.running, *(task.name for task in self.pending)]
            self.failures |= dict.fromkeys(over, OVER)
            self.pending = []
        if over:
            stop_all(OVER, patience=KEEP / 2)  # their threads end with them
        return self.failures

    def _begin(self) -> None:
        for task in list(self.pending):
            if lost := next((name for name in task.after if name in self.failures), None):
                reason = self.failures[lost].removeprefix("not begun, since ")
                self.failures[task.name] = f"not begun, since {reason}"
                self.pending.remove(task)
            elif self.done.issuperset(task.after) and len(self.running) < trainings_at_once():
                self.pending.remove(task)
                if time.monotonic() + self.took.get(task.kind, 0.0) > self.ends:
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
            if reason:
                self.failures.setdefault(task.name, reason)  # of one that was stopped we know better
            elif task.name not in self.failures:  # else it ended while it was being stopped, and what follows did not
                self.done.add(task.name)
                self.took[task.kind] = max(took, self.took.get(task.kind, 0.0))
            print(f"{took:6.1f} s  {task.name}{f': {reason}' if reason else ''}", flush=True)
            self.changed.notify_all()


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
    main()
