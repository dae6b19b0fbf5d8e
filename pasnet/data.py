"""Shards -> batches of clips: the only module of pasnet that knows shards.

Everything random about a sample is a function of (seed, epoch, video), settled in shards/clips.py: the batches are
the same for any number of loader workers, and a resumed run sees what an uninterrupted one would have seen. Frames
stay uint8 up to the network, which normalises (a quarter of the bytes). For a GPU the loader hands over whole frames
as the JPEGs' own planes, half the bytes of RGB, in shared memory that is used again and again; the GPU cuts, mirrors,
resizes and colours a batch at once.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pasnet.config import ConfigError, DataConfig
from shards import Batches, Clip, Clips, ShardSet, View, centre, clip_shape, eco_indices, open_shards, segment_indices

__all__ = [
    "Batch",
    "ClipDataset",
    "Loader",
    "Planes",
    "ShardSet",
    "View",
    "centre",
    "held_out",
    "lacking",
    "open_shards",
    "rgb_of_planes",
    "train_view",
]

CENTRE_CROP = 224 / 256  # of the frame height, at test time
_NONE = np.empty(0, np.uint8)  # instead of frames that lie in shared memory


class Batch(NamedTuple):
    """`clips` uint8 RGB (B, K, 3, S, S); `labels` int64 (B,); `rows` int64 (B,) in the index; `frames` int64 (B, K)."""

    clips: Tensor
    labels: Tensor
    rows: Tensor
    frames: Tensor


class Planes(NamedTuple):
    """What `rgb_of_planes` makes clips of: `planes` uint8 (B, K, H * W * 3 // 2), `views` int64 (B, 5); else as Batch.

    `planes` lie in memory that is valid until the next batch.
    """

    planes: Tensor
    views: Tensor
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


def rgb_of_planes(planes: Tensor, views: Tensor, frame_size: tuple[int, int], size: int) -> Tensor:
    """Whole frames as JPEG planes -> the part of them that each clip shows, as uint8 RGB (B, K, 3, S, S); S = `size`.

    `planes` uint8 (B, K, H * W * 3 // 2), as ShardSet.read_clip gives them; `views` int64 (B, 5), a View each, as even
    numbers as there; `frame_size` (H, W). Crop, mirror and resize are one bilinear sampling for all frames of a clip,
    which reads nothing outside the view; colour is full range BT.601, the matrix of JFIF. Frames much larger than S are
    sampled more densely and averaged, so that no pixel is skipped. Runs where `planes` is.
    """
    (height, width), (clips, k) = frame_size, planes.shape[:2]
    dense = max(1, round(min(frame_size) / size))
    top, left, h, w, flip = views.to(planes.device, torch.float32).T.unsqueeze(2)  # each (B, 1)
    top, left, h, w = (number.div(2, rounding_mode="floor") * 2 for number in (top, left, h, w))
    step = (torch.arange(size * dense, device=planes.device) + 0.5) / (size * dense)  # share of the view
    y, x = top + step * h, left + torch.where(flip.bool(), 1 - step, step) * w  # (B, S), 0 is the frame's edge

    def sample(channels: Tensor, half: int) -> Tensor:
        """Of planes half as large as the frame where `half` is 2: the share of the view is what they have in common."""
        rows = (y / half).clamp(top / half + 0.5, (top + h) / half - 0.5) * (2 * half / height) - 1
        columns = (x / half).clamp(left / half + 0.5, (left + w) / half - 0.5) * (2 * half / width) - 1
        grid = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), 3)  # (B, S, S, 2)
        found = nn.functional.grid_sample(channels.float(), grid, mode="bilinear", align_corners=False)
        return nn.functional.avg_pool2d(found, dense) if dense > 1 else found

    brightness = planes[..., : height * width].reshape(clips, k, height, width)
    colour = planes[..., height * width :].reshape(clips, 2 * k, height // 2, width // 2)
    luma = sample(brightness, 1)  # (B, K, S, S)
    u, v = sample(colour, 2).sub_(128).unflatten(1, (k, 2)).unbind(2)
    rgb = torch.stack((luma + 1.402 * v, luma - 0.344136 * u - 0.714136 * v, luma + 1.772 * u), 2)
    return rgb.round_().clamp_(0, 255).to(torch.uint8)


def _eco_indices(num_frames: int, num_segments: int, rng: np.random.Generator | None) -> np.ndarray:
    """ECO-pytorch's own, which evaluates in its mode "val"."""
    return eco_indices(num_frames, num_segments, "val" if rng is None else "train", rng)


_SAMPLING = {"segment": segment_indices, "eco_compatible": _eco_indices}


def _clips(shards: ShardSet, config: DataConfig, *, train: bool, seed: int, planes: bool = False) -> Clips:
    return Clips(
        shards,
        functools.partial(_SAMPLING[config.sampling], num_segments=config.num_segments),
        look=functools.partial(train_view, config=config) if train else centre,
        size=(config.input_size, config.input_size),
        colour="yuv" if planes else "rgb",
        seed=seed if train else None,
        crop=not planes,
    )


class ClipDataset(Dataset[tuple[Tensor, int, int, np.ndarray]]):
    """Clips of some videos. An item is asked for as (epoch, row), so that workers need not know the epoch."""

    def __init__(self, shards: ShardSet, config: DataConfig, *, train: bool, seed: int) -> None:
        self.clips = _clips(shards, config, train=train, seed=seed)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int, int, np.ndarray]:
        clip = self.clips[item]
        return torch.from_numpy(clip.frames), clip.label, item[1], clip.indices  # (K, 3, S, S)


class _Ring(Dataset[tuple[int, list[Clip], list[int]]]):
    """Batches of planes, written by the workers into slots of one block of shared memory that is made once.

    A DataLoader makes new shared memory for every batch, and the kernel has to clear and map each of its pages:
    more than a millisecond a clip (docs/performance.md). A batch is asked for as a list of (slot, (epoch, row)).
    """

    def __init__(self, clips: Clips, num_segments: int, batch: int, slots: int) -> None:
        shape = clip_shape(num_segments, clips.size, "yuv")
        self.clips = clips
        self.memory = torch.zeros(slots, batch, *shape, dtype=torch.uint8).share_memory_()

    def __getitems__(self, items: list[tuple[int, tuple[int, int]]]) -> tuple[int, list[Clip], list[int]]:
        slot = items[0][0]
        read = [self.clips.read(item, out=self.memory[slot, place].numpy()) for place, (_, item) in enumerate(items)]
        return slot, [clip._replace(frames=_NONE) for clip in read], [row for _, (_, row) in items]


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


def _leave_signals_to_the_parent(worker: int) -> None:
    """A signal to the whole group is the training's to answer, which needs its workers until the step is over."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:
    return batch


class Loader:
    """Batches of one subset. No clip is dropped: the last batch may be smaller (see Batches, also about `step`).

    `epoch(n)` iterates over epoch n; `rows` are the index rows that it visits, each once, over all `world` processes,
    of which this one, number `rank`, takes every world-th. "held_out" is the part of the training list that config
    keeps from training; it is shown as test clips are. With a CUDA `device` clips
    are already there, made on it; with `planes` they are on the CPU, too (for benchmarks and tests).
    """

    PREFETCH = 2  # batches that each worker works ahead

    def __init__(
        self,
        shards: ShardSet,
        config: DataConfig,
        *,
        subset: Literal["train", "held_out", "test"],
        batch: int,
        seed: int,
        device: torch.device | str = "cpu",
        planes: bool = False,
        rank: int = 0,
        world: int = 1,
        step: int | None = None,
    ) -> None:
        train, workers = subset == "train", config.workers
        self.rows = rows_of(shards, config, subset)
        if len(self.rows) < world:
            fix = "change data.held_out" if subset == "held_out" and not len(self.rows) else "use fewer processes"
            raise ConfigError(f"{shards.folder}: {len(self.rows)} {subset} videos for {world} processes; {fix}")
        self._shards, self.size, self.device = shards, config.input_size, torch.device(device)
        self._batches = Batches(self.rows, batch, seed=seed if train else None, rank=rank, world=world, step=step)
        # else each new iterator draws from the global generator, and dropout would depend on the worker count
        options: dict[str, Any] = {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "generator": torch.Generator(),
            "worker_init_fn": _leave_signals_to_the_parent,
        }
        if workers:
            options["prefetch_factor"] = self.PREFETCH
        self.waited = 0.0  # seconds that the workers' batches have been waited for; not what a device does with them
        self._ring: _Ring | None = None
        if planes or self.device.type == "cuda":
            slots = workers * self.PREFETCH + 2  # being filled, waiting, and the one in the caller's hands
            clips = _clips(shards, config, train=train, seed=seed, planes=True)
            largest = max(-(-total // world) for total in self.totals())  # the last one may hold one more
            self._ring = _Ring(clips, config.num_segments, largest, slots)
            self._loader: DataLoader[Any] = DataLoader(
                self._ring, batch_sampler=_Slots(self._batches, slots), collate_fn=_as_it_is, **options
            )
        else:
            data = ClipDataset(shards, config, train=train, seed=seed)
            self._loader = DataLoader(data, batch_sampler=self._batches, collate_fn=_collate, **options)

    def __len__(self) -> int:
        return len(self._batches)

    def close(self) -> None:
        """Ends the worker processes, which otherwise live as long as anything (a traceback, say) refers to it."""
        if (iterator := getattr(self._loader, "_iterator", None)) is not None:
            iterator._shutdown_workers()
            for worker in iterator._workers:  # one that hangs in a read ignores SIGTERM
                if worker.is_alive():
                    worker.kill()

    def _handed_over(self) -> Iterator[Any]:
        started = time.perf_counter()
        batches = iter(self._loader)
        while True:
            batch = next(batches, None)
            self.waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch
            started = time.perf_counter()

    def totals(self) -> list[int]:
        """How many clips each batch holds, over all processes."""
        return self._batches.totals()

    def steps(self) -> list[list[int]]:
        """The same by optimiser step."""
        return self._batches.steps()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, counted from 0, without the first `start`."""
        if self._ring is None:
            self._batches.epoch, self._batches.start = epoch, start
            yield from self._handed_over()
            return
        for batch in self.planes(epoch, start):
            planes = batch.planes.to(self.device)  # not asynchronous: the slot is free again afterwards
            clips = rgb_of_planes(planes, batch.views, self._shards.frame_size, self.size)
            yield Batch(clips, batch.labels, batch.rows, batch.frames)

    def planes(self, epoch: int, start: int = 0) -> Iterator[Planes]:
        """As `epoch`, but whole frames and what to show of them."""
        assert self._ring is not None, "the loader was made without planes"
        self._batches.epoch, self._batches.start = epoch, start
        for slot, clips, rows in self._handed_over():
            yield Planes(
                self._ring.memory[slot, : len(rows)],
                torch.tensor([clip.view for clip in clips]),
                torch.tensor([clip.label for clip in clips]),
                torch.tensor(rows),
                torch.from_numpy(np.stack([clip.indices for clip in clips])),
            )


def lacking(shards: ShardSet) -> int:
    """How many videos of the dataset's lists the shards do not hold: absent from the disk, or damaged."""
    return int(shards.manifest.get("listed_but_missing", 0)) + int(shards.manifest.get("failed", 0))


def rows_of(shards: ShardSet, config: DataConfig, subset: Literal["train", "held_out", "test"]) -> np.ndarray:
    """Index rows of a subset. "train" and "held_out" are what config.held_out makes of the official training list."""
    rows = shards.select(config.split, "test" if subset == "test" else "train")
    if subset == "test":
        return rows
    held = held_out(rows, shards.labels, shards.groups, config.held_out)
    rows = rows[held if subset == "held_out" else ~held]
    if subset == "train" and config.train_fraction < 1:
        rows = _share_per_class(rows, shards.labels, config.train_fraction)
    return rows


def held_out(rows: np.ndarray, labels: np.ndarray, groups: Sequence[str], share: float) -> np.ndarray:
    """Which of `rows` are held out, bool: per class whole groups until they hold `share` of its videos.

    Videos of one group (of one actor and place, or of one film) are never on both sides, whatever their class. The
    groups are taken in an order that is fixed by their names, so that every run holds out the same videos; one is left
    out when a class would be left without training videos. A video without a group is one of its own.
    """
    names = np.array([groups[row] or f"video {row}" for row in rows])
    held, left = np.zeros(len(rows), bool), {label: int((labels[rows] == label).sum()) for label in set(labels[rows])}
    wanted = {label: share * count for label, count in left.items()}
    for name in sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).digest()):
        chosen = names == name
        of = collections.Counter(labels[rows[chosen]].tolist())
        if any(wanted[label] > 0 for label in of) and all(left[label] > count for label, count in of.items()):
            held |= chosen
            for label, count in of.items():
                wanted[label] -= count
                left[label] -= count
    return held


def _share_per_class(rows: np.ndarray, labels: np.ndarray, fraction: float) -> np.ndarray:
    """The first part of every class in key order, at least one video: mostly whole groups, one may be cut."""
    kept = [
        of[: max(1, round(len(of) * fraction))] for of in (rows[labels[rows] == c] for c in np.unique(labels[rows]))
    ]
    return np.sort(np.concatenate(kept))
