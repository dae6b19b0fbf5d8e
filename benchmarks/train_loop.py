"""What a training step costs beside the network: loader, transfer, clipping, optimiser, bookkeeping.

The product's own `train`, workers and all, against the network's forward and backward pass alone on clips that are in
memory already. The two alternate by epoch within one training; the share is one minus the ratio of an epoch to the bare
one after it. The first two epochs are reported apart: workers are forked before each (the test list's after the first),
and until the training process has written to all of its memory once more, every page that it shares with a fork costs
it a copy.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness import bound
from pasnet.config import DataConfig, FusionConfig, ModelConfig, OptimConfig, TrainConfig
from pasnet.data import Loader, open_shards
from pasnet.models.pasnet import build
from pasnet.train import set_train_mode, train
from shards import Dataset
from shards import build as build_shards

CASES = {  # the smallest networks that the study uses are the hardest case: the loop's share is largest there
    "ECO-Lite, width 1/4": ("A", 0.25),
    "ECO-Lite, width 1": ("A", 1.0),
    "PAS-Net, width 1/4": ("A+pool(I)+pool(F)", 0.25),
}
K, BATCH, MICRO, WORKERS = 8, 8, 4, 2
STARTING = 2  # epochs in which workers start


def bare(config: TrainConfig, clips: list[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> float:
    """Clips per second of forward and backward passes with nothing else in between."""
    torch.manual_seed(config.seed)
    model = build(config.model).to(device)
    set_train_mode(model, config.optim)
    _synchronise(device)
    started = time.perf_counter()
    for batch, labels in clips:
        nn.functional.cross_entropy(model(batch).float(), labels, reduction="sum").backward()
    _synchronise(device)
    return sum(len(labels) for _, labels in clips) / (time.perf_counter() - started)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(
    config: TrainConfig, clips: list[tuple[torch.Tensor, torch.Tensor]], device: torch.device, out: Path
) -> dict[str, Any]:
    """One training into `out`, a bare epoch after each of its epochs."""
    epochs: list[dict[str, Any]] = []
    alone: list[float] = []

    def then_bare(record: dict[str, Any]) -> None:
        epochs.append(record)
        alone.append(bare(config, clips, device))

    bare(config, clips, device)  # warms up
    train(config, out, then_bare)
    shares = [1 - of["clips_per_second"] / by for of, by in zip(epochs, alone, strict=True)]
    return {
        "clips_per_s": round(statistics.median(of["clips_per_second"] for of in epochs[STARTING:]), 3),
        "network_alone_clips_per_s": round(statistics.median(alone[STARTING:]), 3),
        "share_beside_the_network": round(statistics.median(shares[STARTING:]), 4),
        "share_in_the_first_two_epochs": round(statistics.mean(shares[:STARTING]), 4),
        "data_wait": round(statistics.median(of["data_wait"] for of in epochs[STARTING:]), 4),
        "shares_of_epochs": [round(share, 4) for share in shares],
    }


def run(dataset: Dataset, rounds: int, scratch: Path) -> dict[str, Any]:
    """Every case on the training list of split 1 of `dataset`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    build_shards(dataset, scratch / "shards")
    store = open_shards(scratch / "shards")
    table: list[dict[str, Any]] = []
    for name, (style, width) in CASES.items():
        config = TrainConfig(
            model=ModelConfig(
                num_classes=len(store.class_names), fusion=FusionConfig(style=style), width=width, dropout=0
            ),
            data=DataConfig(shards=str(scratch / "shards"), num_segments=K, workers=WORKERS),
            optim=OptimConfig(epochs=STARTING + rounds, batch=BATCH, micro_batch=MICRO, schedule="constant"),
        )
        loader = Loader(store, config.data, subset="train", batch=MICRO, seed=0, device=device)
        clips = [(batch.clips.clone(), batch.labels.to(device)) for batch in loader.epoch(0)]
        loader.close()
        table.append({"peer": name, **measure(config, clips, device, scratch / str(len(table)))})
    return {
        "what": f"K = {K}, 224 px, steps of {BATCH} clips in parts of {MICRO}, {WORKERS} loader workers, {device.type}",
        "videos": len(store),
        "training_clips": sum(len(labels) for _, labels in clips),
        "tables": {"training, with and without all that is not the network": table},
        "bounds": [
            bound(
                f"{row['peer']}: beside forward and backward < 5 % of a step", row["share_beside_the_network"], _small
            )
            for row in table
        ],
    }


def _small(share: float) -> bool:
    return share < 0.05
