"""Strategies as data, and D0: which trainings there are, what each starts from, what is shared, what names it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pasnet.checkpoints import load_initial, save
from pasnet.config import (
    ConfigError,
    DataConfig,
    FusionConfig,
    InitConfig,
    ModelConfig,
    OptimConfig,
    PoseTrainConfig,
    TrainConfig,
)
from pasnet.data import open_shards
from pasnet.experiments import (
    EXTRA_ROWS,
    PRESETS,
    ROWS,
    STRATEGIES,
    Source,
    Training,
    in_order,
    select_rows,
    trainings,
    trainings_of,
)
from pasnet.models.pasnet import build
from pasnet.results import _differences, _line_of, _weights, collect
from pasnet.study import Job, PoseJob, Shards, Study, jobs, make_synthetic, pose_job
from pasnet.synth import SynthConfig

COUNTS = {f"split{split}": {"train": 200, "test": 80} for split in (1, 2, 3)}
STYLES = ("Conv(A,I)", "A+1*1conv")


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


D1, D0 = shards("ucf101", 101), shards("synthetic-d0", 12)


def study(tmp_path: Path, **more: Any) -> Study:
    asked: dict[str, Any] = {
        "out": str(tmp_path),
        "tables": ("table-1", "strategies"),
        "fusions": STYLES,
        "pretrain": "synthetic",
    }
    return Study(**asked | more)


def by_role(made: tuple[Job, ...]) -> dict[tuple[str, str, str], Job]:
    found = {(job.training.on, job.training.strategy, job.training.fusion): job for job in made}
    assert len(found) == len(made)
    return found


class TestTable:
    def test_the_steps(self) -> None:
        steps = {name: [(s.network, s.on, s.keeps) for s in of] for name, of in STRATEGIES.items()}
        assert steps == {
            "eco": [("eco", "D1", "w0")],
            "conventional": [("pas-net", "D1", "w0")],
            "conventional-long": [("pas-net", "D1", "w0")],
            "recent": [("pas-net", "D0", "w0"), ("pas-net", "D1", "features")],
            "twice-finetune": [("eco", "D1", "w0"), ("pas-net", "D1", "everything")],
        }

    def test_the_papers_rows_are_39_trainings_and_the_extra_rows_are_not_among_them(self) -> None:
        assert len(trainings(ROWS)) == len(trainings(select_rows())) == 39
        assert not {row.strategy for row in ROWS} & {"recent", "conventional-long"}
        recent = select_rows(["strategies"])
        assert {row.strategy for row in recent} == {"recent"} and all(row.paper_top1 is None for row in recent)
        assert select_rows(["strategies", "equal-epochs"]) == EXTRA_ROWS
        assert not set(select_rows(["table-1"])) & set(EXTRA_ROWS)
        assert {row.fusion for row in recent} == {"A+1*1conv", "Conv(A,I)", "Conv(A,I,F)"}

    def test_equal_epochs_is_table_1_where_finetuning_directly_takes_as_long(self) -> None:
        made = {
            (row.fusion, row.strategy.removesuffix("-long")): row.paper_top1 for row in select_rows(["equal-epochs"])
        }
        assert made == {(row.fusion, row.strategy): row.paper_top1 for row in select_rows(["table-1"])}
        for overrides, epochs, steps in (({}, 35, (28,)), ({"optim.epochs": 6}, 12, (8,))):
            asked = Study(preset="science", tables=("equal-epochs",), overrides=overrides)
            configs = {job.training.strategy: job.config.optim for job in jobs(asked, (shards("synthetic", 12),), D0)}
            long, twice, eco = (configs[name] for name in ("conventional-long", "twice-finetune", "eco"))
            assert long.epochs == twice.epochs + eco.epochs == epochs and long.steps == steps
            assert replace(long, epochs=twice.epochs, steps=twice.steps) == twice

    @pytest.mark.parametrize("source", [None, Source(dataset="d0", num_segments=4)])
    def test_parents_follow_from_the_table(self, source: Source | None) -> None:
        def training(strategy: str, **more: Any) -> Training:
            given = {"dataset": "d1", "fusion": "Conv(A,I)", "num_segments": 16, "strategy": strategy, "source": source}
            return Training(**given | more)

        eco_on_d0 = Training(dataset="d0", fusion="A", num_segments=4, strategy="eco", on="D0") if source else None
        assert training("eco", fusion="A").parent == training("conventional").parent == eco_on_d0
        assert training("twice-finetune").parent == training("eco", fusion="A")
        assert training("conventional").keeps == ("features" if source else "w0")
        assert (training("twice-finetune").keeps, training("recent").keeps) == ("everything", "features")
        if source is None:
            with pytest.raises(ConfigError, match="strategy recent starts with a training on another set"):
                assert training("recent").parent
        else:
            first = training("conventional", dataset="d0", source=None, on="D0")
            assert training("recent").parent == first and first.parent is None

    def test_nothing_comes_before_what_it_starts_from(self) -> None:
        source = Source(dataset="d0")
        wanted = [t for row in (*EXTRA_ROWS, *ROWS) for t in trainings_of(row, row.dataset, source)]
        order = in_order(wanted)
        place = {training: index for index, training in enumerate(order)}
        assert len(place) == len(order) == 39 + 1 + 3 + 3 + 3  # ECO on D0 once; PAS-Net on D0, then on D1; long ones
        assert all(place[t.parent] < place[t] for t in order if t.parent)
        assert [t.on for t in order] == ["D0"] * 4 + ["D1"] * 45  # what is learnt beforehand is learnt before all else
        assert sum(t.strategy == "eco" and t.on == "D0" for t in order) == 1


class TestJobs:
    def test_every_training_starts_from_what_the_strategy_says(self, tmp_path: Path) -> None:
        asked = study(tmp_path)
        pose = pose_job(asked, D0)
        assert pose is not None
        made = jobs(asked, (D1,), D0)
        found = by_role(made)
        assert len(made) == 1 + 2 + 1 + 2 + 2 + 2  # ECO and PAS-Nets on D0; ECO, conventional, twice and recent on D1
        w0, eco = found["D0", "eco", "A"], found["D1", "eco", "A"]
        last = {name: str(Path(job.folder) / "last.pt") for name, job in (("w0", w0), ("eco", eco))}
        assert (w0.config.init, w0.parent, w0.pose) == (InitConfig(), "", "")
        assert eco.config.init == InitConfig(pretrained=last["w0"]) and eco.parent == w0.folder
        own, none = (pose.weights, pose.folder), ("", "")
        for style, (file, folder) in zip(STYLES, (own, none), strict=True):
            conventional, twice = found["D1", "conventional", style], found["D1", "twice-finetune", style]
            assert conventional.config.init == InitConfig(pretrained=last["w0"], pose=file)
            assert twice.config.init == InitConfig(parent=last["eco"], pose=file)
            assert (conventional.parent, twice.parent) == (w0.folder, eco.folder)
            assert conventional.pose == twice.pose == folder
            first, recent = found["D0", "conventional", style], found["D1", "recent", style]
            assert first.config.init == InitConfig(pose=file) and (first.parent, first.pose) == ("", folder)
            assert recent.config.init == InitConfig(pretrained=str(Path(first.folder) / "last.pt"))
            assert (recent.parent, recent.pose) == (first.folder, "")
        assert w0.config.data.shards == D0.folder and w0.config.model.num_classes == 12
        assert len({job.folder for job in made}) == len(made)

    def test_d0_is_learnt_once_whatever_the_splits_and_seeds_and_eco_once_for_each(self, tmp_path: Path) -> None:
        made = jobs(study(tmp_path, splits=(1, 2), seeds=(0, 3)), (D1,), D0)
        on_d0 = [job for job in made if job.training.on == "D0"]
        assert len(on_d0) == 3 and all((j.config.data.split, j.config.seed) == (1, 0) for j in on_d0)
        ecos = [job for job in made if (job.training.on, job.training.strategy) == ("D1", "eco")]
        assert len(ecos) == len({job.folder for job in ecos}) == 4 and len(made) == 3 + 4 * 7
        twice = [job for job in made if job.training.strategy == "twice-finetune"]
        for eco in ecos:
            children = [job for job in twice if job.parent == eco.folder]
            assert len(children) == 2
            assert {(j.config.data.split, j.config.seed) for j in children} == {
                (eco.config.data.split, eco.config.seed)
            }

    def test_public_weights_take_the_place_of_ours(self, tmp_path: Path) -> None:
        eco, pose = tmp_path / "eco.pth", tmp_path / "pose.pth"
        eco.write_bytes(b"eco")
        pose.write_bytes(b"pose")
        asked = study(tmp_path, eco_weights=str(eco), pose_weights=str(pose))
        assert pose_job(asked, D0) is None
        found = by_role(jobs(asked, (D1,), D0))
        assert ("D0", "eco", "A") not in found
        for style, file in zip(STYLES, (str(pose), ""), strict=True):
            assert found["D1", "conventional", style].config.init == InitConfig(eco=str(eco), pose=file)
            assert found["D0", "conventional", style].config.init == InitConfig(eco=str(eco), pose=file)
            assert found["D1", "recent", style].config.init.eco == ""
        only_table_1 = replace(asked, tables=("table-1",))
        assert only_table_1.d0 == "" and len(jobs(only_table_1, (D1,))) == 5  # nothing left for D0 to give

    def test_without_a_d0_all_is_as_before(self, tmp_path: Path) -> None:
        made = jobs(study(tmp_path, tables=("table-1",), pretrain=""), (D1,))
        assert len(made) == 5 and all(not job.config.init.pretrained and not job.pose for job in made)
        with pytest.raises(ConfigError, match=r"strategy recent starts .*pretrain"):
            study(tmp_path, pretrain="none")
        with pytest.raises(ConfigError, match="pretrain: no folder nowhere"):
            study(tmp_path, pretrain="nowhere")

    def test_d0_is_another_set(self, tmp_path: Path) -> None:
        for d0 in (D1, replace(D1, dataset="other")):
            with pytest.raises(ConfigError, match="D0 must be another set"):
                jobs(study(tmp_path), (D1,), d0)
        empty = replace(D0, subsets={**COUNTS, "split1": {"train": 0, "test": 80}})
        with pytest.raises(ConfigError, match="synthetic-d0 has no train or no test videos in split 1"):
            jobs(study(tmp_path), (D1,), empty)

    def test_names_follow_what_comes_before_and_do_not_change_when_it_is_there(self, tmp_path: Path) -> None:
        def names(asked: Study, d0: Shards = D0) -> dict[tuple[str, str, str], str]:
            return {role: Path(job.folder).name for role, job in by_role(jobs(asked, (D1,), d0)).items()}

        asked = study(tmp_path)
        before = names(asked)
        pose = pose_job(asked, D0)
        assert pose is not None
        for job in jobs(asked, (D1,), D0):
            Path(job.folder).mkdir(parents=True)
            torch.save({"identity": "made"}, Path(job.folder) / "last.pt")
        Path(pose.folder).mkdir(parents=True)
        Path(pose.weights).write_bytes(b"made")
        assert names(asked) == before
        assert names(replace(asked, out=str(tmp_path / "elsewhere"))) == before

        other_d0 = names(asked, replace(D0, digest="other frames"))
        assert not set(before.values()) & set(other_d0.values())  # all of it starts from D0 in some way
        no_d0 = names(study(tmp_path, tables=("table-1",), pretrain="none"))
        assert not set(before.values()) & set(no_d0.values())

    def test_another_pose_network_renames_what_starts_from_it_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = study(tmp_path)
        before = {role: job.folder for role, job in by_role(jobs(asked, (D1,), D0)).items()}
        changed = replace(PRESETS["full"], pose=PoseTrainConfig(steps=7))
        monkeypatch.setitem(PRESETS, "full", changed)
        after = {role: job.folder for role, job in by_role(jobs(asked, (D1,), D0)).items()}
        renamed = {role for role in before if before[role] != after[role]}
        assert renamed == {role for role in before if role[2] == "Conv(A,I)"}

    def test_the_pose_network_has_the_studys_size(self, tmp_path: Path) -> None:
        asked = study(tmp_path, preset="science", overrides={"model.width": 0.0625})
        made = pose_job(asked, D0)
        assert isinstance(made, PoseJob) and (made.config.width, made.config.input_size) == (0.0625, 112)
        joints = tmp_path / "data" / "synthetic-d0" / "joints.parquet"
        assert made.joints == str(joints)
        joints.parent.mkdir(parents=True)
        folders = {made.folder}
        for content in (b"some", b"others"):  # the same videos, other joints: another network
            joints.write_bytes(content)
            folders.add(pose_job(asked, D0).folder)  # type: ignore[union-attr]
        assert len(folders) == 3
        assert pose_job(study(tmp_path, fusions=("A+1*1conv",)), D0) is None  # nobody has a pose network

    def test_overrides_reach_the_pose_networks_training_and_no_other(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pasnet.weights.is_published", lambda *_: False)  # it is not trained yet
        asked = study(tmp_path, overrides={"pose.steps": "7", "optim.epochs": 3})
        made = pose_job(asked, D0)
        assert made is not None and made.config == replace(PRESETS["full"].pose, width=1.0, input_size=224, steps=7)
        by = by_role(jobs(asked, (D1,), D0))
        assert {job.config.optim.epochs for job in by.values()} == {3}
        for row in asked.rows:  # and the page says so, of networks that it is a part of
            _, ours = _differences(asked, row, D1, [by["D1", row.strategy, row.fusion]])
            has_pose = row.fusion == "Conv(A,I)" and row.strategy != "recent"
            assert ("pose.steps 7 instead of the preset's 2000" in ours) == has_pose
        for wrong, said in (
            ("pose.step", "unknown setting 'step'; near it: steps"),
            ("pose.width", "set by the study"),
        ):
            with pytest.raises(ConfigError, match=said):
                study(tmp_path, overrides={wrong: 7})
        with pytest.raises(ConfigError, match=r"pose\.steps: this study trains no pose network of its own"):
            study(tmp_path, fusions=("A",), overrides={"pose.steps": 7})

    def test_a_page_says_where_the_weights_come_from(self, tmp_path: Path) -> None:
        asked = study(tmp_path)
        made = jobs(asked, (D1,), D0)
        failures = {job.folder: "not here" for job in made}
        records = collect(asked, (D1,), made, failures, D0)
        assert [record["status"] for record in records] == ["failed"] * 6
        assert {record["strategy"] for record in records} == {"conventional", "twice-finetune", "recent"}


def test_science_is_tables_1_and_2_with_a_d0_of_other_actors(tmp_path: Path) -> None:
    asked, size = Study(preset="science", out=str(tmp_path)), PRESETS["science"]
    assert asked.d0 == "synthetic" and (size.width, size.input_size) == (0.125, 112)
    assert {row.table for row in asked.rows} == {"table-1", "table-2"} and asked.rows == select_rows(
        ["table-1", "table-2"]
    )
    d1, d0 = SynthConfig(**size.synth), SynthConfig(**size.d0_synth)
    assert d0.seed != d1.seed and d0.groups * d0.num_classes > d1.groups * d1.num_classes
    assert len(jobs(asked, (D1,), D0)) == 13 + 1
    rows = by_role(jobs(replace(asked, tables=("strategies",), fusions=("Conv(A,I)",)), (D1,), D0))
    assert rows["D0", "conventional", "Conv(A,I)"].config.optim == size.d0_optim  # from nothing: as long as ECO
    assert rows["D1", "recent", "Conv(A,I)"].config.optim == size.optim
    assert Study(preset="smoke").d0 == "synthetic"
    assert Study(preset="full").d0 == Study(preset="science", pretrain="none").d0 == ""


def test_d0_with_the_seed_of_d1_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", replace(PRESETS["tiny"], d0_synth=PRESETS["tiny"].synth))
    with pytest.raises(ConfigError, match="synthetic-d0 has the seed of synthetic, 0"):
        make_synthetic(Study(preset="tiny", out=str(tmp_path)), "synthetic-d0", "ffmpeg", 1)


def test_a_row_names_the_trainings_of_ours_that_it_starts_from(tmp_path: Path) -> None:
    asked = study(tmp_path, fusions=("Conv(A,I)",))
    (tmp_path / "data" / "synthetic-d0").mkdir(parents=True)
    (tmp_path / "data" / "synthetic-d0" / "joints.parquet").touch()
    made, pose = jobs(asked, (D1,), D0), pose_job(asked, D0)
    by_folder = {job.folder: job for job in made}
    rows = by_role(made)
    assert pose is not None

    def named(*role: str) -> dict[str, str]:
        return _weights(asked, _line_of(rows[role], by_folder))  # type: ignore[index]

    eco = f"training:{Path(rows['D0', 'eco', 'A'].folder).name}"
    both = f"training:{Path(rows['D0', 'conventional', 'Conv(A,I)'].folder).name}"
    assert named("D1", "conventional", "Conv(A,I)") == {"eco": eco, "pose": f"training:{Path(pose.folder).name}"}
    assert named("D1", "twice-finetune", "Conv(A,I)") == named("D1", "conventional", "Conv(A,I)")
    assert named("D1", "eco", "A") == {"eco": eco}
    assert named("D1", "recent", "Conv(A,I)") == {"eco": both, "pose": both}
    other = replace(asked, overrides={"model.width": 0.5})
    assert pose_job(other, D0).folder != pose.folder  # type: ignore[union-attr]


def test_recent_takes_over_all_but_the_head(shard_folder: Path, tmp_path: Path) -> None:
    d1 = open_shards(shard_folder)
    style = FusionConfig(style="Conv(A,I)")
    data = DataConfig(shards=str(shard_folder), input_size=48, num_segments=2)
    model = ModelConfig(num_classes=7, fusion=style, width=0.0625)
    before = TrainConfig(model=model, data=data, optim=OptimConfig(epochs=1))
    torch.manual_seed(1)
    net = build(before.model)
    d0 = open_shards(shard_folder)
    d0.manifest = {**d0.manifest, "dataset": "d0", "digest": "another"}
    save(
        tmp_path / "last.pt",
        before,
        d0,
        "x",
        model=net.state_dict(),
        optimizer={},
        scaler={},
        history=[{"epoch": 1}],
        within=None,
    )
    after = replace(
        before,
        model=replace(before.model, num_classes=len(d1.class_names)),
        init=InitConfig(pretrained=str(tmp_path / "last.pt")),
    )
    torch.manual_seed(2)
    fresh = build(after.model)
    head = fresh.head.weight.detach().clone()
    load_initial(fresh, after, d1)
    assert torch.equal(fresh.head.weight, head)
    for name, value in net.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(fresh.state_dict()[name], value), name


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_pose_network_that_fails_stops_what_starts_from_it_alone(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "PASNET_APART" not in os.environ:  # a process that has run a flow cannot fork loader workers that end well
        command = [sys.executable, "-m", "pytest", "-q", f"{__file__}::{request.node.name}"]
        apart = {**os.environ, "PASNET_APART": "1"}
        done = subprocess.run(command, env=apart, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout[-3000:]
        return
    from prefect import flow
    from prefect.testing.utilities import prefect_test_harness

    from flows import experiment

    asked = study(tmp_path)
    made, pose = jobs(asked, (D1,), D0), pose_job(asked, D0)
    assert pose is not None
    started: list[str] = []
    broken = {pose.folder}

    def work(job: Job | PoseJob, uri: str = "") -> bool:
        started.append(job.folder)
        if job.folder in broken:
            raise RuntimeError(f"{job.title}: no luck")
        return True

    monkeypatch.setattr(experiment, "run_pose_training", work)
    monkeypatch.setattr(experiment, "run_training", work)
    monkeypatch.setattr(experiment, "run_evaluation", lambda job: True)
    run = flow(name="jobs", validate_parameters=False)(lambda: experiment.run_jobs(made, "", pose))
    with prefect_test_harness(server_startup_timeout=120):
        failures = run()
        needs = {job.folder for job in made if job.training.fusion == "Conv(A,I)"}
        assert set(failures) == needs | {pose.folder} and "no luck" in failures[pose.folder]
        assert set(started) == {job.folder for job in made} - needs | {pose.folder}
        broken.clear()
        started.clear()
        assert run() == {}
    assert len(started) == len(made) + 1
    place = {folder: index for index, folder in enumerate(started)}
    for job in made:
        assert all(place[before] < place[job.folder] for before in (job.parent, job.pose) if before)
