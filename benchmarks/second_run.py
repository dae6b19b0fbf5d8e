"""A full reproduction once more, with nothing changed: how long it takes to find that nothing is left to do.

The first one would take a GPU days. So networks, training lists, frames and clips are as small as they can be, and what
a second run has to look at has its true number: 20,086 videos of true mean lengths, in lists with the official counts,
every row of every table and the trainings that they share, predictions on all 3,783 and 1,530 test videos. What is
smaller: shards (dozens instead of hundreds), checkpoints, which a second run does not open, and pictures, which
it does not draw again. Networks that small cannot start from the public weights: to look at files of their size and
names is timed by itself, and added.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import bound
from benchmarks.study import flow
from shards import ffmpeg_exe
from shards.datasets import OFFICIAL_COUNTS

AGAIN = "a full reproduction with nothing left to do"
WEIGHTS = "looking at the public weights"
FRAMES = {"ucf101": 186, "hmdb51": 93}  # a video, the mean of the real sets
COLOURS = 25  # distinct files; the rest are links to them
# Everything else is as `pasnet/full-reproduction` has it, but for the public weights.
SMALL: dict[str, Any] = {
    "model.width": 0.0625,
    "data.input_size": 40,
    "data.train_fraction": 0.01,
    "data.workers": 0,
    "optim.epochs": 1,
    "optim.schedule": "constant",
}


def official(name: str, root: Path) -> Path:
    """A set that is UCF-101 or HMDB-51 by its lists: their counts of videos, classes and subsets, one-coloured clips.

    Names of classes are ours, but for the one by which shards/datasets.py knows the set.
    """
    total, classes, counts = OFFICIAL_COUNTS[name]
    first = {"ucf101": "ApplyEyeMakeup", "hmdb51": "brush_hair"}[name]
    names = [first, *(f"zz{number:03d}" for number in range(1, classes))]
    colours = _clips(root / "colours", FRAMES[name])
    folder = root / name
    videos: list[tuple[str, str]] = []
    for number in range(total):
        of, which = names[number % classes], number // classes
        videos.append((of, f"v_{of}_g{which % 25 + 1:02d}_c{which // 25 + 1:02d}.avi"))
        place = folder / "videos" / of / videos[-1][1]
        place.parent.mkdir(parents=True, exist_ok=True)
        os.link(colours[number % COLOURS], place)
    subsets = {split: dict(_dealt(videos, *of, skip=total // 3 * (split - 1))) for split, of in counts.items()}
    lists = folder / "lists"
    lists.mkdir()
    if name == "ucf101":
        index = [f"{number} {of}" for number, of in enumerate(names, 1)]
        (lists / "classInd.txt").write_text("\n".join(index), "utf-8")
        for split, subset in subsets.items():
            for kind in ("train", "test"):
                lines = [f"{of}/{video}" for (of, video), use in subset.items() if use == kind]
                (lists / f"{kind}list{split:02d}.txt").write_text("\n".join(lines), "utf-8")
        return folder
    codes = {None: 0, "train": 1, "test": 2}
    for split, subset in subsets.items():
        for of in names:
            lines = [f"{video[1]} {codes[subset.get(video)]} " for video in videos if video[0] == of]
            (lists / f"{of}_test_split{split}.txt").write_text("\n".join(lines), "utf-8")
    return folder


def _dealt(videos: list[tuple[str, str]], train: int, test: int, *, skip: int) -> Iterator[tuple[tuple[str, str], str]]:
    """(video, subset) of one split: classes alternate in `videos`, so that any stretch of them holds every class."""
    for number in range(train + test):
        yield videos[(skip + number) % len(videos)], "test" if number < test else "train"


def _clips(folder: Path, frames: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for number in range(COLOURS):
        made.append(folder / f"{frames}-{number}.avi")
        colour = f"color=c=0x{number * 10:02x}{250 - number * 10:02x}80:s=32x32:r=25"
        command = [ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", colour, "-frames:v", str(frames)]
        subprocess.run([*command, "-c:v", "mpeg4", str(made[-1])], check=True, stdin=subprocess.DEVNULL)
    return made


def looking_at_weights(folder: Path, rounds: int) -> float:
    """Seconds in which a fetch finds both public files there, whole: ECO-Lite's and the pose network's. Medians."""
    import torch

    from pasnet.config import FusionConfig, ModelConfig
    from pasnet.download import fetch
    from pasnet.models.openpose import BodyNet
    from pasnet.models.pasnet import build
    from pasnet.registry import REGISTRY

    folder.mkdir(parents=True)
    eco = build(ModelConfig(num_classes=400, fusion=FusionConfig(style="A"))).state_dict()
    public = {re.sub(r"^(appearance|temporal)\.", "", name).replace("head.", "fc_final."): eco[name] for name in eco}
    seconds = 0.0
    for name, tensors in (("eco-lite-kinetics", {"state_dict": public}), ("pose", BodyNet(1.0).state_dict())):
        path = folder / REGISTRY[name].file
        torch.save(tensors, path)
        pinned = REGISTRY[name].sha256 and hashlib.sha256(path.read_bytes()).hexdigest()
        source = dataclasses.replace(REGISTRY[name], size=path.stat().st_size, sha256=pinned)
        times = []
        for _ in range(rounds):
            path.touch()  # what is known of it counts no longer
            began = time.perf_counter()
            fetch(source, folder)
            times.append(time.perf_counter() - began)
        seconds += statistics.median(times)
    return seconds


def run(rounds: int, scratch: Path) -> dict[str, Any]:
    """The first reproduction, and `rounds` times another."""
    from pasnet.planning import plan
    from pasnet.study import Study

    data = [str(official(name, scratch / "data")) for name in FRAMES]
    small = [f"--set={name}={value}" for name, value in SMALL.items()]
    arguments = ("--preset", "full", *(f"--data={folder}" for folder in data), "--fetch", *small)
    planned = plan(Study(data=tuple(data), out=str(scratch / "out"), overrides=SMALL))
    print(f"  {len(planned['trainings'])} trainings first", flush=True)
    first = flow(scratch, *arguments, trainings=os.cpu_count() or 1)
    print(f"  the first: {first['seconds']:.0f} s", flush=True)
    again = []
    for number in range(rounds):
        again.append(flow(scratch, *arguments))
        print(f"  round {number + 1}: {again[-1]['seconds']:.1f} s", flush=True)
    return content(first, again, len(planned["trainings"]), looking_at_weights(scratch / "weights", rounds))


def content(first: dict[str, Any], again: list[dict[str, Any]], trainings: int, weights: float) -> dict[str, Any]:
    """Tables and bounds of runs as of `flow`, and of the seconds for `weights`; RuntimeError where the first one left
    out some of the `trainings`, or where another one started a process or packed a shard."""
    if first["processes"] != 2 * trainings or any(one["processes"] or one["packed"] for one in again):
        counts = ", ".join(f"{one['processes']} and {one['packed']}" for one in (first, *again))
        raise RuntimeError(f"{trainings} trainings are not done, and then left alone: processes and shards {counts}")
    seconds = [one["seconds"] for one in again]
    stages = {name: statistics.median(one["stages"].get(name, 0.0) for one in again) for name in again[0]["stages"]}
    stages["starting and ending"] = statistics.median(one["seconds"] - sum(one["stages"].values()) for one in again)
    stages[WEIGHTS] = weights
    total = round(statistics.median(seconds) + weights, 1)
    rows = [{"peer": name, "seconds": round(value, 1)} for name, value in stages.items()]
    tasks = round(statistics.median(one["tasks"] for one in again))
    return {
        "what": "`python -m flows --preset full --fetch` on sets of the official numbers, networks and clips small",
        "tables": {AGAIN: [*rows, {"peer": "all", "seconds": total}]},
        "first": {name: first[name] for name in ("seconds", "tasks", "processes")},
        "trainings": trainings,
        "tasks": tasks,
        "rounds_seconds": [round(one, 1) for one in seconds],
        "bounds": [
            bound("a full reproduction with nothing left to do <= 30 s", total, lambda of: of <= 30),
            bound("of that, per Prefect task < 2 s", round((total - weights) / tasks, 2), lambda of: of < 2),
        ],
    }
