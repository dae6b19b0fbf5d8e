"""The two doors, as a person uses them: messages of one line, exit codes, and a help that does not wait for torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flows.__main__ import main as flows_main
from pasnet import cli
from pasnet.cli import main
from pasnet.config import PoseTrainConfig
from pasnet.execute import run_pose_training
from pasnet.progress import EpochBar
from pasnet.study import PoseJob


def heavy_imports(module: str) -> set[str]:
    """What importing a module drags in."""
    code = f"import sys, {module}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {"torch", "prefect", "mlflow", "pyarrow", "webdataset", "torchvision"} & set(done.stdout.split())


def test_help_and_list_import_nothing_heavy() -> None:
    assert heavy_imports("pasnet.cli") == heavy_imports("pasnet.experiments") == set()


def test_training_needs_neither_prefect_nor_mlflow() -> None:
    assert heavy_imports("pasnet.train") & {"prefect", "mlflow", "webdataset"} == set()


def assert_one_line(shown: str, message: str) -> None:
    assert shown.startswith("error: ") and message in shown and shown.count("\n") == 1


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("synth", "shards", "train", "evaluate", "ensemble", "list", "report"))


def test_list_prints_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert "40 rows, 39 trainings per split and seed" in shown
    assert "91.37" in shown and "94.80" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--out", "x", "--shards", "{shards}", "--fusion", "A+B"], "unknown fusion 'A+B'"),
        (
            ["train", "--out", "x", "--shards", "{shards}", "--set", "data.num_segments=0"],
            "num_segments (K) must be at least 1",
        ),
        (
            ["train", "--out", "x", "--shards", "{shards}", "--set", "data.split=7", "--tracking-uri", "off"],
            "split 7 does not exist",
        ),
        (["train", "--out", "x", "--shards", "{empty}"], "not a finished shard folder"),
        (["train", "--out", "x", "--shards", "{shards}", "--set", "nothing"], "--set takes name=value"),
        (["train", "--out", "x"], "give --config FILE or --shards FOLDER"),
        (
            [
                "train",
                "--out",
                "x",
                "--shards",
                "{shards}",
                "--pose-weights",
                "no.pth",
                "--fusion",
                "I",
                "--tracking-uri=off",
            ],
            "no.pth: no such file",
        ),
        (["evaluate", "--checkpoint", "no.pt", "--shards", "{shards}", "--out", "x"], "no.pt: no such checkpoint"),
        (["shards", "build", "--data", "{empty}", "--out", "x"], "has no videos/ folder"),
        (["shards", "build", "--out", "x"], "give --data FOLDER"),
        (["shards", "build", "--data", "{videos}", "--out", "x", "--workers", "0"], "workers must be at least 1"),
        (["shards", "build", "--data", "{videos}", "--out", "x", "--num-shards", "0"], "num_shards must be at least 1"),
        (["shards", "build", "--data", "{videos}", "--out", "x", "--quality", "0"], "JPEG quality must be 1 to 100"),
        (["shards", "build", "--data", "{videos}", "--out", "x", "--max-failed", "2"], "max_failed is a share"),
        (["shards", "build", "--dataset", "ucf101", "--videos", "{empty}", "--out", "x"], "no split lists beside it"),
        (["shards", "build", "--dataset", "folder", "--videos", "{empty}", "--out", "x"], "no video in it"),
        (["shards", "verify", "nowhere"], "nowhere: no such folder"),
        (["shards", "stats", "{empty}"], "not a finished shard folder"),
        (["shards", "inspect", "{shards}", "--video", "nobody"], "no video called 'nobody'"),
        (["shards", "inspect", "{shards}", "--num-segments", "0"], "must be at least 1"),
        (["shards", "fetch", "kinetics"], "unknown dataset 'kinetics'"),
        (["train", "--out", "x", "--config", "{broken}"], "not JSON"),
        (["list", "--tables", "table-6"], "unknown table 'table-6'"),
        (["report", "{empty}"], "results.json: missing"),
        (["synth", "--out", "x", "--set", "num_classes=99"], "num_classes"),
        (["synth", "--out", "x", "--set", "clips=9"], "unknown setting 'clips'"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    shard_folder: Path,
    videos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{")
    places = {"{shards}": str(shard_folder), "{empty}": str(tmp_path / "empty"), "{videos}": str(videos)}
    places["{broken}"] = str(tmp_path / "broken.json")
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    assert_one_line(capsys.readouterr().err, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fusions", "A", "A+B"], "unknown fusion 'A+B'"),
        (["--num-segments", "0"], "num_segments (K) must be at least 1"),
        (["--splits", "4"], "splits are 1, 2 and 3"),
        (["--seeds", "-1"], "seeds must be at least 0"),
        (["--tables", "table-7"], "unknown table"),
        (["--preset", "huge"], "unknown preset"),
        (["--data", "{empty}"], "has no videos/ folder"),
        (["--data", "{novideos}"], "no video in it"),
        (["--set", "optim.epochs=0"], "epochs must be at least 1"),
        (["--set", "data.split=2"], "set by the study itself"),
        (["--eco-weights", "nowhere.pth"], "nowhere.pth: no such weights file"),
    ],
)
def test_the_flow_refuses_before_it_starts(
    arguments: list[str],
    message: str,
    videos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    shutil.copytree(videos / "ucfTrainTestlist", tmp_path / "bare" / "lists")
    (tmp_path / "bare" / "videos").mkdir()
    places = {"{empty}": str(tmp_path / "empty"), "{novideos}": str(tmp_path / "bare")}
    assert flows_main([places.get(argument, argument) for argument in arguments]) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert not (tmp_path / "runs").exists()


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pasnet.experiments.select_rows", lambda tables: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["list"])


def test_from_videos_to_accuracy_by_hand(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # what README shows, step by step: build, ECO finetune, PAS-Net from there, evaluation, live MLflow run
    shards, eco, pas = tmp_path / "shards", tmp_path / "eco", tmp_path / "pas"
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    small = ["--preset", "tiny", "--set", "data.num_segments=2", "--set", "data.workers=0", "--tracking-uri", uri]
    assert main(["shards", "build", "--data", str(videos), "--out", str(shards)]) == 0
    assert "12 videos" in capsys.readouterr().out
    assert main(["train", "--shards", str(shards), "--out", str(eco), *small]) == 0
    fusion = ["--fusion", "Conv(A, I, F)", "--parent", str(eco / "last.pt")]
    assert main(["train", "--shards", str(shards), "--out", str(pas), *fusion, *small]) == 0
    out = tmp_path / "evaluation"
    assert main(["evaluate", "--checkpoint", str(pas / "last.pt"), "--shards", str(shards), "--out", str(out)]) == 0
    assert "(3 videos)" in capsys.readouterr().out
    assert json.loads((out / "metrics.json").read_text())["videos"] == 3

    from pasnet.tracking import TRAININGS, client

    mlflow = client(uri)
    experiment = mlflow.get_experiment_by_name(TRAININGS)
    assert experiment is not None
    runs = mlflow.search_runs([experiment.experiment_id])
    assert sorted(run.data.params["model.fusion.style"] for run in runs) == ["A", "Conv(A,I,F)"]
    assert all(run.info.status == "FINISHED" and "test/top1" in run.data.metrics for run in runs)


def test_an_unreachable_tracking_server_does_not_stop_a_training(
    shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "train",
        "--shards",
        str(shard_folder),
        "--preset",
        "tiny",
        "--out",
        str(tmp_path),
        "--set",
        "data.workers=0",
    ]
    started = time.monotonic()
    assert main([*arguments, "--tracking-uri", "http://127.0.0.1:9"]) == 0
    assert (tmp_path / "done.json").is_file() and time.monotonic() - started < 60
    assert "MLflow at http://127.0.0.1:9 is not reachable" in capsys.readouterr().err


def test_a_config_says_all_of_a_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.json").write_text("{}")
    command = ["train", "--config", str(tmp_path / "c.json"), "--out", str(tmp_path / "out")]
    assert main([*command, "--parent", "eco/last.pt", "--fusion", "I"]) == 2
    assert "c.json says all of --fusion, --parent; change it there, or with --set" in capsys.readouterr().err


def test_an_ensemble_replaces_no_member(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    member = tmp_path / "a" / "predictions.parquet"
    member.write_bytes(b"mine")
    assert main(["ensemble", str(member), "--out", f"{tmp_path}/b/../a"]) == 2
    assert "holds predictions.parquet, a member" in capsys.readouterr().err and member.read_bytes() == b"mine"


def test_a_bar_counts_only_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on within an epoch has waited before this process began."""
    shown: list[str] = []
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    bar = EpochBar("epoch", 100, 50, 900.0, show=True)
    monkeypatch.setattr(bar._bar, "update", lambda task, completed, now: shown.append(now))
    bar._started -= 10.0
    bar.close_step(60, 1.0, 50.0, 901.0)
    assert "1.0 clips/s" in shown[0] and "data wait 10 %" in shown[0]


def test_without_rich_there_is_no_bar_but_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with EpochBar("epoch", 100, 50, 0.0, show=True) as bar:
        bar.close_step(60, 1.0, 50.0, 1.0)
    assert bar._bar is None


def test_a_pose_network_is_trained_as_the_study_asks(videos: Path, shard_folder: Path, tmp_path: Path) -> None:
    """The very command of pasnet/execute.py."""
    config = PoseTrainConfig(width=0.0625, input_size=48, steps=1, batch=2, measure=2)
    job = PoseJob(config=config, shards=str(shard_folder), joints=str(videos / "joints.parquet"), folder=str(tmp_path))
    assert run_pose_training(job)
    assert Path(job.weights).is_file() and not run_pose_training(job)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'av'", name="av"), "needs the package av,"),
        # what a loader's process leaves of it
        (
            ModuleNotFoundError("Caught in DataLoader worker\n  import av\nNo module named 'av'\n"),
            "needs the package av,",
        ),
        (ModuleNotFoundError("Caught in DataLoader worker\nNo module named 'pasnet.gone'\n"), None),
    ],
)
def test_a_package_that_is_not_there_is_named(
    error: Exception, said: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "_list", fail)
    if said is None:  # a mistake of ours: with its traceback
        with pytest.raises(ModuleNotFoundError):
            main(["list"])
    else:
        assert main(["list"]) == 1 and said in capsys.readouterr().err
