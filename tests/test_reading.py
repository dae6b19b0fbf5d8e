"""shards/ from the reader's side: which frames, which clips, in which order, from where."""

from __future__ import annotations

import collections
import functools
import http.server
import os
import pickle
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from pasnet.config import DataConfig
from pasnet.data import train_view
from shards import (
    Batches,
    Clips,
    ShardError,
    View,
    build,
    centre,
    dense_indices,
    eco_indices,
    find_dataset,
    multi_clip_indices,
    open_shards,
    scan,
    segment_indices,
    uniform_indices,
)
from shards.stream import ClipStream, Streamed, shard_urls

FOUR = functools.partial(segment_indices, num_segments=4)
LOOK = functools.partial(train_view, config=DataConfig(shards=""))
frames, counts = st.integers(1, 2000), st.integers(1, 100)
MANY_WORKERS = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # that is the point


class TestSampling:
    def test_centres_are_those_of_eco(self) -> None:
        # ECO-pytorch's test indices for 250 frames and 16 segments, counted from 1
        expected = [8, 24, 40, 55, 71, 86, 102, 118, 133, 149, 165, 180, 196, 211, 227, 243]
        assert (segment_indices(250, 16) + 1).tolist() == expected
        assert (eco_indices(250, 16, "test") + 1).tolist() == expected
        assert (eco_indices(250, 16, "val") + 1).tolist() == expected

    @settings(deadline=None)
    @given(n=frames, k=counts, seed=st.integers(0, 2**32))
    def test_every_draw_lies_in_its_segment(self, n: int, k: int, seed: int) -> None:
        for indices in (segment_indices(n, k), segment_indices(n, k, np.random.default_rng(seed))):
            segment = np.arange(k)
            assert indices.shape == (k,) and indices.dtype == np.int64
            assert (indices >= np.floor(segment * n / k)).all()
            assert (indices <= np.ceil((segment + 1) * n / k) - 1).all()

    @settings(deadline=None)
    @given(n=frames, k=counts)
    def test_centres_are_spread_evenly_and_symmetrically(self, n: int, k: int) -> None:
        indices = segment_indices(n, k)
        gaps = np.diff(indices)
        assert k == 1 or gaps.max() - gaps.min() <= 1
        if n >= k:
            assert len(set(indices.tolist())) == k
        # read backwards the same, up to the rounding down of a centre between two frames
        assert np.abs((n - 1 - indices[::-1]) - indices).max() <= 1

    def test_short_video_is_spread_not_stuck_on_frame_one(self) -> None:
        assert segment_indices(4, 8).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert segment_indices(1, 5).tolist() == [0] * 5 and segment_indices(5, 5).tolist() == [0, 1, 2, 3, 4]

    def test_every_frame_is_within_reach(self) -> None:
        rng = np.random.default_rng(0)
        seen = set(np.concatenate([segment_indices(50, 16, rng) for _ in range(500)]).tolist())
        assert seen == set(range(50))

    @settings(deadline=None)
    @given(n=frames, k=counts)
    def test_uniform_has_both_ends(self, n: int, k: int) -> None:
        indices = uniform_indices(n, k)
        assert indices.shape == (k,) and (np.diff(indices) >= 0).all() and 0 <= indices[0] <= indices[-1] < n
        if k > 1:
            assert (indices[0], indices[-1]) == (0, n - 1)
        else:
            assert indices[0] == (n - 1) // 2

    @settings(deadline=None)
    @given(n=frames, length=counts, stride=st.integers(1, 8), seed=st.integers(0, 2**32))
    def test_dense_is_one_stretch(self, n: int, length: int, stride: int, seed: int) -> None:
        span = (length - 1) * stride + 1
        for indices in (
            dense_indices(n, length, stride),
            dense_indices(n, length, stride, np.random.default_rng(seed)),
        ):
            assert indices.shape == (length,) and indices.min() >= 0 and indices.max() < n
            assert (np.diff(indices) % n == stride % n).all()
            if span <= n:
                assert (np.diff(indices) == stride).all()
        middle = dense_indices(n, length, stride)
        assert middle[0] == max(n - span, 0) // 2

    @settings(deadline=None)
    @given(n=frames, length=st.integers(1, 32), stride=st.integers(1, 4), clips=st.integers(1, 12))
    def test_clips_cover_the_video(self, n: int, length: int, stride: int, clips: int) -> None:
        indices = multi_clip_indices(n, length, stride, clips)
        assert indices.shape == (clips, length) and indices.min() >= 0 and indices.max() < n
        if clips == 1:
            assert (indices[0] == dense_indices(n, length, stride)).all()
        elif (length - 1) * stride + 1 <= n:
            assert indices[0, 0] == 0 and indices[-1, -1] == n - 1

    def test_eco_as_it_was(self) -> None:
        assert eco_indices(3, 8, "val").tolist() == eco_indices(8, 8, "val").tolist() == [0] * 8
        assert eco_indices(3, 8, "test").tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
        assert eco_indices(7, 8, "train", np.random.default_rng(0)).tolist() == [0] * 8
        rng = np.random.default_rng(0)
        seen = np.stack([eco_indices(250, 16, "train", rng) for _ in range(400)])
        blocks = np.arange(16) * 15  # 250 // 16 frames each; the last 10 are never seen
        assert (seen >= blocks).all() and (seen < blocks + 15).all() and seen.max() == 239
        with pytest.raises(ValueError, match="needs an rng"):
            eco_indices(9, 3, "train")
        with pytest.raises(ValueError, match="unknown mode"):
            eco_indices(9, 3, "best")  # type: ignore[arg-type]

    @pytest.mark.parametrize("wrong", [0, -1])
    def test_nothing_to_sample_is_an_error(self, wrong: int) -> None:
        for call in (
            lambda: segment_indices(wrong, 8),
            lambda: segment_indices(8, wrong),
            lambda: dense_indices(8, wrong),
            lambda: dense_indices(8, 4, wrong),
            lambda: multi_clip_indices(8, 4, 1, wrong),
            lambda: uniform_indices(wrong, 1),
            lambda: eco_indices(8, wrong, "test"),
        ):
            with pytest.raises(ValueError, match=f"must be at least 1, got {wrong}"):
                call()


class TestClips:
    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize("view", [View(16, 58, 224, 224), View(0, 84, 192, 256), View(21, 31, 168, 224)])
    def test_a_clip_is_its_frames_cropped_and_resized(self, shard_folder: Path, view: View, flip: bool) -> None:
        from PIL import Image

        store = open_shards(shard_folder)
        indices = [0, 3, 3, 7]
        top, left, height, width = (number // 2 * 2 for number in view[:4])
        expected = [
            np.asarray(Image.fromarray(frame[top : top + height, left : left + width]).resize((224, 224)))
            for frame in store.read_frames(2, indices)
        ]
        want = np.stack(expected).transpose(0, 3, 1, 2).astype(int)
        want = want[..., ::-1] if flip else want
        got = store.read_clip(2, indices, view._replace(flip=flip), (224, 224))
        assert got.shape == (4, 3, 224, 224) and got.dtype == np.uint8
        assert np.abs(got - want).mean() < 2.5 and np.abs(got[..., ::-1] - want).mean() > 10
        assert (got[1] == got[2]).all()

    def test_planes_are_the_jpegs_own(self, shard_folder: Path) -> None:
        store = open_shards(shard_folder)
        planes = store.read_clip(2, [4], View(0, 0, 256, 340), (256, 340), colour="yuv")
        assert planes.shape == (1, 256 * 340 * 3 // 2)
        grey = simplejpeg.decode_jpeg(store.read_jpegs(2, [4])[0], colorspace="GRAY")[..., 0].astype(int)
        assert np.abs(planes[0, : 256 * 340].reshape(256, 340) - grey).max() <= 2  # two implementations of the DCT

    def test_wrong_views_and_sizes(self, shard_folder: Path) -> None:
        store, view = open_shards(shard_folder), View(16, 58, 224, 224)
        with pytest.raises(ValueError, match="does not fit into frames of 256x340"):
            store.read_clip(0, [0], View(100, 0, 200, 200), (224, 224))
        with pytest.raises(ValueError, match="even and at least 2, got 223x224"):
            store.read_clip(0, [0], view, (223, 224))
        with pytest.raises(ValueError, match="out must be uint8 of shape"):
            store.read_clip(0, [0], view, (224, 224), out=np.empty((1, 3, 2, 2), np.uint8))
        with pytest.raises(IndexError, match="frame 99 asked for"):
            store.read_clip(0, [99], view, (224, 224))

    def test_threads_share_a_shard_set(self, shard_folder: Path) -> None:
        store, view = open_shards(shard_folder), View(16, 58, 224, 224)
        alone = [store.read_clip(row, [0, 5], view, (64, 64)) for row in range(12)]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda i: store.read_clip(i % 12, [0, 5], view, (64, 64)), range(120)))
        assert all((clip == alone[i % 12]).all() for i, clip in enumerate(together))

    def test_only_the_bytes_of_the_clip_are_read(self, shard_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        store, read, pread = open_shards(shard_folder), [], os.pread
        wanted = sum(len(store.read_jpegs(3, [i])[0]) for i in set(FOUR(int(store.num_frames[3])).tolist()))

        def counting(file: int, size: int, place: int) -> bytes:
            read.append(size)
            return pread(file, size, place)

        monkeypatch.setattr("os.pread", counting)
        assert Clips(store, FOUR)[3].frames.shape == (4, 3, 224, 224)
        assert sum(read) == wanted

    def test_a_clip_is_a_function_of_seed_epoch_and_video(self, shard_folder: Path) -> None:
        clips = Clips(open_shards(shard_folder), FOUR, look=LOOK, seed=7)
        again = pickle.loads(pickle.dumps(Clips(open_shards(shard_folder), FOUR, look=LOOK, seed=7)))
        for row in (0, 5):
            assert (clips[3, row].frames == again[3, row].frames).all()
        drawn = {clips[epoch, 0].frames.tobytes() for epoch in range(4)}
        drawn.add(Clips(open_shards(shard_folder), FOUR, look=LOOK, seed=8)[0, 0].frames.tobytes())
        assert len(drawn) == 5
        still = Clips(open_shards(shard_folder), FOUR)
        assert (still[0, 1].frames == still[9, 1].frames).all()
        assert (still[1].indices == segment_indices(int(still.shards.num_frames[1]), 4)).all()

    @pytest.mark.parametrize("workers", [0, 2])
    def test_errors_name_the_key(self, shard_folder: Path, workers: int) -> None:
        store = open_shards(shard_folder)
        clips = Clips(store, FOUR, look=_too_large)
        loader = DataLoader(clips, batch_sampler=Batches([4], 1, seed=None), num_workers=workers, collate_fn=list)
        with pytest.raises(ShardError, match=f"{store.keys[4]} \\(row 4, epoch 0\\): ValueError: View.*does not fit"):
            list(loader)
        with pytest.raises(IndexError, match="row 12 asked for"):
            clips[12]


def _too_large(height: int, width: int, *, rng: object) -> View:
    return View(0, 0, height + 2, width)


class TestBatches:
    @settings(deadline=None)
    @given(
        rows=st.integers(1, 200),
        batch=st.integers(1, 20),
        world=st.integers(1, 9),
        seed=st.none() | st.integers(0, 9),
        epoch=st.integers(0, 3),
    )
    def test_every_clip_once_over_all_ranks(
        self, rows: int, batch: int, world: int, seed: int | None, epoch: int
    ) -> None:
        if rows < world:
            with pytest.raises(ValueError, match="cannot be shared"):
                Batches(range(rows), batch, seed=seed, rank=0, world=world)
            return
        ranks = [Batches(range(rows), batch, seed=seed, rank=rank, world=world) for rank in range(world)]
        for one in ranks:
            one.epoch = epoch
        dealt = [list(one) for one in ranks]
        assert len({len(batches) for batches in dealt}) == 1 and len(dealt[0]) == len(ranks[0])
        assert all(1 <= len(items) <= batch + (world > 1) for batches in dealt for items in batches)
        seen = [row for batches in dealt for items in batches for _, row in items]
        assert sorted(seen) == list(range(rows))
        # step by step, what the ranks see together is what one process with their batches together would see
        order = np.arange(rows) if seed is None else np.random.default_rng([seed, epoch]).permutation(rows)
        steps = [sorted(row for batches in dealt for _, row in batches[i]) for i in range(len(dealt[0]))]
        assert [row for step in steps for row in step] == [
            row for part in np.split(order, np.cumsum([len(s) for s in steps])[:-1]) for row in sorted(part.tolist())
        ]
        # and a resumed run gets the rest
        for start in (1, len(dealt[0]), 0):
            ranks[0].start = start
            assert list(ranks[0]) == dealt[0][start:]
            assert list(ranks[0]) == dealt[0][start:]  # a DataLoader with workers begins twice
            ranks[0].epoch = epoch
            assert list(ranks[0]) == dealt[0]  # and then whole epochs again
        for wrong in (-1, len(dealt[0]) + 1):
            ranks[0].start = wrong
            with pytest.raises(ValueError, match="start must be 0 to"):
                iter(ranks[0])

    @settings(deadline=None)
    @given(rows=st.integers(1, 300), batch=st.integers(1, 5), parts=st.integers(1, 6), world=st.integers(1, 6))
    def test_steps_are_the_same_however_they_are_shared(self, rows: int, batch: int, parts: int, world: int) -> None:
        step = batch * parts * world
        if rows < world:
            return
        alone = Batches(range(rows), step, seed=3, step=step)
        ranks = [Batches(range(rows), batch, seed=3, rank=rank, world=world, step=step) for rank in range(world)]
        steps = ranks[0].steps()
        dealt = [list(one) for one in ranks]
        assert [total for totals in steps for total in totals] == ranks[0].totals()
        assert all(1 <= len(items) <= batch + (world > 1) for batches in dealt for items in batches)
        if 2 * world <= step:  # else a rest of half a step may be less than a clip each
            assert list(map(sum, steps)) == list(map(sum, alone.steps()))
        # step by step, all ranks together see the next clips of the same order
        order = [row for items in alone for _, row in items]
        first = batches_before = 0
        for totals in steps:
            numbers = range(batches_before, batches_before + len(totals))
            seen = [row for batches in dealt for number in numbers for _, row in batches[number]]
            assert sorted(seen) == sorted(order[first : first + sum(totals)])
            first, batches_before = first + sum(totals), batches_before + len(totals)
        assert first == rows

    def test_a_small_rest_joins_the_last_step(self) -> None:
        def steps(rows: int, batch: int, world: int) -> list[int]:
            return list(map(sum, Batches(range(rows), batch, seed=0, world=world, step=64).steps()))

        # the three splits of UCF-101, and HMDB-51's: ECO's steps of 64 clips
        for batch, world in ((64, 1), (16, 1), (16, 2), (2, 8), (1, 32)):
            assert steps(9537, batch, world) == [64] * 148 + [65]
            assert steps(9586, batch, world) == [64] * 149 + [50]
            assert steps(9624, batch, world) == [64] * 149 + [88]
            assert steps(3570, batch, world) == [64] * 55 + [50]
        assert steps(31, 16, 1) == [31]
        with pytest.raises(ValueError, match="step must be a multiple of batch x world, 16 x 3, got 64"):
            Batches(range(99), 16, seed=0, world=3, step=64)

    @pytest.mark.parametrize("world", [1, 2, 3])
    def test_an_evaluation_sees_every_video_once(self, shard_folder: Path, world: int) -> None:
        store = open_shards(shard_folder)
        seen: list[str] = []
        for rank in range(world):
            batches = Batches(store.select(1, "test"), 2, seed=None, rank=rank, world=world)
            loader = DataLoader(Clips(store, FOUR), batch_sampler=batches, num_workers=2, collate_fn=list)
            seen += [clip.key for batch in loader for clip in batch]
        assert sorted(seen) == [store.keys[row] for row in store.select(1, "test")]

    @MANY_WORKERS
    def test_workers_change_nothing(self, shard_folder: Path) -> None:
        store = open_shards(shard_folder)

        def run(workers: int) -> list[tuple[str, bytes]]:
            batches = Batches(store.select(1, "train"), 2, seed=5)
            batches.epoch = 3
            loader = DataLoader(
                Clips(store, FOUR, look=LOOK, seed=5), batch_sampler=batches, num_workers=workers, collate_fn=list
            )
            return [(clip.key, clip.frames.tobytes()) for batch in loader for clip in batch]

        assert run(0) == run(1) == run(2) == run(4)


def drain(stream: Iterator[Streamed]) -> list[tuple[str, bytes]]:
    return [(streamed.clip.key, streamed.clip.frames.tobytes()) for streamed in stream]


class TestStream:
    def make(self, folder: Path | str, **options: object) -> ClipStream:
        given = {"look": LOOK, "size": (64, 64), "split": 1, "subset": "train", "seed": 4, "lanes": 4, "shuffle": 3}
        return ClipStream(shard_urls(folder), FOUR, **{**given, **options})  # type: ignore[arg-type]

    def test_the_clips_are_those_of_random_access(self, shard_folder: Path) -> None:
        store = open_shards(shard_folder)
        clips = Clips(store, FOUR, look=LOOK, size=(64, 64), seed=4)
        expected = {store.keys[row]: clips[2, int(row)].frames.tobytes() for row in store.select(1, "train")}
        streamed = drain(self.make(shard_folder).clips(epoch=2))
        assert len(streamed) == len(expected) and dict(streamed) == expected

    @MANY_WORKERS
    def test_workers_change_neither_order_nor_clips(self, shard_folder: Path) -> None:
        stream = self.make(shard_folder)
        alone = drain(stream.clips(epoch=1))
        for workers in (1, 2, 3, 4, 7):  # 3 and 7 are more than share 4 lanes evenly
            assert drain(stream.clips(epoch=1, workers=workers)) == alone
        assert [key for key, _ in drain(stream.clips(epoch=0))] != [key for key, _ in alone]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_resuming_equals_going_on(self, shard_folder: Path, workers: int) -> None:
        stream = self.make(shard_folder)
        whole = list(stream.clips(epoch=1))
        for other in ({"lanes": 12}, {"seed": 5}, {"shuffle": 2}, {"world": 2}):
            with pytest.raises(ShardError, match="other settings, or other shards"):
                next(self.make(shard_folder, **other).clips(epoch=1, after=whole[0].place))
        with pytest.raises(ShardError, match="is not of epoch 2"):
            next(stream.clips(epoch=2, after=whole[0].place))
        for done in (1, 4, len(whole)):
            rest = drain(stream.clips(epoch=1, workers=workers, after=whole[done - 1].place))
            assert rest == drain(iter(whole[done:]))

    @pytest.mark.parametrize("world", [1, 3, 9, 20])  # there are 8 shards, of one or two videos
    @pytest.mark.parametrize("seed", [None, 1])
    def test_every_clip_once_over_all_ranks(self, shard_folder: Path, world: int, seed: int | None) -> None:
        store = open_shards(shard_folder)
        for split, subset in ((1, "test"), (1, "train"), (None, None)):
            options = {"seed": seed, "look": centre, "split": split, "subset": subset, "world": world}
            ranks = [drain(self.make(shard_folder, rank=rank, **options).clips()) for rank in range(world)]
            seen = collections.Counter(key for clips in ranks for key, _ in clips)
            wanted = range(len(store)) if split is None else store.select(split, subset)
            assert seen == collections.Counter(store.keys[row] for row in wanted)
            if world == 20 and split is None:  # of two videos, each of two ranks has one
                assert max(map(len, ranks)) == 1

    def test_ranks_that_share_a_shard_go_on_where_they_were(self, videos: Path, tmp_path: Path) -> None:
        build(scan(*find_dataset(videos)), tmp_path, num_shards=1)
        seen: list[str] = []
        for rank in range(3):
            options = {"split": None, "subset": None, "rank": rank, "world": 3}
            stream = self.make(tmp_path, **options)
            whole = list(stream.clips(epoch=1))
            assert len(whole) == 4
            for done in range(1, 4):
                rest = stream.clips(epoch=1, workers=2 * (done % 2), after=whole[done - 1].place)
                assert drain(rest) == drain(iter(whole[done:]))
            seen += [streamed.clip.key for streamed in whole]
        assert len(set(seen)) == len(seen) == 12

    def test_no_shards(self) -> None:
        with pytest.raises(ShardError, match="no shards to read"):
            ClipStream([], FOUR)

    def test_all_videos_without_a_split(self, shard_folder: Path) -> None:
        assert len(drain(self.make(shard_folder, split=None, subset=None).clips())) == 12

    @pytest.mark.parametrize("workers", [0, 2])
    def test_damage_names_shard_and_key(self, shard_folder: Path, tmp_path: Path, workers: int) -> None:
        copy = Path(shutil.copytree(shard_folder, tmp_path / "copy"))
        store = open_shards(copy)
        shard = store._shard_names[store._shard_of[0]]
        content = bytearray((copy / shard).read_bytes())
        place = int(store._offsets[0])
        content[place : place + int(store._frame_offsets[-1])] = bytes(int(store._frame_offsets[-1]))
        (copy / shard).write_bytes(content)
        with pytest.raises(ShardError, match=shard):
            drain(self.make(copy, split=None, subset=None).clips(workers=workers))
        (copy / shard).write_bytes(content[: place + 100])
        with pytest.raises(ShardError, match=f"{shard}.*at or after"):
            drain(self.make(copy, split=None, subset=None).clips(workers=workers))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_shard_that_ends_early_between_two_videos(self, shard_folder: Path, tmp_path: Path, workers: int) -> None:
        import tarfile

        copy = Path(shutil.copytree(shard_folder, tmp_path / "copy"))
        with tarfile.open(copy / "shard-00000.tar") as tar:
            members = tar.getmembers()
        assert len(members) == 4
        content = (copy / "shard-00000.tar").read_bytes()
        (copy / "shard-00000.tar").write_bytes(content[: members[2].offset])
        with pytest.raises(ShardError, match=r"shard-00000\.tar: .*it ended after 1 of 2 videos"):
            drain(self.make(copy).clips(workers=workers))

    def test_subsets_that_do_not_exist(self, shard_folder: Path) -> None:
        for split, subset in ((None, "train"), (1, None), (7, "train"), (1, "Train")):
            with pytest.raises(ShardError, match="or neither"):
                self.make(shard_folder, split=split, subset=subset)

    def test_two_epochs_at_once(self, shard_folder: Path) -> None:
        stream = self.make(shard_folder)
        both = list(zip(stream.clips(0), stream.clips(1), strict=True))
        assert drain(one for one, _ in both) == drain(stream.clips(0))
        assert drain(other for _, other in both) == drain(stream.clips(1))

    def test_from_a_web_server(self, shard_folder: Path) -> None:
        handler = functools.partial(_Quiet, directory=str(shard_folder))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            base = f"http://127.0.0.1:{server.server_port}"
            try:
                assert drain(self.make(base).clips(epoch=2, workers=2)) == drain(self.make(shard_folder).clips(epoch=2))
                with pytest.raises(ShardError, match=r"nothing/manifest\.json: cannot be read"):
                    shard_urls(f"{base}/nothing")
            finally:
                server.shutdown()


@pytest.mark.parametrize(
    ("sample", "count"),
    [
        (functools.partial(segment_indices, num_segments=3), 3),
        (functools.partial(uniform_indices, num_samples=3), 3),
        (functools.partial(dense_indices, clip_len=2, stride=2), 2),
        (functools.partial(multi_clip_indices, clip_len=2, stride=1, num_clips=3), 6),
        (functools.partial(eco_indices, num_segments=3, mode="val"), 3),
    ],
)
@pytest.mark.parametrize("seed", [None, 0])
def test_every_sampling_goes_with_both_readers(shard_folder: Path, sample: Any, count: int, seed: int | None) -> None:
    store = open_shards(shard_folder)
    clips = Clips(store, sample, size=(32, 32), seed=seed)
    stream = ClipStream(shard_urls(shard_folder), sample, size=(32, 32), seed=seed)
    streamed = {clip.key: clip for _, clip in stream.clips(epoch=0, workers=0)}
    assert sorted(streamed) == sorted(store.keys)
    for row, key in enumerate(store.keys):
        clip = clips[0, row]
        assert clip.frames.shape == (count, 3, 32, 32) and clip.indices.shape == (count,)
        assert (clip.indices == streamed[key].indices).all() and (clip.frames == streamed[key].frames).all()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass
