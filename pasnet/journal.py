"""What is to be tracked, on disk first: tracking.jsonl in the run folder, one JSON object a line, only appended to.

A training writes events: `start` (name, parameters, tags, dataset), `resume`, `epoch`, `artifact`, `model`, `end`. Who
sends them to a tracking server (pasnet/tracking.py) writes marks between them: `run`, the id that the server gave;
`sent`, the number of the last event that has arrived there; `lost`, when the server no longer knows the run. Marks name
their server, so that one journal may be sent to two.

A kernel lock on tracking.lock is held by the one process that writes events or sends them. It is free when that process
is gone, however it ended: a journal without an `end` whose lock is free is that of a training that was killed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit, urlunsplit

FILE = "tracking.jsonl"
MARKS = ("run", "sent", "lost")
Event = dict[str, Any]


def place_of(uri: str) -> str:
    """The address without user and password, which have no business in a run folder or on a screen."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


class Journal:
    """tracking.jsonl of one run folder. Reads at any time; appends under `lock`."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / FILE
        self._next = 0
        self._held: IO[str] | None = None
        self._torn = False  # the last line has no end
        self._writing = threading.Lock()  # a training and its sender append from two threads

    def lock(self, wait: float = 0.0) -> bool:
        """Becomes the one who appends; False when another process (or another Journal of this one) is."""
        file = open(self.folder / "tracking.lock", "a")  # noqa: SIM115  held until `unlock`
        until = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    file.close()
                    return False
                time.sleep(0.1)
        self._held = file
        # Loader processes are forks and inherit the lock; one that outlives a killed training would keep it.
        os.register_at_fork(after_in_child=file.close)
        self._next = 1 + max((event["n"] for event in self.events()), default=0)
        self._torn = self.path.is_file() and not self.path.read_bytes().endswith(b"\n")
        return True

    def unlock(self) -> None:
        """Lets another process append."""
        if self._held is not None:
            self._held.close()
            self._held = None

    def events(self) -> list[Event]:
        """All events and marks. A line torn by a crash of the machine is left out."""
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return []
        found = []
        for line in text.split(b"\n"):
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and {"n", "event", "time"} <= event.keys():
                found.append(event)
        return found

    def append(self, event: str, **fields: Any) -> int:
        """Adds a line and returns its number. Raises OSError where the disk does not take it."""
        with self._writing:
            number = self._next
            entry = {"n": number, "time": int(time.time() * 1000), "event": event, **fields}
            line = (b"\n" if self._torn else b"") + json.dumps(entry, ensure_ascii=False).encode() + b"\n"
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                self._torn = True
                if os.write(file, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                self._torn = False
                if event not in MARKS:  # a mark that is lost costs sending again, which changes nothing
                    os.fsync(file)
            finally:
                os.close(file)
            self._next += 1
            return number

    def begin(self, start: Mapping[str, Any], *, goes_on: bool) -> str:
        """Opens a run: the one that the journal holds already, or a new one.

        `goes_on` says that there is a checkpoint to go on from. Without one, a run that got no further than its
        start, with the same parameters, is the same run too. A run that was broken off gets its `end` first.
        Returns how the run had ended that is taken up again; "" for a new one.
        """
        self.close_broken()
        run = last_run(self.events())
        same = run and (goes_on or (not epochs_of(run) and run[0]["params"] == json.loads(json.dumps(start["params"]))))
        if same:
            self.append("resume", uri=start["uri"])
            return status_of(run)
        self.append("start", key=uuid.uuid4().hex, **start)
        return ""

    def close_broken(self) -> bool:
        """Ends a run as KILLED whose process is gone without a word, which the held lock proves."""
        run = last_run(self.events())
        if not run or status_of(run):
            return False
        # it ended no earlier than its last sign of life
        self.append("end", status="KILLED", at=max(event["time"] for event in run), reason="the process was killed")
        return True

    def note_artifacts(self) -> None:
        """An `artifact` event for each file worth keeping that is new or has changed."""
        run = last_run(self.events())
        known = {event["path"]: event["stamp"] for event in run if event["event"] == "artifact"}
        for path in artifacts(self.folder):
            about, name = path.stat(), path.relative_to(self.folder).as_posix()
            stamp = [about.st_size, about.st_mtime_ns]
            if known.get(name) != stamp:
                self.append("artifact", path=name, stamp=stamp)

    def backfill(self, before: int | None = None) -> None:
        """Epochs that history.json has and the journal has not, since a training was killed between the two."""
        path, run = self.folder / "history.json", last_run(self.events())
        try:
            if not run or path.stat().st_mtime * 1000 < run[0]["time"]:
                return  # of a training before this run
            records = [(int(record["epoch"]), record) for record in json.loads(path.read_text("utf-8"))]
        except (OSError, ValueError, TypeError, KeyError):
            return
        have = epochs_of(run)
        for epoch, record in records:
            if epoch not in have and (before is None or epoch < before):
                self.append("epoch", epoch=epoch, metrics=numbers(record))


def artifacts(folder: Path) -> list[Path]:
    """What a run folder holds for a reader: settings, load report, predictions, metrics, pictures."""
    patterns = (
        "config.json",
        "load_report.txt",
        "failure.json",
        "predictions.parquet",
        "metrics.json",
        "*.csv",
        "*.png",
    )
    inside = [*patterns, *(f"evaluation/{pattern}" for pattern in patterns)]
    return [path for pattern in inside for path in sorted(folder.glob(pattern)) if path.is_file()]


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an epoch's record, but for the epoch itself."""
    found = {}
    for name, value in record.items():
        if name == "epoch" or value is None or isinstance(value, str | bytes):
            continue
        try:
            found[name] = float(value)
        except (TypeError, ValueError):  # a list, say; whoever reads history.json has it
            continue
    return found


def last_run(events: Iterable[Event]) -> list[Event]:
    """The events, without marks, of the journal's last run: a folder may have been trained anew."""
    run: list[Event] = []
    for event in events:
        if event["event"] == "start":
            run = []
        if event["event"] not in MARKS and (run or event["event"] == "start"):
            run.append(event)
    return run


def epochs_of(run: Iterable[Event]) -> set[int]:
    """The epochs that a run's events hold."""
    return {event["epoch"] for event in run if event["event"] == "epoch"}


def status_of(run: Iterable[Event]) -> str:
    """How a run ended, "" while it runs."""
    status = ""
    for event in run:
        if event["event"] in ("start", "resume"):
            status = ""
        elif event["event"] == "end":
            status = event["status"]
    return status


def progress(events: Iterable[Event], place: str) -> tuple[int, dict[str, str]]:
    """How far a server has the journal: (number of the last event there, {key of a run: the server's id})."""
    sent, runs = 0, {}
    for event in events:
        if event.get("place") != place:
            continue
        if event["event"] == "sent":
            sent = event["upto"]
        elif event["event"] == "run":
            runs[event["key"]] = event["run"]
        elif event["event"] == "lost":
            sent, runs = 0, {}
    return sent, runs


def unsent(events: Iterable[Event], place: str) -> list[Event]:
    """The events that have not arrived at a server."""
    events = list(events)
    sent, _ = progress(events, place)
    return [event for event in events if event["event"] not in MARKS and event["n"] > sent]
