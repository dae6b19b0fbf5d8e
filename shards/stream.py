"""Clips from whole shards, read from front to back: for shards behind a URL, where random reads are slow.

Plain WebDataset underneath, so that `urls` are what webdataset takes (paths, http(s), `pipe:` commands). What it does
not promise is added here: an order that is a function of (seed, epoch, rank) for any number of workers, each clip
exactly once, and resuming in the middle of an epoch.

How: the shards of an epoch are dealt over the ranks, and a rank's over `lanes`; ranks that are more than the shards
deal the videos of a shard among them. A lane reads its shards one after the other. The stream takes one clip from each
lane in turn. A worker serves whole lanes, and the clips of all workers are put back into that order, which thus never
depends on how many workers there were.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import urllib.request
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from webdataset.pytorch import DataLoader, IterableDataset
from webdataset.tariterators import group_by_keys, tar_file_expander, tarfile_samples

from shards.clips import Clip, Look, Sample, centre, clip_rng
from shards.read import Colour, ShardError, View, _ClipDecoder, clip_shape, split_frames


class Place(NamedTuple):
    """Where in the epoch a clip stands. `order` names all that decides the order; another one has other places."""

    turn: int
    lane: int
    order: str


class Streamed(NamedTuple):
    """A clip and its place in the epoch, which is what a resumed run passes as `after`."""

    place: Place
    clip: Clip


def shard_urls(folder: str | Path) -> dict[str, int]:
    """The URL (or path) of every shard of a shard folder, or of the base URL of one, with its number of videos."""
    base = str(folder).rstrip("/")
    try:
        if "://" in base:
            with urllib.request.urlopen(f"{base}/manifest.json", timeout=60) as reply:
                manifest = json.load(reply)
        else:
            manifest = json.loads((Path(base) / "manifest.json").read_text("utf-8"))
        return {f"{base}/{shard['shard']}": int(shard["videos"]) for shard in manifest["shards"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{base}/manifest.json: cannot be read ({error}); is it a finished shard folder?") from error


class ClipStream:
    """The clips of one subset in streaming order; iterate with `clips`.

    `urls` as from `shard_urls`; a sequence of URLs does as well, but then a shard that ends early at the end of a
    record is not noticed. Other arguments as for `shards.clips.Clips`; `split` and `subset` select videos (neither:
    all of them). `shuffle` is how many chosen clips, still as JPEGs (about 20 kB a frame), a lane mixes when there is
    a `seed`; 1 keeps the order of the shards.

    Each clip comes once over all ranks, but ranks get whole shards and thus not as many clips each: training in
    several processes wants `Batches` instead, or torch's join(). Where there are more ranks than shards, some read the
    same shard, in which each takes every n-th video of the subset: more shards (--num-shards) would spare the network.
    A server that fails ends the epoch with an error that names the shard; go on with `after`.
    """

    def __init__(
        self,
        urls: Mapping[str, int] | Sequence[str],
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
        if not urls:
            raise ShardError("no shards to read; give what shard_urls finds in a shard folder, or a list of URLs")
        if (split is None) != (subset is None) or split not in (None, 1, 2, 3) or subset not in (None, "train", "test"):
            raise ShardError(f"give split (1, 2, 3) and subset (train, test) or neither, got {split!r} and {subset!r}")
        self.urls, self.sample, self.look, self.size, self.colour = urls, sample, look, size, colour
        self.split, self.subset, self.seed, self.rank, self.world = split, subset, seed, rank, world
        self.lanes, self.shuffle = lanes, shuffle
        # A rank begins at shard `first`. Of more ranks than shards `sharing` do, this one as number `turn` of those;
        # else a shard is one rank's own.
        self.turn, self.first = divmod(rank, len(urls))
        self.sharing = len(range(self.first, world, len(urls)))

    def order(self, epoch: int) -> str:
        """Ten letters that name all that decides the order of an epoch; the server's address does not."""
        names = [url.rpartition("/")[2] for url in self.urls]
        known = (names, epoch, self.split, self.subset, self.seed, self.rank, self.world, self.lanes, self.shuffle)
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:10]

    def clips(
        self, epoch: int = 0, *, workers: int = 0, after: Place | None = None, prefetch: int = 4
    ) -> Iterator[Streamed]:
        """The clips of one epoch, in the same order for any number of workers.

        `after` is the `place` of the last clip that was used: the epoch goes on behind it (its shards are read again,
        but not decoded). As many of `workers` are started as can share the `lanes` evenly, lest some run ahead of the
        others. Raises ShardError for a place in another epoch or order, for damage (naming shard and key), and where no
        video is in the subset.
        """
        while workers and self.lanes % workers:
            workers -= 1
        if after is not None and after.order != self.order(epoch):
            raise ShardError(
                f"place {tuple(after)} is not of epoch {epoch} in this order: other settings, or other shards"
            )
        work, found = _Epoch(self, epoch, after), after is not None
        if not workers:
            for streamed in work.serve(0, 1):
                found = True
                yield streamed
        else:
            loader = DataLoader(
                work, batch_size=None, num_workers=workers, prefetch_factor=prefetch, collate_fn=_as_it_is
            )
            waiting: list[tuple[Place, int, Streamed]] = []
            reached = {worker: Place(-1, -1, "") for worker in range(workers)}  # by the workers still at work
            for worker, streamed in loader:
                if streamed is None:
                    del reached[worker]
                else:
                    reached[worker] = streamed.place
                    heapq.heappush(waiting, (streamed.place, worker, streamed))
                # whatever stands before the place that every worker has reached has come in
                while waiting and all(waiting[0][0] <= place for place in reached.values()):
                    found = True
                    yield heapq.heappop(waiting)[2]
            if reached:
                raise ShardError(f"{len(reached)} loader workers ended before their lanes did")
        if not found and self.world == 1:
            raise ShardError(f"no video of the {len(self.urls)} shards is {self.subset} in split {self.split}")

    def _decode(self, decoder: _ClipDecoder, chosen: _Chosen) -> Clip:
        frames = np.empty(clip_shape(len(chosen.jpegs), self.size, self.colour), np.uint8)
        try:
            decoder.decode(chosen.jpegs, chosen.view, self.size, self.colour, frames)
        except Exception as error:
            raise ShardError(f"{chosen.key}: {type(error).__name__}: {error}") from error
        return Clip(chosen.key, frames, chosen.label, chosen.indices, chosen.view)


class _Epoch(IterableDataset):  # type: ignore[misc]  # torch's, or webdataset's own stand-in without torch
    """One epoch of a stream: what a worker gets. Of its own, so that two epochs can be under way at once."""

    def __init__(self, stream: ClipStream, epoch: int, after: Place | None) -> None:
        self.stream, self.epoch, self.after, self.order = stream, epoch, after, stream.order(epoch)

    def __iter__(self) -> Iterator[tuple[int, Streamed | None]]:
        """A worker's clips with its number, None at its end."""
        from torch.utils.data import get_worker_info

        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        for streamed in self.serve(worker, workers):
            yield worker, streamed
        yield worker, None

    def serve(self, worker: int, workers: int) -> Iterator[Streamed]:
        """One clip from each of the worker's lanes in turn."""
        decoder, stream = _ClipDecoder(), self.stream
        lanes = {lane: self._lane(lane) for lane in range(worker, stream.lanes, workers)}
        turn = 0
        while lanes:
            for lane in list(lanes):
                chosen = next(lanes[lane], None)
                place = Place(turn, lane, self.order)
                if chosen is None:
                    del lanes[lane]
                elif self.after is None or place > self.after:
                    yield Streamed(place, stream._decode(decoder, chosen))
            turn += 1

    def _lane(self, lane: int) -> Iterator[_Chosen]:
        """The lane's clips as JPEGs, through a shuffle buffer."""
        stream, urls, rng = self.stream, list(self.stream.urls), None
        if stream.seed is not None:
            urls = [urls[i] for i in np.random.default_rng([stream.seed, self.epoch]).permutation(len(urls))]
            rng = np.random.default_rng([stream.seed, self.epoch, stream.rank, lane])
        mine = urls[stream.first :: stream.world][lane :: stream.lanes]
        if rng is None or stream.shuffle == 1:
            for url in mine:
                yield from self._choose(url)
            return
        buffer: list[_Chosen] = []
        for url in mine:
            for chosen in self._choose(url):
                if len(buffer) < stream.shuffle:
                    buffer.append(chosen)
                    continue
                place = int(rng.integers(len(buffer)))
                buffer[place], chosen = chosen, buffer[place]
                yield chosen
        yield from (buffer[i] for i in rng.permutation(len(buffer)))

    def _choose(self, url: str) -> Iterator[_Chosen]:
        """This rank's clips of one shard: indices, view and JPEGs. The whole shard is read, a few frames are kept."""
        stream, key, count, position = self.stream, "its first video", 0, -1
        try:
            for sample in _records(url):
                count += 1
                meta: dict[str, Any] = json.loads(sample["json"])
                key = meta["key"]
                if stream.split is not None and meta[f"split{stream.split}"] != stream.subset:
                    continue
                position += 1
                if position % stream.sharing != stream.turn:
                    continue
                rng = None if stream.seed is None else clip_rng(stream.seed, self.epoch, key)
                indices = np.ravel(stream.sample(meta["num_frames"], rng=rng))
                view = stream.look(meta["height"], meta["width"], rng=rng)
                jpegs = split_frames(sample)
                checks: list[int] = meta.get("frame_crc32", [])
                for index in set(map(int, indices)) if checks else ():
                    if zlib.crc32(jpegs[index]) != checks[index]:
                        raise ValueError(f"frame {index} is damaged")
                yield _Chosen(key, meta["label"], indices, view, [jpegs[index] for index in indices])
            if isinstance(stream.urls, Mapping) and count != stream.urls[url]:
                raise ValueError(f"it ended after {count} of {stream.urls[url]} videos")
        except Exception as error:
            raise ShardError(f"{url}: {type(error).__name__} at or after {key}: {error}") from error


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
