"""Frames out of shards by random access: any K frames of any video cost K reads, and nothing else is read.

The index says where each JPEG lies. Clips for training are in clips.py, whole shards as a stream in stream.py.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import simplejpeg

from shards.format import FORMAT_VERSION

Colour = Literal["rgb", "yuv"]


class ShardError(ValueError):
    """A shard folder, or one video in it, that cannot be read; the message names it and says what to do."""


class View(NamedTuple):
    """What part of the frames a clip shows: a rectangle in pixels, and whether it is mirrored left to right.

    All four numbers are rounded down to even ones, since colour has half the resolution of brightness.
    """

    top: int
    left: int
    height: int
    width: int
    flip: bool = False


class ShardSet:
    """The videos of a shard folder, in key order; row numbers 0..len-1 name them.

    `manifest` is manifest.json; `keys`, `videos` (file names), `labels` (int32), `num_frames` (int32) and `groups`
    are columns of the index.
    Safe to use from threads and from forked or spawned workers.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        missing = [name for name in ("manifest.json", "index.parquet") if not (self.folder / name).is_file()]
        if missing:
            raise ShardError(f"{self.folder}: not a finished shard folder, no {missing[0]}; run `pasnet shards build`")
        try:
            self._open()
        except (KeyError, TypeError, AttributeError, OSError, ValueError) as error:
            if isinstance(error, ShardError):
                raise
            raise ShardError(
                f"{self.folder}: manifest.json or index.parquet is damaged ({type(error).__name__}: {error}); "
                f"run `pasnet shards repair {self.folder}`"
            ) from error

    def _open(self) -> None:
        self.manifest: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text("utf-8"))
        if self.manifest["format"] > FORMAT_VERSION:
            raise ShardError(
                f"{self.folder}: format {self.manifest['format']}, this version reads up to {FORMAT_VERSION}; update it"
            )
        # ParquetFile and from_dlpack, since read_table and to_numpy import pyarrow.dataset and pandas: 0.2 s
        with pq.ParquetFile(self.folder / "index.parquet") as file:
            has_crc = "frame_crc32" in file.schema_arrow.names
            columns = ["key", "video", "group", "label", "num_frames", "split1", "split2", "split3", "shard", "offset"]
            table = file.read([*columns, "frame_offsets", *(["frame_crc32"] if has_crc else [])]).combine_chunks()
        if not len(table) or any(table[name].null_count for name in columns if not name.startswith("split")):
            raise ValueError("it has no rows, or rows without values")

        def numbers(array: Any) -> np.ndarray:
            return np.from_dlpack(array)

        self.keys: list[str] = table["key"].to_pylist()
        self.videos: list[str] = table["video"].to_pylist()
        self.groups: list[str] = table["group"].to_pylist()
        self.labels = numbers(table["label"].chunk(0))
        self.num_frames = numbers(table["num_frames"].chunk(0))
        self._subsets = {
            (split, subset): np.array([value == subset for value in table[f"split{split}"].to_pylist()])
            for split in (1, 2, 3)
            for subset in ("train", "test")
        }
        shards = table["shard"].chunk(0).dictionary_encode()
        self._shard_names: list[str] = shards.dictionary.to_pylist()
        self._shard_of = numbers(shards.indices)
        self._offsets = numbers(table["offset"].chunk(0))
        frame_offsets = table["frame_offsets"].chunk(0)
        self._frame_offsets = numbers(frame_offsets.values)  # all videos end to end; no Python object per frame
        self._first = numbers(frame_offsets.offsets)
        self._crc32 = numbers(table["frame_crc32"].chunk(0).values) if has_crc else None
        self._local = threading.local()

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names by label."""
        return tuple(self.manifest["class_names"])

    @property
    def digest(self) -> str:
        """sha256 over every video's key, label, splits and frames: the identity of the data."""
        return str(self.manifest["digest"])

    @property
    def frame_size(self) -> tuple[int, int]:
        """(height, width) of every stored frame."""
        return self.manifest["decode"]["height"], self.manifest["decode"]["width"]

    @property
    def splits(self) -> tuple[int, ...]:
        """Split numbers that have videos in both subsets."""
        return tuple(s for s in (1, 2, 3) if self._subsets[s, "train"].any() and self._subsets[s, "test"].any())

    def select(self, split: int, subset: str) -> np.ndarray:
        """Row numbers of a subset ("train" or "test") of an official split. Raises ShardError when there are none."""
        if split not in (1, 2, 3):
            raise ShardError(f"split {split} does not exist; {self.manifest['dataset']} has splits {self.splits}")
        if subset not in ("train", "test"):
            raise ShardError(f"unknown subset {subset!r} (one of: train, test)")
        rows = np.flatnonzero(self._subsets[split, subset])
        if not len(rows):
            raise ShardError(f"{self.folder}: no {subset} video in split {split}; it has splits {self.splits}")
        return rows

    def read_jpegs(self, row: int, indices: Sequence[int] | np.ndarray) -> list[bytes]:
        """The JPEGs of some frames of one video, one read for each; a frame asked for twice is read once.

        Raises IndexError for a frame that the video does not have, ShardError when the file is not there or the bytes
        are not those that were written.
        """
        n, first = int(self.num_frames[row]), int(self._first[row])
        path = self.folder / self._shard_names[self._shard_of[row]]
        found: dict[int, bytes] = {}
        try:  # opened anew for every clip: ten microseconds, and no limit on shards, no sharing with forks
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ShardError(f"{path}: {error.strerror}; run `pasnet shards repair {self.folder}`") from error
        try:
            for index in map(int, indices):
                if not 0 <= index < n:
                    raise IndexError(f"{self.keys[row]}: frame {index} asked for, it has frames 0 to {n - 1}")
                if index not in found:
                    start, end = self._frame_offsets[first + index : first + index + 2].tolist()
                    jpeg = os.pread(file, end - start, int(self._offsets[row]) + start)
                    # frame_offsets holds one number more than there are frames, for each video before this one
                    known = None if self._crc32 is None else int(self._crc32[first - row + index])
                    if len(jpeg) != end - start or known not in (None, zlib.crc32(jpeg)):
                        raise ShardError(
                            f"{path}: frame {index} of {self.keys[row]} is damaged; "
                            f"run `pasnet shards repair {self.folder}`"
                        )
                    found[index] = jpeg
        finally:
            os.close(file)
        return [found[int(index)] for index in indices]

    def read_frames(self, row: int, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Whole RGB frames, uint8, shape (len(indices), height, width, 3). Errors as for `read_jpegs`."""
        return np.stack([simplejpeg.decode_jpeg(jpeg) for jpeg in self.read_jpegs(row, indices)])

    def read_clip(
        self,
        row: int,
        indices: Sequence[int] | np.ndarray,
        view: View,
        size: tuple[int, int],
        *,
        colour: Colour = "rgb",
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Frames cropped to `view` and resized to `size` = (height, width), uint8, into `out` if given.

        Bilinear, or the mean over the area where it shrinks to two thirds and less.

        colour "rgb": shape (K, 3, height, width). "yuv": shape (K, height * width * 3 // 2), per frame the planes
        Y (height, width), U and V (height / 2, width / 2) end to end, full range BT.601 as in JPEG: half the bytes, and
        the device that the clip goes to can do the conversion. Raises ValueError for a view outside the frame or an odd
        size; otherwise as for `read_jpegs`.
        """
        jpegs = self.read_jpegs(row, indices)
        if out is None:
            out = np.empty(clip_shape(len(jpegs), size, colour), np.uint8)
        decoder = getattr(self._local, "decoder", None)
        if decoder is None:
            decoder = self._local.decoder = _ClipDecoder()
        decoder.decode(jpegs, view, size, colour, out)
        return out

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_local": None}  # a decoder belongs to its thread

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _local=threading.local())


def open_shards(folder: Path) -> ShardSet:
    """Opens a folder that `pasnet shards build` made. Raises ShardError when it is none or is not finished."""
    return ShardSet(folder)


def clip_shape(num_frames: int, size: tuple[int, int], colour: Colour) -> tuple[int, ...]:
    """Shape of what `read_clip` returns."""
    height, width = size
    if height < 2 or width < 2 or height % 2 or width % 2:
        raise ValueError(f"clip size must be even and at least 2, got {height}x{width}")
    if colour not in ("rgb", "yuv"):
        raise ValueError(f"unknown colour {colour!r} (one of: rgb, yuv)")
    return (num_frames, 3, height, width) if colour == "rgb" else (num_frames, height * width * 3 // 2)


class _ClipDecoder:
    """JPEGs -> crop and resize, of RGB or of the stored planes. One per thread: its buffers and codec are not shared.

    libjpeg-turbo (simplejpeg) is the fastest way to RGB; libavcodec hands over the planes as they are stored, without
    the conversion and for a tenth less (docs/performance.md).
    """

    def __init__(self) -> None:
        import av
        import cv2

        self._av, self._cv2 = av, cv2
        context = av.CodecContext.create("mjpeg", "r")
        assert isinstance(context, av.VideoCodecContext)
        context.thread_count = 1
        context.options = {"idct": "xvid"}  # a tenth of the whole faster than the default, within two steps of it
        self._context = context
        self._frame = bytearray()  # whole frame in RGB
        self._small: np.ndarray = np.empty((0, 0, 3), np.uint8)  # its view, resized

    def decode(
        self, jpegs: Sequence[bytes], view: View, size: tuple[int, int], colour: Colour, out: np.ndarray
    ) -> None:
        if out.shape != clip_shape(len(jpegs), size, colour) or out.dtype != np.uint8:
            raise ValueError(f"out must be uint8 of shape {clip_shape(len(jpegs), size, colour)}, got {out.shape}")
        top, left, height, width = (number // 2 * 2 for number in view[:4])
        view = View(top, left, height, width, view.flip)
        convert = self._to_yuv if colour == "yuv" else self._to_rgb
        done: dict[int, int] = {}  # a short video's repeated frames are the same bytes objects
        for number, jpeg in enumerate(jpegs):
            if id(jpeg) in done:
                out[number] = out[done[id(jpeg)]]
            else:
                done[id(jpeg)] = number
                convert(jpeg, view, size, out[number])

    def _to_rgb(self, jpeg: bytes, view: View, size: tuple[int, int], out: np.ndarray) -> None:
        height, width, _, _ = simplejpeg.decode_jpeg_header(jpeg)
        if len(self._frame) != height * width * 3:
            self._frame = bytearray(height * width * 3)
        if self._small.shape != (*size, 3):
            self._small = np.empty((*size, 3), np.uint8)
        frame = simplejpeg.decode_jpeg(jpeg, fastupsample=True, buffer=self._frame)
        top, left, h, w = _inside(view, height, width)
        small = self._resize(frame[top : top + h, left : left + w], size, self._small)
        self._cv2.split(self._cv2.flip(small, 1) if view.flip else small, [out[0], out[1], out[2]])

    def _to_yuv(self, jpeg: bytes, view: View, size: tuple[int, int], out: np.ndarray) -> None:
        [frame] = self._context.decode(self._av.Packet(jpeg))
        if frame.format.name != "yuvj420p":
            raise ValueError(f"expected JPEGs in 4:2:0, found {frame.format.name}")
        top, left, h, w = _inside(view, frame.height, frame.width)
        height, width = size
        start, half = 0, 1
        for plane in frame.planes:
            pixels = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)
            end = start + height * width // half**2
            target = out[start:end].reshape(height // half, width // half)
            cut = pixels[top // half : (top + h) // half, left // half : (left + w) // half]
            self._resize(cut, target.shape, target)
            if view.flip:
                self._cv2.flip(target, 1, dst=target)
            start, half = end, 2

    def _resize(self, pixels: np.ndarray, size: tuple[int, int], out: np.ndarray) -> np.ndarray:
        height, width = size
        # bilinear skips pixels where it shrinks by much; the mean over the area does not
        shrinks = pixels.shape[0] >= 1.5 * height and pixels.shape[1] >= 1.5 * width
        how = self._cv2.INTER_AREA if shrinks else self._cv2.INTER_LINEAR
        self._cv2.resize(pixels, (width, height), dst=out, interpolation=how)
        return out


def _inside(view: View, height: int, width: int) -> tuple[int, int, int, int]:
    top, left, h, w = view[:4]
    if top < 0 or left < 0 or h < 2 or w < 2 or top + h > height or left + w > width:
        raise ValueError(f"{view} does not fit into frames of {height}x{width}")
    return top, left, h, w


def split_frames(sample: dict[str, Any]) -> list[bytes]:
    """The JPEGs of a sample as plain WebDataset or Hugging Face datasets yields it (fields `json` and `mjpeg`)."""
    meta = sample["json"] if isinstance(sample["json"], dict) else json.loads(sample["json"])
    ends = itertools.accumulate(meta["frame_sizes"], initial=0)
    frames: bytes = sample["mjpeg"]
    return [frames[start:end] for start, end in itertools.pairwise(ends)]
