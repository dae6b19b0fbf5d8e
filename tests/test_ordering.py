"""The paper's order of the rows beside ours: from predictions whose answer is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pasnet import ordering
from pasnet.data import open_shards
from pasnet.ordering import cells, comparisons, said
from pasnet.predictions import Predictions
from pasnet.report import results_page

VIDEOS = 200


def run(
    folder: Path, title: str, paper: float | None, right: np.ndarray, *, split: int = 1, seed: int = 0, **more: Any
) -> dict[str, Any]:
    """A finished run that names the class of the videos that `right` says (bool (videos,))."""
    place = folder / f"{title}-{split}-{seed}"
    (place / "evaluation").mkdir(parents=True)
    probabilities = np.where(right[:, None], [0.9, 0.1], [0.1, 0.9]).astype(np.float32)
    Predictions(
        keys=tuple(f"v{n:03}" for n in range(len(right))),
        labels=np.zeros(len(right), np.int64),
        probabilities=probabilities,
        frames=np.zeros((len(right), 2), np.int64),
    ).save(place / "evaluation" / "predictions.parquet")
    of = {"table": "table-2", "dataset": "here", "title": title, "strategy": "twice-finetune", "paper_top1": paper}
    return {**of, "split": split, "seed": seed, "status": "done", "trainings": [str(place)], **more}


def share(hits: int) -> np.ndarray:
    return np.arange(VIDEOS) < hits


def seeds_of(folder: Path, title: str, paper: float, hits: tuple[int, ...]) -> list[dict[str, Any]]:
    return [run(folder, title, paper, share(count), seed=seed) for seed, count in enumerate(hits)]


def test_a_pair_is_compared_video_by_video(tmp_path: Path) -> None:
    """B misses what A misses and ten more, in every seed: unpaired the intervals overlap, paired the order is clear."""
    rows = seeds_of(tmp_path, "B", 80, (90, 91, 89)) + seeds_of(tmp_path, "A", 81.5, (100, 101, 99))
    [pair] = comparisons(rows)
    assert (pair["higher"]["title"], pair["lower"]["title"], pair["paper"]) == ("A", "B", 1.5)
    assert pair["ours"] == 5.0 and pair["verdict"] == "as in the paper"
    assert (pair["splits"], pair["seeds"]) == ([1], [0, 1, 2])
    # all seeds differ by 0.05, so what is left is the variance over videos, 0.05 (1 - 0.05) / 200 and a little less
    assert pair["low"] == pytest.approx(5 - 1.97 * 1.5, abs=0.2) and pair["high"] == pytest.approx(10 - pair["low"])


def test_numbers_of_two_protocols_are_marked(tmp_path: Path) -> None:
    rows = [run(tmp_path, "A", 90, share(180), paper_protocol="mean"), run(tmp_path, "B", 80, share(20))]
    rows += [run(tmp_path, "C", 70, share(10))]
    found = comparisons(rows)
    assert [(of["higher"]["title"], of["lower"]["title"], of["mixed"]) for of in found] == [
        ("A", "B", True),
        ("A", "C", True),
        ("B", "C", False),
    ]
    assert any("In 2 pairs the paper's two numbers are likely of two protocols" in line for line in said(found))
    assert [row[2] for row in cells(found)] == ["+20.00 *", "+10.00 *", "+10.00"]


def test_pairs_of_unequal_epochs_are_marked(tmp_path: Path) -> None:
    epochs = {"A": "30 + 5", "B": "5", "C": "35"}
    rows = [
        {**record, "epochs": epochs[title]}
        for title, paper, hits in (("A", 90, (140, 141)), ("B", 80, (100, 101)), ("C", 70, (99, 102)))
        for record in seeds_of(tmp_path, title, paper, hits)
    ]
    found = comparisons(rows)
    assert [of["epochs"] for of in found] == [["30 + 5", "5"], [], ["5", "35"]]
    assert [row[3].endswith(" †") for row in sorted(cells(found))] == [True, False, True]
    assert any("In 2 pairs (marked †), 1 of them decided, the two rows have different" in line for line in said(found))


def test_datasets_are_not_counted_together(tmp_path: Path) -> None:
    """Table IV has the same titles for both."""
    rows = [
        run(tmp_path / dataset, title, paper, share(hits), table="table-4", dataset=dataset)
        for dataset, better in (("ucf101", 180), ("hmdb51", 20))
        for title, paper, hits in (("16 frames", 90, better), ("8 frames", 80, 100))
    ]
    found = comparisons(rows)
    lines = said(found)
    assert lines[0].startswith("ucf101: The paper ranks 1 pair of these rows. Ours have 1 in the same order, 0 in")
    assert [line for line in lines if line.startswith("hmdb51: The paper ranks 1 pair") and "0 in the same" in line]
    assert sum("holds for the data" in line for line in lines) == 1
    assert [row[0] for row in cells(found)] == [f"16 frames, twice-finetune, {name}" for name in ("ucf101", "hmdb51")]
    assert not any("ucf101" in text for text in (*said(found[:1]), cells(found[:1])[0][0]))


def test_one_seed_is_not_judged(tmp_path: Path) -> None:
    [pair] = comparisons([run(tmp_path, "A", 90, share(180)), run(tmp_path, "B", 80, share(20))])
    assert (pair["ours"], pair["verdict"], pair["low"]) == (80.0, "one seed", None)


def test_the_other_way_round_and_undecided(tmp_path: Path) -> None:
    rows = seeds_of(tmp_path, "A", 90, (100, 101)) + seeds_of(tmp_path, "B", 80, (140, 141))
    rows += seeds_of(tmp_path, "C", 70, (99, 102))
    verdicts = {(of["higher"]["title"], of["lower"]["title"]): of["verdict"] for of in comparisons(rows)}
    assert verdicts == {("A", "B"): "the other way round", ("A", "C"): "undecided", ("B", "C"): "as in the paper"}


def test_seeds_that_disagree_leave_a_pair_undecided(tmp_path: Path) -> None:
    """Each seed alone looks certain of its sign; together they are of nothing."""
    [pair] = comparisons(seeds_of(tmp_path, "A", 90, (120, 80, 110)) + seeds_of(tmp_path, "B", 80, (80, 118, 85)))
    assert pair["ours"] == pytest.approx(100 * (40 - 38 + 25) / 3 / VIDEOS, abs=0.01)
    assert pair["verdict"] == "undecided" and pair["low"] < -40  # Student's, with 2 degrees of freedom


def test_videos_of_a_group_are_not_independent(
    tmp_path: Path, shard_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same differences, all in one of twenty groups or spread over them: the interval is wider, as it should be."""
    rows = seeds_of(tmp_path, "B", 80, (90, 90)) + seeds_of(tmp_path, "A", 81.5, (100, 100))
    widths = {}
    for name, group in (("alone", None), ("together", lambda n: n // 10), ("apart", lambda n: n % 20)):
        groups = {f"v{n:03}": str(group(n)) for n in range(VIDEOS)} if group else {}
        monkeypatch.setattr(ordering, "_groups", lambda folder, across_classes, groups=groups: groups)
        [pair] = comparisons(rows)
        widths[name] = pair["high"] - pair["low"]
    assert widths["together"] > 2.5 * widths["alone"] and widths["apart"] < 1.2 * widths["alone"]
    monkeypatch.undo()
    shards = open_shards(shard_folder)
    of_a_class = ordering._groups(str(shard_folder), across_classes=False)
    assert of_a_class == dict(zip(shards.keys, shards.groups, strict=True)) and len(set(of_a_class.values())) == 12
    assert set(ordering._groups(str(shard_folder), across_classes=True).values()) == {"g01", "g02", "g03", "g04"}
    assert ordering._groups(str(tmp_path), across_classes=False) == {}


def test_students_quantiles() -> None:
    """Of the tables in any textbook."""
    for freedom, value in ((1, 12.706), (2, 4.303), (5, 2.571), (30, 2.042)):
        assert ordering.student(freedom) == pytest.approx(value, abs=2e-3)


def test_only_what_both_rows_have_is_compared(tmp_path: Path) -> None:
    rows = [
        run(tmp_path, "A", 90, share(100)),
        run(tmp_path, "A", 90, share(0), seed=1),  # B lacks it
        run(tmp_path, "B", 80, share(90)),
        run(tmp_path, "C", None, share(10)),  # no number in the paper
        run(tmp_path, "D", 80, share(95)),  # equal to B there
        {**run(tmp_path, "E", 10, share(1)), "status": "failed"},
        run(tmp_path, "F", 20, share(1), dataset="elsewhere"),
    ]
    found = comparisons(rows)
    assert [(of["higher"]["title"], of["lower"]["title"], of["ours"]) for of in found] == [
        ("A", "B", 5.0),
        ("A", "D", 2.5),
    ]
    assert all(of["seeds"] == [0] for of in found)
    (tmp_path / "B-1-0" / "evaluation" / "predictions.parquet").unlink()  # an evaluation of before
    assert [of["lower"]["title"] for of in comparisons(rows)] == ["D"]


def test_splits_are_averaged_with_the_same_seeds(tmp_path: Path) -> None:
    rows = []
    for split, a, b in ((1, 100, 90), (2, 60, 40)):
        for seed in (0, 1):
            if (split, seed) != (2, 1):
                rows += [run(tmp_path, "A", 90, share(a), split=split, seed=seed)]
            rows += [run(tmp_path, "B", 80, share(b), split=split, seed=seed)]
    [pair] = comparisons(rows)
    assert (pair["splits"], pair["seeds"]) == ([1, 2], [0])  # seed 1 lacks a split
    assert pair["ours"] == 7.5


def test_ensembles_count_as_their_mean(tmp_path: Path) -> None:
    alone = run(tmp_path, "B", 80, share(100))
    parts = [run(tmp_path, f"A{n}", 90, share(120)) for n in range(2)]
    both = {**parts[0], "title": "A", "trainings": [of["trainings"][0] for of in parts]}
    assert [of["ours"] for of in comparisons([both, alone])] == [10.0]


def test_the_page_says_what_is_decided_and_no_more(tmp_path: Path) -> None:
    rows = seeds_of(tmp_path, "A", 90, (100, 101)) + seeds_of(tmp_path, "B", 80, (140, 141))
    rows += [*seeds_of(tmp_path, "C", 70, (98, 101)), run(tmp_path, "D", 10, share(10))]
    found = json.loads(json.dumps(comparisons(rows)))  # as results.json holds them
    text = " ".join(said(found))
    assert "ranks 6 pairs" in text and "have 5 in the same order, 1 in the other, 0 equal (Kendall's tau +0.67)" in text
    assert "1 as in the paper, 1 the other way round; 1 undecided" in text and "3 pairs with one seed" in text
    assert said([]) == []
    assert "None is judged: 3 pairs with one seed" in " ".join(said([of for of in found if of["low"] is None]))
    study = {"title": "t", "shards": [], "results": [], "comparisons": found}
    assert "order and ours" not in results_page([study])  # no table, no order of it
    blank = {"status": "not run", "reason": "why", "paper_dataset": "ucf101", "remark": ""}
    study["results"] = [{**of, **blank} for of in rows]
    page = results_page([study])
    assert "| A, twice-finetune | B, twice-finetune | +10.00 | -20.00 |" in page
    assert "| A, twice-finetune | C, twice-finetune | +20.00 | +0.50 | -1.88 to +2.88 | undecided |" in page
    assert "†" not in page
    assert "| A, twice-finetune | D, twice-finetune | +80.00 | +45.00 | – | one seed |" in page
