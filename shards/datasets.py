"""UCF-101, HMDB-51, J-HMDB, sets laid out like them, and plain folders: the videos, their labels and official splits.

What earlier loaders got wrong, and is settled here: a class is the folder (UCF-101 files 128 clips named
`v_HandStandPushups_*` under `HandstandPushups`); a label is the line in `classInd.txt` (a plain sort swaps two pairs of
UCF-101); names are compared without regard to case, and J-HMDB's `@` stands for HMDB's `#`; list lines may end in
blanks or CRLF; UCF-101's test lists carry no label; HMDB-51's classes are prefixes of one another.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Subset = Literal["train", "test"]
VIDEO_SUFFIXES = (".avi", ".mp4", ".mkv", ".webm", ".mov", ".mpg", ".mpeg", ".m4v", ".flv", ".wmv", ".3gp", ".ts")
FOLDER = "folder"  # the name of a set without lists: a class is a folder, and there are no splits

# Official sizes: (videos, classes, {split: (train, test)}). Counted from the published lists.
OFFICIAL_COUNTS = {
    "ucf101": (13_320, 101, {1: (9537, 3783), 2: (9586, 3734), 3: (9624, 3696)}),
    "hmdb51": (6_766, 51, {1: (3570, 1530), 2: (3570, 1530), 3: (3570, 1530)}),
    "jhmdb": (928, 21, {1: (660, 268), 2: (658, 270), 3: (663, 265)}),
}


class DatasetError(ValueError):
    """A folder or list that is not the dataset it should be; the message names the file, the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class Video:
    """One source file. `key` is its name in the shards: class/stem, with "." and "%" escaped, since WebDataset cuts
    a key at the first dot of its last part, and the end of a class called like __this__, which it would skip."""

    key: str
    path: Path
    class_name: str
    label: int  # 0-based
    group: str  # videos of one group share a scene or source; "" where the dataset has no groups
    splits: dict[int, Subset]  # split number -> subset; a split that does not use the video is absent


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The videos that are on disk, in key order, and which listed ones are not."""

    name: str
    class_names: tuple[str, ...]
    videos: tuple[Video, ...]
    listed: int  # distinct videos that the official lists name; 0 without lists
    missing: tuple[str, ...]  # listed but not on disk
    ignored: tuple[str, ...]  # among the videos, but no video in a class folder
    folder: Path  # where the class folders are
    lists: Path | None  # where the split lists are

    @property
    def splits(self) -> tuple[int, ...]:
        """Split numbers for which at least one video is on disk."""
        return tuple(sorted({split for video in self.videos for split in video.splits}))

    @property
    def usable_splits(self) -> tuple[int, ...]:
        """Split numbers with videos on disk in both subsets."""
        return tuple(split for split in self.splits if self.count(split, "train") and self.count(split, "test"))

    def count(self, split: int, subset: Subset) -> int:
        """Videos on disk in one subset of one split."""
        return sum(video.splits.get(split) == subset for video in self.videos)


def find_dataset(root: Path) -> tuple[str, Path, Path | None]:
    """(name, videos folder, splits folder) of a dataset folder, told apart by its split lists.

    A folder of class folders without videos/ and lists is a set called "folder", with no splits folder. Raises
    DatasetError for a folder that holds none of the known layouts.
    """
    root = Path(root)
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder; give the folder that holds videos/ and the official split lists")
    videos = root / "videos"
    if not videos.is_dir():
        if _video_files(root):
            return FOLDER, root, None
        raise DatasetError(f"{root}: has no videos/ folder with one folder per class, and no class folders itself")
    splits = find_splits(videos)
    if splits is None:
        raise DatasetError(
            f"{root}: no split lists beside videos/; expected a folder with classInd.txt and trainlist01.txt "
            f"(UCF-101), or with <class>_test_split1.txt (HMDB-51, J-HMDB); a set without lists is {videos} itself"
        )
    synthetic = (root / "synth.json").is_file()  # what pasnet/synth.py leaves beside its videos
    if (splits / "classInd.txt").is_file():
        if synthetic:
            return "synthetic", videos, splits
        names = _read_class_index(splits / "classInd.txt")
        official = len(names) == OFFICIAL_COUNTS["ucf101"][1] and "ApplyEyeMakeup" in names
        return ("ucf101" if official else "ucf-layout"), videos, splits
    if synthetic:
        return "synthetic-hmdb", videos, splits
    lists = [entry.name for entry in os.scandir(splits) if entry.name.endswith("_test_split1.txt")]
    sizes = {OFFICIAL_COUNTS[name][1]: name for name in ("hmdb51", "jhmdb")}
    official = "brush_hair_test_split1.txt" in lists
    return sizes.get(len(lists), "hmdb-layout") if official else "hmdb-layout", videos, splits


def find_splits(videos: Path) -> Path | None:
    """The folder of split lists beside `videos`, or in the folder around it; None where there is none."""
    around = Path(videos).absolute().parent
    for folder in [*sorted(path for path in around.iterdir() if path.is_dir()), around]:
        try:
            names = os.listdir(folder)
        except PermissionError:  # such as lost+found
            continue
        if "classInd.txt" in names or any(name.endswith("_test_split1.txt") for name in names):
            return folder
    return None


def scan(name: str, videos: Path, splits: Path | None = None) -> Dataset:
    """Reads the split lists and looks for their videos under `videos`/<class>/.

    A video on disk that no list names is kept, in no split. Without `splits` the lists beside `videos` are taken. A
    set called "folder", or one of your own without lists, has the folders as classes, in alphabetical order, and no
    splits. Raises DatasetError when the lists are not there, are not those of the dataset (counts), contradict each
    other, or name no video that is there.
    """
    videos = Path(videos)
    if not videos.is_dir():
        raise DatasetError(f"{videos}: no such folder of videos")
    if splits is None:
        splits = None if name == FOLDER else find_splits(videos)
        if splits is None and name not in OFFICIAL_COUNTS:
            return _scan_class_folders(name, videos)
    if splits is None:
        raise DatasetError(
            f"{videos}: no split lists beside it; give the folder that holds them with --splits, fetch them with "
            f"`pasnet shards fetch {name}`, or use --dataset {FOLDER} for videos without splits"
        )
    splits = Path(splits)
    if not splits.is_dir():
        raise DatasetError(f"{splits}: no such folder of split lists")
    read = _read_ucf_lists if (splits / "classInd.txt").is_file() else _read_hmdb_lists
    class_names, listed = read(splits)
    foreign = sorted({split for _, uses in listed.values() for split in uses} - {1, 2, 3})
    if foreign:
        raise DatasetError(f"{splits}: has lists of split {foreign[0]}; the shards hold splits 1, 2 and 3")
    if name in OFFICIAL_COUNTS:
        _check_counts(name, splits, class_names, listed)
    by_folder = {class_name.casefold(): label for label, class_name in enumerate(class_names)}
    found: list[Video] = []
    on_lists: set[tuple[str, str]] = set()
    for folder, path in _scan_folder(videos):
        if folder.casefold() not in by_folder:
            raise DatasetError(f"{path}: folder {folder!r} is no class of {splits}; move it elsewhere or fix the lists")
        label = by_folder[folder.casefold()]
        class_name = class_names[label]
        entry = (class_name, _comparable(path.stem))
        if entry in listed:
            on_lists.add(entry)
        found.append(_video(path, class_name, label, listed[entry][1] if entry in listed else {}))
    missing = [f"{class_name}/{listed[class_name, stem][0]}" for class_name, stem in sorted(listed.keys() - on_lists)]
    if not on_lists:
        raise DatasetError(
            f"{videos}: holds none of the {len(listed)} videos that {splits} lists, such as {missing[0]}"
        )
    return Dataset(
        name=name,
        class_names=class_names,
        videos=_in_key_order(found),
        listed=len(listed),
        missing=tuple(missing),
        ignored=_ignored(videos),
        folder=videos,
        lists=splits,
    )


def _scan_class_folders(name: str, videos: Path) -> Dataset:
    files = _scan_folder(videos)
    class_names = tuple(sorted({folder for folder, _ in files}))
    found = [_video(path, folder, class_names.index(folder), {}) for folder, path in files]
    return Dataset(
        name=name,
        class_names=class_names,
        videos=_in_key_order(found),
        listed=0,
        missing=(),
        ignored=_ignored(videos),
        folder=videos,
        lists=None,
    )


def _video(path: Path, class_name: str, label: int, splits: dict[int, Subset]) -> Video:
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:  # bytes of another encoding, which neither JSON nor Parquet can hold
        raise DatasetError(f"{os.fsencode(path)!r}: the name is not UTF-8; rename the file") from None
    key = f"{class_name}/{path.stem}".replace("%", "%25").replace(".", "%2E")
    # webdataset passes over folders called like __this__, or like some__this__
    key = re.sub(r"__/", "_%5F/", key) if re.match(r"[^/]*__[^/]*__/", key) else key
    return Video(
        key=key,
        path=path,
        class_name=class_name,
        label=label,
        group=_group(class_name, path.stem),
        splits=splits,
    )


def _in_key_order(found: list[Video]) -> tuple[Video, ...]:
    by_key: dict[str, Video] = {}
    for video in found:
        if video.key in by_key:
            raise DatasetError(
                f"{video.path} and {by_key[video.key].path}: both give the key {video.key!r}; keep one of them"
            )
        by_key[video.key] = video
    return tuple(by_key[key] for key in sorted(by_key))


# (class, comparable stem) -> (file name as listed, {split: subset})
_Lists = dict[tuple[str, str], tuple[str, dict[int, Subset]]]


def _comparable(stem: str) -> str:
    return unicodedata.normalize("NFC", stem).casefold().replace("@", "#")


def _group(class_name: str, stem: str) -> str:
    """UCF-101: class and g01..g25. HMDB-51 names no groups; its clips are grouped by the film that they come from."""
    ucf = re.search(r"_(g\d\d)_c\d\d$", stem)
    if ucf:
        return f"{class_name}/{ucf[1]}"
    hmdb = re.match(rf"(.*)_{re.escape(class_name)}_[hulf]_(?:cm|nm)_np\d+_", stem, re.I)
    return hmdb[1] if hmdb else ""


def _lines(path: Path) -> Iterable[tuple[int, str]]:
    """Numbered lines that hold something; the lists mix LF and CRLF and are Latin-1 at worst."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        text = path.read_text("latin-1")
    return ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip())


def _read_class_index(path: Path) -> tuple[str, ...]:
    classes: dict[int, str] = {}
    for number, line in _lines(path):
        parts = line.split(maxsplit=1)
        if len(parts) != 2 or not parts[0].isdigit():
            raise DatasetError(f"{path}:{number}: expected '<number> <class>', found {line!r}")
        if int(parts[0]) in classes or parts[1].casefold() in map(str.casefold, classes.values()):
            raise DatasetError(f"{path}:{number}: {line!r} repeats a number or a class; remove one of the two lines")
        classes[int(parts[0])] = parts[1]
    if sorted(classes) != list(range(1, len(classes) + 1)):
        raise DatasetError(f"{path}: class numbers are not 1..{len(classes)} without gaps")
    return tuple(classes[index] for index in sorted(classes))


def _read_ucf_lists(splits: Path) -> tuple[tuple[str, ...], _Lists]:
    """trainlistNN.txt: 'Class/v_Class_gXX_cYY.avi <1-based label>'; testlistNN.txt: the same without the label."""
    index = splits / "classInd.txt"
    if not index.is_file():
        raise DatasetError(f"{index}: missing; it defines the labels")
    class_names = _read_class_index(index)
    listed: _Lists = {}
    subsets: tuple[Subset, ...] = ("train", "test")
    for subset in subsets:
        for path in sorted(splits.glob(f"{subset}list[0-9][0-9].txt")):
            split = int(path.stem[-2:])
            for number, line in _lines(path):
                name, _, label = line.rpartition(" ") if re.search(r" \d+$", line) else (line, "", "")
                class_name, _, file_name = name.strip().partition("/")
                if class_name not in class_names or not file_name:
                    raise DatasetError(f"{path}:{number}: {line!r} names no class of {index}")
                if label and int(label) != class_names.index(class_name) + 1:
                    raise DatasetError(f"{path}:{number}: {class_name} has label {label}, but another in {index}")
                _add(listed, class_name, file_name, split, subset, path)
    if not listed:
        raise DatasetError(f"{splits}: no trainlistNN.txt or testlistNN.txt with a line in it")
    return class_names, listed


def _read_hmdb_lists(splits: Path) -> tuple[tuple[str, ...], _Lists]:
    """<class>_test_split<n>.txt: '<file> <code> ' where 1 is train, 2 is test and 0 is unused in that split."""
    paths: list[tuple[str, int, Path]] = []
    for entry in os.scandir(splits):
        match = re.fullmatch(r"(.+)_test_split(\d+)\.txt", entry.name)
        if match:
            paths.append((match[1], int(match[2]), Path(entry.path)))
    if not paths:
        raise DatasetError(f"{splits}: no <class>_test_split<n>.txt in it")
    spellings: dict[str, str] = {}
    for class_name, _, path in sorted(paths):
        if spellings.setdefault(class_name.casefold(), class_name) != class_name:
            raise DatasetError(f"{path}: {spellings[class_name.casefold()]!r} is spelt otherwise elsewhere; rename it")
    listed: _Lists = {}
    codes: dict[str, Subset | None] = {"0": None, "1": "train", "2": "test"}
    for class_name, split, path in sorted(paths):
        for number, line in _lines(path):
            file_name, _, code = line.rpartition(" ")
            if code not in codes or not file_name.strip():
                raise DatasetError(f"{path}:{number}: expected '<file> <0, 1 or 2>', found {line!r}")
            _add(listed, class_name, file_name.strip(), split, codes[code], path)
    return tuple(sorted({class_name for class_name, _, _ in paths})), listed


def _add(listed: _Lists, class_name: str, file_name: str, split: int, subset: Subset | None, path: Path) -> None:
    key = (class_name, _comparable(Path(file_name).stem))
    in_splits = listed.setdefault(key, (file_name, {}))[1]
    if subset is None:
        return
    if in_splits.get(split, subset) != subset:
        raise DatasetError(f"{path}: {class_name}/{file_name} is in train and in test of split {split}")
    in_splits[split] = subset


def _check_counts(name: str, splits: Path, class_names: tuple[str, ...], listed: _Lists) -> None:
    videos, classes, per_split = OFFICIAL_COUNTS[name]
    have = {
        split: tuple(sum(uses.get(split) == subset for _, uses in listed.values()) for subset in ("train", "test"))
        for split in per_split
    }
    if (len(listed), len(class_names), have) != (videos, classes, per_split):
        raise DatasetError(
            f"{splits}: not {name}'s official lists: found {len(listed)} videos, {len(class_names)} classes, "
            f"(train, test) {have}; expected {videos}, {classes}, {per_split}. Download the lists again"
        )


def _scan_folder(videos: Path) -> list[tuple[str, Path]]:
    found = _video_files(videos)
    if not found:
        raise DatasetError(f"{videos}: no video in it; expected <class>/<video>.avi")
    return found


def _video_files(videos: Path) -> list[tuple[str, Path]]:
    """(class folder, file) of every video, sorted. os.scandir, not glob: names of HMDB-51 hold brackets."""
    visible = (entry for entry in os.scandir(videos) if entry.is_dir() and not entry.name.startswith("."))
    folders = sorted(visible, key=lambda entry: entry.name)
    return [
        (folder.name, Path(entry.path))
        for folder in folders
        for entry in sorted(os.scandir(folder.path), key=lambda entry: entry.name)
        if _is_video(entry)
    ]


def _is_video(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(VIDEO_SUFFIXES) and not entry.name.startswith(".") and entry.is_file()


def _ignored(videos: Path) -> tuple[str, ...]:
    """What lies among the videos and is none: to be told, not acted on."""
    entries = list(os.scandir(videos))
    inside = [entry for folder in entries if folder.is_dir() for entry in os.scandir(folder.path)]
    loose = [entry for entry in entries if not entry.is_dir()]
    found = [e for e in (*loose, *(e for e in inside if not _is_video(e))) if not e.name.startswith(".")]
    return tuple(sorted(str(Path(entry.path).relative_to(videos)) for entry in found))
