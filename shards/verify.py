"""Is a shard folder what its index says? `verify` rereads every byte and names what is wrong; `repair` rebuilds it."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import simplejpeg

from shards.datasets import scan
from shards.decode import DecodeSettings, decoder_version, encoder_version
from shards.format import FAILURES_SCHEMA, FORMAT_VERSION, INDEX_SCHEMA
from shards.pack import (
    BuildError,
    OnVideo,
    content_digest,
    finish,
    finished_part,
    forgiven,
    is_shard,
    locked,
    plan,
    read_notes,
    read_part,
    subset_counts,
)
from shards.pool import build_shards


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
    manifest, rows, problems = _read(folder)
    if manifest is None or rows is None:
        return problems

    def fault(reason: str, key: str = "") -> None:
        problems.append(Problem(shard="", key=key, reason=reason))

    if len(rows) != manifest["videos"] or sum(row["num_frames"] for row in rows) != manifest["frames"]:
        fault("index.parquet and manifest.json count differently")
    elif content_digest(rows) != manifest["digest"] or subset_counts(rows) != manifest["subsets"]:
        fault("index.parquet is not the one that manifest.json describes")
    names = manifest["class_names"]
    for row in rows:
        if not 0 <= row["label"] < len(names) or names[row["label"]] != row["class_name"]:
            fault(f"label {row['label']} is not its class {row['class_name']!r} in manifest.json", row["key"])
    if sum(bool(row["decode_errors"]) for row in rows) != manifest["decoded_with_errors"]:
        fault("index.parquet and manifest.json count the videos with decode errors differently")
    for told in _against_the_notes(folder, manifest):
        fault(told)
    listed = {shard["shard"]: shard for shard in manifest["shards"]}
    by_shard: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in listed}
    for row in rows:
        if row["shard"] not in listed:
            fault(f"index.parquet places it in {row['shard']!r}, which manifest.json does not list", row["key"])
        else:
            by_shard[row["shard"]][row["key"]] = row
    for path in sorted([*folder.glob("shard-*.tar"), *folder.glob("shard-*.tar.tmp")]):
        if path.name not in listed:
            problems.append(
                Problem(shard=path.name, key="", reason="no part of this folder's manifest; move it elsewhere")
            )
    for name, shard in listed.items():
        if shard["videos"] != len(by_shard[name]):
            fault(f"manifest.json says that {name} holds {shard['videos']} videos, index.parquet {len(by_shard[name])}")
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


def _read(folder: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]] | None, list[Problem]]:
    """Manifest, index and what is wrong with them or the failure table; None for one that cannot be used at all."""
    problems: list[Problem] = []
    manifest: dict[str, Any] | None = None
    rows: list[dict[str, Any]] | None = None
    failed: int | None = None
    described: dict[str, Any] = {}

    def fault(name: str, error: object) -> None:
        problems.append(Problem(shard="", key="", reason=f"{name} cannot be read ({error})"))

    # whatever is wrong with these files must end as a line that `repair` can act on
    try:
        rows, described = _read_index(folder / "index.parquet")
    except Exception as error:
        fault("index.parquet", error)
    try:
        table = pq.read_table(folder / "failures.parquet")
        if not set(FAILURES_SCHEMA.names) <= set(table.column_names):
            raise ValueError(f"its columns are {', '.join(table.column_names)}")
        failed = len(table)
    except Exception as error:
        fault("failures.parquet", error)
    try:
        manifest = _read_manifest(folder / "manifest.json")
    except BuildError:
        raise
    except Exception as error:
        fault("manifest.json", error)
    if manifest is not None and failed not in (None, manifest["failed"]):
        problems.append(Problem(shard="", key="", reason="failures.parquet and manifest.json count differently"))
    if manifest is not None and rows is not None and described != manifest["decode"]:
        problems.append(Problem(shard="", key="", reason="index.parquet and manifest.json name other decode settings"))
    return manifest, rows, problems


def _against_the_notes(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """What the manifest and the failure table say otherwise than the builder's notes, as far as those are there."""
    notes = read_notes(folder)
    if notes and [notes["dataset"], notes["class_names"]] != [manifest["dataset"], manifest["class_names"]]:
        yield "manifest.json names another dataset, or other classes, than parts/build.json"
    parts = [read_part(shard["shard"], folder) for shard in manifest["shards"]]
    if all(part is not None for part in parts):
        ours = sorted((row for part in parts if part for row in part["failures"]), key=lambda row: row["video"])
        with contextlib.suppress(Exception):  # one that cannot be read is named already
            if ours != pq.read_table(folder / "failures.parquet").to_pylist():
                yield "failures.parquet is not what the parts say"


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads(path.read_text("utf-8"))
    if type(manifest["format"]) is int and 1 <= manifest["format"] < FORMAT_VERSION:
        raise BuildError(
            f"{path.parent}: format {manifest['format']}, made by an older version; this one reads it as it is, and "
            f"verifies and repairs format {FORMAT_VERSION}, which `pasnet shards build` makes of the videos"
        )
    if manifest["format"] != FORMAT_VERSION:
        raise ValueError(f"format {manifest['format']}, this version verifies {FORMAT_VERSION}")
    str(manifest["dataset"])
    for name in ("videos", "frames", "failed", "decoded_with_errors"):
        int(manifest[name])
    for shard in manifest["shards"]:
        kinds = {"bytes": int, "videos": int, "sha256": str}
        if not is_shard(shard["shard"]) or not all(isinstance(shard[name], kind) for name, kind in kinds.items()):
            raise ValueError(f"its entry {shard!r} names no shard")
    manifest["digest"], manifest["subsets"], manifest["class_names"][0]
    manifest["decode"]["height"], manifest["decode"]["width"]
    return manifest


def _read_index(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    table = pq.read_table(path)
    if not table.schema.equals(INDEX_SCHEMA):
        raise ValueError("its columns are not those of this format")
    optional = {"split1", "split2", "split3"}
    holes = [name for name in table.column_names if table[name].null_count and name not in optional]
    if holes or not len(table):
        raise ValueError(f"values are missing in {', '.join(holes)}" if holes else "it is empty")
    return table.to_pylist(), json.loads(table.schema.metadata[b"decode"])


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
        if name in row and ("" if row[name] is None else row[name]) != value:
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

    What comes out is what the build made, to the byte, or nothing: a shard is replaced only when its successor is
    complete and has the sha256 on record. The videos are looked for where the build found them, unless `videos` (and
    `splits`) say where they are now. Raises BuildError when the folder has no notes of its build, when the videos or
    the decoder are not those of the build, and when something is still wrong afterwards.
    """
    folder = Path(folder)
    notes = read_notes(folder)
    if not notes:
        raise BuildError(f"{folder / 'parts' / 'build.json'}: missing or damaged; run `pasnet shards build` instead")
    settings = DecodeSettings(**notes["settings"])
    videos = Path(videos or notes["videos"])
    splits = splits or (Path(notes["splits"]) if notes["splits"] else None)
    with locked(folder):
        first = problems = verify(folder, workers=workers, on_shard=on_shard)
        rebuilt: set[str] = set()
        for _ in range(2):  # once more where there was no manifest at first, and so nothing to hold the tars against
            if not problems:
                break
            now = [decoder_version(settings.decoder), encoder_version()]
            if now != notes["versions"]:
                raise BuildError(
                    f"{folder}: was made by {', '.join(notes['versions'])}, here are {', '.join(now)}, whose bytes may "
                    f"differ; install those, or build everything anew with `pasnet shards build`"
                )
            dataset = scan(notes["dataset"], videos, splits)
            plans = plan(dataset, settings, num_shards=len(notes["plans"]))
            others = [shard.name for shard in plans if notes["plans"].get(shard.name) != shard.digest]
            if others or len(plans) != len(notes["plans"]):
                raise BuildError(
                    f"{videos}: not the videos (or lists) that {len(others)} shards of {folder}, such as {others[0]}, "
                    f"were made from; say where those are with --videos and --splits, or build anew with "
                    f"`pasnet shards build`"
                )
            expected = _sums(folder, notes["plans"])  # before the parts go
            for name in {problem.shard for problem in problems} & notes["plans"].keys():
                (folder / "parts" / f"{name}.json").unlink(missing_ok=True)  # the tar stays until the next is complete
            todo = [shard for shard in plans if finished_part(shard, folder) is None]
            most = forgiven(notes["max_failed"], len(dataset.videos))
            build_shards(
                todo, folder, settings, workers=workers, on_video=on_video, expected=expected, max_ruinous=most
            )
            rebuilt |= {shard.name for shard in todo}
            finish(dataset, plans, folder, settings, max_failed=notes["max_failed"])
            problems = verify(folder, workers=workers)
        if problems:
            raise BuildError(f"{folder}: {len(problems)} problems are left after the repair, such as {problems[0]}")
    return first, sorted(rebuilt)


def _sums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The sha256 of each shard as it was built, from its part, else from the manifest; absent where both are lost."""
    sums = {}
    with contextlib.suppress(Exception):  # a damaged manifest knows nothing
        sums = {shard["shard"]: str(shard["sha256"]) for shard in _read_manifest(folder / "manifest.json")["shards"]}
    for name in names:
        part = read_part(name, folder)
        if part is not None:
            sums[name] = part["sha256"]
    return sums
