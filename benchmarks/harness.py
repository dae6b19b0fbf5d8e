"""What every benchmark needs: CPU seconds, alternated rounds, ratios within a round, the machine, tables, JSON.

Machines here have two cores and other work on them. So peers alternate in an order that changes from round to round, a
ratio is taken within a round and its median over the rounds is reported, and CPU time is preferred to the clock.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import random
import re
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pasnet.synth import SynthConfig, generate
from shards import Dataset, Video, ffmpeg_exe, find_dataset, scan
from shards.decode_ffmpeg import ffmpeg_version

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    *("numpy", "torch", "torchvision", "simplejpeg", "av", "opencv-python-headless", "pyarrow", "ffmpeg-python"),
    *("imageio-ffmpeg", "webdataset", "pillow", "decord", "torchcodec", "litdata", "mosaicml-streaming"),
)


QUIET = 0.1  # share of the machine that others may use during a sample by the clock
TRIES = 4


class Sample(NamedTuple):
    """One peer in one round: CPU seconds of the process tree, and seconds of the clock.

    `others` is the share of the machine that other processes used meanwhile (or that its host took away); `number`
    counts the runs of the peer from 0, the one to warm up.
    """

    cpu: float
    wall: float
    others: float
    number: int


Samples = dict[str, list[Sample]]


def cpu_seconds() -> float:
    """User and system time of this process, of its ended children, and of its living descendants."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    living = [_stat(pid) for pid in descendants(os.getpid())]
    ticks = sum(sum(map(int, stat[11:15])) for stat in living if stat)  # utime, stime, cutime, cstime
    return sum(use.ru_utime + use.ru_stime for use in used) + ticks / os.sysconf("SC_CLK_TCK")


def descendants(pid: int) -> list[int]:
    """Ids of the living children of a process, their children, and so on."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").iterdir() if Path("/proc/self/stat").is_file() else ():
        if path.name.isdigit() and (stat := _stat(int(path.name))):
            parents.setdefault(int(stat[1]), []).append(int(path.name))
    found, waiting = [], [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat behind the command's name; none when the process has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    except OSError:
        return []


def busy_seconds() -> float:
    """CPU seconds that the whole machine has spent, on anything."""
    try:
        ticks = list(map(int, Path("/proc/stat").read_text("utf-8").split("\n", 1)[0].split()[1:9]))
    except OSError:
        return 0.0
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # without idle and waiting for the disk


def alternate(
    peers: dict[str, Callable[[int], object]],
    rounds: int,
    not_run: dict[str, str],
    *,
    quiet: float | None = None,
    also: Callable[[str, int], None] | None = None,
) -> Samples:
    """Runs every peer once to warm up (round -1), then in every round, in an order drawn for each round.

    A peer returns nothing, or the CPU seconds (float) of processes that nobody waited for, which cannot be seen from
    here. One that raises is left out from then on, with its reason in `not_run`. `also(name, round)` is called after a
    timed run, outside the measured time. With `quiet`, a sample in which others used more than this share of the
    machine is taken again, up to TRIES times, and the calmest is kept: there is no other way by the clock.
    """
    samples: Samples = {name: [] for name in peers}
    runs = dict.fromkeys(peers, 0)
    for number in range(-1, rounds):
        names = [name for name in peers if name not in not_run]
        random.Random(number).shuffle(names)
        for name in names:
            tried: list[Sample] = []
            while name not in not_run and (not tried or _again(tried, number, quiet)):
                cpu, busy, wall = cpu_seconds(), busy_seconds(), time.perf_counter()
                try:
                    unseen = peers[name](number)
                except Exception as error:
                    not_run[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                    break
                wall, busy, cpu = time.perf_counter() - wall, busy_seconds() - busy, cpu_seconds() - cpu
                cpu += unseen if isinstance(unseen, float) else 0.0
                others = max(0.0, busy - cpu) / (wall * (os.cpu_count() or 1))
                tried.append(Sample(cpu, wall, others, runs[name]))
                runs[name] += 1
            if number >= 0 and name not in not_run:
                samples[name].append(min(tried, key=lambda sample: sample.others))
                if also:
                    also(name, number)
        print(f"  round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return {name: of for name, of in samples.items() if name not in not_run}


def _again(tried: list[Sample], number: int, quiet: float | None) -> bool:
    return quiet is not None and number >= 0 and tried[-1].others > quiet and len(tried) < TRIES


def ratio(samples: Samples, numerator: str, denominator: str, what: str = "cpu") -> float | None:
    """Median over rounds of one peer's time over another's, None when either was not run."""
    if not samples.get(numerator) or not samples.get(denominator):
        return None
    pairs = zip(samples[numerator], samples[denominator], strict=True)
    return round(statistics.median(getattr(a, what) / getattr(b, what) for a, b in pairs), 3)


def rows(samples: Samples, not_run: dict[str, str], per: dict[str, int], unit: str, ours: str) -> list[dict[str, Any]]:
    """A table's rows, the quickest first (by CPU): milliseconds per unit, and the time over that of `ours`."""
    table = []
    for name, of in samples.items():
        milliseconds = [[1000 * getattr(sample, what) / per[name] for sample in of] for what in ("cpu", "wall")]
        cpu, wall = map(statistics.median, milliseconds)
        table.append(
            {
                "peer": name,
                f"cpu_ms_per_{unit}": round(cpu, 4),
                f"wall_ms_per_{unit}": round(wall, 4),
                "cpu_times_ours": ratio(samples, name, ours),
                "wall_times_ours": ratio(samples, name, ours, "wall"),
                "others_share": round(statistics.median(sample.others for sample in of), 3),
                "cpu_ms_of_rounds": [round(value, 4) for value in milliseconds[0]],
                "wall_ms_of_rounds": [round(value, 4) for value in milliseconds[1]],
            }
        )
    table.sort(key=lambda row: row[f"cpu_ms_per_{unit}"])
    return table + [{"peer": name, "not_run": reason} for name, reason in not_run.items()]


def bound(text: str, measured: float | None, met: Callable[[float], bool]) -> dict[str, Any]:
    """A line of the table of bounds; `met` is null where it could not be measured."""
    return {"bound": text, "measured": measured, "met": None if measured is None else met(measured)}


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, cores, memory, system, load, and the versions of what was measured."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text("utf-8"), re.MULTILINE) if info.is_file() else []
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "ffmpeg": ffmpeg_version(),
        "versions": versions,
    }


def use_ffmpeg(choice: str, folder: Path) -> None:
    """Makes `choice` ("bundled": imageio-ffmpeg's, "path": PATH's own, or a file) the ffmpeg of all that runs here.

    It is put first on PATH, where shards, its children and the peers that call the command look for it.
    """
    if choice == "path":
        choice = shutil.which("ffmpeg") or "ffmpeg"
    if choice == "bundled":
        import imageio_ffmpeg

        choice = imageio_ffmpeg.get_ffmpeg_exe()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ffmpeg").symlink_to(Path(choice).absolute())
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
    os.environ["IMAGEIO_FFMPEG_EXE"] = str(Path(choice).absolute())
    ffmpeg_exe.cache_clear()


def videos(data: Path | None, count: int, scratch: Path) -> Dataset:
    """`count` videos, evenly spread over the folder `data`, or over generated ones where there is none."""
    if data is None:
        data = generate(scratch / "synthetic", SynthConfig(groups=3, frames=(100, 200)), ffmpeg=ffmpeg_exe(), workers=2)
    dataset = scan(*find_dataset(data))
    return only(dataset, spread(dataset.videos, count))


def spread(of: tuple[Video, ...], count: int) -> tuple[Video, ...]:
    """`count` of the videos, evenly spaced; all of them for 0 or when there are not so many."""
    count = min(count or len(of), len(of))
    return tuple(of[i * len(of) // count] for i in range(count))


def only(dataset: Dataset, of: tuple[Video, ...]) -> Dataset:
    """The dataset with these videos alone."""
    return type(dataset)(**{**vars(dataset), "videos": of, "listed": len(of), "missing": ()})


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder that is gone afterwards, on the disk of TMPDIR."""
    with tempfile.TemporaryDirectory(prefix="pasnet-bench-") as folder:
        yield Path(folder)


def report(content: dict[str, Any], path: Path) -> None:
    """Prints the tables and the bounds, and writes everything as JSON."""
    for title, table in content["tables"].items():
        print(f"\n{title}")
        for row in table:
            if "not_run" in row:
                print(f"  {row['peer']:58} not run: {row['not_run']}")
                continue
            shown = {k: v for k, v in row.items() if k != "peer" and not isinstance(v, list)}
            print(f"  {row['peer']:58} " + "  ".join(f"{k} {v}" for k, v in shown.items()))
    print("\nbounds")
    for line in content["bounds"]:
        verdict = {True: "met", False: "NOT met", None: "not measured"}[line["met"]]
        print(f"  {line['bound']:90} {line['measured']}  {verdict}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    print(path)
