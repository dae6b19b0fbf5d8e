"""A network over a test list: its predictions. What is computed from them is in predictions.py.

Test protocol of the paper and of ECO: one clip per video, the centre frame of each segment, centre crop, no flip.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from pasnet.data import Loader
from pasnet.predictions import (
    EvaluationError,
    Predictions,
    PredictionsError,
    Source,
    ensemble,
    metrics,
    write_evaluation,
)

__all__ = [
    "EvaluationError",
    "Predictions",
    "PredictionsError",
    "Source",
    "autocast",
    "ensemble",
    "metrics",
    "predict",
    "set_precision",
    "write_evaluation",
]


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
