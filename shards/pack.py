"""Videos -> WebDataset tars with a Parquet index, one shard at a time (format: shards/README.md).

`plan` assigns videos to shards, `build_shard` writes one shard, `finish` closes the folder with index, failures and
manifest; `build` does all three. A shard's bytes depend on its videos, the settings and the ffmpeg build alone, not
on the number of workers or on which finished first. A finished shard is found again by its digest and skipped.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.datasets import Dataset, DatasetError, Video
from shards.decode import DecodeError, DecodeSettings, decode_video, ffmpeg_version

FORMAT_VERSION = 1

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("video", pa.string()),  # <class folder>/<file>, as found on disk
        ("class_name", pa.string()),
        ("label", pa.int32()),
        ("group", pa.string()),
        ("split1", pa.string()),  # train, test, or null where the split does not use the video
        ("split2", pa.string()),
        ("split3", pa.string()),
        ("shard", pa.string()),
        ("offset", pa.int64()),  # of the JPEGs' first byte in the shard file
        ("length", pa.int64()),
        ("num_frames", pa.int32()),
        ("frame_offsets", pa.list_(pa.int64())),  # num_frames + 1 numbers, relative to `offset`
        ("fps", pa.float64()),
        ("source_codec", pa.string()),
        ("source_width", pa.int32()),
        ("source_height", pa.int32()),
        ("decode_errors", pa.string()),  # "" or what ffmpeg complained of while it decoded the video all the same
        ("sha256", pa.string()),  # of the JPEGs end to end
    ]
)
FAILURES_SCHEMA = pa.schema([("video", pa.string()), ("reason", pa.string()), ("detail", pa.string())])


class BuildError(Exception):
    """The shards cannot be finished; the message says what is missing or how many videos failed."""


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """What goes into one tar. `digest` names the wanted content: same digest, nothing to do."""

    name: str  # shard-00003.tar
    videos: tuple[Video, ...]
    digest: str


def plan(
    dataset: Dataset, settings: DecodeSettings, *, videos_per_shard: int = 64, min_shards: int = 8
) -> tuple[ShardPlan, ...]:
    """Deals the videos, in class order, over the shards like cards, so that every shard holds every class.

    64 UCF-101 videos are about 220 MB. At least `min_shards` shards (if there are as many videos), since a streaming
    reader wants several per worker.
    """
    if videos_per_shard < 1:
        raise DatasetError(f"videos_per_shard must be at least 1, got {videos_per_shard}")
    total = len(dataset.videos)
    count = max(math.ceil(total / videos_per_shard), min(min_shards, total))
    in_class_order = sorted(dataset.videos, key=lambda video: (video.label, video.key))
    plans = []
    for index in range(count):
        # within a shard by hash of the key: classes mixed, and the same order on every machine
        videos = sorted(in_class_order[index::count], key=lambda video: hashlib.sha256(video.key.encode()).digest())
        wanted = {
            "format": FORMAT_VERSION,
            "settings": _identity(settings),
            "ffmpeg": ffmpeg_version(),
            "videos": [[v.key, v.path.stat().st_size, v.label, sorted(v.splits.items())] for v in videos],
        }
        digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
        plans.append(ShardPlan(name=f"shard-{index:05d}.tar", videos=tuple(videos), digest=digest))
    return tuple(plans)


def build_shard(
    shard: ShardPlan, out: Path, settings: DecodeSettings, on_video: Callable[[Video], None] | None = None
) -> dict[str, Any]:
    """Writes out/<name> and out/parts/<name>.json unless they are there already; returns what the part file says.

    A video that cannot be decoded goes into the part's `failures` with its reason, and the shard goes on without it.
    Both files are written under another name and renamed when complete, so that a killed build leaves no half shard.
    """
    out = Path(out)
    part_path = out / "parts" / f"{shard.name}.json"
    done = finished_part(shard, out)
    if done is not None:
        return done
    part_path.parent.mkdir(parents=True, exist_ok=True)
    tar_path = out / shard.name
    scratch = out / f"{shard.name}.{os.getpid()}.tmp"  # two builds into one folder do not write into one file
    records, failures = _write_tar(scratch, shard, settings, on_video)
    _add_offsets(scratch, records)
    with open(scratch, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    part = {
        "plan": shard.digest,
        "shard": shard.name,
        "bytes": scratch.stat().st_size,
        "sha256": digest,
        "records": records,
        "failures": failures,
    }
    for name in ("manifest.json", "index.parquet"):  # they describe the old shard; `finish` writes them anew
        (out / name).unlink(missing_ok=True)
    os.replace(scratch, tar_path)
    _write_json(part_path, part)
    return part


def finished_part(shard: ShardPlan, out: Path) -> dict[str, Any] | None:
    """The part file of a shard that is complete for this very plan, else None.

    Compares the plan's digest and the tar's size; rehashing tens of gigabytes at every start would cost minutes.
    """
    part_path = Path(out) / "parts" / f"{shard.name}.json"
    try:
        part = json.loads(part_path.read_text("utf-8"))
        if part["plan"] == shard.digest and (Path(out) / shard.name).stat().st_size == part["bytes"]:
            return part
    except (OSError, ValueError, KeyError):
        pass  # no part, a damaged one, or no tar: build it (again)
    return None


def finish(
    dataset: Dataset, plans: Sequence[ShardPlan], out: Path, settings: DecodeSettings, *, max_failed: float = 0.01
) -> dict[str, Any]:
    """Writes index.parquet, failures.parquet and manifest.json; returns the manifest.

    Shards of an earlier plan are removed, so that a reader of `shard-*.tar` sees each video once. Raises BuildError if
    a planned shard is not there, or if more than `max_failed` of the videos (a share, 0 to 1; one video is always
    forgiven) could not be decoded: then the data, or the ffmpeg, is not what it should be.
    """
    out = Path(out)
    parts = []
    for shard in plans:
        part = finished_part(shard, out)
        if part is None:
            raise BuildError(f"{out / shard.name}: not built, or not from these videos and settings; build it again")
        parts.append(part)
    records = sorted((record for part in parts for record in part["records"]), key=lambda record: record["key"])
    failures = sorted((failure for part in parts for failure in part["failures"]), key=lambda row: row["video"])
    _write_parquet(out / "failures.parquet", failures, FAILURES_SCHEMA)
    total = len(dataset.videos)
    if not records or len(failures) > max(1, max_failed * total):
        first = failures[0]
        raise BuildError(
            f"{len(failures)} of {total} videos could not be decoded (limit {max_failed:.1%}), such as "
            f"{first['video']}: {first['reason']}; all of them are in {out / 'failures.parquet'}"
        )
    planned = {shard.name for shard in plans}
    for path in [*out.glob("shard-*.tar"), *(out / "parts").glob("shard-*.tar.json")]:
        if path.name.removesuffix(".json") not in planned:  # of an earlier build with other settings
            path.unlink()
    for path in out.glob("shard-*.tmp"):  # of builds that were killed
        path.unlink(missing_ok=True)
    _write_parquet(out / "index.parquet", records, INDEX_SCHEMA)
    manifest = {
        "format": FORMAT_VERSION,
        "dataset": dataset.name,
        "class_names": dataset.class_names,
        "videos": len(records),
        "frames": sum(record["num_frames"] for record in records),
        "failed": len(failures),
        "decoded_with_errors": sum(bool(record["decode_errors"]) for record in records),
        "listed_but_missing": len(dataset.missing),
        "subsets": {
            f"split{split}": {
                subset: sum(record[f"split{split}"] == subset for record in records) for subset in ("train", "test")
            }
            for split in dataset.splits
        },
        "decode": {**_identity(settings), "decoder": "ffmpeg", "version": ffmpeg_version(), "subsampling": "4:2:0"},
        "shards": [{key: part[key] for key in ("shard", "bytes", "sha256")} for part in parts],
    }
    # what a model can see: frames and labels; not the counts of what is missing, nor this code's wording
    content = [[record["key"], record["label"], record["sha256"], *_splits_of(record)] for record in records]
    manifest["digest"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    _write_json(out / "manifest.json", manifest)
    return manifest


def build(
    dataset: Dataset,
    out: Path,
    settings: DecodeSettings | None = None,
    *,
    workers: int = 2,
    videos_per_shard: int = 64,
    max_failed: float = 0.01,
    on_video: Callable[[Video], None] | None = None,
) -> dict[str, Any]:
    """plan + build_shard for each + finish. Threads suffice: ffmpeg is a process and the JPEG encoder drops the GIL."""
    if workers < 1:
        raise DatasetError(f"workers must be at least 1, got {workers}")
    settings = settings or DecodeSettings()
    plans = plan(dataset, settings, videos_per_shard=videos_per_shard)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda shard: build_shard(shard, out, settings, on_video), plans))
    return finish(dataset, plans, out, settings, max_failed=max_failed)


def _write_tar(
    path: Path, shard: ShardPlan, settings: DecodeSettings, on_video: Callable[[Video], None] | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    from webdataset import TarWriter  # here, not above: importing it takes a second

    records: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    # PAX rather than USTAR: a long name gets a header of its own instead of an error. Fixed mtime: fixed bytes.
    with open(path, "wb") as file, TarWriter(file, mtime=0, format="PAX_FORMAT") as tar:
        for video in shard.videos:
            name = f"{video.path.parent.name}/{video.path.name}"
            try:
                jpegs, source = decode_video(video.path, settings)
            except DecodeError as error:
                failures.append({"video": name, "reason": error.reason, "detail": error.detail})
                if on_video:
                    on_video(video)
                continue
            frames = b"".join(jpegs)
            record = {
                "key": video.key,
                "video": name,
                "class_name": video.class_name,
                "label": video.label,
                "group": video.group,
                **{f"split{split}": video.splits.get(split) for split in (1, 2, 3)},
                "num_frames": len(jpegs),
                "fps": source.fps,
                "source_codec": source.codec,
                "source_width": source.width,
                "source_height": source.height,
                "decode_errors": source.errors,
                "sha256": hashlib.sha256(frames).hexdigest(),
            }
            sizes = [len(jpeg) for jpeg in jpegs]
            meta = {**record, "height": settings.height, "width": settings.width, "frame_sizes": sizes}
            tar.write({"__key__": video.key, "json": json.dumps(meta).encode(), "mjpeg": frames})
            records.append({**record, "shard": shard.name, "frame_offsets": [0, *itertools.accumulate(sizes)]})
            if on_video:
                on_video(video)
    return records, failures


def _add_offsets(path: Path, records: list[dict[str, Any]]) -> None:
    """Takes each member's place from the finished tar itself, so that the index cannot disagree with it."""
    with tarfile.open(path) as tar:
        members = {member.name: member for member in tar}
    for record in records:
        member = members[f"{record['key']}.mjpeg"]
        record["offset"], record["length"] = member.offset_data, member.size


def _identity(settings: DecodeSettings) -> dict[str, Any]:
    """The settings that decide bytes: not the time limit."""
    return {key: value for key, value in asdict(settings).items() if key != "timeout"}


def _splits_of(record: dict[str, Any]) -> list[str | None]:
    return [record[f"split{split}"] for split in (1, 2, 3)]


def _write_parquet(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    scratch = path.with_suffix(".tmp")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), scratch, compression="zstd")
    os.replace(scratch, path)


def _write_json(path: Path, content: Any) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(content, indent=1), "utf-8")
    os.replace(scratch, path)


def failures(folder: Path) -> list[dict[str, str]]:
    """The rows of failures.parquet (video, reason, detail), none where there is no such file."""
    path = Path(folder) / "failures.parquet"
    return pq.read_table(path).to_pylist() if path.is_file() else []
