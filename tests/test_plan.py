"""What `pasnet plan` says before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pasnet import planning
from pasnet.cli import main
from pasnet.config import ConfigError, FusionConfig, ModelConfig
from pasnet.models.cost import cost
from pasnet.planning import lines, plan
from pasnet.study import Shards, Study, jobs

TINY = ("A", "A+pool(I)+pool(F)")


def test_a_study_can_be_planned_before_its_videos_are_there() -> None:
    study = Study(data=("nowhere/ucf101",), tables=("table-2",), fusions=TINY, splits=(1, 2))
    planned = plan(study, on="no such card")
    first, *_, last = planned["trainings"]
    assert [of["title"].split(",")[0] for of in planned["trainings"]] == ["A", "A + 0.5 pool(I) + pool(F)"] * 2
    # 40 epochs of the official split 1, each with the whole test list, and one evaluation more at the end
    assert (first["train_clips"], first["evaluated_clips"]) == (40 * 9_537, 41 * 3_783)
    assert last["evaluated_clips"] == 41 * 3_734  # split 2
    of = cost(ModelConfig(num_classes=101, fusion=FusionConfig(style="A")), 8)
    assert first["pflop"] == pytest.approx(2 * of.gmacs * (3 * 40 * 9_537 + 41 * 3_783) / 1e6, abs=1e-3)
    assert first["checkpoint_bytes"] == 8 * of.parameters and first["model_bytes"] == 4 * of.parameters
    assert first["hours"] is None and planned["totals"]["hours"] is None
    said = "\n".join(lines(planned))
    assert "no measurement for no such card; give --clips-per-second or run `python -m benchmarks models`" in said
    assert "not there, official counts" in said


def test_hours_follow_from_a_given_rate_and_the_work() -> None:
    study = Study(data=("nowhere/ucf101",), tables=("table-2",), fusions=TINY)
    eco, pas = plan(study, clips_per_second=10.0)["trainings"]
    # the network that the rate is of: training clips at that rate, evaluated ones three times as fast
    assert pas["hours"] == pytest.approx((40 * 9_537 + 41 * 3_783 / 3) / 10 / 3600, rel=1e-3)
    assert eco["hours"] == pytest.approx(pas["hours"] * eco["pflop"] / pas["pflop"], rel=1e-2)
    with pytest.raises(ConfigError, match="clips_per_second must be above 0"):
        plan(study, clips_per_second=0)


def test_a_benchmark_counts_on_its_own_hardware_and_in_its_own_precision(tmp_path: Path) -> None:
    def row(style: str, form: str, rate: float) -> dict[str, object]:
        return {"style": style, "num_segments": 8, "width": 1.0, "form": form, "clips_per_second": rate}

    rows = [
        row("A", "fp32", 90.0),
        row(TINY[1], "reference", 99.0),
        row(TINY[1], "fp32", 5.0),
        row(TINY[1], "fp32", 6.0),
        {**row(TINY[1], "fp32", 1e6), "width": 0.125},  # --quick
        row(TINY[1], "fp32, compiled", 12.0),
    ]
    content = {
        "hardware": "card",
        "tables": {"training": [*rows, {"style": "", "form": "fp32", "clips_per_second": 1.0}]},
    }
    (tmp_path / "model-speed-card.json").write_text(json.dumps(content))
    study = Study(data=("nowhere/ucf101",), tables=("table-2",), fusions=TINY)
    eco, pas = plan(study, on="card", benchmarks=tmp_path)["trainings"]
    assert "A, K=8, fp32" in eco["measured_by"] and "A+pool(I)+pool(F), K=8, fp32" in pas["measured_by"]
    assert pas["hours"] == pytest.approx((40 * 9_537 + 41 * 3_783 / 3) / 6 / 3600, rel=1e-3)
    fast = Study(data=study.data, tables=study.tables, fusions=TINY, overrides={"compile": True})
    # what compiling gains is a matter of the pose network: ECO's rate stays what was measured of it
    assert [of["hours"] for of in plan(fast, on="card", benchmarks=tmp_path)["trainings"]] == [
        eco["hours"],
        pytest.approx(pas["hours"] / 2, rel=1e-2),
    ]
    near = Study(data=study.data, tables=study.tables, fusions=("Conv(A,I)",))
    of = plan(near, on="card", benchmarks=tmp_path)["trainings"][-1]
    assert "A+pool(I)+pool(F), K=8" in of["measured_by"]  # the other network with a pose in it, not ECO
    assert plan(study, on="other", benchmarks=tmp_path)["totals"]["hours"] is None
    half = Study(data=study.data, tables=study.tables, fusions=TINY, overrides={"precision": "bf16"})
    assert plan(half, on="card", benchmarks=tmp_path)["totals"]["hours"] is None


def test_what_is_done_is_not_planned_again_and_measures_the_rest(
    shard_folder: Path, videos: Path, tmp_path: Path
) -> None:
    study = Study(data=(str(videos),), out=str(tmp_path), preset="tiny", seeds=(0, 1))
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "synthetic").symlink_to(shard_folder)
    made = jobs(study, [Shards.of(tmp_path / "shards" / "synthetic")])
    train, test = (made[0].config.data, Shards.of(shard_folder).subsets["split1"])
    done, half = Path(made[0].folder), Path(made[1].folder)
    for folder in (done, half):
        folder.mkdir(parents=True)
        (folder / "history.json").write_text(json.dumps([{"epoch": 1, "seconds": 2.0}]))
    (done / "done.json").write_text(json.dumps({"device": "CPU"}))
    (done / "last.pt").touch()
    (done / "evaluation").mkdir()
    (done / "evaluation" / "metrics.json").touch()
    planned = plan(study, benchmarks=tmp_path)
    first, second, third, _ = planned["trainings"]
    assert (first["state"], first["train_clips"], first["hours"]) == ("done", 0, 0.0)
    assert second["state"] == "1 of 1 epochs done" and second["evaluated_clips"] == test["test"]
    assert (third["state"], third["train_clips"]) == ("to do", test["train"])
    assert train.train_fraction == 1
    # the same network took 2 s for an epoch with its evaluation; here one evaluation more
    work = (3 * test["train"] + 2 * test["test"]) / (3 * test["train"] + test["test"])
    assert third["hours"] * 3600 == pytest.approx(2.0 * work, abs=0.2)  # hours have four digits
    assert "a finished training of this study" in third["measured_by"]
    assert planned["disk"]["shards"][0]["there"] and planned["disk"]["to_write"] > 0
    assert plan(study, benchmarks=tmp_path, on="another card")["totals"]["hours"] is None


def test_the_command_prints_the_plan_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--preset", "tiny", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["datasets"][0]["state"] == "to be generated"
    assert planned["datasets"][0]["subsets"]["split1"] == {"train": 6, "test": 3}
    assert main(["plan", "--preset", "tiny", "--data", "nowhere"]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert main(["plan", "--preset", "science"]) == 0
    assert capsys.readouterr().out.startswith("runs/science-synthetic: ")  # where `python -m flows` puts it
    assert not list(tmp_path.iterdir())


def test_rows_without_a_dataset_are_named() -> None:
    planned = plan(Study(data=("x/ucf101",), tables=("table-3", "table-5")), clips_per_second=1.0)
    assert planned["rows"]["run"] == 1
    assert planned["rows"]["not_run"][0]["reason"] == "no hmdb51 in this study"
    assert "not run: table-5/hmdb51" in "\n".join(lines(planned))


def test_a_set_to_learn_from_beforehand_is_planned_once_and_first() -> None:
    planned = plan(Study(preset="tiny", pretrain="synthetic", splits=(1, 2)), clips_per_second=1.0)
    titles = [of["title"] for of in planned["trainings"]]
    assert titles[0].startswith("pose network, synthetic-d0, ") and planned["trainings"][0]["pflop"] > 0
    assert [title.split(", ")[3] for title in titles[1:]] == [
        "synthetic-d0 split 1",
        *["synthetic split 1"] * 2,
        *["synthetic split 2"] * 2,
    ]
    assert {of["dataset"] for of in planned["datasets"]} == {"synthetic", "synthetic-d0"}
    alone = plan(Study(preset="tiny", pretrain="none", splits=(1, 2)), clips_per_second=1.0)
    assert len(alone["trainings"]) == 4


def test_the_disk_of_official_sets_is_estimated_before_they_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 10**12
    monkeypatch.setattr(planning, "_free", lambda path: free)
    data_folders, tables = (f"{tmp_path}/ucf101", f"{tmp_path}/hmdb51"), ("table-3", "table-5")
    study = Study(data=data_folders, tables=tables, out=str(tmp_path / "out"))
    disk = plan(study, clips_per_second=1.0)["disk"]
    sizes = {of["dataset"]: of["bytes"] for of in disk["shards"]}
    assert 45e9 < sizes["ucf101"] < 53e9  # the facts: about 48 GB
    assert sizes["hmdb51"] == pytest.approx(6_766 * 93.23 * 20_166, rel=1e-3)
    assert all(of["estimate"] and not of["there"] for of in disk["shards"])
    videos = {of["dataset"]: of for of in disk["videos"]}
    assert videos["ucf101"]["archives"] == 6_932_971_618 + 113_943 and videos["hmdb51"]["archives"] == 2.1e9
    assert not videos["ucf101"]["archives_estimate"] and videos["hmdb51"]["archives_estimate"]
    assert all(of["estimate"] and of["at_least"] and of["bytes"] > 2e9 for of in videos.values())
    data = sum(sizes.values()) + sum(of["archives"] + of["bytes"] for of in videos.values())
    assert disk["to_write"] >= data + disk["checkpoints"] + disk["models"] and disk["models"] > 5e9
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # another machine's disk
    elsewhere = plan(study)["disk"]
    assert elsewhere["models"] == 0 and elsewhere["to_write"] == disk["to_write"] - disk["models"]
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert disk["estimate"] and disk["at_least"] and disk["enough"] and not disk["elsewhere"]
    free = data  # enough for all but the checkpoints
    planned = plan(study, clips_per_second=1.0)
    assert not planned["disk"]["enough"]
    said = "\n".join(lines(planned))
    assert "shards ucf101 about 50.1 GB and hmdb51 about 12.7 GB; checkpoints" in said
    assert "archives 6.9 GB, videos at least about 6.9 GB" in said and "archives about 2.1 GB" in said
    assert "still to write at least about " in said and said.endswith(": NOT ENOUGH")


def test_what_is_not_known_is_said_to_be_at_least(tmp_path: Path) -> None:
    study = Study(data=(f"{tmp_path}/jhmdb",), preset="smoke", pretrain="none")
    disk = (planned := plan(study, clips_per_second=1.0))["disk"]
    assert planned["datasets"][0]["subsets"]["split3"] == {"train": 663, "test": 265}
    assert disk["shards"] == [{"dataset": "jhmdb", "bytes": None, "there": False, "estimate": False}]
    assert disk["at_least"] and disk["to_write"] > 2 * 185_602_053  # what is downloaded, and what is in it
    said = "\n".join(lines(planned))
    assert "jhmdb unknown until there are videos" in said and "still to write at least about" in said


def test_videos_on_another_disk_need_room_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setattr(planning, "_device", lambda path: int(path == other))
    monkeypatch.setattr(planning, "_free", lambda path: 10**9 if path == other else 10**12)
    study = Study(data=(f"{other}/ucf101",), tables=("table-2",), fusions=TINY, out=str(tmp_path / "out"))
    planned = plan(study, clips_per_second=1.0)
    disk = planned["disk"]
    [there] = disk["elsewhere"]
    assert there["to_write"] == 2 * 6_932_971_618 + 113_943 and there["free"] == 10**9
    assert disk["to_write"] <= disk["free"] and not disk["at_least"] and not disk["enough"]
    assert f"and on the disk of {other}/ucf101 at least about 13.9 GB, free 1.0 GB: NOT ENOUGH" in lines(planned)[-1]


def test_the_disk_of_embedded_sets_is_estimated_as_they_were_measured(tmp_path: Path) -> None:
    study = Study(preset="science", out=str(tmp_path))
    planned = plan(study, clips_per_second=1.0)
    by_name = {of["dataset"]: of for of in planned["disk"]["shards"]}
    # whole folders of shards of such studies, in November 2026
    assert by_name["synthetic"]["bytes"] == pytest.approx(9_276 * 12_894, rel=0.1)
    assert by_name["synthetic-d0"]["bytes"] == pytest.approx(15_480 * 13_772, rel=0.1)
    assert all(of["estimate"] for of in by_name.values()) and planned["datasets"][0]["shard_bytes_estimate"]
    assert planned["disk"]["estimate"] and not planned["disk"]["at_least"]
    first = planned["disk"]["videos"][0]
    assert first["archives"] == 0 and first["bytes"] == pytest.approx(9_276 * 2_024, rel=0.1)
    assert "still to write about " in lines(planned)[-1]
    (tmp_path / "data" / "synthetic").mkdir(parents=True)
    (tmp_path / "data" / "synthetic" / "joints.parquet").touch()  # generated, but not packed
    assert [of["dataset"] for of in plan(study, clips_per_second=1.0)["disk"]["videos"]] == ["synthetic-d0"]
