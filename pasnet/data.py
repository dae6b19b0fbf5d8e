"""Shards -> batches of clips: the only module of pasnet that knows shards.

Everything random about a sample is a function of (seed, epoch, row of the index), drawn in `ClipDataset.__getitem__`
and nowhere else: the batches are the same for any number of loader workers, and a resumed run sees what an
uninterrupted one would have seen. Frames stay uint8 up to the network, which normalises (a quarter of the bytes).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pasnet.compat import allow_torchvision
from pasnet.config import DataConfig
from shards import ShardSet, open_shards, segment_indices

allow_torchvision()
from torchvision.transforms.v2 import functional as tv  # noqa: E402  (needs the line above on a CPU-only torch)

__all__ = ["Batch", "ClipDataset", "Loader", "ShardSet", "centre_crop", "open_shards", "train_crop"]

CENTRE_CROP = 224 / 256  # of the frame height, at test time


class Batch(NamedTuple):
    """`clips` uint8 RGB (B, K, 3, S, S); `labels` int64 (B,); `rows` int64 (B,) in the index; `frames` int64 (B, K)."""

    clips: Tensor
    labels: Tensor
    rows: Tensor
    frames: Tensor


def train_crop(height: int, width: int, config: DataConfig, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a training crop. One per clip: all K frames share it.

    multiscale: TSN's and ECO's corner crop. Height and width are shares of the short side, at most one step of
    `scales` apart, at one of 13 places (corners, centre, edge middles, quarter points). random: 224/256 of the short
    side, anywhere.
    """
    short = min(height, width)
    if config.crop == "random":
        size = round(short * CENTRE_CROP)
        return int(rng.integers(height - size + 1)), int(rng.integers(width - size + 1)), size, size
    sizes = [int(short * scale) for scale in config.scales]
    pairs = [(h, w) for i, h in enumerate(sizes) for j, w in enumerate(sizes) if abs(i - j) <= 1]
    h, w = pairs[rng.integers(len(pairs))]
    places = [(y, x) for y in (0, 2, 4) for x in (0, 2, 4)] + [(y, x) for y in (1, 3) for x in (1, 3)]
    y, x = places[rng.integers(len(places))]
    return y * (height - h) // 4, x * (width - w) // 4, h, w


def centre_crop(height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the centre crop: 224x224 of a 256x340 frame."""
    size = round(min(height, width) * CENTRE_CROP)
    return (height - size) // 2, (width - size) // 2, size, size


class ClipDataset(Dataset[tuple[Tensor, int, int, np.ndarray]]):
    """Clips of some videos. An item is asked for as (epoch, row), so that workers need not know the epoch."""

    def __init__(self, shards: ShardSet, config: DataConfig, *, train: bool, seed: int) -> None:
        self.shards, self.config, self.train, self.seed = shards, config, train, seed

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int, int, np.ndarray]:
        epoch, row = item
        config, num_frames = self.config, int(self.shards.num_frames[row])
        rng = np.random.default_rng([self.seed, epoch, row]) if self.train else None
        indices = segment_indices(num_frames, config.num_segments, rng)
        frames = torch.from_numpy(self.shards.read_frames(row, indices)).permute(0, 3, 1, 2)  # (K, 3, H, W), no copy
        height, width = frames.shape[-2:]
        crop = centre_crop(height, width) if rng is None else train_crop(height, width, config, rng)
        size = [config.input_size, config.input_size]
        frames = tv.resized_crop(frames, *crop, size, antialias=True)  # (K, 3, S, S)
        if rng is not None and config.flip and rng.random() < 0.5:
            frames = tv.horizontal_flip(frames)
        return frames.contiguous(), int(self.shards.labels[row]), row, indices


class _Batches(Sampler[list[tuple[int, int]]]):
    """Lists of (epoch, row). Training order is a permutation drawn from (seed, epoch); a test list keeps its order."""

    def __init__(self, rows: np.ndarray, batch: int, *, seed: int | None) -> None:
        self.rows, self.batch, self.seed, self.epoch = rows, batch, seed, 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rows = self.rows
        if self.seed is not None:
            rows = np.random.default_rng([self.seed, self.epoch]).permutation(rows)
        for start in range(0, len(rows), self.batch):
            yield [(self.epoch, int(row)) for row in rows[start : start + self.batch]]

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch)


def _collate(items: list[tuple[Tensor, int, int, np.ndarray]]) -> Batch:
    clips, labels, rows, frames = zip(*items, strict=True)
    return Batch(torch.stack(clips), torch.tensor(labels), torch.tensor(rows), torch.from_numpy(np.stack(frames)))


class Loader:
    """Batches of one subset. No clip is dropped: the last batch may be smaller.

    `epoch(n)` iterates over epoch n; `rows` are the index rows that it visits, each once.
    """

    def __init__(self, shards: ShardSet, config: DataConfig, *, subset: str, batch: int, seed: int) -> None:
        train = subset == "train"
        self.rows = shards.select(config.split, subset)
        if train and config.train_fraction < 1:
            self.rows = _share_per_class(self.rows, shards.labels, config.train_fraction)
        self._batches = _Batches(self.rows, batch, seed=seed if train else None)
        self._loader = DataLoader(
            ClipDataset(shards, config, train=train, seed=seed),
            batch_sampler=self._batches,
            collate_fn=_collate,
            num_workers=config.workers,
            persistent_workers=config.workers > 0,
            pin_memory=torch.cuda.is_available(),
            # else each new iterator draws from the global generator, and dropout would depend on the worker count
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self._batches)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch, counted from 0."""
        self._batches.epoch = epoch
        return iter(self._loader)


def _share_per_class(rows: np.ndarray, labels: np.ndarray, fraction: float) -> np.ndarray:
    """The first part of every class in key order, at least one video: mostly whole groups, one may be cut."""
    kept = [
        of[: max(1, round(len(of) * fraction))] for of in (rows[labels[rows] == c] for c in np.unique(labels[rows]))
    ]
    return np.sort(np.concatenate(kept))
