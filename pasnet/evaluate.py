"""Predictions and what is computed from them: top-1, top-5, mean-class accuracy, interval, ensembles over K.

Test protocol of the paper and of ECO: one clip per video, the centre frame of each segment, centre crop, no flip.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from pasnet.data import Loader


class EvaluationError(RuntimeError):
    """An evaluation whose numbers must not be believed."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """One row per test video, in index order. `probabilities` float32 (N, classes); `frames` int64 (N, K), which
    frames of the video were looked at."""

    keys: tuple[str, ...]
    labels: np.ndarray
    probabilities: np.ndarray
    frames: np.ndarray

    def save(self, path: Path) -> None:
        """Parquet with the columns key, label, probabilities, frames."""
        columns = {
            "key": pa.array(self.keys),
            "label": pa.array(self.labels.astype(np.int32)),
            "probabilities": pa.array(list(self.probabilities.astype(np.float32))),
            "frames": pa.array(list(self.frames.astype(np.int32))),
        }
        pq.write_table(pa.table(columns), path, compression="zstd")

    @staticmethod
    def load(path: Path) -> Predictions:
        """What `save` wrote."""
        table = pq.read_table(path)
        return Predictions(
            keys=tuple(table["key"].to_pylist()),
            labels=table["label"].to_numpy().astype(np.int64),
            probabilities=np.array(table["probabilities"].to_pylist(), np.float32),
            frames=np.array(table["frames"].to_pylist(), np.int64),
        )


def set_precision(precision: str) -> None:
    """Makes "fp32" mean fp32 on a GPU: torch's own default lets convolutions round their inputs to TF32."""
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The autocast context of a precision: bf16's, or none."""
    if precision != "bf16":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@torch.inference_mode()
def predict(model: nn.Module, loader: Loader, keys: Sequence[str], device: torch.device, precision: str) -> Predictions:
    """Class probabilities for every clip of a test loader; leaves the model in eval mode.

    Raises EvaluationError unless every video of the list was seen exactly once and gave finite numbers.
    """
    model.eval()
    parts = []
    for batch in loader.epoch(0):
        with autocast(device, precision):
            logits = model(batch.clips.to(device, non_blocking=True))
        parts.append(
            (logits.float().softmax(1).cpu().numpy(), batch.labels.numpy(), batch.rows.numpy(), batch.frames.numpy())
        )
    probabilities, labels, rows, frames = (np.concatenate(column) for column in zip(*parts, strict=True))
    if sorted(rows) != sorted(loader.rows):
        raise EvaluationError(f"{len(loader.rows)} test videos, but {len(set(rows))} distinct ones were evaluated")
    if not np.isfinite(probabilities).all():
        bad = [keys[row] for row in rows[~np.isfinite(probabilities).all(1)][:3]]
        raise EvaluationError(f"the network gives NaN or infinity, for example for {', '.join(bad)}")
    return Predictions(keys=tuple(keys[row] for row in rows), labels=labels, probabilities=probabilities, frames=frames)


def metrics(predictions: Predictions, *, resamples: int = 2000) -> dict[str, float]:
    """Percent: top1, top5, mean_class (mean of the classes' own top-1), and top1_low/top1_high, a 95 % bootstrap
    interval over test videos (it says nothing of the spread between trainings). Also `videos`, how many."""
    order = np.argsort(-predictions.probabilities, axis=1, kind="stable")
    hit = order == predictions.labels[:, None]
    top1, top5 = hit[:, 0], hit[:, :5].any(1)
    per_class = [top1[predictions.labels == label].mean() for label in np.unique(predictions.labels)]
    n = len(top1)
    draws = np.random.default_rng(0).integers(n, size=(resamples, n))
    low, high = np.percentile(top1[draws].mean(1), [2.5, 97.5])
    percent = {
        "top1": top1.mean(),
        "top5": top5.mean(),
        "mean_class": np.mean(per_class),
        "top1_low": low,
        "top1_high": high,
    }
    return {**{name: round(100 * float(value), 4) for name, value in percent.items()}, "videos": n}


def ensemble(members: Sequence[Predictions], mean: Literal["softmax", "logits"] = "softmax") -> Predictions:
    """Averages networks that saw the same videos: their probabilities, or their logits (up to a constant, the log).

    Raises EvaluationError when the members do not cover the same videos.
    """
    by_key = [dict(zip(member.keys, range(len(member.keys)), strict=True)) for member in members]
    first = members[0]
    if any(index.keys() != by_key[0].keys() for index in by_key):
        raise EvaluationError("the networks of an ensemble were evaluated on different videos")
    aligned = np.stack(
        [m.probabilities[[index[key] for key in first.keys]] for m, index in zip(members, by_key, strict=True)]
    )
    if mean == "logits":
        logits = np.log(np.maximum(aligned, 1e-12)).mean(0)
        powers = np.exp(logits - logits.max(1, keepdims=True))
        fused = powers / powers.sum(1, keepdims=True)
    else:
        fused = aligned.mean(0)
    return Predictions(
        keys=first.keys, labels=first.labels, probabilities=fused.astype(np.float32), frames=first.frames
    )
