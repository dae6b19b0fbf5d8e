"""A network over a test list: its predictions. What is computed from them is in predictions.py.

Test protocol of the paper and of ECO: one clip per video, the centre frame of each segment, centre crop, no flip.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pasnet.config import digest
from pasnet.data import Loader
from pasnet.distributed import Processes, StoppedError
from pasnet.models.fast import for_evaluation
from pasnet.predictions import (
    VERSION,
    EvaluationError,
    Predictions,
    PredictionsError,
    Source,
    ensemble,
    metrics,
    replacing,
    write_evaluation,
)
from pasnet.progress import ClipBar

__all__ = [
    "EvaluationError",
    "Predictions",
    "PredictionsError",
    "Source",
    "Unfinished",
    "autocast",
    "ensemble",
    "metrics",
    "predict",
    "set_precision",
    "write_evaluation",
]


def set_precision(precision: str, *, training: bool = False) -> None:
    """Makes "fp32" mean fp32 on a GPU: torch's own default lets convolutions round their inputs to TF32.

    For `training` in 16 bits cuDNN tries its kernels on every shape of batch, which takes seconds: its own choice for
    gradients can be much slower.
    """
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = training and precision in ("bf16", "fp16")


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The autocast context of a precision: bf16's or fp16's, or none."""
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, dtype=kinds[precision]) if precision in kinds else contextlib.nullcontext()


class Part(NamedTuple):
    """What one batch gave: `probabilities` float32 (B, classes), on the network's device or the CPU; `labels` and
    `rows` int64 (B,); `frames` int64 (B, K)."""

    probabilities: Tensor
    labels: Tensor
    rows: Tensor
    frames: Tensor


class Unfinished:
    """The batches of an evaluation under way, on disk, so that one that is killed goes on after them.

    Each process keeps its own beside `path`, all after the same batch: every `minutes`, the first time that long after
    `since` (of time.monotonic(), default now), and when one is asked to stop, which ends the evaluation. `identity`
    must name the weights and the clips; what is of another one, or of another number of processes, is not taken up.
    `first` is called before anything is written: the weights must be safe before what they gave is.
    """

    def __init__(
        self,
        path: Path,
        identity: str,
        *,
        team: Processes,
        stop: threading.Event,
        minutes: float,
        since: float | None = None,
        first: Callable[[], None] = lambda: None,
    ) -> None:
        self._path, self._team, self._stop, self._first = path, team, stop, first
        self._seconds, self._kept = 60 * minutes, time.monotonic() if since is None else since
        self._mine = path.with_name(f"{path.name}.{team.rank}.pt")
        self._identity = digest([identity, team.world, team.device.type, VERSION])

    def found(self) -> list[Part]:
        """The batches that all processes have; none is the usual case."""
        parts = self._read()
        return parts[: min(self._team.gather(len(parts)))]

    def between(self, parts: Sequence[Part]) -> None:
        """Between two batches: keeps those so far where it is time to. Raises StoppedError, in every process, when one
        was asked to stop."""
        due = time.monotonic() - self._kept >= self._seconds
        stops, dues = zip(*self._team.gather((self._stop.is_set(), due)), strict=True)
        if any(stops) or any(dues):
            self._first()
            self._team.gather(None)  # the main process may be the only one that writes there
            self._write(parts)
            self._team.gather(None)
            self._kept = time.monotonic()
        if any(stops):
            raise StoppedError("stopped in an evaluation, whose clips so far are kept; start again to go on")

    def remove(self) -> None:
        """Once what came of it is safe. By the main process, for all."""
        if self._team.main:
            for path in self._path.parent.glob(f"{self._path.name}.*.pt"):
                path.unlink(missing_ok=True)

    def _write(self, parts: Sequence[Part]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        columns = [tuple(column.cpu() for column in part) for part in parts]
        with replacing(self._mine) as scratch:
            torch.save({"identity": self._identity, "parts": columns}, scratch)

    def _read(self) -> list[Part]:
        if not self._mine.is_file():
            return []
        try:
            found = torch.load(self._mine, weights_only=True)
            return [Part(*columns) for columns in found["parts"]] if found["identity"] == self._identity else []
        except Exception as error:  # as many kinds as ways to damage a file; it costs the clips that it held
            print(f"{self._mine}: cannot be read ({type(error).__name__}); the evaluation starts anew", file=sys.stderr)
            return []


def _joined(parts: Sequence[Part]) -> Part:
    """All of them as one, on the CPU; parts of before an interruption are there already."""
    return Part(*(torch.cat([column.cpu() for column in columns]) for columns in zip(*parts, strict=True)))


@torch.inference_mode()
def predict(
    model: nn.Module,
    loader: Loader,
    keys: Sequence[str],
    team: Processes,
    precision: str,
    unfinished: Unfinished | None = None,
) -> Predictions:
    """Class probabilities for every clip of a test loader, in index order, in every process of the team; leaves the
    model in eval mode. Goes on after the batches that `unfinished` holds.

    Raises EvaluationError unless every video of the list was seen exactly once, over all processes, and gave finite
    numbers; and what `unfinished` raises.
    """
    model.eval()
    fast = for_evaluation(model, precision, len(loader.rows))
    parts, totals = unfinished.found() if unfinished else [], loader.totals()
    if parts:
        team.say(f"going on after {sum(totals[: len(parts)])} of {sum(totals)} clips of the evaluation")
    with ClipBar("evaluation", sum(totals), sum(totals[: len(parts)]), show=team.main) as bar:
        for batch in loader.epoch(0, start=len(parts)):
            if unfinished:
                unfinished.between(parts)
            clips = batch.clips.to(team.device, non_blocking=True)
            if fast is not None:
                logits = fast(clips)
            else:
                with autocast(team.device, precision):
                    logits = model(clips)
            # copies: what a loader's process hands over keeps a file open for each tensor
            columns = (column.clone() for column in (batch.labels, batch.rows, batch.frames))
            parts.append(Part(logits.float().softmax(1), *columns))
            bar.show(sum(totals[: len(parts)]))
    everyone = team.gather(tuple(column.numpy() for column in _joined(parts)))
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
