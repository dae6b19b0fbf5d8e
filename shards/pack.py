"""Videos -> WebDataset tars with a Parquet index, one shard at a time (format: shards/README.md).

`plan` assigns videos to shards, `build_shard` writes one shard, `finish` closes the folder with index, failures and
manifest; pool.py does all three with several workers. A shard's bytes depend on its videos, the settings and the
decoder's version alone, not on the number of workers or on which finished first. A finished shard is found again by its
digest and skipped.
"""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import filelock
import pyarrow as pa
import pyarrow.parquet as pq

from shards.datasets import Dataset, DatasetError, Video
from shards.decode import DecodeError, DecodeSettings, decode_videos, decoder_version, encoder_version
from shards.format import FAILURES_SCHEMA, FORMAT_VERSION, INDEX_SCHEMA

LIMITS = ("timeout", "max_mib", "max_pixels")  # of DecodeSettings: they decide no bytes of a video that passes


class BuildError(Exception):
    """The shards cannot be finished; the message says what is missing or how many videos failed."""


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """What goes into one tar. `digest` names the wanted content: same digest, nothing to do."""

    name: str  # shard-00003.tar
    videos: tuple[Video, ...]
    digest: str
    limits: tuple[float, ...]  # with others, videos that were set aside are tried again


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One video is done: what a progress bar counts. A video that failed has no frames and no bytes."""

    video: Video
    frames: int
    bytes: int
    known: bool = False  # it lies in a shard that was there already


OnVideo = Callable[[Progress], None]


def estimate_bytes(dataset: Dataset, settings: DecodeSettings, *, samples: int = 8) -> int:
    """About how large the shards will be: some evenly spaced videos are decoded, the others scaled by file size.

    The same for the same videos, settings and ffmpeg, so that a plan made from it is too. Always with the default
    decoder, which a video cannot take the caller with; the other's JPEGs are as large.
    """
    settings = replace(settings, decoder="ffmpeg")
    chosen = dataset.videos[:: max(1, len(dataset.videos) // samples)][:samples]
    source = made = decoded = 0
    for video, found in zip(chosen, decode_videos([video.path for video in chosen], settings), strict=True):
        if isinstance(found, DecodeError):
            continue  # it will be counted when its shard is built
        made += sum(map(len, found.jpegs))
        source += _size(video.path)
        decoded += 1
    if not decoded:
        return 0
    if settings.frames_per_video:  # as many frames from a long video as from a short one
        return made * len(dataset.videos) // decoded
    return made * sum(_size(video.path) for video in dataset.videos) // source


def plan(
    dataset: Dataset,
    settings: DecodeSettings,
    *,
    num_shards: int | None = None,
    shard_mib: int = 256,
    min_shards: int = 16,
) -> tuple[ShardPlan, ...]:
    """Deals the videos, in class order, over the shards like cards, so that every shard holds every class that
    has as many videos.

    Without `num_shards`, shards of about `shard_mib` MiB (estimated), and at least `min_shards` of them, since a
    streaming reader wants several per worker; never more shards than videos. Raises DatasetError for numbers below 1.
    """
    for name, value in (("num_shards", num_shards), ("shard_mib", shard_mib), ("min_shards", min_shards)):
        if value is not None and value < 1:
            raise DatasetError(f"{name} must be at least 1, got {value}")
    total = len(dataset.videos)
    if num_shards is None:
        enough = total <= min_shards  # then the estimate would change nothing
        num_shards = min_shards if enough else math.ceil(estimate_bytes(dataset, settings) / (shard_mib << 20))
        num_shards = max(num_shards, min_shards)
    count = min(num_shards, total)
    in_class_order = sorted(dataset.videos, key=lambda video: (video.label, video.key))
    plans = []
    for index in range(count):
        # within a shard by hash of the key: classes mixed, and the same order on every machine
        videos = sorted(in_class_order[index::count], key=lambda video: hashlib.sha256(video.key.encode()).digest())
        wanted = {
            "format": FORMAT_VERSION,
            "settings": identity(settings),
            "decoder": decoder_version(settings.decoder),
            "encoder": encoder_version(),
            "videos": [[v.key, _size(v.path), v.label, sorted(v.splits.items())] for v in videos],
        }
        digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
        limits = tuple(float(getattr(settings, name)) for name in LIMITS)
        plans.append(ShardPlan(name=f"shard-{index:05d}.tar", videos=tuple(videos), digest=digest, limits=limits))
    return tuple(plans)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds the folder's lock, which the kernel drops when the process dies, however it dies.

    Raises BuildError at once when another process (or thread) is building into or repairing `out`.
    """
    out = Path(out)
    (out / "parts").mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out / "parts" / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise BuildError(
            f"{out}: another build or repair is writing there; wait for it, or choose another --out"
        ) from None
    try:
        for path in out.glob("shard-*.tar.tmp"):  # of builds that were killed: nobody else can be writing them now
            if is_shard(path.name.removesuffix(".tmp")):
                path.unlink()
        yield
    finally:
        lock.release()


def is_shard(name: str) -> bool:
    """Whether a file could be a shard of ours by its name; nothing else in the folder is ever touched."""
    return re.fullmatch(r"shard-\d{5}\.tar", name) is not None


def check_owner(dataset: Dataset, out: Path) -> None:
    """Raises BuildError where a build would write over tars that are not ours, or over another dataset's shards."""
    out, notes = Path(out), read_notes(out)
    ours = notes.get("plans", {})  # a build that was killed may have left a tar without its part
    for path in sorted(out.glob("shard-*.tar")):
        if is_shard(path.name) and path.name not in ours and not (out / "parts" / f"{path.name}.json").is_file():
            raise BuildError(
                f"{path}: was made by no build that {out / 'parts'} knows of; move it, or choose another --out"
            )
    made_from = f", from {notes['videos']}" if notes else ""
    for known in (notes, _manifest_of(out)):  # either may be damaged, or not be there yet
        if known and (known["dataset"], known["class_names"]) != (dataset.name, list(dataset.class_names)):
            raise BuildError(
                f"{out}: holds the shards of {known['dataset']} with {len(known['class_names'])} classes{made_from}; "
                "choose another --out, or delete that folder first"
            )


def _manifest_of(out: Path) -> dict[str, Any]:
    """A finished folder's manifest, {} where there is none or it is damaged."""
    try:
        manifest = json.loads((out / "manifest.json").read_text("utf-8"))
        return manifest if {"dataset", "class_names"} <= manifest.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def write_notes(
    dataset: Dataset, plans: Sequence[ShardPlan], out: Path, settings: DecodeSettings, max_failed: float
) -> None:
    """parts/build.json: whose shards these are, and what `repair` needs. Apart from the manifest, which says nothing of
    this machine."""
    notes = {
        "dataset": dataset.name,
        "class_names": dataset.class_names,
        "videos": str(dataset.folder.absolute()),
        "splits": str(dataset.lists.absolute()) if dataset.lists else None,
        "settings": asdict(settings),
        "versions": [decoder_version(settings.decoder), encoder_version()],
        "max_failed": max_failed,
        "plans": {shard.name: shard.digest for shard in plans},
    }
    (Path(out) / "parts").mkdir(parents=True, exist_ok=True)
    _write_json(Path(out) / "parts" / "build.json", notes)


def read_notes(out: Path) -> dict[str, Any]:
    """What `write_notes` wrote, {} where there is none or it is damaged."""
    try:
        notes = json.loads((Path(out) / "parts" / "build.json").read_text("utf-8"))
        wanted = {"dataset", "class_names", "videos", "splits", "settings", "versions", "max_failed", "plans"}
        return notes if wanted <= notes.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def build_shard(
    shard: ShardPlan,
    out: Path,
    settings: DecodeSettings,
    on_video: OnVideo | None = None,
    *,
    expected: str | None = None,
    ruinous: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Writes out/<name> and out/parts/<name>.json unless they are there already; returns what the part file says.

    A video that cannot be decoded goes into the part's `failures` with its reason, and the shard goes on without it; so
    does one of `ruinous` ({path: reason}), which is not tried.
    Both files are written under another name and renamed when complete, so that a killed build leaves no half shard.
    The caller holds `locked(out)`. Raises BuildError when the disk is full, and when `expected` is given and is not the
    sha256 of what came out: then the old shard stays.
    """
    out = Path(out)
    part_path = out / "parts" / f"{shard.name}.json"
    done = finished_part(shard, out)
    if done is not None:
        return done
    part_path.parent.mkdir(parents=True, exist_ok=True)
    tar_path, scratch = out / shard.name, out / f"{shard.name}.tmp"
    try:
        records, failed = _write_tar(scratch, shard, settings, on_video, ruinous or {})
        _add_offsets(scratch, records)
        with open(scratch, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())  # before the part file says that the tar is complete
    except BaseException as error:
        scratch.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BuildError(
                f"{scratch}: the disk is full; make room and start again (finished shards are kept), or build smaller: "
                f"--frames-per-video, --quality"
            ) from error
        raise
    if expected not in (None, digest):
        scratch.unlink()
        raise BuildError(
            f"{tar_path}: would become another shard than it was: its videos, or a library, have changed since; run "
            f"`pasnet shards build` if that is meant"
        )
    part: dict[str, Any] = {
        "plan": shard.digest,
        "limits": shard.limits,
        "shard": shard.name,
        "bytes": scratch.stat().st_size,
        "sha256": digest,
        "records": records,
        "failures": failed,
        "sources": {video.key: [_time_of(video.path), _sha256(video.path)] for video in shard.videos},
    }
    part["check"] = _check_sum(part)
    # they describe the old shard; `finish` writes them anew. The part first: with it gone the tar is unfinished
    for path in (part_path, out / "manifest.json", out / "index.parquet"):
        path.unlink(missing_ok=True)
    os.replace(scratch, tar_path)
    _write_json(part_path, part)
    return part


def finished_part(shard: ShardPlan, out: Path) -> dict[str, Any] | None:
    """The part file of a shard that is complete for this very plan, else None.

    Compares the plan's digest, the tar's size and the videos (their names; those whose time stamp is another are
    hashed, and one that cannot be read is one that could not be read before); rehashing
    tens of gigabytes of tars at every start would cost minutes, and is what `verify` is for.
    """
    part = read_part(shard.name, out)
    if part is None or part["plan"] != shard.digest or (part["failures"] and tuple(part["limits"]) != shard.limits):
        return None
    tar = Path(out) / shard.name
    if not tar.is_file() or tar.stat().st_size != part["bytes"]:
        return None
    names = {record["key"]: record["video"] for record in part["records"]}
    for video in shard.videos:
        changed, sha256 = part["sources"][video.key]
        if _time_of(video.path) != changed and _sha256(video.path) != sha256:
            return None
        if names.get(video.key, _name_of(video)) != _name_of(video):  # the same content under another suffix
            return None
    return part


def read_part(name: str, out: Path) -> dict[str, Any] | None:
    """The part file of the shard `name`; None where there is none, or it is not as it was written."""
    try:
        part: dict[str, Any] = json.loads((Path(out) / "parts" / f"{name}.json").read_text("utf-8"))
        return part if part.get("check") == _check_sum(part) else None
    except (OSError, ValueError, AttributeError):
        return None


def _check_sum(part: dict[str, Any]) -> str:
    content = {name: value for name, value in part.items() if name != "check"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    """Of a video's bytes; "" where it cannot be read: the decoder has said so, of that video alone."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _time_of(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _name_of(video: Video) -> str:
    """As in the index: class folder and file."""
    return f"{video.path.parent.name}/{video.path.name}"


def finish(
    dataset: Dataset,
    plans: Sequence[ShardPlan],
    out: Path,
    settings: DecodeSettings,
    *,
    max_failed: float = 0.01,
    known: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Writes index.parquet, failures.parquet and manifest.json; returns the manifest.

    `known`: what `finished_part` has said of shards, by name, since the folder was locked; those are not read again.

    Shards of an earlier plan are removed, so that a reader of `shard-*.tar` sees each video once. Raises BuildError if
    a planned shard is not there, or if more than `max_failed` of the videos (a share, 0 to 1; above 0, one video
    is always forgiven) could not be decoded: then the data, or the decoder, is not what it should be.
    """
    out = Path(out)
    parts = []
    for shard in plans:
        part = (known or {}).get(shard.name) or finished_part(shard, out)
        if part is None:
            raise BuildError(f"{out / shard.name}: not built, or not from these videos and settings; build it again")
        told = [row["key"] for row in part["records"]] + [row["video"] for row in part["failures"]]
        if len(told) != len(shard.videos):
            raise BuildError(f"{out / shard.name}: {len(told)} of its {len(shard.videos)} videos are accounted for")
        parts.append(part)
    records = sorted((record for part in parts for record in part["records"]), key=lambda record: record["key"])
    failed = sorted((failure for part in parts for failure in part["failures"]), key=lambda row: row["video"])
    write_parquet(out / "failures.parquet", failed, FAILURES_SCHEMA)
    total = len(dataset.videos)
    if not records or len(failed) > forgiven(max_failed, total):
        first = failed[0]
        raise BuildError(
            f"{len(failed)} of {total} videos could not be decoded (limit {max_failed:.1%}), such as "
            f"{first['video']}: {first['reason']}; all of them are in {out / 'failures.parquet'}"
        )
    planned = {shard.name for shard in plans}
    for path in (out / "parts").glob("shard-*.tar.json"):  # of an earlier build with other settings
        name = path.name.removesuffix(".json")
        if is_shard(name) and name not in planned:
            (out / name).unlink(missing_ok=True)
            path.unlink()
    decode = {
        **identity(settings),
        "version": decoder_version(settings.decoder),
        "encoder": encoder_version(),
        "subsampling": "4:2:0",
    }
    write_parquet(out / "index.parquet", records, INDEX_SCHEMA, {"decode": json.dumps(decode)})
    manifest = {
        "format": FORMAT_VERSION,
        "dataset": dataset.name,
        "class_names": dataset.class_names,
        "videos": len(records),
        "frames": sum(record["num_frames"] for record in records),
        "failed": len(failed),
        "decoded_with_errors": sum(bool(record["decode_errors"]) for record in records),
        "listed_but_missing": len(dataset.missing),
        "subsets": subset_counts(records),
        "decode": decode,
        "shards": [
            {**{key: part[key] for key in ("shard", "bytes", "sha256")}, "videos": len(part["records"])}
            for part in parts
        ],
        "digest": content_digest(records),
    }
    _write_json(out / "manifest.json", manifest)
    return manifest


def forgiven(max_failed: float, total: int) -> float:
    """How many of `total` videos may be set aside at that share: above 0, one always."""
    return max(1, max_failed * total) if max_failed else 0


def content_digest(records: Sequence[dict[str, Any]]) -> str:
    """sha256 over what a model can see, frames, labels and splits; not over how they are packed."""
    content = [[record["key"], record["label"], record["sha256"], *_splits_of(record)] for record in records]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def subset_counts(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """{"split1": {"train": 9537, "test": 3783}, ...} for the splits that have a video."""
    counts = {
        f"split{split}": {
            subset: sum(record[f"split{split}"] == subset for record in records) for subset in ("train", "test")
        }
        for split in (1, 2, 3)
    }
    return {split: of for split, of in counts.items() if any(of.values())}


def check_space(dataset: Dataset, settings: DecodeSettings, out: Path, share: float) -> None:
    """Raises BuildError before hours of work for which the disk has no room; `share` is what is still to be built."""
    free, source = shutil.disk_usage(out).free, sum(_size(video.path) for video in dataset.videos)
    if share == 0 or free > 20 * source:  # JPEGs take 6 to 8 times the room of UCF-101's and HMDB-51's videos
        return
    needed = int(estimate_bytes(dataset, settings) * share)
    if needed > free:
        raise BuildError(
            f"{out}: needs about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; choose another --out, or "
            f"build smaller: --frames-per-video, --quality"
        )


def _write_tar(
    path: Path, shard: ShardPlan, settings: DecodeSettings, on_video: OnVideo | None, ruinous: Mapping[str, str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    records: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    # PAX rather than USTAR: a long name gets a header of its own instead of an error. Not webdataset's TarWriter, which
    # would import torch (a second, 200 MB a process) for what are two members.
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        found = decode_videos([video.path for video in shard.videos if str(video.path) not in ruinous], settings)
        for video in shard.videos:
            name, why = _name_of(video), ruinous.get(str(video.path))
            decoded = next(found) if why is None else DecodeError(video.path, why)
            if isinstance(decoded, DecodeError):
                # where the videos lie is no part of the reason: the same failure gives the same bytes elsewhere
                reason, detail = (
                    words.replace(str(video.path.absolute()), name) for words in (decoded.reason, decoded.detail)
                )
                failed.append({"video": name, "reason": reason, "detail": detail})
                if on_video:
                    on_video(Progress(video=video, frames=0, bytes=0))
                continue
            frames, sizes = b"".join(decoded.jpegs), [len(jpeg) for jpeg in decoded.jpegs]
            record = {
                "key": video.key,
                "video": name,
                "class_name": video.class_name,
                "label": video.label,
                "group": video.group,
                **{f"split{split}": video.splits.get(split) for split in (1, 2, 3)},
                "num_frames": len(sizes),
                "fps": decoded.source.fps,
                "source_codec": decoded.source.codec,
                "source_width": decoded.source.width,
                "source_height": decoded.source.height,
                "source_frames": decoded.source_frames,
                "source_bytes": _size(video.path),
                "decode_errors": decoded.source.errors,
                "sha256": hashlib.sha256(frames).hexdigest(),
                "frame_crc32": [zlib.crc32(jpeg) for jpeg in decoded.jpegs],
            }
            # no null: Hugging Face datasets takes a column's type from the first records
            meta = {name: "" if value is None else value for name, value in record.items()}
            meta |= {"height": settings.height, "width": settings.width, "frame_sizes": sizes}
            for kind, content in (("json", json.dumps(meta).encode()), ("mjpeg", frames)):
                member = tarfile.TarInfo(f"{video.key}.{kind}")  # owner root, time 0: fixed bytes
                member.size, member.mode = len(content), 0o444
                tar.addfile(member, io.BytesIO(content))
            records.append({**record, "shard": shard.name, "frame_offsets": [0, *itertools.accumulate(sizes)]})
            if on_video:
                on_video(Progress(video=video, frames=len(sizes), bytes=len(frames)))
    return records, failed


def _add_offsets(path: Path, records: list[dict[str, Any]]) -> None:
    """Takes each member's place from the finished tar itself, so that the index cannot disagree with it."""
    with tarfile.open(path) as tar:
        members = {member.name: member for member in tar}
    for record in records:
        member = members[f"{record['key']}.mjpeg"]
        record["offset"], record["length"] = member.offset_data, member.size


def identity(settings: DecodeSettings) -> dict[str, Any]:
    """The settings that decide bytes: not the limits."""
    return {key: value for key, value in asdict(settings).items() if key not in LIMITS}


def _splits_of(record: dict[str, Any]) -> list[str | None]:
    return [record[f"split{split}"] for split in (1, 2, 3)]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}; the videos changed while they were being read") from error


def write_parquet(
    path: Path, rows: list[dict[str, Any]], schema: pa.Schema, metadata: dict[str, str] | None = None
) -> None:
    """Writes under another name and renames. `metadata` goes into the file's key-value metadata."""
    scratch = path.with_suffix(".tmp")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema.with_metadata(metadata)), scratch, compression="zstd")
    os.replace(scratch, path)


def _write_json(path: Path, content: Any) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(content, indent=1), "utf-8")
    os.replace(scratch, path)


def failures(folder: Path) -> list[dict[str, str]]:
    """The rows of failures.parquet (video, reason, detail), none where there is no such file."""
    path = Path(folder) / "failures.parquet"
    return pq.read_table(path).to_pylist() if path.is_file() else []
