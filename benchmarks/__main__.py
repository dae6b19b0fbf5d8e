"""`make bench`: the data path against what people usually do, alternated, medians, as JSON and as a table.

Build: CPU time (this process and its children) from .avi to JPEG, per frame.
  ours            ffmpeg to YUV planes, planes into the JPEG encoder
  rgb + Pillow    ffmpeg to an RGB pipe, Pillow quality 90, 4:2:0: what most extraction scripts do
  ffmpeg mjpeg    ffmpeg's own JPEG encoder, -q:v 3, one pipe
  decode only     ffmpeg to nothing: the floor
Read: CPU time for a clip of K = 16 of one video's frames, as uint8 (16, 256, 340, 3).
  ours            index and pread
  webdataset      plain webdataset, whole record, then the same 16 frames
  avi             ffmpeg decodes the .avi, the same 16 frames are kept

The videos are the embedded synthetic ones, or a dataset folder: `python -m benchmarks --data FOLDER`.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pasnet.synth import SynthConfig, generate
from shards import (
    DecodeSettings,
    build,
    decode_video,
    ffmpeg_exe,
    find_dataset,
    open_shards,
    scan,
    segment_indices,
    stream,
)
from shards.decode import ffmpeg_version, passthrough

K = 16
SETTINGS = DecodeSettings()
PASSTHROUGH = [word for name, value in passthrough().items() for word in (f"-{name}", str(value))]


def cpu_seconds() -> float:
    """User and system time of this process and of its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in used)


def ffmpeg_pipe(video: Path, *options: str) -> bytes:
    """What ffmpeg writes to its standard output."""
    command = [ffmpeg_exe(), "-v", "error", "-threads", "1", "-i", str(video), *options, "-"]
    return subprocess.run(command, capture_output=True, check=True).stdout


def rgb_frames(video: Path) -> np.ndarray:
    """Every frame through an RGB pipe."""
    raw = ffmpeg_pipe(video, "-vf", "scale=340:256", *PASSTHROUGH, "-f", "rawvideo", "-pix_fmt", "rgb24")
    return np.frombuffer(raw, np.uint8).reshape(-1, 256, 340, 3)


def build_rgb_pillow(video: Path) -> None:
    """The usual extraction."""
    for frame in rgb_frames(video):
        Image.fromarray(frame).save(io.BytesIO(), "JPEG", quality=90, subsampling="4:2:0")


BUILD: dict[str, Callable[[Path], Any]] = {
    "ours": lambda video: decode_video(video, SETTINGS),
    "rgb + Pillow": build_rgb_pillow,
    "ffmpeg mjpeg": lambda video: ffmpeg_pipe(video, "-vf", "scale=340:256", *PASSTHROUGH, "-q:v", "3", "-f", "mjpeg"),
    "decode only": lambda video: ffmpeg_pipe(video, "-f", "null"),
}


def run_all(run: Callable[[Path], Any], paths: list[Path]) -> None:
    """One round of a peer of the build."""
    for path in paths:
        run(path)


def measure(peers: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every peer in every round; the order changes from round to round."""
    for run in peers.values():
        run()  # warm caches, and imports
    used: dict[str, list[float]] = {name: [] for name in peers}
    for number in range(rounds):
        names = list(peers)
        random.Random(number).shuffle(names)
        for name in names:
            before = cpu_seconds()
            peers[name]()
            used[name].append(cpu_seconds() - before)
    return used


def summary(used: dict[str, list[float]], per: int, unit: str) -> dict[str, dict[str, float]]:
    """Milliseconds per frame or clip, and the ratio to ours: medians over rounds."""
    return {
        name: {
            f"cpu_ms_per_{unit}": round(1000 * statistics.median(times) / per, 3),
            "times_ours": round(statistics.median(a / b for a, b in zip(times, used["ours"], strict=True)), 2),
        }
        for name, times in used.items()
    }


def main() -> None:
    """Runs both parts and writes benchmarks/results/shards.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--data", type=Path, help="dataset folder; default: synthetic videos")
    parser.add_argument("--videos", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "shards.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        config = SynthConfig(groups=3, frames=(100, 200))
        root = arguments.data or generate(Path(scratch) / "videos", config, ffmpeg=ffmpeg_exe())
        dataset = scan(*find_dataset(root))
        few = dataset.videos[:: max(1, len(dataset.videos) // arguments.videos)][: arguments.videos]
        some = type(dataset)(
            name=dataset.name, class_names=dataset.class_names, videos=few, listed=len(few), missing=()
        )
        folder = Path(scratch) / "shards"
        frames = build(some, folder)["frames"]
        store = open_shards(folder)
        by_key = {video.key: video.path for video in few}
        urls = [str(path) for path in sorted(folder.glob("*.tar"))]

        def indices(n: int) -> np.ndarray:
            return segment_indices(n, K)

        building: dict[str, Callable[[], Any]] = {
            name: functools.partial(run_all, run, [video.path for video in few]) for name, run in BUILD.items()
        }
        reading: dict[str, Callable[[], Any]] = {
            "ours": lambda: [store.read_frames(row, indices(int(store.num_frames[row]))) for row in range(len(store))],
            "webdataset": lambda: list(stream(urls, indices)),
            "avi": lambda: [(f := rgb_frames(by_key[key]))[indices(len(f))] for key in store.keys],
        }
        results = {
            "build": summary(measure(building, arguments.rounds), frames, "frame"),
            f"read K={K}": summary(measure(reading, arguments.rounds), len(store), "clip"),
        }
    content = {
        "dataset": dataset.name,
        "videos": len(few),
        "frames": frames,
        "rounds": arguments.rounds,
        "cpu": f"{os.cpu_count()} x {platform.processor() or platform.machine()}",
        "ffmpeg": ffmpeg_version(),
        "python": platform.python_version(),
        "results": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    for part, rows in results.items():
        print(part)
        for name, row in rows.items():
            (unit, value), ratio = next(iter(row.items())), row["times_ours"]
            print(f"  {name:14} {value:9.3f} {unit}   {ratio:6.2f} x ours")
    print(arguments.out)


if __name__ == "__main__":
    main()
