"""Clips out of shards: any K frames of any video by random access, or whole shards as a stream.

`open_shards` needs numpy, pyarrow and simplejpeg alone: the index says where each JPEG lies, so that K frames cost K
reads and nothing else. `stream` is plain WebDataset, for shards behind a URL or for code that already speaks it.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import simplejpeg


class ShardError(ValueError):
    """A shard folder, or one video in it, that cannot be read; the message names it and says what to do."""


class ShardSet:
    """The videos of a shard folder, in key order; row numbers 0..len-1 name them.

    `manifest` is manifest.json; `keys`, `labels` (int32), `num_frames` (int32) and `groups` are columns of the index.
    Safe to use from forked or spawned workers: files are opened per process, at the first read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        missing = [name for name in ("manifest.json", "index.parquet") if not (self.folder / name).is_file()]
        if missing:
            raise ShardError(f"{self.folder}: not a finished shard folder, no {missing[0]}; run `pasnet shards build`")
        self.manifest: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text("utf-8"))
        table = pq.read_table(self.folder / "index.parquet").combine_chunks()
        self.keys: list[str] = table["key"].to_pylist()
        self.groups: list[str] = table["group"].to_pylist()
        self.labels = table["label"].to_numpy()
        self.num_frames = table["num_frames"].to_numpy()
        self._splits = {split: np.array(table[f"split{split}"].to_pylist(), dtype=object) for split in (1, 2, 3)}
        self._shards: list[str] = table["shard"].to_pylist()
        self._offsets = table["offset"].to_numpy()
        frame_offsets = table["frame_offsets"].chunk(0)
        self._frame_offsets = frame_offsets.values.to_numpy()  # all videos end to end; no Python object per frame
        self._first = frame_offsets.offsets.to_numpy()
        self._files: dict[tuple[int, str], int] = {}

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names by label."""
        return tuple(self.manifest["class_names"])

    @property
    def digest(self) -> str:
        """sha256 over every video's key, label, splits and frames: the identity of the data."""
        return self.manifest["digest"]

    def select(self, split: int, subset: str) -> np.ndarray:
        """Row numbers of a subset ("train" or "test") of an official split. Raises ShardError when there are none."""
        if split not in self._splits:
            raise ShardError(f"split {split} does not exist; {self.manifest['dataset']} has splits {self.splits}")
        rows = np.flatnonzero(self._splits[split] == subset)
        if not len(rows):
            raise ShardError(f"{self.folder}: no {subset} video in split {split}; it has splits {self.splits}")
        return rows

    @property
    def splits(self) -> tuple[int, ...]:
        """Split numbers that have videos in both subsets."""
        return tuple(s for s, of in self._splits.items() if (of == "train").any() and (of == "test").any())

    def read_jpegs(self, row: int, indices: Sequence[int] | np.ndarray) -> list[bytes]:
        """The JPEGs of some frames of one video, one read for each; a frame asked for twice is read once."""
        n = int(self.num_frames[row])
        offsets = self._frame_offsets[self._first[row] : self._first[row] + n + 1]
        file = self._open(self._shards[row])
        found: dict[int, bytes] = {}
        for index in indices:
            if not 0 <= index < n:
                raise IndexError(f"{self.keys[row]}: frame {index} asked for, it has frames 0 to {n - 1}")
            if index not in found:
                size = int(offsets[index + 1] - offsets[index])
                found[index] = os.pread(file, size, int(self._offsets[row] + offsets[index]))
        return [found[index] for index in indices]

    def read_frames(self, row: int, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """RGB frames, uint8, shape (len(indices), height, width, 3). Raises ShardError for damaged data."""
        jpegs = self.read_jpegs(row, indices)
        try:
            return np.stack([simplejpeg.decode_jpeg(jpeg) for jpeg in jpegs])
        except ValueError as error:
            raise ShardError(
                f"{self.folder / self._shards[row]}: frames of {self.keys[row]} are damaged ({error}); "
                f"delete that file and run `pasnet shards build` again"
            ) from error

    def _open(self, shard: str) -> int:
        place = (os.getpid(), shard)
        if place not in self._files:
            try:
                self._files[place] = os.open(self.folder / shard, os.O_RDONLY)
            except OSError as error:
                raise ShardError(f"{self.folder / shard}: {error.strerror}; run `pasnet shards build` again") from error
        return self._files[place]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}


def open_shards(folder: Path) -> ShardSet:
    """Opens a folder that `pasnet shards build` made. Raises ShardError when it is none or is not finished."""
    return ShardSet(folder)


def split_frames(sample: dict[str, Any]) -> list[bytes]:
    """The JPEGs of a sample as plain WebDataset or Hugging Face datasets yields it (fields `json` and `mjpeg`)."""
    meta = sample["json"] if isinstance(sample["json"], dict) else json.loads(sample["json"])
    ends = np.cumsum([0, *meta["frame_sizes"]])
    frames: bytes = sample["mjpeg"]
    return [frames[start:end] for start, end in itertools.pairwise(ends)]


def stream(urls: str | Sequence[str], choose: Callable[[int], Iterable[int]], *, shuffle: int = 0) -> Any:
    """A webdataset pipeline of {"key", "label", "frames" (K,H,W,3) uint8}; `choose` gets a video's frame count.

    `urls` are what webdataset takes (paths, brace patterns, pipes). Only the chosen frames are decoded.
    """
    import webdataset

    def clip(sample: dict[str, Any]) -> dict[str, Any]:
        meta, jpegs = json.loads(sample["json"]), split_frames(sample)
        frames = np.stack([simplejpeg.decode_jpeg(jpegs[index]) for index in choose(len(jpegs))])
        return {"key": meta["key"], "label": meta["label"], "frames": frames}

    return webdataset.WebDataset(urls, shardshuffle=False).shuffle(shuffle).map(clip)
