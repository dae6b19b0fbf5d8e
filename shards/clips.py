"""Clips for training and testing: a map-style dataset over the index, and the order in which to visit it.

Everything random about a clip is a function of (seed, epoch, key), and the order a function of (seed, epoch, rank):
the clips are the same for any number of loader workers, for random access and for streaming, and a run resumed in the
middle of an epoch sees what an uninterrupted one would have seen. numpy only: PyTorch's DataLoader takes `Clips` as a
dataset and `Batches` as its batch_sampler, and other loaders can as well.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from shards.read import Colour, ShardError, ShardSet, View


class Sample(Protocol):
    """Which frames: `segment_indices` and its like, with all but the number of frames filled in."""

    def __call__(self, num_frames: int, /, *, rng: np.random.Generator | None) -> np.ndarray:
        """Indices int64 (K,); without a generator those of the test clip."""
        ...


class Look(Protocol):
    """Which part of them, for frames of height x width."""

    def __call__(self, height: int, width: int, /, *, rng: np.random.Generator | None) -> View:
        """A view inside the frame; without a generator that of the test clip."""
        ...


class Clip(NamedTuple):
    """`frames` uint8 as `ShardSet.read_clip` returns them; `label` from 0; `indices` int64 (K,) of the frames.

    `view` is the part that the clip shows: cut out already, unless `Clips` was told to leave that to the device.
    """

    key: str
    frames: np.ndarray
    label: int
    indices: np.ndarray
    view: View


def centre(height: int, width: int, rng: np.random.Generator | None = None) -> View:
    """The test view of TSN and ECO: a centred square of 224/256 of the short side (224x224 of a 256x340 frame)."""
    size = round(min(height, width) * 224 / 256)
    return View((height - size) // 2, (width - size) // 2, size, size)


def clip_rng(seed: int, epoch: int, key: str) -> np.random.Generator:
    """The generator for all that is random about one clip. By key, not row: a stream has no rows."""
    return np.random.default_rng([seed, epoch, int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")])


class Clips:
    """Map-style dataset: `clips[epoch, row]` is a `Clip`, `clips[row]` that of epoch 0.

    `sample` chooses the frames (such as functools.partial of a function of sampling.py; several clips of a video come
    one after the other), `look` the part of them that is shown. With `seed` None neither gets a generator: the test
    clip. With `crop` False the frames come whole, `size` unused, and whoever gets them cuts out `view` (a GPU does it
    for a batch at once). Errors name the key.
    """

    def __init__(
        self,
        shards: ShardSet,
        sample: Sample,
        *,
        look: Look = centre,
        size: tuple[int, int] = (224, 224),
        colour: Colour = "rgb",
        seed: int | None = None,
        crop: bool = True,
    ) -> None:
        self.shards, self.sample, self.look = shards, sample, look
        self.size, self.colour, self.seed, self.crop = size if crop else shards.frame_size, colour, seed, crop

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, item: int | tuple[int, int]) -> Clip:
        return self.read(item)

    def read(self, item: int | tuple[int, int], out: np.ndarray | None = None) -> Clip:
        """The clip of `row` or (epoch, row), its frames written into `out` if given.

        Raises IndexError for a row that does not exist, ShardError (naming the key) for anything that goes wrong then.
        """
        epoch, row = item if isinstance(item, tuple) else (0, item)
        if not 0 <= row < len(self.shards):
            raise IndexError(f"row {row} asked for, {self.shards.folder} has rows 0 to {len(self.shards) - 1}")
        key = self.shards.keys[row]
        try:
            rng = None if self.seed is None else clip_rng(self.seed, epoch, key)
            indices = np.ravel(self.sample(int(self.shards.num_frames[row]), rng=rng))
            view = self.look(*self.shards.frame_size, rng=rng)
            cut = view if self.crop else View(0, 0, *self.shards.frame_size)
            frames = self.shards.read_clip(row, indices, cut, self.size, colour=self.colour, out=out)
        except (ShardError, ModuleNotFoundError):
            raise  # the one names the key, the other is no matter of this clip
        except Exception as error:  # in a loader's worker only the message survives
            raise ShardError(f"{key} (row {row}, epoch {epoch}): {type(error).__name__}: {error}") from error
        return Clip(key, frames, int(self.shards.labels[row]), indices, view)


class Batches:
    """Lists of (epoch, row): every row exactly once an epoch over all ranks, as many batches on each rank.

    The order is a permutation drawn from (seed, epoch), or that of `rows` when `seed` is None. Each batch takes the
    next `batch` x `world` rows, of which rank r takes every world-th. The last one may be smaller; where it would leave
    a rank with nothing, its clips go into the one before (one more for some ranks). `epoch` is set before each epoch; a
    resumed run then sets `start`, how many batches of that epoch to leave out. These two ints are all the state there
    is, and iterating does not change them (a DataLoader with workers begins twice).

    `step`, a multiple of `batch` x `world`, is for training with accumulated gradients: an optimiser step is as many
    rows, over all ranks, and no batch reaches into the next one. What is left at the end of the epoch is a step of its
    own, or joins the last one where it is less than half a step (a mean over a few clips would move the network as far
    as one over many). So the steps hold the same clips for any `batch` and `world` (up to half of `step`).
    """

    def __init__(
        self,
        rows: Sequence[int] | np.ndarray,
        batch: int,
        *,
        seed: int | None,
        rank: int = 0,
        world: int = 1,
        step: int | None = None,
    ) -> None:
        if batch < 1 or not 0 <= rank < world:
            raise ValueError(f"need batch >= 1 and 0 <= rank < world, got batch {batch}, rank {rank}, world {world}")
        if step is not None and (step < 1 or step % (batch * world)):
            raise ValueError(f"step must be a multiple of batch x world, {batch} x {world}, got {step}")
        if len(rows) < world:
            raise ValueError(f"{len(rows)} clips cannot be shared by {world} processes; use fewer")
        self.rows, self.batch, self.seed, self.rank, self.world = np.asarray(rows), batch, seed, rank, world
        self.step = step
        self.epoch = 0

    @property
    def epoch(self) -> int:
        """Which epoch to deal next; setting it sets `start` to 0."""
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch, self.start = epoch, 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        if not 0 <= self.start <= len(self):
            raise ValueError(f"start must be 0 to {len(self)} batches, got {self.start}")
        return self._deal(self.epoch, self.start)

    def _deal(self, epoch: int, start: int) -> Iterator[list[tuple[int, int]]]:
        rows = self.rows
        if self.seed is not None:
            rows = np.random.default_rng([self.seed, epoch]).permutation(rows)
        bounds = itertools.pairwise(itertools.accumulate(self.totals(), initial=0))
        for begin, end in itertools.islice(bounds, start, None):
            yield [(epoch, int(row)) for row in rows[begin + self.rank : end : self.world]]

    def __len__(self) -> int:
        return len(self.totals())

    def totals(self) -> list[int]:
        """How many clips each batch of an epoch holds, over all ranks."""
        return list(itertools.chain(*self.steps()))

    def steps(self) -> list[list[int]]:
        """The same by optimiser step; without `step` each batch is one."""
        each = self.batch * self.world
        if self.step is None:
            return [[total] for total in self._divided(len(self.rows), each, self.world)]
        smallest = max(self.world, -(-self.step // 2))
        whole = self._divided(len(self.rows), self.step, smallest)
        return [self._divided(clips, each, self.world) for clips in whole]

    @staticmethod
    def _divided(total: int, each: int, smallest: int) -> list[int]:
        """`total` in parts of `each`; a rest below `smallest` joins the last of them."""
        full, rest = divmod(total, each)
        if full and rest < smallest:
            return [*[each] * (full - 1), each + rest]
        return [*[each] * full, rest]
