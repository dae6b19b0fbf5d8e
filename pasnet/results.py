"""What finished trainings amount to: a record per row, dataset, split and seed, for the page and for MLflow."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pasnet import tracking, weights
from pasnet.config import (
    FUSION_TITLES,
    ConfigError,
    DataConfig,
    FusionConfig,
    ModelConfig,
    TrainConfig,
    digest,
    flatten,
    to_dict,
)
from pasnet.experiments import QUESTIONS, Row
from pasnet.journal import place_of
from pasnet.ordering import comparisons
from pasnet.report import results_page, table_csv, table_page
from pasnet.study import D0_EMBEDDED, EMBEDDED_SETS, POSE, SIZES, Job, Shards, Study, dataset_for, trainings_for
from pasnet.tracking import TrackingError, record_rows

PATHS = (
    "data.shards",
    "init.parent",
    "init.pretrained",
    "init.eco",
    "init.pose",
)  # differ by place alone: tags hold the hashes of weights, and the config that is kept as an artifact all of them
NOTE = 8000  # characters; MLflow's limit for a tag
# settings in which a run may differ from our defaults and still be in the paper's setting
FREE = ("model.num_classes", "data.shards", "data.split", "data.workers", "optim.micro_batch", "seed")
# settings that the paper gives; it says nothing of the others (docs/paper.md)
GIVEN = (
    *(f"model.fusion.lambda{number}" for number in (1, 2, 3, 4)),
    "model.width",
    "model.dropout",
    "data.num_segments",
    "data.input_size",
    "data.train_fraction",
    "data.held_out",
    "optim.lr",
    "optim.momentum",
    "optim.weight_decay",
    "optim.freeze_pose",
)


def collect(
    study: Study,
    shards: Sequence[Shards],
    made: Iterable[Job],
    failures: Mapping[str, str],
    d0: Shards | None = None,
    lost: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """One record per row x split x seed, made from what lies in the folders. A row that was not run, or one of whose
    trainings is in `failures` ({folder: reason}), says so instead of giving a number; so does one whose dataset is in
    `lost` ({name: reason}), which could not be fetched or packed."""
    lost = lost or {}
    by_folder = {job.folder: job for job in made}
    by_place = {(job.training, job.config.data.split, job.config.seed): job for job in by_folder.values()}
    records = []
    for row in study.rows:
        name = dataset_for(row, [*(of.dataset for of in shards), *lost])
        of = next((of for of in shards if of.dataset == name), None)
        for split in study.splits:
            for seed in study.seeds:
                members = [by_place[training, split, seed] for training in trainings_for(study, row, shards, d0, lost)]
                lines = [_line_of(member, by_folder) for member in members]
                record = _result(study, row, of, split, seed, lines, failures)
                if name is not None and name in lost:
                    record |= {"status": "failed", "reason": lost[name], "dataset": name}
                if record["status"] == "done":
                    record |= _behind(lines)
                records.append(record)
    return records


def _line_of(job: Job, by_folder: Mapping[str, Job]) -> list[Job]:
    """A training and all that it starts from, the first last."""
    line = [job]
    while line[-1].parent:
        line.append(by_folder[line[-1].parent])
    return line


def _behind(lines: Sequence[Sequence[Job]]) -> dict[str, Any]:
    """What a row's number took: `epochs` on its own dataset, such as "30 + 12" of ECO and PAS-Net, and `chain`, the
    seconds of each training that it rests on, by folder, D0's and the pose network's included."""
    chain: dict[str, float] = {}
    for line in lines:
        for job in line:
            if (done := Path(job.folder) / "done.json").is_file():
                chain[Path(job.folder).name] = json.loads(done.read_text("utf-8"))["seconds"]
            if job.pose and (quality := Path(job.pose) / "quality.json").is_file():
                chain[Path(job.pose).name] = json.loads(quality.read_text("utf-8")).get("seconds", 0.0)
        epochs = [str(job.config.optim.epochs) for job in reversed(line) if job.training.on == "D1"]
    return {"epochs": " + ".join(epochs), "chain": {name: round(value, 1) for name, value in chain.items()}}


def _result(
    study: Study,
    row: Row,
    of: Shards | None,
    split: int,
    seed: int,
    lines: Sequence[Sequence[Job]],
    failures: Mapping[str, str],
) -> dict[str, Any]:
    members = [line[0] for line in lines]
    record: dict[str, Any] = {
        "table": row.table,
        "title": row.title,
        "strategy": row.strategy,
        "fusion": row.fusion,
        "paper_dataset": row.dataset,
        "paper_top1": row.paper_top1,
        "paper_top5": row.paper_top5,
        "remark": row.remark,
        "paper_protocol": row.protocol,
        "split": split,
        "seed": seed,
    }
    if of is None:
        return {**record, "status": "not run", "reason": f"no {row.dataset} in this study"}
    record |= {
        "dataset": of.dataset,
        "shards": of.folder,
        "shard_digest": of.digest,
        "videos": of.videos,
        "missing": of.missing,
        "num_segments": ",".join(str(job.training.num_segments) for job in members),
        "trainings": [job.folder for job in members],
    }
    failed = [job.folder for job in members if job.folder in failures]
    if failed:
        return {**record, "status": "failed", "reason": f"{failures[failed[0]]} (logs in {failed[0]})"}
    done = [json.loads((Path(job.folder) / "done.json").read_text("utf-8")) for job in members]
    numbers = _metrics(members)
    gap = None if row.paper_top1 is None else round(numbers["top1"] - row.paper_top1, 2)
    gap_top5 = None if row.paper_top5 is None else round(numbers["top5"] - row.paper_top5, 2)
    config, data = members[0].config, members[0].config.data
    differs, ours = _differences(study, row, of, members)
    counts = _videos_by_class(of.folder, of.digest, data.split, data.train_fraction, data.held_out)
    start = ", ".join(_starts(study, members[0]))
    return {
        **record,
        "status": "done",
        "id": f"{row.name} split{split} seed{seed} {digest([[Path(job.folder).name for job in members], numbers])}",
        "start": start,
        "weights": _weights(study, lines[0]),
        "differs": differs,
        "ours": ours,
        "width": config.model.width,
        "input_size": data.input_size,
        "train_fraction": data.train_fraction,
        "commit": ", ".join(sorted({each["commit"] for each in done})),
        "top1": numbers["top1"],
        "top5": numbers["top5"],
        "mean_class": numbers["mean_class"],
        "top1_low": numbers["top1_low"],
        "top1_high": numbers["top1_high"],
        "gap": gap,
        "gap_top5": gap_top5,
        "best_on_test": done[0]["best_on_test"]["top1"] if len(done) == 1 else None,
        "seconds": round(sum(each["seconds"] for each in done), 1),
        "device": "; ".join(sorted({each["device"] for each in done})),
        "history": json.loads((Path(members[0].folder) / "history.json").read_text("utf-8"))
        if len(members) == 1
        else [],
        "classes": _classes(members, counts),
        "test_videos": sum(test for _, test in counts.values()),
        "of_unseen_classes": sum(test for train, test in counts.values() if not train),
        "params": {
            **{name: value for name, value in flatten(to_dict(config)).items() if name not in PATHS},
            "dataset": of.dataset,
            "strategy": row.strategy,
            "fusion": row.fusion,
            "num_segments": record["num_segments"],
            "data.num_segments": record["num_segments"],  # of an ensemble all of them
        },
        "metrics": {
            "test/top1": numbers["top1"],
            "test/top5": numbers["top5"],
            "test/mean_class": numbers["mean_class"],
            **({"gap_to_paper": gap} if gap is not None else {}),
            **({"gap_to_paper_top5": gap_top5} if gap_top5 is not None else {}),
            **({"best_on_test/top1": done[0]["best_on_test"]["top1"]} if len(done) == 1 else {}),
        },
        "artifacts": [
            str(path)
            for job in members
            for path in (
                Path(job.folder) / "config.json",
                Path(job.folder) / "load_report.txt",
                Path(job.folder) / "evaluation" / "predictions.parquet",
                Path(job.folder) / "evaluation" / "per_class.csv",
                Path(job.folder) / "evaluation" / "confusion.png",
            )
            if path.is_file() or path.name not in ("per_class.csv", "confusion.png")  # evaluations of before have none
        ],
        "note": f"{row.table}, {row.title}: paper {row.paper_top1} on {row.dataset}; this run is on {of.dataset}, "
        f"width {config.model.width}, {data.input_size} px, {start}",
    }


def _starts(study: Study, job: Job) -> list[str]:
    """Where the weights of the first step come from, by network."""
    source, random = job.training.source, "a random start"
    own = source.dataset if source else ""
    found = [("ECO", Path(study.eco_weights).name or own or random)]
    if job.training.strategy == "recent":
        found = [(FUSION_TITLES[job.training.fusion], own)]
    if job.config.model.needs_pose:
        pose = "our own pose network" if study.joints and not study.pose_weights else Path(study.pose_weights).name
        found.append(("pose", pose or random))
    return [f"{name} from {origin}" for name, origin in found]


def _weights(study: Study, line: Sequence[Job]) -> dict[str, str]:
    """What each network of a row started from: the sha256 of public weights, or the name of the training of ours, which
    ends in the digest of all that decides it, or "a random start"."""
    public = {"eco": study.eco_weights, "pose": study.pose_weights}
    own = {"eco": line[-1].folder if line[-1].training.on == "D0" else "", "pose": line[0].pose}
    if line[0].training.strategy == "recent":  # PAS-Net on D0 holds both
        public, own = dict.fromkeys(public, ""), dict.fromkeys(own, line[1].folder)
    parts = ("eco", "pose") if line[0].config.model.needs_pose else ("eco",)
    return {
        part: f"sha256:{weights.sha256_of(Path(public[part]))}"
        if public[part]
        else f"training:{Path(own[part]).name}"
        if own[part]
        else "a random start"
        for part in parts
    }


def _differences(study: Study, row: Row, of: Shards, members: Sequence[Job]) -> tuple[list[str], list[str]]:
    """What keeps a result from being one in the paper's setting, and what differs from our defaults where the paper
    gives nothing."""
    found = [] if of.dataset == row.dataset else [f"{of.dataset} instead of {row.dataset}"]
    found += [f"{of.missing} listed videos of {of.dataset} missing"] if of.missing else []
    found += [f"{of.failed} videos of {of.dataset} could not be decoded"] if of.failed else []
    source, first = members[0].training.source, members[0]
    if source:
        both = source.dataset == D0_EMBEDDED and of.dataset in EMBEDDED_SETS
        same = ", the same actions by other actors," if both else ""
        found.append(f"{source.dataset}{same} instead of Kinetics")
    elif not study.eco_weights:
        found.append("random start of ECO")
    elif not weights.is_published(Path(study.eco_weights), "eco"):
        found.append("ECO weights are not known to be the published ones")
    if pose := first.config.init.pose:
        known = weights.is_published(Path(pose), "pose")
        found += [] if known else ["pose weights are not the published ones"]
    elif first.config.model.needs_pose and first.training.strategy != "recent":
        found.append("random start of the pose network")
    own: list[str] = []
    if first.pose:
        usual_pose, made_pose = to_dict(study.size.pose), to_dict(study.pose_config)
        own += [
            f"{POSE}{name} {value} instead of the preset's {usual_pose[name]}"
            for name, value in made_pose.items()
            if value != usual_pose[name] and name not in SIZES.values()
        ]
    for k, job in zip(row.num_segments, members, strict=True):
        usual = TrainConfig(
            model=ModelConfig(num_classes=1, fusion=FusionConfig(style=row.fusion)),
            data=DataConfig(shards="", num_segments=k),
        )
        expected = flatten(to_dict(usual))
        for name, value in flatten(to_dict(job.config)).items():
            if value != expected[name] and name not in FREE and not name.startswith("init."):
                (found if name in GIVEN else own).append(f"{name} {value} instead of {expected[name]}")
    return list(dict.fromkeys(found)), list(dict.fromkeys(own))


@functools.cache  # rows share it, and there may be hundreds
def _videos_by_class(
    folder: str, digest: str, split: int, train_fraction: float, held_out: float
) -> dict[str, tuple[int, int]]:
    """{class: (videos it is trained on, test videos)}; empty where the shards are not there, or are other ones."""
    if not (Path(folder) / "index.parquet").is_file():
        return {}
    from pasnet.data import open_shards, rows_of

    shards = open_shards(Path(folder))
    if shards.digest != digest:
        return {}
    data = DataConfig(shards=folder, split=split, train_fraction=train_fraction, held_out=held_out)

    def counted(rows: np.ndarray) -> list[int]:
        return np.bincount(shards.labels[rows], minlength=len(shards.class_names)).tolist()  # type: ignore[no-any-return]

    train, test = counted(rows_of(shards, data, "train")), counted(rows_of(shards, data, "test"))
    return dict(zip(shards.class_names, zip(train, test, strict=True), strict=True))


def _metrics(members: Sequence[Job]) -> dict[str, float]:
    """The one network's own metrics, or those of an ensemble's averaged predictions."""
    folders = [Path(job.folder) / "evaluation" for job in members]
    if len(folders) == 1:
        numbers: dict[str, float] = json.loads((folders[0] / "metrics.json").read_text("utf-8"))
        return numbers
    from pasnet.predictions import Predictions, ensemble, metrics

    files = [folder / "predictions.parquet" for folder in folders]
    return metrics(ensemble([Predictions.load(file) for file in files], names=[str(file) for file in files]))


def _classes(members: Sequence[Job], counts: Mapping[str, tuple[int, int]]) -> list[dict[str, Any]]:
    """Every class of a row that is one network, as pasnet/predictions.py: ClassResult, with the number of its training
    videos (None where the shards are not there); none for an ensemble."""
    if len(members) > 1:
        return []
    from pasnet.predictions import read_per_class

    found = read_per_class(Path(members[0].folder) / "evaluation" / "per_class.csv")
    return [
        {**dataclasses.asdict(of), "train_videos": counts[of.name][0] if of.name in counts else None} for of in found
    ]


def finish(
    study: Study,
    shards: Sequence[Shards],
    records: list[dict[str, Any]],
    seconds: Mapping[str, float],
    tracking_uri: str,
    flow_run_id: str = "",
) -> str:
    """Writes results.json and RESULTS.md, sends the rows and what is left of the trainings to MLflow; the page.

    MLflow comes second and may fail: the results are on disk, and `pasnet track send` or the next run sends them.
    """
    place = digest(str(study.root.absolute()))  # two folders of one name may share a tracking server
    lost = {record["dataset"]: record["reason"] for record in records if _is_lost(record)}
    shards, records = _with_earlier(study, shards, records)
    content = {
        "title": f"{study.root.name}: preset {study.preset}",
        "shards": [dataclasses.asdict(of) for of in shards],
        "request": _request(study),
        "narrowed": study.narrowed,
        "lost": lost,
        "remark": study.size.remark,
        "seconds": dict(seconds),
        "tags": {
            "study": place,
            "folder": study.root.name,
            "preset": study.preset,
            "prefect.flow_run_id": flow_run_id,
        },
        "comparisons": _comparisons(records),
        "figure_3": _figure_3(records, study.root / "figures"),
        "tracking": place_of(tracking_uri),
        "results": records,
    }
    study.root.mkdir(parents=True, exist_ok=True)
    page = _write(study.root, content)
    try:
        send([study.root], tracking_uri)
    except TrackingError as error:
        print(error, file=sys.stderr)
        return page
    return (study.root / "RESULTS.md").read_text("utf-8")


def _request(study: Study) -> dict[str, Any]:
    """All that decides a study's numbers but which rows, splits and seeds it is asked for."""
    from pasnet.checkpoints import NUMERICS

    given: dict[str, Any] = {"preset": study.preset, "num_segments": study.num_segments}
    for name in ("eco_weights", "pose_weights"):  # by content: a file may be another one under the same name
        path = Path(getattr(study, name))
        given[name] = weights.sha256_of(path) if path.is_file() else getattr(study, name)
    given["pretrain"] = study.pretrain or study.size.pretrain
    of_rows = ("tables", "fusions", "also", "data", "remark")
    size = {name: value for name, value in to_dict(study.size).items() if name not in of_rows}
    # presets and numerics may change with the code
    return {**given, "overrides": dict(study.overrides), "code": digest([NUMERICS, size])}


def _with_earlier(
    study: Study, shards: Sequence[Shards], records: list[dict[str, Any]]
) -> tuple[list[Shards], list[dict[str, Any]]]:
    """With the rows of an earlier study in this folder that was asked for other ones, finished or failed: a table alone
    takes no other table off the page, and a dataset that could not be had this time none of its finished rows. Not
    those of other settings or other shards, nor those that are gone."""
    written = study.root / "results.json"
    try:
        before = json.loads(written.read_text("utf-8"))
    except (OSError, ValueError):
        return list(shards), records
    known = {of.dataset: of for of in shards}
    earlier = {of["dataset"]: Shards(**of) for of in before["shards"]}
    d1 = {record.get("dataset") for record in before["results"]}
    d0_changed = any(of.digest != known[name].digest for name, of in earlier.items() if name in known.keys() - d1)
    if d0_changed or before.get("request") != json.loads(json.dumps(_request(study))):
        return list(shards), records

    def place(record: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(record[name] for name in ("table", "title", "strategy", "paper_dataset", "split", "seed"))

    def holds(record: Mapping[str, Any]) -> bool:
        same = lost.get(place(record)) == record.get("dataset") and record["status"] == "done"
        again = place(record) in asked and not same
        if record["status"] not in ("done", "failed") or again:
            return False
        if "shard_digest" not in record:  # its dataset could not be fetched or packed
            return True
        digest_now = known.get(record["dataset"], earlier.get(record["dataset"]))
        there = record["status"] == "failed" or all(
            (Path(folder) / "evaluation" / "metrics.json").is_file() for folder in record["trainings"]
        )
        return there and digest_now is not None and digest_now.digest == record["shard_digest"]

    asked = {place(record) for record in records}
    lost = {place(record): record["dataset"] for record in records if _is_lost(record)}
    kept = [record for record in before["results"] if holds(record)]
    records = [record for record in records if place(record) not in set(map(place, kept))]
    tables = list(QUESTIONS)
    joined = sorted([*kept, *records], key=lambda record: tables.index(record["table"]))
    used = {record["dataset"] for record in kept if "dataset" in record} - known.keys()
    return [*shards, *(earlier[name] for name in earlier if name in used)], joined


def _is_lost(record: Mapping[str, Any]) -> bool:
    """Whether the row's dataset could not be fetched or packed."""
    return record["status"] == "failed" and "shard_digest" not in record


def _comparisons(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    try:
        return comparisons(records)
    except Exception as error:  # of any kind: they must not cost a study its results
        print(f"the order of the rows is not compared: {error}", file=sys.stderr)
        return []


def send(folders: Sequence[Path], tracking_uri: str = "") -> list[str]:
    """Sends what MLflow has not got of trainings and of studies' rows; a line for each. Nothing arrives twice.

    `tracking_uri` is the address; else MLFLOW_TRACKING_URI, else the one that was given when they ran. Raises
    ConfigError for a folder that holds neither, TrackingError when the server does not take it all.
    """
    lines = []
    for folder in map(Path, folders):
        # the rows first: they are what a study is for
        if (folder / "results.json").is_file():
            lines.append(_send_rows(folder, tracking_uri))
    return lines + tracking.send(folders, tracking_uri)


def _send_rows(root: Path, tracking_uri: str) -> str:
    content = json.loads((root / "results.json").read_text("utf-8"))
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or content.get("tracking", "")
    if not uri or "tags" not in content:  # of a version before this one
        return f"{root}: its rows are not sent; run the study again, which sends them"
    done = [record for record in content["results"] if record["status"] == "done"]
    try:
        tables = _parents(content["results"])
        runs = record_rows(uri, done, experiments=QUESTIONS, study=content["tags"], tables=tables)
    except Exception as error:  # of any kind: MLflow's, SQLAlchemy's, the network's
        reason = str(error).replace(uri, place_of(uri))
        raise TrackingError(
            f"MLflow at {place_of(uri)} took no results ({reason}); they are in {root / 'results.json'}, and "
            f"`pasnet track send {root}` sends them"
        ) from error
    for record in done:
        record["run"] = runs[record["id"]]
    _write(root, content)
    return f"{root}: {len(done)} rows are at {place_of(uri)}"


def compare(root: Path, table: str, tracking_uri: str = "", address: str = "") -> tuple[str, int, str]:
    """Where MLflow sets the rows of a study's table side by side: the page's address, how many rows, and what has to be
    done before it answers ("" for a server that is there already).

    `address` is where a server answers that this cannot know of. Raises ConfigError for a folder without results and
    for a table that is none, TrackingError where MLflow has no such rows.
    """
    written = Path(root) / "results.json"
    if table not in QUESTIONS:
        raise ConfigError(f"unknown table {table!r} (one of: {', '.join(QUESTIONS)})")
    if not written.is_file():
        raise ConfigError(
            f"{written}: missing; give the folder of a study that has ended, such as runs/smoke-synthetic"
        )
    content = json.loads(written.read_text("utf-8"))
    local = Path(root) / "mlflow.db"
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        uri = content.get("tracking", "")
        if uri.startswith("sqlite") and local.is_file():
            uri = tracking.default_uri(root)  # the folder may have been moved since
    if not uri:
        raise ConfigError(f"{written}: does not say where it was tracked; give --tracking-uri")
    sent = [record["run"] for record in content["results"] if record["table"] == table and record.get("run")]
    fragment, runs = tracking.comparison(uri, QUESTIONS[table], sent)
    served = uri.startswith("http")
    base = address or (uri if served else "http://127.0.0.1:5000")
    hint = "" if served or address else f"make serve RUN={root}"
    return f"{base.rstrip('/')}/{fragment}", len(runs), hint


def links_page(root: Path, tracking_uri: str = "") -> str:
    """A study's rows in MLflow as links, in Markdown: each table side by side, and every run. Says so where MLflow has
    not got them."""
    done = [record for record in json.loads((root / "results.json").read_text("utf-8"))["results"] if record.get("run")]
    if not done:
        return f"No rows are in MLflow; `pasnet track send {root}` sends what there is.\n"
    lines: list[str] = []
    shown = []
    try:
        for table in dict.fromkeys(record["table"] for record in done):
            address, count, hint = compare(root, table, tracking_uri)
            base = address.partition("#")[0]
            lines += [f"First, for the links to answer: `{hint}`", ""] if hint and not lines else []
            lines.append(f"- {table}: [{count} rows side by side]({address})")
        fragments = tracking.run_fragments(tracking_uri, [record["run"] for record in done])
    except Exception as error:  # of any kind, of a server that is away: the results are on disk
        return f"MLflow at {place_of(tracking_uri)} did not answer ({type(error).__name__}); its rows are not linked.\n"
    for record in done:
        name = f"{record['table']}, {record['title']}, {record['strategy']}"
        where = f"{record['dataset']}, {record['split']}, {record['seed']}"
        shown.append(f"| {name} | {where} | {record['top1']:.2f} | [run]({base}{fragments[record['run']]}) |")
    head = ["", "| row | dataset, split, seed | top-1 | MLflow |", "|---|---|---|---|"]
    return "\n".join([*lines, *head, *shown]) + "\n"


def _parents(records: Sequence[dict[str, Any]]) -> dict[str, tuple[dict[str, str], dict[str, str]]]:
    """Tags and files of each table's run: {table: (tags, {file name: text})}."""
    from pasnet.figures import comparable, pictures_of_table

    found = {}
    for table in dict.fromkeys(record["table"] for record in records):
        of = [record for record in records if record["table"] == table]
        done = [record for record in of if record["status"] == "done"]
        splits = sorted({record["split"] for record in comparable(of)})
        rows = dict.fromkeys((r["title"], r["strategy"], r["paper_top1"], r["paper_top5"]) for r in of)
        tags = {
            "protocol": f"mean over splits {', '.join(map(str, splits))}" if len(splits) > 1 else f"split {splits[0]}",
            "paper_top1": "; ".join(f"{title}, {strategy}: {top1}" for title, strategy, top1, _ in rows),
            "paper_top5": "; ".join(f"{title}, {strategy}: {top5}" for title, strategy, _, top5 in rows),
            "shards.digest": ", ".join(sorted({record["shard_digest"] for record in done})),
            "commit": ", ".join(sorted({record["commit"] for record in done})),
        }
        started = [record.get("weights", {}) for record in done]  # results.json of before has none
        for part in sorted({part for each in started for part in each}):
            tags[f"weights.{part}"] = ", ".join(sorted({each[part] for each in started if part in each}))
        page = table_page(of, table)
        if len(page) <= NOTE:
            tags["mlflow.note.content"] = page  # MLflow shows it, set as a table, on the run's first page
        files = {"table.md": page, "table.csv": table_csv(of), **pictures_of_table(of)}
        found[table] = (tags, files)
    return found


def _figure_3(records: Sequence[dict[str, Any]], out: Path) -> dict[str, Any]:
    """Fig. 3 of the row that `pasnet_of_figure_3` chooses; {"reason": ...} where there is none."""
    from pasnet.figures import figure_3, pasnet_of_figure_3

    best = pasnet_of_figure_3(records)
    if best is None:
        return {"reason": "no finished row with a pose network"}
    try:
        return figure_3(best, out)
    except Exception as error:  # of any kind: a picture must not cost a study its results
        print(f"Fig. 3 is not drawn: {error}", file=sys.stderr)
        return {"reason": f"{type(error).__name__}: {error}"}


def _write(root: Path, content: dict[str, Any]) -> str:
    """results.json, RESULTS.md and report.html; the page in Markdown."""
    from pasnet.page import html_page

    page = results_page([content])
    files = {
        "results.json": json.dumps(content, indent=1),
        "report.html": html_page([content], [root]),
        "RESULTS.md": page,
    }
    for name, text in files.items():
        scratch = root / f".{name}.{os.getpid()}.tmp"
        scratch.write_text(text, "utf-8")
        os.replace(scratch, root / name)
    return page
