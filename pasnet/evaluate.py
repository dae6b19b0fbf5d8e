"""A network over a test list: its predictions. What is computed from them is in predictions.py.

Test protocol of the paper and of ECO: one clip per video, the centre frame of each segment, centre crop, no flip.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from pasnet.data import Loader
from pasnet.distributed import Processes
from pasnet.models.fast import for_evaluation
from pasnet.predictions import (
    EvaluationError,
    Predictions,
    PredictionsError,
    Source,
    ensemble,
    metrics,
    write_evaluation,
)
from pasnet.progress import ClipBar

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
    """The autocast context of a precision: bf16's or fp16's, or none."""
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, dtype=kinds[precision]) if precision in kinds else contextlib.nullcontext()


@torch.inference_mode()
def predict(
    model: nn.Module,
    loader: Loader,
    keys: Sequence[str],
    team: Processes,
    precision: str,
    interrupt: Callable[[], None] | None = None,
) -> Predictions:
    """Class probabilities for every clip of a test loader, in index order, in every process of the team; leaves the
    model in eval mode. `interrupt` is called between batches and may raise.

    Raises EvaluationError unless every video of the list was seen exactly once, over all processes, and gave finite
    numbers.
    """
    model.eval()
    fast = for_evaluation(model, precision, len(loader.rows))
    parts, totals = [], loader.totals()
    with ClipBar("evaluation", sum(totals), show=team.main) as bar:
        for number, batch in enumerate(loader.epoch(0)):
            if interrupt:
                interrupt()
            clips = batch.clips.to(team.device, non_blocking=True)
            if fast is not None:
                logits = fast(clips)
            else:
                with autocast(team.device, precision):
                    logits = model(clips)
            parts.append((logits.float().softmax(1), batch.labels.numpy(), batch.rows.numpy(), batch.frames.numpy()))
            bar.show(sum(totals[: number + 1]))
    mine = [(part[0].cpu().numpy(), *part[1:]) for part in parts]
    everyone = [part for parts in team.gather(mine) for part in parts]
    probabilities, labels, rows, frames = (np.concatenate(column) for column in zip(*everyone, strict=True))
    order = np.argsort(rows, kind="stable")
    probabilities, labels, rows, frames = (column[order] for column in (probabilities, labels, rows, frames))
    if not np.array_equal(rows, np.sort(loader.rows)):
        raise EvaluationError(
            f"{len(loader.rows)} videos on the list, but {len(rows)} clips of {len(set(rows))} videos were evaluated"
        )
    if not np.isfinite(probabilities).all():
        bad = [keys[row] for row in rows[~np.isfinite(probabilities).all(1)][:3]]
        raise EvaluationError(f"the network gives NaN or infinity, for example for {', '.join(bad)}")
    return Predictions(keys=tuple(keys[row] for row in rows), labels=labels, probabilities=probabilities, frames=frames)
