"""The HTML report and its drawings: everything in it comes from records, and nothing from outside."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from pasnet.charts import Bar, bars
from pasnet.cli import main
from pasnet.config import ConfigError, ModelConfig
from pasnet.confusion import draw
from pasnet.data import open_shards
from pasnet.experiments import PRESETS
from pasnet.figures import (
    comparable,
    figure_2,
    figure_3,
    heat_maps,
    ours_of,
    pasnet_of_figure_3,
    pictures_of_table,
    row_bars,
)
from pasnet.page import html_page
from pasnet.predictions import ClassResult
from pasnet.report import remarks, results_page
from pasnet.results import _request, _with_earlier, collect, finish
from pasnet.study import Job, Shards, Study, jobs
from pasnet.tracking import TrackingError
from shards import build, find_dataset, scan

COUNTS = {f"split{split}": {"train": 200, "test": 80} for split in (1, 2, 3)}
UCF = (
    Shards(
        dataset="ucf101",
        folder="/somewhere/ucf101",
        digest="digest",
        num_classes=101,
        videos=280,
        frames=28_000,
        failed=0,
        decoded_with_errors=0,
        missing=0,
        subsets=COUNTS,
    ),
)

CLASSES = [
    ClassResult(name=f"<i>Class {n}", videos=20, top1=90 - n, top5=99, confused_with="Other", confused=n)
    for n in range(5)
]


def finished(job: Job, top1: float, classes: Sequence[ClassResult] = CLASSES) -> None:
    """A training that is done, as far as a report looks."""
    folder = Path(job.folder)
    (folder / "evaluation").mkdir(parents=True)
    numbers = {
        "top1": top1,
        "top5": 99.0,
        "mean_class": top1,
        "top1_low": top1 - 3,
        "top1_high": top1 + 2,
        "videos": 80,
    }
    (folder / "evaluation" / "metrics.json").write_text(json.dumps(numbers))
    lines = ["class,videos,top1,top5,confused_with,confused"]
    lines += [",".join(map(str, dataclasses.astuple(of))) for of in classes]
    (folder / "evaluation" / "per_class.csv").write_text("\n".join(lines))
    names = [of.name for of in CLASSES]
    draw(np.eye(5, dtype=int) * 20, names, "t", folder / "evaluation" / "confusion.png")
    done = {"best_on_test": {"epoch": 1, "top1": top1 + 1}, "seconds": 7200, "device": "Some GPU", "commit": "abc1234"}
    (folder / "done.json").write_text(json.dumps(done))
    history = [{"epoch": n, "train_top1": 95 - 60 / n, "test_top1": top1 - 30 / n} for n in range(1, 41)]
    (folder / "history.json").write_text(json.dumps(history))


def content_of(study: Study, shards: tuple[Shards, ...] = UCF, failed: int | None = None) -> dict[str, Any]:
    made = jobs(study, shards)
    failures = {} if failed is None else {made[failed].folder: "loss is nan"}
    for number, job in enumerate(made):
        if job.folder not in failures:
            k = job.config.data.num_segments
            finished(job, 86 + 6 * (1 - 8 / k) + number % 5 - 0.37 * job.config.seed)
    records = collect(study, shards, made, failures)
    for record in records:
        record["run"] = "0123456789abcdef" if record["status"] == "done" else None
    return {
        "title": "a study",
        "shards": [dataclasses.asdict(of) for of in shards],
        "seconds": {"videos": 1.0},
        "tags": {"prefect.flow_run_id": "flow-1"},
        "results": records,
    }


def run_again(study: Study, shards: Sequence[Shards], lost: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a run of the study leaves in its folder, where what is done is not done again: its results.json."""
    made = jobs(study, shards, lost=lost or {})
    for job in made:
        if not (Path(job.folder) / "done.json").is_file():
            finished(job, 90.0)
    finish(study, shards, collect(study, shards, made, {}, lost=lost), {}, "")
    content: dict[str, Any] = json.loads((study.root / "results.json").read_text("utf-8"))
    return content


class Page(HTMLParser):
    """What a browser would fetch, which elements are left open, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.inner: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = dict(attrs)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "srcset", "data")]
        self.fetched += [of["href"] or ""] if tag != "a" and "href" in of else []
        self.inner += [(of["href"] or "")[1:]] if tag == "a" else []
        self.ids += [of["id"] or ""] if "id" in of else []
        assert tag != "script" and not any(name.startswith("on") for name in of)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_stands_alone_and_has_every_number(tmp_path: Path) -> None:
    study = Study(out=str(tmp_path), tables=("table-2", "table-4", "figure-2"), seeds=(0, 1))
    content = content_of(study, failed=0)
    text = html_page([content], [tmp_path])
    page = Page(text)
    assert not page.open and all(source.startswith("data:image/png;base64,") for source in page.fetched)
    assert page.fetched and "url(" not in text and "@import" not in text
    assert set(page.inner) <= set(page.ids) and len(set(page.ids)) == len(page.ids)
    for record in content["results"]:
        assert (f"{record['top1']:.2f}" if record["status"] == "done" else record["reason"]) in page.words
    for needed in (
        "abc1234",
        "Some GPU",
        "01234567",
        "2.000",
        "flow-1",
        "90.20 (quoted)",
        "<i>Class 4",
        "What differs",
    ):
        assert needed in page.words
    assert "failed: loss is nan" in page.words and "not run: no hmdb51 in this study" in page.words
    assert "table-3: quoted by the paper, not run" in page.words
    assert "table-1: not asked for: A, eco, ucf101; A + 1*1conv, conventional, ucf101" in page.words
    assert "mean of 2 runs, standard deviation over seeds" in page.words
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)


def test_large_confusion_pictures_stay_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = content_of(Study(out=str(tmp_path), tables=("table-2",)))
    assert len(Page(html_page([content], [tmp_path])).fetched) == 9
    monkeypatch.setattr("pasnet.page.PICTURES_BYTES", 20_000)
    page = Page(html_page([content], [tmp_path]))
    assert 0 < len(page.fetched) < 9 and "Confusion matrix: confusion.png in the run's folder" in page.words


def test_figure_2_has_the_printed_points_and_ours(tmp_path: Path) -> None:
    study = Study(out=str(tmp_path), tables=("figure-2",))
    content = content_of(study)
    ucf, hmdb = figure_2(content["results"])
    titles = re.findall(r"<title>(paper|ours)[^<]*, (\d+): ([\d.]+)</title>", ucf.svg())
    assert [(k, value) for who, k, value in titles if who == "paper"] == [
        ("8", "91.40"),
        ("16", "93.20"),
        ("32", "94.10"),
    ]
    ours = {r["num_segments"]: f"{r['top1']:.2f}" for r in content["results"] if r["status"] == "done"}
    assert {k: value for who, k, value in titles if who == "ours"} == ours and len(ours) == 5
    assert "ours" not in hmdb.svg() and "71.60" in hmdb.svg()  # not run: the paper's points alone


def test_our_number_of_a_row_is_a_run_or_a_mean(tmp_path: Path) -> None:
    content = content_of(Study(out=str(tmp_path), tables=("table-2",), fusions=("A",), seeds=(0, 1)))
    both = content["results"]
    one = ours_of(both[:1])
    assert one and (one["top1"], one["low"], one["high"]) == (
        both[0]["top1"],
        both[0]["top1_low"],
        both[0]["top1_high"],
    )
    mean = ours_of(both)
    values = [record["top1"] for record in both]
    assert mean and mean["top1"] == pytest.approx(np.mean(values), abs=1e-3)
    assert mean["high"] - mean["top1"] == pytest.approx(np.std(values, ddof=1), abs=1e-3)
    assert ours_of([{**both[0], "status": "failed"}]) is None


def test_one_drawing_has_one_protocol(tmp_path: Path) -> None:
    study = Study(out=str(tmp_path), tables=("table-2",), fusions=("A", "I"), splits=(1, 2))
    records = content_of(study)["results"]
    assert comparable(records) == records
    lost = [r | {"status": "failed", "reason": "it"} if (r["title"], r["split"]) == ("I", 2) else r for r in records]
    assert {r["split"] for r in comparable(lost)} == {1} and len(comparable(lost)) == 2
    drawn = row_bars(lost).svg()
    alone = [f"{r['top1']:.2f}" for r in lost if r["split"] == 1]
    assert all(number in drawn for number in alone)
    gone = [r | {"status": "failed", "reason": "it"} if r["title"] == "I" else r for r in records]
    assert comparable(gone) == gone  # a row without any result does not take the mean from the others
    first = [r | {"status": "failed", "reason": "it"} if r["split"] == 1 else r for r in records]
    assert {(r["split"], r["status"]) for r in comparable(first)} == {(2, "done")}
    apart = [r for r in records if (r["title"], r["split"]) in (("A", 1), ("I", 2))]
    assert [(r["title"], r["status"]) for r in comparable(apart)] == [("A", "done"), ("I", "not run")]


def test_remarks_name_the_strategy_where_a_title_has_two(tmp_path: Path) -> None:
    said = remarks(content_of(Study(out=str(tmp_path), tables=("equal-epochs",)))["results"])
    [long] = [line for line in said if "as many epochs as both" in line]
    assert long.startswith("A + 1*1conv, conventional-long; Conv(A, I), conventional-long; Conv(A, I, F), conven")


def test_remarks_name_the_dataset_where_a_title_has_two(tmp_path: Path) -> None:
    content = content_of(Study(out=str(tmp_path), tables=("table-4",)))
    said = remarks(content["results"])
    [unknown] = [line for line in said if line.endswith("our sources do not give the paper's number.")]
    assert "ECO, 8 frames, hmdb51; ECO, 16 frames, hmdb51" in unknown and "ECO, 8 frames, ucf101" not in unknown
    assert any(line.startswith("ECO, 8 frames, ucf101; ECO, 16 frames, ucf101: most likely quoted") for line in said)
    [mean] = [line for line in said if line.startswith("Paper's protocol, likely a mean over three splits")]
    assert "ECO, 8 frames, ucf101" in mean and "hmdb51" not in mean


def test_bars_end_where_the_numbers_say() -> None:
    svg = bars(
        "t", [Bar(label="a & b", paper=50.0, ours=100.0, low=90.0, high=100.0), Bar(label="c", paper=None, ours=None)]
    ).svg()
    widths = [float(width) for width in re.findall(r'<rect x="6" [^>]*width="([\d.]+)"', svg)]
    assert len(widths) == 2 and widths[1] == pytest.approx(2 * widths[0], abs=0.2)
    assert "a &amp; b" in svg and "not run" in svg
    wide = bars("t", [Bar(label="I", paper=57.4, ours=28.2, low=-2.1, high=58.5)]).svg()
    inside = bars("t", [Bar(label="I", paper=57.4, ours=28.2, low=2.1, high=58.5)]).svg()
    xs = [float(x) for x in re.findall(r' x[12]="([\d.-]+)"', wide)]
    assert min(xs) == 6 and wide.count("<line") == inside.count("<line") - 1  # it leaves the picture without an end
    assert 'fill="#fff"' not in svg and 'fill="#fff"' in bars("t", []).svg(alone=True)


def test_a_tables_pictures_are_files_of_their_own(tmp_path: Path) -> None:
    content = content_of(Study(out=str(tmp_path), tables=("table-2", "figure-2")))
    by_table = {name: [r for r in content["results"] if r["table"] == name] for name in ("table-2", "figure-2")}
    assert set(pictures_of_table(by_table["table-2"])) == {"bars.svg", "training-curves.svg"}
    made = pictures_of_table(by_table["figure-2"])
    assert set(made) == {"bars.svg", "training-curves.svg", "figure-2.svg"}
    for svg in made.values():
        ElementTree.fromstring(svg)


@pytest.fixture(scope="module")
def trained(shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pasnet.config import DataConfig, FusionConfig, OptimConfig, TrainConfig
    from pasnet.train import train

    out = tmp_path_factory.mktemp("trained")
    config = TrainConfig(
        model=ModelConfig(num_classes=3, fusion=FusionConfig(style="A+E*A"), width=0.0625),
        data=DataConfig(shards=str(shard_folder), num_segments=2, input_size=48, workers=0),
        optim=OptimConfig(epochs=1, lr=0.01, batch=4, micro_batch=4, schedule="constant"),
        seed=3,
    )
    train(config, out)
    return out


def test_figure_3_shows_the_start_beside_the_end(trained: Path, shard_folder: Path, tmp_path: Path) -> None:
    import torch

    drawn = heat_maps(trained / "last.pt", shard_folder, tmp_path / "a.png")
    assert len(drawn["clips"]) == 3 and drawn["original"] == "a random start: no pose weights were given"
    assert drawn["last_layer"] == ""
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"), int)
    frame, before, after = (picture[30:254, 8 + 232 * n : 232 * (n + 1)] for n in range(3))
    assert abs(before - frame).max() > 40 and abs(before - after).max() > 0
    # a network that did not move has twice the same map: the original is the very start
    state = torch.load(trained / "last.pt", weights_only=True)
    from pasnet.checkpoints import model_of
    from pasnet.models.pasnet import build

    model = model_of(state)[1].model
    torch.manual_seed(3)
    state["model"] = build(model).state_dict()
    torch.save(state, tmp_path / "start.pt")
    heat_maps(tmp_path / "start.pt", shard_folder, tmp_path / "b.png", keys=drawn["clips"][1:2])
    picture = np.asarray(Image.open(tmp_path / "b.png").convert("RGB"), int)
    before, after = (picture[30:254, 8 + 232 * n : 232 * (n + 1)] for n in (1, 2))
    assert abs(before - after).max() == 0
    with pytest.raises(ValueError, match="nothing is no test clip of this split; it has such as"):
        heat_maps(trained / "last.pt", shard_folder, tmp_path / "c.png", keys=["nothing"])


def test_figure_3_is_drawn_once_for_a_training(trained: Path, shard_folder: Path, tmp_path: Path) -> None:
    record = {"trainings": [str(trained)], "shard_digest": "d", "shards": str(shard_folder)}
    record |= {"title": "t", "strategy": "s", "dataset": "synthetic", "split": 1, "seed": 3}
    first = figure_3(record, tmp_path)
    stamp = (tmp_path / "figure-3.png").stat().st_mtime_ns
    assert figure_3(record, tmp_path) == first and (tmp_path / "figure-3.png").stat().st_mtime_ns == stamp
    figure_3({**record, "shard_digest": "other"}, tmp_path)
    assert (tmp_path / "figure-3.png").stat().st_mtime_ns != stamp


def test_the_best_pasnet_is_one_network_with_a_pose() -> None:
    def record(fusion: str, top1: float, trainings: int = 1, status: str = "done") -> dict[str, Any]:
        return {"fusion": fusion, "top1": top1, "trainings": ["t"] * trainings, "status": status}

    best = record("Conv(A,I)", 80.0)
    records = [record("A", 95.0), record("I", 99.0, 5), record("I", 98.0, status="failed"), best, record("I", 70.0)]
    assert pasnet_of_figure_3(records) is best
    assert pasnet_of_figure_3([record("A", 95.0)]) is None
    reads = record("A+E*A", 60.0)  # the last layer of its heat maps has been trained, too
    assert pasnet_of_figure_3([*records, record("E*A", 50.0), reads]) is reads


def test_a_study_ends_with_both_pages_and_report_makes_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise TrackingError("the server is away")

    monkeypatch.setattr("pasnet.results.send", away)
    study = Study(out=str(tmp_path / "study"), tables=("table-2",), fusions=("A",))
    content = content_of(study)
    finish(study, UCF, content["results"], {}, "http://nowhere")
    page = (tmp_path / "study" / "report.html").read_text("utf-8")
    assert "no finished row with a pose network" in page
    out = tmp_path / "all.md"
    assert main(["report", str(tmp_path / "study"), "--out", str(out)]) == 0
    assert out.with_suffix(".html").read_text("utf-8") == page
    assert "### Not run" in out.read_text("utf-8") and "quoted by the paper, not run" in out.read_text("utf-8")


def test_a_figure_3_that_cannot_be_drawn_costs_no_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pasnet.results.send", lambda *_, **__: [])
    study = Study(out=str(tmp_path), tables=("table-2",), fusions=("I",))
    content = content_of(study)
    finish(study, UCF, content["results"], {}, "http://nowhere")  # there are no shards to draw from
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "Not drawn: ShardError" in page and f"{content['results'][0]['top1']:.2f}" in page


def test_a_table_alone_leaves_the_others_on_the_page(tmp_path: Path) -> None:
    """The deployments of single tables share a folder."""

    def run(**more: Any) -> list[tuple[str, str]]:
        asked = Study(out=str(tmp_path), data=("x/ucf101",), **more)
        found = run_again(asked, UCF)["results"]
        return [(record["table"], record["title"]) for record in found if record["status"] == "done"]

    two = run(tables=("table-2",), fusions=("A", "Conv(A,I)"))
    both = run(tables=("table-1",), fusions=("A",))
    assert both == [("table-1", "A"), *two] and run(tables=("table-1",), fusions=("A",)) == both
    assert "### table-2" in (tmp_path / "RESULTS.md").read_text("utf-8")
    # other settings are another study, and so are rows whose predictions are gone
    assert run(tables=("table-1",), fusions=("A",), overrides={"optim.epochs": 1}) == [("table-1", "A")]
    # and one of a preset, or a D0, that is another now
    run(tables=("table-2",), fusions=("A", "Conv(A,I)"))
    assert run(tables=("table-1",), fusions=("A",), pretrain="none") == [("table-1", "A")]
    run(tables=("table-2",), fusions=("A", "Conv(A,I)"), pretrain="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "full", dataclasses.replace(PRESETS["full"], max_train_videos=10**6))
        assert run(tables=("table-1",), fusions=("A",)) == [("table-1", "A")]
    run(tables=("table-2",), fusions=("A", "Conv(A,I)"))
    d0 = dataclasses.replace(UCF[0], dataset="other-d0")
    place = tmp_path / "results.json"
    content = json.loads(place.read_text("utf-8"))
    content["shards"].append(dataclasses.asdict(d0))
    place.write_text(json.dumps(content), "utf-8")
    records = [{**content["results"][0], "table": "table-1"}]
    study = Study(out=str(tmp_path), data=("x/ucf101",))
    assert len(_with_earlier(study, [*UCF, d0], records)[1]) == 3
    assert len(_with_earlier(study, [*UCF, dataclasses.replace(d0, digest="anew")], records)[1]) == 1
    for folder in (tmp_path / "trainings").glob("*conv*"):
        shutil.rmtree(folder)
    assert run(tables=("table-1",), fusions=("A",)) == [("table-1", "A"), ("table-2", "A")]
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_dataset_that_cannot_be_had_takes_no_finished_row_off_the_page(tmp_path: Path) -> None:
    asked = Study(out=str(tmp_path), data=("x/ucf101", "x/hmdb51"), tables=("table-4",), seeds=(0, 1))
    both = (UCF[0], dataclasses.replace(UCF[0], dataset="hmdb51", digest="other"))

    def run(shards: tuple[Shards, ...], lost: dict[str, str]) -> list[tuple[str, str, str]]:
        content = run_again(asked, shards, lost)
        assert [of["dataset"] for of in content["shards"]] == sorted((of.dataset for of in both), reverse=True)
        return sorted((of["paper_dataset"], of["title"], of["status"]) for of in content["results"])

    whole = run(both, {})
    assert len(whole) == 24 and {status for _, _, status in whole} == {"done"}
    assert run(both[:1], {"hmdb51": "not packed: another build is writing there"}) == whole
    said = "**hmdb51 could not be had in the last run** (not packed: another build is writing there); numbers on it"
    assert said in (tmp_path / "RESULTS.md").read_text("utf-8")
    for folder in (tmp_path / "trainings").glob("hmdb51-*-eco-*"):
        shutil.rmtree(folder)
    after = run(both[:1], {"hmdb51": "not packed: no space left"})  # what is gone is not held
    assert {title for dataset, title, status in after if status == "failed"} == {
        f"ECO, {k} frames" for k in (8, 16, 32)
    }
    page = (tmp_path / "RESULTS.md").read_text("utf-8")
    assert "incomplete: no seed has all of them" in page


def test_rows_of_a_stand_in_do_not_replace_those_of_a_set_that_is_lost(tmp_path: Path) -> None:
    def run(shards: Sequence[Shards], data: str, lost: dict[str, str]) -> list[tuple[str, str, str]]:
        asked = Study(out=str(tmp_path), data=(data, "x/hmdb51"), tables=("table-4",))
        found = run_again(asked, shards, lost)["results"]
        return sorted({(of["paper_dataset"], of["dataset"], of["status"]) for of in found})

    hmdb = dataclasses.replace(UCF[0], dataset="hmdb51", digest="other")
    stand_in = dataclasses.replace(UCF[0], dataset="synthetic")
    assert run([stand_in, hmdb], "synthetic", {})[1] == ("ucf101", "synthetic", "done")
    assert run([hmdb], "x/ucf101", {"ucf101": "not fetched: away"})[1] == ("ucf101", "ucf101", "failed")


def test_a_failed_row_stays_on_the_page(tmp_path: Path) -> None:
    def run(*tables: str, broken: bool = False) -> None:
        asked = Study(out=str(tmp_path), data=("x/ucf101",), tables=tables, fusions=("A", "Conv(A,I)"))
        made = jobs(asked, UCF)
        failures = {job.folder: "loss is nan" for job in made if broken and "conv" in job.folder}
        for job in made:
            if job.folder not in failures and not (Path(job.folder) / "done.json").is_file():
                finished(job, 90.0)
        finish(asked, UCF, collect(asked, UCF, made, failures), {}, "")

    run("table-2", broken=True)
    run("table-1")
    found = json.loads((tmp_path / "results.json").read_text("utf-8"))["results"]
    assert [r["reason"] for r in found if r["status"] == "failed"] == [
        f"loss is nan (logs in {r['trainings'][0]})" for r in found if r["status"] == "failed"
    ] and len([r for r in found if r["status"] == "failed"]) == 1
    run("table-2")
    found = json.loads((tmp_path / "results.json").read_text("utf-8"))["results"]
    assert all(r["status"] == "done" for r in found)


def test_other_weights_under_the_same_name_are_another_study(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"one")
    asked = Study(out=str(tmp_path), data=("x/ucf101",), eco_weights=str(weights))
    before = _request(asked)
    assert _request(asked) == before
    weights.write_bytes(b"another")
    assert _request(asked) != before


def test_what_batch_norm_sees_is_said_where_it_differs(tmp_path: Path) -> None:
    page = results_page([content_of(Study(out=str(tmp_path), tables=("figure-2",)))])
    said = "16 (others at K = 8); 8 (others at K = 16); 4 (others at K = 24, others at K = 32); 2 (others at K = 48)"
    assert f"Clips that batch norm sees at a time, by what fits a card: {said}." in page
    assert "batch norm sees" not in results_page([content_of(Study(out=str(tmp_path / "b"), tables=("table-2",)))])


def test_a_preset_says_how_its_values_came_about(tmp_path: Path) -> None:
    study = Study(out=str(tmp_path), preset="science", data=("x/ucf101",), pretrain="none")
    made = jobs(study, UCF)
    for job in made:
        finished(job, 50.0)
    finish(study, UCF, collect(study, UCF, made, {}), {}, "")
    for name in ("RESULTS.md", "report.html"):
        assert "settled after runs on the same videos and test lists" in (tmp_path / name).read_text("utf-8")


def test_budgets_and_hours_are_said(tmp_path: Path) -> None:
    asked = Study(out=str(tmp_path), tables=("table-1",), fusions=("Conv(A,I)",), overrides={"optim.epochs": 3})
    content = content_of(asked)
    page = results_page([content])
    assert "Epochs on the target set: conventional 3; twice-finetune 3 + 3. Where they differ" in page
    assert "Hours: 6.00 for 3 trainings" in page  # ECO's, too


def test_a_dataset_that_was_not_fetched_fails_its_rows(tmp_path: Path) -> None:
    asked = Study(out=str(tmp_path), tables=("table-4",))
    lost = {"hmdb51": "not fetched: no server\nanswers"}
    made = jobs(asked, UCF, lost=lost)
    assert made == jobs(asked, UCF)
    for job in made:
        finished(job, 90.0)
    records = collect(asked, UCF, made, {}, lost=lost)
    by_set = {(record["paper_dataset"], record["status"]) for record in records}
    assert by_set == {("ucf101", "done"), ("hmdb51", "failed")}
    content = {"title": "t", "shards": [], "results": records}
    assert "failed: not fetched: no server answers |" in results_page([content])


def test_nothing_stands_in_for_a_dataset_that_is_lost(tmp_path: Path) -> None:
    both = ("data/ucf101", "synthetic")
    asked = Study(out=str(tmp_path), tables=("table-1",), data=both)
    stand_in = [dataclasses.replace(UCF[0], dataset="synthetic")]
    with pytest.raises(ConfigError, match="synthetic would stand in for ucf101, but ucf101 does"):
        jobs(asked, stand_in, lost=("ucf101",))
    asked = Study(out=str(tmp_path), tables=("table-1", "table-4"), data=(*both[:1], "synthetic-hmdb"))
    hmdb = [dataclasses.replace(UCF[0], dataset="synthetic-hmdb")]
    made = jobs(asked, hmdb, lost=("ucf101",))
    assert {job.training.dataset for job in made} == {"synthetic-hmdb"}
    for job in made:
        finished(job, 90.0)
    lost = {"ucf101": "not packed: 14 of 20 videos failed"}
    by_set = {(r["paper_dataset"], r["status"], r.get("reason")) for r in collect(asked, hmdb, made, {}, lost=lost)}
    assert by_set == {("ucf101", "failed", lost["ucf101"]), ("hmdb51", "done", None)}


def test_what_no_row_can_have_learnt_is_said(videos: Path, tmp_path: Path) -> None:
    """One class of three without a training video: a third of the test list is out of reach."""
    copied = shutil.copytree(videos, tmp_path / "data")
    for listed in sorted(copied.rglob("trainlist01.txt")):
        lines = listed.read_text().splitlines()
        gone = lines[0].partition("/")[0]
        listed.write_text("".join(f"{line}\n" for line in lines if not line.startswith(f"{gone}/")))
    build(scan(*find_dataset(copied)), tmp_path / "shards", num_shards=1)
    of = dataclasses.replace(Shards.of(tmp_path / "shards"), dataset="ucf101")
    asked = Study(out=str(tmp_path / "out"), tables=("table-2",), fusions=("A",))
    [made] = jobs(asked, [of])
    names = open_shards(tmp_path / "shards").class_names
    finished(made, 66.0, [dataclasses.replace(one, name=name) for one, name in zip(CLASSES, names, strict=False)])
    records = collect(asked, [of], [made], {})
    [record] = records
    tested = {one["name"]: one["train_videos"] for one in record["classes"]}
    assert tested[gone] == 0 and set(tested.values()) != {0}
    assert 0 < record["of_unseen_classes"] == record["test_videos"] / 3
    content = {"title": "t", "shards": [dataclasses.asdict(of)], "results": records}
    page = results_page([content])
    lists = of.subsets["split1"]
    assert f"12 videos (split 1: {lists['train']} to train, {lists['test']} to test), " in page and lists["train"]
    assert (
        f"**Upper bound** of ucf101, split 1: {record['of_unseen_classes']} of {record['test_videos']} test videos"
        in page
    )
    assert "the others are 66.67 %" in page
    [row] = [line for line in page.splitlines() if line.startswith("| A | eco | ucf101, 1, 0 |") and "(as " in line]
    assert gone not in row  # it is no class that the network is bad at
    assert "Upper bound" not in results_page([{**content, "results": [{**record, "of_unseen_classes": 0}]}])


def test_a_gap_between_two_protocols_is_marked(tmp_path: Path) -> None:
    asked = Study(out=str(tmp_path), tables=("table-2",), fusions=("A", "I"), splits=(1, 2))
    made = jobs(asked, UCF)
    for job in made:
        finished(job, 90.0)
    records = collect(asked, UCF, made, {})
    page = results_page([{"title": "t", "shards": [], "results": records}])

    def gaps(start: str, column: int) -> list[str]:
        rows = [line.split(" | ") for line in page.splitlines() if line.startswith(start) and "–" not in line[:9]]
        return [row[column] for row in rows if len(row) > column and re.match(r"[+-]\d", row[column])]

    assert gaps("| A | eco | ucf101, 1, 0 |", 7) == ["-0.20 *"]  # the paper's is likely a mean over three splits
    assert [gap.endswith(" *") for gap in gaps("| I | twice-finetune | ucf101, 1, 0 |", 7)] == [False]
    assert [gap.endswith(" *") for gap in gaps("| I | twice-finetune | ucf101, 2, 0 |", 7)] == [True]
    assert gaps("| A | eco | ucf101 |", 7) == ["-0.20 *"]  # the mean over two splits
    assert gaps("| I | twice-finetune | ucf101 |", 7) == ["+32.56 (+15.18) *"]
    assert page.count("- * The paper's number is likely of another protocol") == 1
