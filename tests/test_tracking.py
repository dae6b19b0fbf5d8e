"""Tracking: everything arrives once, whatever the server and the training's process do meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock
from mlflow.entities import ViewType

from pasnet import execute, tracking
from pasnet.cli import main
from pasnet.config import ConfigError, DataConfig, ModelConfig, TrainConfig
from pasnet.journal import FILE, Journal, epochs_of, last_run, place_of, unsent
from pasnet.tracking import KEY, TRAININGS, LiveRun, Shipping, TrackingError, client, default_uri, send

DATASET = {"name": "ucf101", "digest": "0123456789abcdef" * 4, "folder": "/shards/ucf101", "split": 1}
PARAMS = {"optim.lr": 0.001, "model.fusion.style": "A"}
CLOSED = "http://127.0.0.1:9"


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty SQLite store; making its tables takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def uri(tables: Path, tmp_path: Path) -> str:
    """A SQLite store of the test's own, which nothing has been logged to."""
    shutil.copy(tables, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def opened(uri: str, out: Path, **more: Any) -> LiveRun:
    return LiveRun(uri, out, "A, K=8", PARAMS, {"out": str(out)}, dataset=DATASET, **more)


def record(epoch: int) -> dict[str, float]:
    return {"epoch": epoch, "train_loss": 1 / epoch, "test_top1": 10.0 * epoch}


def files(out: Path) -> None:
    """What a training and its evaluation leave."""
    (out / "evaluation").mkdir(parents=True, exist_ok=True)
    for name in (
        "config.json",
        "load_report.txt",
        "curve.png",
        "evaluation/predictions.parquet",
        "evaluation/maps.png",
    ):
        (out / name).write_text(name)


def runs_of(uri: str) -> list[Any]:
    """Every run, deleted ones too."""
    mlflow = client(uri)
    experiment = mlflow.get_experiment_by_name(TRAININGS)
    return (
        [] if experiment is None else list(mlflow.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL))
    )


def assert_all_there(uri: str, epochs: int, status: str = "FINISHED") -> Any:
    """One run, and each point, file and input in it once."""
    [run] = runs_of(uri)
    assert run.info.status == status
    assert run.data.params == {name: str(value) for name, value in PARAMS.items()}
    for name in ("train/loss", "test/top1", "system/process_peak_memory_megabytes"):
        points = client(uri).get_metric_history(run.info.run_id, name)
        assert sorted(point.step for point in points) == list(range(1, epochs + 1)), name
    assert [point.value for point in client(uri).get_metric_history(run.info.run_id, "test/top1")] == [
        10.0 * epoch for epoch in range(1, epochs + 1)
    ]
    [entry] = run.inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("ucf101", DATASET["digest"][:36])
    assert json.loads(entry.dataset.source) == {"uri": "/shards/ucf101/manifest.json"}
    return run


def artifacts_of(uri: str, run: str) -> set[str]:
    mlflow = client(uri)
    found = {item.path for item in mlflow.list_artifacts(run)}
    return found | {item.path for item in mlflow.list_artifacts(run, "evaluation")}


class Server:
    """MLflow's own REST application over a SQLite store, in this process, so that it stops and fails on demand."""

    def __init__(self, store: str, artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("_MLFLOW_SERVER_FILE_STORE", store)
        monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", "mlflow-artifacts:/")
        monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_DESTINATION", str(artifacts))
        monkeypatch.setenv("_MLFLOW_SERVER_SERVE_ARTIFACTS", "true")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", store)  # MLflow's server sets it; so it is unset again in the end
        import mlflow.server.handlers as handlers
        from mlflow.server import app

        for name in ("_tracking_store", "_artifact_repo", "_model_registry_store"):  # of the test before
            monkeypatch.setattr(handlers, name, None)
        self._app, self._server, self.port = app, None, 0
        self.writes = 0  # requests that changed something
        self.unanswered: int | None = None  # the number of the one that is carried out, and not answered
        self.points: list[tuple[str, int]] = []  # every metric point that was taken, (name, step)
        self.start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log(self, *_: Any) -> None:
                pass

        self._server = make_server("127.0.0.1", self.port, self._answer, threaded=True, request_handler=Quiet)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        import io

        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        path = environ["PATH_INFO"]
        writes = environ["REQUEST_METHOD"] != "GET" and not path.endswith("/search")
        result = list(self._app(environ, start))
        if path.endswith("/log-batch"):
            self.points += [(point["key"], int(point["step"])) for point in json.loads(body).get("metrics", [])]
        if writes:
            self.writes += 1
            if self.writes == self.unanswered:
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
                raise ConnectionAbortedError("no answer")
        return result


@pytest.fixture
def server(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    running = Server(uri, tmp_path / "server-artifacts", monkeypatch)
    yield running
    running.stop()


@contextmanager
def silent() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.05)


def python(code: str, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env={**os.environ, **(env or {})}
    )


class TestWhereItGoes:
    def test_sqlite_by_default_and_the_variable_wins(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert default_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there:5000")
        assert default_uri(tmp_path) == "http://there:5000"

    @pytest.mark.parametrize(
        ("variable", "option", "expected"),
        [
            ("", [], "sqlite:///{place}/mlflow.db"),
            ("http://there:1", [], "http://there:1"),
            ("http://there:1", ["--tracking-uri", "http://here:2"], "http://here:2"),
            ("http://there:1", ["--tracking-uri", "off"], "off"),
        ],
    )
    def test_train_asks_the_option_then_the_variable(
        self,
        variable: str,
        option: Sequence[str],
        expected: str,
        shard_folder: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        if variable:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
        seen: list[Any] = []
        monkeypatch.setattr(
            tracking, "LiveRun", lambda *given, **more: seen.append((given, more)) or LiveRun("off", *given[1:])
        )
        monkeypatch.setattr("pasnet.train.train", lambda *_: {"last": {"test_top1": 1.0}})
        assert (
            main(["train", "--preset", "tiny", "--shards", str(shard_folder), "--out", str(tmp_path / "a"), *option])
            == 0
        )
        [(given, more)] = seen
        assert given[0] == expected.format(place=tmp_path)
        manifest = json.loads((shard_folder / "manifest.json").read_text())
        assert more["dataset"]["digest"] == manifest["digest"]

    def test_two_that_make_the_tables_at_once_and_one_that_was_killed_at_it(self, tmp_path: Path) -> None:
        path, half = tmp_path / "mlflow.db", tmp_path / "mlflow.db.new-1"
        half.write_bytes(b"half of the tables")
        code = "import sys; from pasnet.tracking import client; print(client(sys.argv[1]).search_experiments()[0].name)"
        start = [sys.executable, "-c", code, f"sqlite:///{path}"]
        both = [subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        for each in both:
            said, complaint = each.communicate()
            assert (said, each.returncode) == ("Default\n", 0), complaint
        assert sorted(file.name for file in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]

    def test_an_empty_file_gets_tables_and_one_made_meanwhile_is_left(
        self, tmp_path: Path, tables: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from mlflow.store.tracking import sqlalchemy_store

        path = tmp_path / "a[b]" / "mlflow.db"
        path.parent.mkdir()
        path.touch()
        (path.parent / "mlflow.db.new-1").touch()
        assert client(f"sqlite:///{path}").search_experiments()[0].name == "Default"
        assert sorted(file.name for file in path.parent.iterdir()) == ["mlflow.db", "mlflow.db.lock"]

        other = tmp_path / "other.db"

        class Slow(sqlalchemy_store.SqlAlchemyStore):  # type: ignore[misc]
            def __init__(self, *given: Any) -> None:
                shutil.copy(tables, other)  # a server that the user started
                super().__init__(*given)

        monkeypatch.setattr(sqlalchemy_store, "SqlAlchemyStore", Slow)
        before = tables.read_bytes()
        tracking._make_tables(other)
        assert other.read_bytes() == before and not list(tmp_path.glob("other.db.new-*"))

    def test_a_lock_that_is_never_free_is_an_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tracking, "MAKING", 0.1)
        with FileLock(tmp_path / "mlflow.db.lock"), pytest.raises(TrackingError, match=r"mlflow\.db\.lock: another"):
            client(f"sqlite:///{tmp_path / 'mlflow.db'}")

    def test_off_imports_nothing_and_writes_nothing(self, tmp_path: Path) -> None:
        code = (
            "import sys; from pathlib import Path; from pasnet.tracking import LiveRun\n"
            "with LiveRun(sys.argv[2], Path(sys.argv[1]) / 'run', 'n', {}, {}) as live: live.epoch({'epoch': 1})\n"
            "print([name for name in ('mlflow', 'torch', 'numpy') if name in sys.modules])"
        )
        for off in ("off", ""):
            assert python(code, str(tmp_path), off).stdout == "[]\n"
        # of several processes that train together, the first alone tracks
        assert python(code, str(tmp_path), "sqlite:///x.db", env={"RANK": "1"}).stdout == "[]\n"
        assert list(tmp_path.iterdir()) == []

    def test_without_mlflow_the_journal_is_kept_for_later(self, uri: str, tmp_path: Path) -> None:
        code = (
            "import sys; sys.modules['mlflow'] = None\n"
            "from pathlib import Path; from pasnet.tracking import LiveRun\n"
            f"with LiveRun({uri!r}, Path(sys.argv[1]), 'A, K=8', {PARAMS!r}, {{}}, dataset={DATASET!r}) as live:\n"
            "    for n in (1, 2): live.epoch({'epoch': n, 'train_loss': 1 / n, 'test_top1': 10.0 * n})"
        )
        done = python(code, str(tmp_path / "run"))
        assert done.returncode == 0 and "install mlflow" in done.stderr
        send([tmp_path / "run"])  # to the address that the training was given
        assert_all_there(uri, 2)

    def test_passwords_stay_out_of_the_folder_and_off_the_screen(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with opened("http://me:secret@127.0.0.1:9", tmp_path) as live:
            live.epoch(record(1))
        assert place_of("sqlite:////a@b/mlflow.db") == "sqlite:////a@b/mlflow.db"
        assert "secret" not in (tmp_path / FILE).read_text() + "".join(capsys.readouterr())


class TestServerAway:
    def test_down_from_the_start(self, uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "run"
        with opened(CLOSED, out) as live:
            for epoch in (1, 2, 3):
                live.epoch(record(epoch))
            files(out)
        said = capsys.readouterr().err
        assert "MLflow at http://127.0.0.1:9 is not reachable" in said and f"pasnet track send {out}" in said
        assert said.count("not reachable") == 1
        kinds = [event["event"] for event in Journal(out).events()]
        assert kinds == ["start", "epoch", "epoch", "epoch", *5 * ["artifact"], "end"]

        assert main(["track", "send", str(out), "--tracking-uri", uri]) == 0
        assert ": 10 events sent" in capsys.readouterr().out
        run = assert_all_there(uri, 3)
        wanted = {
            "config.json",
            "load_report.txt",
            "curve.png",
            "evaluation/predictions.parquet",
            "evaluation/maps.png",
        }
        assert wanted <= artifacts_of(uri, run.info.run_id)
        assert main(["track", "send", str(out), "--tracking-uri", uri]) == 0
        assert ": 0 events sent" in capsys.readouterr().out
        assert_all_there(uri, 3)

    def test_one_that_never_answers_delays_neither_epochs_nor_the_end_of_the_process(self, tmp_path: Path) -> None:
        code = (
            "import sys, time; from pathlib import Path; from pasnet.tracking import LiveRun\n"
            "with LiveRun(sys.argv[1], Path(sys.argv[2]), 'n', {}, {}) as live:\n"
            "    time.sleep(1); began = time.monotonic()\n"  # the sender is in its first call by then
            "    for n in range(1, 21): live.epoch({'epoch': n, 'train_loss': 1 / n})\n"
            "    print(time.monotonic() - began, flush=True); began = time.monotonic()\n"
            "print(time.monotonic() - began, flush=True)"
        )
        with silent() as hanging:
            began = time.monotonic()
            done = python(code, hanging, str(tmp_path), env={"MLFLOW_HTTP_REQUEST_TIMEOUT": "600"})
            whole = time.monotonic() - began
        assert done.returncode == 0, done.stderr
        epochs, end = map(float, done.stdout.split())
        assert epochs < 5 and end < 15 and whole < 60  # a call that waits would wait for ten minutes
        assert "22 tracking events are not at" in done.stderr
        assert epochs_of(last_run(Journal(tmp_path).events())) == set(range(1, 21))

    def test_send_waits_for_a_dead_server_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("a", "b", "c"):
            with opened(CLOSED, tmp_path / "trainings" / name) as live:
                live.epoch(record(1))
        tries: list[str] = []
        real = client
        monkeypatch.setattr(tracking, "client", lambda uri: tries.append(uri) or real(uri))
        with pytest.raises(
            TrackingError, match=r"a: MLflow at .*127\.0\.0\.1:9: .*\(and 2 more\); nothing is lost: run"
        ):
            send([tmp_path])
        assert tries == [CLOSED]

    def test_dies_in_the_middle_and_is_sent_later(self, server: Server, uri: str, tmp_path: Path) -> None:
        out = tmp_path / "run"
        with opened(server.uri, out) as live:
            for epoch in (1, 2):
                live.epoch(record(epoch))
            until(lambda: not unsent(Journal(out).events(), server.uri))
            server.stop()
            for epoch in (3, 4):
                live.epoch(record(epoch))
        assert runs_of(uri)[0].info.status == "RUNNING"
        with pytest.raises(TrackingError):
            send([out], server.uri)
        server.start()
        send([out], server.uri)
        assert_all_there(server.uri, 4)
        assert sorted(server.points) == sorted(set(server.points))

    def test_one_that_comes_back_is_caught_up_with(
        self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tracking, "RETRY", 0.1)
        server.stop()
        with opened(server.uri, tmp_path / "run") as live:
            live.epoch(record(1))
            time.sleep(0.5)
            server.start()
            until(lambda: not unsent(Journal(tmp_path / "run").events(), server.uri))
            assert_all_there(server.uri, 1, "RUNNING")
        assert_all_there(server.uri, 1)

    def test_any_answer_may_be_lost(self, server: Server, tmp_path: Path) -> None:
        # what the server has done and the sender does not know of: the same as a sender killed before it noted it
        with opened(CLOSED, tmp_path / "run") as live:
            for epoch in (1, 2):
                live.epoch(record(epoch))
            (tmp_path / "run" / "config.json").write_text("{}")
        fresh = (tmp_path / "run" / FILE).read_text()
        server.writes = 0
        Shipping(ready(tmp_path / "whole", fresh), server.uri).ship()
        for lost in range(1, server.writes):  # the first time an experiment was made, too
            again = ready(tmp_path / f"lost{lost}", fresh.replace('"key": "', f'"key": "{lost}-'))
            server.writes, server.unanswered, server.points = 0, lost, []
            with pytest.raises(Exception, match=r"Max retries|Connection"):
                Shipping(again, server.uri).ship()
            server.unanswered = None
            Shipping(again, server.uri).ship()
            again.unlock()
            runs = [run for run in runs_of(server.uri) if run.data.tags[KEY].startswith(f"{lost}-")]
            assert [run.info.status for run in runs] == ["FINISHED"], lost
            assert sorted(server.points) == sorted(set(server.points)) and len(server.points) >= 6, lost
            assert len(runs[0].inputs.dataset_inputs) == 1 and len(runs[0].data.params) == 2

    def test_a_database_that_is_gone_is_filled_anew(self, uri: str, tables: Path, tmp_path: Path) -> None:
        with opened(uri, tmp_path / "run") as live:
            live.epoch(record(1))
        other = f"sqlite:///{tmp_path / 'other.db'}"
        shutil.copy(tables, tmp_path / "other.db")
        journal = tmp_path / "run" / FILE
        journal.write_text(journal.read_text().replace(uri, other))  # as if the file under that address were new
        with Journal(tmp_path / "run").path.open("a") as file:
            file.write(json.dumps({"n": 99, "time": 1, "event": "end", "status": "FINISHED"}) + "\n")
        send([tmp_path / "run"])
        assert_all_there(other, 1)


def ready(folder: Path, content: str) -> Journal:
    folder.mkdir()
    (folder / FILE).write_text(content)
    (folder / "config.json").write_text("{}")
    journal = Journal(folder)
    assert journal.lock()
    return journal


KILLED = """
import os, signal, sys, time
from pathlib import Path
from pasnet.tracking import LiveRun
live = LiveRun(sys.argv[1], Path(sys.argv[2]), "A, K=8", %r, {}, dataset=%r)
for n in (1, 2): live.epoch({"epoch": n, "train_loss": 1 / n, "test_top1": 10.0 * n})
if os.fork() == 0:  # a loader that outlives the training
    time.sleep(int(sys.argv[3])); os._exit(0)
if sys.argv[4] == "delivered":
    from pasnet.journal import unsent
    while unsent(live._journal.events(), sys.argv[1]): time.sleep(0.05)
os.kill(os.getpid(), signal.SIGKILL)
""" % (PARAMS, DATASET)  # noqa: UP031  braces in the code


class TestProcessGone:
    def killed(self, uri: str, out: Path, how: str = "delivered") -> None:
        process = subprocess.Popen([sys.executable, "-c", KILLED, uri, str(out), "5", how], stdout=subprocess.DEVNULL)
        assert process.wait() == -signal.SIGKILL

    def test_a_killed_training_is_marked_and_goes_on_in_its_run(self, uri: str, tmp_path: Path) -> None:
        out = tmp_path / "run"
        self.killed(uri, out)
        before = assert_all_there(uri, 2, "RUNNING")
        [line] = send([out])
        assert "it had been killed" in line
        assert before.info.run_id == assert_all_there(uri, 2, "KILLED").info.run_id
        assert runs_of(uri)[0].info.end_time == max(e["time"] for e in Journal(out).events() if e["event"] == "epoch")

        (out / "last.pt").write_text("a checkpoint")
        # epoch 3 was saved, and the training killed before it was tracked
        (out / "history.json").write_text(json.dumps([record(epoch) for epoch in (1, 2, 3)]))
        live = opened(uri, out, log_model=False)
        until(lambda: runs_of(uri)[0].info.status == "RUNNING")
        assert send([out]) == [f"{out}: its training runs, and sends by itself"]
        live.epoch(record(4))
        live.finish()
        [run] = runs_of(uri)
        assert (run.info.run_id, run.info.status) == (before.info.run_id, "FINISHED")
        points = client(uri).get_metric_history(run.info.run_id, "test/top1")
        assert [point.step for point in points] == [1, 2, 3, 4]

    def test_a_killed_training_is_marked_when_it_is_resumed(self, server: Server, tmp_path: Path) -> None:
        out = tmp_path / "run"
        self.killed(server.uri, out, how="at once")
        (out / "last.pt").write_text("a checkpoint")
        with opened(server.uri, out, log_model=False) as live:
            assert [e["event"] for e in Journal(out).events() if e["event"] in ("end", "resume")] == ["end", "resume"]
            live.epoch(record(3))
        assert_all_there(server.uri, 3)

    @pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
    def test_a_training_that_fails_says_so(
        self, error: type[BaseException], status: str, uri: str, tmp_path: Path
    ) -> None:
        with pytest.raises(error), opened(uri, tmp_path / "run") as live:
            live.epoch(record(1))
            raise error("lr is too high")
        assert assert_all_there(uri, 1, status).data.tags["reason"] == f"{error.__name__}: lr is too high"

    def test_a_finished_run_survives_a_refused_one_in_its_folder(self, uri: str, tmp_path: Path) -> None:
        with opened(uri, tmp_path / "run") as live:
            live.epoch(record(1))
        (tmp_path / "run" / "last.pt").write_text("a checkpoint")
        with pytest.raises(ConfigError), opened(uri, tmp_path / "run"):
            raise ConfigError("is a run with other settings")
        assert_all_there(uri, 1)

    def test_a_training_from_the_start_is_a_run_of_its_own(self, uri: str, tmp_path: Path) -> None:
        for _ in range(2):  # no last.pt the second time: somebody removed it
            with opened(uri, tmp_path / "run") as live:
                live.epoch(record(1))
        runs = runs_of(uri)
        assert len(runs) == 2
        (tmp_path / "run" / "history.json").write_text(json.dumps([record(epoch) for epoch in (1, 2)]))
        os.utime(tmp_path / "run" / "history.json", (1, 1))
        with pytest.raises(ValueError), opened(uri, tmp_path / "run"):
            raise ValueError("before the first epoch")
        assert [run.data.metrics for run in runs_of(uri) if run.info.status == "FAILED"] == [{}]
        assert [len(client(uri).get_metric_history(run.info.run_id, "test/top1")) for run in runs] == [1, 1]

    def test_a_line_torn_by_a_crash_costs_itself_alone(self, uri: str, tmp_path: Path) -> None:
        with opened(CLOSED, tmp_path) as live:
            live.epoch(record(1))
        journal = tmp_path / FILE
        lines = journal.read_text().splitlines()
        journal.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])  # of `end`
        send([tmp_path], uri)
        assert_all_there(uri, 1, "KILLED")

    def test_a_disk_that_takes_nothing_stops_no_training(
        self, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with opened(uri, tmp_path) as live:
            with monkeypatch.context() as full:
                full.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
                live.epoch(record(1))
            (tmp_path / "history.json").write_text(json.dumps([record(1)]))
            live.epoch(record(2))
        assert "No space left on device" in capsys.readouterr().err
        points = client(uri).get_metric_history(runs_of(uri)[0].info.run_id, "test/top1")
        assert [point.step for point in points] == [1, 2]

    def test_send_names_a_folder_without_a_journal(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["track", "send", str(tmp_path)]) == 2
        assert f"{tmp_path}: no tracking.jsonl in it; give" in capsys.readouterr().err


class TestStudy:
    def test_rows_that_a_dead_server_did_not_take_are_sent_later(
        self, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from pasnet.results import send as send_all

        with opened(CLOSED, tmp_path / "trainings" / "a") as live:
            live.epoch(record(1))
        row = {
            **{"status": "done", "table": "table-2", "title": "A", "strategy": "eco", "dataset": "ucf101"},
            **{"id": "row", "split": 1, "seed": 0, "num_segments": "8", "paper_top1": 90.0, "note": "n", "commit": "c"},
            **{"shard_digest": "d", "params": PARAMS, "metrics": {"test/top1": 10.0}, "history": [record(1)]},
            **{"artifacts": [], "trainings": ["a"]},
        }
        content = {"title": "t", "shards": [], "seconds": {}, "results": [row], "tracking": CLOSED}
        content["tags"] = {"study": "s", "folder": "f", "preset": "tiny"}
        (tmp_path / "results.json").write_text(json.dumps(content))
        # pages and drawings are not what this is about
        monkeypatch.setattr("pasnet.results._parents", lambda records: {})
        monkeypatch.setattr(
            "pasnet.results._write", lambda root, of: (root / "results.json").write_text(json.dumps(of))
        )
        with pytest.raises(TrackingError, match=r"took no results .*track send"):
            send_all([tmp_path])
        for _ in range(2):
            send_all([tmp_path], uri)
        assert_all_there(uri, 1)
        mlflow = client(uri)
        experiment = mlflow.get_experiment_by_name("pasnet/fusion")
        assert experiment is not None
        rows = mlflow.search_runs([experiment.experiment_id], "tags.kind = 'row'")
        written = json.loads((tmp_path / "results.json").read_text())
        assert [run.info.run_id for run in rows] == [written["results"][0]["run"]]


def test_a_real_training_with_its_data_and_its_model(
    shard_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow.data
    import mlflow.pyfunc
    import numpy as np
    import torch

    from pasnet.checkpoints import model_of

    out, settings = tmp_path / "runs" / "eco", ["--set", "data.workers=0", "--set", "data.num_segments=2"]
    settings += ["--set", "optim.epochs=1"]
    assert main(["train", "--shards", str(shard_folder), "--preset", "tiny", "--out", str(out), *settings]) == 0
    uri = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"  # the default, in a folder where there was none
    checkpoint = out / "last.pt"
    evaluation = ["--shards", str(shard_folder), "--out", str(out / "evaluation")]
    assert main(["evaluate", "--checkpoint", str(checkpoint), *evaluation]) == 0
    assert main(["track", "send", str(out)]) == 0

    [run] = runs_of(uri)
    assert run.info.status == "FINISHED" and run.data.params["optim.epochs"] == "1"
    manifest = json.loads((shard_folder / "manifest.json").read_text())
    [entry] = run.inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == (manifest["dataset"], manifest["digest"][:36])
    assert run.data.tags["shards.digest"] == manifest["digest"]
    assert Path(mlflow.data.get_source(entry).uri) == shard_folder / "manifest.json"
    assert {"test/top1", "train/loss", "system/cpu_utilization_percentage"} <= run.data.metrics.keys()
    wanted = {"config.json", "load_report.txt", "evaluation/predictions.parquet"}
    assert wanted <= artifacts_of(uri, run.info.run_id)

    [output] = run.outputs.model_outputs
    folder = client(uri).get_logged_model(output.model_id).artifact_location
    model = mlflow.pyfunc.load_model(folder)
    net, config = model_of(torch.load(checkpoint, map_location="cpu", weights_only=True))
    shape = (3, 2, 3, config.data.input_size, config.data.input_size)
    clips = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    with torch.no_grad():
        expected = net.eval()(torch.from_numpy(clips)).numpy()
    np.testing.assert_allclose(model.predict(clips), expected, rtol=1e-4, atol=1e-5)
    assert model.metadata.signature is not None
    [takes], [gives] = model.metadata.signature.inputs, model.metadata.signature.outputs
    assert (takes.type, takes.shape) == (np.dtype("uint8"), (-1, *shape[1:])) and gives.shape == (-1, 3)
    with pytest.raises(mlflow.exceptions.MlflowException):
        model.predict(clips.astype(np.float32))  # what the signature is for


def test_a_model_is_logged_unless_it_is_not_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shipping, "ship", lambda self: 0)
    wishes: dict[str, dict[str, bool]] = {"default": {}, "no": {"log_model": False}, "failed": {}}
    for name, wish in wishes.items():
        (tmp_path / name).mkdir()
        # 30 GB: its size is no reason to leave it out
        os.truncate(os.open(tmp_path / name / "last.pt", os.O_CREAT | os.O_WRONLY), 30 * 10**9)
        with suppress(ZeroDivisionError), opened(CLOSED, tmp_path / name, **wish):
            if name == "failed":
                raise ZeroDivisionError
    having = [name for name in wishes if any(e["event"] == "model" for e in Journal(tmp_path / name).events())]
    assert having == ["default"]


def test_a_model_that_cannot_be_exported_holds_nothing_up(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").write_text("no checkpoint")
    with opened(uri, tmp_path / "run") as live:
        live.epoch(record(1))
    assert "refuses event" in (said := capsys.readouterr().err) and "the export failed: " in said
    files(tmp_path / "run")  # what comes after it
    assert send([tmp_path / "run"], uri) and "predictions.parquet" in str(
        artifacts_of(uri, runs_of(uri)[0].info.run_id)
    )
    assert runs_of(uri)[0].info.status == "FINISHED"


@pytest.mark.parametrize(("status", "kept"), [(413, False), (503, True)])
def test_a_server_may_take_no_large_files(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, kept: bool
) -> None:
    class AnswerError(Exception):
        response = SimpleNamespace(status_code=status)

    def upload(self: Any, model_id: str, folder: str) -> None:
        assert int(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]) >= 300
        raise AnswerError

    monkeypatch.setattr(tracking, "_export", lambda *_: None)
    monkeypatch.setattr("mlflow.MlflowClient.log_model_artifacts", upload)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").write_text("a checkpoint")
    with opened(uri, tmp_path / "run"):
        pass
    assert int(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]) < 300
    left = unsent(Journal(tmp_path / "run").events(), place_of(uri))
    assert [event["event"] for event in left] == (["model"] if kept else [])


def test_a_model_is_that_of_its_own_run(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server was away; meanwhile another run was begun in the folder, whose checkpoint is not the first one's."""
    shipped: list[str] = []
    monkeypatch.setattr(tracking, "log_model", lambda server, run, path, computing: shipped.append(run))
    out = tmp_path / "run"
    out.mkdir()
    for _ in range(2):
        (out / "last.pt").unlink(missing_ok=True)
        with opened(CLOSED, out) as live:
            live.epoch(record(1))
            (out / "last.pt").write_text("a checkpoint")
    send([out], uri)
    first, second = sorted(runs_of(uri), key=lambda run: run.info.start_time)
    assert shipped == [second.info.run_id] != [first.info.run_id]


def test_a_study_may_do_without_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[Sequence[str]] = []
    monkeypatch.setattr(execute, "_run", lambda command, *_: commands.append(command))
    monkeypatch.setenv("PASNET_LOCKS", str(tmp_path))
    config = TrainConfig(model=ModelConfig(num_classes=3), data=DataConfig(shards="shards"))
    job = SimpleNamespace(folder=str(tmp_path / "job"), config=config, title="A")
    for wish in ("1", "0"):
        monkeypatch.setenv("PASNET_LOG_MODELS", wish)
        execute.run_training(job, "http://127.0.0.1:9")  # type: ignore[arg-type]
    assert [command[-1] for command in commands] == ["--log-model", "--no-log-model"]
    assert main(["train", *commands[1][1:], "--set", "nothing=1"]) != 0  # the option is one of pasnet train's
    monkeypatch.setenv("PASNET_LOG_MODELS", "no")
    with pytest.raises(ConfigError, match="PASNET_LOG_MODELS must be 1 or 0, got 'no'"):
        execute.run_training(job, "http://127.0.0.1:9")  # type: ignore[arg-type]


def test_the_end_does_not_wait_for_a_model_nor_break_one_off(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "PATIENCE_SQLITE", 5.0)  # what is before the model gets there
    seen: list[str] = []

    def slow(server: Any, run: str, path: Path, computing: Callable[[], Any]) -> None:
        with computing():
            time.sleep(6)
            seen.append(runs_of(uri)[0].info.status)

    monkeypatch.setattr(tracking, "log_model", slow)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").write_text("a checkpoint")
    with opened(uri, tmp_path / "run", log_model=True) as live:
        live.epoch(record(1))
    assert seen == ["FINISHED"]
