"""What a study would do, before it does anything: its trainings in order, their work, their hours and the disk.

Work is counted (pasnet/models/cost.py: a training clip costs three forward passes, one evaluated clip costs one). Hours
are that work divided by a rate that was measured on the same kind of device, in a finished training of this study or
by `python -m benchmarks models`; where there is none, there are no hours, and the plan says how to get them.

Of data that are not there yet the disk is estimated, downloads and generated videos included: "about" in the text,
"estimate" in JSON. Where a part is unknown or only its least is known, that is "at least", "at_least".
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pasnet.config import ConfigError, FusionConfig, ModelConfig, TrainConfig
from pasnet.experiments import DEFAULT_FUSION, TABLE_K
from pasnet.study import (
    D0_EMBEDDED,
    EMBEDDED,
    EMBEDDED_SETS,
    Job,
    PoseJob,
    Shards,
    Study,
    check_datasets,
    dataset_for,
    jobs,
    pose_job,
    synth_config,
)
from pasnet.tracking import default_uri, models_wanted

# Of the official lists: a study can be planned before 9 GB are downloaded.
OFFICIAL: dict[str, tuple[int, int, dict[str, dict[str, int]]]] = {  # classes, videos, videos by split and subset
    "ucf101": (
        101,
        13_320,
        {
            "split1": {"train": 9_537, "test": 3_783},
            "split2": {"train": 9_586, "test": 3_734},
            "split3": {"train": 9_624, "test": 3_696},
        },
    ),
    "hmdb51": (51, 6_766, {f"split{split}": {"train": 3_570, "test": 1_530} for split in (1, 2, 3)}),
    "jhmdb": (
        21,
        928,
        {
            "split1": {"train": 660, "test": 268},
            "split2": {"train": 658, "test": 270},
            "split3": {"train": 663, "test": 265},
        },
    ),
}
# Mean frames of a video. UCF-101: the paper; HMDB-51: counted over the 6,371 clips that a split uses (architecture
# facts, 4.1 and 4.2). Nobody has counted J-HMDB's for us.
MEAN_FRAMES = {"ucf101": 186.36, "hmdb51": 93.23}
# Of a frame of such videos at 340x256, bicubic, quality 90: 3,408 kB for a clip of 169 frames (performance facts, 2).
# Those facts' 48 GB for UCF-101 (8) are the bilinear ones, 3,248 kB.
FRAME_BYTES = 3_408_000 / 169
# Of archives whose exact size SOURCES does not have (architecture facts, 4.2).
ARCHIVE_BYTES = {"hmdb51": 2_100_000_000}
# Of embedded videos of 240x320: (difficulty, bytes of a frame in the shards, in the .avi), measured in November 2026:
# at 0 and 0.25 in the whole sets of presets smoke and science, else in 48 clips of 24 to 40 frames.
SYNTH_BYTES = ((0.0, 10_400, 1_600), (0.25, 13_400, 2_100), (0.5, 19_500, 5_700), (1.0, 28_400, 17_300))
BACKWARD = 2  # forward passes that a backward pass costs, as torch's FLOP counter and the benchmarks count
NO_MEASUREMENT = "no measurement for {device}; give --clips-per-second or run `python -m benchmarks models`"


@dataclass(frozen=True, kw_only=True)
class Videos:
    """Videos that are not there yet, and the disk that they will take."""

    folder: Path
    archives: int  # bytes of what is downloaded, which is kept; 0 where nothing is
    archives_known: bool  # to the byte; else an estimate
    videos: int
    at_least: bool  # the videos take this or more


@dataclass(frozen=True, kw_only=True)
class Source:
    """A dataset of the study as far as it is known before the study runs."""

    shards: Shards
    state: str  # "packed", "to be packed", "to be generated", "not there, official counts"
    shard_bytes: int | None  # that the shards take or, estimated, will take; None: not known without the videos
    videos: Videos | None = None  # that must be downloaded or generated first

    @property
    def packed(self) -> bool:
        """Whether the shards are there: only then can finished trainings be recognised."""
        return self.state == "packed"


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Work per second, measured with one network on the device that is planned for."""

    fusion: str
    needs_pose: bool
    num_segments: int
    width: float
    input_size: int
    form: str  # precision, then "freeze_pose" or "checkpoint_pose", then "compiled"
    gmacs_per_second: float
    source: str


def plan(
    study: Study, *, clips_per_second: float | None = None, on: str | None = None, benchmarks: Path | None = None
) -> dict[str, Any]:
    """The whole plan, ready for JSON; nothing is written and nothing is trained.

    `clips_per_second` is a training rate of the paper's PAS-Net (its best style, K = 8, 224 px), from which all others
    are scaled by their work; `on` names the device that is planned for, else this machine's; `benchmarks` is the folder
    of measurements, else that of the checkout. Raises what the study itself would raise before it starts.
    """
    from pasnet.costing import RESULTS
    from pasnet.machine import hardware

    if clips_per_second is not None and not 0 < clips_per_second < math.inf:
        raise ConfigError(f"clips_per_second must be above 0, got {clips_per_second}")
    found = sources(study)
    check_datasets(study, [(of.shards.dataset, of.shards.splits) for of in found])
    names = [of.shards.dataset for of in found]
    used = {name for row in study.rows if (name := dataset_for(row, names)) is not None}
    found = [of for of in found if of.shards.dataset in used]
    d0 = source_of_d0(study)
    before = d0.shards if d0 else None
    made, pose = jobs(study, [of.shards for of in found], before), pose_job(study, before)
    found += [d0] if d0 else []
    by_name = {of.shards.dataset: of for of in found}
    device = on or hardware()
    if clips_per_second is None:
        rates = [
            *rates_of_study(made, by_name, device, here=on is None),
            *rates_of_benchmarks(device, RESULTS if benchmarks is None else benchmarks),
        ]
    else:
        rates = [_given(clips_per_second)]
    trainings = [_pose_training(pose, before.dataset, rates)] if pose and before else []
    trainings += [_training(job, by_name, rates) for job in made]
    trainings = [{"number": number, **of} for number, of in enumerate(trainings, 1)]
    return {
        "study": str(study.root),
        "preset": study.preset,
        "device": device,
        "datasets": [_dataset(of) for of in found],
        "rows": _rows(study, names),
        "trainings": trainings,
        "totals": _totals(trainings),
        "disk": _disk(study, found, trainings),
        **({} if rates else {"no_hours": NO_MEASUREMENT.format(device=device)}),
    }


def sources(study: Study) -> list[Source]:
    """The study's datasets: their finished shards, else their videos, else, for a folder that is not there but is
    called ucf101 or hmdb51, the official counts. Raises DatasetError for anything else."""
    found = []
    for source in study.data:
        if source in EMBEDDED_SETS:
            found.append(_packed(study, source) or _embedded(study, source))
            continue
        path = Path(source)
        if not path.exists() and path.name in OFFICIAL:
            classes, videos, subsets = OFFICIAL[path.name]
            shards = _expected(path.name, classes, videos, subsets)
            frames = MEAN_FRAMES.get(path.name)
            found.append(
                Source(
                    shards=shards,
                    state="not there, official counts",
                    shard_bytes=None if frames is None else round(videos * frames * FRAME_BYTES),
                    videos=_download(path),
                )
            )
            continue
        found.append(_of_videos(study, path))
    return found


def source_of_d0(study: Study) -> Source | None:
    """The set that is learnt from beforehand, if there is one."""
    if not study.d0:
        return None
    if study.d0 == EMBEDDED:
        return _packed(study, D0_EMBEDDED) or _embedded(study, D0_EMBEDDED)
    if (Path(study.d0) / "manifest.json").is_file():
        return _finished(Path(study.d0))
    return _of_videos(study, Path(study.d0), "-d0")


def rates_of_study(made: Iterable[Job], by_name: Mapping[str, Source], device: str, *, here: bool) -> list[Rate]:
    """What the finished trainings of this study did per second, their evaluations included, where they ran on the
    device that is planned for."""
    from pasnet.machine import hardware

    found = []
    for job in made:
        try:
            done = json.loads((Path(job.folder) / "done.json").read_text("utf-8"))
            history = json.loads((Path(job.folder) / "history.json").read_text("utf-8"))
            seconds = sum(record["seconds"] for record in history)
        except (OSError, ValueError, KeyError):
            continue
        # older trainings have a processor on record as "CPU", without its name
        same = done.get("device") == device or (here and done.get("device") == "CPU" and hardware().endswith("cores"))
        if not same or not seconds:
            continue
        train, evaluated = _clips_of_epoch(job.config, by_name[job.training.dataset].shards)
        work = len(history) * _gmacs(job.config) * ((1 + BACKWARD) * train + evaluated)
        found.append(_rate(job.config, work / seconds, f"{job.title}, a finished training of this study"))
    return found


def rates_of_benchmarks(device: str, folder: Path) -> list[Rate]:
    """The training rows of every model-speed*.json in `folder` of that device, each network's best batch."""
    from pasnet.models.cost import cost

    best: dict[tuple[Any, ...], Rate] = {}
    for path in sorted(folder.glob("model-speed*.json")):
        content = json.loads(path.read_text("utf-8"))
        if content.get("hardware") != device:
            continue
        for row in content.get("tables", {}).get("training", ()):
            # narrower networks are those of --quick, on small frames: they show that the benchmark runs, no more
            usable = row.get("style") and row["form"] != "reference" and row["width"] == 1.0
            if not usable or "clips_per_second" not in row:
                continue
            size = 224
            model = ModelConfig(num_classes=101, fusion=FusionConfig(style=row["style"]))
            work = (1 + BACKWARD) * cost(model, row["num_segments"], size).gmacs * row["clips_per_second"]
            rate = Rate(
                fusion=model.fusion.style,
                needs_pose=model.needs_pose,
                num_segments=row["num_segments"],
                width=model.width,
                input_size=size,
                form=row["form"],
                gmacs_per_second=work,
                source=f"{path.name}: {model.fusion.style}, K={row['num_segments']}, {row['form']}",
            )
            key = (rate.fusion, rate.num_segments, rate.width, rate.form)
            if key not in best or best[key].gmacs_per_second < work:
                best[key] = rate
    return list(best.values())


def lines(plan: Mapping[str, Any]) -> list[str]:
    """The plan for a terminal."""
    said = [f"{plan['study']}: preset {plan['preset']}, on {plan['device']}"]
    for of in plan["datasets"]:
        splits = ", ".join(f"{name} {count['train']}/{count['test']}" for name, count in of["subsets"].items())
        said.append(f"data: {of['dataset']}, {of['videos']} videos ({splits}), {of['state']}")
    rows = plan["rows"]
    said.append(f"rows: {rows['run']} are run" + (f", {len(rows['not_run'])} are not" if rows["not_run"] else ""))
    said += [f"  not run: {of['row']}: {of['reason']}" for of in rows["not_run"]]
    said += [f"  {rows['narrowed']}"] if rows["narrowed"] else []
    said.append("")
    width = max(len(of["title"]) for of in plan["trainings"])
    said.append(f"   #  {'training'.ljust(width)}  {'clips':>10} {'PFLOP':>10} {'hours':>8}  state")
    for of in plan["trainings"]:
        hours = "–" if of["hours"] is None else f"{of['hours']:.2f}"
        clips, work = of["train_clips"] + of["evaluated_clips"], _pflop(of["pflop"])
        said.append(f"{of['number']:4}  {of['title'].ljust(width)}  {clips:10} {work:>10} {hours:>8}  {of['state']}")
    total = plan["totals"]
    said.append("")
    said.append(
        f"{total['trainings']} trainings, {total['done']} of them done; left: {total['train_clips']} training clips, "
        f"{total['evaluated_clips']} evaluated, {_pflop(total['pflop'])} PFLOP"
    )
    if total["hours"] is not None:
        said.append(f"hours on one device: {total['hours']:.1f}, one training after the other")
        said += [f"  measured by {source}" for source in total["measured_by"]]
    if "no_hours" in plan:
        said.append(f"hours: {plan['no_hours']}")
    elif total["without_hours"]:
        said.append(
            f"  without {total['without_hours']} trainings, for whose precision or form there is no measurement"
        )
    disk = plan["disk"]
    shards = " and ".join(
        f"{of['dataset']} {'unknown until there are videos' if of['bytes'] is None else _said(of['bytes'], of)}"
        for of in disk["shards"]
    )
    said.append(
        f"disk: shards {shards or 'are there'}; checkpoints {_size(disk['checkpoints'])}, "
        f"models in MLflow {_size(disk['models']) if disk['models'] else 'none here'}"
    )
    for of in disk["videos"]:
        archives = (
            f"archives {_said(of['archives'], {'estimate': of['archives_estimate']})}, " if of["archives"] else ""
        )
        said.append(f"  before that, {of['dataset']} in {of['folder']}: {archives}videos {_said(of['bytes'], of)}")
    said.append(
        f"  still to write {_said(disk['to_write'], disk)}, free {_size(disk['free'])}"
        + ("" if disk["to_write"] <= disk["free"] else ": NOT ENOUGH")
    )
    for of in disk["elsewhere"]:
        said.append(
            f"  and on the disk of {of['folder']} {_said(of['to_write'], of)}, free {_size(of['free'])}"
            + ("" if of["to_write"] <= of["free"] else ": NOT ENOUGH")
        )
    return said


# ---- details ----


def _packed(study: Study, name: str) -> Source | None:
    folder = study.root / "shards" / name
    return _finished(folder) if (folder / "manifest.json").is_file() else None


def _finished(folder: Path) -> Source:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Source(shards=Shards.of(folder), state="packed", shard_bytes=size)


def _of_videos(study: Study, path: Path, suffix: str = "") -> Source:
    from shards import DecodeSettings, find_dataset, scan
    from shards.pack import estimate_bytes

    dataset = scan(*find_dataset(path))
    name = dataset.name + suffix
    subsets = {
        f"split{split}": {"train": dataset.count(split, "train"), "test": dataset.count(split, "test")}
        for split in dataset.splits
    }
    if (made := _packed(study, name)) is not None:
        return made
    shards = _expected(name, len(dataset.class_names), len(dataset.videos), subsets)
    return Source(shards=shards, state="to be packed", shard_bytes=estimate_bytes(dataset, DecodeSettings()))


def _download(path: Path) -> Videos:
    """What `pasnet shards fetch` leaves of an official set: its archives, and what is in them."""
    from shards.fetch import SOURCES

    source = SOURCES[path.name]
    videos = source.videos.size or ARCHIVE_BYTES[path.name]
    known = source.videos.size is not None and source.splits.size is not None
    archives = videos + (source.splits.size or 0)
    # no archive is larger than what is in it, and these hold compressed videos, which get hardly smaller
    return Videos(folder=path, archives=archives, archives_known=known, videos=videos, at_least=True)


def _embedded(study: Study, name: str) -> Source:
    import numpy as np

    from pasnet.synth import clips, held_out

    config = synth_config(study, name)
    groups = [clip.group for clip in clips(config)]
    subsets = {}
    for split in (1, 2, 3):
        test = sum(group in held_out(config, split) for group in groups)
        subsets[f"split{split}"] = {"train": len(groups) - test, "test": test}
    shards = _expected(name, len(config.classes), len(groups), subsets)
    # lengths are drawn evenly from the range, both ends included
    frames = len(groups) * sum(config.frames) / 2
    difficulties, packed, encoded = zip(*SYNTH_BYTES, strict=True)
    pixels = math.prod(config.size) / (240 * 320)  # the shards' frames have one size
    folder = study.root / "data" / name
    videos = Videos(
        folder=folder,
        archives=0,
        archives_known=True,
        videos=round(frames * pixels * float(np.interp(config.difficulty, difficulties, encoded))),
        at_least=False,
    )
    return Source(
        shards=shards,
        state="to be generated",
        shard_bytes=round(frames * float(np.interp(config.difficulty, difficulties, packed))),
        videos=None if (folder / "joints.parquet").is_file() else videos,
    )


def _expected(name: str, classes: int, videos: int, subsets: Mapping[str, Mapping[str, int]]) -> Shards:
    return Shards(
        dataset=name,
        folder="",
        digest=f"{name}, not packed yet",
        num_classes=classes,
        videos=videos,
        frames=0,
        failed=0,
        decoded_with_errors=0,
        missing=0,
        subsets=subsets,
    )


def _clips_of_epoch(config: TrainConfig, of: Shards) -> tuple[int, int]:
    """Clips that an epoch trains on, and that it evaluates."""
    subset = of.subsets[f"split{config.data.split}"]
    held = round(subset["train"] * config.data.held_out)
    train = max(1, round((subset["train"] - held) * config.data.train_fraction))
    return train, subset["test"] + held


def _gmacs(config: TrainConfig) -> float:
    from pasnet.models.cost import cost

    return cost(config.model, config.data.num_segments, config.data.input_size).gmacs


def _form(config: TrainConfig) -> str:
    """As the benchmarks name it."""
    pose = ", freeze_pose" if config.optim.freeze_pose else ", checkpoint_pose" if config.optim.checkpoint_pose else ""
    return config.precision + (pose if config.model.needs_pose else "") + (", compiled" if config.compile else "")


def _rate(config: TrainConfig, gmacs_per_second: float, source: str) -> Rate:
    return Rate(
        fusion=config.model.fusion.style,
        needs_pose=config.model.needs_pose,
        num_segments=config.data.num_segments,
        width=config.model.width,
        input_size=config.data.input_size,
        form=_form(config),
        gmacs_per_second=gmacs_per_second,
        source=source,
    )


def _given(clips_per_second: float) -> Rate:
    from pasnet.models.cost import cost

    model = ModelConfig(num_classes=101, fusion=FusionConfig(style=DEFAULT_FUSION))
    return Rate(
        fusion=DEFAULT_FUSION,
        needs_pose=True,
        num_segments=TABLE_K,
        width=1.0,
        input_size=224,
        form="",  # whatever it was, the user knows
        gmacs_per_second=(1 + BACKWARD) * cost(model, TABLE_K).gmacs * clips_per_second,
        source=f"you: {clips_per_second:g} training clips per second of {DEFAULT_FUSION}, K={TABLE_K}, 224 px",
    )


def _nearest(config: TrainConfig, rates: Sequence[Rate]) -> Rate | None:
    """The measurement to scale from: of the same precision and form, then as like this network as there is. What
    compiling gains is not taken over from a network with a pose network to one without; there, as where it was not
    measured, it is taken to gain nothing."""
    usable = [rate for rate in rates if rate.form in ("", _form(config))]
    if config.compile:
        usable = [rate for rate in usable if rate.needs_pose == config.model.needs_pose]
        if not usable:
            return _nearest(replace(config, compile=False), rates)

    def distance(rate: Rate) -> tuple[Any, ...]:
        sizes = ((rate.width, config.model.width), (rate.input_size, config.data.input_size))
        return (
            rate.needs_pose != config.model.needs_pose,  # the pose network's convolutions are large, ECO's are small
            sum(abs(math.log(a / b)) for a, b in sizes),
            rate.fusion != config.model.fusion.style,
            abs(math.log(rate.num_segments / config.data.num_segments)),
        )

    return min(usable, key=distance, default=None)


def _measured_by(rate: Rate, width: float) -> str:
    """Where the rate comes from, and that the hours are too few where it is a wider network's."""
    narrow = f" at width {rate.width:g}; at width {width:g} a second does less work: expect more hours"
    return rate.source + (narrow if width < rate.width else "")


def _training(job: Job, by_name: Mapping[str, Source], rates: Sequence[Rate]) -> dict[str, Any]:
    from pasnet.models.cost import cost

    config, of = job.config, by_name[job.training.dataset]
    costs = cost(config.model, config.data.num_segments, config.data.input_size)
    train, evaluated = _clips_of_epoch(config, of.shards)
    epochs, over = config.optim.epochs, _epochs_over(job) if of.packed else 0
    done = of.packed and (Path(job.folder) / "done.json").is_file() and (Path(job.folder) / "last.pt").is_file()
    judged = done and (Path(job.folder) / "evaluation" / "metrics.json").is_file()
    left = 0 if done else epochs - over
    train_clips = left * train
    evaluated_clips = left * evaluated + (0 if judged else of.shards.subsets[f"split{config.data.split}"]["test"])
    gmacs = costs.gmacs * ((1 + BACKWARD) * train_clips + evaluated_clips)
    rate = _nearest(config, rates)
    return {
        "title": job.title,
        "folder": job.folder if of.packed else None,  # its name holds the digest of the shards
        "after": None if not job.parent else job.parent if of.packed else "the one that it starts from",
        "state": "done"
        if judged
        else "to evaluate"
        if done
        else f"{over} of {epochs} epochs done"
        if over
        else "to do",
        "epochs": epochs,
        "train_clips": train_clips,
        "evaluated_clips": evaluated_clips,
        "pflop": round(2 * gmacs / 1e6, 7),
        "hours": None if rate is None else round(gmacs / rate.gmacs_per_second / 3600, 4),
        "measured_by": None if rate is None else _measured_by(rate, config.model.width),
        # weights and momenta in fp32; batch norm's buffers are too small to count
        "checkpoint_bytes": 8 * costs.parameters,
        "checkpoint_there": over > 0 or done,
        "model_bytes": 4 * costs.parameters,  # what MLflow gets
    }


def _pose_training(job: PoseJob, dataset: str, rates: Sequence[Rate]) -> dict[str, Any]:
    """Our own pose network's, which counts frames for clips."""
    from pasnet.models.cost import cost

    def model(style: str) -> ModelConfig:
        return ModelConfig(num_classes=2, fusion=FusionConfig(style=style), width=job.config.width)

    size = job.config.input_size
    with_pose, without = cost(model(DEFAULT_FUSION), 1, size), cost(model("A"), 1, size)
    done, frames = Path(job.trained).is_file(), job.config.steps * job.config.batch
    frames, measured = (0, 0) if done else (frames, job.config.measure)
    gmacs = (with_pose.gmacs - without.gmacs) * ((1 + BACKWARD) * frames + measured)
    usable = [rate for rate in rates if rate.needs_pose and rate.form in ("", "fp32")]
    rate = min(usable, key=lambda rate: abs(math.log(rate.width / job.config.width)), default=None)
    return {
        "title": f"pose network, {dataset}, {job.config.steps} steps of {job.config.batch} frames",
        "folder": job.folder if done else None,
        "after": None,
        "state": "done" if done else "to do",
        "epochs": 1,
        "train_clips": frames,
        "evaluated_clips": measured,
        "pflop": round(2 * gmacs / 1e6, 7),
        "hours": None if rate is None else round(gmacs / rate.gmacs_per_second / 3600, 4),
        "measured_by": None if rate is None else _measured_by(rate, job.config.width),
        "checkpoint_bytes": 12 * (with_pose.parameters - without.parameters),  # weights, and two moments of Adam
        "checkpoint_there": done,
        "model_bytes": 0,
    }


def _epochs_over(job: Job) -> int:
    try:
        return len(json.loads((Path(job.folder) / "history.json").read_text("utf-8")))
    except (OSError, ValueError):
        return 0


def _dataset(of: Source) -> dict[str, Any]:
    shards = of.shards
    return {
        "dataset": shards.dataset,
        "state": of.state,
        "classes": shards.num_classes,
        "videos": shards.videos,
        "subsets": {name: dict(count) for name, count in shards.subsets.items()},
        "shard_bytes": of.shard_bytes,
        "shard_bytes_estimate": not of.packed and of.shard_bytes is not None,
    }


def _rows(study: Study, names: Sequence[str]) -> dict[str, Any]:
    absent = [row for row in study.rows if dataset_for(row, names) is None]
    return {
        "run": len(study.rows) - len(absent),
        "not_run": [{"row": row.name, "reason": f"no {row.dataset} in this study"} for row in absent],
        "narrowed": study.narrowed,
    }


def _totals(trainings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    hours = [of["hours"] for of in trainings if of["hours"] is not None]
    return {
        "trainings": len(trainings),
        "done": sum(of["state"] == "done" for of in trainings),
        "train_clips": sum(of["train_clips"] for of in trainings),
        "evaluated_clips": sum(of["evaluated_clips"] for of in trainings),
        "pflop": round(sum(of["pflop"] for of in trainings), 6),
        "hours": round(sum(hours), 3) if hours else None,
        "without_hours": len(trainings) - len(hours),
        "measured_by": list(dict.fromkeys(of["measured_by"] for of in trainings if of["hours"])),
    }


def _disk(study: Study, found: Sequence[Source], trainings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is to be written and what is free, on the study's disk and on others that videos are downloaded to."""
    place = _existing(study.root)
    missing = [of for of in trainings if not of["checkpoint_there"]]
    # a checkpoint is written beside the one that it replaces
    scratch = max((of["checkpoint_bytes"] for of in trainings if of["state"] != "done"), default=0)
    to_pack = [of for of in found if not of.packed]
    to_write = sum(of.shard_bytes or 0 for of in to_pack)
    to_write += sum(of["checkpoint_bytes"] for of in missing) + scratch
    # else they go to a server, or nowhere
    here = models_wanted() and default_uri(study.root).startswith(("sqlite:", "file:"))
    models = sum(of["model_bytes"] for of in trainings) if here else 0
    trained = ("done", "to evaluate")
    to_write += sum(of["model_bytes"] for of in trainings if of["state"] not in trained) if here else 0
    estimate, at_least = bool(to_pack), any(of.shard_bytes is None for of in to_pack)
    videos, elsewhere = [], dict[int, dict[str, Any]]()
    for of in found:
        if of.videos is None:
            continue
        coming, there = of.videos, _existing(of.videos.folder)
        videos.append(
            {
                "dataset": of.shards.dataset,
                "folder": str(coming.folder),
                "archives": coming.archives,
                "archives_estimate": not coming.archives_known,
                "bytes": coming.videos,
                "estimate": True,
                "at_least": coming.at_least,
            }
        )
        if _device(there) == _device(place):
            to_write += coming.archives + coming.videos
            at_least |= coming.at_least
            continue
        other = elsewhere.setdefault(
            _device(there),
            {"folder": str(coming.folder), "to_write": 0, "estimate": True, "at_least": False, "free": _free(there)},
        )
        other["to_write"] += coming.archives + coming.videos
        other["at_least"] |= coming.at_least
    free = _free(place)
    return {
        "shards": [
            {
                "dataset": of.shards.dataset,
                "bytes": of.shard_bytes,
                "there": of.packed,
                "estimate": not of.packed and of.shard_bytes is not None,
            }
            for of in found
        ],
        "videos": videos,
        "checkpoints": sum(of["checkpoint_bytes"] for of in trainings),
        "models": models,
        "to_write": to_write,
        "estimate": estimate,
        "at_least": at_least,
        "free": free,
        "elsewhere": list(elsewhere.values()),
        "enough": to_write <= free and all(of["to_write"] <= of["free"] for of in elsewhere.values()),
    }


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _device(path: Path) -> int:
    return path.stat().st_dev


def _free(path: Path) -> int:
    return shutil.disk_usage(path).free


def _said(count: int, of: Mapping[str, Any]) -> str:
    """A size as sure as it is."""
    return ("at least " if of.get("at_least") else "") + ("about " if of["estimate"] else "") + _size(count)


def _pflop(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
