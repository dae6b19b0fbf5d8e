"""What a training step costs beside the network: loader, transfer, clipping, optimiser, bookkeeping.

The product's own `train`, workers and all, against the network's forward and backward pass alone on clips that are in
memory already. Two shares are told. Within the training: of the time of its steps, what is outside forward and backward
pass (on a CPU, where a clock can tell). Against the bare network: one minus the ratio of an epoch to the bare one after
it, the two alternating within one training; there the workers count as well, where they want the same cores. The first
two epochs are reported apart: workers are forked before each (the test list's after the first), and until the training
process has written to all of its memory once more, every page that it shares with a fork costs it a copy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks.harness import bound
from pasnet.config import DataConfig, FusionConfig, ModelConfig, OptimConfig, TrainConfig
from pasnet.data import Loader, open_shards
from pasnet.models.pasnet import PASNet, build
from pasnet.train import set_bn_mode, train
from shards import Dataset
from shards import build as build_shards

CASES = {  # the smallest networks that the study uses are the hardest case: the loop's share is largest there
    "ECO-Lite, width 1/4": ("A", 0.25),
    "ECO-Lite, width 1": ("A", 1.0),
    "PAS-Net, width 1/4": ("A+pool(I)+pool(F)", 0.25),
}
K, BATCH, MICRO, WORKERS = 8, 8, 4, 2
LOOP = "training, with and without all that is not the network"
SHARES = {
    "share_outside_forward_and_backward": "of a step, outside forward and backward pass",
    "share_beside_the_network": "slower than the network alone, by",
}
STARTING = 2  # epochs in which workers start


def bare(config: TrainConfig, clips: list[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> float:
    """Clips per second of forward and backward passes with nothing else in between."""
    torch.manual_seed(config.seed)
    model = build(config.model).to(device)
    set_bn_mode(model, config.optim)
    model.train()
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
    outside: list[float] = []
    spent = 0.0

    def then_bare(record: dict[str, Any]) -> None:
        nonlocal spent
        steps = sum(len(labels) for _, labels in clips) / record["clips_per_second"]
        outside.append(1 - spent / steps)
        epochs.append(record)
        alone.append(bare(config, clips, device))
        spent = 0.0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            nonlocal spent
            started = time.perf_counter()
            found = function(*given, **named)
            if torch.is_grad_enabled():  # not of an evaluation
                spent += time.perf_counter() - started
            return found

        return run

    bare(config, clips, device)  # warms up
    forward = mock.patch.object(PASNet, "forward", timed(PASNet.forward))
    with forward, mock.patch.object(torch.Tensor, "backward", timed(torch.Tensor.backward)):
        train(config, out, then_bare)
    within = None if device.type == "cuda" else round(statistics.median(outside[STARTING:]), 4)
    shares = [1 - of["clips_per_second"] / by for of, by in zip(epochs, alone, strict=True)]
    return {
        "clips_per_s": round(statistics.median(of["clips_per_second"] for of in epochs[STARTING:]), 3),
        "network_alone_clips_per_s": round(statistics.median(alone[STARTING:]), 3),
        "share_outside_forward_and_backward": within,
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
        "tables": {LOOP: table},
        "bounds": [
            bound(f"{row['peer']}: {what} < 5 %", row[name], _small)
            for row in table
            for name, what in SHARES.items()
            if row[name] is not None
        ],
    }


def _small(share: float) -> bool:
    return share < 0.05
