"""Predictions and what is computed from them: top-1, top-5, mean-class accuracy, interval, classes, ensembles over K.

Where two classes have the same probability, the one with the lower number comes first, as with argmax. With five
classes or fewer top-5 is 100 %. A class without test videos has no accuracy and no part in the mean over classes.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pasnet.config import digest

Mean = Literal["softmax", "logits"]
COLUMNS = ("key", "label", "probabilities", "frames")


# Part of every file of predictions. Raise it when a change here or in evaluate.py changes what comes out of the same
# network, so that the study evaluates anew.
VERSION = 1


class EvaluationError(RuntimeError):
    """An evaluation whose numbers must not be believed."""


class PredictionsError(EvaluationError, ValueError):
    """Predictions that are not what they should be, or that do not belong together; another file mends it."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where predictions come from: the dataset's name, the split, the digest of the shard folder, the identity of the
    training (`run_digest` in pasnet/checkpoints.py), and how many videos of the dataset's lists the shards lack."""

    dataset: str
    split: int
    shards: str
    training: str
    lacking: int = 0


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """One row per test video, in index order. `labels` int64 (N,); `probabilities` float32 (N, classes); `frames` int64
    (N, K), which frames of the video were looked at. `class_names` (classes,) and `source` where they are known."""

    keys: tuple[str, ...]
    labels: np.ndarray
    probabilities: np.ndarray
    frames: np.ndarray
    class_names: tuple[str, ...] = ()
    source: Source | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """`class_names`, or "class 0" and so on where they are not known: files of before do not hold them."""
        return self.class_names or tuple(f"class {label}" for label in range(self.probabilities.shape[1]))

    def save(self, path: Path) -> None:
        """Parquet with the columns key, label, probabilities, frames; the rest as JSON in the schema's metadata under
        "pasnet". What is at `path` is replaced when the new file is whole."""
        columns = {
            "key": pa.array(self.keys, pa.string()),
            "label": pa.array(self.labels.astype(np.int32)),
            "probabilities": pa.array(list(self.probabilities.astype(np.float32)), pa.list_(pa.float32())),
            "frames": pa.array(list(self.frames.astype(np.int32)), pa.list_(pa.int32())),
        }
        source = None if self.source is None else dataclasses.asdict(self.source)
        about = json.dumps({"class_names": self.class_names, "source": source, "version": VERSION})
        table = pa.table(columns).replace_schema_metadata({"pasnet": about})
        with replacing(path) as unfinished:
            pq.write_table(table, unfinished, compression="zstd")

    @staticmethod
    def load(path: Path) -> Predictions:
        """What `save` wrote, also before it wrote class names and source.

        Raises PredictionsError for a file that is not there, is none of ours, or contradicts itself.
        """
        path = Path(path)
        if not path.is_file():
            raise PredictionsError(f"{path}: no such file; `pasnet evaluate` writes predictions.parquet")
        try:
            table = pq.read_table(path)
            missing = [name for name in COLUMNS if name not in table.column_names]
            if missing:
                raise ValueError(f"it has no column {', '.join(missing)}")
            about = json.loads((table.schema.metadata or {}).get(b"pasnet", b"{}"))
            source = about.get("source")
            loaded = Predictions(
                keys=tuple(table["key"].to_pylist()),
                labels=table["label"].to_numpy().astype(np.int64),
                probabilities=_matrix(table["probabilities"], np.float32),
                frames=_matrix(table["frames"], np.int64),
                class_names=tuple(about.get("class_names", ())),
                source=Source(**source) if source else None,
            )
        except (
            ValueError,
            TypeError,
            AttributeError,
            OSError,
        ) as error:  # pyarrow's errors are ValueErrors or OSErrors
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise PredictionsError(
                f"{path}: no predictions of ours ({reason}); evaluate the checkpoint again"
            ) from None
        _check(loaded, str(path))
        return loaded


def _matrix(column: pa.ChunkedArray, kind: type) -> np.ndarray:
    rows = column.to_pylist()
    if len({len(row) for row in rows}) > 1:
        raise ValueError("its rows have different lengths")
    return np.array(rows, kind).reshape(len(rows), -1 if rows else 0)


def _check(predictions: Predictions, name: str) -> None:
    """Raises PredictionsError, with `name` in front, for predictions that nothing may be computed from."""
    n, shape = len(predictions.keys), predictions.probabilities.shape
    problem = ""
    if n == 0:
        problem = "holds no test video"
    elif predictions.labels.shape != (n,) or len(shape) != 2 or shape[0] != n or len(predictions.frames) != n:
        problem = (
            f"{n} keys, labels {predictions.labels.shape}, probabilities {shape}, {len(predictions.frames)} frames"
        )
    elif len(set(predictions.keys)) < n:
        problem = f"{n - len(set(predictions.keys))} of its videos appear twice"
    elif predictions.class_names and len(predictions.class_names) != shape[1]:
        problem = f"{len(predictions.class_names)} class names for {shape[1]} classes"
    elif predictions.labels.min() < 0 or predictions.labels.max() >= shape[1]:
        problem = f"labels from {predictions.labels.min()} to {predictions.labels.max()} for {shape[1]} classes"
    elif not np.isfinite(predictions.probabilities).all():
        problem = "NaN or infinity among the probabilities"
    if problem:
        raise PredictionsError(f"{name}: {problem}; evaluate the checkpoint again")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write that becomes `path` when all went well: whoever finds `path` finds all of it."""
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield unfinished
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())  # a rename may reach the disk before the content does
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def metrics(predictions: Predictions, *, resamples: int = 2000) -> dict[str, float]:
    """Percent: top1, top5, mean_class (mean of the classes' own top-1), and top1_low/top1_high, a 95 % bootstrap
    interval over test videos (it says nothing of the spread between trainings, and takes videos of one group for
    independent; left out with `resamples` 0). Also `videos`, how many. Raises PredictionsError where there is nothing
    to compute from."""
    _check(predictions, "these predictions")
    top1, top5 = hits(predictions)
    per_class = [top1[predictions.labels == label].mean() for label in np.unique(predictions.labels)]
    n = len(top1)
    percent = {"top1": top1.mean(), "top5": top5.mean(), "mean_class": np.mean(per_class)}
    if resamples:
        draws = np.random.default_rng(0).integers(n, size=(resamples, n))
        percent["top1_low"], percent["top1_high"] = np.percentile(top1[draws].mean(1), [2.5, 97.5])
    return {**{name: round(100 * float(value), 4) for name, value in percent.items()}, "videos": n}


def _order(predictions: Predictions) -> np.ndarray:
    """Classes by falling probability, int64 (N, classes); of equal ones the lower number comes first."""
    return np.argsort(-predictions.probabilities, axis=1, kind="stable")


def hits(predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """Whether the label is the first, and whether it is among the first five classes; bool (N,) each."""
    hit = _order(predictions) == predictions.labels[:, None]
    return hit[:, 0], hit[:, :5].any(1)


@dataclass(frozen=True, kw_only=True)
class ClassResult:
    """One class: its name, its test videos, top-1 and top-5 in percent (None without videos), and the class that its
    videos were most often mistaken for ("" where none was; of equally frequent ones the first), with how many were."""

    name: str
    videos: int
    top1: float | None
    top5: float | None
    confused_with: str
    confused: int


def confusion(predictions: Predictions) -> np.ndarray:
    """Counts, int64 (classes, classes): test videos of class row whose most probable class was column."""
    classes = predictions.probabilities.shape[1]
    pairs = predictions.labels * classes + _order(predictions)[:, 0]
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def per_class(predictions: Predictions, class_names: Sequence[str]) -> list[ClassResult]:
    """Every class in the order of `class_names`, also those without test videos. Raises PredictionsError when there are
    more or fewer names than classes."""
    predictions = dataclasses.replace(predictions, class_names=tuple(class_names))
    _check(predictions, "these predictions")
    (top1, top5), matrix = hits(predictions), confusion(predictions)
    np.fill_diagonal(matrix, 0)
    results = []
    for label, name in enumerate(class_names):
        of, mistaken = predictions.labels == label, int(matrix[label].argmax())
        confused = int(matrix[label, mistaken])
        results.append(
            ClassResult(
                name=name,
                videos=int(of.sum()),
                top1=round(100 * float(top1[of].mean()), 4) if of.any() else None,
                top5=round(100 * float(top5[of].mean()), 4) if of.any() else None,
                confused_with=class_names[mistaken] if confused else "",
                confused=confused,
            )
        )
    return results


def evaluated(folder: Path) -> bool:
    """Whether a folder holds a whole evaluation, made by this version of it."""
    path = Path(folder) / "predictions.parquet"
    if not (Path(folder) / "metrics.json").is_file() or not path.is_file():
        return False
    try:
        about = json.loads((pq.read_schema(path).metadata or {}).get(b"pasnet", b"{}"))
    except (OSError, ValueError):
        return False
    return bool(about.get("version", 1) == VERSION)  # those of before it was written down are the first


def _draw(predictions: Predictions, numbers: dict[str, float], out: Path) -> None:
    try:
        from pasnet.confusion import draw
    except ModuleNotFoundError as error:  # a machine that trains needs no Pillow, and the numbers none of its pictures
        if error.name != "PIL":
            raise
        print(f"{out.name}: no picture is drawn, Pillow is not installed", file=sys.stderr)
        return
    source = predictions.source
    short = f" (shards lack {source.lacking} listed videos)" if source and source.lacking else ""
    where = f"{source.dataset} split {source.split}{short}: " if source else ""
    of = f"{numbers['videos']} test videos, {len(predictions.class_names)} classes"
    with replacing(out) as unfinished:
        title = f"{where}top-1 {numbers['top1']:.2f} %, {of}"
        draw(confusion(predictions), predictions.class_names, title, unfinished)


def write_evaluation(
    predictions: Predictions, class_names: Sequence[str], out: Path, *, source: Source | None = None
) -> dict[str, float]:
    """Writes everything that an evaluation leaves into the folder `out`, and returns `metrics`.

    predictions.parquet with `class_names` and `source` (or the predictions' own) in it, per_class.csv, confusion.png,
    and last metrics.json: where it is, the others are. Raises PredictionsError, before anything is written, for
    predictions that do not fit the names.
    """
    out = Path(out)
    named = dataclasses.replace(
        predictions, class_names=tuple(class_names), source=predictions.source if source is None else source
    )
    classes = per_class(named, class_names)
    numbers = metrics(named)
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").unlink(missing_ok=True)  # of an earlier evaluation: it would vouch for half of this one
    named.save(out / "predictions.parquet")
    with replacing(out / "per_class.csv") as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("class", "videos", "top1", "top5", "confused_with", "confused"))
        writer.writerows(dataclasses.astuple(of) for of in classes)
    _draw(named, numbers, out / "confusion.png")
    with replacing(out / "metrics.json") as unfinished:
        unfinished.write_text(json.dumps(numbers, indent=1), "utf-8")
    return numbers


def read_per_class(path: Path) -> list[ClassResult]:
    """The rows of a per_class.csv; none where there is no such file (evaluations of before did not write it)."""
    if not Path(path).is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [
            ClassResult(
                name=row["class"],
                videos=int(row["videos"]),
                top1=float(row["top1"]) if row["top1"] else None,
                top5=float(row["top5"]) if row["top5"] else None,
                confused_with=row["confused_with"],
                confused=int(row["confused"]),
            )
            for row in csv.DictReader(file)
        ]


def ensemble(members: Sequence[Predictions], mean: Mean = "softmax", *, names: Sequence[str] = ()) -> Predictions:
    """Averages networks that saw the same videos: their probabilities, or their logits (up to a constant, the log).

    Members may hold the videos in any order; the result has the first one's. Its `frames` are all that any member
    looked at, (N, sum of K). `names`, such as the members' files, are for messages. Raises PredictionsError when the
    members are of different datasets, splits, classes, labels or videos, or when one network is given twice.
    """
    if mean not in get_args(Mean):
        raise PredictionsError(f"unknown mean {mean!r} (one of: {', '.join(get_args(Mean))})")
    if not members:
        raise PredictionsError("an ensemble of no predictions; give at least one")
    names = names or [f"member {number}" for number in range(1, len(members) + 1)]
    first, places = members[0], []
    for member, name in zip(members, names, strict=True):
        _check(member, name)
        place = {key: row for row, key in enumerate(member.keys)}
        _check_pair(first, names[0], member, name, place)
        places.append([place[key] for key in first.keys])
    seen: dict[tuple[str, int], str] = {}
    for member, name in zip(members, names, strict=True):
        if member.source and member.source.training:
            # the same network with another K is another member
            identity = (member.source.training, member.frames.shape[1])
            if identity in seen:
                raise PredictionsError(f"{name}: of the same training as {seen[identity]}; give each network once")
            seen[identity] = name
    aligned = [member.probabilities[place].astype(np.float64) for member, place in zip(members, places, strict=True)]
    if mean == "logits":
        # the smallest normal float32: what a softmax in float32 rounds to 0 is at most this
        logits = np.mean([np.log(np.maximum(each, np.finfo(np.float32).tiny)) for each in aligned], 0)
        powers = np.exp(logits - logits.max(1, keepdims=True))
        fused = powers / powers.sum(1, keepdims=True)
    else:
        fused = np.mean(aligned, 0)
    return Predictions(
        keys=first.keys,
        labels=first.labels,
        probabilities=fused.astype(np.float32),
        frames=np.concatenate([member.frames[place] for member, place in zip(members, places, strict=True)], 1),
        class_names=next((member.class_names for member in members if member.class_names), ()),
        source=_source_of(members, mean),
    )


def _check_pair(a: Predictions, a_name: str, b: Predictions, b_name: str, b_place: dict[str, int]) -> None:
    """Raises PredictionsError when b cannot be averaged with a; the most telling reason comes first."""
    between = f"{b_name} and {a_name}"
    if a.source and b.source:
        for what in ("dataset", "split"):
            ours, theirs = getattr(a.source, what), getattr(b.source, what)
            if ours != theirs:
                raise PredictionsError(f"{between}: evaluated on {what} {theirs} and {ours}; average those of one only")
    if a.probabilities.shape[1] != b.probabilities.shape[1]:
        classes = f"{b.probabilities.shape[1]} and {a.probabilities.shape[1]} classes"
        raise PredictionsError(f"{between}: {classes}; average networks with the same classes only")
    if a.class_names and b.class_names and a.class_names != b.class_names:
        pairs = zip(a.class_names, b.class_names, strict=True)
        number, (ours, theirs) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        order = f"class {number} is {theirs!r} in one and {ours!r} in the other"
        raise PredictionsError(f"{between}: {order}; average networks with the same classes in the same order only")
    if b_place.keys() != set(a.keys):
        odd = sorted(b_place.keys() ^ set(a.keys))
        raise PredictionsError(
            f"{between}: evaluated on different videos, {len(odd)} are in one only, such as {odd[0]}; "
            "evaluate both on the same shards and split"
        )
    for key, label in zip(a.keys, a.labels.tolist(), strict=True):
        theirs = int(b.labels[b_place[key]])
        if theirs != label:
            raise PredictionsError(
                f"{between}: {key} has label {theirs} in one and {label} in the other; evaluate both on the same shards"
            )


def _source_of(members: Sequence[Predictions], mean: Mean) -> Source | None:
    """The members' common source; the identity of the whole is made from all of theirs. None if one is unknown."""
    sources = [member.source for member in members if member.source is not None]
    if len(sources) < len(members):
        return None
    # the ensemble of one network is that network: nothing is averaged
    if len(sources) == 1:
        return sources[0]
    parts = [
        mean,
        *sorted(f"{source.training} {member.frames.shape[1]}" for source, member in zip(sources, members, strict=True)),
    ]
    digests = sorted({source.shards for source in sources})
    return Source(
        dataset=sources[0].dataset,
        split=sources[0].split,
        shards=" ".join(digests),
        training="ensemble-" + digest(parts),
        lacking=max(source.lacking for source in sources),
    )
