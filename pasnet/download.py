"""Public weights into a folder of one's own: downloaded, or taken over with --have, and checked before they are kept.

The download itself is that of shards/download.py: several servers, resumed where it broke off. A file whose sum nobody
published is known by its tensors: it is read, and kept only as what it was asked for.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from filelock import FileLock, Timeout

from pasnet.registry import KINDS, REGISTRY, Source
from pasnet.weights import Inspection, WeightsError, inspect, matches
from shards.download import File, Progress, obtain


def fetch(
    name: str | Source,
    folder: Path,
    *,
    have: Path | None = None,
    mirrors: Sequence[str] = (),
    progress: Progress | None = None,
    sleep: Callable[[float], object] = time.sleep,
) -> Inspection:
    """The registry's file `name`, or a file of your own, in `folder`, and what it is. What is there already is checked
    again, not downloaded.

    `have` is a file that was downloaded by hand; it is copied. `mirrors` are base URLs (http, https or file) that are
    tried first, as <mirror>/<file name>. Raises WeightsError; FetchError (of shards) where no server gives the file.
    """
    if not isinstance(name, Source) and name not in REGISTRY:
        raise WeightsError(f"{name!r}: no such weights; one of {', '.join(REGISTRY)}")
    source, folder = name if isinstance(name, Source) else REGISTRY[name], Path(folder)
    for mirror in mirrors:
        if not mirror.startswith(("http://", "https://", "file:///")):
            raise WeightsError(f"{mirror}: not an http, https or file URL; give a file of your own with --have")
    urls = [f"{mirror.rstrip('/')}/{source.file}" for mirror in mirrors] + list(source.urls)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / source.file
    try:
        with FileLock(folder / ".fetch.lock", timeout=0):
            if have is not None:
                return _take_over(Path(have), target, source)
            if target.is_file():
                return _checked(target, source, "move it elsewhere and run again")
            local = [Path(url2pathname(urlsplit(url).path)) for url in urls if url.startswith("file:")]
            for path in local:
                if path.is_file():
                    return _take_over(path, target, source)
            remote = [url for url in urls if not url.startswith("file:")]
            if not remote:
                missing = f" ({', '.join(map(str, local))} is not there)" if local else ""
                raise WeightsError(f"{source.file}: not to be had without a browser{missing}; {_by_hand(name, source)}")
            wanted = File(name=source.file, urls=tuple(remote), size=source.size, sha256=source.sha256 or None)
            report = progress or (lambda what, done, total: None)
            obtain(wanted, folder, by_hand=_by_hand(name, source), report=report, sleep=sleep)
            rejected = target.with_name(f"{target.name}.rejected")
            try:
                return _checked(target, source, f"kept as {rejected.name}; {_by_hand(name, source)}")
            except WeightsError:
                os.replace(target, rejected)
                raise
    except Timeout:
        raise WeightsError(f"{folder}: another fetch into this folder is running; wait for it or stop it") from None


def _by_hand(name: str | Source, source: Source) -> str:
    links = " or ".join(source.by_hand or source.urls)
    if isinstance(name, Source):
        return f"see to {links or source.title}"
    return f"download it in a browser from {links}, then run `pasnet weights fetch {name} --have FILE`"


def _take_over(have: Path, target: Path, source: Source) -> Inspection:
    if not have.is_file():
        raise WeightsError(f"{have}: no such file; --have takes the file that you downloaded")
    found = _checked(have, source, "get it again")
    if target.exists() and target.samefile(have):
        return found
    handle, name = tempfile.mkstemp(prefix=f"{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    try:
        shutil.copyfile(have, name)
        os.chmod(name, 0o644)
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)
    return inspect(target)


def _checked(path: Path, source: Source, fix: str) -> Inspection:
    """What `path` is. Raises WeightsError unless it is the whole file of the registry, as far as can be told."""
    size = path.stat().st_size
    if source.size not in (None, size) or matches(path, source) is False:
        try:
            is_it = KINDS[inspect(path).checkpoint.kind].title + " with other values or in another container"
        except WeightsError as error:
            is_it = str(error).removeprefix(f"{path}: ")
        known = f"{source.size} bytes, " if source.size else ""
        known += f"sha256 {source.sha256}" if source.sha256 else f"md5 {source.md5}"
        raise WeightsError(f"{path}: not the published {source.title} ({size} bytes; expected {known}): {is_it}; {fix}")
    found = inspect(path)
    if found.checkpoint.kind != source.kind:
        title = KINDS[found.checkpoint.kind].title
        raise WeightsError(f"{path}: is {title}, not {source.title}; {fix}")
    if found.problems:
        raise WeightsError(f"{path}: not all of {source.title}: {'; '.join(found.problems[:5])}; {fix}")
    return found
