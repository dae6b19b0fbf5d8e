"""Data, loop, checkpoints and evaluation, through the real `train` on real (tiny, synthetic) videos."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from pasnet import checkpoints
from pasnet import train as training
from pasnet.checkpoints import read_pretrained, run_digest
from pasnet.config import (
    ConfigError,
    DataConfig,
    FusionConfig,
    InitConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    replace,
    to_dict,
)
from pasnet.data import ClipDataset, Loader, open_shards, rgb_of_planes, train_view
from pasnet.distributed import Processes
from pasnet.evaluate import EvaluationError, Predictions, autocast, ensemble, metrics, predict
from pasnet.models.pasnet import build
from pasnet.train import TrainingError, describe, evaluate_checkpoint, lr_scale_at, set_bn_mode, train
from pasnet.weights import WeightsError
from shards import centre


@pytest.fixture
def config(shard_folder: Path) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(num_classes=3, fusion=FusionConfig(style="A"), width=0.0625),
        data=DataConfig(shards=str(shard_folder), num_segments=3, input_size=48, workers=0),
        optim=OptimConfig(epochs=2, lr=0.01, batch=4, micro_batch=2, schedule="constant"),
    )


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "last.pt", weights_only=True)["model"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


ALONE = Processes(rank=0, world=1, device=torch.device("cpu"))


class StopError(Exception):
    pass


# What a GPU machine may lack: orchestration, tracking, decoders of videos, converters of weights, pictures, progress.
NOT_NEEDED = (
    "prefect",
    "mlflow",
    "pydantic",
    "webdataset",
    "ffmpeg",
    "imageio_ffmpeg",
    "safetensors",
    "rarfile",
    "PIL",
)
NOT_NEEDED += ("rich", "torchvision", "requests", "anyio", "sqlalchemy", "flows")


class TestData:
    def test_a_batch_is_what_the_shards_hold(self, config: TrainConfig) -> None:
        shards = open_shards(Path(config.data.shards))
        loader = Loader(shards, config.data, subset="test", batch=2, seed=0)
        batches = list(loader.epoch(0))
        assert batches[0].clips.shape == (2, 3, 3, 48, 48) and batches[0].clips.dtype == torch.uint8
        rows = [row for batch in batches for row in batch.rows.tolist()]
        assert rows == loader.rows.tolist()
        assert [int(x) for batch in batches for x in batch.labels] == shards.labels[loader.rows].tolist()

    @pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")  # on two cores
    @pytest.mark.parametrize("workers", [1, 2, 4])
    def test_workers_do_not_change_a_batch(self, config: TrainConfig, workers: int) -> None:
        shards = open_shards(Path(config.data.shards))
        alone = Loader(shards, config.data, subset="train", batch=2, seed=3)
        helped = Loader(shards, replace(config, {"data.workers": workers}).data, subset="train", batch=2, seed=3)
        for epoch in (0, 1):
            for a, b in zip(alone.epoch(epoch), helped.epoch(epoch), strict=True):
                assert torch.equal(a.clips, b.clips) and torch.equal(a.rows, b.rows) and torch.equal(a.frames, b.frames)

    def test_epochs_and_seeds_differ(self, config: TrainConfig) -> None:
        shards = open_shards(Path(config.data.shards))

        def look(seed: int, epoch: int) -> list[int]:
            loader = Loader(shards, config.data, subset="train", batch=2, seed=seed)
            return [int(batch.clips.sum()) for batch in loader.epoch(epoch)]

        assert look(0, 0) == look(0, 0)
        assert look(0, 0) != look(0, 1)
        assert look(0, 0) != look(1, 0)

    def test_test_clips_never_change(self, config: TrainConfig) -> None:
        shards = open_shards(Path(config.data.shards))
        data = ClipDataset(shards, config.data, train=False, seed=0)
        row = int(shards.select(1, "test")[0])
        assert torch.equal(data[0, row][0], data[7, row][0])

    def test_one_crop_for_all_frames_of_a_clip(self, config: TrainConfig) -> None:
        # K frames of a one-frame segment each, sampled from a clip whose frames are the same picture
        shards = open_shards(Path(config.data.shards))
        still = ClipDataset(shards, config.data, train=True, seed=0)
        read = still.clips.shards.read_jpegs
        still.clips.shards.read_jpegs = lambda row, indices: read(row, [0] * len(indices))  # type: ignore[method-assign]
        clip = still[0, 0][0]
        assert torch.equal(clip[0], clip[1]) and torch.equal(clip[0], clip[2])

    def test_crops_are_those_of_eco(self, config: TrainConfig) -> None:
        rng = np.random.default_rng(0)
        seen = {tuple(train_view(256, 340, rng, config=config.data)[:4]) for _ in range(5000)}
        sides = {h for _, _, h, _ in seen} | {w for _, _, _, w in seen}
        assert sides == {256, 224, 192, 168}
        pairs = {(h, w) for _, _, h, w in seen}
        assert (256, 192) not in pairs and (256, 224) in pairs and len(pairs) == 10
        assert {(top, left) for top, left, h, w in seen if (h, w) == (224, 224)} == {
            *((y, x) for y in (0, 16, 32) for x in (0, 58, 116)),
            *((y, x) for y in (8, 24) for x in (29, 87)),
        }
        assert all(top + h <= 256 and left + w <= 340 for top, left, h, w in seen)
        assert centre(256, 340) == (16, 58, 224, 224, False)

    def test_random_crop_stays_inside(self, config: TrainConfig) -> None:
        data = replace(config, {"data.crop": "random"}).data
        rng = np.random.default_rng(0)
        seen = [train_view(256, 340, rng, config=data)[:4] for _ in range(2000)]
        assert {(h, w) for _, _, h, w in seen} == {(224, 224)}
        assert {top for top, *_ in seen} == set(range(33)) and {left for _, left, *_ in seen} == set(range(117))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_what_a_gpu_gets_are_the_same_clips(self, config: TrainConfig, workers: int) -> None:
        # whole frames as planes in a ring of shared memory; here they are made into clips on the CPU
        shards, data = open_shards(Path(config.data.shards)), replace(config, {"data.workers": workers}).data
        direct = Loader(shards, config.data, subset="train", batch=2, seed=3)
        ring = Loader(shards, data, subset="train", batch=2, seed=3, planes=True)
        for epoch in (0, 1):
            count = 0
            for a, b in zip(direct.epoch(epoch), ring.epoch(epoch), strict=True):
                assert (
                    torch.equal(a.rows, b.rows) and torch.equal(a.frames, b.frames) and torch.equal(a.labels, b.labels)
                )
                assert b.clips.shape == a.clips.shape and b.clips.dtype == torch.uint8
                # two decoders, and another way to take the mean over what is five times smaller
                assert (b.clips.int() - a.clips.int()).abs().float().mean() < 4
                count += len(b.rows)
            assert count == len(ring.rows)

    @pytest.mark.parametrize("flip", [False, True])
    def test_a_gpu_resizes_as_opencv_does(self, flip: bool) -> None:
        rng = np.random.default_rng(0)
        frames = rng.integers(0, 256, (3, 2, 256, 340), dtype=np.uint8)  # 3 clips of 2 frames
        grey = np.full((3, 2, 256 * 170), 128, np.uint8)
        planes = torch.from_numpy(np.concatenate([frames.reshape(3, 2, -1), grey], 2))
        views = [(0, 0, 256, 256, flip), (17, 59, 168, 192, flip), (88, 116, 168, 224, flip)]
        clips = rgb_of_planes(planes, torch.tensor(views), (256, 340), 224)
        for clip, frames_of, (top, left, h, w, _) in zip(clips, frames, views, strict=True):
            for shown, frame in zip(clip, frames_of, strict=True):
                cut = frame[top // 2 * 2 :, left // 2 * 2 :][:h, :w]
                expected = cv2.resize(cut, (224, 224), interpolation=cv2.INTER_LINEAR)
                expected = expected[:, ::-1] if flip else expected
                assert np.abs(shown.numpy().astype(int) - expected).max() <= 1

    def test_a_gpu_colours_as_jpeg_decoders_do(self) -> None:
        colours = [(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 100, 50), (20, 140, 90)]
        for colour in colours:
            picture = np.full((64, 64, 3), colour, np.uint8)
            y, u, v = np.split(cv2.cvtColor(picture, cv2.COLOR_RGB2YUV_I420).reshape(-1), [4096, 5120])
            luma = (y.astype(float) - 16) * 255 / 219  # OpenCV's I420 is of limited range
            chroma = [(c.astype(float) - 128) * 255 / 224 + 128 for c in (u, v)]
            planes = np.concatenate([luma, *chroma]).round().clip(0, 255).astype(np.uint8)
            found = rgb_of_planes(torch.from_numpy(planes)[None, None], torch.tensor([[0, 0, 64, 64, 0]]), (64, 64), 56)
            assert (found[0, 0].int() - torch.tensor(colour).view(3, 1, 1)).abs().max() <= 4

    @pytest.mark.parametrize("workers", [0, 2])
    def test_an_epoch_goes_on_where_it_was(self, config: TrainConfig, workers: int) -> None:
        shards = open_shards(Path(config.data.shards))
        loader = Loader(shards, config.data, subset="train", batch=2, seed=3)
        whole = list(loader.epoch(4))
        resumed = Loader(shards, replace(config, {"data.workers": workers}).data, subset="train", batch=2, seed=3)
        rest = list(resumed.epoch(4, start=2))
        assert len(rest) == len(whole) - 2 > 0
        assert all(torch.equal(a.clips, b.clips) for a, b in zip(whole[2:], rest, strict=True))
        assert len(list(resumed.epoch(5))) == len(whole)

    def test_train_fraction_keeps_every_class(self, config: TrainConfig) -> None:
        shards = open_shards(Path(config.data.shards))
        part = Loader(shards, replace(config, {"data.train_fraction": 0.4}).data, subset="train", batch=2, seed=0)
        assert sorted(shards.labels[part.rows].tolist()) == [0, 1, 2]


class TestLoop:
    def test_resume_equals_uninterrupted_bit_for_bit(self, config: TrainConfig, tmp_path: Path) -> None:
        config = replace(config, {"optim.epochs": 3, "model.fusion.style": "Conv(A,I)"})
        train(replace(config, {"data.workers": 0}), tmp_path / "whole")
        config = replace(config, {"data.workers": 2})

        def stop(record: dict[str, Any]) -> None:
            if record["epoch"] == 2:
                raise StopError

        with pytest.raises(StopError):
            train(config, tmp_path / "parts", stop)
        assert not (tmp_path / "parts" / "done.json").exists()
        result = train(config, tmp_path / "parts")
        assert same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))
        whole, parts = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("whole", "parts"))
        assert [r["train_loss"] for r in whole] == [r["train_loss"] for r in parts]
        assert result["last"]["epoch"] == 3

    def test_dropout_does_not_know_the_workers(self, config: TrainConfig, tmp_path: Path) -> None:
        assert config.model.dropout > 0
        for workers in (0, 1, 2):
            train(replace(config, {"data.workers": workers}), tmp_path / str(workers))
        assert same(weights_of(tmp_path / "0"), weights_of(tmp_path / "1"))
        assert same(weights_of(tmp_path / "0"), weights_of(tmp_path / "2"))

    def test_a_pasnet_goes_on_from_a_pasnet(self, config: TrainConfig, tmp_path: Path) -> None:
        config = replace(config, {"model.fusion.style": "A+pool(I)", "optim.epochs": 1})
        train(config, tmp_path / "one")
        again = replace(
            config, {"init.parent": str(tmp_path / "one" / "last.pt"), "optim.lr": 1e-12, "optim.bn_mode": "frozen"}
        )
        train(again, tmp_path / "two")
        one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
        assert all(torch.allclose(one[key].float(), two[key].float(), atol=1e-7) for key in one)
        assert "random start" not in (tmp_path / "two" / "load_report.txt").read_text()

    def test_a_moved_run_goes_on(self, config: TrainConfig, tmp_path: Path) -> None:
        def stop(record: dict[str, Any]) -> None:
            raise StopError

        with pytest.raises(StopError):
            train(config, tmp_path / "here", stop)
        moved = (tmp_path / "here").rename(tmp_path / "there")
        copy = shutil.copytree(config.data.shards, tmp_path / "shards")
        result = train(replace(config, {"data.shards": str(copy)}), moved)
        assert result["last"]["epoch"] == 2

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"init.parent": "a.pt", "init.eco": "b.pth"}, "init.parent and init.eco all give"),
            ({"init.pose": "b.pth"}, "fusion A has no pose network"),
        ],
    )
    def test_contradictory_starts_are_refused(self, config: TrainConfig, changes: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            replace(config, changes)

    def test_it_needs_few_packages(self, config: TrainConfig, tmp_path: Path) -> None:
        """Training, evaluation and a finetune from it, where the packages for everything else are not installed."""
        (tmp_path / "config.json").write_text(json.dumps(to_dict(replace(config, {"optim.epochs": 1}))))
        (tmp_path / "run.py").write_text(
            "import importlib.abc, sys\n"
            "class Absent(importlib.abc.MetaPathFinder):\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            f"        if name.split('.')[0] in {NOT_NEEDED}:\n"
            "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
            "sys.meta_path.insert(0, Absent())\n"
            "from pasnet.cli import main\n"
            "folder, shards = sys.argv[1:]\n"
            "train = ['train', '--config', f'{folder}/config.json', '--tracking-uri', 'off', '--out']\n"
            "assert main([*train, f'{folder}/eco']) == 0\n"
            "check = ['--checkpoint', f'{folder}/eco/last.pt', '--shards', shards, '--out', f'{folder}/evaluation']\n"
            "assert main(['evaluate', *check]) == 0\n"
            "parent = ['--set', f'init.parent={folder}/eco/last.pt', '--set', 'model.fusion.style=A+pool(I)']\n"
            "assert main([*train, f'{folder}/pasnet', *parent]) == 0\n"
        )
        command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path), config.data.shards]
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        assert (tmp_path / "pasnet" / "done.json").is_file()
        assert "no picture is drawn" in done.stdout + done.stderr
        assert (tmp_path / "evaluation" / "metrics.json").is_file()

    def test_the_loss_falls(self, config: TrainConfig, tmp_path: Path) -> None:
        changes = {"optim.epochs": 80, "optim.lr": 0.005, "model.dropout": 0, "model.width": 0.125, "optim.batch": 9}
        changes |= {"optim.micro_batch": 9, "data.flip": False, "data.scales": (1.0,), "data.input_size": 64, "seed": 3}
        train(replace(config, changes), tmp_path)
        history = json.loads((tmp_path / "history.json").read_text())
        assert min(record["train_loss"] for record in history[-5:]) < 0.6 * history[0]["train_loss"]
        assert max(record["train_top1"] for record in history[-5:]) > 85

    def test_accumulation_equals_one_big_batch(self, config: TrainConfig, tmp_path: Path) -> None:
        # 9 clips in steps of 6: the second step is a part-filled one. Batch norm frozen, since it sees micro batches.
        base = {
            "optim.epochs": 1,
            "optim.batch": 6,
            "optim.bn_mode": "frozen",
            "model.dropout": 0,
            "optim.clip_norm": 0.5,
        }
        train(replace(config, {**base, "optim.micro_batch": 6}), tmp_path / "big")
        train(replace(config, {**base, "optim.micro_batch": 1}), tmp_path / "small")
        big, small = weights_of(tmp_path / "big"), weights_of(tmp_path / "small")
        torch.manual_seed(config.seed)
        start = build(config.model).state_dict()
        moved = max(float((big[key] - start[key]).abs().max()) for key in big)
        apart = max(float((big[key] - small[key]).abs().max()) for key in big)
        assert moved > 1e-4 and apart < 1e-3 * moved

    def test_the_applied_gradient_is_clipped(self, config: TrainConfig, tmp_path: Path) -> None:
        base = {
            "optim.epochs": 1,
            "optim.batch": 9,
            "optim.micro_batch": 3,
            "optim.weight_decay": 0,
            "optim.momentum": 0,
        }
        train(replace(config, {**base, "optim.nesterov": False, "optim.clip_norm": 1e-3}), tmp_path)
        torch.manual_seed(config.seed)
        start, after = dict(build(config.model).named_parameters()), weights_of(tmp_path)
        # one step; biases move at twice the rate
        step = [
            (after[k] - p.detach()) / (0.02 if k.endswith("bias") and "_bn" not in k else 0.01)
            for k, p in start.items()
        ]
        assert torch.stack([part.norm() for part in step]).norm().item() == pytest.approx(1e-3, rel=0.02)

    def test_a_loss_that_is_not_finite_stops_and_names_the_clips(self, config: TrainConfig, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match=r"not finite in epoch \d+.*, lr .*, clips: \w+/v_\w+"):
            train(replace(config, {"optim.lr": 1e30, "optim.clip_norm": 1e30}), tmp_path)

    def test_twice_finetune_starts_from_eco(self, config: TrainConfig, tmp_path: Path) -> None:
        train(config, tmp_path / "eco")
        parent = str(tmp_path / "eco" / "last.pt")
        config = replace(config, {"model.fusion.style": "A+pool(I)", "init.parent": parent, "optim.lr": 1e-12})
        train(config, tmp_path / "pas")
        eco, pas = weights_of(tmp_path / "eco"), weights_of(tmp_path / "pas")
        learnt = [key for key in eco if key.endswith((".weight", ".bias")) and eco[key].ndim > 1]
        assert learnt and all(torch.allclose(eco[key], pas[key], atol=1e-7) for key in learnt)
        assert torch.allclose(eco["head.weight"], pas["head.weight"], atol=1e-7)
        assert "216 tensors loaded, 184 left" in (tmp_path / "pas" / "load_report.txt").read_text()

    def test_a_checkpoint_of_another_split_is_refused(self, config: TrainConfig, tmp_path: Path) -> None:
        train(replace(config, {"optim.epochs": 1}), tmp_path / "one")
        init = {"init.parent": str(tmp_path / "one" / "last.pt"), "data.split": 2}
        with pytest.raises(WeightsError, match="was trained on split 1, this run is on 2"):
            train(replace(config, init), tmp_path / "two")

    def test_a_checkpoint_of_another_dataset_is_refused_by_name(
        self, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        train(replace(config, {"optim.epochs": 1}), tmp_path / "one")
        path, shards = tmp_path / "one" / "last.pt", Path(config.data.shards)
        found = torch.load(path, weights_only=True)
        child = replace(config, {"init.parent": str(path)})
        torch.save({**found, "data": {**found["data"], "dataset": "hmdb51"}}, path)
        with pytest.raises(WeightsError, match="was trained on dataset hmdb51, this run is on synthetic"):
            train(child, tmp_path / "two")
        with pytest.raises(WeightsError, match="was trained on dataset hmdb51, this run is on synthetic"):
            evaluate_checkpoint(path, shards, tmp_path / "evaluation")
        torch.save({**found, "data": {**found["data"], "digest": "0123456789abcdef"}}, path)
        with pytest.raises(WeightsError, match=r"other shards of synthetic \(digest 0123456789ab\).*packed with other"):
            evaluate_checkpoint(path, shards, tmp_path / "evaluation")
        assert not (tmp_path / "evaluation").exists()

    def test_a_parent_that_knows_the_held_out_clips_is_refused(self, config: TrainConfig, tmp_path: Path) -> None:
        config = replace(config, {"optim.epochs": 1})
        train(config, tmp_path / "all")
        train(replace(config, {"data.held_out": 0.3}), tmp_path / "some")
        held_out = {"data.held_out": 0.2, "optim.schedule": "plateau_on_held_out"}
        with pytest.raises(WeightsError, match=r"trained with data.held_out=0, .*this run holds out \(0.2\)"):
            train(replace(config, {**held_out, "init.parent": str(tmp_path / "all" / "last.pt")}), tmp_path / "a")
        train(replace(config, {**held_out, "init.parent": str(tmp_path / "some" / "last.pt")}), tmp_path / "b")

    def test_what_a_parent_saw_otherwise_is_said(self, config: TrainConfig, tmp_path: Path) -> None:
        config = replace(config, {"optim.epochs": 1})
        train(replace(config, {"model.appearance_mean": (104.0, 117.0, 123.0)}), tmp_path / "one")
        start = {"init.parent": str(tmp_path / "one" / "last.pt")}
        train(replace(config, {**start, "data.num_segments": 2, "data.sampling": "eco_compatible"}), tmp_path / "two")
        report = (tmp_path / "two" / "load_report.txt").read_text()
        for line in (
            "model.appearance_mean (104.0, 117.0, 123.0), this run has (104.0, 117.0, 128.0)",
            "data.num_segments 3, this run has 2",
            "data.sampling segment, this run has eco_compatible",
        ):
            assert line in report
        assert "pose_input" not in report and "input_size" not in report

    def test_an_official_set_is_no_other_set_when_it_is_packed_anew(
        self, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        train(replace(config, {"optim.epochs": 1}), tmp_path / "one")
        shards, path = open_shards(Path(config.data.shards)), tmp_path / "one" / "last.pt"
        found = torch.load(path, weights_only=True)
        for theirs, ours, refused in (
            ("ucf101", "ucf101", True),
            ("hmdb51", "jhmdb", True),
            ("ucf101", "hmdb51", False),
            ("ucf-layout", "ucf-layout", False),  # a name that any folder has
        ):
            torch.save({**found, "data": {**found["data"], "dataset": theirs, "digest": "another"}}, path)
            monkeypatch.setitem(shards.manifest, "dataset", ours)
            if refused:
                with pytest.raises(
                    WeightsError, match=f"trained on {theirs}, whose training videos include some of {ours}'s"
                ):
                    read_pretrained(path, shards, 1)
            else:
                with_names = found["data"]["train_videos"]
                other = with_names if theirs != ours else with_names + 1  # of one name, but other videos
                data = {**found["data"], "dataset": theirs, "digest": "another", "train_videos": other}
                torch.save({**found, "data": data}, path)
                assert read_pretrained(path, shards, 1)

    def test_no_training_video_of_a_set_packed_anew_is_a_test_video(
        self, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of any set, not the official ones alone: split 2's training list holds split 1's test videos."""
        train(replace(config, {"optim.epochs": 1, "data.split": 2}), tmp_path / "one")
        path = tmp_path / "one" / "last.pt"
        found = torch.load(path, weights_only=True)
        torch.save({**found, "data": {**found["data"], "digest": "packed otherwise"}}, path)
        shards = open_shards(Path(config.data.shards))
        with pytest.raises(WeightsError, match=r"trained on synthetic, too, and on 3 of the 3 test videos of split 1"):
            read_pretrained(path, shards, 1)
        assert read_pretrained(path, shards, 2)

    def test_what_is_left_of_a_run_that_was_removed_is_not_believed(self, config: TrainConfig, tmp_path: Path) -> None:
        train(replace(config, {"optim.epochs": 1}), tmp_path)
        (tmp_path / "last.pt").unlink()

        def stop(record: dict[str, Any]) -> None:
            raise StopError

        with pytest.raises(StopError):
            train(config, tmp_path, stop)
        assert not (tmp_path / "done.json").exists()

    def test_shards_that_lack_videos_say_so(
        self, config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = shutil.copytree(config.data.shards, tmp_path / "shards")
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["listed_but_missing"] == 0
        (folder / "manifest.json").write_text(json.dumps({**manifest, "listed_but_missing": 2, "failed": 1}))
        one = replace(config, {"optim.epochs": 1, "data.shards": str(folder)})
        train(one, tmp_path / "run")
        said = f"{folder} lacks 3 videos of the dataset's lists: accuracies are of the others"
        assert said in capsys.readouterr().out
        evaluate_checkpoint(tmp_path / "run" / "last.pt", folder, tmp_path / "evaluation")
        assert said in capsys.readouterr().out
        made = Predictions.load(tmp_path / "evaluation" / "predictions.parquet")
        assert made.source is not None and made.source.lacking == 3

    def test_the_number_of_processes_is_said_when_it_changes(
        self, config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def stop(record: dict[str, Any]) -> None:
            raise StopError

        with pytest.raises(StopError):
            train(config, tmp_path, stop)
        path = tmp_path / "last.pt"
        found = torch.load(path, weights_only=True)
        found["history"][0]["processes"] = 4
        torch.save(found, path)
        capsys.readouterr()
        assert train(config, tmp_path)["processes"] == "4; 1"
        assert "epochs before this were trained by 4 processes, now by 1: not bit for bit" in capsys.readouterr().out

    def test_a_finished_run_says_what_it_was_made_with(
        self, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stop(record: dict[str, Any]) -> None:
            raise StopError

        monkeypatch.setattr(training, "commit", lambda: "first")
        with pytest.raises(StopError):
            train(config, tmp_path, stop)
        (tmp_path / "failure.json").write_text("{}")  # of an attempt before
        monkeypatch.setattr(training, "commit", lambda: "second")
        assert train(config, tmp_path)["commit"] == "first; second"
        assert not (tmp_path / "failure.json").exists()
        done = (tmp_path / "done.json").read_bytes()
        monkeypatch.setattr(training, "commit", lambda: "third")
        assert train(config, tmp_path)["commit"] == "first; second" and (tmp_path / "done.json").read_bytes() == done

    def test_sampling_is_a_choice_that_changes_no_older_name(
        self, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shards = open_shards(Path(config.data.shards))
        eco = replace(
            config, {"data.sampling": "eco_compatible", "data.num_segments": 20}
        )  # more than there are frames
        batch = next(iter(Loader(shards, eco.data, subset="test", batch=1, seed=0).epoch(0)))
        assert batch.frames.tolist() == [[0] * 20]  # ECO-pytorch's answer to short videos
        ours = next(
            iter(
                Loader(shards, replace(eco, {"data.sampling": "segment"}).data, subset="test", batch=1, seed=0).epoch(0)
            )
        )
        assert len(set(ours.frames[0].tolist())) > 4
        assert run_digest(eco, "d", "") != run_digest(replace(eco, {"data.sampling": "segment"}), "d", "")
        # the name that this configuration had before there was a choice
        monkeypatch.setattr(checkpoints, "NUMERICS", 2)  # of that time
        assert run_digest(replace(config, {"data.shards": "x"}), "d", "") == "1d0431064f04"

    def test_a_folder_of_another_run_is_refused(self, config: TrainConfig, tmp_path: Path) -> None:
        train(replace(config, {"optim.epochs": 1}), tmp_path)
        others = {
            "optim.epochs": 1,
            "optim.lr": 0.5,
            "data.workers": 1,
            "checkpoint_minutes": 3,
        }  # the last two are free
        with pytest.raises(ConfigError, match=r"is a run with other settings \(optim.lr 0.01, now 0.5\); give another"):
            train(replace(config, others), tmp_path)
        found = torch.load(tmp_path / "last.pt", weights_only=True)
        torch.save({**found, "numerics": 1, "identity": "of before"}, tmp_path / "last.pt")
        with pytest.raises(ConfigError, match=r"other settings \(another version of the training\); give another"):
            train(replace(config, {"optim.epochs": 1}), tmp_path)

    def test_short_videos_are_said(
        self, config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        train(replace(config, {"optim.epochs": 1, "data.num_segments": 20}), tmp_path)
        assert "100% of the training videos have fewer frames than K = 20" in capsys.readouterr().out

    def test_a_weights_file_that_was_moved_is_named(self, config: TrainConfig, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match=r"gone\.pth: no such file"):
            train(replace(config, {"init.eco": str(tmp_path / "gone.pth")}), tmp_path / "out")

    def test_a_compiled_network_learns_the_same(
        self, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Traced by dynamo; what its backend makes of the graph is torch's matter, and wants a compiler."""
        config = replace(config, {"optim.epochs": 1, "model.fusion.style": "A+pool(I)"})
        train(config, tmp_path / "plain")
        real = torch.compile
        monkeypatch.setattr(torch, "compile", lambda network, **_: real(network, backend="eager"))
        train(replace(config, {"compile": True}), tmp_path / "compiled")
        plain, traced = weights_of(tmp_path / "plain"), weights_of(tmp_path / "compiled")
        assert plain.keys() == traced.keys()
        assert all(torch.allclose(plain[key].float(), traced[key].float(), atol=1e-6) for key in plain)

    def test_synchronised_batch_norm_wants_gpus(
        self, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        two = Processes(rank=0, world=2, device=torch.device("cpu"))
        monkeypatch.setattr(training, "processes", lambda: contextlib.nullcontext(two))
        with pytest.raises(ConfigError, match="sync_bn needs GPUs"):
            train(replace(config, {"optim.sync_bn": True, "optim.batch": 4}), tmp_path)

    def test_plateau_divides_by_ten_after_patience(self) -> None:
        optim = OptimConfig(patience=2)
        top1 = [50, 60, 60, 59, 58, 61, 60, 60]
        history: list[dict[str, Any]] = [{"test_top1": value} for value in top1]
        scales = [lr_scale_at(epoch, optim, history[:epoch]) for epoch in range(len(top1) + 1)]
        assert scales == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.01])

    def test_the_recipe_reaches_the_optimiser(
        self, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        changes = {"model.fusion.style": "A+pool(I)", "optim.schedule": "steps", "optim.steps": "1"}
        changes |= {"optim.momentum": 0.8, "optim.weight_decay": 1e-3, "optim.pose_lr_mult": 0.1}
        made: list[torch.optim.SGD] = []

        class Watched(torch.optim.SGD):
            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **options)
                made.append(self)

        monkeypatch.setattr(torch.optim, "SGD", Watched)
        rates: list[dict[str, float]] = []

        def note(record: dict[str, Any]) -> None:
            rates.append({group["name"]: group["lr"] for group in made[-1].param_groups} | {"said": record["lr"]})

        train(replace(config, changes), tmp_path, note)
        first = {"weight": 0.01, "bias": 0.02, "bn": 0.01, "pose_weight": 0.001, "pose_bias": 0.002, "said": 0.01}
        assert rates[0] == pytest.approx(first)
        assert rates[1] == pytest.approx({name: rate / 10 for name, rate in first.items()})
        groups = {group["name"]: group for group in made[-1].param_groups}
        assert all(group["momentum"] == 0.8 and group["nesterov"] for group in groups.values())
        decays = {name: group["weight_decay"] for name, group in groups.items()}
        assert decays == {"weight": 1e-3, "pose_weight": 1e-3, "bias": 0, "pose_bias": 0, "bn": 0}
        train(replace(config, {**changes, "optim.nesterov": False, "optim.epochs": 1}), tmp_path / "plain")
        assert not any(group["nesterov"] for group in made[-1].param_groups)

    def test_best_on_test_is_told_apart_from_the_last(
        self, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = iter([20.0, 60.0, 40.0])
        real = training.metrics

        def told(*arguments: Any, **options: Any) -> dict[str, float]:
            return {**real(*arguments, **options), "top1": next(found)}

        monkeypatch.setattr(training, "metrics", told)
        result = train(replace(config, {"optim.epochs": 3}), tmp_path)
        assert result["last"]["test_top1"] == 40 and result["best_on_test"] == {"epoch": 2, "top1": 60}

    def test_what_is_kept_for_the_backward_pass_is_no_part_of_the_result(
        self, config: TrainConfig, tmp_path: Path
    ) -> None:
        of = replace(config, {"model.fusion.style": "Conv(A,I,F)", "optim.epochs": 1, "optim.lr": 0.001})
        anew = replace(of, {"optim.checkpoint_pose": True})
        assert run_digest(of, "d", "") == run_digest(anew, "d", "")
        train(of, tmp_path / "kept")
        train(anew, tmp_path / "anew")
        kept, computed = weights_of(tmp_path / "kept"), weights_of(tmp_path / "anew")
        for key, value in kept.items():
            torch.testing.assert_close(computed[key], value, rtol=1e-4, atol=1e-6)

    def test_a_line_for_an_epoch_says_what_is_left(self) -> None:
        record = {"epoch": 3, "train_loss": 1.5, "train_top1": 50.0, "test_top1": 40.0, "lr": 0.001}
        record |= {"clips_per_second": 7.25, "data_wait": 0.031, "seconds": 100.0}
        line = describe(record, 40)
        assert line.endswith("100.0 s, 1:01:40 left") and "data wait 3 %" in line and "GiB" not in line
        assert describe({**record, "epoch": 40, "held_out_top1": 33.0, "gpu_gib": 4.25}, 40).endswith("0:00 left")
        assert "held out  33.0 %" in describe({**record, "held_out_top1": 33.0}, 40)

    def test_fixed_steps(self) -> None:
        optim = OptimConfig(schedule="steps", steps=(2, 3))
        assert [lr_scale_at(epoch, optim, []) for epoch in range(5)] == pytest.approx([1, 1, 0.1, 0.01, 0.01])
        for steps in ((3, 2), (2, 2), (0, 5)):
            with pytest.raises(ConfigError, match="steps must be epochs in ascending order"):
                OptimConfig(schedule="steps", steps=steps)

    @pytest.mark.parametrize(("mode", "moving"), [("train", 30), ("partial", 1), ("frozen", 0)])
    @pytest.mark.parametrize("style", ["A", "I"])
    def test_batch_norm_modes(self, config: TrainConfig, mode: str, moving: int, style: str) -> None:
        model = build(replace(config, {"model.fusion.style": style}).model)
        set_bn_mode(model, replace(config, {"optim.bn_mode": mode}).optim)
        for learning in (True, False, True):  # an evaluation between two epochs
            model.train(learning)
            assert model.head.training == learning
        runs = [model.temporal] if style == "I" else [model.appearance, model.temporal]  # "I" has A's trunk, unused
        kinds = torch.nn.BatchNorm2d | torch.nn.BatchNorm3d
        norms = [module for part in runs for module in part.modules() if isinstance(module, kinds)]
        moving = min(moving, len(norms))
        assert sum(norm.training for norm in norms) == moving
        assert sum(norm.weight.requires_grad for norm in norms) == moving
        assert norms[0].training == (mode != "frozen")

    def test_frozen_pose_does_not_move(self, config: TrainConfig, tmp_path: Path) -> None:
        config = replace(config, {"model.fusion.style": "A+pool(I)", "optim.freeze_pose": True, "optim.epochs": 1})
        train(config, tmp_path)
        torch.manual_seed(config.seed)
        start, after = build(config.model).state_dict(), weights_of(tmp_path)
        assert all(torch.equal(start[key], after[key]) for key in after if key.startswith("pose."))
        assert not torch.equal(start["head.weight"], after["head.weight"])

    def test_identity_is_what_decides_the_result(self, config: TrainConfig) -> None:
        def identity(shards: str = "d", parent: str = "", **changes: Any) -> str:
            return run_digest(replace(config, changes), shards, parent)

        assert identity() == identity(**{"data.workers": 2}) == identity(**{"data.shards": "/moved"})
        others = [identity("e"), identity(parent="p"), identity(seed=1), identity(**{"optim.lr": 0.5})]
        assert len({identity(), *others}) == 5


class TestEvaluation:
    @pytest.mark.parametrize(("precision", "kind"), [("fp32", None), ("tf32", None), ("bf16", torch.bfloat16)])
    def test_precisions(self, precision: str, kind: torch.dtype | None) -> None:
        with autocast(torch.device("cpu"), precision):
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert product.dtype == (kind or torch.float32)

    def test_checkpoint_gives_the_last_epochs_numbers(self, config: TrainConfig, tmp_path: Path) -> None:
        result = train(config, tmp_path)
        numbers = evaluate_checkpoint(tmp_path / "last.pt", Path(config.data.shards), tmp_path / "evaluation")
        assert numbers["top1"] == result["last"]["test_top1"]
        saved = Predictions.load(tmp_path / "evaluation" / "predictions.parquet")
        assert metrics(saved) == numbers
        shards = open_shards(Path(config.data.shards))
        assert list(saved.keys) == [shards.keys[row] for row in shards.select(1, "test")]
        assert saved.frames.shape == (3, 3) and np.allclose(saved.probabilities.sum(1), 1, atol=1e-5)

    def test_a_missing_clip_stops_the_report(self, config: TrainConfig) -> None:
        shards = open_shards(Path(config.data.shards))
        loader = Loader(shards, config.data, subset="test", batch=1, seed=0)
        loader._batches.rows = loader.rows[:-1]
        with pytest.raises(EvaluationError, match="3 videos on the list, but 2 clips of 2 videos"):
            predict(build(config.model), loader, shards.keys, ALONE, "fp32")

    def test_nan_stops_the_report(self, config: TrainConfig) -> None:
        shards = open_shards(Path(config.data.shards))
        model = build(config.model)
        torch.nn.init.constant_(model.head.weight, float("nan"))
        with pytest.raises(EvaluationError, match="NaN"):
            predict(
                model,
                Loader(shards, config.data, subset="test", batch=2, seed=0),
                shards.keys,
                ALONE,
                "fp32",
            )

    def test_metrics_by_hand(self) -> None:
        probabilities = np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]], np.float32)
        made = Predictions(
            keys=("a", "b", "c", "d"),
            labels=np.array([0, 0, 1, 0]),
            probabilities=probabilities,
            frames=np.zeros((4, 1)),
        )
        numbers = metrics(made)
        assert numbers["top1"] == 75 and numbers["top5"] == 100 and numbers["videos"] == 4
        assert numbers["mean_class"] == pytest.approx(100 * (2 / 3 + 1) / 2, abs=1e-3)
        assert 0 <= numbers["top1_low"] < 75 < numbers["top1_high"] <= 100

    def test_top5_counts_five(self) -> None:
        probabilities = np.tile(np.arange(7, 0, -1) / 28, (2, 1)).astype(np.float32)
        made = Predictions(
            keys=("a", "b"), labels=np.array([4, 5]), probabilities=probabilities, frames=np.zeros((2, 1))
        )
        assert metrics(made)["top5"] == 50

    def test_ensemble_aligns_by_key(self) -> None:
        a = Predictions(
            keys=("x", "y"),
            labels=np.array([0, 1]),
            probabilities=np.array([[0.9, 0.1], [0.6, 0.4]]),
            frames=np.zeros((2, 1)),
        )
        b = Predictions(
            keys=("y", "x"),
            labels=np.array([1, 0]),
            probabilities=np.array([[0.1, 0.9], [0.7, 0.3]]),
            frames=np.zeros((2, 1)),
        )
        fused = ensemble([a, b])
        assert fused.probabilities == pytest.approx(np.array([[0.8, 0.2], [0.35, 0.65]]))
        logits = ensemble([a, b], "logits").probabilities
        assert logits[0, 0] == pytest.approx(np.sqrt(0.63) / (np.sqrt(0.63) + np.sqrt(0.03)), rel=1e-5)
        with pytest.raises(EvaluationError, match="different videos"):
            ensemble(
                [
                    a,
                    Predictions(
                        keys=("x",), labels=a.labels[:1], probabilities=a.probabilities[:1], frames=a.frames[:1]
                    ),
                ]
            )


def test_init_from_public_weights(config: TrainConfig, tmp_path: Path) -> None:
    donor = build(replace(config, {"model.num_classes": 7, "model.fusion.style": "Conv(A,I)"}).model).state_dict()
    eco = {f"module.base_model.{k.partition('.')[2]}": v for k, v in donor.items() if k.startswith(("appear", "tempo"))}
    eco |= {f"module.new_fc.{k.partition('.')[2]}": v for k, v in donor.items() if k.startswith("head.")}
    pose = {k.removeprefix("pose."): v for k, v in donor.items() if k.startswith("pose.")}
    torch.save({"state_dict": eco}, tmp_path / "eco.pth.tar")
    torch.save(pose, tmp_path / "pose.pth")
    config = replace(
        config, {"model.fusion.style": "Conv(A,I)", "optim.lr": 1e-12, "optim.epochs": 1, "optim.bn_mode": "frozen"}
    )
    init = InitConfig(eco=str(tmp_path / "eco.pth.tar"), pose=str(tmp_path / "pose.pth"))
    train(TrainConfig(**{**config.__dict__, "init": init}), tmp_path / "run")
    got = weights_of(tmp_path / "run")
    loaded = [key for key in got if not key.startswith(("head.", "fusion."))]
    assert all(torch.allclose(got[key].float(), donor[key].float(), atol=1e-6) for key in loaded)
    assert "214 tensors loaded, 2 left" in (tmp_path / "run" / "load_report.txt").read_text()
