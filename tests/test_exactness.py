"""A training is the same however it got there: interrupted anywhere, by any signal, alone or in several processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pasnet.train as training
from pasnet import progress
from pasnet.config import ConfigError, DataConfig, FusionConfig, ModelConfig, OptimConfig, TrainConfig, replace, to_dict
from pasnet.data import Loader, held_out, open_shards, rows_of
from pasnet.distributed import Processes, processes
from pasnet.evaluate import Part, _joined
from pasnet.synth import SynthConfig, generate
from pasnet.train import StoppedError, TrainingError, evaluate_checkpoint, lr_scale_at, micro_batch, train
from pasnet.weights import WeightsError
from shards import build, find_dataset, scan

ROOT = str(Path(__file__).resolve().parents[1])


@pytest.fixture
def config(shard_folder: Path) -> TrainConfig:
    """9 clips in steps of 4 and 5, each of forward passes of at most 2."""
    return TrainConfig(
        model=ModelConfig(num_classes=3, fusion=FusionConfig(style="Conv(A,I)"), width=0.0625),
        data=DataConfig(shards=str(shard_folder), num_segments=2, input_size=48, workers=0),
        optim=OptimConfig(epochs=2, lr=0.01, batch=4, micro_batch=2, schedule="constant"),
    )


def state_of(folder: Path) -> dict[str, Any]:
    """All that a checkpoint holds but what the clock has put there."""
    state = torch.load(folder / "last.pt", weights_only=True)
    timed = ("clips_per_second", "data_wait", "evaluation_seconds", "seconds")
    history = [{k: v for k, v in record.items() if k not in timed} for record in state["history"]]
    return {name: state[name] for name in ("model", "optimizer", "within", "identity")} | {"history": history}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def terminate_when(monkeypatch: pytest.MonkeyPatch, place: Callable[[int], bool]) -> None:
    """SIGTERM to this process after every step for which `place` is true of the clips that the epoch has seen."""
    show = progress.EpochBar.show

    def showing(self: progress.EpochBar, seen: int, *numbers: float) -> None:
        show(self, seen, *numbers)
        if place(seen):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(progress.EpochBar, "show", showing)


class TestInterruptions:
    @pytest.mark.parametrize("seen", [4, 9])
    def test_sigterm_saves_and_the_rest_is_the_same(
        self, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: int
    ) -> None:
        train(config, tmp_path / "whole")
        with monkeypatch.context() as patched:
            terminate_when(patched, lambda clips: clips == seen)
            stops = 0
            for _ in range(6):  # every epoch anew
                try:
                    train(replace(config, {"data.workers": 2}), tmp_path / "parts")
                except StoppedError as error:
                    assert "start again to go on" in str(error)
                    stops += 1
                    continue
                break
        assert stops >= 2 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        train(config, tmp_path / "parts")
        assert same(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))

    def test_a_checkpoint_within_an_epoch_says_how_far_it_came(
        self, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        terminate_when(monkeypatch, lambda clips: clips == 4)
        with pytest.raises(StoppedError, match=r"epoch 1/2 after 6 clips"):  # the step after the signal
            train(replace(config, {"optim.batch": 2, "optim.micro_batch": 1}), tmp_path)
        within = state_of(tmp_path)["within"]
        assert within["seen"] == 6 and within["batches"] == 6 and not (tmp_path / "history.json").exists()

    @pytest.mark.slow
    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
    def test_a_process_that_is_ended_again_and_again(
        self, config: TrainConfig, tmp_path: Path, how: signal.Signals
    ) -> None:
        config = replace(config, {"checkpoint_minutes": 0, "optim.epochs": 8, "data.workers": 2})
        (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
        command = [sys.executable, "-m", "pasnet", "train", "--config", str(tmp_path / "config.json")]
        command += ["--tracking-uri", "off", "--out"]
        subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
        command += [str(tmp_path / "parts")]
        last, ends = tmp_path / "parts" / "last.pt", []
        for delay in (0.0, 0.01, 0.03, None):  # seconds after its first checkpoint; None: it may end
            before = last.stat().st_mtime_ns if last.exists() else 0
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
            )
            if delay is not None:
                while process.poll() is None and (last.stat().st_mtime_ns if last.exists() else 0) == before:
                    time.sleep(0.002)
                time.sleep(delay)
                os.killpg(process.pid, how)  # its loader workers, too
            _, said = process.communicate()
            ends.append(process.returncode)
            assert "Traceback" not in said.decode()
        assert ends == [-how if how == signal.SIGKILL else 128 + how] * 3 + [0]
        assert same(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))

    @pytest.mark.parametrize("held_out", [0.0, 0.4])
    def test_an_evaluation_that_is_killed_goes_on_after_its_last_clip(
        self, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_out: float
    ) -> None:
        """Killed at every second clip, of both lists: no step and no clip on disk is done twice, and all is equal."""
        config = replace(
            config, {"checkpoint_minutes": 0, "optim.batch": 1, "optim.micro_batch": 1, "data.held_out": held_out}
        )
        train(config, tmp_path / "whole")
        shown: list[tuple[str, int]] = []

        class KilledError(Exception):
            pass

        def killed(self: progress.ClipBar, seen: int, *_: Any) -> None:
            shown.append((type(self).__name__, seen))
            if sum(kind == "ClipBar" for kind, _ in shown[begun:]) == 2:  # this one is not on disk
                raise KilledError

        monkeypatch.setattr(progress.ClipBar, "show", killed)
        kills = 0
        while not (tmp_path / "parts" / "done.json").is_file() and kills < 40:
            begun = len(shown)
            try:
                train(config, tmp_path / "parts")
            except KilledError:
                kills += 1
        store = open_shards(Path(config.data.shards))
        lists = [len(rows_of(store, config.data, name)) for name in ("held_out", "test")]  # type: ignore[arg-type]
        assert config.optim.epochs * sum(lists) > kills >= config.optim.epochs
        steps = [seen for kind, seen in shown if kind == "EpochBar"]
        assert len(steps) == config.optim.epochs * len(rows_of(store, config.data, "train"))
        # a clip whose process was killed is done again, no other
        assert sum(kind == "ClipBar" for kind, _ in shown) == config.optim.epochs * sum(lists) + kills
        assert same(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))
        assert not list((tmp_path / "parts").glob("unfinished*"))

    @pytest.mark.parametrize(("minutes", "times"), [(10.0, 2), (0.0, 2 + 2 * (8 + 3))])
    def test_nothing_is_saved_before_it_is_time_to(
        self, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: float, times: int
    ) -> None:
        """Of 9 steps the last is saved with the evaluation: before the first of 3 batches, and before the others."""
        saved: list[Any] = []
        save = training.checkpoints.save
        monkeypatch.setattr(training.checkpoints, "save", lambda *a, **b: saved.append(b["within"]) or save(*a, **b))
        train(
            replace(config, {"checkpoint_minutes": minutes, "optim.batch": 1, "optim.micro_batch": 1}),
            tmp_path,
        )
        assert len(saved) == times and saved.count(None) == 2

    def test_an_evaluation_that_is_stopped_goes_on(
        self, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = replace(config, {"optim.epochs": 1, "optim.batch": 1, "optim.micro_batch": 1})
        train(config, tmp_path)
        files = ("predictions.parquet", "metrics.json", "per_class.csv", "confusion.png")
        arguments = (tmp_path / "last.pt", Path(config.data.shards))
        evaluate_checkpoint(*arguments, tmp_path / "whole")
        show, out = progress.ClipBar.show, tmp_path / "parts"
        with monkeypatch.context() as patched:
            patched.setattr(progress.ClipBar, "show", lambda *a: os.kill(os.getpid(), signal.SIGTERM) or show(*a))
            with pytest.raises(StoppedError, match="start again to go on"):
                evaluate_checkpoint(*arguments, out)
        assert [path.name for path in out.iterdir()] == ["unfinished.0.pt"]
        capsys.readouterr()
        evaluate_checkpoint(*arguments, out)
        assert "going on after 1 of " in capsys.readouterr().out
        assert sorted(path.name for path in out.iterdir()) == sorted(files)
        for name in files:
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    def test_what_another_network_gave_is_not_taken_up(
        self, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = replace(config, {"optim.epochs": 1, "optim.batch": 1, "optim.micro_batch": 1})
        show = progress.ClipBar.show
        for seed in (0, 1):
            train(replace(config, {"seed": seed}), tmp_path / str(seed))
        with monkeypatch.context() as patched:
            patched.setattr(progress.ClipBar, "show", lambda *a: os.kill(os.getpid(), signal.SIGTERM) or show(*a))
            with pytest.raises(StoppedError):
                evaluate_checkpoint(tmp_path / "0" / "last.pt", Path(config.data.shards), tmp_path / "out")
        capsys.readouterr()
        evaluate_checkpoint(tmp_path / "1" / "last.pt", Path(config.data.shards), tmp_path / "out")
        assert "going on" not in capsys.readouterr().out
        evaluate_checkpoint(tmp_path / "1" / "last.pt", Path(config.data.shards), tmp_path / "whole")
        name = "predictions.parquet"
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    def test_clips_of_a_run_whose_checkpoint_was_removed_count_for_nothing(
        self, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Its weights may have been others: a GPU's, say, or older code's."""
        config = replace(config, {"optim.epochs": 1, "optim.batch": 1, "optim.micro_batch": 1})
        show = progress.ClipBar.show

        def stopping(self: progress.ClipBar, *numbers: Any) -> None:
            if type(self) is progress.ClipBar:
                os.kill(os.getpid(), signal.SIGTERM)
            show(self, *numbers)

        with monkeypatch.context() as patched:
            patched.setattr(progress.ClipBar, "show", stopping)
            with pytest.raises(StoppedError):
                train(config, tmp_path)
        assert (tmp_path / "unfinished-test.0.pt").is_file()
        (tmp_path / "last.pt").unlink()
        capsys.readouterr()
        train(config, tmp_path)
        assert "clips of the evaluation" not in capsys.readouterr().out

    def test_clips_that_the_disk_has_damaged_are_evaluated_again(
        self, config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        train(replace(config, {"optim.epochs": 1}), tmp_path)
        arguments = (tmp_path / "last.pt", Path(config.data.shards))
        numbers = evaluate_checkpoint(*arguments, tmp_path / "whole")
        (tmp_path / "parts").mkdir()
        (tmp_path / "parts" / "unfinished.0.pt").write_bytes(b"")
        assert evaluate_checkpoint(*arguments, tmp_path / "parts") == numbers
        assert "unfinished.0.pt: cannot be read (EOFError); the evaluation starts anew" in capsys.readouterr().err

    def test_clips_of_before_an_interruption_join_those_of_a_gpu(self) -> None:
        def part(device: str) -> Part:
            numbers = [torch.zeros(2, dtype=torch.int64) for _ in range(3)]
            return Part(torch.zeros(2, 5, device=device), *numbers)

        with FakeTensorMode():  # tensors "on a GPU" on any machine; like a GPU's, they do not mix with others
            with pytest.raises(RuntimeError, match="same device"):
                torch.cat([part("cpu").probabilities, part("cuda").probabilities])
            joined = _joined([part("cpu"), part("cuda")])
            assert joined.probabilities.device.type == "cpu" and joined.probabilities.shape == (4, 5)

    def test_how_often_it_is_saved_is_no_part_of_its_identity(self, config: TrainConfig, tmp_path: Path) -> None:
        train(replace(config, {"optim.epochs": 1}), tmp_path)
        train(replace(config, {"optim.epochs": 1, "checkpoint_minutes": 3}), tmp_path)
        with pytest.raises(ConfigError, match="a run with other settings"):
            train(replace(config, {"optim.epochs": 1, "data.held_out": 0.3}), tmp_path)

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_other_precisions_go_on_too(
        self, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
    ) -> None:
        config = replace(config, {"precision": precision, "optim.epochs": 1})
        train(config, tmp_path / "whole")
        with monkeypatch.context() as patched:
            terminate_when(patched, lambda clips: clips == 4)
            with pytest.raises(StoppedError):
                train(config, tmp_path / "parts")
        train(config, tmp_path / "parts")
        assert same(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))
        scale = torch.load(tmp_path / "whole" / "last.pt", weights_only=True)["scaler"]
        assert bool(scale) == (precision == "fp16")


class TestFaults:
    def test_a_network_that_has_not_finished_is_no_start(
        self, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patched:
            terminate_when(patched, lambda clips: clips == 9)
            with pytest.raises(StoppedError):
                train(config, tmp_path / "parent")
        start = tmp_path / "parent" / "last.pt"
        child = replace(config, {"init.parent": str(start)})
        with pytest.raises(WeightsError, match=r"has trained 0 of 2 epochs; start that training again"):
            train(child, tmp_path / "child")
        with pytest.raises(WeightsError, match="has trained 0 of 2 epochs"):
            evaluate_checkpoint(start, Path(config.data.shards), tmp_path / "evaluation")
        train(config, tmp_path / "parent")
        assert train(child, tmp_path / "child")["last"]["epoch"] == 2
        start.unlink()
        with pytest.raises(WeightsError, match="no such checkpoint"):  # not "other settings; remove this one"
            train(child, tmp_path / "child")

    def test_two_trainings_in_one_folder(self, config: TrainConfig, tmp_path: Path) -> None:
        def second(_: object) -> None:
            with pytest.raises(TrainingError, match="another training is writing there"):
                train(replace(config, {"seed": 5}), tmp_path)

        assert train(replace(config, {"optim.epochs": 1}), tmp_path, second)["last"]["epoch"] == 1

    def test_a_record_that_was_not_written_is_made_up_for(self, config: TrainConfig, tmp_path: Path) -> None:
        def die(record: dict[str, Any]) -> None:
            (tmp_path / "history.json").unlink()
            raise KeyboardInterrupt

        one = replace(config, {"optim.epochs": 1})
        with pytest.raises(KeyboardInterrupt):
            train(one, tmp_path, die)
        told: list[dict[str, Any]] = []
        train(one, tmp_path, told.append)
        assert [record["epoch"] for record in told] == [1]
        assert [record["epoch"] for record in json.loads((tmp_path / "history.json").read_text())] == [1]

    def test_loss_scaling_that_cannot_help_is_a_fault(
        self, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make = training.build

        def broken(of: ModelConfig) -> Any:
            model = make(of)
            model.head.weight.register_hook(lambda gradient: gradient * float("nan"))
            return model

        monkeypatch.setattr(training, "build", broken)
        with pytest.raises(TrainingError, match="gradient is not finite"):
            train(replace(config, {"precision": "fp16", "optim.epochs": 30, "model.fusion.style": "A"}), tmp_path)

    def test_nothing_to_hold_out_says_so(self, config: TrainConfig, tmp_path: Path) -> None:
        store = open_shards(Path(config.data.shards))
        with pytest.raises(ConfigError, match=r"3 test videos for 4 processes; use fewer"):
            Loader(store, config.data, subset="test", batch=1, seed=0, rank=0, world=4)
        with pytest.raises(ConfigError, match=r"0 held_out videos for 1 processes; change data\.held_out"):
            Loader(store, config.data, subset="held_out", batch=1, seed=0)

    def test_what_was_at_hand_is_on_record(self, config: TrainConfig, tmp_path: Path) -> None:
        broken = replace(config, {"optim.lr": 1e30, "optim.epochs": 1, "optim.clip_norm": 1e30})
        with pytest.raises(TrainingError, match=r"not finite in epoch 1/1.*failure.json has them all"):
            train(broken, tmp_path)
        record = json.loads((tmp_path / "failure.json").read_text())
        store = open_shards(Path(config.data.shards))
        chosen = {store.keys[row] for row in rows_of(store, config.data, "train")}
        assert 1 <= len(record["clips"]) <= 5 and set(record["clips"]) <= chosen
        assert record["lr"] == 1e30


def torchrun(processes: int, arguments: list[str]) -> list[str]:
    """The command of `pasnet` under torchrun on loopback."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--rdzv-id", str(os.getpid())]
    return [*command, "-m", "pasnet", *arguments]


def launch(processes: int, arguments: list[str]) -> str:
    """Runs it to its end."""
    done = subprocess.run(torchrun(processes, arguments), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_script(processes: int, command: list[str], *, fails: bool = False) -> str:
    """A Python file, with arguments, in several processes: what it says, or, when it is to fail, what torchrun says."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", *command]
    env = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=240, env=env)
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stderr if fails else done.stdout


class TestProcesses:
    @pytest.mark.slow
    @pytest.mark.parametrize("micro", [1, 2])
    def test_two_are_one_training(self, config: TrainConfig, tmp_path: Path, ffmpeg: str, micro: int) -> None:
        # batch norm sees a process's own clips, and dropout is drawn for each: without them nothing may differ
        videos = generate(tmp_path / "v", SynthConfig(num_classes=3, groups=8, frames=(6, 8), seed=2), ffmpeg=ffmpeg)
        build(scan(*find_dataset(videos)), tmp_path / "shards", num_shards=2)
        changes = {"optim.bn_mode": "frozen", "model.dropout": 0, "optim.micro_batch": micro, "data.held_out": 0.1}
        changes |= {"data.shards": str(tmp_path / "shards"), "optim.schedule": "plateau_on_held_out"}
        config = replace(config, {**changes, "optim.clip_norm": 0.5})
        store = open_shards(tmp_path / "shards")
        loaders = [
            Loader(store, config.data, subset="train", batch=micro, seed=0, rank=0, world=world, step=4)
            for world in (1, 2)
        ]
        assert any(total % 2 for total in loaders[1].totals())  # shared unequally
        assert len({tuple(map(sum, loader.steps())) for loader in loaders}) == 1
        (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
        train(config, tmp_path / "one")
        said = launch(2, ["train", "--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "two")])
        assert said.count("epoch   1/2") == 1  # one of them speaks
        one, two = state_of(tmp_path / "one"), state_of(tmp_path / "two")
        moved = max(float(value.abs().max()) for value in one["optimizer"]["state"][0].values())
        assert moved > 0
        for key, value in one["model"].items():
            torch.testing.assert_close(two["model"][key], value, rtol=1e-4, atol=1e-6)
        for a, b in zip(one["history"], two["history"], strict=True):
            assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
            names = ("train_top1", "held_out_top1", "test_top1", "lr", "epoch")
            assert [a[name] for name in names] == pytest.approx([b[name] for name in names])
        checkpoint = ["--checkpoint", str(tmp_path / "two" / "last.pt"), "--shards", config.data.shards]
        launch(2, ["evaluate", *checkpoint, "--out", str(tmp_path / "evaluation")])
        alone = evaluate_checkpoint(tmp_path / "two" / "last.pt", Path(config.data.shards), tmp_path / "alone")
        assert json.loads((tmp_path / "evaluation" / "metrics.json").read_text()) == pytest.approx(alone)

    @pytest.mark.slow
    def test_two_that_are_stopped_go_on_bit_for_bit(self, config: TrainConfig, tmp_path: Path) -> None:
        long = replace(config, {"optim.epochs": 12, "model.fusion.style": "A", "optim.micro_batch": 1})
        (tmp_path / "config.json").write_text(json.dumps(to_dict(long)))

        def arguments(out: str) -> list[str]:
            return ["train", "--config", str(tmp_path / "config.json"), "--out", str(tmp_path / out)]

        pipe = subprocess.PIPE
        with subprocess.Popen(
            torchrun(2, arguments("stopped")), stdout=pipe, stderr=pipe, text=True, start_new_session=True
        ) as process:
            assert process.stdout is not None
            try:
                while line := process.stdout.readline():
                    if line.startswith("epoch   2/12"):
                        process.terminate()  # torchrun passes it on
                        break
                _, errors = process.communicate(timeout=120)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode != 0 and "start again to go on" in errors, errors[-3000:]
        assert 2 <= len(state_of(tmp_path / "stopped")["history"]) < 12
        launch(2, arguments("stopped"))
        launch(2, arguments("through"))
        assert same(state_of(tmp_path / "stopped"), state_of(tmp_path / "through"))

    @pytest.mark.slow
    def test_an_evaluation_of_two_goes_on_after_what_both_have(
        self, config: TrainConfig, tmp_path: Path, ffmpeg: str
    ) -> None:
        """Both are killed when the first one alone has kept its second batch."""
        videos = generate(tmp_path / "v", SynthConfig(num_classes=3, groups=8, frames=(6, 8), seed=2), ffmpeg=ffmpeg)
        build(scan(*find_dataset(videos)), tmp_path / "shards", num_shards=2)
        config = replace(config, {"optim.epochs": 1, "optim.batch": 1, "optim.micro_batch": 1, "checkpoint_minutes": 0})
        config = replace(config, {"data.shards": str(tmp_path / "shards")})
        train(config, tmp_path)
        (tmp_path / "run.py").write_text(
            "import os, pathlib, sys\nimport pasnet.evaluate as evaluation\n"
            "from pasnet.train import evaluate_checkpoint\n"
            "last, shards, out, kill = sys.argv[1:]\n"
            "write = evaluation.Unfinished._write\n"
            "def writing(self, parts):\n"
            "    second = kill == 'kill' and len(parts) == 2\n"
            "    if not second or self._team.main:\n"
            "        write(self, parts)\n"
            "    if second:\n"
            "        self._team.gather(0)\n"
            "        os._exit(9)\n"
            "evaluation.Unfinished._write = writing\n"
            "evaluate_checkpoint(pathlib.Path(last), pathlib.Path(shards), pathlib.Path(out))\n"
        )
        command = [str(tmp_path / "run.py"), str(tmp_path / "last.pt"), config.data.shards]
        assert "exitcode  : 9" in run_script(2, [*command, str(tmp_path / "parts"), "kill"], fails=True)
        kept = [torch.load(tmp_path / "parts" / f"unfinished.{rank}.pt", weights_only=True) for rank in (0, 1)]
        assert [len(each["parts"]) for each in kept] == [2, 1]
        total = len(open_shards(Path(config.data.shards)).select(1, "test"))
        said = run_script(2, [*command, str(tmp_path / "parts"), ""])
        assert f"going on after 2 of {total} clips of the evaluation" in said
        run_script(2, [*command, str(tmp_path / "whole"), ""])
        name = "predictions.parquet"
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    @pytest.mark.slow
    def test_statistics_are_the_main_ones(self, tmp_path: Path) -> None:
        (tmp_path / "look.py").write_text(
            "import torch\nfrom pasnet.distributed import processes\n"
            "with processes() as team:\n"
            "    norm = torch.nn.BatchNorm1d(3)\n"
            "    norm.running_mean.fill_(team.rank + 1)\n"
            "    team.share_buffers(norm)\n"
            "    team.say(str(team.gather(norm.running_mean.tolist())))\n"
        )
        assert run_script(2, [str(tmp_path / "look.py")]).splitlines() == [str([[1.0] * 3] * 2)]

    @pytest.mark.slow
    def test_two_machines_are_two_processes(self, config: TrainConfig, tmp_path: Path) -> None:
        """Two agents of torchrun, a process each, that meet at an address: what a training over nodes is."""
        (tmp_path / "config.json").write_text(json.dumps(to_dict(replace(config, {"optim.epochs": 1}))))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "nodes"]
        command += ["-m", "pasnet", "train", "--config", str(tmp_path / "config.json"), "--tracking-uri", "off"]
        command += ["--out", str(tmp_path / "nodes")]
        agents = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "ab"]
        try:
            said = [agent.communicate(timeout=240) for agent in agents]
        finally:
            for agent in agents:
                agent.kill()
        assert [agent.returncode for agent in agents] == [0, 0], said
        assert sum(out.count("epoch   1/1") for out, _ in said) == 1
        launch(2, ["train", "--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "two")])
        assert same(state_of(tmp_path / "nodes"), state_of(tmp_path / "two"))

    @pytest.mark.slow
    def test_two_with_all_options(self, config: TrainConfig, tmp_path: Path) -> None:
        """bf16, checkpoints of the pose network, accumulation and torch.compile at once, under torchrun."""
        changes = {"precision": "bf16", "optim.checkpoint_pose": True, "optim.micro_batch": 1, "optim.epochs": 1}
        options = replace(config, {**changes, "model.fusion.style": "Conv(A,I,F)"})
        eager = "import torch\nreal = torch.compile\ntorch.compile = lambda of, **_: real(of, backend='eager')\n"
        (tmp_path / "run.py").write_text(
            f"{eager}import json, pathlib, sys\nfrom pasnet.config import TrainConfig, from_dict\n"
            "from pasnet.train import train\n"
            "config = from_dict(TrainConfig, json.loads(pathlib.Path(sys.argv[1]).read_text()))\n"
            "train(config, pathlib.Path(sys.argv[2]))\n"
        )
        for name, compiled in (("plain", False), ("compiled", True)):
            (tmp_path / "config.json").write_text(json.dumps(to_dict(replace(options, {"compile": compiled}))))
            run_script(2, [str(tmp_path / "run.py"), str(tmp_path / "config.json"), str(tmp_path / name)])
        plain, traced = (state_of(tmp_path / name)["model"] for name in ("plain", "compiled"))
        for key, value in plain.items():
            torch.testing.assert_close(traced[key].float(), value.float(), rtol=2e-2, atol=2e-2)
        history = json.loads((tmp_path / "compiled" / "history.json").read_text())
        assert history[0]["processes"] == 2 and np.isfinite(history[0]["train_loss"])

    @pytest.mark.slow
    def test_a_nan_in_one_of_them_stops_all_and_is_on_record(self, config: TrainConfig, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
        (tmp_path / "run.py").write_text(
            "import json, os, pathlib, sys\nimport pasnet.train as training\n"
            "from pasnet.config import TrainConfig, from_dict\n"
            "sys.setswitchinterval(10)\n"  # a thread that waits for the interpreter gets it late: none may be left
            "loss = training.nn.functional.cross_entropy\n"
            "if os.environ['RANK'] == '1':\n"
            "    training.nn.functional.cross_entropy = lambda *a, **k: loss(*a, **k) * float('nan')\n"
            "config = from_dict(TrainConfig, json.loads(pathlib.Path(sys.argv[1]).read_text()))\n"
            "try:\n    training.train(config, pathlib.Path(sys.argv[2]))\n"
            "except training.TrainingError as error:\n"
            "    sys.stdout.write(os.environ['RANK'] + f' {error}\\n')\n"  # in one piece, beside the other's
        )
        said = run_script(2, [str(tmp_path / "run.py"), str(tmp_path / "config.json"), str(tmp_path / "out")])
        assert sorted(line.split()[0] for line in said.splitlines() if "is not finite in epoch 1/2" in line) == [
            "0",
            "1",
        ]
        bad = json.loads((tmp_path / "out" / "failure.json").read_text())["clips"]
        store = open_shards(Path(config.data.shards))
        loader = Loader(store, config.data, subset="train", batch=2, seed=0, rank=1, world=2, step=4)
        assert bad == [store.keys[row] for row in next(iter(loader.epoch(0))).rows.tolist()]

    def test_a_process_without_a_gpu_of_its_own_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=r"process 2 of this machine finds 1 GPUs.*--nproc-per-node"), processes():
            pass

    def test_buffers_are_shared_before_an_evaluation(
        self, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        order: list[str] = []
        share, look = Processes.share_buffers, training.predict
        monkeypatch.setattr(Processes, "share_buffers", lambda *a: order.append("share") or share(*a))
        monkeypatch.setattr(training, "predict", lambda *a: order.append("predict") or look(*a))
        train(replace(config, {"optim.epochs": 2, "model.fusion.style": "A"}), tmp_path)
        assert order == ["share", "predict"] * 2

    def test_an_epoch_goes_on_with_as_many(
        self, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        terminate_when(monkeypatch, lambda clips: clips == 4)
        with pytest.raises(StoppedError):
            train(config, tmp_path)
        state = torch.load(tmp_path / "last.pt", weights_only=True)
        state["within"]["world"] = 2
        torch.save(state, tmp_path / "last.pt")
        with pytest.raises(ConfigError, match=r"within an epoch of 2 processes; go on with as many, not 1"):
            train(config, tmp_path)

    @pytest.mark.parametrize("world", [1, 2, 3])
    @pytest.mark.parametrize("subset", ["train", "test"])
    def test_every_clip_once_over_all(self, config: TrainConfig, world: int, subset: Any) -> None:
        store, found = open_shards(Path(config.data.shards)), []
        loaders = [
            Loader(store, config.data, subset=subset, batch=2, seed=1, rank=rank, world=world) for rank in range(world)
        ]
        for loader in loaders:
            found += [row for batch in loader.epoch(3) for row in batch.rows.tolist()]
        assert sorted(found) == sorted(loaders[0].rows) and len(set(map(len, loaders))) == 1
        assert sum(loaders[0].totals()) == len(found)

    def test_batches_that_cannot_be_shared_are_refused(self) -> None:
        optim = OptimConfig(batch=64, micro_batch=16)
        assert [micro_batch(optim, world) for world in (1, 2, 4, 8, 64)] == [16, 16, 16, 8, 1]
        with pytest.raises(ConfigError, match="cannot be shared by 3 processes"):
            micro_batch(optim, 3)
        with pytest.raises(ConfigError, match="is 12 clips each, no multiple of micro_batch 8"):
            micro_batch(OptimConfig(batch=24, micro_batch=8), 2)


class TestHeldOut:
    def test_no_group_is_on_both_sides(self) -> None:
        rng = np.random.default_rng(0)
        rows = np.arange(5, 605)
        labels, films = rng.integers(7, size=700), rng.integers(60, size=700)
        groups = [f"film {film}" for film in films]  # each spans several classes
        held = held_out(rows, labels, groups, 0.2)
        inside, outside = ({groups[row] for row in rows[of]} for of in (held, ~held))
        assert not inside & outside
        for label in range(7):
            of = labels[rows] == label
            assert 0.2 <= held[of].mean() < 0.5
        assert (held_out(rows[::-1], labels, groups, 0.2)[::-1] == held).all()
        assert not held_out(rows, labels, groups, 0.0).any()

    def test_a_class_keeps_something_to_train_on(self) -> None:
        labels, groups = np.array([0, 0, 1, 1, 1]), ["a", "a", "b", "c", ""]
        held = held_out(np.arange(5), labels, groups, 0.5)
        assert not held[:2].any() and 1 <= held[2:].sum() <= 2

    def test_the_plateau_looks_where_it_is_told(self, config: TrainConfig, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"needs data\.held_out"):
            replace(config, {"optim.schedule": "plateau_on_held_out"})
        optim = OptimConfig(schedule="plateau_on_held_out", patience=2)
        history = [{"held_out_top1": h, "test_top1": t} for h, t in ((50, 1), (40, 2), (50, 3), (60, 4))]
        assert [lr_scale_at(epoch, optim, history[:epoch]) for epoch in range(5)] == [1, 1, 1, 0.1, 0.1]
        on = replace(config, {"data.held_out": 0.3, "optim.schedule": "plateau_on_held_out", "optim.epochs": 1})
        result = train(on, tmp_path)
        assert result["best_on_held_out"]["epoch"] == 1 and "held_out_top1" in result["last"]
        store = open_shards(Path(config.data.shards))
        trained, kept = (set(rows_of(store, on.data, subset)) for subset in ("train", "held_out"))
        assert kept and not kept & trained and kept | trained == set(rows_of(store, config.data, "train"))


class TestPretrained:
    def test_another_datasets_network_lends_all_but_the_head(
        self, config: TrainConfig, tmp_path: Path, ffmpeg: str
    ) -> None:
        other = generate(tmp_path / "d0", SynthConfig(num_classes=2, groups=3, frames=(6, 8), seed=9), ffmpeg=ffmpeg)
        build(scan(*find_dataset(other)), tmp_path / "d0-shards", num_shards=2)
        before = replace(
            config, {"data.shards": str(tmp_path / "d0-shards"), "model.num_classes": 2, "optim.epochs": 1}
        )
        train(before, tmp_path / "before")
        start = str(tmp_path / "before" / "last.pt")
        still = {"optim.epochs": 1, "optim.lr": 1e-12, "optim.bn_mode": "frozen"}
        train(replace(config, {**still, "init.pretrained": start}), tmp_path / "recent")
        one, two = (state_of(tmp_path / name)["model"] for name in ("before", "recent"))
        assert one["head.weight"].shape != two["head.weight"].shape
        rest = [key for key in one if not key.startswith("head.")]
        assert any(key.startswith("pose.") for key in rest)
        assert all(torch.allclose(one[key].float(), two[key].float(), atol=1e-6) for key in rest)
        with pytest.raises(WeightsError, match="was trained on other shards of synthetic"):
            train(replace(config, {"init.parent": start}), tmp_path / "wrong")
        with pytest.raises(WeightsError, match=r"on this very dataset; give it as init\.parent"):
            train(replace(before, {"init.pretrained": start}), tmp_path / "same")
