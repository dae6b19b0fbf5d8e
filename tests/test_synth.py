"""The synthetic dataset: UCF-101's format to the byte, or HMDB-51's, reproducible, only motion in its classes."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pyarrow.parquet as pq
import pytest

from pasnet import synth
from pasnet.config import ConfigError, from_dict
from pasnet.pose_train import Frames
from pasnet.synth import Clip, SynthConfig
from shards import Dataset, build, find_dataset, open_shards, scan

# Two pairs that differ by order alone, four other classes; three splits need three groups.
SMALL = SynthConfig(num_classes=8, groups=3, clips_per_group=1, frames=(8, 12), seed=5)
SMALL_CLASSES = ["Bow", "JumpingJack", "Kick", "LowerArms", "RaiseArms", "SitDown", "StandUp", "TurnAround"]
# The same videos in both layouts.
UCF = SynthConfig(num_classes=6, groups=4, clips_per_group=2, frames=(2, 3), seed=5, size=(48, 64))
HMDB = dataclasses.replace(UCF, layout="hmdb")
WRISTS = [synth.JOINTS.index("r_wrist"), synth.JOINTS.index("l_wrist")]
HIPS = [synth.JOINTS.index("r_hip"), synth.JOINTS.index("l_hip")]


@pytest.fixture(scope="module")
def ffmpeg() -> str:
    """The machine's ffmpeg, or the one that a package carries."""
    return shutil.which("ffmpeg") or imageio_ffmpeg.get_ffmpeg_exe()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, ffmpeg: str) -> Path:
    """One small dataset, shared by the tests that only read it."""
    return synth.generate(tmp_path_factory.mktemp("synth") / "data", SMALL, ffmpeg=ffmpeg)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def decode(path: Path, ffmpeg: str) -> np.ndarray:
    """A video as uint8 (T, 240, 320, 3), RGB."""
    command = [ffmpeg, "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw = subprocess.run(command, check=True, capture_output=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, 240, 320, 3)


def lines(path: Path) -> list[str]:
    """The lines of a list, which must all end in CR LF, the last one too."""
    *found, rest = path.read_bytes().split(b"\r\n")
    assert rest == b"" and not any(b"\r" in line or b"\n" in line or line.strip() != line for line in found)
    return [line.decode() for line in found]


def test_lists_are_in_the_official_format(dataset: Path) -> None:
    """Names, order, labels and line ends to the byte; no group on both sides of a split."""
    lists = dataset / "ucfTrainTestlist"
    assert sorted(p.name for p in lists.iterdir()) == ["classInd.txt", "testlist01.txt", "testlist02.txt",
        "testlist03.txt", "trainlist01.txt", "trainlist02.txt", "trainlist03.txt"]  # fmt: skip
    assert lines(lists / "classInd.txt") == [f"{i} {name}" for i, name in enumerate(SMALL_CLASSES, 1)]
    assert lines(lists / "testlist02.txt") == [f"{c}/v_{c}_g02_c01.avi" for c in SMALL_CLASSES]
    assert lines(lists / "trainlist02.txt") == [
        f"{c}/v_{c}_g{g:02d}_c01.avi {i}" for i, c in enumerate(SMALL_CLASSES, 1) for g in (1, 3)
    ]
    on_disk = {p.relative_to(dataset / "videos").as_posix() for p in (dataset / "videos").rglob("*.*")}
    for split in ("01", "02", "03"):
        train = {line.rsplit(" ", 1)[0] for line in lines(lists / f"trainlist{split}.txt")}
        test = set(lines(lists / f"testlist{split}.txt"))
        assert train | test == on_disk and len(on_disk) == 24
        assert not {t.split("_g")[1][:2] for t in train} & {t.split("_g")[1][:2] for t in test}


def test_class_order_ignores_case_as_the_official_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels 35 and 36 of UCF-101 are what a plain sort swaps."""
    monkeypatch.setattr(synth, "CLASSES", ("HammerThrow", "Hammering"))  # ids 35 and 36 the other way round
    assert SynthConfig(num_classes=2).classes == ("Hammering", "HammerThrow")


@pytest.mark.parametrize("groups", [3, 4, 6, 8, 9, 13, 25, 50, 99])
def test_groups_are_held_out_in_ucfs_proportion(groups: int) -> None:
    """Seven of 25 in each test list, in no two of them, and scaled for other counts."""
    held = [set(synth.held_out(SynthConfig(groups=groups), split)) for split in (1, 2, 3)]
    assert len(set.union(*held)) == sum(map(len, held)) and set.union(*held) <= set(range(1, groups + 1))
    assert all(abs(len(h) - groups * 7 / 25) <= 0.5 for h in held)
    if groups == 25:
        assert held == [set(range(1, 8)), set(range(8, 15)), set(range(15, 22))]


def test_videos_are_avi_files_with_a_joint_row_per_frame(dataset: Path, ffmpeg: str) -> None:
    """A decoder finds as many frames as there are rows of joints."""
    rows = pq.read_table(dataset / "joints.parquet").to_pydict()
    assert set(rows) == {"key", "frame", "x", "y", "visible"}
    assert {len(v) for name in ("x", "y", "visible") for v in rows[name]} == {18}
    assert len(set(rows["key"])) == 24
    for name in ("Bow/v_Bow_g01_c01", "SitDown/v_SitDown_g03_c01"):
        path = dataset / "videos" / f"{name}.avi"
        head = path.read_bytes()[:512]
        assert head[:4] == b"RIFF" and head[8:12] == b"AVI " and b"XVID" in head
        frames = [f for k, f in zip(rows["key"], rows["frame"], strict=True) if k == path.stem]
        assert frames == list(range(len(decode(path, ffmpeg)))) and 8 <= len(frames) <= 12


def test_same_bytes_for_any_number_of_workers(dataset: Path, tmp_path: Path, ffmpeg: str) -> None:
    """Every file, the videos too, is the same in a second run and with two workers."""
    again = synth.generate(tmp_path / "again", SMALL, ffmpeg=ffmpeg, workers=2)
    assert contents(again) == contents(dataset)


def test_another_seed_is_another_dataset() -> None:
    """Both the motion and the looks change."""
    clip = Clip("Kick", 1, 1)
    one, two = (synth.render_clip(dataclasses.replace(SMALL, seed=s, frames=(8, 8)), clip) for s in (0, 1))
    assert np.abs(one.xy - two.xy).max() > 5
    assert np.abs(one.frames.astype(int) - two.frames).mean() > 10


def test_finished_is_skipped_and_half_written_is_redone(dataset: Path, tmp_path: Path, ffmpeg: str) -> None:
    """Whole: no work. Damaged, unfinished or of another config: made anew, no stale clip left."""
    out, want, calls = tmp_path / "data", contents(dataset), []
    shutil.copytree(dataset, out)

    def run(config: SynthConfig) -> int:
        calls.clear()
        synth.generate(out, config, ffmpeg=ffmpeg, workers=2, progress=lambda *counts: calls.append(counts))
        return len(calls)

    assert run(SMALL) == 0
    # A video cut short, although everything claims to be finished.
    video = out / "videos/Kick/v_Kick_g02_c01.avi"
    video.write_bytes(want["videos/Kick/v_Kick_g02_c01.avi"][:1000])
    assert run(SMALL) == 24 and calls[-1] == (24, 24) and contents(out) == want
    # An interrupted run: the marker says unfinished, no lists yet, a half-written file.
    record = json.loads((out / "synth.json").read_text()) | {"finished": False}
    (out / "synth.json").write_text(json.dumps(record))
    assert not synth.is_complete(out, SMALL)
    shutil.rmtree(out / "ucfTrainTestlist")
    video.rename(video.with_name(video.name + ".tmp"))
    fewer = dataclasses.replace(SMALL, num_classes=2)
    assert run(fewer) == 6 and synth.is_complete(out, fewer) and not synth.is_complete(out, SMALL)
    assert sorted(p.name for p in (out / "videos").iterdir()) == ["Bow", "JumpingJack"]  # no stale clips
    name = "videos/Bow/v_Bow_g03_c01.avi"
    assert (out / name).read_bytes() == want[name]  # a clip does not depend on how many classes there are


def test_an_interrupted_run_leaves_no_finished_marker(tmp_path: Path, ffmpeg: str) -> None:
    """Ctrl-C at any time leaves a folder that the next run completes."""
    config = dataclasses.replace(SMALL, num_classes=2)

    def stop(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synth.generate(tmp_path, config, ffmpeg=ffmpeg, progress=stop)
    assert list(tmp_path.rglob("*.avi")) and not synth.is_complete(tmp_path, config)
    synth.generate(tmp_path, config, ffmpeg=ffmpeg)
    assert synth.is_complete(tmp_path, config)


def test_somebody_elses_videos_are_refused(tmp_path: Path, ffmpeg: str) -> None:
    """Real videos are neither overwritten nor mixed with synthetic ones."""
    theirs = tmp_path / "videos/Archery/v_Archery_g01_c01.avi"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"precious")
    with pytest.raises(ConfigError, match="v_Archery_g01_c01"):
        synth.generate(tmp_path, SMALL, ffmpeg=ffmpeg)
    assert contents(tmp_path) == {"videos/Archery/v_Archery_g01_c01.avi": b"precious"}


def test_a_failing_encoder_is_reported(tmp_path: Path, ffmpeg: str) -> None:
    """ffmpeg's own last words are in the message."""
    frames = np.zeros((2, 48, 64, 3), np.uint8)
    with pytest.raises(RuntimeError, match="ffmpeg could not write"):
        synth._encode(frames, tmp_path / "no such folder" / "a.avi", 25, ffmpeg)


@pytest.mark.parametrize("difficulty", [0.0, 1.0])
def test_joints_stay_in_the_picture(difficulty: float) -> None:
    """At every difficulty nearly all joints are inside, and they use the picture."""
    config = SynthConfig(num_classes=16, difficulty=difficulty)
    clips = [Clip(label, group, 1) for label in synth.CLASSES for group in range(1, 9)]
    x, y = np.concatenate([synth.render_clip(config, clip, draw=False).xy for clip in clips]).reshape(-1, 2).T
    assert np.mean((x >= 0) & (x <= 319) & (y >= 0) & (y <= 239)) > 0.995
    assert np.ptp(x) > 100 and np.ptp(y) > 100


def test_joints_lie_on_the_person_in_the_decoded_video(dataset: Path, ffmpeg: str) -> None:
    """At a visible wrist there is skin; at a hidden one, or 25 pixels beside, there mostly is not."""
    rows = pq.read_table(dataset / "joints.parquet").to_pylist()
    at_wrist, beside, hidden = [], [], []
    for clip in synth.clips(SMALL):
        skin = synth.looks(SMALL, clip.group).skin * synth.take(SMALL, clip.group, clip.number).light
        frames = decode(dataset / "videos" / clip.name, ffmpeg)
        for row in (r for r in rows if r["key"] == clip.key):
            for i in WRISTS:
                line, u = frames[row["frame"], round(row["y"][i])], round(row["x"][i])
                if not row["visible"][i]:
                    hidden.append(np.abs(line[u] - skin).mean())
                else:
                    at_wrist.append(np.abs(line[u] - skin).mean())
                    beside.append(np.abs(line[min(u + 25, 319)] - skin).mean())
    assert len(at_wrist) > 200 and len(hidden) > 10
    assert np.mean(np.array(hidden) < 30) < 0.3
    assert np.mean(np.array(at_wrist) < 30) > 0.95
    assert np.mean(np.array(beside) < 30) < 0.5


def test_hidden_joints_are_recorded_as_hidden() -> None:
    """Who turns round loses the nose, and the neck comes back into sight."""
    config = dataclasses.replace(SMALL, frames=(40, 40), difficulty=0.0)
    visible = synth.render_clip(config, Clip("TurnAround", 1, 1), draw=False).visible
    assert visible[0, synth.JOINTS.index("nose")] and not visible[-1, synth.JOINTS.index("nose")]
    assert visible[[0, -1], synth.JOINTS.index("neck")].all()


@pytest.mark.parametrize("backwards, forwards", sorted(synth.REVERSES.items()))
def test_pairs_are_each_others_reverse(backwards: str, forwards: str) -> None:
    """Without the camera's path, which runs forwards in both, the joints are the same, last frame first."""
    config = SynthConfig(num_classes=16, difficulty=0.8)
    for group, number in ((1, 1), (2, 1), (25, 3)):
        shift = synth.take(config, group, number).camera[:, None]
        one, two = (synth.render_clip(config, Clip(c, group, number), draw=False).xy + shift
                    for c in (backwards, forwards))  # fmt: skip
        np.testing.assert_allclose(one, two[::-1], atol=0.02)
        assert np.abs(one - two).max() > 20  # and not the same forwards


def test_classes_differ_by_motion_only() -> None:
    """Away from the body every class of a group shows the same pixels, for the same time."""
    config = SynthConfig(num_classes=16, frames=(12, 20), difficulty=1.0)
    for group in (1, 2):
        clips = [synth.render_clip(config, Clip(label, group, 1)) for label in synth.CLASSES]
        assert len({c.frames.shape for c in clips}) == 1  # length is no clue
        joints = np.concatenate([c.xy for c in clips]).reshape(-1, 2)
        (x0, y0), (x1, y1) = joints.min(0) - 24, joints.max(0) + 24
        rows, columns = np.ogrid[:240, :320]
        away = (columns < x0) | (columns > x1) | (rows < y0) | (rows > y1)
        assert away.mean() > 0.2
        for clip in clips[1:]:
            assert np.array_equal(clip.frames[:, away], clips[0].frames[:, away])
            assert not np.array_equal(clip.frames, clips[0].frames)


def test_clothes_are_the_same_in_all_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every class of a group is painted with the same parts and colours, another group with others."""
    painted: list[list[tuple[float, ...]]] = []

    def paint(parts: list[synth._Part], *_: object) -> np.ndarray:
        painted.append([(*p.colour, p.opacity, p.round, *(p.stripe[0] if p.stripe else ())) for p in parts])
        return np.zeros((1, 240, 320, 3), np.uint8)

    monkeypatch.setattr(synth, "_paint", paint)
    config = SynthConfig(num_classes=16, frames=(2, 2))
    for label in synth.CLASSES:
        synth.render_clip(config, Clip(label, 3, 1))
    assert len(painted) == 16 and all(parts == painted[0] for parts in painted)
    synth.render_clip(config, Clip("Bow", 4, 1))
    assert painted[-1] != painted[0]


def test_motion_tells_the_classes_apart() -> None:
    """A nearest neighbour on joints relative to the hips beats chance by far on unseen groups."""
    config = SynthConfig(num_classes=12, difficulty=0.3)

    def feature(label: str, group: int) -> np.ndarray:
        xy = synth.render_clip(config, Clip(label, group, 1), draw=False).xy
        xy = xy[np.linspace(0, len(xy) - 1, 24).round().astype(int)]
        xy = (xy - xy[:, HIPS].mean(1, keepdims=True)) / np.ptp(xy[..., 1])
        return np.stack([xy, np.gradient(xy, axis=0) * 3])

    train = [(label, feature(label, g)) for label in config.classes for g in range(3, 15)]
    right = 0
    for label in config.classes:
        for g in (1, 2):
            probe = feature(label, g)
            right += min(train, key=lambda known: np.abs(known[1] - probe).mean())[0] == label
    assert right / 24 > 0.5  # chance is 1/12


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, ffmpeg: str) -> tuple[Path, Path]:
    """One config in both layouts: UCF-101's, HMDB-51's."""
    folder = tmp_path_factory.mktemp("layouts")
    ucf = synth.generate(folder / "ucf", UCF, ffmpeg=ffmpeg)
    return ucf, synth.generate(folder / "hmdb", HMDB, ffmpeg=ffmpeg)


class TestHmdbLayout:
    """The same videos under HMDB-51's names and lists."""

    def test_only_names_differ(self, both: tuple[Path, Path]) -> None:
        """Pictures and joints are the same to the byte."""
        ours, theirs = (pq.read_table(folder / "joints.parquet") for folder in both)
        assert ours.drop(["key"]) == theirs.drop(["key"])
        names = {one.key: other.key for one, other in zip(synth.clips(UCF), synth.clips(HMDB), strict=True)}
        assert [names[key] for key in ours["key"].to_pylist()] == theirs["key"].to_pylist()
        for one, other in zip(synth.clips(UCF), synth.clips(HMDB), strict=True):
            assert (both[0] / "videos" / one.name).read_bytes() == (both[1] / "videos" / other.name).read_bytes()
        assert sorted(p.name for p in both[1].iterdir()) == [
            "joints.parquet", "synth.json", "testTrainMulti_7030_splits", "videos"]  # fmt: skip

    def test_lists_are_in_the_official_format(self, both: tuple[Path, Path]) -> None:
        """A blank at the end of each line, 1 for training and 2 for tests; three lists of every class."""
        lists = both[1] / "testTrainMulti_7030_splits"
        classes = ["bow", "jumping_jack", "kick", "sit_down", "stand_up", "turn_around"]
        assert sorted(p.name for p in lists.iterdir()) == [f"{c}_test_split{i}.txt" for c in classes for i in (1, 2, 3)]
        assert (lists / "stand_up_test_split2.txt").read_bytes().decode() == "".join(
            f"synth0{group}_stand_up_f_cm_np1_fr_med_{number}.avi {2 if group == 2 else 1} \n"
            for group in (1, 2, 3, 4) for number in (0, 1))  # fmt: skip

    def test_shards_read_labels_splits_and_groups(self, both: tuple[Path, Path]) -> None:
        """As of UCF-101's layout, but a group is a film, which HMDB-51's names do not tie to a class."""
        ucf, hmdb = (scan(*find_dataset(folder)) for folder in both)
        assert hmdb.name == "synthetic-hmdb" and not hmdb.missing and not hmdb.ignored and hmdb.listed == 48
        assert hmdb.usable_splits == (1, 2, 3)
        assert hmdb.class_names == ("bow", "jumping_jack", "kick", "sit_down", "stand_up", "turn_around")

        def facts(dataset: Dataset, between: str) -> list[tuple[object, ...]]:
            found = [(v.label, v.group.rpartition(between)[2], v.splits) for v in dataset.videos]
            return sorted(found, key=str)

        assert facts(hmdb, "synth") == facts(ucf, "/g")
        assert {v.group for v in hmdb.videos} == {"synth01", "synth02", "synth03", "synth04"}

    def test_pose_training_finds_all_joints(self, both: tuple[Path, Path], tmp_path: Path) -> None:
        """By the shards' own keys, in each frame."""
        build(scan(*find_dataset(both[1])), tmp_path / "shards", num_shards=2)
        shards = open_shards(tmp_path / "shards")
        frames = Frames(shards, both[1] / "joints.parquet")
        keys = pq.read_table(both[1] / "joints.parquet")["key"].to_pylist()
        assert len(shards.keys) == 48 and sum(shards.num_frames) == len(keys)
        assert [keys[first] for first in frames.first] == [key.split("/")[1] for key in shards.keys]

    def test_labels_are_in_one_order_in_both_layouts(self) -> None:
        """However many classes there are, although HMDB-51's are sorted by folder."""
        for n in range(2, len(synth.CLASSES) + 1):
            one, other = (SynthConfig(num_classes=n, layout=layout) for layout in ("ucf", "hmdb"))
            assert one.classes == other.classes
            folders = [synth.class_folder(label, "hmdb") for label in other.classes]
            assert folders == sorted(folders)

    def test_a_folder_changes_its_layout(self, both: tuple[Path, Path], tmp_path: Path, ffmpeg: str) -> None:
        """Nothing of the other layout, or of other classes, is left for the parser to find."""
        shutil.copytree(both[1], tmp_path, dirs_exist_ok=True)
        assert synth.is_complete(tmp_path, HMDB) and not synth.is_complete(tmp_path, UCF)
        synth.generate(tmp_path, UCF, ffmpeg=ffmpeg)
        assert contents(tmp_path) == contents(both[0])
        synth.generate(tmp_path, HMDB, ffmpeg=ffmpeg)
        assert contents(tmp_path) == contents(both[1])
        synth.generate(tmp_path, dataclasses.replace(HMDB, num_classes=2), ffmpeg=ffmpeg)
        assert scan(*find_dataset(tmp_path)).class_names == ("bow", "jumping_jack")

    @pytest.mark.parametrize("name", ["brush_hair", "kick"])
    def test_real_lists_are_refused(self, tmp_path: Path, ffmpeg: str, name: str) -> None:
        """Those of HMDB-51 would be read for ours, and one of its classes is called like one of ours."""
        theirs = tmp_path / f"testTrainMulti_7030_splits/{name}_test_split1.txt"
        theirs.parent.mkdir(parents=True)
        theirs.write_bytes(b"precious")
        with pytest.raises(ConfigError, match=f"other lists, such as .*{name}_test_split1"):
            synth.generate(tmp_path, UCF, ffmpeg=ffmpeg)
        assert contents(tmp_path) == {f"testTrainMulti_7030_splits/{name}_test_split1.txt": b"precious"}

    def test_the_command_line_takes_it(self) -> None:
        """As text; what is no layout is refused."""
        assert from_dict(SynthConfig, {"layout": "hmdb"}) == SynthConfig(layout="hmdb")
        with pytest.raises(ConfigError, match="layout"):
            from_dict(SynthConfig, {"layout": "jhmdb"})


def test_the_default_layouts_record_is_that_of_before_there_was_a_choice(dataset: Path) -> None:
    """Folders that were made then are still complete; the names have the digest of then."""
    record = json.loads((dataset / "synth.json").read_text())
    assert list(record["config"]) == ["num_classes", "groups", "clips_per_group", "frames", "seed", "difficulty",
        "size", "fps"]  # fmt: skip
    assert record["version"] == 1 and synth.is_complete(dataset, dataclasses.replace(SMALL, layout="ucf"))
    assert record["names_sha256"] == "c9581422383a89334391dd5ede13c275eb188c9283cdaa33d200fe445fab56e8"


@pytest.mark.parametrize("bad", [{"num_classes": 1}, {"num_classes": 99}, {"groups": 2}, {"groups": 100},
                                 {"frames": (5, 4)}, {"frames": (1, 4)}, {"difficulty": 1.1}, {"seed": -1},
                                 {"size": (241, 320)}, {"clips_per_group": 0}, {"fps": 0},
                                 {"layout": "jhmdb"}])  # fmt: skip
def test_bad_settings_are_refused(bad: dict[str, object]) -> None:
    """The message names the setting."""
    with pytest.raises(ConfigError, match=next(iter(bad))):
        SynthConfig(**bad)  # type: ignore[arg-type]


def test_a_config_from_json_is_the_same_config() -> None:
    """Lists become tuples again, so that equality holds."""
    config = SynthConfig(size=(120, 160))
    assert SynthConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
