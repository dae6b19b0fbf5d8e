"""The whole study without an orchestrator: what is run, in which folder, and what a finished row amounts to.

`flows/` wraps these functions in Prefect tasks. Every step is idempotent: its result lies in a folder named by a digest
of all that decides it, and a step whose result is there returns at once.

    out/data/<name>/                embedded synthetic videos
    out/shards/<dataset>/           shards (shards/README.md)
    out/trainings/<name>-<digest>/  one per training: config.json, last.pt, history.json, done.json, train.log,
                                    evaluation/{metrics.json, predictions.parquet}
    out/results.json, RESULTS.md    one record per row x dataset x split x seed, and the page made from them
    out/mlflow.db, mlartifacts/     tracking, unless MLFLOW_TRACKING_URI says otherwise
"""

from __future__ import annotations

import collections
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pasnet.config import (
    ConfigError,
    DataConfig,
    FusionConfig,
    InitConfig,
    ModelConfig,
    TrainConfig,
    flatten,
    from_dict,
    replace,
    to_dict,
)
from pasnet.experiments import PRESETS, QUESTIONS, Preset, Row, Training, in_order, select_rows, trainings_of

PATHS = ("data.shards", "init.parent")  # differ by place alone; the config that is kept as an artifact has them
EMBEDDED = "synthetic"  # names the embedded dataset wherever a dataset folder is asked for


class StudyError(RuntimeError):
    """A step of the study that failed; the message names its log."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What the user asked for. Raises ConfigError for anything that cannot be run, before anything runs."""

    data: tuple[str, ...] = (EMBEDDED,)  # dataset folders, or EMBEDDED
    out: str = "runs/study"
    preset: str = "full"
    tables: tuple[str, ...] = ()  # empty: the preset's
    fusions: tuple[str, ...] = ()  # empty: the preset's
    splits: tuple[int, ...] = (1,)
    seeds: tuple[int, ...] = (0,)
    num_segments: int | None = None  # K for every row instead of the paper's
    eco_weights: str = ""
    pose_weights: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)  # such as {"optim.epochs": 2}

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ConfigError(f"unknown preset {self.preset!r} (one of: {', '.join(PRESETS)})")
        if not self.data or not self.splits or not self.seeds:
            raise ConfigError("data, splits and seeds must name at least one each")
        if any(split not in (1, 2, 3) for split in self.splits):
            raise ConfigError(f"splits are 1, 2 and 3, got {', '.join(map(str, self.splits))}")
        if any(seed < 0 for seed in self.seeds):
            raise ConfigError(f"seeds must be at least 0, got {', '.join(map(str, self.seeds))}")
        if self.num_segments is not None and self.num_segments < 1:
            raise ConfigError(f"num_segments (K) must be at least 1, got {self.num_segments}")
        for path in (self.eco_weights, self.pose_weights):
            if path and not Path(path).is_file():
                raise ConfigError(f"{path}: no such weights file")
        _ = self.rows
        for name in self.overrides:
            if name.startswith(
                ("model.num_classes", "model.fusion.style", "data.shards", "data.split", "init.", "seed")
            ):
                raise ConfigError(f"{name} is set by the study itself; use its own parameter")
            if name == "data.num_segments":
                raise ConfigError("set K with num_segments, not with data.num_segments")
        replace(TrainConfig(model=ModelConfig(num_classes=2), data=DataConfig(shards="-")), dict(self.overrides))

    @property
    def size(self) -> Preset:
        """The preset's values."""
        return PRESETS[self.preset]

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows of the paper that were asked for."""
        return select_rows(self.tables or self.size.tables, self.fusions or self.size.fusions)

    @property
    def root(self) -> Path:
        """The folder of everything that the study writes."""
        return Path(self.out)


@dataclass(frozen=True, kw_only=True)
class Shards:
    """A finished shard folder, as much as the study needs to know of it."""

    dataset: str
    folder: str
    digest: str
    num_classes: int
    videos: int
    frames: int
    failed: int
    missing: int
    subsets: Mapping[str, Mapping[str, int]]  # {"split1": {"train": 9537, "test": 3783}}

    @property
    def splits(self) -> tuple[int, ...]:
        """Splits with videos in both subsets."""
        return tuple(int(name[5:]) for name, of in self.subsets.items() if of["train"] and of["test"])

    @staticmethod
    def of(folder: Path) -> Shards:
        """Reads the folder's manifest."""
        manifest = json.loads((Path(folder) / "manifest.json").read_text("utf-8"))
        return Shards(
            dataset=manifest["dataset"],
            folder=str(folder),
            digest=manifest["digest"],
            num_classes=len(manifest["class_names"]),
            videos=manifest["videos"],
            frames=manifest["frames"],
            failed=manifest["failed"],
            missing=manifest["listed_but_missing"],
            subsets=manifest["subsets"],
        )


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training of the study: its configuration and its folder."""

    training: Training
    config: TrainConfig
    folder: str
    parent: str  # folder of step 1 of twice-finetune, or ""

    @property
    def title(self) -> str:
        """For people and for run names."""
        config = self.config
        return f"{self.training.title}, {self.training.dataset} split {config.data.split}, seed {config.seed}"


def make_synthetic(study: Study, ffmpeg: str, workers: int) -> Path:
    """The folder of the embedded dataset's videos, generated where it is not complete."""
    from pasnet.synth import SynthConfig, generate

    config = from_dict(SynthConfig, dict(study.size.synth))
    return generate(study.root / "data" / EMBEDDED, config, ffmpeg=ffmpeg, workers=workers)


def dataset_for(row: Row, shards: Sequence[Shards]) -> Shards | None:
    """The shards on which a row is run: its own dataset's, else, for rows of UCF-101, a set that stands in for it
    (any that is neither UCF-101 nor HMDB-51). None: the row is not run."""
    by_name = {of.dataset: of for of in shards}
    if row.dataset in by_name:
        return by_name[row.dataset]
    stand_ins = [of for of in shards if of.dataset not in ("ucf101", "hmdb51")]
    return stand_ins[0] if stand_ins and row.dataset == "ucf101" else None


def jobs(study: Study, shards: Sequence[Shards]) -> tuple[Job, ...]:
    """Every training that the study needs, parents first. Raises ConfigError when a dataset lacks a split."""
    for of in shards:
        for split in study.splits:
            if split not in of.splits:
                raise ConfigError(
                    f"{of.dataset}: split {split} has no train or no test videos; it has {list(of.splits)}"
                )
    by_name = {of.dataset: of for of in shards}
    wanted = in_order(training for row in study.rows for training in _trainings(study, row, shards))
    made: dict[tuple[Training, int, int], Job] = {}
    for split in study.splits:
        for seed in study.seeds:
            for training in wanted:
                parent = made[training.parent, split, seed] if training.parent else None
                made[training, split, seed] = _job(study, by_name[training.dataset], training, split, seed, parent)
    return tuple(made.values())


def _trainings(study: Study, row: Row, shards: Sequence[Shards]) -> tuple[Training, ...]:
    of = dataset_for(row, shards)
    if of is None:
        return ()
    k = study.num_segments or study.size.num_segments
    found = trainings_of(row, of.dataset)
    if k is None:
        return found
    first = found[0]
    return (Training(dataset=first.dataset, fusion=first.fusion, num_segments=k, strategy=first.strategy),)


def _job(study: Study, of: Shards, training: Training, split: int, seed: int, parent: Job | None) -> Job:
    from pasnet.train import run_digest

    size = study.size
    start = str(Path(parent.folder) / "last.pt") if parent else ""
    pose = study.pose_weights if training.strategy != "eco" else ""
    config = TrainConfig(
        model=ModelConfig(num_classes=of.num_classes, fusion=FusionConfig(style=training.fusion), width=size.width),
        data=DataConfig(shards=of.folder, split=split, num_segments=training.num_segments, input_size=size.input_size),
        optim=size.eco_optim if training.strategy == "eco" else size.optim,
        init=InitConfig(eco="" if parent else study.eco_weights, pose=pose, parent=start),
        seed=seed,
    )
    train_videos = of.subsets[f"split{split}"]["train"]
    if size.max_train_videos is not None and train_videos > size.max_train_videos:
        config = replace(config, {"data.train_fraction": size.max_train_videos / train_videos})
    config = replace(config, dict(study.overrides))
    digest = run_digest(config, of.digest, Path(parent.folder).name if parent else "")
    slug = re.sub(r"[^a-z0-9]+", "-", f"{training.strategy} {training.fusion}".lower()).strip("-")
    name = f"{of.dataset}-s{split}-k{training.num_segments}-{slug}-seed{seed}-{digest}"
    return Job(
        training=training,
        config=config,
        folder=str(study.root / "trainings" / name),
        parent=parent.folder if parent else "",
    )


def run_training(job: Job, tracking_uri: str = "") -> bool:
    """Trains in a process of its own (its own CUDA context; the same command as a person's). False: it was done."""
    folder = Path(job.folder)
    if (folder / "done.json").is_file() and (folder / "last.pt").is_file():
        return False
    folder.mkdir(parents=True, exist_ok=True)
    request = folder / "request.json"
    request.write_text(json.dumps(to_dict(job.config), indent=1), "utf-8")
    command = ["train", "--config", str(request), "--out", str(folder), "--title", job.title]
    _run(command + (["--tracking-uri", tracking_uri] if tracking_uri else []), folder / "train.log", job.title)
    return True


def run_evaluation(job: Job) -> bool:
    """Evaluates the last epoch's network, in a process of its own. False: it was done."""
    out = Path(job.folder) / "evaluation"
    if (out / "metrics.json").is_file() and (out / "predictions.parquet").is_file():
        return False
    command = ["evaluate", "--checkpoint", str(Path(job.folder) / "last.pt"), "--shards", job.config.data.shards]
    _run([*command, "--out", str(out)], Path(job.folder) / "evaluate.log", f"evaluate {job.title}")
    return True


def _run(arguments: Sequence[str], log: Path, title: str) -> None:
    command = [sys.executable, "-m", "pasnet", *arguments]
    last: collections.deque[str] = collections.deque(maxlen=3)
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
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
    if code != 0:
        raise StudyError(f"{title}: failed with exit code {code} ({' | '.join(last)}); all of it is in {log}")


def results(
    study: Study, shards: Sequence[Shards], made: Iterable[Job], failures: Mapping[str, str]
) -> list[dict[str, Any]]:
    """One record per row x split x seed, made from what lies in the folders. A row that was not run, or one of whose
    trainings is in `failures` ({folder: reason}), says so instead of giving a number."""
    by_place = {(job.training, job.config.data.split, job.config.seed): job for job in made}
    records = []
    for row in study.rows:
        of = dataset_for(row, shards)
        for split in study.splits:
            for seed in study.seeds:
                members = [by_place[training, split, seed] for training in _trainings(study, row, shards)]
                records.append(_result(study, row, of, split, seed, members, failures))
    return records


def _result(
    study: Study,
    row: Row,
    of: Shards | None,
    split: int,
    seed: int,
    members: Sequence[Job],
    failures: Mapping[str, str],
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "table": row.table,
        "title": row.title,
        "strategy": row.strategy,
        "fusion": row.fusion,
        "paper_dataset": row.dataset,
        "paper_top1": row.paper_top1,
        "paper_top5": row.paper_top5,
        "remark": row.remark,
        "split": split,
        "seed": seed,
    }
    if of is None:
        return {**record, "status": "not run", "reason": f"no {row.dataset} in this study"}
    record |= {
        "dataset": of.dataset,
        "shard_digest": of.digest,
        "videos": of.videos,
        "missing": of.missing,
        "num_segments": ",".join(str(job.training.num_segments) for job in members),
        "trainings": [job.folder for job in members],
        "id": "+".join(Path(job.folder).name for job in members),
    }
    failed = [job.folder for job in members if job.folder in failures]
    if failed:
        return {**record, "status": "failed", "reason": f"{failures[failed[0]]} (logs in {failed[0]})"}
    evaluations = [Path(job.folder) / "evaluation" / "metrics.json" for job in members]
    done = [json.loads((Path(job.folder) / "done.json").read_text("utf-8")) for job in members]
    numbers = _ensemble_metrics(members) if len(members) > 1 else json.loads(evaluations[0].read_text("utf-8"))
    gap = None if row.paper_top1 is None else round(numbers["top1"] - row.paper_top1, 2)
    config, data = members[0].config, members[0].config.data
    public = [name for name, path in (("ECO", study.eco_weights), ("pose", study.pose_weights)) if path]
    start = f"{' and '.join(public)} from public weights" if public else "random start"
    return {
        **record,
        "status": "done",
        "start": start,
        "width": config.model.width,
        "input_size": data.input_size,
        "train_fraction": data.train_fraction,
        "top1": numbers["top1"],
        "top5": numbers["top5"],
        "top1_low": numbers["top1_low"],
        "top1_high": numbers["top1_high"],
        "gap": gap,
        "best_on_test": done[0]["best_on_test"]["top1"] if len(done) == 1 else None,
        "seconds": round(sum(of["seconds"] for of in done), 1),
        "device": done[0]["device"],
        "history": json.loads((Path(members[0].folder) / "history.json").read_text("utf-8"))
        if len(members) == 1
        else [],
        "params": {
            **{name: value for name, value in flatten(to_dict(config)).items() if name not in PATHS},
            "dataset": of.dataset,
            "strategy": row.strategy,
            "fusion": row.fusion,
            "num_segments": record["num_segments"],
        },
        "metrics": {
            "test/top1": numbers["top1"],
            "test/top5": numbers["top5"],
            "test/mean_class": numbers["mean_class"],
            **({"gap_to_paper": gap} if gap is not None else {}),
            **({"best_on_test/top1": done[0]["best_on_test"]["top1"]} if len(done) == 1 else {}),
        },
        "artifacts": [
            str(path)
            for job in members
            for path in (
                Path(job.folder) / "config.json",
                Path(job.folder) / "load_report.txt",
                Path(job.folder) / "evaluation" / "predictions.parquet",
            )
        ],
        "note": f"{row.table}, {row.title}: paper {row.paper_top1} on {row.dataset}; this run is on {of.dataset}, "
        f"width {config.model.width}, {data.input_size} px, {start}",
    }


def _ensemble_metrics(members: Sequence[Job]) -> dict[str, float]:
    from pasnet.evaluate import Predictions, ensemble, metrics

    loaded = [Predictions.load(Path(job.folder) / "evaluation" / "predictions.parquet") for job in members]
    return metrics(ensemble(loaded))


def finish(
    study: Study,
    shards: Sequence[Shards],
    records: list[dict[str, Any]],
    seconds: Mapping[str, float],
    tracking_uri: str,
    flow_run_id: str = "",
) -> str:
    """Records the rows in MLflow, writes results.json and RESULTS.md, and returns the page."""
    from pasnet.report import results_page
    from pasnet.tracking import record_rows

    code = commit()
    name = study.root.name
    tags = {"study": name, "commit": code, "preset": study.preset, "prefect.flow_run_id": flow_run_id}
    done = [record for record in records if record["status"] == "done"]
    runs = record_rows(tracking_uri, done, experiments=QUESTIONS, study=tags)
    for record in done:
        record["run"] = runs[f"{record['table']}/{record['id']}"]
    content = {
        "title": f"{name}: preset {study.preset}",
        "commit": code,
        "shards": [asdict(of) for of in shards],
        "seconds": dict(seconds),
        "results": records,
    }
    study.root.mkdir(parents=True, exist_ok=True)
    (study.root / "results.json").write_text(json.dumps(content, indent=1), "utf-8")
    page = results_page([content])
    (study.root / "RESULTS.md").write_text(page, "utf-8")
    return page


def commit() -> str:
    """The commit of the code, "+" when there are uncommitted changes, "unknown" outside a checkout."""
    here = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "--short", "HEAD").strip() + ("+" if git("status", "--porcelain").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
