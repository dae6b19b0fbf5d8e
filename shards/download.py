"""One file from one of several servers: resumed where it broke off, checked, and set aside where it is another file.

Knows nothing of datasets. `obtain` is the way in; `File` says how the wanted file is told from any other.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException, InvalidURL
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from shards.unpack import FetchError, UnreachableError

Progress = Callable[[str, int, int | None], None]  # (what, bytes done, bytes in all where known)

RETRIES = 5  # attempts in a row that bring a download no further, per URL
SOCKET_TIMEOUT = 60.0  # seconds
FULL = (errno.ENOSPC, errno.EDQUOT)  # what a disk that is full says


@dataclass(frozen=True, kw_only=True)
class File:
    """A file to be had from the network."""

    name: str  # under which it is kept
    urls: tuple[str, ...]  # in order of preference
    size: int | None = None  # bytes
    sha256: str | None = None

    def wrong_start(self, head: bytes) -> str:
        """Why a file that starts with these bytes (8, or all of a shorter one) is another file, or nothing."""
        page = head.lstrip(b"\xef\xbb\xbf \r\n\t").lower().startswith((b"<!d", b"<ht", b"<he", b"<?x"))
        return "is a web page" if page else ""


class _RefusedError(Exception):
    """This URL will not give the file; the next one may."""


class _AwayError(_RefusedError):
    """Nor will this one, for now."""


def obtain(
    wanted: File,
    folder: Path,
    *,
    urls: Sequence[str] | None = None,
    by_hand: str,
    report: Progress = lambda what, done, total: None,
    sleep: Callable[[float], object] = time.sleep,
) -> Path:
    """folder / wanted.name, checked: the one that an earlier run downloaded, or a download.

    `urls` instead of the file's own. `by_hand` ends the message where no URL gives the file; `sleep` waits between
    attempts. Raises UnreachableError where a server may give it later, FetchError where none will, and OSError where
    our own disk is in the way.
    """
    ours = folder / wanted.name
    if ours.is_file():
        wrong = wrong_with(ours, wanted, report)
        if not wrong:
            return ours
        rejected = _set_aside(ours, wanted)
        raise FetchError(f"{ours}: {wrong}; moved to {rejected.name}, run again to download it")
    part = folder / f"{wanted.name}.part"
    reasons, raised = [], FetchError
    for url in wanted.urls if urls is None else urls:
        try:
            _download(url, wanted, part, report, sleep)
        except _RefusedError as error:
            reasons.append(f"{url}: {error}")
            raised = UnreachableError if isinstance(error, _AwayError) else raised
            continue
        part.rename(ours)
        for leftover in (_meta(part), folder / f"{wanted.name}.rejected"):
            leftover.unlink(missing_ok=True)
        return ours
    raise raised(f"{wanted.name}: not downloaded ({'; '.join(reasons)}); {by_hand}")


def _download(url: str, wanted: File, part: Path, report: Progress, sleep: Callable[[float], object]) -> None:
    """Brings `part` to the whole, checked file, in as many attempts as get further."""
    furthest, failures = _size(part), 0
    while True:
        gives_up: type[_RefusedError] = _AwayError
        try:
            _transfer(url, wanted, part, report)
            wrong = wrong_with(part, wanted, report)
            if wrong:
                raise _RefusedError(f"{wrong}; kept as {_set_aside(part, wanted).name}")
            return
        except HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            if error.code == 416:
                _discard(part)
                gives_up = _RefusedError
            elif error.code < 500 and error.code not in (408, 429):
                raise _RefusedError(reason) from error
        except (OSError, HTTPException) as error:
            cause = error.reason if isinstance(error, URLError) else error
            reason = str(cause) or type(cause).__name__
            if isinstance(cause, str | InvalidURL):  # urllib's own words: no URL that it could ask
                raise _RefusedError(reason) from error
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise _RefusedError(f"its TLS certificate does not verify ({cause.verify_message})") from error
            if isinstance(error, OSError) and (error.errno in FULL or error.filename):
                raise  # our own disk, not the server
        failures = 0 if _size(part) > furthest else failures + 1
        furthest = max(furthest, _size(part))
        if failures > RETRIES:
            raise gives_up(f"{reason}, {failures} times in a row")
        sleep(min(2.0**failures, 60.0))


def _transfer(url: str, wanted: File, part: Path, report: Progress) -> None:
    """One request: appends to `part` where the server still has the same file, else starts it over.

    Raises OSError or HTTPException when it broke off, _RefusedError when this is not the wanted file.
    """
    start, before = _size(part), _read_meta(part)
    validator = before.get("validator")
    if start and start == before.get("total"):
        return
    headers = {"User-Agent": "pasnet-shards-fetch"}
    # Without ETag or date only a known sum tells a spliced file from a good one.
    if start and (validator or wanted.sha256):
        headers |= {"Range": f"bytes={start}-"} | ({"If-Range": validator} if validator else {})
    with urlopen(Request(url, headers=headers), timeout=SOCKET_TIMEOUT) as response:
        if not response.url.startswith(("http://", "https://")):
            raise _RefusedError(f"redirects to {response.url}")
        etag = response.headers.get("ETag", "")
        now = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")
        length = response.headers.get("Content-Length")
        total = int(length) if length else None
        if response.status == 206:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            total = int(span[2]) if span else None
            same = (not now or not validator or now == validator) and before.get("total") in (None, total)
            if not span or int(span[1]) != start or not same:
                _discard(part)
                raise ConnectionError("the file changed on the server")
        else:
            start = 0
        if wanted.size and total and total != wanted.size:
            raise _RefusedError(f"has {total} bytes, expected {wanted.size}")
        head = b""
        while not start and len(head) < 8 and (chunk := response.read1(1 << 16)):
            head += chunk
        if not start and (len(head) == total or len(head) >= 8) and wanted.wrong_start(head):
            raise _RefusedError(wanted.wrong_start(head))  # before it overwrites what is there
        free = shutil.disk_usage(part.parent).free
        if total and total - start > free:
            raise OSError(errno.ENOSPC, f"{total - start} bytes to come, {free} free")
        _meta(part).write_text(json.dumps({"validator": now or validator, "total": total}))
        done = start
        with open(part, "ab" if start else "wb") as sink:
            chunk = head or response.read1(1 << 18)
            while chunk:
                sink.write(chunk)
                done += len(chunk)
                report(f"{wanted.name}: downloading", done, total)
                chunk = response.read1(1 << 18)  # read1: what came before a connection breaks is not lost
    if total is not None and done < total:
        raise ConnectionError(f"broke off after {done} of {total} bytes")


def wrong_with(path: Path, wanted: File, report: Progress) -> str:
    """Why `path` is not the wanted file, or nothing."""
    size = path.stat().st_size
    with path.open("rb") as file:
        wrong = wanted.wrong_start(file.read(8))
        if wrong:
            return wrong
        if wanted.size not in (None, size):
            return f"has {size} bytes, expected {wanted.size}"
        if wanted.sha256 is None:
            return ""
        file.seek(0)
        sha256, done = hashlib.sha256(), 0
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
            done += len(chunk)
            report(f"{wanted.name}: checking", done, size)
    got = sha256.hexdigest()
    return "" if got == wanted.sha256 else f"has sha256 {got}, expected {wanted.sha256}"


def _set_aside(path: Path, wanted: File) -> Path:
    rejected = path.with_name(f"{wanted.name}.rejected")
    os.replace(path, rejected)
    _meta(path).unlink(missing_ok=True)
    return rejected


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _meta(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_meta(part: Path) -> dict[str, Any]:
    try:
        meta = json.loads(_meta(part).read_text())
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _meta(part).unlink(missing_ok=True)
