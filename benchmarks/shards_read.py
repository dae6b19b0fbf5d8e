"""Reading clips: K = 16 random frames of a video under one random crop, in one process and through loaders.

Every peer is set up here from the same videos, at the same size and with the very same JPEGs (quality 90), and gives
the same view of the same frames, uint8 RGB (16, 3, 224, 224). How far its pixels are from ours is measured too, so that
a peer that reads other frames is noticed. Peers on the .avi crop at the source's own size, which is their best way.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
import torch
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data import Dataset as TorchDataset

from benchmarks.harness import QUIET, Samples, alternate, bound, cpu_seconds, ratio, rows
from pasnet.compat import allow_torchvision
from pasnet.config import DataConfig
from pasnet.data import Loader, rgb_of_planes, train_view
from shards import Batches, Clips, Dataset, View, build, open_shards, segment_indices
from shards.clips import clip_rng
from shards.read import split_frames

K, SIZE, BATCH, WORKERS, SEED = 16, (224, 224), 8, 2, 0
CLIPS_A_ROUND = 288  # of the loaders; the videos are listed so often in the index
LOOK = functools.partial(train_view, config=DataConfig(shards=""))  # multi-scale corner crop and flip, as in training
OURS, PLANES = "ours, RGB", "ours, YUV planes (colour left to the device)"
WHOLE = "ours, whole frames as planes (crop, resize and colour left to the device)"
RAW = "raw uint8 memory-map (13 x the disk, no JPEG)"
RAWFRAMES, PILLOW, USUAL = (
    "rawframes + simplejpeg + cv2",
    "rawframes + Pillow",
    "rawframes + Pillow + torchvision v2, float",
)
WDS_FRAMES, WDS_WHOLE = "webdataset, one member per frame", "webdataset, our shards read whole"
DECORD, TORCHCODEC, PYAV = "decord on the .avi", "torchcodec on the .avi", "PyAV on the .avi"
LITDATA, MDS = "litdata, one item per frame", "mosaicml-streaming (MDS), one sample per frame"


def sample(num_frames: int, rng: np.random.Generator | None) -> np.ndarray:
    """One frame from each of K segments."""
    return segment_indices(num_frames, K, rng)


class Draw(NamedTuple):
    """What a clip shows. `row` is in the index, in which every video is listed several times; `video` is which."""

    epoch: int
    row: int
    video: int
    indices: np.ndarray
    view: View


class Material:
    """The videos as our shards, with an index that lists them often enough for a loader's round."""

    def __init__(self, dataset: Dataset, scratch: Path) -> None:
        self.scratch = scratch
        build(dataset, scratch / "once", num_shards=16)
        self.videos = len(pq.ParquetFile(scratch / "once" / "index.parquet").read())
        self._list_often(scratch / "once", scratch / "shards", max(1, round(CLIPS_A_ROUND / self.videos)))
        self.store = open_shards(scratch / "shards")
        self.urls = sorted(str(path) for path in (scratch / "shards").glob("*.tar"))
        paths = {video.key: video.path for video in dataset.videos}
        self.avi = [paths[key] for key in self.store.keys[: self.videos]]

    def _list_often(self, once: Path, often: Path, times: int) -> None:
        table = pq.ParquetFile(once / "index.parquet").read()
        copies = []
        for number in range(times):
            keys = [key + (f"#{number}" if number else "") for key in table["key"].to_pylist()]
            copy = table.set_column(table.schema.get_field_index("key"), "key", pa.array(keys))
            column = table.schema.get_field_index("split1")
            copies.append(copy.set_column(column, "split1", pa.array(["train"] * len(keys), pa.string())))
        often.mkdir()
        pq.write_table(pa.concat_tables(copies), often / "index.parquet")
        for path in (*once.glob("*.tar"), once / "manifest.json"):
            (often / path.name).symlink_to(path.absolute())

    def draw(self, epoch: int, row: int) -> Draw:
        """Exactly what `Clips` with SEED draws for (epoch, row)."""
        rng = clip_rng(SEED, epoch, self.store.keys[row])
        indices = sample(int(self.store.num_frames[row]), rng=rng)
        return Draw(epoch, row, row % self.videos, indices, LOOK(*self.store.frame_size, rng))

    def all_jpegs(self) -> Iterator[tuple[int, list[bytes]]]:
        """(video, all of its JPEGs)."""
        for video in range(self.videos):
            yield video, self.store.read_jpegs(video, np.arange(self.store.num_frames[video]))

    def loader_clips(self, colour: str) -> Clips:
        """Ours as a map-style dataset."""
        return Clips(self.store, sample, look=LOOK, size=SIZE, colour=colour, seed=SEED)  # type: ignore[arg-type]


def even(view: View) -> tuple[int, int, int, int]:
    """The view's rectangle in even numbers, as ours takes it: (top, left, height, width)."""
    top, left, height, width = (int(number) // 2 * 2 for number in view[:4])
    return top, left, height, width


def show(frame: np.ndarray, view: View, out: np.ndarray, scale: tuple[float, float] = (1, 1)) -> None:
    """The view of a frame (H, W, 3), into `out` (3, 224, 224); `scale` is the frame's size over 256x340."""
    top, left, height, width = even(view)
    rectangle = (top * scale[0], (top + height) * scale[0], left * scale[1], (left + width) * scale[1])
    y0, y1, x0, x1 = map(round, rectangle)
    picture = cv2.resize(frame[y0:y1, x0:x1], SIZE)
    cv2.split(cv2.flip(picture, 1) if view.flip else picture, [out[0], out[1], out[2]])


def empty() -> np.ndarray:
    """Room for a clip."""
    return np.empty((K, 3, *SIZE), np.uint8)


class Peer:
    """One way to read: sets itself up in `folder`, outside the measured time."""

    def __init__(self, material: Material, folder: Path) -> None:
        self.material, self.folder = material, folder

    def clip(self, draw: Draw) -> Any:
        """The clip of one draw, by random access."""
        raise TypeError(f"{type(self).__name__} reads in passes over whole shards; ask for clips()")

    def clips(self, draws: dict[int, Draw]) -> Iterator[tuple[int, Any]]:
        """(video, clip) of every draw, which are by video; in any order."""
        for video, draw in draws.items():
            yield video, self.clip(draw)


class Ours(Peer):
    """Index and pread; libavcodec's planes, each cropped and resized; then RGB, or not."""

    colour = "rgb"

    def __init__(self, material: Material, folder: Path) -> None:
        self.store = open_shards(material.store.folder)

    def clip(self, draw: Draw) -> Any:
        """One clip."""
        return self.store.read_clip(draw.row, draw.indices, draw.view, SIZE, colour=self.colour)  # type: ignore[arg-type]


class OursPlanes(Ours):
    """Without the conversion to RGB."""

    colour = "yuv"


class Rawframes(Peer):
    """A JPEG file per frame in a folder per video, simplejpeg and OpenCV."""

    def __init__(self, material: Material, folder: Path) -> None:
        self.folder = folder.parent / "rawframes"
        if not self.folder.is_dir():
            for video, jpegs in material.all_jpegs():
                (self.folder / str(video)).mkdir(parents=True)
                for number, jpeg in enumerate(jpegs):
                    self.path(video, number).write_bytes(jpeg)

    def path(self, video: int, frame: int) -> Path:
        """Of a frame's file."""
        return self.folder / str(video) / f"{frame:06d}.jpg"

    def clip(self, draw: Draw) -> Any:
        """One clip."""
        out = empty()
        for frame, place in zip(draw.indices, out, strict=True):
            with open(self.path(draw.video, frame), "rb") as file:
                show(simplejpeg.decode_jpeg(file.read()), draw.view, place)
        return out


class RawframesPillow(Rawframes):
    """Pillow decodes, crops and resizes in one call."""

    def __init__(self, material: Material, folder: Path) -> None:
        super().__init__(material, folder)
        self.image = importlib.import_module("PIL.Image")

    def clip(self, draw: Draw) -> Any:
        """One clip."""
        top, left, height, width = even(draw.view)
        out, box = empty(), (left, top, left + width, top + height)
        for frame, place in zip(draw.indices, out, strict=True):
            picture = self.image.open(self.path(draw.video, frame)).resize(
                SIZE, self.image.Resampling.BILINEAR, box=box
            )
            place[:] = np.asarray(picture)[:, :: -1 if draw.view.flip else 1].transpose(2, 0, 1)
        return out


class RawframesTorchvision(RawframesPillow):
    """The usual way: Pillow decodes, torchvision's v2 transforms do the rest and leave normalised floats."""

    def __init__(self, material: Material, folder: Path) -> None:
        super().__init__(material, folder)
        self.v2 = importlib.import_module("torchvision.transforms.v2.functional")

    def clip(self, draw: Draw) -> Any:
        """One clip, float32."""
        v2 = self.v2
        pictures = [self.image.open(self.path(draw.video, frame)) for frame in draw.indices]
        clip = torch.stack([v2.pil_to_tensor(picture) for picture in pictures])
        clip = v2.resized_crop(clip, *even(draw.view), list(SIZE), antialias=True)
        clip = v2.horizontal_flip(clip) if draw.view.flip else clip
        return v2.normalize(v2.to_dtype(clip, torch.float32, scale=True), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


class WebdatasetFrames(Peer):
    """Tars with a member per frame: webdataset reads from front to back and groups them by video."""

    def __init__(self, material: Material, folder: Path) -> None:
        self.wds = importlib.import_module("webdataset")
        folder.mkdir()
        self.urls = [str(folder / f"{number:02d}.tar") for number in range(16)]
        writers = [self.wds.TarWriter(url) for url in self.urls]
        for video, jpegs in material.all_jpegs():
            record = {f"{number:06d}.jpg": jpeg for number, jpeg in enumerate(jpegs)}
            writers[video % 16].write({"__key__": str(video), **record})
        for writer in writers:
            writer.close()

    def samples(self, urls: list[str]) -> Iterable[dict[str, Any]]:
        """Plain webdataset."""
        return iter(self.wds.DataPipeline(self.wds.SimpleShardList(urls), self.wds.tarfile_to_samples()))

    def clips(self, draws: dict[int, Draw]) -> Iterator[tuple[int, Any]]:
        """A pass over all tars."""
        return self.pass_over(self.urls, draws.get)

    def pass_over(self, urls: list[str], draw_of: Callable[[int], Draw | None]) -> Iterator[tuple[int, Any]]:
        """A clip of every video in these tars for which there is a draw."""
        for sample in self.samples(urls):
            video, out = int(sample["__key__"]), empty()
            if draw := draw_of(video):
                for frame, place in zip(draw.indices, out, strict=True):
                    show(simplejpeg.decode_jpeg(sample[f"{frame:06d}.jpg"]), draw.view, place)
                yield video, out


class WebdatasetWhole(Peer):
    """Our shards through plain webdataset, which reads them whole."""

    def __init__(self, material: Material, folder: Path) -> None:
        self.wds, self.urls = importlib.import_module("webdataset"), material.urls
        self.video_of = {key: row for row, key in enumerate(material.store.keys[: material.videos])}

    def clips(self, draws: dict[int, Draw]) -> Iterator[tuple[int, Any]]:
        """A pass over all tars."""
        for sample in self.wds.DataPipeline(self.wds.SimpleShardList(self.urls), self.wds.tarfile_to_samples()):
            video, jpegs, out = self.video_of[sample["__key__"]], split_frames(sample), empty()
            for frame, place in zip(draws[video].indices, out, strict=True):
                show(simplejpeg.decode_jpeg(jpegs[frame]), draws[video].view, place)
            yield video, out


class Decord(Peer):
    """Seeks and decodes in the .avi, on one thread."""

    def __init__(self, material: Material, folder: Path) -> None:
        self.material, self.decord = material, importlib.import_module("decord")

    def clip(self, draw: Draw) -> Any:
        """One clip."""
        reader = self.decord.VideoReader(str(self.material.avi[draw.video]), num_threads=1)
        return from_source(reader.get_batch(draw.indices.tolist()).asnumpy(), draw.view)


class Torchcodec(Peer):
    """PyTorch's decoder on the .avi, approximate seek, on one thread (its default)."""

    def __init__(self, material: Material, folder: Path) -> None:
        self.material, self.decoders = material, importlib.import_module("torchcodec.decoders")

    def clip(self, draw: Draw) -> Any:
        """One clip."""
        path = str(self.material.avi[draw.video])
        decoder = self.decoders.VideoDecoder(path, dimension_order="NHWC", seek_mode="approximate")
        return from_source(decoder.get_frames_at(draw.indices.tolist()).data.numpy(), draw.view)


class Pyav(Peer):
    """PyAV on the .avi: decodes up to the last frame asked for, converts those asked for."""

    def __init__(self, material: Material, folder: Path) -> None:
        self.material, self.av = material, importlib.import_module("av")

    def clip(self, draw: Draw) -> Any:
        """One clip."""
        wanted, kept = set(draw.indices.tolist()), {}
        with self.av.open(str(self.material.avi[draw.video]), metadata_errors="replace") as container:
            container.streams.video[0].codec_context.thread_count = 1
            for number, frame in enumerate(container.decode(video=0)):
                if number in wanted:
                    kept[number] = frame.to_ndarray(format="rgb24")
                if len(kept) == len(wanted):
                    break
        return from_source([kept[number] for number in draw.indices.tolist()], draw.view)


def from_source(frames: Any, view: View) -> np.ndarray:
    """Frames at the source's own size as a clip."""
    out, (height, width) = empty(), frames[0].shape[:2]
    for frame, place in zip(frames, out, strict=True):
        show(frame, view, place, scale=(height / 256, width / 340))
    return out


class Litdata(Peer):
    """Items are JPEGs, by random access; its own format."""

    def __init__(self, material: Material, folder: Path) -> None:
        litdata = importlib.import_module("litdata")
        writer = importlib.import_module("litdata.streaming.writer").BinaryWriter(str(folder), chunk_bytes="64MB")
        self.first = np.concatenate([[0], np.cumsum(material.store.num_frames[: material.videos])])
        for number, jpeg in enumerate(itertools.chain.from_iterable(jpegs for _, jpegs in material.all_jpegs())):
            writer.add_item(number, jpeg)
        writer.done()
        writer.merge()
        self.data = litdata.StreamingDataset(str(folder))

    def clip(self, draw: Draw) -> Any:
        """One clip."""
        out = empty()
        for frame, place in zip(draw.indices, out, strict=True):
            show(simplejpeg.decode_jpeg(self.data[int(self.first[draw.video] + frame)]), draw.view, place)
        return out


class Mosaic(Litdata):
    """Samples are JPEGs, by random access; its own format (MDS)."""

    def __init__(self, material: Material, folder: Path) -> None:
        streaming = importlib.import_module("streaming")
        self.first = np.concatenate([[0], np.cumsum(material.store.num_frames[: material.videos])])
        with streaming.MDSWriter(out=str(folder), columns={"jpeg": "bytes"}) as writer:
            for _, jpegs in material.all_jpegs():
                for jpeg in jpegs:
                    writer.write({"jpeg": jpeg})
        self.data = _Field(streaming.StreamingDataset(local=str(folder), shuffle=False, batch_size=1), "jpeg")


class _Field:
    def __init__(self, data: Any, name: str) -> None:
        self.data, self.name = data, name

    def __getitem__(self, number: int) -> Any:
        return self.data[number][self.name]


class RawMap(Peer):
    """Every frame's pixels in one file, mapped: what a machine with 13 times the disk can do.

    Mapped anew in every epoch, since no epoch of a whole set (650 GB for UCF-101) finds pages that the last one left.
    """

    def __init__(self, material: Material, folder: Path) -> None:
        path, counts = folder.parent / "raw.npy", material.store.num_frames[: material.videos]
        self.first = np.concatenate([[0], np.cumsum(counts)])
        if not path.is_file():
            shape = (int(self.first[-1]), *material.store.frame_size, 3)
            raw = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
            for video, jpegs in material.all_jpegs():
                for number, jpeg in enumerate(jpegs):
                    raw[self.first[video] + number] = simplejpeg.decode_jpeg(jpeg)
            raw.flush()
        self.path, self.epoch, self.raw = path, -1, np.empty(0)

    def clip(self, draw: Draw) -> Any:
        """One clip."""
        return self.fill(draw, empty())

    def fill(self, draw: Draw, out: np.ndarray) -> np.ndarray:
        """One clip, into `out`."""
        if draw.epoch != self.epoch:
            self.epoch, self.raw = draw.epoch, np.load(self.path, mmap_mode="r")
        for frame, place in zip(draw.indices, out, strict=True):
            show(self.raw[self.first[draw.video] + frame], draw.view, place)
        return out


PEERS: dict[str, type[Peer]] = {
    OURS: Ours,
    PLANES: OursPlanes,
    RAWFRAMES: Rawframes,
    PILLOW: RawframesPillow,
    USUAL: RawframesTorchvision,
    WDS_FRAMES: WebdatasetFrames,
    WDS_WHOLE: WebdatasetWhole,
    DECORD: Decord,
    TORCHCODEC: Torchcodec,
    PYAV: Pyav,
    LITDATA: Litdata,
    MDS: Mosaic,
    RAW: RawMap,
}


def ready(material: Material, scratch: Path) -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers that can be set up here, and why the others cannot."""
    peers: dict[str, Peer] = {}
    not_run: dict[str, str] = {}
    for number, (name, kind) in enumerate(PEERS.items()):
        try:
            peers[name] = kind(material, scratch / f"peer-{number}")
        except Exception as error:  # not installed, or it does not run here: that is what is reported
            not_run[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        print(f"  set up: {name} {not_run.get(name, '')}", file=sys.stderr, flush=True)
    return peers, not_run


def one_process(
    material: Material, peers: dict[str, Peer], not_run: dict[str, str], rounds: int
) -> tuple[Samples, list[dict[str, Any]]]:
    """A clip of every video per round, the same draws for all peers of a round."""
    bytes_read: dict[str, list[int]] = {}
    used: dict[int, int] = {}
    before = 0

    def draws(number: int) -> dict[int, Draw]:
        return {video: material.draw(number + 1, video) for video in range(material.videos)}

    def read(peer: Peer, number: int) -> None:
        nonlocal before
        of, count = draws_of[number], 0
        before = characters_read()
        for _ in peer.clips(of):
            count += 1
        if count != len(of):
            raise RuntimeError(f"{count} clips instead of {len(of)}")

    def note(name: str, number: int) -> None:
        bytes_read.setdefault(name, []).append(characters_read() - before)

    draws_of = {number: draws(number) for number in range(-1, rounds)}
    for number, of in draws_of.items():
        read_jpegs = material.store.read_jpegs
        used[number] = sum(len(j) for d in of.values() for j in read_jpegs(d.row, np.unique(d.indices)))
    samples = alternate({n: functools.partial(read, p) for n, p in peers.items()}, rounds, not_run, also=note)
    table = rows(samples, not_run, dict.fromkeys(samples, material.videos), "clip", OURS)
    expected = dict(peers[OURS].clips(draws_of[0]))
    for row in table:
        if (name := row["peer"]) in samples:
            shares = [read / used[number] for number, read in enumerate(bytes_read[name])]
            row["bytes_read_over_bytes_used"] = None if name == RAW else round(statistics.median(shares), 3)
            row["mean_difference_to_ours"] = difference(peers[name].clips(draws_of[0]), expected)
    return samples, table


def characters_read() -> int:
    """Bytes that this process has asked the kernel for; what is read through a memory map is not in it."""
    try:
        return int(Path("/proc/self/io").read_text("utf-8").split()[1])
    except OSError:
        return 0


def difference(clips: Iterator[tuple[int, Any]], expected: dict[int, Any]) -> float | None:
    """Mean absolute difference of the pixels, 0 to 255; None for clips that are no RGB bytes."""
    found = []
    for video, clip in clips:
        if clip.shape != expected[video].shape or clip.dtype != np.uint8:
            return None
        found.append(float(np.abs(clip.astype(np.int16) - expected[video]).mean()))
    return round(statistics.mean(found), 2)


# Loaders: two workers, batches of eight clips in this process


class Random(TorchDataset[torch.Tensor]):
    """A peer as a map-style dataset; items are (epoch, row)."""

    def __init__(self, material: Material, peer: Peer) -> None:
        self.material, self.peer = material, peer

    def __len__(self) -> int:
        return len(self.material.store)

    def __getitem__(self, item: tuple[int, int]) -> torch.Tensor:
        clip = self.peer.clip(self.material.draw(*item))
        return clip if isinstance(clip, torch.Tensor) else torch.from_numpy(clip)


class Stream(IterableDataset[torch.Tensor]):
    """The tars with a member per frame, dealt over the workers, as often as the index lists the videos."""

    def __init__(self, material: Material, peer: WebdatasetFrames) -> None:
        self.material, self.peer = material, peer
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # persistent workers see it change

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = torch.utils.data.get_worker_info()
        urls = self.peer.urls[worker.id :: worker.num_workers] if worker else self.peer.urls
        epoch, videos = int(self.epoch), self.material.videos
        for first in range(0, len(self.material.store), videos):

            def draw(video: int, first: int = first) -> Draw:
                return self.material.draw(epoch, first + video)

            for _, clip in self.peer.pass_over(urls, draw):
                yield torch.from_numpy(clip)


class Ring(TorchDataset[int]):
    """Workers write into shared memory that is made once: the best that can be done for the raw pixels, too.

    Items are (number of the batch, (epoch, row)); a batch's number tells its slot.
    """

    def __init__(self, material: Material, peer: RawMap, slots: int) -> None:
        self.material, self.peer = material, peer
        self.memory = torch.zeros(slots, BATCH, K, 3, *SIZE, dtype=torch.uint8).share_memory_()

    def __getitems__(self, items: list[tuple[int, tuple[int, int]]]) -> list[tuple[int, int]]:
        slot = items[0][0] % len(self.memory)
        for place, (_, item) in enumerate(items):
            self.peer.fill(self.material.draw(*item), self.memory[slot, place].numpy())
        return [(slot, len(items))]


class Numbered:
    """The batches with their number at every item."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[tuple[int, tuple[int, int]]]]:
        for number, items in enumerate(self.batches):
            yield [(number, item) for item in items]

    def __len__(self) -> int:
        return len(self.batches)


def first_of(items: list[Any]) -> Any:
    """Collates what is a batch already."""
    return items[0]


def loaders(material: Material, peers: dict[str, Peer]) -> dict[str, Callable[[int], Iterator[torch.Tensor]]]:
    """Functions that give the batches of an epoch. Workers stay, so that only the first one pays for starting them."""
    options: dict[str, Any] = {"num_workers": WORKERS, "persistent_workers": True, "prefetch_factor": 2}
    order = np.arange(len(material.store))
    found: dict[str, Callable[[int], Iterator[torch.Tensor]]] = {}

    def mapped(data: Any) -> Callable[[int], Iterator[torch.Tensor]]:
        batches = Batches(order, BATCH, seed=SEED)
        loader = DataLoader(data, batch_sampler=batches, **options)

        def epoch(number: int) -> Iterator[torch.Tensor]:
            batches.epoch = number
            for batch in loader:
                yield batch if isinstance(batch, torch.Tensor) else batch.frames

        return epoch

    found[OURS] = mapped(material.loader_clips("rgb"))
    found[PLANES] = mapped(material.loader_clips("yuv"))
    config = DataConfig(shards="", num_segments=K, workers=WORKERS)
    planes = Loader(material.store, config, subset="train", batch=BATCH, seed=SEED, planes=True)
    found[WHOLE] = lambda number: (batch.planes for batch in planes.planes(number))
    for name in (RAWFRAMES, USUAL, RAW):
        if name in peers:
            found[name] = mapped(Random(material, peers[name]))
    if isinstance(stream_peer := peers.get(WDS_FRAMES), WebdatasetFrames):
        stream = Stream(material, stream_peer)
        stream_loader = DataLoader(stream, batch_size=BATCH, **options)

        def stream_epoch(number: int) -> Iterator[torch.Tensor]:
            stream.epoch[0] = number
            yield from stream_loader

        found[WDS_FRAMES] = stream_epoch
    if isinstance(raw := peers.get(RAW), RawMap):
        ring, batches = Ring(material, raw, 2 * WORKERS + 2), Batches(order, BATCH, seed=SEED)
        ring_loader = DataLoader(ring, batch_sampler=Numbered(batches), collate_fn=first_of, **options)

        def ring_epoch(number: int) -> Iterator[torch.Tensor]:
            batches.epoch = number
            for slot, count in ring_loader:
                yield ring.memory[slot, :count]

        found[f"{RAW}, through a ring like ours"] = ring_epoch
    return found


def end_to_end(
    material: Material, peers: dict[str, Peer], not_run: dict[str, str], rounds: int
) -> tuple[Samples, list[dict[str, Any]]]:
    """Clips per second in this process; every batch is touched alike, a byte of each memory page."""

    def consume(epoch: Callable[[int], Iterator[torch.Tensor]], number: int) -> None:
        count = 0
        for batch in epoch(number + 1):
            batch.view(torch.uint8).reshape(-1)[::4096].sum()
            count += len(batch)
        if count != len(material.store):
            raise RuntimeError(f"{count} clips instead of {len(material.store)}")

    wanted = (RAWFRAMES, USUAL, RAW, WDS_FRAMES)
    missing = {name: reason for name, reason in not_run.items() if name in wanted}
    of = loaders(material, {name: peer for name, peer in peers.items() if name not in not_run})
    samples = alternate(
        {name: functools.partial(consume, epoch) for name, epoch in of.items()}, rounds, missing, quiet=QUIET
    )
    table = rows(samples, missing, dict.fromkeys(samples, len(material.store)), "clip", WHOLE)
    for row in table:
        if "not_run" not in row:
            row["clips_per_s"] = round(1000 / row["wall_ms_per_clip"], 1)
    return samples, table


def conversion(material: Material, rounds: int) -> list[dict[str, Any]]:
    """What the device has to do for planes, done here on one thread: milliseconds of CPU per clip."""
    config = DataConfig(shards="", num_segments=K, workers=0)
    loader = Loader(material.store, config, subset="train", batch=BATCH, seed=SEED, planes=True)
    batch, used = next(loader.planes(0)), []
    for _ in range(rounds + 1):
        before = cpu_seconds()
        rgb_of_planes(batch.planes, batch.views, material.store.frame_size, SIZE[0])
        used.append(1000 * (cpu_seconds() - before) / len(batch.planes))
    return [{"peer": "pasnet.data.rgb_of_planes on the CPU", "cpu_ms_per_clip": round(statistics.median(used[1:]), 2)}]


def run(dataset: Dataset, rounds: int, scratch: Path) -> dict[str, Any]:
    """Everything about reading."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    allow_torchvision()
    material = Material(dataset, scratch)
    peers, not_run = ready(material, scratch)
    alone, alone_table = one_process(material, peers, not_run, rounds)
    together, loader_table = end_to_end(material, peers, not_run, rounds)
    others = [n for n in alone if n not in (OURS, PLANES, RAW)]
    quickest = min((r for n in others if (r := ratio(alone, n, OURS)) is not None), default=None)
    quickest_planes = min((r for n in others if (r := ratio(alone, n, PLANES)) is not None), default=None)
    shares = {row["peer"]: row.get("bytes_read_over_bytes_used") for row in alone_table}

    def faster(than: str, name: str = WHOLE) -> float | None:
        return ratio(together, than, name, "wall")

    bounds = [
        bound("RGB clip, one process: every peer's CPU time over ours > 1", quickest, lambda v: v > 1),
        bound("planes, one process: every peer's CPU time over ours > 1", quickest_planes, lambda v: v > 1),
        bound("bytes read <= 1.1x the bytes used", shares[OURS], lambda v: v <= 1.1),
        bound(f"loader, whole frames: >= 3.5x {USUAL}", faster(USUAL), lambda v: v >= 3.5),
        bound(f"loader, whole frames: >= 1.3x {RAWFRAMES}, uint8", faster(RAWFRAMES), lambda v: v >= 1.3),
        bound(f"loader, whole frames: >= 0.9x {RAW}", faster(RAW), lambda v: v >= 0.9),
    ]
    for name, what in ((PLANES, "planes, cropped and resized,"), (OURS, "RGB")):
        said = f"for comparison, {what} through a plain DataLoader:"
        bounds += [
            bound(f"{said} >= 3.5x {USUAL}", faster(USUAL, name), lambda v: v >= 3.5),
            bound(f"{said} >= 1.3x {RAWFRAMES}, uint8", faster(RAWFRAMES, name), lambda v: v >= 1.3),
            bound(f"{said} >= 0.9x {RAW}", faster(RAW, name), lambda v: v >= 0.9),
        ]
    return {
        "what": f"K = {K} random segment frames under one random crop, uint8 (16, 3, 224, 224); page cache warm",
        "videos": material.videos,
        "frames": int(material.store.num_frames[: material.videos].sum()),
        "clips_a_round": {"one process": material.videos, "loaders": len(material.store)},
        "tables": {
            "one process, CPU per clip": alone_table,
            f"DataLoader, {WORKERS} workers, batches of {BATCH}": loader_table,
            "crop, resize and colour of planes, which a GPU would do": conversion(material, rounds),
        },
        "bounds": bounds,
    }
