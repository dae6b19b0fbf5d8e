"""Targets against a skeleton drawn by hand, and the training of the pose network on synthetic joints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pasnet.checkpoints import load_initial
from pasnet.cli import main
from pasnet.config import ConfigError, DataConfig, FusionConfig, InitConfig, ModelConfig, PoseTrainConfig, TrainConfig
from pasnet.data import View, open_shards
from pasnet.models.openpose import BodyNet
from pasnet.models.pasnet import build
from pasnet.pose_train import LIMBS, MIRROR, Frames, draw_targets, in_view, loss_of, quality, rate_at, train_pose
from pasnet.synth import JOINTS
from pasnet.weights import inspect, read_checkpoint

TINY = PoseTrainConfig(width=0.0625, input_size=48, steps=4, batch=2, measure=6, checkpoint_steps=2, warmup=1)
SIZE, CELLS = 112, 14

# Where OpenPose's COCO model keeps the fields, as its parameter file lists them: pairs of joints, channels of x and y.
PAIRS = [
    1,
    2,
    1,
    5,
    2,
    3,
    3,
    4,
    5,
    6,
    6,
    7,
    1,
    8,
    8,
    9,
    9,
    10,
    1,
    11,
    11,
    12,
    12,
    13,
    1,
    0,
    0,
    14,
    14,
    16,
    0,
    15,
    15,
    17,
]
PAIRS += [2, 16, 5, 17]
CHANNELS = [
    12,
    13,
    20,
    21,
    14,
    15,
    16,
    17,
    22,
    23,
    24,
    25,
    0,
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    9,
    10,
    11,
    28,
    29,
    30,
    31,
    34,
    35,
]
CHANNELS += [32, 33, 36, 37, 18, 19, 26, 27]


def cell(x: int, y: int) -> tuple[float, float]:
    """The pixel in the middle of a cell."""
    return 8 * x + 3.5, 8 * y + 3.5


def person() -> tuple[np.ndarray, np.ndarray]:
    """One person who faces us, by hand, all joints in the middle of a cell."""
    # fmt: off
    at = {"nose": (7, 2), "neck": (7, 4), "r_shoulder": (5, 4), "r_elbow": (4, 6), "r_wrist": (4, 9),
          "l_shoulder": (9, 4), "l_elbow": (10, 6), "l_wrist": (12, 6), "r_hip": (6, 8), "r_knee": (6, 10),
          "r_ankle": (6, 13), "l_hip": (8, 8), "l_knee": (8, 10), "l_ankle": (9, 13), "r_eye": (6, 1), "l_eye": (8, 1),
          "r_ear": (5, 2), "l_ear": (9, 2)}
    # fmt: on
    xy = np.array([[cell(*at[name]) for name in JOINTS]], np.float32)
    return xy, np.ones((1, 18), bool)


def targets(xy: np.ndarray, visible: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return draw_targets(xy, visible, SIZE, sigma=7.0, limb_width=1.0)


class TestTargets:
    def test_limbs_and_channels_are_openposes(self) -> None:
        assert JOINTS[:5] == ("nose", "neck", "r_shoulder", "r_elbow", "r_wrist") and JOINTS[14:] == (
            "r_eye",
            "l_eye",
            "r_ear",
            "l_ear",
        )
        published = {}
        for limb in range(19):
            x, y = CHANNELS[2 * limb : 2 * limb + 2]
            assert y == x + 1
            published[x // 2] = (PAIRS[2 * limb], PAIRS[2 * limb + 1])
        assert [published[place] for place in range(19)] == list(LIMBS)

    def test_a_heat_map_is_a_gaussian_at_its_joint(self) -> None:
        xy, visible = person()
        heat, _ = targets(xy, visible)
        assert heat.shape == (1, 19, CELLS, CELLS) and heat.dtype == np.float32
        for joint, (x, y) in enumerate((xy[0] - 3.5) / 8):
            assert heat[0, joint].argmax() == int(y) * CELLS + int(x) and heat[0, joint].max() == 1
        assert heat[0, 4, 9, 6] == pytest.approx(np.exp(-(16**2) / (2 * 7**2)))  # two cells beside the right wrist
        assert heat[0, 4, 12, 4] == pytest.approx(np.exp(-(24**2) / (2 * 7**2)))  # three below

    def test_the_background_is_what_no_joint_is(self) -> None:
        xy, visible = person()
        heat, _ = targets(xy, visible)
        assert np.allclose(heat[0, 18], 1 - heat[0, :18].max(0))
        assert heat[0, 18, 9, 4] == 0 and heat[0, 18, 0, 13] > 0.99
        nobody, fields = targets(xy, np.zeros((1, 18), bool))
        assert (nobody[0, 18] == 1).all() and not nobody[0, :18].any() and not fields.any()

    def test_a_field_points_along_its_limb_and_is_nothing_elsewhere(self) -> None:
        xy, visible = person()
        _, pafs = targets(xy, visible)
        assert pafs.shape == (1, 38, CELLS, CELLS)
        lengths = np.hypot(pafs[0, 0::2], pafs[0, 1::2])
        assert np.allclose(lengths[lengths > 0], 1)
        # from the neck to the right shoulder: leftwards in the picture, channels 12 and 13
        assert pafs[0, 12, 4, 6] == pytest.approx(-1) and pafs[0, 13, 4, 6] == pytest.approx(0)
        # from the right elbow down to the wrist, channels 16 and 17
        assert pafs[0, 16, 7, 4] == pytest.approx(0) and pafs[0, 17, 7, 4] == pytest.approx(1)
        assert lengths[8, 7, 5] == pytest.approx(1) and lengths[8, 7, 6] == 0  # one cell beside it, two
        assert lengths[8, 10, 4] == pytest.approx(1) and lengths[8, 11, 4] == 0  # one beyond its end, two
        # from the left elbow to the wrist: rightwards, channels 24 and 25
        assert pafs[0, 24, 6, 11] == pytest.approx(1) and pafs[0, 25, 6, 11] == pytest.approx(0)
        for limb, (start, end) in enumerate(LIMBS):
            way = xy[0, end] - xy[0, start]
            x, y = ((xy[0, start] - 3.5) / 8).astype(int)
            assert pafs[0, 2 * limb : 2 * limb + 2, y, x] == pytest.approx(way / np.hypot(*way), abs=1e-5)

    def test_a_hidden_joint_gives_no_target(self) -> None:
        xy, visible = person()
        visible[0, JOINTS.index("r_elbow")] = False
        heat, pafs = targets(xy, visible)
        full_heat, full_pafs = targets(*person())
        assert not heat[0, 3].any()
        gone = {limb for limb, ends in enumerate(LIMBS) if 3 in ends}
        for limb in range(19):
            channels = slice(2 * limb, 2 * limb + 2)
            assert pafs[0, channels].any() == (limb not in gone)
            if limb not in gone:
                assert np.array_equal(pafs[0, channels], full_pafs[0, channels])
        assert np.array_equal(heat[0, 4], full_heat[0, 4]) and heat[0, 18, 6, 4] > full_heat[0, 18, 6, 4]

    def test_a_limb_seen_from_its_end_has_no_direction(self) -> None:
        xy, visible = person()
        xy[0, 3] = xy[0, 2]
        _, pafs = targets(xy, visible)
        assert np.isfinite(pafs).all() and not pafs[0, 14:16].any()


class TestViews:
    def test_a_mirrored_view_swaps_left_and_right_and_turns_fields_around(self) -> None:
        xy, visible = person()
        visible[0, JOINTS.index("l_wrist")] = False
        whole = View(0, 0, SIZE, SIZE)
        plain = in_view(xy[0], visible[0], whole, (SIZE, SIZE), SIZE)
        mirrored = in_view(xy[0], visible[0], whole._replace(flip=True), (SIZE, SIZE), SIZE)
        assert np.array_equal(plain[0], xy[0]) and np.array_equal(plain[1], visible[0])
        assert not mirrored[1][JOINTS.index("r_wrist")] and mirrored[1][JOINTS.index("l_wrist")]
        assert mirrored[0][JOINTS.index("l_elbow")] == pytest.approx((SIZE - 1 - cell(4, 6)[0], cell(4, 6)[1]))
        heat, pafs = targets(plain[0][None], plain[1][None])
        other_heat, other_pafs = targets(mirrored[0][None], mirrored[1][None])
        assert np.allclose(other_heat[0], heat[0][[*MIRROR, 18], :, ::-1], atol=1e-6)
        for limb, (start, end) in enumerate(LIMBS):
            twin = LIMBS.index((MIRROR[start], MIRROR[end]))
            assert np.allclose(other_pafs[0, 2 * limb], -pafs[0, 2 * twin, :, ::-1], atol=1e-6)
            assert np.allclose(other_pafs[0, 2 * limb + 1], pafs[0, 2 * twin + 1, :, ::-1], atol=1e-6)

    def test_what_the_view_leaves_out_is_not_visible(self) -> None:
        xy, visible = person()
        view = View(32, 16, 64, 64)
        at, seen = in_view(xy[0], visible[0], view, (SIZE, SIZE), 128)
        assert at[JOINTS.index("neck")] == pytest.approx(((59.5 + 0.5 - 16) * 2 - 0.5, (35.5 + 0.5 - 32) * 2 - 0.5))
        inside = (xy[0, :, 0] > 16) & (xy[0, :, 0] < 80) & (xy[0, :, 1] > 32) & (xy[0, :, 1] < 96)
        assert np.array_equal(seen, inside) and 0 < seen.sum() < 18

    def test_odd_views_are_read_from_even_pixels(self) -> None:
        xy, visible = person()
        odd = in_view(xy[0], visible[0], View(1, 3, 65, 67), (SIZE, SIZE), SIZE)
        assert np.array_equal(odd[0], in_view(xy[0], visible[0], View(0, 2, 64, 66), (SIZE, SIZE), SIZE)[0])

    def test_joints_lie_on_the_frames_that_are_read(self, videos: Path, shard_folder: Path) -> None:
        """The person's skin or clothes at a visible joint differ between two crops only by where they are looked up."""
        frames = Frames(open_shards(shard_folder), videos / "joints.parquet")
        config = replace(TINY, input_size=224)
        whole, part = View(16, 58, 224, 224), View(16, 58, 224, 224, flip=True)
        pictures, heat, _ = frames.read([(0, 3, whole), (0, 3, part)], config)
        assert torch.equal(pictures[0], pictures[1].flip(2))
        assert pictures.shape == (2, 3, 224, 224) and -0.5 <= float(pictures.min()) < float(pictures.max()) < 0.5
        assert torch.allclose(heat[0, 18], heat[1, 18].flip(1), atol=1e-5)
        rgb = frames.shards.read_frames(0, [3])[0]
        xy, visible = frames.joints(0, 3, whole, 224)
        for (x, y), (fx, fy), seen in zip(xy, frames.xy[frames.first[0] + 3], visible, strict=True):
            if seen and 2 < x < 221 and 2 < y < 221:
                ours = (pictures[0, :, round(float(y)), round(float(x))] + 0.5) * 256
                stored = torch.from_numpy(rgb[round(float(fy)), round(float(fx))].copy()).flip(0)
                assert (ours - stored).abs().max() < 12

    def test_joints_are_brought_to_the_size_of_stored_frames(self, videos: Path, shard_folder: Path) -> None:
        shards = open_shards(shard_folder)
        frames = Frames(shards, videos / "joints.parquet")
        table = pq.read_table(videos / "joints.parquet").to_pylist()
        assert shards.frame_size == (256, 340)
        for row, key in enumerate(shards.keys):
            [of] = [each for each in table if (each["key"], each["frame"]) == (key.split("/")[1], 2)]
            at = frames.xy[frames.first[row] + 2]
            # the edges of a picture, -0.5 and 319.5, stay its edges
            assert np.allclose(at[:, 0], (np.array(of["x"]) + 0.5) * 340 / 320 - 0.5, atol=1e-3)
            assert np.allclose(at[:, 1], (np.array(of["y"]) + 0.5) * 256 / 240 - 0.5, atol=1e-3)
            assert np.array_equal(frames.visible[frames.first[row] + 2], of["visible"])


class TestNetwork:
    def test_all_six_stages_are_the_networks_own(self) -> None:
        torch.manual_seed(0)
        net = BodyNet(0.0625).eval()
        frames = torch.randn(2, 3, 48, 48)
        with torch.no_grad():
            stages, last = net.stages(frames), net(frames, everything=True)
        assert [(tuple(pafs.shape), tuple(heat.shape)) for pafs, heat in stages] == [((2, 38, 6, 6), (2, 19, 6, 6))] * 6
        assert torch.equal(stages[-1][0], last.pafs) and torch.equal(stages[-1][1], last.heatmaps)

    def test_every_stage_and_branch_is_in_the_loss(self) -> None:
        heat, pafs = torch.zeros(2, 19, 3, 3), torch.zeros(2, 38, 3, 3)
        right = [(pafs, heat)] * 6
        assert loss_of(right, heat, pafs) == 0
        for stage in range(6):
            for wrong, worth in (((pafs + 1, heat), 38), ((pafs, heat + 2), 19 * 4)):
                assert loss_of([*right[:stage], wrong, *right[stage + 1 :]], heat, pafs) == worth

    def test_the_rate_rises_and_falls(self) -> None:
        config = PoseTrainConfig(steps=100, warmup=9)
        rates = [rate_at(step, config) for step in range(100)]
        assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] > 0.97 and rates[99] < 0.001


@pytest.fixture(scope="module")
def trained(videos: Path, shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pose")
    train_pose(TINY, shard_folder, videos / "joints.parquet", out)
    return out


class TestTraining:
    def test_the_file_is_a_whole_pose_checkpoint_that_init_pose_takes(self, trained: Path, shard_folder: Path) -> None:
        found = inspect(trained / "pose.safetensors")
        assert found.checkpoint.kind == "pose" and not found.problems and len(found.checkpoint.tensors) == 184
        text = "\n".join(found.lines)
        assert "NOT the published" in text and "our own" in text and "BGR 0..255 / 256" in text
        style = FusionConfig(style="A+pool(I)+pool(F)")
        config = TrainConfig(
            model=ModelConfig(num_classes=3, fusion=style, width=0.0625),
            data=DataConfig(shards=str(shard_folder), input_size=48, num_segments=2),
            init=InitConfig(pose=str(trained / "pose.safetensors")),
        )
        net = build(config.model)
        report = load_initial(net, config, open_shards(shard_folder))
        assert "184 tensors loaded, 0 left as they were, 0 unused" in report
        assert net.pose is not None
        tensors = read_checkpoint(trained / "pose.safetensors", "pose")
        assert all(torch.equal(value, tensors[name]) for name, value in net.pose.state_dict().items())

    def test_every_layer_learns_also_those_that_no_style_reads(
        self, trained: Path, videos: Path, shard_folder: Path, tmp_path: Path
    ) -> None:
        start = replace(TINY, lr=1e-30, steps=1)
        train_pose(start, shard_folder, videos / "joints.parquet", tmp_path)
        first, last = (read_checkpoint(each / "pose.safetensors", "pose") for each in (tmp_path, trained))
        assert [name for name in first if name.endswith("weight") and torch.equal(first[name], last[name])] == []

    def test_every_step_sees_other_frames_and_other_views(
        self, videos: Path, shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen, read = [], Frames.read

        def remember(self: Frames, chosen: list[tuple[int, int, View]], config: PoseTrainConfig) -> object:
            seen.append(chosen)
            return read(self, chosen, config)

        monkeypatch.setattr(Frames, "read", remember)
        config = replace(TINY, steps=6, batch=4)
        train_pose(config, shard_folder, videos / "joints.parquet", tmp_path)
        shards = open_shards(shard_folder)
        steps = seen[:6]
        assert len({str(chosen) for chosen in steps}) == 6
        views = [view for chosen in steps for _, _, view in chosen]
        assert {view.flip for view in views} == {True, False} and len({view[:4] for view in views}) > 3
        train = set(shards.select(1, "train").tolist())
        assert {row for chosen in steps for row, _, _ in chosen} <= train
        assert not {row for chosen in seen[7:] for row, _, _ in chosen} & train  # the quality is of other groups

    def test_its_quality_is_on_record(self, trained: Path) -> None:
        found = json.loads((trained / "quality.json").read_text())
        assert (
            found["frames"] == 6 and len(found["losses"]) == 2 and set(found["within_a_cell_by_joint"]) == set(JOINTS)
        )
        assert 0 <= found["within_a_cell"] <= 1 and 0 < found["heat_l2_mean"] < found["heat_l2_zero"]

    def test_equal_settings_give_equal_weights_and_another_seed_others(
        self, trained: Path, videos: Path, shard_folder: Path, tmp_path: Path
    ) -> None:
        same, other = tmp_path / "same", tmp_path / "other"
        train_pose(TINY, shard_folder, videos / "joints.parquet", same)
        assert (same / "pose.safetensors").read_bytes() == (trained / "pose.safetensors").read_bytes()
        train_pose(replace(TINY, seed=1), shard_folder, videos / "joints.parquet", other)
        assert (other / "pose.safetensors").read_bytes() != (trained / "pose.safetensors").read_bytes()

    def test_a_run_that_was_killed_goes_on_and_comes_to_the_same(
        self,
        trained: Path,
        videos: Path,
        shard_folder: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        import pasnet.pose_train as module

        def killed(step: int, config: PoseTrainConfig) -> float:
            if step == 3:
                raise KeyboardInterrupt
            return rate_at(step, config)

        with monkeypatch.context() as patch:
            patch.setattr(module, "rate_at", killed)
            with pytest.raises(KeyboardInterrupt):
                train_pose(TINY, shard_folder, videos / "joints.parquet", tmp_path)
        train_pose(TINY, shard_folder, videos / "joints.parquet", tmp_path)
        assert "going on after step 2 of 4" in capsys.readouterr().out
        assert (tmp_path / "pose.safetensors").read_bytes() == (trained / "pose.safetensors").read_bytes()
        stamp = (tmp_path / "last.pt").stat().st_mtime_ns
        train_pose(TINY, shard_folder, videos / "joints.parquet", tmp_path)  # done: nothing is written
        assert (tmp_path / "last.pt").stat().st_mtime_ns == stamp
        with pytest.raises(ConfigError, match="is a run with other settings"):
            train_pose(replace(TINY, lr=0.1), shard_folder, videos / "joints.parquet", tmp_path)

    def test_the_loss_falls_and_the_maps_beat_an_empty_guess(
        self, videos: Path, shard_folder: Path, tmp_path: Path
    ) -> None:
        config = replace(TINY, steps=60, batch=8, checkpoint_steps=20, measure=12, warmup=5, lr=3e-3)
        found = train_pose(config, shard_folder, videos / "joints.parquet", tmp_path)
        first, *_, last = found["losses"]
        assert last < 0.85 * first
        assert found["heat_l2"] < found["heat_l2_zero"] and found["paf_l2"] < found["paf_l2_zero"]

    def test_a_perfect_network_is_called_perfect(self, videos: Path, shard_folder: Path) -> None:
        frames = Frames(open_shards(shard_folder), videos / "joints.parquet")
        config = replace(TINY, input_size=112, batch=4)

        class Knows(BodyNet):
            def stages(self, frames: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
                return [(answers[1], answers[0])]

        read, answers = frames.read, []

        def remember(*arguments: object) -> object:
            found = read(*arguments)  # type: ignore[arg-type]
            answers[:] = found[1:]
            return found

        frames.read = remember  # type: ignore[method-assign,assignment]
        found = quality(Knows(0.0625), frames, config)
        assert found["heat_l2"] == found["paf_l2"] == 0 and found["within_a_cell"] == 1
        assert found["heat_l2_zero"] > found["heat_l2_mean"] > 0

    def test_the_command(
        self, videos: Path, shard_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        small = ["width=0.0625", "input_size=48", "steps=1", "batch=1", "measure=1"]
        command = ["pose-train", "--shards", str(shard_folder), "--out", str(tmp_path)]
        command += [word for each in small for word in ("--set", each)]
        assert main([*command, "--joints", str(videos / "joints.parquet")]) == 0
        assert "of the visible joints of held-out groups within a cell" in capsys.readouterr().out
        assert main([*command, "--joints", str(tmp_path / "nothing.parquet")]) == 2
        assert "nothing.parquet: no such file; `pasnet synth`" in capsys.readouterr().err

    def test_joints_of_other_videos_are_refused(self, videos: Path, shard_folder: Path, tmp_path: Path) -> None:
        shards = open_shards(shard_folder)
        shards.num_frames = shards.num_frames + 1
        with pytest.raises(ConfigError, match="give the joints of the same videos"):
            Frames(shards, videos / "joints.parquet")
        (tmp_path / "joints.parquet").write_bytes(b"no parquet")
        with pytest.raises(ConfigError, match=r"not a joints\.parquet of pasnet synth"):
            Frames(open_shards(shard_folder), tmp_path / "joints.parquet")
