"""`pasnet shards ...`, which is also `python -m shards ...`: arguments in, one call, a few lines out."""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards.datasets import FOLDER, DatasetError, find_dataset, scan
from shards.decode import DECODERS, DecodeSettings
from shards.pack import BuildError, Progress
from shards.pool import build
from shards.read import ShardError, open_shards


def parser(prog: str) -> argparse.ArgumentParser:
    """The sub-commands; each sets `run`, a function of the parsed arguments."""
    top = argparse.ArgumentParser(prog=prog, description="Videos to WebDataset shards that any video model can use.")
    commands = top.add_subparsers(required=True, metavar="action")

    fetch = commands.add_parser("fetch", help="download and unpack a dataset, or take over a folder that is there")
    fetch.add_argument("dataset", help="ucf101, hmdb51 or jhmdb")
    fetch.add_argument("--out", type=Path, help="default: data/<dataset>")
    fetch.add_argument("--have", type=Path, help="a folder with the archives, or with the unpacked videos and lists")
    fetch.add_argument("--mirror", action="append", default=[], metavar="URL", help="tried first: URL/<archive>")
    fetch.add_argument("--delete-archives", action="store_true", help="after they have been unpacked")
    fetch.set_defaults(run=_fetch)

    make = commands.add_parser("build", help="decode videos, pack them, write the index; finished shards are skipped")
    make.add_argument("--data", type=Path, help="dataset folder: videos/ and the official split lists beside it")
    make.add_argument(
        "--dataset", help=f"with --videos: ucf101, hmdb51, jhmdb, {FOLDER} (no lists: a class is a folder) or any name"
    )
    make.add_argument("--videos", type=Path, help="folder of class folders")
    make.add_argument("--splits", type=Path, help="folder of the official lists; default: the one beside --videos")
    make.add_argument("--out", type=Path, required=True)
    make.add_argument("--workers", type=int, default=2, help="shards that are built at the same time")
    make.add_argument("--decoder", choices=DECODERS, default="ffmpeg", help="pyav is faster: no process for each video")
    make.add_argument("--frames-per-video", type=int, default=0, metavar="N", help="N evenly spread ones; default: all")
    make.add_argument("--quality", type=int, default=90, help="of the JPEGs, 1 to 100")
    make.add_argument("--shard-mib", type=int, default=256, help="about how large a shard is")
    make.add_argument("--num-shards", type=int, help="instead of --shard-mib")
    make.add_argument(
        "--max-failed", type=float, default=0.01, help="share of damaged videos that fails the build; 0: any"
    )
    make.add_argument("--retry-failed", action="store_true", help="try videos again that could not be decoded")
    make.add_argument("--timeout", type=float, default=900.0, help="seconds for one video")
    make.add_argument("--max-mib", type=int, default=256, help="of JPEGs for one video")
    make.set_defaults(run=_build)

    check = commands.add_parser("verify", help="reread everything and name what is wrong (exit code 1 then)")
    check.add_argument("folder", type=Path)
    check.add_argument("--decode", action="store_true", help="decode every frame as well")
    check.add_argument("--workers", type=int, default=2)
    check.set_defaults(run=_verify)

    mend = commands.add_parser("repair", help="rebuild what verify finds wrong, and nothing else")
    mend.add_argument("folder", type=Path)
    mend.add_argument("--videos", type=Path, help="where the videos are now; default: where the build found them")
    mend.add_argument("--splits", type=Path)
    mend.add_argument("--workers", type=int, default=2)
    mend.set_defaults(run=_repair)

    look = commands.add_parser("inspect", help="a contact sheet of the frames that a network would see")
    look.add_argument("folder", type=Path)
    look.add_argument("--video", action="append", default=[], help="key or file name; default: evenly spaced videos")
    look.add_argument("--videos", type=int, default=8, help="how many without --video")
    look.add_argument("--num-segments", type=int, default=8, help="K")
    look.add_argument("--out", type=Path, help="default: <folder>/contact-sheet.png")
    look.set_defaults(run=_inspect)

    count = commands.add_parser("stats", help="videos, frames, classes, subsets, sizes")
    count.add_argument("folder", type=Path)
    count.add_argument("--json", action="store_true")
    count.set_defaults(run=_stats)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m shards`: our own errors become one line and exit code 2 (the user's to mend) or 1."""
    arguments = parser("python -m shards").parse_args(argv)
    try:
        arguments.run(arguments)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}", file=sys.stderr)
        return 1
    except Exception as error:
        if not type(error).__module__.startswith("shards."):
            raise  # a bug
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _fetch(arguments: argparse.Namespace) -> None:
    from shards.fetch import SOURCES, fetch
    from shards.unpack import FetchError

    if arguments.dataset not in SOURCES:
        raise FetchError(f"unknown dataset {arguments.dataset!r} (one of: {', '.join(SOURCES)})")
    source = SOURCES[arguments.dataset]
    print(f"{source.name}: {source.homepage}\nterms: {source.terms}", flush=True)
    out = arguments.out or Path("data") / arguments.dataset
    with bytes_progress() as report:
        dataset = fetch(
            arguments.dataset,
            out,
            have=arguments.have,
            mirrors=arguments.mirror,
            keep_archives=not arguments.delete_archives,
            progress=report,
        )
    print(f"{out}: {len(dataset.videos)} videos in {len(dataset.class_names)} classes, all that the lists name")
    print(f"next: pasnet shards build --data {out} --out shards/{arguments.dataset}")


def _build(arguments: argparse.Namespace) -> None:
    if arguments.data and not (arguments.videos or arguments.splits or arguments.dataset):
        name, videos, splits = find_dataset(arguments.data)
    elif arguments.videos and arguments.dataset and not arguments.data:
        name, videos, splits = arguments.dataset, arguments.videos, arguments.splits
    else:
        raise DatasetError("give --data FOLDER, or --dataset NAME --videos FOLDER [--splits FOLDER]")
    try:
        settings = DecodeSettings(
            decoder=arguments.decoder,
            frames_per_video=arguments.frames_per_video,
            quality=arguments.quality,
            timeout=arguments.timeout,
            max_mib=arguments.max_mib,
        )
    except ValueError as error:
        raise DatasetError(str(error)) from None
    dataset = scan(name, videos, splits)
    with _video_progress(len(dataset.videos)) as report:
        manifest = build(
            dataset,
            arguments.out,
            settings,
            workers=arguments.workers,
            num_shards=arguments.num_shards,
            shard_mib=arguments.shard_mib,
            max_failed=arguments.max_failed,
            retry_failed=arguments.retry_failed,
            on_video=report,
        )
    packed = f"{manifest['videos']} videos, {manifest['frames']} frames in {len(manifest['shards'])} shards"
    print(f"{arguments.out}: {packed}")
    if manifest["failed"]:
        print(f"{manifest['failed']} could not be decoded: {arguments.out / 'failures.parquet'} says why")
    if manifest["decoded_with_errors"]:
        print(f"{manifest['decoded_with_errors']} were decoded with complaints (decode_errors in index.parquet)")
    if dataset.ignored:
        print(f"{len(dataset.ignored)} entries are no videos in a class folder, such as {dataset.ignored[0]}")
    if not dataset.splits:
        print("no split lists: the videos are in no subset (--splits FOLDER names lists of your own)")
    if dataset.missing:
        print(f"{len(dataset.missing)} listed videos are not on disk, such as {dataset.missing[0]}")


def _verify(arguments: argparse.Namespace) -> None:
    from shards.verify import verify

    _need_workers(arguments)
    _need_folder(arguments.folder)
    with _shard_progress(arguments.folder, "verify") as report:
        problems = verify(arguments.folder, decode=arguments.decode, workers=arguments.workers, on_shard=report)
    for problem in problems:
        print(problem)
    if problems:
        raise BuildError(f"{len(problems)} problems; run `pasnet shards repair {arguments.folder}`")
    shards = open_shards(arguments.folder)
    print(f"{arguments.folder}: sound: {len(shards)} videos, {int(shards.num_frames.sum())} frames, {shards.digest}")


def _repair(arguments: argparse.Namespace) -> None:
    from shards.verify import repair

    _need_workers(arguments)
    _need_folder(arguments.folder)
    with _shard_progress(arguments.folder, "verify") as report:
        problems, rebuilt = repair(
            arguments.folder,
            videos=arguments.videos,
            splits=arguments.splits,
            workers=arguments.workers,
            on_shard=report,
        )
    for problem in problems:
        print(f"was wrong: {problem}")
    print(f"{arguments.folder}: sound; rebuilt: {', '.join(rebuilt) or 'no shard'}")


def _inspect(arguments: argparse.Namespace) -> None:
    from shards.look import choose_rows, contact_sheet

    if arguments.num_segments < 1 or arguments.videos < 1:
        raise ShardError("--num-segments and --videos must be at least 1")
    shards = open_shards(arguments.folder)
    rows = choose_rows(shards, arguments.video, arguments.videos)
    out = arguments.out or arguments.folder / "contact-sheet.png"
    contact_sheet(shards, rows, arguments.num_segments, out)
    for row in rows:
        print(f"{shards.keys[row]}: label {shards.labels[row]}, {shards.num_frames[row]} frames")
    print(out)


def _stats(arguments: argparse.Namespace) -> None:
    from shards.look import stats

    numbers = stats(arguments.folder)
    if arguments.json:
        print(json.dumps(numbers, indent=1))
        return
    for name, value in numbers.items():
        print(f"{name.replace('_', ' '):30} {_in_words(value)}")
    for k, count in numbers["videos_with_fewer_frames_than"].items():
        share = count / numbers["videos"]
        if share > 0.01:
            print(f"note: {share:.1%} of the videos have fewer than {k} frames: clips of K = {k} repeat some of them")
            break


def _in_words(value: Any) -> str:
    """{"min": 1, "max": 2} -> "min 1, max 2"."""
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{key} ({_in_words(of)})" if isinstance(of, dict) else f"{key} {of}" for key, of in value.items())


def _need_workers(arguments: argparse.Namespace) -> None:
    if arguments.workers < 1:
        raise ShardError(f"workers must be at least 1, got {arguments.workers}")


def _need_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ShardError(f"{folder}: no such folder")


@contextmanager
def _video_progress(total: int) -> Iterator[Any]:
    """A bar with videos/s, MB/s and the time left; a line every half minute where there is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    began = time.monotonic()
    done, new, frames, size, said, lock = 0, 0, 0, 0, began, threading.Lock()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rates]}"), TimeRemainingColumn())
    with Bar(*columns, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("videos", total=total, rates="")

        def report(progress: Progress) -> None:
            nonlocal done, new, frames, size, said
            with lock:  # called from every worker's thread
                done, new = done + 1, new + (not progress.known)  # what was there before took no time
                frames, size = frames + progress.frames, size + progress.bytes
            now = time.monotonic()
            spent = max(now - began, 1e-6)
            rates = f"{new / spent:.1f} videos/s, {frames / spent:.0f} frames/s, {size / spent / 1e6:.1f} MB/s"
            bar.update(task, advance=1, rates=rates)
            if not sys.stderr.isatty() and now - said > 30:
                said = now
                left = f"{(total - done) * spent / new / 60:.0f} min left" if new else "time left not known yet"
                print(f"{done}/{total} videos, {rates}, {left}", file=sys.stderr, flush=True)

        yield report


@contextmanager
def _shard_progress(folder: Path, title: str) -> Iterator[Any]:
    from rich.progress import Progress as Bar

    total = sum(path.stat().st_size for path in folder.glob("shard-*.tar"))
    with Bar(disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(title, total=total)
        yield lambda name, size: bar.advance(task, size)


@contextmanager
def bytes_progress() -> Iterator[Any]:
    """A bar for each download or archive; a line every half minute where there is no terminal."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    said = time.monotonic()
    with Bar(*columns, TimeRemainingColumn(), disable=not sys.stderr.isatty()) as bar:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int | None) -> None:
            nonlocal said
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)
            if not sys.stderr.isatty() and time.monotonic() - said > 30:
                said = time.monotonic()
                of = f" of {total / 1e6:.0f}" if total else ""
                print(f"{what}: {done / 1e6:.0f}{of} MB", file=sys.stderr, flush=True)

        yield report
