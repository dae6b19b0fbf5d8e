"""The official archives: downloaded, checked and unpacked into the folder that `find_dataset` reads.

A download that breaks off is resumed, an archive is never trusted (names, links, sizes and sums are checked before and
after unpacking), and whatever is already there is used: `fetch` does only what is missing.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from shards.datasets import OFFICIAL_COUNTS, VIDEO_SUFFIXES, Dataset, DatasetError, scan
from shards.download import FULL, File, Progress, obtain, wrong_with
from shards.unpack import FetchError, check_extractor, unpack


@dataclass(frozen=True, kw_only=True)
class Archive(File):
    """One official file; its name ends in .rar or .zip."""

    def wrong_start(self, head: bytes) -> str:
        """Why a file that starts with these bytes is no such archive, or nothing."""
        kind, magic = ("RAR", b"Rar!\x1a\x07") if self.name.endswith(".rar") else ("ZIP", b"PK\x03\x04")
        if head.startswith(magic):
            return ""
        page = head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<")
        return f"is {'a web page' if page else f'something that starts with {head!r}'}, not a {kind} archive"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a dataset comes from."""

    name: str
    videos: Archive
    splits: Archive
    terms: str
    homepage: str
    notes: str = ""


_UCF = "www.crcv.ucf.edu/data/UCF101"
_HMDB = "serre-lab.clps.brown.edu/wp-content/uploads/2013/10"
_JHMDB = "files.is.tue.mpg.de/jhmdb"

# Sums of UCF-101 and HMDB-51: torchvision's prototype datasets, for these URLs. UCF101.rar's size is the server's
# Content-Length; J-HMDB's sizes are those of a download of 2026. A pinned sum makes plain http as safe as https.
SOURCES = {
    "ucf101": Source(
        name="ucf101",
        videos=Archive(
            name="UCF101.rar",
            urls=(
                f"https://{_UCF}/UCF101.rar",
                "https://www.crcv.ucf.edu/datasets/human-actions/ucf101/UCF101.rar",
                f"http://{_UCF}/UCF101.rar",
            ),
            size=6_932_971_618,
            sha256="ca8dfadb4c891cb11316f94d52b6b0ac2a11994e67a0cae227180cd160bd8e55",
        ),
        splits=Archive(
            name="UCF101TrainTestSplits-RecognitionTask.zip",
            urls=(
                "https://www.crcv.ucf.edu/wp-content/uploads/2019/03/UCF101TrainTestSplits-RecognitionTask.zip",
                f"https://{_UCF}/UCF101TrainTestSplits-RecognitionTask.zip",
                f"http://{_UCF}/UCF101TrainTestSplits-RecognitionTask.zip",
            ),
            size=113_943,
            sha256="5c0d1a53b8ed364a2ac830a73f405e51bece7d98ce1254fd19ed4a36b224bd27",
        ),
        terms="No licence is stated; clips from YouTube, given out for research. Cite CRCV-TR-12-01.",
        homepage="https://www.crcv.ucf.edu/data/UCF101.php",
        notes="The server's TLS certificate has often failed to verify.",
    ),
    "hmdb51": Source(
        name="hmdb51",
        videos=Archive(
            name="hmdb51_org.rar",
            urls=(f"https://{_HMDB}/hmdb51_org.rar", f"http://{_HMDB}/hmdb51_org.rar"),
            sha256="9e714a0d8b76104d76e932764a7ca636f929fff66279cda3f2e326fa912a328e",
        ),
        splits=Archive(
            name="test_train_splits.rar",
            urls=(f"https://{_HMDB}/test_train_splits.rar", f"http://{_HMDB}/test_train_splits.rar"),
            sha256="229c94f845720d01eb3946d39f39292ea962d50a18136484aa47c1eba251d2b7",
        ),
        terms="CC BY 4.0, says its homepage; the clips are from films and YouTube. Cite Kuehne et al., ICCV 2011.",
        homepage="https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database/",
        notes="The server was reported gone in November 2025: a mirror or a copy of your own may be needed.",
    ),
    "jhmdb": Source(
        name="jhmdb",
        videos=Archive(
            name="JHMDB_video.zip",
            urls=(f"https://{_JHMDB}/JHMDB_video.zip", f"http://{_JHMDB}/JHMDB_video.zip"),
            size=185_602_053,
        ),
        splits=Archive(
            name="splits.zip",
            urls=(f"https://{_JHMDB}/splits.zip", f"http://{_JHMDB}/splits.zip"),
            size=43_785,
        ),
        terms="No licence is stated; the clips are of HMDB-51. Cite Jhuang et al., ICCV 2013.",
        homepage="http://jhmdb.is.tue.mpg.de",
    ),
}


def fetch(
    name: str | Source,
    out: Path,
    *,
    have: Path | None = None,
    mirrors: Sequence[str] = (),
    keep_archives: bool = True,
    progress: Progress | None = None,
    sleep: Callable[[float], object] = time.sleep,
) -> Dataset:
    """The dataset `name` (of SOURCES, or a Source of your own) in out/videos/<class>/ and its split lists beside it.

    `have` is a folder that holds some of it: the archives under their own names, or class folders and split lists at
    most two folders down. Archives are read where they are, folders are linked; `have` is never written to. `mirrors`
    are base URLs that are tried first, as <mirror>/<archive name>. Archives stay in out/archives unless
    `keep_archives` is false; they are then deleted once everything is there. `sleep` waits between attempts.

    Raises FetchError, also when a listed video is not there in the end; UnreachableError, which is one, where a server
    may give it later.
    """
    if not isinstance(name, Source) and name not in SOURCES:
        raise FetchError(f"{name!r}: no such dataset; one of {', '.join(SOURCES)}")
    source = name if isinstance(name, Source) else SOURCES[name]
    out, have = Path(out), Path(have) if have is not None else None
    for mirror in mirrors:
        if not mirror.startswith(("http://", "https://")):
            raise FetchError(f"{mirror}: not an http or https URL; give a folder of your own with --have")
    if have is not None and not have.is_dir():
        raise FetchError(f"{have}: no such folder; --have takes the folder that holds the archives or the videos")
    report = progress or (lambda what, done, total: None)

    def obtain(archive: Archive) -> Path:
        urls = [f"{mirror.rstrip('/')}/{archive.name}" for mirror in mirrors] + list(archive.urls)
        return _obtain(archive, urls, out / "archives", have, report, sleep)

    try:
        (out / "archives").mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".fetch.lock", timeout=0):
            for stale in [*out.glob("videos.*.tmp"), *out.glob("splits.*.tmp")]:
                shutil.rmtree(stale, ignore_errors=True)
            if have is not None:
                _check_useful(have, source)
            splits = _provide_splits(source, out, have, obtain, report)
            _provide_videos(source, out, have, obtain, report, splits)
            dataset = _check_complete(source, out, splits)
            if not keep_archives:
                _delete_archives(source, out / "archives")
            return dataset
    except Timeout:
        raise FetchError(f"{out}: another fetch into this folder is running; wait for it or stop it") from None
    except OSError as error:
        fix = "free some space and run again" if error.errno in FULL else "run again once that is settled"
        raise FetchError(f"{error.filename or out}: {error.strerror or error}; {fix}, what came is kept") from error


def _check_useful(have: Path, source: Source) -> None:
    """Raises where a typo in `have` would silently start a download of gigabytes."""
    archives = any((have / archive.name).is_file() for archive in (source.videos, source.splits))
    if not archives and not _splits_root(have, source.name) and not any(map(_holds_video, _folders(have, 3))):
        raise FetchError(
            f"{have}: holds neither {source.videos.name} nor {source.splits.name}, nor class folders with videos or "
            f"split lists of {source.name}; give the folder right above them"
        )


def _provide_splits(
    source: Source, out: Path, have: Path | None, obtain: Callable[[Archive], Path], report: Progress
) -> Path:
    for folder in sorted(path for path in out.iterdir() if path.is_dir() and path.name != "videos"):
        if _splits_root(folder, source.name, depth=0):
            return folder
    target = _free(out / "splits")
    found = _splits_root(have, source.name) if have else None
    if found:
        target.symlink_to(found.resolve(), target_is_directory=True)
        return target
    path = obtain(source.splits)
    with _Scratch(target) as scratch:
        unpack(path, scratch, report)
        found = _splits_root(scratch, source.name)
        if not found:
            raise FetchError(f"{path}: holds no split lists of {source.name}; delete it and run again")
        found.rename(target)
    return target


def _provide_videos(
    source: Source, out: Path, have: Path | None, obtain: Callable[[Archive], Path], report: Progress, splits: Path
) -> None:
    target = out / "videos"
    if target.is_dir() and any(target.iterdir()):
        return
    _free(target)
    class_names = _class_names(splits)
    found = _videos_root(have, class_names) if have else None
    if found:
        target.symlink_to(found.resolve(), target_is_directory=True)
        return
    if have and not (have / source.videos.name).is_file() and any(map(_holds_video, _folders(have, 3))):
        raise FetchError(f"{have}: its videos are not in folders named like the classes of {splits}; sort them so")
    path = obtain(source.videos)
    with _Scratch(target) as scratch:
        unpack(path, scratch, report)
        for inner in sorted(scratch.rglob("*.rar")):  # HMDB-51: one archive per class
            with _Scratch(target) as inner_scratch:
                unpack(inner, inner_scratch, report)
                inner.unlink()  # before the next one: both copies of everything would take twice the disk
                for child in inner_scratch.iterdir():
                    child.rename(_free(scratch / child.name))
        found = _videos_root(scratch, class_names)
        if not found:
            raise FetchError(f"{path}: holds no folder named like a class of {splits}; delete it and run again")
        found.rename(target)


def _check_complete(source: Source, out: Path, splits: Path) -> Dataset:
    try:
        dataset = scan(source.name, out / "videos", splits)
    except DatasetError as error:
        raise FetchError(str(error)) from error
    if dataset.missing:
        videos = out / "videos"
        fix = f"put them there, or delete {videos} and run again"
        if videos.is_symlink():  # a folder of the user's, which is not ours to have deleted
            fix = f"put them into {videos.resolve()}, or unlink {videos} and run again without --have"
        raise FetchError(
            f"{videos}: {len(dataset.missing)} of {dataset.listed} listed videos are not there, such as "
            f"{', '.join(dataset.missing[:3])}; {fix}"
        )
    return dataset


def _free(target: Path) -> Path:
    if target.is_symlink() and not target.exists():
        target.unlink()  # a folder of the user's that has moved
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    if target.exists():
        raise FetchError(f"{target}: is there already, but is not what belongs there; move it elsewhere and run again")
    return target


def _delete_archives(source: Source, folder: Path) -> None:
    for archive in (source.videos, source.splits):
        (folder / archive.name).unlink(missing_ok=True)
        (folder / f"{archive.name}.rejected").unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


class _Scratch:
    """A new folder beside `target`. A name of its own: an extractor that outlived its killed parent may still write
    into the last one."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> Path:
        self.path = Path(tempfile.mkdtemp(prefix=f"{self.target.name}.", suffix=".tmp", dir=self.target.parent))
        self.path.chmod(0o755)  # it may become the target, which others read
        return self.path

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _obtain(
    archive: Archive,
    urls: Sequence[str],
    folder: Path,
    have: Path | None,
    report: Progress,
    sleep: Callable[[float], object],
) -> Path:
    """The archive, checked: the user's, the one that an earlier run downloaded, or a download."""
    theirs = have / archive.name if have else None
    if theirs and theirs.is_file():
        wrong = wrong_with(theirs, archive, report)
        if wrong:
            raise FetchError(f"{theirs}: {wrong}; remove it from there, or get it again")
        return theirs
    if not (folder / archive.name).is_file():
        check_extractor(folder / archive.name)  # before gigabytes are downloaded that nothing here can unpack
    by_hand = (
        "run again to resume, name another server with --mirror URL, or download it in a browser and give its folder "
        "with --have FOLDER"
    )
    return obtain(archive, folder, urls=urls, by_hand=by_hand, report=report, sleep=sleep)


# Finding what a folder holds. By structure, since neither users nor archives agree on the folders around it.


def _folders(root: Path, depth: int = 2) -> Iterator[Path]:
    """`root` and the folders in it, level by level."""
    level = [root]
    for _ in range(depth):
        yield from level
        level = [Path(e.path) for f in level for e in os.scandir(f) if e.is_dir() and not e.name.startswith(".")]
        level.sort()
    yield from level


def _holds_video(folder: Path) -> bool:
    return any(e.name.lower().endswith(VIDEO_SUFFIXES) and not e.name.startswith("._") for e in os.scandir(folder))


def _class_names(folder: Path) -> frozenset[str]:
    """Classes of the split lists in `folder`, casefolded; none where it holds no lists."""
    index = folder / "classInd.txt"
    if index.is_file():
        lines = (line.split(maxsplit=1) for line in index.read_text("latin-1").splitlines())
        return frozenset(parts[1].strip().casefold() for parts in lines if len(parts) == 2)
    end = "_test_split1.txt"
    names = (entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    return frozenset(name.removesuffix(end).casefold() for name in names if name.endswith(end))


def _splits_root(root: Path, name: str, depth: int = 2) -> Path | None:
    """The folder with the split lists of dataset `name`. J-HMDB's and HMDB-51's differ in the number of classes."""
    for folder in _folders(root, depth):
        classes = _class_names(folder)
        if classes and (name not in OFFICIAL_COUNTS or len(classes) == OFFICIAL_COUNTS[name][1]):
            return folder
    return None


def _videos_root(root: Path, class_names: frozenset[str]) -> Path | None:
    """The folder with most class folders that hold a video. J-HMDB's classes are some of HMDB-51's: of two with as
    many, the one with fewer other folders."""
    best: tuple[tuple[int, int], Path] | None = None
    for folder in _folders(root):
        inside = [entry for entry in os.scandir(folder) if entry.is_dir()]
        classes = [e for e in inside if e.name.casefold() in class_names and _holds_video(Path(e.path))]
        score = (len(classes), -len(inside))
        if classes and (best is None or score > best[0]):
            best = score, folder
    return best[1] if best else None
