"""Runs a job of the study: training and evaluation, each in a process of its own, one at a time on a machine.

A process of its own has its own CUDA context, can be killed alone, and is the command that a person would type.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from pasnet.config import ConfigError, to_dict
from pasnet.study import Job, PoseJob
from pasnet.tracking import models_wanted

_LINE: set[tuple[int, int]] = set()  # who waits for a training slot
_HELD: set[tuple[int, int]] = set()  # who has one
_TICKETS = itertools.count()
IDLE = "of which none of its processes ran"  # what `idle` says, among a study's seconds
RUNNING: list[tuple[float, float]] = []  # when a process of ours ran, start and end by time.monotonic()
_GATE = threading.Lock()  # of the next two
_PROCESSES: set[subprocess.Popen[str]] = set()  # those that run
_CLOSED: list[str] = []  # why no more are started


class StudyError(RuntimeError):
    """A step of the study that failed; the message names its log."""


def trained(job: Job | PoseJob) -> bool:
    """Whether it is done."""
    folder = Path(job.folder)
    if isinstance(job, PoseJob):
        return (folder / "quality.json").is_file() and Path(job.trained).is_file()
    return (folder / "done.json").is_file() and (folder / "last.pt").is_file()


def run_training(job: Job, tracking_uri: str = "") -> bool:
    """Trains to the last epoch, going on from last.pt where there is one. False: it was done already."""
    folder = Path(job.folder)
    if trained(job):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    with training_slot() as slot, folder_lock(folder) as lock:
        if trained(job):  # by another study in the same folder, while this one waited
            return False
        shutil.rmtree(folder / "evaluation", ignore_errors=True)  # of a network that is no longer there
        (folder / "done.json").unlink(missing_ok=True)
        request = folder / "request.json"
        request.write_text(json.dumps(to_dict(job.config), indent=1), "utf-8")
        command = ["train", "--config", str(request), "--out", str(folder), "--title", job.title]
        command += ["--tracking-uri", tracking_uri or "off", "--log-model" if models_wanted() else "--no-log-model"]
        _run(command, folder / "train.log", job.title, slot, lock)
    return True


def run_evaluation(job: Job) -> bool:
    """Evaluates the last epoch's network. False: it was done already."""
    from pasnet.predictions import evaluated

    out = Path(job.folder) / "evaluation"
    if evaluated(out):
        return False
    command = ["evaluate", "--checkpoint", str(Path(job.folder) / "last.pt"), "--shards", job.config.data.shards]
    with training_slot(first=True) as slot:
        _run([*command, "--out", str(out)], Path(job.folder) / "evaluate.log", f"evaluate {job.title}", slot)
    return True


def run_pose_training(job: PoseJob) -> bool:
    """Trains our own pose network, going on from last.pt where there is one. False: it was done already."""
    folder = Path(job.folder)
    if trained(job):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    with training_slot() as slot, folder_lock(folder) as lock:
        if trained(job):
            return False
        request = folder / "request.json"
        request.write_text(json.dumps(to_dict(job.config), indent=1), "utf-8")
        command = ["pose-train", "--config", str(request), "--shards", job.shards, "--joints", job.joints]
        _run([*command, "--out", str(folder)], folder / "pose.log", job.title, slot, lock)
    return True


def stop_all(reason: str, patience: float) -> None:
    """Ends all processes that were started here, by force those that have not ended after `patience` seconds; from now
    on none is started, for that reason."""
    with _GATE:
        _CLOSED.append(reason)
        running = list(_PROCESSES)
    for process in running:
        process.terminate()  # a training saves first
    until = time.monotonic() + patience
    while time.monotonic() < until and any(process.poll() is None for process in running):
        time.sleep(0.1)
    for process in running:
        process.kill()


def idle(start: float, end: float) -> float:
    """Seconds between two times of time.monotonic() at which none of our processes ran: what it costs to conduct them
    (and to wait for another study on the machine)."""
    covered, last = 0.0, start
    for begin, stop in sorted(RUNNING):
        begin, stop = max(begin, last), min(stop, end)
        if stop > begin:
            covered, last = covered + stop - begin, stop
    return end - start - covered


class Slot(NamedTuple):
    """One of the machine's places for a training: its number, from 0, and the descriptor of its lock."""

    number: int
    lock: int


@contextlib.contextmanager
def training_slot(*, first: bool = False) -> Iterator[Slot]:
    """One of the machine's places for a training (PASNET_TRAININGS of them, default 1), whatever study asks for it.

    A lock of the kernel on a file, which the started process inherits: it is free when both are gone, however they
    ended. (Prefect's concurrency limits keep the slot of a process that was killed, and the next run then waits for
    ever.) Who waits in this process stands in line, `first` before the others.
    """
    base = Path(os.environ.get("PASNET_LOCKS") or tempfile.gettempdir()) / f"pasnet-{os.getuid()}-training"
    place = (0 if first else 1, next(_TICKETS))
    base.parent.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(f"{base}-{number}.lock", "a")) for number in range(trainings_at_once())]
            _LINE.add(place)
            said = False
            try:
                while True:
                    ours = bool(_HELD)  # before the lock is tried: what we held may be free right after
                    head = min(tuple(_LINE)) == place  # of a copy, since other threads come and go
                    if head and (mine := next(filter(_locked, files), None)) is not None:
                        break
                    if head and not ours and not said:
                        said = True
                        print("    waiting for a training of another study on this machine", flush=True)
                    time.sleep(0.2)
                _HELD.add(place)
            finally:
                _LINE.remove(place)
            yield Slot(files.index(mine), mine.fileno())
    finally:
        _HELD.discard(place)  # when the lock is free


def trainings_at_once() -> int:
    """PASNET_TRAININGS, default 1. Raises ConfigError for what is no such number."""
    text = os.environ.get("PASNET_TRAININGS", "1")
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"PASNET_TRAININGS must be a whole number of at least 1, got {text!r}")
    return int(text)


def gpu_for(slot: int) -> dict[str, str]:
    """What the environment of that slot's process says beside ours: with several slots and GPUs, which one is its own.

    Those of CUDA_VISIBLE_DEVICES up to the first that is none, as CUDA reads it, else all that nvidia-smi lists, in
    turn. A training that is alone takes what CUDA takes first.
    """
    if trainings_at_once() == 1:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    given = () if visible is None else itertools.takewhile(lambda gpu: gpu and gpu != "-1", visible.split(","))
    gpus = _gpus() if visible is None else tuple(given)
    return {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if len(gpus) > 1 else {}


@functools.cache
def _gpus() -> tuple[str, ...]:
    """The machine's GPUs by UUID, which unlike a number means the same to nvidia-smi and to CUDA."""
    try:
        command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # none, or no driver
        return ()
    return tuple(line.strip() for line in listed.splitlines() if line.strip())


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[int]:
    """Waits until nobody else trains into this folder, such as the orphan of a study that was killed."""
    with open(folder / "lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _locked(file: IO[str]) -> bool:
    """Takes the lock of a file; False when another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _run(arguments: Sequence[str], log: Path, title: str, slot: Slot, *locks: int) -> None:
    command = [sys.executable, "-m", "pasnet", *arguments]
    last: collections.deque[str] = collections.deque(maxlen=3)
    started = time.monotonic()
    with open(log, "a", encoding="utf-8") as file:
        with _GATE:
            if _CLOSED:
                raise StudyError(_CLOSED[0])
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, **gpu_for(slot.number), "PYTHONUNBUFFERED": "1"},
                pass_fds=[slot.lock, *locks],
            )
            _PROCESSES.add(process)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                last.append(line.rstrip())
                print(f"    {line.rstrip()}", flush=True)
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
            RUNNING.append((started, time.monotonic()))
            with _GATE:
                _PROCESSES.discard(process)
    if code != 0:
        raise StudyError(f"{title}: failed with exit code {code} ({' | '.join(last)}); all of it is in {log}")
