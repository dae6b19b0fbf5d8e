"""Building shards: CPU time per frame from .avi to JPEG in a tar, workers, memory, and what that means for UCF-101.

Peers do the whole job as well: every frame of a video, 340x256, into a tar (one member a video, as ours: the cheapest
way) or, for ffmpeg's own encoder, into one file. `python -m benchmarks.shards_build` is the child that builds in a
process of its own, to be confined to cores and watched from outside.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import QUIET, Samples, alternate, bound, cpu_seconds, descendants, only, ratio, rows, spread
from shards import Dataset, DecodeSettings, Video, build, ffmpeg_exe, find_dataset, scan
from shards.decode_ffmpeg import passthrough

HEIGHT, WIDTH = 256, 340
UCF_VIDEOS, UCF_FRAMES_EACH = 13_320, 186.36
COPIES = 3  # of every video in the builds that are timed by the clock: their start and end weigh less, as in large ones
VIDEOS = 8  # a shard, there: a real one has more, but the last must not leave a worker idle for long
FFMPEG, PYAV = "ours, decoder ffmpeg (the default)", "ours, decoder pyav (the fast one)"
PILLOW, MJPEG = "ffmpeg CLI to RGB pipe + Pillow q90", "ffmpeg CLI mjpeg -q:v 3"
X264 = "video2dataset's resize path (x264 re-encode)"
FLOOR_FFMPEG, FLOOR_PYAV = "floor: ffmpeg CLI, decode to nothing", "floor: PyAV, decode to nothing"


def ffmpeg_words(video: Path, *output: str) -> list[str]:
    """The command line that decodes `video` on one thread into `output`."""
    every = [word for name, value in passthrough().items() for word in (f"-{name}", str(value))]
    return [ffmpeg_exe(), "-nostdin", "-v", "error", "-y", "-threads", "1", "-i", str(video), *every, *output]


def ours(decoder: str, dataset: Dataset, scratch: Path, number: int) -> None:
    """`shards.build` with one worker into one shard, index and checksums included."""
    out = scratch / f"{decoder}-{number}"
    build(dataset, out, DecodeSettings(decoder=decoder), workers=1, num_shards=1)  # type: ignore[arg-type]
    shutil.rmtree(out)


def rgb_frames(video: Path) -> Iterator[np.ndarray]:
    """Every frame through a pipe, as most extraction scripts take it."""
    command = ffmpeg_words(video, "-vf", f"scale={WIDTH}:{HEIGHT}", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    size = HEIGHT * WIDTH * 3
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=size) as process:
        assert process.stdout is not None
        while len(raw := process.stdout.read(size)) == size:
            yield np.frombuffer(raw, np.uint8).reshape(HEIGHT, WIDTH, 3)


def rgb_pillow(dataset: Dataset, scratch: Path, number: int) -> None:
    """RGB from ffmpeg, Pillow's encoder, tarfile."""
    from PIL import Image

    with tarfile.open(scratch / f"pillow-{number}.tar", "w") as tar:
        for video in dataset.videos:
            jpegs = io.BytesIO()
            for frame in rgb_frames(video.path):
                Image.fromarray(frame).save(jpegs, "JPEG", quality=90, subsampling="4:2:0")
            member = tarfile.TarInfo(f"{video.key}.mjpeg")
            member.size = jpegs.tell()
            jpegs.seek(0)
            tar.addfile(member, jpegs)
    (scratch / f"pillow-{number}.tar").unlink()


def ffmpeg_mjpeg(dataset: Dataset, scratch: Path, number: int) -> None:
    """ffmpeg decodes, scales and encodes; its pipe goes into one file."""
    path = scratch / f"mjpeg-{number}"
    with open(path, "wb") as file:
        for video in dataset.videos:
            words = ffmpeg_words(video.path, "-vf", f"scale={WIDTH}:{HEIGHT}", "-q:v", "3", "-f", "mjpeg", "-")
            subprocess.run(words, stdout=file, check=True)
    path.unlink()


def x264(dataset: Dataset, scratch: Path, number: int) -> None:
    """Bytes to a temporary file, ffmpeg-python: scale, encode as mp4 (libx264 by default), bytes back from the file."""
    import ffmpeg

    folder = scratch / f"x264-{number}"
    folder.mkdir()
    for video in dataset.videos:
        (folder / "input.mp4").write_bytes(video.path.read_bytes())
        stream = ffmpeg.input(str(folder / "input.mp4")).filter("scale", WIDTH, HEIGHT)
        stream = stream.output(str(folder / "output.mp4"), vcodec="libx264").overwrite_output()
        stream.run(cmd=ffmpeg_exe(), capture_stdout=True, quiet=True)
        (folder / "output.mp4").read_bytes()
    shutil.rmtree(folder)


def floor_ffmpeg(dataset: Dataset, number: int) -> None:
    """Nothing can be quicker with a process per video."""
    for video in dataset.videos:
        subprocess.run(ffmpeg_words(video.path, "-f", "null", "-"), check=True)


def floor_pyav(dataset: Dataset, number: int) -> None:
    """Nothing can be quicker with ffmpeg's libraries on one thread."""
    import av

    for video in dataset.videos:
        with av.open(str(video.path), metadata_errors="replace") as container:
            container.streams.video[0].codec_context.thread_count = 1
            for _ in container.decode(video=0):
                pass


def per_frame(dataset: Dataset, frames: dict[str, int], rounds: int, scratch: Path) -> tuple[Samples, list[Any]]:
    """The table of CPU time per frame. x264 gets every sixth video only: it takes ten times as long."""
    few = only(dataset, spread(dataset.videos, max(2, len(dataset.videos) // 6)))
    total, total_few = (sum(frames[video.key] for video in of.videos) for of in (dataset, few))
    peers: dict[str, Callable[[int], object]] = {
        FFMPEG: functools.partial(ours, "ffmpeg", dataset, scratch),
        PYAV: functools.partial(ours, "pyav", dataset, scratch),
        PILLOW: functools.partial(rgb_pillow, dataset, scratch),
        MJPEG: functools.partial(ffmpeg_mjpeg, dataset, scratch),
        X264: functools.partial(x264, few, scratch),
        FLOOR_FFMPEG: functools.partial(floor_ffmpeg, dataset),
        FLOOR_PYAV: functools.partial(floor_pyav, dataset),
    }
    not_run: dict[str, str] = {}
    encoders = subprocess.run([ffmpeg_exe(), "-v", "error", "-encoders"], capture_output=True, text=True).stdout
    if "libx264 " not in encoders:
        not_run[X264] = "this ffmpeg has no libx264"
    samples = alternate(peers, rounds, not_run)
    scale = total / total_few
    if X264 in samples:
        samples[X264] = [sample._replace(cpu=sample.cpu * scale, wall=sample.wall * scale) for sample in samples[X264]]
    return samples, rows(samples, not_run, dict.fromkeys(samples, total), "frame", FFMPEG)


# Workers and memory: builds in a process of their own


def child(
    folder: Path, count: int, decoder: str, workers: int, out: Path, times: int, cores: int, copies: int
) -> dict[str, float]:
    """Builds `times` times, in this process, with every video under so many names; what is timed is `build` alone,
    without starting Python and importing."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    dataset = scan(*find_dataset(folder))
    videos = spread(dataset.videos, count)
    videos = tuple(replace(video, key=f"{video.key}-{n}") for n in range(copies) for video in videos)
    dataset = only(dataset, videos)
    settings = DecodeSettings(decoder=decoder)  # type: ignore[arg-type]
    # imports on demand, and the server that worker processes are forked from
    build(only(dataset, dataset.videos[:2]), out / "first", settings, workers=workers, num_shards=2)
    shutil.rmtree(out / "first")
    frames, start = 0, time.perf_counter()
    for number in range(times):
        place = out / str(number)
        frames += build(dataset, place, settings, workers=workers, num_shards=max(8, len(dataset.videos) // VIDEOS))[
            "frames"
        ]
        shutil.rmtree(place)
    seconds = time.perf_counter() - start
    waited_for = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    # the server of the worker processes, still alive, and the workers, which are its children
    unseen = cpu_seconds() - sum(used.ru_utime + used.ru_stime for used in waited_for)
    return {"seconds": seconds, "frames": frames, "unseen_cpu": unseen}


def build_apart(
    folder: Path,
    count: int,
    decoder: str,
    workers: int,
    out: Path,
    times: int = 1,
    cores: int = 2,
    copies: int = 1,
    watch: list[tuple[float, float]] | None = None,
) -> dict[str, float]:
    """`child` as a process; `watch` receives (PSS, RSS) of it and its children in MiB, five times a second."""
    words = [str(word) for word in (folder, count, decoder, workers, out, times, cores, copies)]
    # not -m: every worker process would import this module and all that it imports
    command = [sys.executable, "-c", "from benchmarks.shards_build import main; main()", *words]
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(0.2):
                kib = [memory(pid) for pid in (process.pid, *descendants(process.pid))]
                assert watch is not None
                watch.append((sum(pss for pss, _ in kib) / 1024, sum(rss for _, rss in kib) / 1024))

        watcher = threading.Thread(target=look)
        if watch is not None:
            watcher.start()
        said, _ = process.communicate()
        ended.set()
        if watch is not None:
            watcher.join()
    if process.returncode:
        raise RuntimeError(f"the build of {decoder} with {workers} workers ended with {process.returncode}")
    result: dict[str, float] = json.loads(said)
    return result


def memory(pid: int) -> tuple[int, int]:
    """(PSS, RSS) of a process in KiB: shared pages by share, and in full. Zero when it has gone."""
    found = {"Pss": 0, "Rss": 0}
    with contextlib.suppress(OSError, IndexError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text("utf-8").splitlines():
            name, _, value = line.partition(":")
            if name in found:
                found[name] = int(value.split()[0])
    return found["Pss"], found["Rss"]


def scaling(folder: Path, count: int, frames: int, rounds: int, scratch: Path) -> tuple[Samples, list[Any]]:
    """Wall time of whole builds for one and two workers, alternated."""

    def one(decoder: str, workers: int, cores: int, number: int) -> float:
        result = build_apart(folder, count, decoder, workers, scratch / "scaling", cores=cores, copies=COPIES)
        walls[name_of(decoder, workers, cores)].append(result["seconds"])
        return result["unseen_cpu"]

    cases = [(decoder, *rest) for decoder in ("ffmpeg", "pyav") for rest in ((1, 1), (1, 2), (2, 2))]
    walls: dict[str, list[float]] = {name_of(*case): [] for case in cases}
    not_run: dict[str, str] = {}
    samples = alternate({name_of(*case): functools.partial(one, *case) for case in cases}, rounds, not_run, quiet=QUIET)
    for name, of in samples.items():  # the seconds of the build alone, not those of starting Python
        samples[name] = [sample._replace(wall=walls[name][sample.number]) for sample in of]
    table = rows(samples, not_run, dict.fromkeys(samples, frames), "frame", name_of("ffmpeg", 2, 2))
    return samples, table


def name_of(decoder: str, workers: int, cores: int) -> str:
    """A row of the table of workers."""
    return f"decoder {decoder}, {workers} worker{'s'[: workers - 1]} on {cores} core{'s'[: cores - 1]}"


def memory_over_time(folder: Path, count: int, scratch: Path, times: int) -> list[dict[str, Any]]:
    """Peaks of the first, middle and last third of `times` builds on end, of all processes together."""
    table = []
    for decoder in ("ffmpeg", "pyav"):
        for workers in (1, 2):
            seen: list[tuple[float, float]] = []
            result = build_apart(folder, count, decoder, workers, scratch / "memory", times=times, watch=seen)
            third = max(1, len(seen) // 3)
            peaks = [max(pss for pss, _ in part) for part in (seen[:third], seen[third : 2 * third], seen[-third:])]
            table.append(
                {
                    "peer": f"decoder {decoder}, {workers} worker{'s'[: workers - 1]}",
                    "peak_pss_mib": round(max(peaks), 1),
                    "peak_pss_mib_per_worker": round(max(peaks) / workers, 1),
                    "peak_rss_mib": round(max(rss for _, rss in seen), 1),
                    "first_third_peak_mib": round(peaks[0], 1),
                    "middle_third_peak_mib": round(peaks[1], 1),
                    "last_third_peak_mib": round(peaks[2], 1),
                    "seconds": round(result["seconds"], 1),
                    "samples": len(seen),
                    "frames": int(result["frames"]),
                }
            )
            print(f"  memory: {table[-1]['peer']}", file=sys.stderr, flush=True)
    return table


def extrapolation(samples: Samples, frames: int) -> list[dict[str, Any]]:
    """Minutes for the whole of UCF-101 with two workers on two cores."""
    table, total = [], UCF_VIDEOS * UCF_FRAMES_EACH
    for decoder in ("ffmpeg", "pyav"):
        if of := samples.get(name_of(decoder, 2, 2)):
            each = statistics.median(sample.wall for sample in of) / frames
            table.append(
                {
                    "peer": f"decoder {decoder}",
                    "arithmetic": f"{UCF_VIDEOS:,} videos x {UCF_FRAMES_EACH} frames x {1000 * each:.3f} ms",
                    "minutes": round(total * each / 60, 1),
                }
            )
    return table


def run(
    folder: Path, dataset: Dataset, rounds: int, scratch: Path, *, all_videos: int, memory_times: int = 6
) -> dict[str, Any]:
    """Everything about building: `dataset` for the table per frame, `all_videos` of `folder` for workers and memory."""
    frames = count_frames(dataset.videos, scratch)
    costs, cost_table = per_frame(dataset, frames, rounds, scratch)
    whole = scan(*find_dataset(folder))
    many = sum(count_frames(spread(whole.videos, all_videos), scratch).values())
    walls, wall_table = scaling(folder, all_videos, COPIES * many, rounds, scratch)
    memories = memory_over_time(folder, all_videos, scratch, memory_times)
    minutes = extrapolation(walls, COPIES * many)
    scales = {
        (decoder, cores): ratio(walls, name_of(decoder, 1, cores), name_of(decoder, 2, 2), "wall")
        for decoder in ("ffmpeg", "pyav")
        for cores in (1, 2)
    }
    slowest = max((row["minutes"] for row in minutes), default=None)
    worst = max((row["peak_pss_mib_per_worker"] for row in memories), default=None)
    growth = max((round(row["last_third_peak_mib"] / row["first_third_peak_mib"], 3) for row in memories), default=None)
    v2d = ratio(costs, X264, FFMPEG)
    bounds = [
        bound(f"{FFMPEG} <= 0.65x {PILLOW}", ratio(costs, FFMPEG, PILLOW), lambda value: value <= 0.65),
        bound(f"{PYAV} <= 0.40x {PILLOW}", ratio(costs, PYAV, PILLOW), lambda value: value <= 0.40),
        bound(f"{FFMPEG} below {MJPEG}", ratio(costs, FFMPEG, MJPEG), lambda value: value < 1),
        bound(f"{PYAV} below {MJPEG}", ratio(costs, PYAV, MJPEG), lambda value: value < 1),
        bound(f"{X264} costs >= 8x the default decoder", v2d, lambda value: value >= 8),
        bound(f"{X264} costs >= 8x the fast decoder", ratio(costs, X264, PYAV), lambda value: value >= 8),
        *(
            bound(f"decoder {decoder}: 2 workers on 2 cores >= 1.8x 1 worker on {on}", value, lambda v: v >= 1.8)
            for (decoder, cores), value in scales.items()
            for on in [f"{cores} core{'s'[: cores - 1]}"]
        ),
        bound("UCF-101 in about 20 minutes on 2 cores (the slower decoder)", slowest, lambda value: value <= 21),
        bound("memory under 1 GB per worker (peak PSS, MiB)", worst, lambda value: value < 1e9 / 2**20),
        bound("memory flat: last third's peak over the first's", growth, lambda value: value <= 1.1),
    ]
    return {
        "what": ".avi to JPEG in tar; CPU is user + system of the process tree",
        "videos": len(dataset.videos),
        "frames": sum(frames.values()),
        "videos_of_workers_and_memory": min(all_videos or len(whole.videos), len(whole.videos)),
        "frames_of_workers_and_memory": many,
        "copies_by_the_clock": COPIES,
        "videos_a_shard": VIDEOS,
        "tables": {
            "CPU per frame, one worker": cost_table,
            "wall time of whole builds": wall_table,
            f"memory, {memory_times} builds on end": memories,
            "the whole UCF-101 by extrapolation": minutes,
        },
        "bounds": bounds,
    }


def count_frames(of: tuple[Video, ...], scratch: Path) -> dict[str, int]:
    """How many frames the decoder gives, by key."""
    import av

    frames = {}
    for video in of:
        with av.open(str(video.path), metadata_errors="replace") as container:
            container.streams.video[0].codec_context.thread_count = 1
            frames[video.key] = sum(1 for _ in container.decode(video=0))
    return frames


def main() -> None:
    """The child of `build_apart`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shards_build")
    for name, kind in (("folder", Path), ("count", int), ("decoder", str), ("workers", int), ("out", Path)):
        parser.add_argument(name, type=kind)
    for name in ("times", "cores", "copies"):
        parser.add_argument(name, type=int)
    print(json.dumps(child(**vars(parser.parse_args()))))
