"""shards/: official lists, decoding, the format and its readers."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

import shards
from shards import (
    BuildError,
    DatasetError,
    DecodeError,
    DecodeSettings,
    ShardError,
    build,
    decode_video,
    find_dataset,
    open_shards,
    scan,
    segment_indices,
)
from shards.decode import ffmpeg_exe

SETTINGS = DecodeSettings()


def make_video(path: Path, frames: int = 10, size: str = "320x240", source: str = "testsrc", extra: tuple = ()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [ffmpeg_exe(), "-v", "error", "-y", "-f", "lavfi", "-i", f"{source}=size={size}:rate=25"]
    subprocess.run([*command, "-frames:v", str(frames), *extra, "-c:v", "mpeg4", "-q:v", "2", str(path)], check=True)
    return path


def digest_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".tar", ".parquet")}


class TestSampling:
    def test_centres_are_those_of_eco(self) -> None:
        # ECO-pytorch's test indices for 250 frames and 16 segments, counted from 1
        expected = [8, 24, 40, 55, 71, 86, 102, 118, 133, 149, 165, 180, 196, 211, 227, 243]
        assert (segment_indices(250, 16) + 1).tolist() == expected

    @pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 31, 250])
    @pytest.mark.parametrize("k", [1, 3, 8, 16, 48])
    def test_every_draw_lies_in_its_segment(self, n: int, k: int) -> None:
        rng = np.random.default_rng(n * 100 + k)
        for indices in [segment_indices(n, k)] + [segment_indices(n, k, rng) for _ in range(50)]:
            segment = np.arange(k)
            assert indices.shape == (k,)
            assert (indices >= np.floor(segment * n / k)).all()
            assert (indices <= np.ceil((segment + 1) * n / k) - 1).all()

    def test_short_video_is_spread_not_stuck_on_frame_one(self) -> None:
        assert segment_indices(4, 8).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]

    def test_last_frames_are_within_reach(self) -> None:
        rng = np.random.default_rng(0)
        assert max(segment_indices(250, 16, rng)[-1] for _ in range(300)) == 249

    @pytest.mark.parametrize(("n", "k"), [(0, 8), (8, 0), (-1, 1)])
    def test_nothing_to_sample_is_an_error(self, n: int, k: int) -> None:
        with pytest.raises(ValueError, match="at least one"):
            segment_indices(n, k)


class TestDecode:
    @pytest.mark.parametrize("frames", [1, 10, 37])
    def test_every_frame_once(self, tmp_path: Path, frames: int) -> None:
        jpegs, source = decode_video(make_video(tmp_path / "a.avi", frames), SETTINGS)
        assert len(jpegs) == frames
        assert simplejpeg.decode_jpeg_header(jpegs[0])[:2] == (256, 340)
        assert (source.codec, source.width, source.height, source.fps) == ("mpeg4", 320, 240, 25.0)

    def test_colours_survive_the_planes(self, tmp_path: Path) -> None:
        # against ffmpeg's own conversion to RGB: a wrong range or matrix costs far more than JPEG does
        video = make_video(tmp_path / "a.avi", 3)
        jpegs, _ = decode_video(video, replace(SETTINGS, quality=95))
        raw = subprocess.run(
            [
                ffmpeg_exe(),
                "-v",
                "error",
                "-i",
                str(video),
                "-vf",
                "scale=340:256",
                "-f",
                "rawvideo",
                "-pix_fmt",
                "rgb24",
                "-",
            ],
            capture_output=True,
            check=True,
        ).stdout
        expected = np.frombuffer(raw, np.uint8).reshape(3, 256, 340, 3).astype(float)
        got = np.stack([simplejpeg.decode_jpeg(jpeg) for jpeg in jpegs]).astype(float)
        assert np.abs(got.mean((1, 2)) - expected.mean((1, 2))).max() < 2
        assert 10 * np.log10(255**2 / ((got - expected) ** 2).mean()) > 30

    def test_odd_names_reach_ffmpeg_unharmed(self, tmp_path: Path) -> None:
        # characters of HMDB-51's names, and a leading dash
        video = make_video(tmp_path / "plain.avi", 4)
        for name in ("a [b] #1 & (c); d!.avi", "-dash.avi", "ü@+~.avi", "per%03dcent.avi", "colon:1.avi"):
            odd = Path(shutil.copy(video, tmp_path / name))
            assert len(decode_video(odd, SETTINGS)[0]) == 4

    def test_variable_rate_neither_drops_nor_repeats(self, tmp_path: Path) -> None:
        gaps = ("-vf", "setpts='if(gt(N,4),N*3,N)/25/TB'", "-fps_mode", "passthrough")
        video = make_video(tmp_path / "gaps.mkv", 10, extra=gaps)
        assert len(decode_video(video, SETTINGS)[0]) == 10

    @pytest.mark.parametrize(
        ("content", "reason"),
        [(b"", "empty"), (b"<html>not a video</html>" * 50, "Invalid data"), (None, "no such file")],
    )
    def test_what_is_no_video_says_why(self, tmp_path: Path, content: bytes | None, reason: str) -> None:
        video = tmp_path / "bad.avi"
        if content is not None:
            video.write_bytes(content)
        with pytest.raises(DecodeError, match=reason) as raised:
            decode_video(video, SETTINGS)
        assert raised.value.video == video

    def test_sound_alone_is_no_video(self, tmp_path: Path) -> None:
        path = tmp_path / "sound.avi"
        sine = ["-f", "lavfi", "-i", "sine=duration=1", "-c:a", "pcm_s16le"]
        subprocess.run([ffmpeg_exe(), "-v", "error", "-y", *sine, str(path)], check=True)
        with pytest.raises(DecodeError):
            decode_video(path, SETTINGS)

    def test_time_limit(self, tmp_path: Path) -> None:
        video = make_video(tmp_path / "long.avi", 300)
        with pytest.raises(DecodeError, match=r"longer than 0\.01 s"):
            decode_video(video, replace(SETTINGS, timeout=0.01))

    @pytest.mark.shared
    def test_real_clips_have_their_true_number_of_frames(self, shared: Path) -> None:
        rows = list(csv.DictReader((shared / "data" / "frames.csv").read_text().splitlines()))
        chosen = [row for row in rows if not row["path"].startswith("jhmdb/")][::4] + rows[::60]
        for row in chosen:
            jpegs, source = decode_video(shared / "data" / row["path"], SETTINGS)
            assert (len(jpegs), source.codec) == (int(row["frames"]), row["codec"]), row["path"]
            assert (source.width, source.height) == (int(row["width"]), int(row["height"])), row["path"]


class TestDatasets:
    def ucf(self, root: Path, files: dict[str, str], classes: str = "1 Bow\r\n2 Kick\r\n") -> Path:
        (root / "lists").mkdir()
        (root / "lists" / "classInd.txt").write_bytes(classes.encode())
        for name, text in files.items():
            (root / "lists" / name).write_bytes(text.encode())
        for name in ("Bow/v_Bow_g01_c01.avi", "Bow/v_bow_g02_c01.avi", "Kick/v_Kick_g01_c01.avi"):
            path = root / "videos" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        return root

    def test_ucf_lists_with_their_oddities(self, tmp_path: Path) -> None:
        # CRLF, trailing blanks, no labels in test lists, and another case than the file's (UCF's HandStandPushups)
        lists = {
            "trainlist01.txt": "Bow/v_Bow_g01_c01.avi 1\r\nKick/v_Kick_g01_c01.avi 2 \r\n\r\n",
            "testlist01.txt": "Bow/v_Bow_g02_c01.avi\r\nKick/v_Kick_g09_c01.avi\r\n",
        }
        dataset = scan(*find_dataset(self.ucf(tmp_path, lists)))
        assert dataset.name == "ucf-layout" and dataset.class_names == ("Bow", "Kick")
        found = {video.key: (video.label, video.splits, video.group) for video in dataset.videos}
        assert found == {
            "Bow/v_Bow_g01_c01": (0, {1: "train"}, "Bow/g01"),
            "Bow/v_bow_g02_c01": (0, {1: "test"}, "Bow/g02"),
            "Kick/v_Kick_g01_c01": (1, {1: "train"}, "Kick/g01"),
        }
        assert dataset.missing == ("Kick/v_Kick_g09_c01.avi",)

    @pytest.mark.parametrize(
        ("lists", "message"),
        [
            ({"trainlist01.txt": "Jump/v_Jump_g01_c01.avi 1\n"}, r"trainlist01.txt:1: .*names no class"),
            ({"trainlist01.txt": "Bow/v_Bow_g01_c01.avi 2\n"}, r"label 2"),
            ({"trainlist01.txt": "Bow/v_Bow_g01_c01.avi 9\n"}, r"label 9"),
            (
                {"trainlist01.txt": "Bow/v_Bow_g01_c01.avi 1\n", "testlist01.txt": "Bow/v_Bow_g01_c01.avi\n"},
                "in train and in test of split 1",
            ),
            ({"trainlist01.txt": "Bow/v_Bow_g07_c01.avi 1\n"}, "holds none of the 1 videos"),
            ({"trainlist04.txt": "Bow/v_Bow_g01_c01.avi 1\n"}, "has lists of split 4"),
        ],
    )
    def test_wrong_lists_are_named(self, tmp_path: Path, lists: dict[str, str], message: str) -> None:
        with pytest.raises(DatasetError, match=message):
            scan(*find_dataset(self.ucf(tmp_path, lists)))

    def test_hmdb_lists_with_their_oddities(self, tmp_path: Path) -> None:
        # trailing blanks; code 0 is unused; kick is a prefix of kick_ball; J-HMDB writes @ for #; a stem with dots
        (tmp_path / "splits").mkdir()
        text = {
            "kick": "a#1_kick_f_cm_np1_ba_bad_0.avi 1 \nb.2_kick_f_cm_np1_ba_bad_0.avi 0 \n",
            "kick_ball": "c.avi 2 \n",
        }
        for class_name, lines in text.items():
            (tmp_path / "splits" / f"{class_name}_test_split1.txt").write_text(lines)
        for name in ("kick/a@1_kick_f_cm_np1_ba_bad_0.avi", "kick/b.2_kick_f_cm_np1_ba_bad_0.avi", "kick_ball/c.avi"):
            path = tmp_path / "videos" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        dataset = scan(*find_dataset(tmp_path))
        assert [(video.key, video.label, video.splits) for video in dataset.videos] == [
            ("kick/a@1_kick_f_cm_np1_ba_bad_0", 0, {1: "train"}),
            ("kick/b%2E2_kick_f_cm_np1_ba_bad_0", 0, {}),
            ("kick_ball/c", 1, {1: "test"}),
        ]
        assert dataset.videos[0].group == "a@1"

    def test_folder_without_videos(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match="no videos/ folder"):
            find_dataset(tmp_path)
        (tmp_path / "videos").mkdir()
        with pytest.raises(DatasetError, match="no split lists"):
            find_dataset(tmp_path)
        with pytest.raises(DatasetError, match="no such folder"):
            find_dataset(tmp_path / "nowhere")

    @pytest.mark.shared
    def test_official_lists(self, shared: Path) -> None:
        # `scan` itself refuses lists whose counts are not the official ones
        sizes = {}
        for name in ("ucf101", "hmdb51", "jhmdb"):
            dataset = scan(*find_dataset(shared / "data" / name))
            sizes[dataset.name] = (dataset.listed, len(dataset.class_names), len(dataset.videos), len(dataset.missing))
            by_group: dict[str, set[str]] = {}
            for video in dataset.videos if name == "ucf101" else ():
                if 1 in video.splits:
                    by_group.setdefault(video.group, set()).add(video.splits[1])
            assert all(len(subsets) == 1 for subsets in by_group.values())
        assert sizes == {"ucf101": (13320, 101, 91, 13229), "hmdb51": (6766, 51, 14, 6757), "jhmdb": (928, 21, 928, 0)}

    @pytest.mark.shared
    def test_a_list_with_a_line_less_is_refused(self, shared: Path, tmp_path: Path) -> None:
        lists = shutil.copytree(shared / "data" / "ucf101" / "ucfTrainTestlist", tmp_path / "lists")
        (lists / "testlist01.txt").chmod(0o644)
        lines = (lists / "testlist01.txt").read_text().splitlines()
        (lists / "testlist01.txt").write_text("\n".join(lines[1:]))
        with pytest.raises(DatasetError, match="not ucf101's official lists"):
            scan("ucf101", shared / "data" / "ucf101" / "videos", lists)


class TestFormat:
    def test_same_bytes_for_any_number_of_workers(self, videos: Path, shard_folder: Path, tmp_path: Path) -> None:
        build(scan(*find_dataset(videos)), tmp_path, workers=1, videos_per_shard=4)
        assert digest_of(tmp_path) == digest_of(shard_folder)
        assert len(list(tmp_path.glob("*.tar"))) == 8

    def test_plain_webdataset_reads_the_same_frames(self, shard_folder: Path) -> None:
        store = open_shards(shard_folder)
        urls = [str(path) for path in sorted(shard_folder.glob("*.tar"))]
        seen = {}
        for sample in shards.stream(urls, lambda n: segment_indices(n, 4)):
            seen[sample["key"]] = sample
        assert sorted(seen) == store.keys
        for row, key in enumerate(store.keys):
            indices = segment_indices(int(store.num_frames[row]), 4)
            assert (store.read_frames(row, indices) == seen[key]["frames"]).all()
            assert seen[key]["label"] == store.labels[row]

    def test_every_shard_holds_every_class(self, shard_folder: Path) -> None:
        # 12 videos of 3 classes over 8 shards: neighbours in class order never share a shard
        for tar in shard_folder.glob("*.tar"):
            with tarfile.open(tar) as file:
                classes = [name.split("/")[0] for name in file.getnames() if name.endswith(".json")]
            assert len(classes) == len(set(classes))

    def test_frames_are_the_videos_frames(self, videos: Path, shard_folder: Path) -> None:
        store = open_shards(shard_folder)
        for video in scan(*find_dataset(videos)).videos[:3]:
            row = store.keys.index(video.key)
            jpegs, _ = decode_video(video.path, SETTINGS)
            assert store.read_jpegs(row, range(int(store.num_frames[row]))) == jpegs

    def test_repeated_and_wrong_indices(self, shard_folder: Path) -> None:
        store = open_shards(shard_folder)
        assert store.read_frames(0, [2, 2, 0]).shape == (3, 256, 340, 3)
        with pytest.raises(IndexError, match=r"frame 99 asked for"):
            store.read_jpegs(0, [99])

    def test_damaged_videos_are_set_aside_with_a_reason(self, videos: Path, tmp_path: Path) -> None:
        data = shutil.copytree(videos, tmp_path / "data")
        victim = sorted((data / "videos").rglob("*.avi"))[2]
        victim.write_bytes(b"not a video at all")
        manifest = build(scan(*find_dataset(data)), tmp_path / "out")
        assert (manifest["videos"], manifest["failed"]) == (11, 1)
        [failure] = shards.failures(tmp_path / "out")
        assert failure["video"] == f"{victim.parent.name}/{victim.name}" and "Invalid data" in failure["reason"]
        assert len(open_shards(tmp_path / "out")) == 11

    def test_too_many_damaged_videos_stop_the_build(self, videos: Path, tmp_path: Path) -> None:
        data = shutil.copytree(videos, tmp_path / "data")
        for victim in sorted((data / "videos").rglob("*.avi"))[:4]:
            victim.write_bytes(b"not a video at all")
        with pytest.raises(BuildError, match="4 of 12 videos could not be decoded"):
            build(scan(*find_dataset(data)), tmp_path / "out")
        assert not (tmp_path / "out" / "manifest.json").exists()

    def test_finished_shards_are_skipped_and_lost_ones_rebuilt(self, videos: Path, tmp_path: Path) -> None:
        dataset, touched = scan(*find_dataset(videos)), []
        build(dataset, tmp_path, videos_per_shard=4)
        before = digest_of(tmp_path)
        build(dataset, tmp_path, videos_per_shard=4, on_video=lambda video: touched.append(video.key))
        assert touched == []
        lost, cut = sorted(tmp_path.glob("*.tar"))[:2]
        lost.unlink()
        cut.write_bytes(cut.read_bytes()[:-512])
        build(dataset, tmp_path, videos_per_shard=4, on_video=lambda video: touched.append(video.key))
        assert 2 <= len(touched) < 12
        assert digest_of(tmp_path) == before

    def test_a_half_rebuilt_folder_does_not_open(self, videos: Path, shard_folder: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(shard_folder, tmp_path / "copy"))
        dataset, other = scan(*find_dataset(videos)), replace(SETTINGS, quality=50)
        shards.build_shard(shards.plan(dataset, other, videos_per_shard=4)[0], copy, other)
        with pytest.raises(ShardError, match="not a finished shard folder"):
            open_shards(copy)

    def test_shards_of_an_earlier_plan_go(self, videos: Path, tmp_path: Path) -> None:
        dataset = scan(*find_dataset(videos))
        for per_shard, tars in ((1, 12), (64, 8)):
            manifest = build(dataset, tmp_path, videos_per_shard=per_shard)
            assert len(list(tmp_path.glob("*.tar"))) == len(manifest["shards"]) == tars
            assert len(list((tmp_path / "parts").iterdir())) == tars

    def test_a_video_that_is_damaged_in_the_middle_says_so(self, videos: Path, tmp_path: Path) -> None:
        data = shutil.copytree(videos, tmp_path / "data")
        victim = sorted((data / "videos").rglob("*.avi"))[0]
        content = bytearray(victim.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 400] = bytes(range(200)) * 2
        victim.write_bytes(content)
        manifest = build(scan(*find_dataset(data)), tmp_path / "out")
        assert (manifest["failed"], manifest["decoded_with_errors"]) == (0, 1)
        build(scan(*find_dataset(data)), tmp_path / "again")
        assert digest_of(tmp_path / "again") == digest_of(tmp_path / "out")

    def test_other_settings_rebuild(self, videos: Path, shard_folder: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(shard_folder, tmp_path / "copy")
        manifest = build(scan(*find_dataset(videos)), copy, replace(SETTINGS, quality=50), videos_per_shard=4)
        assert manifest["digest"] != open_shards(shard_folder).digest
        assert open_shards(copy).read_jpegs(0, [0]) != open_shards(shard_folder).read_jpegs(0, [0])

    def test_unfinished_folder_and_missing_split(self, shard_folder: Path, tmp_path: Path) -> None:
        with pytest.raises(ShardError, match="not a finished shard folder"):
            open_shards(tmp_path)
        with pytest.raises(ShardError, match="split 4 does not exist"):
            open_shards(shard_folder).select(4, "test")

    def test_damaged_shard_names_the_video(self, shard_folder: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(shard_folder, tmp_path / "copy")
        store = open_shards(copy)
        tar = copy / store._shards[0]
        content = bytearray(tar.read_bytes())
        start = int(store._offsets[0])
        content[start : start + 200] = bytes(200)
        tar.write_bytes(content)
        with pytest.raises(ShardError, match=store.keys[0]):
            open_shards(copy).read_frames(0, [0])

    def test_manifest_counts(self, shard_folder: Path) -> None:
        manifest = json.loads((shard_folder / "manifest.json").read_text())
        store = open_shards(shard_folder)
        assert manifest["frames"] == int(store.num_frames.sum())
        assert manifest["subsets"]["split1"] == {
            "train": len(store.select(1, "train")),
            "test": len(store.select(1, "test")),
        }
        assert set(store.select(1, "train")) & set(store.select(1, "test")) == set()
        assert manifest["decode"]["height"] == 256 and manifest["decode"]["width"] == 340
