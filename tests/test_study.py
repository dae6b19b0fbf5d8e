"""What the study would run for given datasets, and what its page says; no training here."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pasnet import execute, provenance
from pasnet.config import ConfigError, flatten, to_dict
from pasnet.evaluate import Predictions
from pasnet.experiments import PRESETS, ROWS
from pasnet.planning import lines, plan
from pasnet.report import results_page, summary_table, table_csv
from pasnet.results import GIVEN, collect
from pasnet.study import (
    D0_EMBEDDED,
    EMBEDDED,
    EMBEDDED_SETS,
    Shards,
    Study,
    check_datasets,
    dataset_for,
    jobs,
    synth_config,
)

COUNTS = {f"split{split}": {"train": 200, "test": 80} for split in (1, 2, 3)}


def shards(dataset: str, classes: int = 5) -> Shards:
    return Shards(
        dataset=dataset,
        folder=f"/somewhere/{dataset}",
        digest=f"digest of {dataset}",
        num_classes=classes,
        videos=280,
        frames=28_000,
        failed=0,
        decoded_with_errors=0,
        missing=0,
        subsets=COUNTS,
    )


BOTH = (shards("ucf101", 101), shards("hmdb51", 51))


def test_the_full_study_is_39_trainings_per_split_and_seed() -> None:
    assert len(jobs(Study(), BOTH)) == 39
    assert len(jobs(Study(splits=(1, 2, 3), seeds=(0, 1)), BOTH)) == 39 * 6


def test_jobs_start_from_what_the_strategy_says() -> None:
    made = {job.folder: job for job in jobs(Study(tables=("table-1",)), BOTH)}
    order = list(made)
    for folder, job in made.items():
        twice = job.training.strategy == "twice-finetune"
        assert bool(job.parent) == bool(job.config.init.parent) == twice
        if twice:
            parent = made[job.parent]
            assert order.index(job.parent) < order.index(folder)
            assert parent.training.strategy == "eco" and parent.config.data.num_segments == job.config.data.num_segments
            assert job.config.init.parent == str(Path(job.parent) / "last.pt")
    assert {job.training.strategy for job in made.values()} == {"eco", "conventional", "twice-finetune"}


def test_rows_run_on_their_own_dataset_or_on_a_stand_in() -> None:
    rows = {row.dataset: row for row in Study(tables=("table-4",)).rows}
    both = ("ucf101", "hmdb51")
    assert [dataset_for(rows[name], both) for name in both] == ["ucf101", "hmdb51"]
    assert dataset_for(rows["ucf101"], ("jhmdb",)) == "jhmdb"
    assert dataset_for(rows["hmdb51"], ("jhmdb",)) is None
    assert dataset_for(rows["ucf101"], ("hmdb51",)) is None
    embedded = ("synthetic", "synthetic-hmdb")
    assert [dataset_for(rows[name], embedded) for name in both] == list(embedded)
    assert dataset_for(rows["ucf101"], embedded[1:]) is None and dataset_for(rows["hmdb51"], embedded[:1]) is None
    assert dataset_for(rows["hmdb51"], ("hmdb51", "synthetic-hmdb")) == "hmdb51"


@pytest.mark.parametrize(
    ("tables", "datasets", "message"),
    [
        ((), [("ucf101", (1, 2, 3)), ("ucf101", (1,))], "two of the data folders are ucf101"),
        (("table-2",), [("hmdb51", (1, 2, 3))], "no row of table-2 runs on hmdb51"),
        ((), [("ucf101", (1, 2, 3)), ("jhmdb", (1, 2, 3))], "jhmdb would stand in for ucf101, but .*ucf101.* does"),
        ((), [("hmdb51", (1, 2, 3)), ("synthetic-hmdb", (1,))], "would stand in for hmdb51, but hmdb51 does"),
        (
            ("table-2",),
            [("synthetic-hmdb", (1, 2, 3))],
            r"runs on synthetic-hmdb \(synthetic-hmdb stands in for HMDB-51",
        ),
        ((), [("ucf101", (2, 3))], r"ucf101: split 1 has no train or no test videos; it has \[2, 3\]"),
    ],
)
def test_what_cannot_be_run_is_refused_before_decoding(tables: Any, datasets: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_datasets(Study(tables=tables), datasets)


def test_a_dataset_of_other_tables_is_left_alone() -> None:
    both = [("ucf101", (1, 2, 3)), ("hmdb51", (1, 2, 3))]
    assert check_datasets(Study(tables=("table-2",)), both) == {"ucf101"}
    assert check_datasets(Study(), both) == {"ucf101", "hmdb51"}
    embedded = [("synthetic", (1, 2, 3)), ("synthetic-hmdb", (1, 2, 3))]
    assert check_datasets(Study(tables=("table-2",)), embedded) == {"synthetic"}
    assert check_datasets(Study(tables=("table-5",)), embedded) == {"synthetic-hmdb"}


def test_smoke_has_every_kind_of_training_and_both_layouts() -> None:
    planned = plan(Study(preset="smoke"), clips_per_second=1.0)
    assert {of["dataset"] for of in planned["datasets"]} == {"synthetic", "synthetic-hmdb", "synthetic-d0"}
    assert planned["rows"] == {"run": 4, "not_run": [], "narrowed": ""}
    titles = [of["title"] for of in planned["trainings"]]
    assert (
        titles[0].startswith("pose network, synthetic-d0") and titles[1] == "A, K=8, eco, synthetic-d0 split 1, seed 0"
    )
    assert [title for title in titles if "synthetic-hmdb" in title] == [
        "A, K=8, eco, synthetic-hmdb split 1, seed 0",
        "A + 0.5 pool(I) + pool(F), K=8, twice-finetune, synthetic-hmdb split 1, seed 0",
    ]


def test_what_a_preset_adds_goes_where_something_is_chosen(tmp_path: Path) -> None:
    for chosen in ({"num_segments": 4}, {"tables": ("table-2",)}, {"fusions": ("A",)}, {"data": (str(tmp_path),)}):
        assert {row.table for row in Study(preset="smoke", **chosen).rows} == {"table-2"}
    order = PRESETS["smoke"].data
    assert Study(preset="smoke", data=order[::-1]).rows == Study(preset="smoke", data=order).rows  # it decides nothing
    names = {row.name for row in ROWS}
    assert all(set(preset.also) <= names for preset in PRESETS.values())


@pytest.mark.parametrize("preset", PRESETS)
def test_embedded_sets_have_seeds_of_their_own(preset: str) -> None:
    study = Study(preset=preset)
    assert len({synth_config(study, name).seed for name in (*EMBEDDED_SETS, D0_EMBEDDED)}) == 3
    d1, d0 = (synth_config(study, name) for name in (EMBEDDED, D0_EMBEDDED))
    assert d0.num_classes * d0.groups * d0.clips_per_group > d1.num_classes * d1.groups * d1.clips_per_group


def test_a_preset_that_narrows_a_table_says_so() -> None:
    study = Study(preset="smoke", tables=("table-1",), pretrain="none")
    assert study.narrowed == (
        "preset smoke has the styles A, Conv(A, I), A + 0.5 pool(I) + pool(F); 4 rows of other styles are left out"
    )
    assert any(study.narrowed in line for line in lines(plan(study, clips_per_second=1.0)))
    assert not Study(preset="smoke", tables=("table-1",), fusions=("A",)).narrowed
    assert not Study(preset="smoke").narrowed and not Study(tables=("table-1",)).narrowed


def test_k_can_be_replaced_only_where_no_row_is_about_k() -> None:
    assert {job.config.data.num_segments for job in jobs(Study(tables=("table-2",), num_segments=4), BOTH[:1])} == {4}
    with pytest.raises(ConfigError, match="num_segments replaces the paper's K"):
        Study(num_segments=4)


def test_the_micro_batch_fits_a_card_at_every_k() -> None:
    by_k = {
        job.config.data.num_segments: job.config.optim.micro_batch
        for job in jobs(Study(), BOTH)
        if job.config.model.needs_pose
    }
    assert by_k == {8: 16, 16: 8, 20: 4, 24: 4, 28: 4, 32: 4, 48: 2}
    assert all(k * micro * 131 <= 20_000 for k, micro in by_k.items())


def test_a_folders_name_follows_what_decides_its_content() -> None:
    def folders(study: Study, of: Shards = BOTH[0]) -> set[str]:
        return {Path(job.folder).name for job in jobs(study, (of,))}

    study = Study(tables=("table-2",), fusions=("A", "Conv(A,I)"))
    assert folders(study) == folders(replace(study, out="elsewhere"))
    assert folders(study) == folders(study, replace(BOTH[0], folder="/moved"))
    for other in (
        folders(study, replace(BOTH[0], digest="other frames")),
        folders(replace(study, overrides={"optim.lr": 0.5})),
        folders(replace(study, seeds=(1,))),
        folders(replace(study, splits=(2,))),
        folders(replace(study, num_segments=4)),
    ):
        assert not folders(study) & other


def test_a_change_of_the_eco_finetune_reaches_its_children() -> None:
    # the child's own settings are the same; only its parent's start differs
    def child(eco: str) -> str:
        study = Study(tables=("table-2",), fusions=("Conv(A,I)",), eco_weights=eco)
        return Path(jobs(study, BOTH)[-1].folder).name

    assert child("") != child(__file__)


def test_small_presets_use_a_share_of_a_large_set() -> None:
    [job, *_] = jobs(Study(preset="smoke"), (shards("jhmdb"),))
    assert job.config.data.train_fraction == pytest.approx(130 / 200)
    [job, *_] = jobs(Study(preset="smoke", overrides={"data.train_fraction": 1.0}), (shards("jhmdb"),))
    assert job.config.data.train_fraction == 1


def test_a_split_that_a_dataset_lacks_is_an_error() -> None:
    of = replace(BOTH[0], subsets={**COUNTS, "split2": {"train": 200, "test": 0}})
    with pytest.raises(ConfigError, match="ucf101: split 2 has no train or no test videos"):
        jobs(Study(splits=(2,)), (of,))


def finished(folder: str, top1: float) -> None:
    numbers = {
        "top1": top1,
        "top5": 99.0,
        "mean_class": top1,
        "top1_low": top1 - 5,
        "top1_high": top1 + 5,
        "videos": 80,
    }
    (Path(folder) / "evaluation").mkdir(parents=True)
    (Path(folder) / "evaluation" / "metrics.json").write_text(json.dumps(numbers))
    done = {"best_on_test": {"epoch": 1, "top1": top1 + 1}, "seconds": 7200, "device": "CPU", "commit": "abc"}
    (Path(folder) / "done.json").write_text(json.dumps(done))
    (Path(folder) / "history.json").write_text("[]")


def test_top5_stands_beside_the_papers(tmp_path: Path) -> None:
    study = Study(out=str(tmp_path), tables=("table-2",), fusions=("A+pool(I)",), seeds=(0, 1))
    made = jobs(study, (BOTH[0],))
    for job in made:
        finished(job.folder, 91.0)
    records = collect(study, (BOTH[0],), made, {})
    assert [(of["gap"], of["gap_top5"]) for of in records] == [(pytest.approx(-0.15), pytest.approx(0.8))] * 2
    assert records[0]["metrics"]["gap_to_paper_top5"] == pytest.approx(0.8)
    page = results_page([{"title": "t", "shards": [BOTH[0].__dict__], "results": records}])
    name = "| A + 1.5 pool(I) | twice-finetune | ucf101"
    assert f"{name}, 1, 0 | 8 | 91.15 (98.20) | 91.00 (99.00) | 86.0 to 96.0 | -0.15 (+0.80) |" in page
    assert f"{name} | 8 | 91.15 (98.20) | 91.00 (99.00) | 0.00 over 2 seeds | -0.15 (+0.80) | 0, 1 |" in page
    head, *rows = csv.reader(io.StringIO(table_csv(records)))
    assert [dict(zip(head, row, strict=True))["paper_top5"] for row in rows] == ["98.2", "98.2"]


def test_the_page_says_what_was_run_what_failed_and_what_was_not(tmp_path: Path) -> None:
    study = Study(out=str(tmp_path), tables=("table-4",))
    made = jobs(study, (BOTH[0],))
    failures = {made[0].folder: "loss is nan"}
    for job in made[1:]:
        finished(job.folder, 91.0)
    records = collect(study, (BOTH[0],), made, failures)
    by_status: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_status.setdefault(record["status"], []).append(record)
    assert {status: len(of) for status, of in by_status.items()} == {"done": 5, "failed": 1, "not run": 6}
    best = next(record for record in by_status["done"] if record["paper_top1"] == 94.1)
    assert (
        best["gap"] == pytest.approx(-3.1)
        and best["width"] == 1.0
        and best["differs"]
        == [
            "random start of ECO",
            "random start of the pose network",
        ]
    )
    assert best["start"] == "ECO from a random start, pose from a random start"

    content = {"title": "t", "shards": [BOTH[0].__dict__], "results": records}
    page = results_page([content])
    assert (
        "| PAS-Net, 32 frames | twice-finetune | ucf101, 1, 0 | 32 | 94.10 | 91.00 (99.00) | 86.0 to 96.0 | -3.10 |"
        in page
    )
    assert "| 92.00 | 2.000 |" in page  # best on test; hours
    assert "failed: loss is nan" in page and "not run: no hmdb51 in this study" in page
    assert "**width 1**" in page and "`abc`" in page
    assert "What differs: random start of ECO; random start of the pose network." in page  # whatever the width
    assert "94.10" in summary_table(records) and "failed: loss is nan" in summary_table(records)


def test_the_page_names_every_setting_that_is_not_the_papers(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"x")
    asked = {"out": str(tmp_path), "tables": ("table-2",), "fusions": ("A", "Conv(A,I)"), "eco_weights": str(weights)}
    differs = {}
    for name, more in {
        "as in the paper": {"pose_weights": str(weights)},
        "other": {
            "pose_weights": str(weights),
            "overrides": {"optim.epochs": 1, "model.width": 0.5},
            "num_segments": 4,
        },
    }.items():
        study = Study(**asked, **more)  # type: ignore[arg-type]
        made = jobs(study, BOTH[:1])
        for job in made:
            finished(job.folder, 91.0)
        records = collect(study, BOTH[:1], made, {})
        differs[name] = [record["differs"] for record in records]
        assert {of for record in records for of in record["ours"]} == (
            {"optim.epochs 1 instead of 40"} if name == "other" else set()
        )
        page = results_page([{"title": "t", "shards": [], "results": records}])
        said = "Where the paper gives nothing, other than our defaults (docs/paper.md): optim.epochs 1 instead of 40."
        assert (said in page) == (name == "other") and "test list may have decided something" in page
    assert set(GIVEN) <= flatten(to_dict(made[0].config)).keys()  # or it would be told as a setting of ours
    unknown = ["ECO weights are not known to be the published ones"]  # whose sums nobody has published
    assert differs["as in the paper"] == [unknown, [*unknown, "pose weights are not the published ones"]]
    other = ["model.width 0.5 instead of 1.0", "data.num_segments 4 instead of 8"]
    assert [[d for d in each if "weights" not in d] for each in differs["other"]] == [other, other]


def test_undecodable_videos_and_precision_are_named(tmp_path: Path) -> None:
    of = replace(BOTH[0], failed=3)
    study = Study(out=str(tmp_path), tables=("table-2",), fusions=("A",), overrides={"precision": "bf16"})
    made = jobs(study, (of,))
    finished(made[0].folder, 91.0)
    [record] = collect(study, (of,), made, {})
    assert record["differs"] == ["3 videos of ucf101 could not be decoded", "random start of ECO"]
    assert record["ours"] == ["precision bf16 instead of fp32"]


@pytest.mark.parametrize("overrides", [{"optim.batch": 12}, {"optim.epochs": 0}])
def test_overrides_are_checked_at_the_sizes_they_will_meet(overrides: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        Study(preset="smoke", overrides=overrides)
    assert Study(preset="smoke", overrides={"optim.batch": 24}).overrides


def test_an_ensemble_averages_its_members_predictions(tmp_path: Path) -> None:
    study = Study(out=str(tmp_path), tables=("table-3",))
    made = jobs(study, BOTH[:1])
    members = [job for job in made if job.training.strategy == "twice-finetune"]
    assert len(members) == 5
    for index, job in enumerate(members):
        finished(job.folder, 50.0)
        sure = np.array([[0.9, 0.1], [0.3, 0.7] if index else [0.9, 0.1]])  # one of the five errs on the second
        made_of = Predictions(keys=("a", "b"), labels=np.array([0, 1]), probabilities=sure, frames=np.zeros((2, 1)))
        made_of.save(Path(job.folder) / "evaluation" / "predictions.parquet")
    [record] = collect(study, BOTH[:1], made, {})
    assert record["num_segments"] == "16,20,24,28,32"
    assert record["top1"] == 100.0  # 0.42 to 0.58 on average; each member's own file says 50


def test_conducting_is_the_time_in_which_no_process_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "RUNNING", [(12.0, 15.0), (1.0, 2.0), (14.0, 18.0), (13.0, 14.0), (19.0, 25.0)])
    assert execute.idle(10.0, 20.0) == 3.0  # 10 to 12 and 18 to 19; three of them at once count once
    assert execute.idle(26.0, 28.0) == 2.0
    assert execute.idle(0.0, 3.0) == 2.0


def test_who_waits_stands_in_line_and_evaluations_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PASNET_LOCKS", str(tmp_path))
    came: list[str] = []

    def wait(name: str, first: bool) -> None:
        with execute.training_slot(first=first):
            came.append(name)

    waiting = [("training 1", False), ("training 2", False), ("evaluation", True)]
    threads = [threading.Thread(target=wait, args=each) for each in waiting]
    with execute.training_slot():
        for number, thread in enumerate(threads):
            thread.start()
            while len(execute._LINE) <= number:
                time.sleep(0.01)
        assert not came
    for thread in threads:
        thread.join(20)
    assert came == ["evaluation", "training 1", "training 2"] and not execute._LINE and not execute._HELD
    assert "another study" not in capsys.readouterr().out
    with open(tmp_path / f"pasnet-{os.getuid()}-training-0.lock", "a") as theirs:  # a lock of another process
        fcntl.flock(theirs, fcntl.LOCK_EX)
        thread = threading.Thread(target=wait, args=("after", False))
        thread.start()
        while not execute._LINE:
            time.sleep(0.01)
        time.sleep(0.3)
        assert "waiting for a training of another study" in capsys.readouterr().out and came[-1] != "after"
    thread.join(20)
    assert came[-1] == "after"


def test_trainings_at_once_have_a_gpu_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "_gpus", execute._gpus.__wrapped__)  # without what was found before
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PASNET_TRAININGS", "2")
    assert execute.gpu_for(0) == execute.gpu_for(1) == {}  # no driver
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho GPU-aa\necho GPU-bb\n")
    tool.chmod(0o755)
    assert [execute.gpu_for(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["GPU-aa", "GPU-bb", "GPU-aa"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert execute.gpu_for(1) == {"CUDA_VISIBLE_DEVICES": "7"}
    monkeypatch.setenv("PASNET_TRAININGS", "1")
    assert execute.gpu_for(0) == {}  # alone: the one that CUDA takes
    monkeypatch.setenv("PASNET_TRAININGS", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7,-1,5")  # CUDA reads up to there
    assert execute.gpu_for(2) == {"CUDA_VISIBLE_DEVICES": "4"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")  # nothing to choose from
    assert execute.gpu_for(1) == {}
    tool.write_text("#!/bin/sh\necho no devices were found\nexit 6\n")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert execute.gpu_for(1) == {}


def test_a_process_gets_the_gpu_of_its_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "look").write_text('#!/bin/sh\necho "gpu $CUDA_VISIBLE_DEVICES"\n')
    (tmp_path / "look").chmod(0o755)
    monkeypatch.setattr("pasnet.execute.sys.executable", str(tmp_path / "look"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setenv("PASNET_TRAININGS", "2")
    with open(tmp_path / "lock", "a") as lock:
        execute._run([], tmp_path / "log", "title", execute.Slot(1, lock.fileno()))
    assert (tmp_path / "log").read_text() == "gpu 7\n"


def test_a_copy_without_git_takes_its_commit_from_whoever_made_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "pasnet" / "provenance.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("PASNET_COMMIT", raising=False)
    assert provenance.commit() == "unknown"
    monkeypatch.setenv("PASNET_COMMIT", "abc1234")
    assert provenance.commit() == "abc1234 (PASNET_COMMIT)"
