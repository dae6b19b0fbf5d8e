"""A real, tiny dataset for the whole suite: synthetic .avi files, decoded and packed through the product's own door."""

from __future__ import annotations

import os
import tempfile

# One thread: the networks here are tiny, and threads that wait for a busy core are slower than none. Before torch.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["DO_NOT_TRACK"] = "true"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bit equality is promised on a CPU
os.environ["PASNET_LOCKS"] = tempfile.mkdtemp(prefix="pasnet-tests-")  # a real training may be running here

from pathlib import Path

import pytest

from pasnet.synth import SynthConfig, generate
from shards import build, ffmpeg_exe, find_dataset, scan

VIDEOS = SynthConfig(num_classes=3, groups=4, frames=(8, 12), seed=5)  # x 1 clip a group
SHARDS = 8


@pytest.fixture(scope="session")
def ffmpeg() -> str:
    return ffmpeg_exe()


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory, ffmpeg: str) -> Path:
    """VIDEOS, in UCF-101's layout."""
    return generate(tmp_path_factory.mktemp("synthetic"), VIDEOS, ffmpeg=ffmpeg)


@pytest.fixture(scope="session")
def shard_folder(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    build(scan(*find_dataset(videos)), out, num_shards=SHARDS)
    return out


@pytest.fixture(scope="session")
def shared() -> Path:
    """../shared beside the checkout: real clips and golden outputs. Tests that ask for it skip where it is not."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "data" / "frames.csv").is_file():
        pytest.skip(f"no real clips: {folder} is not there")
    return folder
