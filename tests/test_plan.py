"""What `pasnet plan` says before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
    assert first["checkpoint_bytes"] == 8 * of.parameters
    assert first["hours"] is None and planned["totals"]["hours"] is None
    said = "\n".join(lines(planned))
    assert "no measurement for no such card; give --clips-per-second or run `make bench`" in said
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
