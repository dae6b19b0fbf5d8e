"""Clips from whole shards, read from front to back: for shards behind a URL, where random reads are slow.

Plain WebDataset underneath, so that `urls` are what webdataset takes (paths, http(s), `pipe:` commands). What it does
not promise is added here: an order that is a function of (seed, epoch, rank) for any number of workers, each clip
exactly once, and resuming in the middle of an epoch.

How: the shards of an epoch are dealt over the ranks, and a rank's over `lanes`. A lane reads its shards one after the
other. The stream takes one clip from each lane in turn. A worker serves whole lanes, and the clips of all workers are
put back into that order, which thus never depends on how many workers there were.
"""

from __future__ import annotations

import heapq
import json
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from webdataset.pytorch import DataLoader, IterableDataset
from webdataset.tariterators import group_by_keys, tar_file_expander, tarfile_samples

from shards.clips import Clip, Look, Sample, centre, clip_rng
from shards.read import Colour, ShardError, View, _ClipDecoder, clip_shape, split_frames

Place = tuple[int, int]  # (turn, lane): where in the epoch a clip stands


class Streamed(NamedTuple):
    """A clip and its place in the epoch, which is what a resumed run passes as `after`."""

    place: Place
    clip: Clip


def shard_urls(folder: str | Path) -> list[str]:
    """The URLs (or paths) of all shards of a shard folder or of the base URL of one, from its manifest."""
    base = str(folder).rstrip("/")
    try:
        if "://" in base:
            with urllib.request.urlopen(f"{base}/manifest.json", timeout=60) as reply:
                manifest = json.load(reply)
        else:
            manifest = json.loads((Path(base) / "manifest.json").read_text("utf-8"))
        return [f"{base}/{shard['shard']}" for shard in manifest["shards"]]
    except (OSError, ValueError, KeyError) as error:
        raise ShardError(f"{base}/manifest.json: cannot be read ({error}); is it a finished shard folder?") from error


class ClipStream(IterableDataset):  # type: ignore[misc]  # torch's, or webdataset's own stand-in without torch
    """The clips of one subset in streaming order; iterate with `clips`.

    Arguments as for `shards.clips.Clips`; `split` and `subset` select videos (None: all of them). `shuffle` is how many
    chosen clips, still as JPEGs, a lane mixes (with `seed`; 1 keeps the order of the shard).
    """

    def __init__(
        self,
        urls: Sequence[str],
        sample: Sample,
        *,
        look: Look = centre,
        size: tuple[int, int] = (224, 224),
        colour: Colour = "rgb",
        split: int | None = None,
        subset: str | None = None,
        seed: int | None = None,
        rank: int = 0,
        world: int = 1,
        lanes: int = 12,
        shuffle: int = 32,
    ) -> None:
        if not 0 <= rank < world or lanes < 1 or shuffle < 1:
            raise ValueError(f"need 0 <= rank < world, lanes and shuffle >= 1, got {rank}, {world}, {lanes}, {shuffle}")
        if len(urls) < world:
            raise ShardError(f"{len(urls)} shards cannot be shared by {world} processes; build more (--num-shards)")
        self.urls, self.sample, self.look, self.size, self.colour = list(urls), sample, look, size, colour
        self.split, self.subset, self.seed, self.rank, self.world = split, subset, seed, rank, world
        self.lanes, self.shuffle = lanes, shuffle
        self._epoch = 0
        self._after: Place | None = None

    def clips(
        self, epoch: int = 0, *, workers: int = 0, after: Place | None = None, prefetch: int = 4
    ) -> Iterator[Streamed]:
        """The clips of one epoch, in the same order for any number of workers.

        `after` is the `place` of the last clip that was used: the epoch goes on behind it (its shards are read again,
        but not decoded). Raises ValueError unless `workers` divides `lanes`, ShardError (naming shard and key) for
        damage.
        """
        if workers and self.lanes % workers:
            raise ValueError(f"{workers} workers cannot share {self.lanes} lanes evenly; use a divisor")
        self._epoch, self._after = epoch, after
        if not workers:
            for streamed in self._serve(0, 1):
                if streamed is not None:
                    yield streamed[1]
            return
        loader = DataLoader(self, batch_size=None, num_workers=workers, prefetch_factor=prefetch, collate_fn=_as_it_is)
        waiting: list[tuple[Place, int, Streamed]] = []
        reached: dict[int, Place] = dict.fromkeys(range(workers), (-1, -1))  # by the workers still at work
        for worker, streamed in loader:
            if streamed is None:
                del reached[worker]
            else:
                reached[worker] = streamed.place
                heapq.heappush(waiting, (streamed.place, worker, streamed))
            # whatever stands before the place that every worker has reached has come in
            while waiting and all(waiting[0][0] <= place for place in reached.values()):
                yield heapq.heappop(waiting)[2]
        if reached:
            raise ShardError(f"{len(reached)} loader workers ended before their lanes did")

    def __iter__(self) -> Iterator[tuple[int, Streamed | None]]:
        """What a worker does: its clips with its number, None at its end."""
        from torch.utils.data import get_worker_info

        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        yield from self._serve(worker, workers)
        yield worker, None

    def _serve(self, worker: int, workers: int) -> Iterator[tuple[int, Streamed]]:
        decoder = _ClipDecoder()
        lanes = {lane: self._lane(lane) for lane in range(worker, self.lanes, workers)}
        turn = 0
        while lanes:
            for lane in list(lanes):
                chosen = next(lanes[lane], None)
                if chosen is None:
                    del lanes[lane]
                elif self._after is None or (turn, lane) > self._after:
                    yield worker, Streamed((turn, lane), self._decode(decoder, chosen))
            turn += 1

    def _lane(self, lane: int) -> Iterator[_Chosen]:
        """The lane's clips as JPEGs, through a shuffle buffer."""
        urls = self.urls
        rng = None
        if self.seed is not None:
            urls = [urls[i] for i in np.random.default_rng([self.seed, self._epoch]).permutation(len(urls))]
            rng = np.random.default_rng([self.seed, self._epoch, self.rank, lane])
        mine = urls[self.rank :: self.world][lane :: self.lanes]
        if rng is None or self.shuffle == 1:
            for url in mine:
                yield from self._choose(url)
            return
        buffer: list[_Chosen] = []
        for url in mine:
            for chosen in self._choose(url):
                if len(buffer) < self.shuffle:
                    buffer.append(chosen)
                    continue
                place = int(rng.integers(len(buffer)))
                buffer[place], chosen = chosen, buffer[place]
                yield chosen
        yield from (buffer[i] for i in rng.permutation(len(buffer)))

    def _choose(self, url: str) -> Iterator[_Chosen]:
        """Frame indices, view and JPEGs of the clips of one shard. The whole shard is read, a few frames are kept."""
        key = "its first video"
        try:
            for sample in _records(url):
                meta: dict[str, Any] = json.loads(sample["json"])
                key = meta["key"]
                if self.split is not None and meta[f"split{self.split}"] != self.subset:
                    continue
                rng = None if self.seed is None else clip_rng(self.seed, self._epoch, key)
                indices = self.sample(meta["num_frames"], rng=rng)
                view = self.look(meta["height"], meta["width"], rng=rng)
                jpegs = split_frames(sample)
                checks: list[int] = meta.get("frame_crc32", [])
                for index in set(map(int, indices)) if checks else ():
                    if zlib.crc32(jpegs[index]) != checks[index]:
                        raise ValueError(f"frame {index} is damaged")
                yield _Chosen(key, meta["label"], indices, view, [jpegs[index] for index in indices])
        except Exception as error:
            raise ShardError(f"{url}: {type(error).__name__} at or after {key}: {error}") from error

    def _decode(self, decoder: _ClipDecoder, chosen: _Chosen) -> Clip:
        frames = np.empty(clip_shape(len(chosen.jpegs), self.size, self.colour), np.uint8)
        try:
            decoder.decode(chosen.jpegs, chosen.view, self.size, self.colour, frames)
        except Exception as error:
            raise ShardError(f"{chosen.key}: {type(error).__name__}: {error}") from error
        return Clip(chosen.key, frames, chosen.label, chosen.indices)


def _records(url: str) -> Iterator[dict[str, Any]]:
    """The records of one shard, through webdataset, without its splitters: lanes settle who reads what."""
    if url.startswith(("http://", "https://")):  # webdataset would start curl, if there is one, and take a 404's page
        with urllib.request.urlopen(url, timeout=60) as stream:
            yield from group_by_keys(tar_file_expander([{"url": url, "stream": stream}]))
    else:
        yield from tarfile_samples([{"url": url}])


def _as_it_is(item: Any) -> Any:
    return item  # webdataset's and torch's loaders would make tensors and lists of it


class _Chosen(NamedTuple):
    key: str
    label: int
    indices: np.ndarray
    view: View
    jpegs: list[bytes]
