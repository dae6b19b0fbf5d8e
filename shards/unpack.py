"""An archive (.rar, .zip) unpacked as if it were hostile: names, links, sizes and sums are checked before and after.

RAR needs a program: the first of EXTRACTORS that is on PATH and can do it, run once for the whole archive. Its
headers are read by the library rarfile, so that nothing unsafe is ever handed to the program.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import rarfile

EXTRACT_TIMEOUT = 6 * 3600.0  # seconds, for one archive
MAX_RATIO, MAX_EXTRA = 20, 1 << 28  # most bytes that an archive of n bytes may unpack to: 20 n + 256 MiB

# What each extractor is given; {archive} and {folder} are absolute, so neither reads as an option.
EXTRACTORS = {
    "unrar": ("x", "-idq", "-o+", "-p-", "-y", "--", "{archive}", "{folder}/"),
    "unar": ("-q", "-D", "-nr", "-f", "-k", "skip", "-o", "{folder}", "{archive}"),
    "7zz": ("x", "-y", "-bso0", "-bsp0", "-o{folder}", "--", "{archive}"),
    "7z": ("x", "-y", "-bso0", "-bsp0", "-o{folder}", "--", "{archive}"),
    "bsdtar": ("-x", "-f", "{archive}", "-C", "{folder}"),
}
# Those that may be there and not be able to: what to ask them, and a word of the answer of one that is.
PROBES = {"unrar": ((), b"Roshal"), "7zz": (("i",), b"Rar5"), "7z": (("i",), b"Rar5")}
INSTALL = (
    "install one: `apt-get install unar` (Debian, Ubuntu), `dnf install unar` (Fedora), `brew install unar` (macOS), "
    "or put 7zz from https://www.7-zip.org on PATH"
)


class FetchError(ValueError):
    """A download, archive or folder that cannot be used; the message names it, the reason and the fix."""


class UnreachableError(FetchError):
    """A download that may come through later, as it is: a server did not answer, broke off or had no time for it."""


@dataclass(frozen=True, kw_only=True)
class _Member:
    name: str  # relative, "/" between parts
    size: int
    crc: int | None
    stored: bool  # not compressed
    info: Any  # what its archive's open() takes


def unpack(path: Path, folder: Path, report: Callable[[str, int, int | None], None]) -> None:
    """The files of `path` in the empty `folder`, or a FetchError before (or instead of) anything unsafe."""
    try:
        archive: Any = zipfile.ZipFile(path) if path.suffix == ".zip" else rarfile.RarFile(path, errors="strict")
        with archive:
            members = _members(path, archive)
            total = sum(member.size for member in members)
            free = shutil.disk_usage(folder).free
            if total > free:
                raise FetchError(f"{path}: unpacks to {total} bytes and {free} are free at {folder.parent}; free some")
            report(f"{path.name}: unpacking", 0, total)
            if path.suffix == ".zip":
                _copy_members(archive, members, folder)
            else:
                _extract_rar(path, archive, members, folder)
            report(f"{path.name}: unpacking", total, total)
    except (zipfile.BadZipFile, rarfile.Error, zlib.error, NotImplementedError, EOFError) as error:
        raise FetchError(f"{path}: damaged or cut short ({error}); delete it and run again") from error


def _members(path: Path, archive: Any) -> list[_Member]:
    """What to unpack. Raises FetchError for an archive that asks for a file elsewhere, a link, a password or more
    bytes than any honest one."""
    is_zip = isinstance(archive, zipfile.ZipFile)

    def refuse(reason: str) -> FetchError:
        return FetchError(f"{path}: refused: {reason}; this is not the official file, delete it and get another copy")

    if not is_zip and archive.needs_password():
        raise refuse("it is encrypted")
    members: dict[str, _Member] = {}
    for info in archive.infolist():
        name = info.filename
        if name.startswith("/") or re.match(r"[A-Za-z]:", name) or "\\" in name or ".." in name.split("/"):
            raise refuse(f"its member {name!r} points outside")
        mode = info.external_attr >> 16 if is_zip else info.mode if info.host_os == rarfile.RAR_OS_UNIX else 0
        if stat.S_IFMT(mode or 0) not in (0, stat.S_IFREG, stat.S_IFDIR) or (not is_zip and info.file_redir):
            raise refuse(f"its member {name!r} is a link or a device")
        if is_zip and info.flag_bits & 1:
            raise refuse(f"its member {name!r} is encrypted")
        if info.is_dir():
            continue
        name = str(PurePosixPath(name))
        if name in members:
            raise refuse(f"it holds {name!r} twice")
        stored = info.compress_type == (zipfile.ZIP_STORED if is_zip else rarfile.RAR_M0)
        members[name] = _Member(name=name, size=info.file_size, crc=info.CRC, stored=stored, info=info)
    total, size = sum(member.size for member in members.values()), path.stat().st_size
    if total > MAX_RATIO * size + MAX_EXTRA:
        raise refuse(f"its {size} bytes unpack to {total}")
    return [member for member in members.values() if not _is_junk(member.name)]


def _is_junk(name: str) -> bool:
    parts = name.split("/")
    return "__MACOSX" in parts or parts[-1] in (".DS_Store", "Thumbs.db") or parts[-1].startswith("._")


def _copy_members(archive: Any, members: Sequence[_Member], folder: Path) -> None:
    """In Python; both libraries check the sums while reading."""
    for member in members:
        target = folder / member.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(member.info) as source, target.open("xb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
        if target.stat().st_size != member.size:
            raise EOFError(f"{member.name} has {target.stat().st_size} of {member.size} bytes")


def check_extractor(path: Path) -> None:
    """Raises FetchError where nothing on PATH could unpack `path`, a .rar that is not there yet."""
    if path.suffix == ".rar" and next(_extractors(), None) is None:
        raise _no_extractor(path)


def _no_extractor(path: Path) -> FetchError:
    return FetchError(f"{path}: no RAR extractor on PATH; {INSTALL}")


def _extract_rar(path: Path, archive: rarfile.RarFile, members: Sequence[_Member], folder: Path) -> None:
    """One run of an extractor for the whole archive: one per member would take hours, and for ever if it is solid."""
    reasons = []
    for name, exe in _extractors():
        try:
            _run_extractor(name, exe, path, folder)
            _check_tree(members, folder)
            return
        except FetchError as error:
            reasons.append(f"{name}: {error}")
            shutil.rmtree(folder)
            folder.mkdir()
    if all(member.stored for member in members):
        _copy_members(archive, members, folder)
    elif reasons:
        raise FetchError(f"{path}: could not be unpacked ({'; '.join(reasons)}); get it again, or {INSTALL}")
    else:
        raise _no_extractor(path)


def _extractors() -> Iterator[tuple[str, str]]:
    """(name, path) of those on PATH that can do it: unrar-free calls itself unrar too, but cannot unpack much, and
    Debian builds 7zz without RAR."""
    for name in EXTRACTORS:
        exe = shutil.which(name)
        if exe and name in PROBES:
            arguments, word = PROBES[name]
            exe = exe if word in _run([exe, *arguments], 60).stdout else None
        if exe:
            yield name, exe


def _run_extractor(name: str, exe: str, path: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as alone:  # unar takes a1.rar and a2.rar in one folder for two volumes
        link = Path(alone, "archive.rar")
        link.symlink_to(path.resolve())
        values = {"archive": str(link), "folder": str(folder.resolve())}
        try:
            done = _run([exe, *(argument.format(**values) for argument in EXTRACTORS[name])], EXTRACT_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise FetchError(f"not done after {EXTRACT_TIMEOUT:.0f} s") from None
    if done.returncode != 0:
        words = " ".join(done.stdout.decode(errors="replace").split())
        raise FetchError(f"exit status {done.returncode}, {words[-300:] or 'without a word'}")


def _run(command: Sequence[str], timeout: float) -> subprocess.CompletedProcess[bytes]:
    # In a C locale bsdtar leaves out RAR4 members with names beyond ASCII.
    env = os.environ | {"LC_ALL": "en_US.UTF-8" if sys.platform == "darwin" else "C.UTF-8"}
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=timeout,
        env=env,
        check=False,
    )


def _check_tree(members: Sequence[_Member], folder: Path) -> None:
    """`folder` holds the members, with their sizes and sums, and nothing else; junk is deleted."""
    left = {member.name: member for member in members}
    for parent, folders, files in os.walk(folder):
        for name in folders + files:
            path = Path(parent, name)
            relative, status = path.relative_to(folder).as_posix(), path.lstat()
            if stat.S_ISDIR(status.st_mode):
                continue
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                raise FetchError(f"wrote {relative!r}, which is no plain file")
            if _is_junk(relative):
                path.unlink()
                continue
            member = left.pop(relative, None)
            if member is None:
                raise FetchError(f"wrote {relative!r}, which the archive does not list")
            if status.st_size != member.size or (member.crc is not None and _crc32(path) != member.crc):
                raise FetchError(f"wrote {relative!r} with {status.st_size} of {member.size} bytes or a wrong sum")
    if left:
        raise FetchError(f"left out {len(left)} files, such as {next(iter(left))!r}")


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return crc
