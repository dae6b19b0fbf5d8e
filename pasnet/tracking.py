"""MLflow: the only module that imports it, and only where tracking is on. Layout: one experiment per question, a parent
run per table, a child run per row x dataset x split x seed; and a run per training in "pasnet/trainings", live while it
trains.

Nothing here may stop or stall a training. `LiveRun` writes what happens into the run folder's journal
(pasnet/journal.py), and a daemon thread, the sender, ships it; a server that is down, or that answers never, costs the
training nothing, and `send` ships later what is left: at the end of a study, or by `pasnet track send`.

Everything arrives once. The sender notes in the journal how far it got, after each event; it may be killed between the
sending and the noting, and then sends an event again. So every event is made to bear that: a run is looked up by the
journal's key before it is made, parameters, tags and statuses are equal to what they replace, a file replaces itself,
and metrics, which carry the time of the journal, are compared with the server's before the first are sent.

Uses MlflowClient with explicit run ids, since the fluent API's active run is per thread.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pasnet.config import ConfigError, digest
from pasnet.journal import FILE, Event, Journal, epochs_of, last_run, numbers, place_of, progress, unsent
from pasnet.machine import Load

if TYPE_CHECKING:
    from mlflow import MlflowClient

TRAININGS = "pasnet/trainings"
KEY = "pasnet.journal"  # tag of a run: which journal it comes from
OFF = "off"  # instead of an address: no tracking
# Seconds for which a training that has ended waits for its sender. A server may be away for ever. SQLite is this
# machine's own disk, where only the first use of a file takes long (6 to 12 s, making its tables).
PATIENCE, PATIENCE_SQLITE = 4.0, 30.0
MAKING = 300.0  # seconds for which another process may make a SQLite file's tables
RETRY = 5.0  # seconds, doubled with each failure in a row up to 5 minutes
MAX_PARAM = 6000  # characters; MLflow's limit


class TrackingError(RuntimeError):
    """Something could not be sent; it is still on disk."""


class ModelRefusedError(TrackingError):
    """A model that no second try would bring to the server."""


def models_wanted() -> bool:
    """Whether a study's networks go to MLflow as models: PASNET_LOG_MODELS, default 1. Raises ConfigError for what is
    neither 1 nor 0."""
    text = os.environ.get("PASNET_LOG_MODELS", "1")
    if text not in ("0", "1"):
        raise ConfigError(f"PASNET_LOG_MODELS must be 1 or 0, got {text!r}")
    return text == "1"


def default_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, else a SQLite file in `root` (MLflow's own file store is in maintenance)."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(root).absolute()}/mlflow.db"


def client(uri: str) -> MlflowClient:
    """A client for that address; telemetry off, migration messages off. A SQLite file that is not there is made."""
    prepare()
    from mlflow import MlflowClient

    path = uri.removeprefix("sqlite:///")
    if path not in (uri, "", ":memory:") and "?" not in path:
        _make_tables(Path(path))
    return MlflowClient(tracking_uri=uri)


def _make_tables(path: Path) -> None:
    """MLflow's tables in a SQLite file that is there whole or not at all, whoever else makes it at the same time.

    MLflow itself makes them in place by its migrations, without a lock: two trainings that start together, or
    one that is killed meanwhile, leave a file that it can never open again ("_alembic_tmp_experiments already exists").
    """
    path = path.resolve()
    if _has_content(path):
        return
    import mlflow.store.tracking.sqlalchemy_store as sqlalchemy_store
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f"{path.name}.lock")
    try:
        with FileLock(lock, timeout=MAKING):
            if _has_content(path):  # another process was first
                return
            for left in path.parent.glob(f"{glob.escape(path.name)}.new-*"):  # of a process that was killed
                left.unlink()
            new = path.with_name(f"{path.name}.new-{time.monotonic_ns()}")  # MLflow keeps connections by name
            store = sqlalchemy_store.SqlAlchemyStore(f"sqlite:///{new}", (path.parent / "mlartifacts").as_uri())
            store.engine.dispose()
            if _has_content(path):  # of a program that knows nothing of the lock, such as MLflow's own server
                new.unlink()
            else:
                new.replace(path)
    except Timeout as error:
        raise TrackingError(f"{lock}: another process has made {path.name} for {MAKING:g} s; end it") from error


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def prepare() -> None:
    """Imports mlflow, with waits that are bounded. Raises ImportError where it is not installed."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # MLflow's own defaults wait minutes for a server that is away, once per call
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    # Whatever the user has set: when the answer to "make a run" is lost, a try of MLflow's own makes a second run. The
    # sender tries again too, but looks first.
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    import logging

    import mlflow.data.dataset_source_registry
    import mlflow.entities  # noqa: F401

    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)


def experiment_id(mlflow: MlflowClient, name: str, uri: str) -> str:
    """The experiment's id; created where it is not, with its artifacts beside the SQLite file."""
    found = mlflow.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts" / name).as_uri()
    return str(mlflow.create_experiment(name, artifact_location=location))


def log_params(mlflow: MlflowClient, run: str, params: Mapping[str, Any]) -> None:
    """Parameters as text, 100 in a call, MLflow's limit."""
    from mlflow.entities import Param

    made = [Param(name, str(value)[:MAX_PARAM]) for name, value in params.items()]
    for start in range(0, len(made), 100):
        mlflow.log_batch(run, params=made[start : start + 100])


def log_history(mlflow: MlflowClient, run: str, history: Iterable[Mapping[str, Any]]) -> None:
    """One step per epoch record, in one call."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    curves = [
        Metric(metric_name(name), value, now, int(record["epoch"]))
        for record in history
        for name, value in numbers(record).items()
    ]
    for start in range(0, len(curves), 1000):  # MLflow's limit for one call
        mlflow.log_batch(run, metrics=curves[start : start + 1000])


def log_dataset(mlflow: MlflowClient, run: str, dataset: Mapping[str, Any]) -> None:
    """The shards as the run's input: their digest is the lineage, their folder the source."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    short = dataset["digest"][:36]  # MLflow's limit; the tag shards.digest of the run has all of it
    known = mlflow.get_run(run).inputs
    if any(seen.dataset.digest == short for seen in (known.dataset_inputs if known else ())):
        return
    source = {"uri": str(Path(dataset["folder"]) / "manifest.json")}
    profile = json.dumps(dataset.get("profile", {}))
    entity = Dataset(dataset["name"], short, "local", json.dumps(source), profile=profile)
    tags = [InputTag("mlflow.data.context", "training"), InputTag("split", str(dataset.get("split", "")))]
    mlflow.log_inputs(run, [DatasetInput(entity, tags)])


def lineage(shards: Path, split: int) -> dict[str, Any] | None:
    """What a run says of its data, from the shards' manifest; None where there is none to read."""
    try:
        manifest = json.loads((Path(shards) / "manifest.json").read_text("utf-8"))
        return {
            "name": manifest["dataset"],
            "digest": manifest["digest"],
            "folder": str(Path(shards).absolute()),
            "split": split,
            "profile": {name: manifest[name] for name in ("videos", "frames", "subsets") if name in manifest},
        }
    except (OSError, ValueError, KeyError):
        return None


def metric_name(name: str) -> str:
    """test_top1 -> test/top1, so that the UI groups curves."""
    return name.replace("_", "/", 1) if name.startswith(("train_", "test_")) else name


class LiveRun:
    """A training's own run, as a context manager around it: `epoch` takes each epoch's record, and the end is seen by
    how the block is left. Started again in the same folder, it goes on in the same MLflow run.

    No method raises or waits for a server, except that leaving the block waits a few seconds for the sender. Off, and
    nothing imported, when `uri` is "" or "off", and in every process but the first of several that train together.
    """

    def __init__(
        self,
        uri: str,
        out: Path,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        *,
        dataset: Mapping[str, Any] | None = None,
        log_model: bool = True,
    ) -> None:
        self._uri, self._out, self._log_model = uri, Path(out), log_model
        self._journal: Journal | None = None
        self._sender: _Sender | None = None
        self._load: Load | None = None
        self._status = ""  # how the run had ended before it was taken up again
        self._added = False  # an epoch since then
        if uri in ("", OFF) or os.environ.get("RANK", "0") != "0":
            return
        start = {"name": name, "params": dict(params), "tags": dict(tags), "dataset": dataset, "uri": place_of(uri)}
        with self._guarded("opening"):
            self._out.mkdir(parents=True, exist_ok=True)
            journal = Journal(self._out)
            # of a training that was killed a second ago, loader processes may be left for some seconds
            if not journal.lock(wait=10.0):
                raise TrackingError("another process trains or sends there")
            self._status = journal.begin(start, goes_on=(self._out / "last.pt").is_file())
            self._journal, self._load = journal, Load()
            try:
                # Here and not in the sender: it takes a second or two, but loader processes that are forked in the
                # midst of a thread's import would wait for that import for ever.
                prepare()
            except ImportError as error:
                _say(f"tracking is kept in {journal.path} and sent nowhere: {error}; install mlflow, then {self._hint}")
                return
            self._sender = _Sender(journal, uri, self._hint)
            self._sender.start()

    @property
    def _hint(self) -> str:
        return f"`pasnet track send {self._out}` sends it"

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Notes one epoch's record, and the machine's load during it."""
        if self._journal is None:
            return
        with self._guarded("an epoch"):
            number, load = int(record["epoch"]), self._load.take() if self._load else {}
            self._journal.backfill(before=number)
            if number not in epochs_of(last_run(self._journal.events())):
                self._journal.append("epoch", epoch=number, metrics=numbers(record) | load)
            self._journal.note_artifacts()
            self._added = True
        self._wake()

    def __enter__(self) -> LiveRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        else:
            # asked to stop, by the keyboard or by a signal whose exit code the error carries
            killed = not isinstance(error, Exception) or getattr(error, "exit_code", 0) > 128
            self.finish("KILLED" if killed else "FAILED", f"{type(error).__name__}: {error}")

    def finish(self, status: str = "FINISHED", reason: str = "") -> None:
        """Ends the run with MLflow's word for how: FINISHED, FAILED or KILLED; waits a few seconds for the sender."""
        journal, self._journal = self._journal, None
        if self._load:
            self._load.stop()
        if journal is None:
            return
        with self._guarded("the end"):
            journal.backfill()
            journal.note_artifacts()
            if status != "FINISHED" and self._status == "FINISHED" and not self._added:
                status, reason = self._status, ""  # a finished run in whose folder another was refused
            elif status == "FINISHED" and self._log_model and (self._out / "last.pt").is_file():
                journal.append("end", status=status, reason=reason)
                journal.append("model", path="last.pt")  # after the end, which is not to wait for a large file
                status = ""
            if status:
                journal.append("end", status=status, reason=reason)
        if self._sender is None:
            journal.unlock()
            return
        left = self._sender.close(PATIENCE_SQLITE if self._uri.startswith("sqlite") else PATIENCE)
        if left:
            _say(f"{left} tracking events are not at {place_of(self._uri)} yet; {self._hint}")

    def _wake(self) -> None:
        if self._sender is not None:
            self._sender.wake()

    @contextlib.contextmanager
    def _guarded(self, what: str) -> Any:
        """Tracking must leave the training alone, whatever goes wrong in it: a full disk, a folder that is not ours."""
        try:
            yield
        except Exception as error:
            _say(
                f"tracking: {what} was not noted in {self._out / FILE} ({_reason(error, self._uri)}); training goes on"
            )


class _Sender(threading.Thread):
    """Ships a journal while it grows. A daemon: a server that never answers keeps no process alive."""

    def __init__(self, journal: Journal, uri: str, hint: str) -> None:
        super().__init__(name="tracking-sender", daemon=True)
        self._journal, self._uri, self._hint = journal, uri, hint
        self._changed = threading.Condition()
        self._dirty, self._closing, self._given_up = True, False, False
        self._failures = 0  # since the last success
        self._shipping = Shipping(journal, uri, stop=lambda: self._given_up)

    def wake(self) -> None:
        """Says that there is something to send."""
        with self._changed:
            self._dirty = True
            self._changed.notify()

    def close(self, patience: float) -> int:
        """Sends what is left, for at most `patience` seconds; the number of events that are left then."""
        with self._changed:
            self._dirty = self._closing = True
            self._changed.notify()
        until = time.monotonic() + patience
        while self.is_alive() and time.monotonic() < until:
            self.join(0.1)
            if self._shipping.working:  # on this machine, not waiting; and no thread may be in torch when Python ends
                until = time.monotonic() + patience
        self._given_up = True  # a thread that still hangs in a call stops after it
        return len(unsent(self._journal.events(), place_of(self._uri)))

    def run(self) -> None:
        """Until closed: sends, and after a failure tries again, less and less often."""
        while not self._given_up:
            with self._changed:
                pause = min(300.0, RETRY * 2**self._failures) if self._failures else None
                # after a failure new events wait as well: each try may hang for as long as a timeout
                self._changed.wait_for(lambda: self._closing or (self._dirty and not self._failures), pause)
                closing, self._dirty = self._closing, False
            try:
                self._shipping.ship()
                self._failures = 0
            except Exception as error:  # of any kind: MLflow's, SQLAlchemy's, the network's
                if self._failures == 0:
                    reason = _reason(error, self._uri)
                    _say(
                        f"MLflow at {place_of(self._uri)} is not reachable ({reason}); training goes on, {FILE} in its "
                        f"folder has everything, and it is tried again; later {self._hint}"
                    )
                self._failures += 1
            if closing:
                break
        self._journal.unlock()  # not before: two senders of one journal might both make a run


class Shipping:
    """Brings a journal's events to one server, in order, each noted as it arrives."""

    def __init__(self, journal: Journal, uri: str, stop: Callable[[], bool] = lambda: False) -> None:
        self._journal, self._uri, self._place, self._stop = journal, uri, place_of(uri), stop
        self._mlflow: MlflowClient | None = None
        self._doubt = True  # whether metrics may be there that the journal does not know of
        self._lost = False
        self.working = False  # computing, not waiting for the server

    def ship(self) -> int:
        """Sends what has not been sent; the number of events. Raises what MLflow raises."""
        count = 0
        try:
            todo = unsent(self._journal.events(), self._place)
            while todo and not self._stop():
                try:
                    self._send(todo[0])
                except Exception as error:
                    if not self._forget_run(error):
                        raise
                    todo = unsent(self._journal.events(), self._place)  # all of it, to a new run
                    continue
                count += 1
                todo = todo[1:]
        except Exception:
            self._doubt = True
            raise
        return count

    def _send(self, event: Event) -> None:
        if self._mlflow is None:
            self._mlflow = client(self._uri)
        refused = ""
        try:
            self._apply(self._mlflow, event)
        except Exception as error:
            # What the server will never take must not hold up what comes after it. Of a run's start that is all.
            code = getattr(error, "error_code", "")
            no = code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "ENDPOINT_NOT_FOUND")
            if event["event"] == "start" or not (no or isinstance(error, ModelRefusedError)):
                raise
            refused = _reason(error, self._uri)
            _say(f"{self._journal.path}: {self._place} refuses event {event['n']}, {event['event']} ({refused})")
        self._journal.append("sent", place=self._place, upto=event["n"], **({"refused": refused} if refused else {}))

    def _apply(self, mlflow: MlflowClient, event: Event) -> None:
        kind, folder = event["event"], self._journal.folder
        if kind == "start":
            self._start(mlflow, event)
            return
        run = self._run_of(event)
        if kind == "resume":
            mlflow.update_run(run, status="RUNNING")
            mlflow.set_tag(run, "resumed", "true")
        elif kind == "epoch":
            self._metrics(mlflow, run, event)
        elif kind == "artifact":
            path = folder / event["path"]
            if path.is_file():  # not one that has been removed since
                parent = path.parent.relative_to(folder).as_posix()
                mlflow.log_artifact(run, str(path), None if parent == "." else parent)
        elif kind == "model":
            # not of a run that was begun anew in this folder: the file is that one's
            later = [other for other in self._journal.events() if other["n"] > event["n"]]
            if (folder / event["path"]).is_file() and all(other["event"] != "start" for other in later):
                log_model(mlflow, run, folder / event["path"], self._computing)
        elif kind == "end":
            if event.get("reason"):
                mlflow.set_tag(run, "reason", event["reason"][:500])
            mlflow.set_terminated(run, event["status"], event.get("at", event["time"]))
            for other in self._same_key(mlflow, self._start_of(event)["key"]):
                if other != run:  # a server so slow that the run was asked for again before it made the first
                    mlflow.delete_run(other)

    def _start(self, mlflow: MlflowClient, event: Event) -> None:
        run = progress(self._journal.events(), self._place)[1].get(event["key"])
        if run is None:
            found = self._same_key(mlflow, event["key"])
            if found:  # made by a sender that was killed, or lost the answer, before it noted the id
                run = found[0]
            else:
                experiment = experiment_id(mlflow, TRAININGS, self._uri)
                tags = {**event["tags"], KEY: event["key"]}
                made = mlflow.create_run(experiment, start_time=event["time"], run_name=event["name"], tags=tags)
                run, self._doubt = made.info.run_id, False
            self._journal.append("run", place=self._place, key=event["key"], run=run)
        log_params(mlflow, run, event["params"])
        if event.get("dataset"):
            mlflow.set_tag(run, "shards.digest", event["dataset"]["digest"])
            log_dataset(mlflow, run, event["dataset"])

    def _metrics(self, mlflow: MlflowClient, run: str, event: Event) -> None:
        from mlflow.entities import Metric

        step, when = int(event["epoch"]), event["time"]
        metrics = [Metric(metric_name(name), value, when, step) for name, value in event["metrics"].items()]
        if self._doubt:
            # MLflow's SQL stores drop an equal point by themselves; that is nowhere promised
            metrics = [
                metric
                for metric in metrics
                if all(
                    (seen.step, seen.timestamp) != (step, when) for seen in mlflow.get_metric_history(run, metric.key)
                )
            ]
        for start in range(0, len(metrics), 1000):
            mlflow.log_batch(run, metrics=metrics[start : start + 1000])
        self._doubt = False

    @contextlib.contextmanager
    def _computing(self) -> Any:
        self.working = True
        try:
            yield
        finally:
            self.working = False

    def _same_key(self, mlflow: MlflowClient, key: str) -> list[str]:
        experiment = experiment_id(mlflow, TRAININGS, self._uri)
        return [run.info.run_id for run in mlflow.search_runs([experiment], f"tags.`{KEY}` = '{key}'")]

    def _start_of(self, event: Event) -> Event:
        starts = [other for other in self._journal.events() if other["event"] == "start"]
        return [start for start in starts if start["n"] <= event["n"]][-1]

    def _run_of(self, event: Event) -> str:
        return progress(self._journal.events(), self._place)[1][self._start_of(event)["key"]]

    def _forget_run(self, error: Exception) -> bool:
        """Whether the server has lost the run (its database was removed, say), so that all is to be sent anew."""
        known = progress(self._journal.events(), self._place)[1]
        if self._lost or not known or getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
            return False
        self._lost = True
        self._journal.append("lost", place=self._place)
        return True


def send(folders: Sequence[Path], uri: str = "") -> list[str]:
    """Sends what is left of the journals in these run folders (or in the trainings/ of studies); a line for each.

    `uri` is the server's address; else MLFLOW_TRACKING_URI, else the one for which the training was started. A run
    whose process is gone without a word is ended as KILLED. Raises ConfigError for a folder without a journal, before
    anything is sent, and TrackingError when something could not be sent.
    """
    lines: list[str] = []
    failed: list[str] = []
    dead: set[str] = set()  # servers that do not answer; each is waited for once
    for folder in _journals(folders):
        journal = Journal(folder)
        if not journal.lock():
            lines.append(f"{folder}: its training runs, and sends by itself")
            continue
        try:
            lines.append(_send_journal(journal, uri, dead))
        except Exception as error:  # of any kind: MLflow's, SQLAlchemy's, the network's
            failed.append(f"{folder}: {_reason(error, uri)}")
        finally:
            journal.unlock()
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise TrackingError(
            f"{failed[0]}{more}; nothing is lost: run `pasnet track send` again when the server is there, or give "
            "another one with --tracking-uri"
        )
    return lines


def _send_journal(journal: Journal, uri: str, dead: set[str]) -> str:
    killed = journal.close_broken()
    journal.backfill()
    journal.note_artifacts()
    run = last_run(journal.events())
    if not run:
        return f"{journal.folder}: nothing to send"
    to = uri or os.environ.get("MLFLOW_TRACKING_URI") or [event["uri"] for event in run if "uri" in event][-1]
    place = place_of(to)
    if place in dead:
        raise TrackingError(f"not tried, since {place} did not answer before")
    try:
        count = Shipping(journal, to).ship()
    except Exception as error:
        # MLflow's word for no answer, too; a model may take too long on a server that is there
        if getattr(error, "error_code", "INTERNAL_ERROR") == "INTERNAL_ERROR" and not _next_is_model(journal, place):
            dead.add(place)
        raise TrackingError(f"MLflow at {place}: {_reason(error, to)}") from error
    known = progress(journal.events(), place)[1][run[0]["key"]]
    return f"{journal.folder}: {count} events sent to {place}, run {known}{'; it had been killed' if killed else ''}"


def _next_is_model(journal: Journal, place: str) -> bool:
    left = unsent(journal.events(), place)
    return bool(left) and left[0]["event"] == "model"


def _journals(folders: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for folder in map(Path, folders):
        here = [folder] if (folder / FILE).is_file() else []
        inside = [path.parent for path in sorted(folder.glob(f"trainings/*/{FILE}"))]
        if not here + inside and not (folder / "results.json").is_file():
            raise ConfigError(f"{folder}: no {FILE} in it; give the folder of a tracked training, or of a study")
        found += here + inside
    return found


def log_model(server: MlflowClient, run: str, checkpoint: Path, computing: Callable[[], Any]) -> str:
    """A checkpoint's network as the model of a run, with signature: uint8 clips (B,K,3,H,W) in, logits out.

    As an exported graph (pt2): it loads with torch alone, without this package, and without unpickling code. Returns
    the model's id; a model that is there already is not made again. `computing` is entered for what needs no server.
    Raises ModelRefusedError where the export fails, or the server says that it does not take such a file.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.entities.logged_model_status import LoggedModelStatus

    about = server.get_run(run)
    found = server.search_logged_models([about.info.experiment_id], f"source_run_id = '{run}'")
    ready = [model for model in found if model.status == LoggedModelStatus.READY]
    # one that is not ready is of a sender that was killed meanwhile
    logged = next(iter(ready or found), None) or server.create_logged_model(
        about.info.experiment_id, name="pasnet", source_run_id=run, model_type="action recognition"
    )
    model_id = str(logged.model_id)
    if not ready:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            try:
                with computing():
                    _export(checkpoint, folder, run, model_id)
            except Exception as error:
                raise ModelRefusedError(f"the export failed: {type(error).__name__}: {error}") from error
            try:
                with _time_to_upload():
                    server.log_model_artifacts(model_id, str(folder))
            except Exception as error:
                status = getattr(getattr(error, "response", None), "status_code", 0)
                if 400 <= status < 500 and status not in (401, 403, 408, 429):  # 413, say: too large for a proxy
                    raise ModelRefusedError(f"HTTP {status} for the model's files") from error
                raise
        server.finalize_logged_model(model_id, LoggedModelStatus.READY)
    outputs = about.outputs.model_outputs if about.outputs else []
    if all(output.model_id != model_id for output in outputs):
        server.log_outputs(run, [LoggedModelOutput(model_id, step=0)])
    return model_id


@contextlib.contextmanager
def _time_to_upload() -> Iterator[None]:
    """A server that stores hundreds of megabytes elsewhere answers when it has."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ[name]
    os.environ[name] = str(max(300, int(before)))
    try:
        yield
    finally:
        os.environ[name] = before


def _export(checkpoint: Path, folder: Path, run: str, model_id: str) -> None:
    import mlflow.pytorch
    import numpy as np
    import torch
    from mlflow.models import Model, infer_signature

    from pasnet.checkpoints import model_of

    net, config = model_of(torch.load(checkpoint, map_location="cpu", weights_only=True))
    net.eval()
    # two clips: in a batch of one the exported graph would be for batches of one
    shape = (2, config.data.num_segments, 3, config.data.input_size, config.data.input_size)
    example = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with torch.no_grad():
        logits = net(torch.from_numpy(example)).numpy()
    model = Model(run_id=run, model_id=model_id, model_uuid=model_id)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's, about its own archive
        mlflow.pytorch.save_model(
            net,
            str(folder),
            mlflow_model=model,
            signature=infer_signature(example, logits),
            input_example=example,
            serialization_format="pt2",
            pip_requirements=[f"torch=={torch.__version__.split('+')[0]}", f"numpy=={np.__version__}"],
        )
    # the example as JSON text would be larger than a small network
    for name in ("input_example.json", "serving_input_example.json"):
        (folder / name).unlink(missing_ok=True)
    model.saved_input_example_info = None  # type: ignore[assignment]
    model.save(str(folder / "MLmodel"))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _reason(error: Exception, uri: str) -> str:
    """The first line of an error, without what the address holds of user and password."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text.replace(uri, place_of(uri)) if uri else text


def record_rows(
    uri: str,
    results: Iterable[Mapping[str, Any]],
    *,
    experiments: Mapping[str, str],
    study: Mapping[str, str],
    tables: Mapping[str, tuple[Mapping[str, str], Mapping[str, str]]] | None = None,
) -> dict[str, str]:
    """Writes a parent run per table and a child per result, unless a child with the same result is there already.

    `results` are the records of pasnet/results.py, `experiments` maps tables to experiment names, `study` holds tags
    that all runs share, `tables` the parents' tags and files ({name: text}). Returns {record id: child run id}.
    """
    mlflow = client(uri)
    children: dict[str, str] = {}
    by_table: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        by_table.setdefault(result["table"], []).append(result)
    for table, rows in by_table.items():
        experiment = experiment_id(mlflow, experiments[table], uri)
        parent = _find(mlflow, experiment, {"study": study["study"], "table": table, "kind": "table"})
        if parent is None:
            tags = {**study, "table": table, "kind": "table"}
            parent = mlflow.create_run(experiment, run_name=f"{table}, {study['folder']}", tags=tags).info.run_id
        for result in rows:
            # the id holds a digest of the numbers: a row that was trained anew becomes a new run
            tags = {"study": study["study"], "result": digest(result["id"])}
            child = _find(mlflow, experiment, tags)
            if child is None:
                _end_broken(mlflow, experiment, tags)
            children[result["id"]] = child or _record(mlflow, experiment, parent, result, study)
        about, files = (tables or {}).get(table, ({}, {}))
        content = json.dumps({"results": [dict(row) for row in rows]})
        _fill_parent(mlflow, parent, about, {**files, "results.json": content})
    return children


def comparison(uri: str, experiment: str, runs: Sequence[str]) -> tuple[str, list[str]]:
    """The fragment of MLflow's address that sets these runs of an experiment side by side, and those that are there.
    Raises TrackingError where there is none."""
    mlflow = client(uri)
    found = mlflow.get_experiment_by_name(experiment)
    if found is None:
        raise TrackingError(f"no experiment {experiment} at {place_of(uri)}; a study that has ended writes it")
    ids = [str(found.experiment_id)]
    known = [run for run in runs if _is_there(mlflow, run)]
    if not known:
        raise TrackingError(f"experiment {experiment} at {place_of(uri)} holds no such table with rows")
    return f"#/compare-runs?runs={quote(json.dumps(known))}&experiments={quote(json.dumps(ids))}", known


def _is_there(mlflow: MlflowClient, run: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return bool(mlflow.get_run(run).info.lifecycle_stage == "active")
    except MlflowException:
        return False


def run_fragments(uri: str, runs: Iterable[str]) -> dict[str, str]:
    """The fragment of MLflow's address that shows a run, for each."""
    mlflow = client(uri)
    return {run: f"#/experiments/{mlflow.get_run(run).info.experiment_id}/runs/{run}" for run in runs}


def _fill_parent(mlflow: MlflowClient, parent: str, tags: Mapping[str, str], files: Mapping[str, str]) -> None:
    """Tags and files of a table's run; nothing is sent again that is there already."""
    content = digest([dict(tags), dict(files)])
    if mlflow.get_run(parent).data.tags.get("content") != content:
        for name, text in files.items():
            mlflow.log_text(parent, text, name)
        for name, value in tags.items():
            mlflow.set_tag(parent, name, value)
        mlflow.set_tag(parent, "content", content)  # the last: with it, all of it is there
    mlflow.set_terminated(parent)


def _record(
    mlflow: MlflowClient, experiment: str, parent: str, result: Mapping[str, Any], study: Mapping[str, str]
) -> str:
    tags = {
        **study,
        "mlflow.parentRunId": parent,
        "mlflow.note.content": result["note"],
        "kind": "row",
        "result": digest(result["id"]),
        "commit": result["commit"],
        **{name: str(result[name]) for name in ("table", "title", "strategy", "dataset", "split", "seed")},
        "paper_top1": str(result["paper_top1"]),
        "paper_top5": str(result.get("paper_top5")),  # results.json of before may have none
        "paper_protocol": result.get("paper_protocol", ""),
        "protocol": f"split {result['split']}",  # the mean over splits is the parent's
        "shards.digest": result["shard_digest"],
        **{f"weights.{part}": what for part, what in result.get("weights", {}).items()},
    }
    name = f"{result['title']}  {result['dataset']}/{result['split']}  K{result['num_segments']}  seed{result['seed']}"
    run: str = mlflow.create_run(experiment, run_name=name, tags=tags).info.run_id
    log_params(mlflow, run, result["params"])
    # The final numbers first: MLflow's compare page opens with the metric that a run logged first. At the last epoch's
    # step, since the UI shows the value of the highest step.
    for metric, value in result["metrics"].items():
        mlflow.log_metric(run, metric, value, step=len(result["history"]))
    log_history(mlflow, run, result["history"])
    dataset = lineage(Path(result["shards"]), result["split"]) if "shards" in result else None
    if dataset and dataset["digest"] == result["shard_digest"]:  # not of shards that were built anew since
        log_dataset(mlflow, run, dataset)
    for path in result["artifacts"]:
        several = len(result["trainings"]) > 1  # the networks of an ensemble: files of the same names
        mlflow.log_artifact(
            run, path, next(Path(t).name for t in result["trainings"] if t in path) if several else None
        )
    mlflow.set_terminated(run)
    return run


def _end_broken(mlflow: MlflowClient, experiment: str, tags: Mapping[str, str]) -> None:
    """A row whose sender was killed stays RUNNING for ever; it is made anew, and this one is ended."""
    words = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    for run in mlflow.search_runs([experiment], f"{words} and attributes.status = 'RUNNING'"):
        mlflow.set_terminated(run.info.run_id, "KILLED")


def _find(mlflow: MlflowClient, experiment: str, tags: Mapping[str, str]) -> str | None:
    words = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    if tags.get("kind") != "table":  # a table's run is taken up again; a row's that broke off is made anew
        words += " and attributes.status = 'FINISHED'"
    found = mlflow.search_runs([experiment], words, max_results=1)
    return str(found[0].info.run_id) if found else None
