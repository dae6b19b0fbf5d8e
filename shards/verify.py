"""Is a shard folder what its index says? `verify` rereads every byte and names what is wrong; `repair` rebuilds it."""

from __future__ import annotations

import hashlib
import itertools
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import simplejpeg

from shards.datasets import scan
from shards.decode import DecodeSettings
from shards.format import FORMAT_VERSION
from shards.pack import (
    BuildError,
    OnVideo,
    ShardPlan,
    build_shard,
    content_digest,
    finish,
    finished_part,
    locked,
    plan,
    subset_counts,
)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is wrong. `shard` is "" for a fault of the folder's own files, `key` "" for one of a whole shard."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.shard, self.key, self.reason) if part)


def verify(
    folder: Path, *, decode: bool = False, workers: int = 2, on_shard: Callable[[str, int], None] | None = None
) -> list[Problem]:
    """Every problem of a shard folder, an empty list for a sound one.

    Rereads all tars: size and sha256 of each, every record's JSON and JPEGs against the index (place, length, sha256,
    frame count, frame size), the index against the manifest (counts, digest), and looks for what belongs to neither.
    `decode` also decodes every frame, which finds nothing unless the encoder was at fault. `on_shard` gets the name and
    bytes of each shard that has been read.
    """
    folder = Path(folder)
    manifest, problems = _read_manifest(folder)
    rows = _read_index(folder, problems)
    if not (folder / "failures.parquet").is_file():
        problems.append(Problem(shard="", key="", reason="failures.parquet is missing"))
    if manifest is None or rows is None:
        return problems
    if len(rows) != manifest["videos"] or sum(row["num_frames"] for row in rows) != manifest["frames"]:
        problems.append(Problem(shard="", key="", reason="index.parquet and manifest.json count differently"))
    elif content_digest(rows) != manifest["digest"] or subset_counts(rows) != manifest["subsets"]:
        problems.append(Problem(shard="", key="", reason="index.parquet is not the one that manifest.json describes"))
    listed = {shard["shard"]: shard for shard in manifest["shards"]}
    by_shard: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in listed}
    for row in rows:
        if row["shard"] not in listed:
            problems.append(Problem(shard=row["shard"], key=row["key"], reason="the manifest lists no such shard"))
        else:
            by_shard[row["shard"]][row["key"]] = row
    for path in sorted([*folder.glob("shard-*.tar"), *folder.glob("shard-*.tmp")]):
        if path.name not in listed:
            problems.append(Problem(shard=path.name, key="", reason="no part of this folder's manifest"))
    frame = (manifest["decode"]["height"], manifest["decode"]["width"])

    def check(name: str) -> list[Problem]:
        found = list(_check_shard(folder / name, listed[name], by_shard[name], frame, decode))
        if on_shard:
            on_shard(name, listed[name]["bytes"])
        return found

    with ThreadPoolExecutor(workers) as pool:
        for found in pool.map(check, sorted(listed)):
            problems += found
    return problems


def _read_manifest(folder: Path) -> tuple[dict[str, Any] | None, list[Problem]]:
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text("utf-8"))
        wanted = {"format", "videos", "frames", "digest", "subsets", "shards", "decode"}
        if not wanted <= manifest.keys():
            raise ValueError(f"no {', '.join(sorted(wanted - manifest.keys()))} in it")
        if manifest["format"] > FORMAT_VERSION:
            raise ValueError(f"format {manifest['format']}, this version knows up to {FORMAT_VERSION}")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return None, [Problem(shard="", key="", reason=f"manifest.json cannot be read ({error})")]
    return manifest, []


def _read_index(folder: Path, problems: list[Problem]) -> list[dict[str, Any]] | None:
    try:
        rows: list[dict[str, Any]] = pq.read_table(folder / "index.parquet").to_pylist()
        for row in rows:
            row["key"], row["shard"], row["offset"], row["length"], row["num_frames"], row["frame_offsets"]
    except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are OSError and ValueError
        problems.append(Problem(shard="", key="", reason=f"index.parquet cannot be read ({error})"))
        return None
    return rows


def _check_shard(
    path: Path, listed: dict[str, Any], rows: dict[str, dict[str, Any]], frame: tuple[int, int], decode: bool
) -> Iterator[Problem]:
    def problem(reason: str, key: str = "") -> Problem:
        return Problem(shard=path.name, key=key, reason=reason)

    if not path.is_file():
        yield problem("the file is missing")
        return
    size = path.stat().st_size
    if size != listed["bytes"]:
        yield problem(f"has {size} bytes, the manifest says {listed['bytes']}")
    named, metas, seen = False, {}, set()
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, kind = member.name.rpartition(".")
                file = tar.extractfile(member)
                content = file.read() if file else b""
                if kind == "json":
                    metas[key] = json.loads(content)
                    continue
                reason = "" if kind == "mjpeg" else f"member {member.name} is no part of the format"
                if not reason and key in seen:
                    reason = "is there twice"
                seen.add(key)
                if not reason:
                    reason = _check_record(metas.get(key), rows.get(key), member, content, frame, decode)
                if reason:
                    named = True
                    yield problem(reason, key)
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        named = True
        yield problem(f"the tar cannot be read to its end ({error})")
    for key in sorted(rows.keys() - seen):
        named = True
        yield problem("the index lists it, the tar does not hold it", key)
    if not named:
        with open(path, "rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != listed["sha256"]:
                yield problem("its sha256 is not the manifest's (the damage is in headers or padding)")


def _check_record(
    meta: dict[str, Any] | None,
    row: dict[str, Any] | None,
    member: tarfile.TarInfo,
    content: bytes,
    frame: tuple[int, int],
    decode: bool,
) -> str:
    """What is wrong with a video's two members, "" if nothing."""
    if row is None:
        return "the tar holds it, the index does not list it"
    if meta is None:
        return "its .json member is missing"
    for name, value in meta.items():
        if name in row and row[name] != value:
            return f"{name} is {value!r} in the tar, {row[name]!r} in the index"
    if (member.offset_data, member.size) != (row["offset"], row["length"]):
        return f"lies at {member.offset_data} (+{member.size}), the index says {row['offset']} (+{row['length']})"
    if hashlib.sha256(content).hexdigest() != row["sha256"]:
        return "its frames are damaged (sha256 differs)"
    offsets = row["frame_offsets"]
    sizes = [end - start for start, end in itertools.pairwise(offsets)]
    if len(sizes) != row["num_frames"] or sizes != meta.get("frame_sizes") or offsets[-1] != len(content):
        return "its frame offsets do not fit its frames"
    for number, (start, end) in enumerate(itertools.pairwise(offsets)):
        jpeg = content[start:end]
        try:
            if not jpeg.endswith(b"\xff\xd9") or simplejpeg.decode_jpeg_header(jpeg)[:2] != frame:
                return f"frame {number} is no whole JPEG of {frame[0]}x{frame[1]}"
            if decode:
                simplejpeg.decode_jpeg(jpeg)
        except ValueError as error:
            return f"frame {number} cannot be decoded ({error})"
    return ""


def repair(
    folder: Path,
    *,
    videos: Path | None = None,
    splits: Path | None = None,
    workers: int = 2,
    on_video: OnVideo | None = None,
    on_shard: Callable[[str, int], None] | None = None,
) -> tuple[list[Problem], list[str]]:
    """Rebuilds the shards that `verify` names, and index and manifest; (problems found, shards rebuilt).

    The videos are looked for where the build found them, unless `videos` (and `splits`) say where they are now. Raises
    BuildError when the folder has no notes of its build, when the videos or the decoder are not those of the build (the
    sound shards would no longer fit), and when something is still wrong afterwards.
    """
    folder = Path(folder)
    notes_path = folder / "parts" / "build.json"
    try:
        notes = json.loads(notes_path.read_text("utf-8"))
        settings = DecodeSettings(**notes["settings"])
        videos = Path(videos or notes["videos"])
        splits = splits or (Path(notes["splits"]) if notes["splits"] else None)
        dataset_name, num_shards, max_failed = notes["dataset"], notes["num_shards"], notes["max_failed"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BuildError(f"{notes_path}: cannot be read ({error}); run `pasnet shards build` instead") from error
    with locked(folder):
        first = problems = verify(folder, workers=workers, on_shard=on_shard)
        rebuilt: set[str] = set()
        for _ in range(2):  # once more where there was no manifest at first, and so nothing to hold the tars against
            if not problems:
                break
            dataset = scan(dataset_name, videos, splits)
            plans = plan(dataset, settings, num_shards=num_shards)
            bad = {problem.shard for problem in problems} - {""}
            _refuse_strangers(folder, plans, bad)
            for name in bad:
                (folder / name).unlink(missing_ok=True)
                (folder / "parts" / f"{name}.json").unlink(missing_ok=True)
            todo = [shard for shard in plans if finished_part(shard, folder) is None]
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(lambda shard: build_shard(shard, folder, settings, on_video), todo))
            rebuilt |= {shard.name for shard in todo}
            finish(dataset, plans, folder, settings, max_failed=max_failed)
            problems = verify(folder, workers=workers)
        if problems:
            raise BuildError(f"{folder}: {len(problems)} problems are left after the repair, such as {problems[0]}")
    return first, sorted(rebuilt)


def _refuse_strangers(folder: Path, plans: Sequence[ShardPlan], bad: set[str]) -> None:
    """Else sound shards of another plan would be rebuilt without a word, and the folder would become another one."""
    strangers = [
        shard.name
        for shard in plans
        if shard.name not in bad and (folder / shard.name).is_file() and finished_part(shard, folder) is None
    ]
    if len(strangers) > len(plans) // 2:  # a lost part file or two are another matter
        raise BuildError(
            f"{folder}: {len(strangers)} sound shards, such as {strangers[0]}, were made from other videos or by "
            f"another decoder than is here now; install that one (manifest.json names it), give the videos with "
            f"--videos, or build everything anew with `pasnet shards build`"
        )
