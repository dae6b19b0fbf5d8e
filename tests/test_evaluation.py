"""Saved predictions and everything made from them, against slow and plain computations of the same."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_study import BOTH, finished

from pasnet.cli import main
from pasnet.confusion import Confusion, draw, shares, worst
from pasnet.predictions import (
    Predictions,
    PredictionsError,
    Source,
    confusion,
    ensemble,
    metrics,
    per_class,
    read_per_class,
    write_evaluation,
)
from pasnet.report import results_page
from pasnet.results import collect
from pasnet.study import Study, jobs
from pasnet.summary import protocol, summaries

SOURCE = Source(dataset="ucf101", split=1, shards="d1", training="t1")


def made(
    labels: Sequence[int], probabilities: Any, *, keys: Sequence[str] = (), k: int = 2, **more: Any
) -> Predictions:
    n = len(labels)
    return Predictions(
        keys=tuple(keys) or tuple(f"v{row}" for row in range(n)),
        labels=np.array(labels, np.int64),
        probabilities=np.array(probabilities, np.float32),
        frames=np.arange(n * k).reshape(n, k),
        **more,
    )


def guessed(n: int, classes: int, seed: int = 0, **more: Any) -> Predictions:
    rng = np.random.default_rng(seed)
    return made(rng.integers(classes, size=n).tolist(), rng.dirichlet(np.ones(classes), n), **more)


def ranking(row: Sequence[float]) -> list[int]:
    """Classes from the most to the least probable, the lower number first where they are equal, without sorting."""
    left, order = list(range(len(row))), []
    while left:
        first = left[0]
        for label in left:
            if row[label] > row[first]:
                first = label
        order.append(first)
        left.remove(first)
    return order


@st.composite
def predictions(draw_from: st.DrawFn) -> Predictions:
    """Few distinct values, so that ties are common; some classes without videos."""
    classes, n = draw_from(st.integers(1, 8)), draw_from(st.integers(1, 12))
    value = st.sampled_from([0.0, 0.1, 0.2, 0.5])
    rows = draw_from(st.lists(st.lists(value, min_size=classes, max_size=classes), min_size=n, max_size=n))
    return made(draw_from(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n)), rows)


class TestMetrics:
    @given(predictions())
    @settings(max_examples=150, deadline=None)
    def test_all_numbers_are_those_of_a_loop(self, of: Predictions) -> None:
        classes = of.probabilities.shape[1]
        names = [f"c{label}" for label in range(classes)]
        counts = [[0] * classes for _ in names]
        first, five = [[] for _ in names], [[] for _ in names]  # type: tuple[list[list[bool]], list[list[bool]]]
        for label, row in zip(of.labels.tolist(), of.probabilities.tolist(), strict=True):
            order = ranking(row)
            counts[label][order[0]] += 1
            first[label].append(order[0] == label)
            five[label].append(label in order[:5])
        numbers, n = metrics(of, resamples=10), len(of.keys)
        tested = [label for label in range(classes) if first[label]]
        assert numbers["videos"] == n
        assert numbers["top1"] == pytest.approx(100 * sum(map(sum, first)) / n, abs=1e-3)
        assert numbers["top5"] == pytest.approx(100 * sum(map(sum, five)) / n, abs=1e-3)
        means = [100 * sum(first[label]) / len(first[label]) for label in tested]
        assert numbers["mean_class"] == pytest.approx(sum(means) / len(means), abs=1e-3)
        assert confusion(of).tolist() == counts

        for label, result in enumerate(per_class(of, names)):
            assert (result.name, result.videos) == (f"c{label}", len(first[label]))
            if not first[label]:
                assert (result.top1, result.top5, result.confused_with, result.confused) == (None, None, "", 0)
                continue
            assert result.top1 == pytest.approx(100 * sum(first[label]) / len(first[label]), abs=1e-3)
            assert result.top5 == pytest.approx(100 * sum(five[label]) / len(five[label]), abs=1e-3)
            wrong = [count for other, count in enumerate(counts[label]) if other != label]
            assert result.confused == max(wrong, default=0)
            if result.confused:  # the first of the equally frequent
                other = next(c for c in range(classes) if c != label and counts[label][c] == result.confused)
                assert result.confused_with == names[other]
            else:
                assert result.confused_with == ""

    def test_top5_needs_six_classes_to_miss(self) -> None:
        assert metrics(made([4, 4], np.tile([5, 4, 3, 2, 1], (2, 1))))["top5"] == 100
        assert metrics(made([5, 4], np.tile([6, 5, 4, 3, 2, 1], (2, 1))))["top5"] == 50

    def test_of_equal_classes_the_lower_number_comes_first(self) -> None:
        # a network that has collapsed to one answer is right for one class, not for all
        numbers = metrics(made([0, 1, 2, 3], np.full((4, 4), 0.25)))
        assert numbers["top1"] == 25
        assert metrics(made(list(range(8)), np.full((8, 8), 1 / 8)))["top5"] == 62.5

    def test_a_class_without_videos_is_not_in_the_mean(self) -> None:
        of = made([0, 0, 0, 2], np.eye(3)[[0, 0, 0, 1]])  # class 0 right, class 2 taken for class 1
        assert metrics(of)["mean_class"] == 50 and metrics(of)["top1"] == 75

    @pytest.mark.parametrize("truth", [0.5, 0.9])
    def test_the_interval_covers_the_truth_about_95_times_in_100(self, truth: float) -> None:
        rng, n, covered, widths = np.random.default_rng(7), 200, 0, []
        for _ in range(300):
            right = rng.random(n) < truth
            numbers = metrics(made([0] * n, np.where(right[:, None], [1.0, 0.0], [0.0, 1.0])), resamples=400)
            covered += numbers["top1_low"] <= 100 * truth <= numbers["top1_high"]
            widths.append(numbers["top1_high"] - numbers["top1_low"])
        assert 0.90 < covered / 300 < 0.985
        assert np.mean(widths) == pytest.approx(2 * 1.96 * 100 * math.sqrt(truth * (1 - truth) / n), rel=0.08)

    def test_the_interval_is_the_same_each_time(self) -> None:
        assert metrics(guessed(997, 3), resamples=50) == metrics(guessed(997, 3), resamples=50)


class TestSaved:
    def test_nothing_is_lost(self, tmp_path: Path) -> None:
        of = guessed(9, 4, class_names=("a", "b, c", 'd"', "ü"), source=SOURCE, k=5)
        of.save(tmp_path / "p.parquet")
        again = Predictions.load(tmp_path / "p.parquet")
        assert (again.keys, again.class_names, again.source) == (of.keys, of.class_names, SOURCE)
        for name in ("labels", "probabilities", "frames"):
            assert np.array_equal(getattr(again, name), getattr(of, name)), name
        assert again.probabilities.dtype == np.float32 and again.labels.dtype == again.frames.dtype == np.int64
        assert [path.name for path in tmp_path.iterdir()] == ["p.parquet"]

    def test_files_of_before_can_be_read(self, tmp_path: Path) -> None:
        guessed(3, 2, class_names=("a", "b"), source=SOURCE).save(tmp_path / "p.parquet")
        table = pq.read_table(tmp_path / "p.parquet")
        pq.write_table(table.replace_schema_metadata(None), tmp_path / "old.parquet")
        old = Predictions.load(tmp_path / "old.parquet")
        assert old.class_names == () and old.source is None and old.names == ("class 0", "class 1")

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda of: replace(of, labels=of.labels + 1), "labels from 1 to 2 for 2 classes"),
            (lambda of: replace(of, labels=of.labels - 1), "labels from -1 to 0 for 2 classes"),
            (lambda of: replace(of, keys=("x", "x", "y")), "1 of its videos appear twice"),
            (lambda of: replace(of, probabilities=of.probabilities * np.nan), "NaN"),
            (lambda of: replace(of, class_names=("a",)), "1 class names for 2 classes"),
            (lambda of: made([], np.zeros((0, 2))), "holds no test video"),
        ],
    )
    def test_what_contradicts_itself_is_refused(self, change: Any, reason: str, tmp_path: Path) -> None:
        of = made([0, 1, 1], [[0.6, 0.4], [0.3, 0.7], [0.1, 0.9]])
        change(of).save(tmp_path / "p.parquet")
        with pytest.raises(PredictionsError, match=reason) as refused:
            Predictions.load(tmp_path / "p.parquet")
        assert "p.parquet" in str(refused.value) and "evaluate the checkpoint again" in str(refused.value)

    def test_other_files_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "text.parquet").write_text("key,label\n")
        pq.write_table(pq.read_table(self._saved(tmp_path)).drop_columns(["label"]), tmp_path / "other.parquet")
        for name, reason in {
            "text": "no predictions of ours",
            "other": "no column label",
            "no": "no such file",
        }.items():
            with pytest.raises(PredictionsError, match=reason):
                Predictions.load(tmp_path / f"{name}.parquet")

    @staticmethod
    def _saved(folder: Path) -> Path:
        guessed(3, 2).save(folder / "p.parquet")
        return folder / "p.parquet"


class TestWritten:
    NAMES = ("walk, slowly", "run", "jump")

    def test_the_folder_holds_all_of_it(self, tmp_path: Path) -> None:
        of = made([0, 0, 2], [[0.5, 0.4, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
        numbers = write_evaluation(of, self.NAMES, tmp_path / "evaluation", source=SOURCE)
        assert numbers == metrics(of) == json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
        with open(tmp_path / "evaluation" / "per_class.csv", newline="") as file:
            rows = list(csv.reader(file))
        assert rows == [
            ["class", "videos", "top1", "top5", "confused_with", "confused"],
            ["walk, slowly", "2", "50.0", "100.0", "run", "1"],
            ["run", "0", "", "", "", "0"],
            ["jump", "1", "100.0", "100.0", "", "0"],
        ]
        assert read_per_class(tmp_path / "evaluation" / "per_class.csv") == per_class(of, self.NAMES)
        saved = Predictions.load(tmp_path / "evaluation" / "predictions.parquet")
        assert saved.class_names == self.NAMES and saved.source == SOURCE
        written = {path.name for path in (tmp_path / "evaluation").iterdir()}
        assert written == {"predictions.parquet", "metrics.json", "per_class.csv", "confusion.png"}

    def test_names_must_fit(self, tmp_path: Path) -> None:
        with pytest.raises(PredictionsError, match="2 class names for 3 classes"):
            write_evaluation(guessed(4, 3), ("a", "b"), tmp_path / "evaluation")
        assert not (tmp_path / "evaluation").exists()

    def test_metrics_come_last(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # whoever finds metrics.json takes the evaluation for done
        write_evaluation(guessed(4, 3), self.NAMES, tmp_path)

        def broken(*arguments: Any) -> None:
            arguments[-1].write_bytes(b"half")
            raise OSError("disk full")

        monkeypatch.setattr("pasnet.confusion.draw", broken)
        with pytest.raises(OSError, match="disk full"):
            write_evaluation(guessed(5, 3), self.NAMES, tmp_path)
        assert sorted(path.name for path in tmp_path.glob("[!c]*")) == ["per_class.csv", "predictions.parquet"]
        assert not list(tmp_path.glob(".*"))


class TestPicture:
    @pytest.mark.parametrize("classes", [1, 2, 6, 51, 101, 400])
    def test_the_matrix_is_there_at_every_size(self, classes: int, tmp_path: Path) -> None:
        matrix = np.diag(np.full(classes, 10))
        draw(matrix, [f"Class{label}" for label in range(classes)], "title", tmp_path / "p.png")
        picture = np.asarray(Image.open(tmp_path / "p.png").convert("RGB")).astype(int)
        assert max(picture.shape[:2]) < 2400
        dark = (np.abs(picture - [8, 40, 95]).sum(2) < 6).sum()  # a full diagonal
        cell = max(3, min(56, 1320 // classes))
        assert 0.6 * classes * cell**2 < dark < 1.3 * classes * cell**2 + 300

    def test_rows_are_normalised(self) -> None:
        found = shares(np.array([[3, 1], [0, 0]]))
        assert found[0].tolist() == [0.75, 0.25] and np.isnan(found[1]).all()

    def test_the_worst_confusions_by_videos_then_by_share(self) -> None:
        matrix = np.array([[50, 4, 0], [4, 5, 1], [0, 6, 90]])
        assert worst(matrix, 3) == [
            Confusion(label=2, taken_for=1, videos=6, of=96),
            Confusion(label=1, taken_for=0, videos=4, of=10),
            Confusion(label=0, taken_for=1, videos=4, of=54),
        ]
        assert len(worst(matrix)) == 4 and worst(np.diag([3, 4])) == []


class TestEnsemble:
    def test_softmax_and_logits_differ_where_they_should(self) -> None:
        # one network is sure, two lean the other way: probabilities average to 0.497, logits to odds of (99/9)^(1/3)
        sure, leaning = [[0.99, 0.01]], [[0.25, 0.75]]
        of = [made([0], sure), made([0], leaning), made([0], leaning)]
        odds = (99 * (1 / 3) ** 2) ** (1 / 3)
        assert ensemble(of).probabilities[0, 0] == pytest.approx((0.99 + 0.25 + 0.25) / 3)
        assert ensemble(of, "logits").probabilities[0, 0] == pytest.approx(odds / (1 + odds))
        # and here they decide differently: three lean one way, one is sure of the other
        of = [made([0], [[0.7, 0.3]]) for _ in range(3)] + [made([0], [[0.001, 0.999]])]
        assert ensemble(of).probabilities[0].argmax() == 0 and ensemble(of, "logits").probabilities[0].argmax() == 1

    def test_the_mean_of_logits_is_that_of_the_networks_own(self) -> None:
        rng = np.random.default_rng(3)
        logits = rng.normal(0, 15, (3, 20, 6))  # differences of up to 60 or so: probabilities far below 1e-12

        def softmax(values: np.ndarray) -> np.ndarray:
            powers = np.exp(values - values.max(-1, keepdims=True))
            return powers / powers.sum(-1, keepdims=True)

        members = [made([0] * 20, softmax(each)) for each in logits]
        assert ensemble(members, "logits").probabilities == pytest.approx(softmax(logits.mean(0)), abs=1e-4)

    @given(st.integers(1, 5), st.randoms(use_true_random=False), st.sampled_from(["softmax", "logits"]))
    @settings(max_examples=30, deadline=None)
    def test_the_order_of_videos_does_not_matter(self, count: int, random: Any, mean: Any) -> None:
        members = [replace(guessed(7, 6, seed), labels=np.arange(7) % 6) for seed in range(count)]
        shuffled = []
        for member in members:
            order = list(range(7))
            random.shuffle(order)
            parts = {name: getattr(member, name)[order] for name in ("labels", "probabilities", "frames")}
            shuffled.append(replace(member, keys=tuple(member.keys[row] for row in order), **parts))
        straight, fused = ensemble(members, mean), ensemble(shuffled, mean)
        assert fused.keys == shuffled[0].keys
        rows = [straight.keys.index(key) for key in fused.keys]
        assert fused.probabilities == pytest.approx(straight.probabilities[rows], abs=1e-6)
        assert fused.labels.tolist() == straight.labels[rows].tolist()
        assert fused.frames.tolist() == straight.frames[rows].tolist()
        assert metrics(fused)["top1"] == metrics(straight)["top1"]

    def test_members_of_any_k(self) -> None:
        members = [guessed(4, 3, k=k, source=replace(SOURCE, training=f"t{k}")) for k in (16, 20, 24, 28, 32)]
        fused = ensemble(members)
        assert fused.frames.shape == (4, 120) and fused.frames[:, 16:36].tolist() == members[1].frames.tolist()
        assert fused.source is not None and fused.source.split == 1 and fused.source.training.startswith("ensemble-")
        backwards = ensemble(members[::-1]).source
        assert backwards == fused.source  # the same networks
        assert ensemble(members, "logits").source != fused.source != ensemble(members[1:]).source
        assert ensemble([*members[:2], replace(members[2], source=None)]).source is None

    def test_one_network_is_its_own_ensemble(self) -> None:
        of = guessed(5, 4, source=SOURCE, class_names=tuple("abcd"))
        for mean in ("softmax", "logits"):
            alone = ensemble([of], mean)  # type: ignore[arg-type]
            assert alone.probabilities == pytest.approx(of.probabilities, abs=1e-6)
            assert (alone.source, alone.class_names) == (SOURCE, of.class_names)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"source": replace(SOURCE, split=2, training="t2")}, "evaluated on split 2 and 1"),
            ({"source": replace(SOURCE, dataset="hmdb51", training="t2")}, "evaluated on dataset hmdb51 and ucf101"),
            ({"source": SOURCE}, "of the same training as a.parquet"),
            ({"class_names": ("x", "z", "y")}, "class 1 is 'z' in one and 'y' in the other"),
            ({"keys": ("v0", "v1", "other")}, "different videos, 2 are in one only, such as other"),
            ({"labels": np.array([0, 1, 1])}, "v2 has label 1 in one and 2 in the other"),
            ({"probabilities": np.ones((3, 4)), "class_names": ()}, "4 and 3 classes"),
            ({"probabilities": np.full((3, 3), np.nan)}, "NaN"),
        ],
    )
    def test_what_does_not_belong_together_is_refused(self, change: dict[str, Any], message: str) -> None:
        a = made([0, 1, 2], np.eye(3), class_names=("x", "y", "z"), source=SOURCE)
        b = replace(a, **{"source": replace(SOURCE, training="t2"), **change})
        with pytest.raises(PredictionsError, match=message) as refused:
            ensemble([a, b], names=["a.parquet", "b.parquet"])
        assert "b.parquet" in str(refused.value)

    def test_a_split_is_named_even_when_the_videos_differ_too(self) -> None:
        a = made([0], [[1, 0]], source=SOURCE)
        b = made([0], [[1, 0]], keys=["w"], source=replace(SOURCE, split=3, training="t2"))
        with pytest.raises(PredictionsError, match="member 2 and member 1: evaluated on split 3 and 1"):
            ensemble([a, b])

    def test_the_same_network_at_another_k_is_a_member(self) -> None:
        assert len(ensemble([guessed(3, 2, source=SOURCE, k=k) for k in (8, 16)]).keys) == 3

    def test_no_members_and_no_such_mean(self) -> None:
        with pytest.raises(PredictionsError, match="give at least one"):
            ensemble([])
        with pytest.raises(PredictionsError, match=r"unknown mean 'median' \(one of: softmax, logits\)"):
            ensemble([guessed(2, 2)], "median")  # type: ignore[arg-type]

    def test_the_command(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        rows = {"a": [[0.7, 0.3], [0.8, 0.2]], "b": [[0.7, 0.3], [0.8, 0.2]], "c": [[0.7, 0.3], [0.001, 0.999]]}
        files = []
        for name, probabilities in rows.items():
            source = replace(SOURCE, training=name)
            made([0, 1], probabilities, class_names=("x", "y"), source=source).save(tmp_path / f"{name}.parquet")
            files.append(str(tmp_path / f"{name}.parquet"))
        assert main(["ensemble", *files, "--mean", "logits", "--out", str(tmp_path / "out")]) == 0
        shown = capsys.readouterr().out.splitlines()
        assert [line.split("  ")[0].rpartition("/")[2] for line in shown] == [
            "a.parquet: top-1 50.00 %",
            "b.parquet: top-1 50.00 %",
            "c.parquet: top-1 100.00 %",
            "out, mean of logits: top-1 100.00 %",
        ]
        fused = Predictions.load(tmp_path / "out" / "predictions.parquet")
        assert fused.class_names == ("x", "y") and fused.probabilities[1, 1] > 0.5
        assert read_per_class(tmp_path / "out" / "per_class.csv")[0].name == "x"
        assert main(["ensemble", *files, "no.parquet", "--out", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err == (
            "error: no.parquet: no such file; `pasnet evaluate` writes predictions.parquet\n"
        )


def records(numbers: dict[tuple[int, int], float | None], **more: Any) -> list[dict[str, Any]]:
    """{(split, seed): top-1, None for failed} as records of one row."""
    row = {"table": "table-2", "title": "A", "strategy": "eco", "fusion": "A", "paper_dataset": "ucf101"}
    row |= {"dataset": "ucf101", "paper_top1": 90.0, "paper_top5": None, "num_segments": "8", **more}
    return [
        {
            **row,
            "split": split,
            "seed": seed,
            **(
                {"status": "failed", "reason": "x"}
                if top1 is None
                else {"status": "done", "top1": top1, "top5": top1 + 5, "mean_class": top1 - 1, "seconds": 3600.0}
            ),
        }
        for (split, seed), top1 in numbers.items()
    ]


class TestSummary:
    def test_one_run_needs_none(self) -> None:
        assert summaries(records({(1, 0): 90})) == []

    def test_seeds_of_one_split(self) -> None:
        [found] = summaries(records({(1, 0): 90, (1, 1): 92, (1, 2): 97}))
        assert protocol(found) == "split 1" and found["seeds"] == [0, 1, 2]
        assert found["mean"] == {"top1": 93, "top5": 98, "mean_class": 92}
        assert found["sd"]["top1"] == pytest.approx(math.sqrt((9 + 1 + 16) / 2), abs=1e-3)  # n - 1
        assert (found["sd_over"], found["n"], found["runs"], found["gap"]) == ("seeds", 3, 3, 3.0)

    def test_splits_of_one_seed(self) -> None:
        [found] = summaries(records({(1, 0): 90, (2, 0): 92, (3, 0): 97}))
        assert protocol(found) == "mean over splits 1, 2, 3"
        assert (found["mean"]["top1"], found["sd_over"], found["n"], found["runs"]) == (93, "splits", 3, 3)
        assert found["sd"]["top1"] == pytest.approx(math.sqrt(13), abs=1e-3)

    def test_over_both_the_spread_is_that_of_the_seeds_means(self) -> None:
        # the splits differ by 10 and more, the seeds by 1: the standard deviation is about the seeds
        one, all_ = summaries(
            records({(s, seed): {1: 70, 2: 80, 3: 90}[s] + seed for s in (1, 2, 3) for seed in (0, 1)})
        )
        assert protocol(one) == "split 1" and one["mean"]["top1"] == 70.5
        assert all_["mean"]["top1"] == 80.5 and all_["sd"]["top1"] == pytest.approx(math.sqrt(0.5), abs=1e-3)
        assert (all_["sd_over"], all_["n"], all_["runs"], all_["seconds"]) == ("seeds", 2, 6, 6 * 3600)

    def test_a_seed_that_lacks_a_split_is_left_out(self) -> None:
        numbers: dict[tuple[int, int], float | None] = {(1, 0): 90, (2, 0): 80, (3, 0): 70}
        one, all_ = summaries(records({**numbers, (1, 1): 50, (2, 1): None, (3, 1): 60}))
        assert one["mean"]["top1"] == 70 and one["n"] == 2  # split 1 is there for both
        assert all_["seeds"] == [0] and all_["left_out"] == {1: "split 2 failed"}
        assert all_["mean"]["top1"] == 80 and all_["sd_over"] == "splits" and all_["runs"] == 3

    def test_split_1_is_never_passed_off_as_the_mean_over_three(self) -> None:
        [found] = summaries(records({(1, 0): 90, (2, 0): None, (3, 0): None}))
        assert found["status"] == "incomplete" and "mean" not in found
        assert found["left_out"] == {0: "split 2, 3 failed"}

    def test_one_seed_that_is_left_has_no_spread(self) -> None:
        [found] = summaries(records({(1, 0): 90, (1, 1): None}))
        assert found["sd"]["top1"] is None and found["sd_over"] == "" and found["mean"]["top1"] == 90

    def test_rows_and_datasets_are_apart(self) -> None:
        ours = records({(1, 0): 90, (1, 1): 92})
        others = records({(1, 0): 10, (1, 1): 20}, dataset="hmdb51", paper_dataset="hmdb51", paper_top1=None)
        one, two = summaries([*ours, *others])
        assert (one["mean"]["top1"], two["mean"]["top1"], two["gap"]) == (91, 15, None)

    def test_records_of_before_have_no_mean_class(self) -> None:
        old = [{k: v for k, v in record.items() if k != "mean_class"} for record in records({(1, 0): 1, (2, 0): 2})]
        assert set(summaries(old)[0]["mean"]) == {"top1", "top5"}

    def test_on_the_page(self, tmp_path: Path) -> None:
        study = Study(out=str(tmp_path), tables=("table-2",), fusions=("A",), splits=(1, 2, 3), seeds=(0, 1))
        of = jobs(study, BOTH[:1])
        for job in of:
            finished(job.folder, 80.0 + 3 * job.config.data.split + job.config.seed)
            classes = made([0, 0, 1, 2, 2, 2], np.eye(3)[[0, 0, 2, 2, 2, 0]])
            folder = Path(job.folder) / "evaluation"
            numbers = (folder / "metrics.json").read_text()
            write_evaluation(classes, ("clap", "wave|hand", "jump"), folder)
            (folder / "metrics.json").write_text(numbers)
        found = collect(study, BOTH[:1], of, {of[0].folder: "loss is nan"})
        page = results_page([{"title": "t", "shards": [asdict(BOTH[0])], "results": found}])
        done = [line for line in page.splitlines() if line.startswith("| A | eco | ucf101, ")]
        assert len(done) == 7  # six runs, and the classes
        assert "#### table-2: split 1\n" in page and "#### table-2: mean over splits 1, 2, 3\n" in page
        alone = (  # the paper's is likely a mean over three splits
            "| A | eco | ucf101 | 8 | 90.20 | 84.00 (99.00) | – | -6.20 * | 1 (without 0: split 1 failed) | 1 | 2.000 |"
        )
        mean = (
            "| A | eco | ucf101 | 8 | 90.20 | 87.00 (99.00) | 3.00 over 3 splits | -3.20 | 1 "
            "(without 0: split 1 failed) | 3 | 6.000 |"
        )
        assert alone in page and mean in page
        worst_two = "jump 66.7 (as clap: 1 of 3)"
        assert f"| A | eco | ucf101, 1, 1 | clap 100.0 | wave/hand 0.0 (as jump: 1 of 1); {worst_two} |" in page
        single = Study(out=str(tmp_path), tables=("table-2",), fusions=("A",))
        found = collect(single, BOTH[:1], jobs(single, BOTH[:1]), {})
        page = results_page([{"title": "t", "shards": [asdict(BOTH[0])], "results": found}])
        assert "table-2: split" not in page and "mean over splits 1" not in page and "table-2: classes" in page
