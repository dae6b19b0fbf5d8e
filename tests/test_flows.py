"""The flow itself: every fusion style on tiny videos, what a second run does, and a real server with a real worker."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_caffe import public_tensors
from test_fetch import Served, server  # noqa: F401 - a fixture

from pasnet.config import FUSION_TITLES
from pasnet.experiments import EXTRA_TABLES, QUESTIONS
from pasnet.tracking import client

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prefect")


def run_flow(home: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PREFECT_HOME": str(home)}
    env.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "flows", "--preset", "tiny", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=700)


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_fusion_style_and_a_second_run(
    home: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PASNET_TRAININGS", "2")  # they are small: most of it is Python's start
    data = shutil.copytree(videos, tmp_path / "data")
    victim = sorted((data / "videos").rglob("*.avi"))[0]
    victim.write_bytes(b"damaged")  # set aside with its reason; the run goes on
    arguments = ("--data", str(data), "--out", "out", "--tables", "table-1", "table-2", "--fusions", *FUSION_TITLES)
    first = run_flow(home, tmp_path, *arguments)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "processes started; " in first.stdout and "of which none of its processes ran" in first.stdout
    assert "seconds: videos" in first.stdout and "1 set aside" in first.stdout
    study = results_of(tmp_path / "out")
    done = study["results"]
    assert len(done) == 16 and all(record["status"] == "done" for record in done)
    assert {record["fusion"] for record in done} == set(FUSION_TITLES)
    assert {record["strategy"] for record in done} == {"eco", "conventional", "twice-finetune"}
    assert (study["shards"][0]["videos"], study["shards"][0]["failed"]) == (11, 1)
    assert len({folder for record in done for folder in record["trainings"]}) == 13  # shared between the tables

    page = (tmp_path / "out" / "RESULTS.md").read_text()
    assert "**ucf-layout**, 11 videos" not in page and "**synthetic**, 11 videos" in page
    assert "width 0.0625" in page and "random start" in page and "Not the paper's setting" in page
    assert "| A + 0.5 pool(I) + pool(F) | twice-finetune | synthetic, 1, 0 | 2 | 91.37 (98.04) |" in page

    mlflow = client(f"sqlite:///{tmp_path / 'out' / 'mlflow.db'}")
    by_table = {}
    for name in ("pasnet/fusion", "pasnet/training-strategy"):
        experiment = mlflow.get_experiment_by_name(name)
        assert experiment is not None
        runs = mlflow.search_runs([experiment.experiment_id], max_results=100)
        [parent] = [run for run in runs if run.data.tags["kind"] == "table"]
        children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        assert len(children) == len(runs) - 1
        assert len({tuple(sorted(run.data.params)) for run in children}) == 1  # the same names, so that they compare
        by_table[name] = {run.data.params["fusion"]: run for run in children}
        assert all({"test/top1", "test/top5", "gap_to_paper"} <= run.data.metrics.keys() for run in children)
    assert set(by_table["pasnet/fusion"]) == set(FUSION_TITLES) - {"A+1*1conv"}
    best = by_table["pasnet/fusion"]["A+pool(I)+pool(F)"]
    [record] = [r for r in done if r["table"] == "table-2" and r["fusion"] == "A+pool(I)+pool(F)"]
    assert best.data.tags["paper_top1"] == "91.37" and best.info.run_id == record["run"]
    assert best.data.metrics["test/top1"] == record["top1"]
    assert any(artifact.path == "predictions.parquet" for artifact in mlflow.list_artifacts(best.info.run_id))

    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("last.pt")}
    again = run_flow(home, tmp_path, *arguments)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "epoch" not in again.stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("last.pt")} == stamps
    assert [record["run"] for record in results_of(tmp_path / "out")["results"]] == [record["run"] for record in done]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_failed_training_leaves_the_others_alone(home: Path, videos: Path, tmp_path: Path) -> None:
    (tmp_path / "pose.pth").write_bytes(b"no checkpoint")  # read by the rows with a pose network, not by ECO
    arguments = ("--tables", "table-1", "--fusions", "A", "Conv(A,I)", "--pose-weights", "pose.pth")
    ran = run_flow(home, tmp_path, "--data", str(videos), "--out", "out", *arguments)
    assert ran.returncode == 1 and "Traceback" not in ran.stderr
    assert "error: 2 of 3 trainings failed" in ran.stderr
    by_row = {(record["fusion"], record["strategy"]): record for record in results_of(tmp_path / "out")["results"]}
    assert {row: record["status"] for row, record in by_row.items()} == {
        ("A", "eco"): "done",
        ("Conv(A,I)", "conventional"): "failed",
        ("Conv(A,I)", "twice-finetune"): "failed",
    }
    assert "pose.pth: refused, not readable as plain tensors" in by_row["Conv(A,I)", "conventional"]["reason"]
    assert (
        f"{by_row['A', 'eco']['top1']:.2f}" in ran.stdout and "failed: " in ran.stdout
    )  # the table is printed all the same
    assert "failed: " in (tmp_path / "out" / "RESULTS.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_killed_study_goes_on_where_it_was(home: Path, videos: Path, tmp_path: Path) -> None:
    arguments = ("--data", str(videos), "--out", "out", "--fusions", "A", "--set", "optim.epochs=120")
    env = {**os.environ, "PREFECT_HOME": str(home)}
    command = [sys.executable, "-m", "flows", "--preset", "tiny", *arguments]
    with open(tmp_path / "log", "wb") as log:
        flow = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log, start_new_session=True)
    wait_for(lambda: list(tmp_path.rglob("history.json")), "the first epoch", 300)
    os.killpg(flow.pid, signal.SIGKILL)
    flow.wait()
    [history] = tmp_path.rglob("history.json")
    done = len(json.loads(history.read_text()))
    assert done < 120 and not list(tmp_path.rglob("done.json"))
    again = run_flow(home, tmp_path, *arguments)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "going on after epoch" in again.stdout and "epoch   1/120" not in again.stdout
    assert [record["epoch"] for record in json.loads(history.read_text())] == list(range(1, 121))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_what_make_smoke_runs(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Preset smoke as it is, but for the size of networks and the length of trainings: every kind of step, embedded
    videos in both layouts, fetched from this machine, a D0 with an ECO and a pose network of its own."""
    small = ("model.width=0.0625", "data.input_size=48", "optim.epochs=1")
    monkeypatch.setenv("PASNET_TRAININGS", "2")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # one that answers nobody: all of it is on this machine
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    ran = run_flow(home, tmp_path, "--preset", "smoke", "--out", "out", *(f"--set={change}" for change in small))
    assert ran.returncode == 0, ran.stderr[-3000:]
    study = results_of(tmp_path / "out")
    found = {(of["table"], of["fusion"], of["dataset"], of["status"]) for of in study["results"]}
    styles = ("A", "Conv(A,I)", "A+pool(I)+pool(F)")
    assert found == {
        *(("table-2", style, "synthetic", "done") for style in styles),
        ("figure-2", "A+pool(I)+pool(F)", "synthetic-hmdb", "done"),
    }
    assert {of["start"] for of in study["results"]} == {
        "ECO from synthetic-d0",
        "ECO from synthetic-d0, pose from our own pose network",
    }
    assert [of["dataset"] for of in study["shards"]] == ["synthetic", "synthetic-hmdb", "synthetic-d0"]
    for name, count in (("synthetic", 150), ("synthetic-hmdb", 84)):  # what was packed is what was fetched
        [fetched] = (tmp_path / "out" / "data" / name).glob("fetched-*")
        assert f"{fetched.name}: {count} videos, all that the split lists name" in ran.stdout
        notes = json.loads((tmp_path / "out" / "shards" / name / "parts" / "build.json").read_text())
        assert Path(notes["videos"]).samefile(fetched / "videos")
    [weights] = (tmp_path / "out" / "pose").glob("*/fetched/pose.safetensors")  # and what PAS-Nets start from, too
    assert f"{weights.relative_to(tmp_path)}: OpenPose body network, COCO" in ran.stdout
    assert weights.read_bytes() == (weights.parents[1] / "pose.safetensors").read_bytes()
    configs = [json.loads(path.read_text()) for path in (tmp_path / "out" / "trainings").glob("*/config.json")]
    started = [config["init"]["pose"] for config in configs if config["init"]["pose"]]
    assert started and all((tmp_path / path).samefile(weights) for path in started)
    assert study["figure_3"]["picture"] and (tmp_path / "out" / "figures" / study["figure_3"]["picture"]).is_file()
    page = (tmp_path / "out" / "RESULTS.md").read_text()
    clips = ", ".join(study["figure_3"]["clips"])
    assert "### Fig. 3: heat maps before and after" in page and f"Test clips: {clips}." in page


FETCHING = """
import dataclasses, sys
from pasnet.registry import REGISTRY
from shards.fetch import SOURCES, Archive, Source
url = sys.argv[1]
videos, lists = (Archive(name=name, urls=(f"{url}/{name}",)) for name in ("videos.zip", "lists.zip"))
SOURCES["tiny"] = Source(name="tiny", videos=videos, splits=lists, terms="none", homepage="none")
REGISTRY["pose"] = dataclasses.replace(REGISTRY["pose"], urls=(f"{url}/{REGISTRY['pose'].file}",), size=None, sha256="")
from flows.__main__ import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_study_fetches_what_is_not_there(
    home: Path,
    videos: Path,
    tmp_path: Path,
    server: Served,  # noqa: F811
) -> None:
    """Archives and weights from a local server that breaks off once; the second run asks it for nothing."""
    lists = next(path for path in videos.iterdir() if path.is_dir() and path.name != "videos")
    for name, folder in (("videos", videos / "videos"), ("lists", lists)):
        made = shutil.make_archive(str(tmp_path / name), "zip", folder.parent, folder.name)
        server.files[f"{name}.zip"] = Path(made).read_bytes()
    torch.save(public_tensors("pose"), tmp_path / "pose.pth")
    server.files["body_pose_model.pth"] = (tmp_path / "pose.pth").read_bytes()
    server.cuts = [200]  # of whichever is asked for first
    env = {**os.environ, "PREFECT_HOME": str(home), "no_proxy": "127.0.0.1"}
    env.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-c", FETCHING, server.url, "--preset", "tiny", "--data", "data/tiny", "--out", "out"]
    command += ["--fusions", "A", "--pose-weights", "pose", "--fetch"]
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-3000:]
    assert "data/tiny: 12 videos, all that the split lists name" in ran.stdout and "== fetch" in ran.stdout
    assert (tmp_path / "weights" / "body_pose_model.pth").read_bytes() == server.files["body_pose_model.pth"]
    [record] = results_of(tmp_path / "out")["results"]
    assert (record["status"], record["dataset"], record["missing"]) == ("done", "ucf-layout", 0)
    asked = len(server.asked)
    assert asked == 4 and sum(bool(start) for _, start, _ in server.asked) == 1  # three files, one of them resumed
    again = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "epoch" not in again.stdout, again.stderr[-3000:]
    assert len(server.asked) == asked


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def artifacts(env: dict[str, str]) -> list[dict[str, Any]]:
    """What the flows have left to look at."""
    asked = urllib.request.Request(
        f"{env['PREFECT_API_URL']}/artifacts/filter", data=b"{}", headers={"Content-Type": "application/json"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=60) as answer:
        found: list[dict[str, Any]] = json.load(answer)
    return found


@pytest.fixture
def prefect_server(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Prefect server and a process worker on loopback; yields the environment that reaches them."""
    env = {
        **os.environ,
        "PREFECT_HOME": str(tmp_path / "home"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_API_URL": f"http://127.0.0.1:{(port := free_port())}/api",
    }
    (tmp_path / "home").mkdir()
    started = []

    def start(*command: str) -> subprocess.Popen[bytes]:
        with open(tmp_path / f"{command[0]}.log", "wb") as log:
            process = subprocess.Popen(
                [BIN / "prefect", *command], env=env, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )
        started.append(process)
        return process

    try:
        start("server", "start", "--host", "127.0.0.1", "--port", str(port))
        wait_for(lambda: prefect(env, "work-pool", "ls").returncode == 0, "the server", 240)
        start("worker", "start", "--pool", "local", "--type", "process")
        wait_for(lambda: prefect(env, "work-pool", "inspect", "local").returncode == 0, "the worker's pool", 120)
        yield env
    finally:
        for process in reversed(started):  # the worker first: without a server it would wait
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def prefect(env: dict[str, str], *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "prefect", *arguments], env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


def wait_for(ready: Any, what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"{what} did not come up in {seconds:g} s"
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_deployment_runs_through_a_server_and_a_worker(
    prefect_server: dict[str, str], videos: Path, tmp_path: Path
) -> None:
    deployed = prefect(prefect_server, "--no-prompt", "deploy", "--all", timeout=120)
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    listed = prefect(prefect_server, "deployment", "ls").stdout
    for name in {"full-reproduction", "smoke", "figure-3", *QUESTIONS} - set(EXTRA_TABLES):
        assert f"pasnet/{name}" in listed

    refused = prefect(prefect_server, "deployment", "run", "pasnet/full-reproduction", "--param", "num_segments=0")
    assert refused.returncode != 0 and "num_segments" in refused.stdout + refused.stderr

    absent = prefect(
        prefect_server, "deployment", "run", "pasnet/table-5", "--param", 'data=["nowhere"]', "--watch", timeout=200
    )
    assert absent.returncode != 0 and not (tmp_path / "out").exists()
    assert "data: there is no folder nowhere" in (tmp_path / "worker.log").read_text()

    planned = prefect(
        prefect_server, "deployment", "run", "pasnet/table-1", "--param", "dry_run=true", "--watch", timeout=200
    )
    assert planned.returncode == 0, planned.stdout[-2000:] + (tmp_path / "worker.log").read_text()[-3000:]
    assert "plan" in {of["key"] for of in artifacts(prefect_server)}
    assert "trainings, 0 of them done" in (tmp_path / "worker.log").read_text()

    data = shutil.copytree(videos, tmp_path / "data")
    sorted((data / "videos").rglob("*.avi"))[0].write_bytes(b"damaged")
    parameters = {"preset": "tiny", "data": [str(data)], "out": str(tmp_path / "out"), "tables": ["table-2"]}
    parameters |= {"eco_weights": "", "pose_weights": ""}  # else fetched, which wants a network
    given = [word for name, value in parameters.items() for word in ("--param", f"{name}={json.dumps(value)}")]
    ran = prefect(prefect_server, "deployment", "run", "pasnet/full-reproduction", *given, "--watch", timeout=500)
    assert ran.returncode == 0 and "Completed" in ran.stdout, (
        ran.stdout[-2000:] + (tmp_path / "worker.log").read_text()[-3000:]
    )
    records = results_of(tmp_path / "out")["results"]
    assert [record["status"] for record in records] == ["done", "done"]
    left = artifacts(prefect_server)
    assert {"results", "mlflow", "failures-synthetic"} <= {of["key"] for of in left}
    progress = {of["description"]: float(of["data"]) for of in left if of["type"] == "progress"}
    assert progress == {"synthetic: shards packed": 100, "trainings and evaluations": 100}
