"""Shards -> batches of clips: the only module of pasnet that knows shards.

Everything random about a sample is a function of (seed, epoch, video), settled in shards/clips.py: the batches are
the same for any number of loader workers, and a resumed run sees what an uninterrupted one would have seen. Frames
stay uint8 up to the network, which normalises (a quarter of the bytes). For a GPU the loader hands over the JPEGs'
own planes, half the bytes of RGB, in shared memory that is used again and again; the GPU makes RGB of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pasnet.config import DataConfig
from shards import Batches, Clips, ShardSet, View, centre, clip_shape, open_shards, segment_indices

__all__ = ["Batch", "ClipDataset", "Loader", "ShardSet", "open_shards", "rgb_of_planes", "train_view"]

CENTRE_CROP = 224 / 256  # of the frame height, at test time


class Batch(NamedTuple):
    """`clips` uint8 RGB (B, K, 3, S, S); `labels` int64 (B,); `rows` int64 (B,) in the index; `frames` int64 (B, K)."""

    clips: Tensor
    labels: Tensor
    rows: Tensor
    frames: Tensor


def train_view(height: int, width: int, rng: np.random.Generator | None, *, config: DataConfig) -> View:
    """The part of the frames that a training clip shows. One per clip: all K frames share it.

    multiscale: TSN's and ECO's corner crop. Height and width are shares of the short side, at most one step of
    `scales` apart, at one of 13 places (corners, centre, edge middles, quarter points). random: 224/256 of the short
    side, anywhere. Half of the clips are mirrored if config.flip. (What is read starts at an even pixel: see View.)
    """
    assert rng is not None  # training clips have a seed
    short = min(height, width)
    if config.crop == "random":
        size = round(short * CENTRE_CROP)
        top, left, h, w = int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1)), size, size
    else:
        sizes = [int(short * scale) for scale in config.scales]
        pairs = [(h, w) for i, h in enumerate(sizes) for j, w in enumerate(sizes) if abs(i - j) <= 1]
        h, w = pairs[rng.integers(len(pairs))]
        places = [(y, x) for y in (0, 2, 4) for x in (0, 2, 4)] + [(y, x) for y in (1, 3) for x in (1, 3)]
        y, x = places[rng.integers(len(places))]
        top, left = y * (height - h) // 4, x * (width - w) // 4
    return View(top, left, h, w, flip=config.flip and rng.random() < 0.5)


def rgb_of_planes(planes: Tensor, size: int) -> Tensor:
    """uint8 (..., S * S * 3 // 2) planes, as ShardSet.read_clip gives them, -> uint8 RGB (..., 3, S, S); S = `size`.

    Full range BT.601, the matrix of JFIF; chroma is interpolated, as JPEG decoders do. Runs where `planes` is.
    """
    frames = planes.reshape(-1, size * size * 3 // 2)
    y = frames[:, : size * size].reshape(-1, 1, size, size).float()
    chroma = frames[:, size * size :].reshape(-1, 2, size // 2, size // 2).float() - 128
    chroma = nn.functional.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
    u, v = chroma[:, :1], chroma[:, 1:]
    rgb = torch.cat((y + 1.402 * v, y - 0.344136 * u - 0.714136 * v, y + 1.772 * u), 1)
    return rgb.round_().clamp_(0, 255).to(torch.uint8).reshape(*planes.shape[:-1], 3, size, size)


def _clips(shards: ShardSet, config: DataConfig, *, train: bool, seed: int, planes: bool = False) -> Clips:
    return Clips(
        shards,
        functools.partial(segment_indices, num_segments=config.num_segments),
        look=functools.partial(train_view, config=config) if train else centre,
        size=(config.input_size, config.input_size),
        colour="yuv" if planes else "rgb",
        seed=seed if train else None,
    )


class ClipDataset(Dataset[tuple[Tensor, int, int, np.ndarray]]):
    """Clips of some videos. An item is asked for as (epoch, row), so that workers need not know the epoch."""

    def __init__(self, shards: ShardSet, config: DataConfig, *, train: bool, seed: int) -> None:
        self.clips = _clips(shards, config, train=train, seed=seed)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int, int, np.ndarray]:
        clip = self.clips[item]
        return torch.from_numpy(clip.frames), clip.label, item[1], clip.indices  # (K, 3, S, S)


class _Ring(Dataset[tuple[int, list[int], list[int], np.ndarray]]):
    """Batches of planes, written by the workers into slots of one block of shared memory that is made once.

    A DataLoader makes new shared memory for every batch, and the kernel has to clear and map each of its pages:
    more than a millisecond a clip (docs/performance.md). A batch is asked for as a list of (slot, (epoch, row)).
    """

    def __init__(self, clips: Clips, num_segments: int, batch: int, slots: int) -> None:
        shape = clip_shape(num_segments, clips.size, "yuv")
        self.clips = clips
        self.memory = torch.zeros(slots, batch, *shape, dtype=torch.uint8).share_memory_()

    def __getitems__(self, items: list[tuple[int, tuple[int, int]]]) -> tuple[int, list[int], list[int], np.ndarray]:
        slot = items[0][0]
        read = [self.clips.read(item, out=self.memory[slot, place].numpy()) for place, (_, item) in enumerate(items)]
        rows = [row for _, (_, row) in items]
        return slot, [clip.label for clip in read], rows, np.stack([clip.indices for clip in read])


class _Slots:
    """The batches with a slot number for each: one that is free again when its turn comes."""

    def __init__(self, batches: Batches, slots: int) -> None:
        self.batches, self.slots = batches, slots

    def __iter__(self) -> Iterator[list[tuple[int, tuple[int, int]]]]:
        for number, items in enumerate(self.batches):
            yield [(number % self.slots, item) for item in items]

    def __len__(self) -> int:
        return len(self.batches)


def _collate(items: list[tuple[Tensor, int, int, np.ndarray]]) -> Batch:
    clips, labels, rows, frames = zip(*items, strict=True)
    return Batch(torch.stack(clips), torch.tensor(labels), torch.tensor(rows), torch.from_numpy(np.stack(frames)))


def _as_it_is(batch: Any) -> Any:
    return batch


class Loader:
    """Batches of one subset. No clip is dropped: the last batch may be smaller.

    `epoch(n)` iterates over epoch n; `rows` are the index rows that it visits, each once. With a CUDA `device` clips
    are already there. `planes` hands over planes instead (for benchmarks, and for other users of them): see `planes`.
    """

    PREFETCH = 2  # batches that each worker works ahead

    def __init__(
        self,
        shards: ShardSet,
        config: DataConfig,
        *,
        subset: str,
        batch: int,
        seed: int,
        device: torch.device | str = "cpu",
        planes: bool = False,
    ) -> None:
        train, workers = subset == "train", config.workers
        self.rows = shards.select(config.split, subset)
        if train and config.train_fraction < 1:
            self.rows = _share_per_class(self.rows, shards.labels, config.train_fraction)
        self.size, self.device = config.input_size, torch.device(device)
        self._batches = Batches(self.rows, batch, seed=seed if train else None)
        # else each new iterator draws from the global generator, and dropout would depend on the worker count
        options: dict[str, Any] = {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "generator": torch.Generator(),
        }
        if workers:
            options["prefetch_factor"] = self.PREFETCH
        self._ring: _Ring | None = None
        if planes or self.device.type == "cuda":
            slots = workers * self.PREFETCH + 2  # being filled, waiting, and the one in the caller's hands
            clips = _clips(shards, config, train=train, seed=seed, planes=True)
            self._ring = _Ring(clips, config.num_segments, min(batch, len(self.rows)), slots)
            self._loader: DataLoader[Any] = DataLoader(
                self._ring, batch_sampler=_Slots(self._batches, slots), collate_fn=_as_it_is, **options
            )
        else:
            data = ClipDataset(shards, config, train=train, seed=seed)
            self._loader = DataLoader(data, batch_sampler=self._batches, collate_fn=_collate, **options)

    def __len__(self) -> int:
        return len(self._batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, counted from 0, without the first `start`."""
        if self._ring is None:
            self._batches.epoch, self._batches.start = epoch, start
            yield from self._loader
            return
        for batch in self.planes(epoch, start):
            clips = batch.clips.to(self.device)  # not asynchronous: the slot is free again afterwards
            yield batch._replace(clips=rgb_of_planes(clips, self.size))

    def planes(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """As `epoch`, with `clips` uint8 (B, K, S * S * 3 // 2), in memory that is valid until the next batch."""
        assert self._ring is not None, "the loader was made without planes"
        self._batches.epoch, self._batches.start = epoch, start
        for slot, labels, rows, frames in self._loader:
            clips = self._ring.memory[slot, : len(rows)]
            yield Batch(clips, torch.tensor(labels), torch.tensor(rows), torch.from_numpy(frames))


def _share_per_class(rows: np.ndarray, labels: np.ndarray, fraction: float) -> np.ndarray:
    """The first part of every class in key order, at least one video: mostly whole groups, one may be cut."""
    kept = [
        of[: max(1, round(len(of) * fraction))] for of in (rows[labels[rows] == c] for c in np.unique(labels[rows]))
    ]
    return np.sort(np.concatenate(kept))
