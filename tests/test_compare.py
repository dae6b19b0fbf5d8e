"""What MLflow holds of a study's tables, and the address that sets their rows side by side."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from test_report import UCF, content_of

from pasnet import tracking
from pasnet.cli import main
from pasnet.results import compare, finish, links_page, send
from pasnet.study import Study
from pasnet.tracking import TrackingError, client, default_uri


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Of a table with a failed row, at MLflow."""
    root = tmp_path_factory.mktemp("study")
    weights = root / "eco.pth"
    weights.write_bytes(b"weights")
    fusions = ("A", "Conv(A,I)", "A+pool(I)+pool(F)")
    asked = Study(out=str(root), tables=("table-2",), fusions=fusions, splits=(1, 2), eco_weights=str(weights))
    content = content_of(asked, failed=1)
    for record in content["results"]:  # a training's files that content_of does not make
        record["artifacts"] = []
        record.pop("run")
    finish(asked, UCF, content["results"], {"videos": 1.0}, default_uri(root), flow_run_id="flow-1")
    return asked


def test_the_tables_run_holds_the_table_the_drawings_and_what_it_is_of(study: Study, tmp_path: Path) -> None:
    mlflow = client(default_uri(study.root))
    experiment = mlflow.get_experiment_by_name("pasnet/fusion")
    assert experiment is not None
    runs = mlflow.search_runs([experiment.experiment_id])
    [parent] = [run for run in runs if run.data.tags["kind"] == "table"]
    children = [run for run in runs if run.data.tags["kind"] == "row"]
    records = json.loads((study.root / "results.json").read_text("utf-8"))["results"]
    assert len(children) == 5 and len(records) == 6
    about = parent.data.tags
    assert about["protocol"] == "split 2" and {c.data.tags["protocol"] for c in children} == {
        "split 1",
        "split 2",
    }
    assert "A + 0.5 pool(I) + pool(F), twice-finetune: 91.37" in about["paper_top1"]
    for run in runs:
        assert run.data.tags["shards.digest"] == "digest" and run.data.tags["commit"] == "abc1234"
        assert run.data.tags["prefect.flow_run_id"] == "flow-1"
        assert run.data.tags["weights.eco"].startswith("sha256:") and len(run.data.tags["weights.eco"]) == 7 + 64
    assert {c.data.tags.get("weights.pose") for c in children} == {None, "a random start"}
    assert {c.data.tags["paper_protocol"] for c in children} == {"likely split 1", "likely a mean over three splits"}
    for child in children:  # places are no parameters, lest MLflow compares them
        assert not {"data.shards", "init.eco", "init.pose", "init.parent", "init.pretrained"} & child.data.params.keys()
        assert "model.fusion.style" in child.data.params
    assert about["mlflow.note.content"].startswith("### table-2")
    names = {file.path for file in mlflow.list_artifacts(parent.info.run_id)}
    assert names == {"table.md", "table.csv", "bars.svg", "training-curves.svg", "results.json"}
    folder = Path(mlflow.download_artifacts(parent.info.run_id, "", str(tmp_path)))
    rows = list(csv.DictReader(io.StringIO((folder / "table.csv").read_text("utf-8"))))
    assert [(row["title"], row["split"], row["top1"]) for row in rows] == [
        (record["title"], str(record["split"]), str(record.get("top1", ""))) for record in records
    ]
    assert (folder / "bars.svg").read_text("utf-8").startswith("<svg")


def test_a_second_end_of_the_study_sends_no_file_again(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    original = tracking.client

    def counting(uri: str) -> Any:
        made = original(uri)
        for name in ("log_text", "log_artifact", "log_batch", "create_run"):
            monkeypatch.setattr(made, name, lambda *_, name=name, **__: sent.append(name), raising=True)
        return made

    monkeypatch.setattr(tracking, "client", counting)
    records = json.loads((study.root / "results.json").read_text("utf-8"))["results"]
    for record in records:
        record.pop("run", None)
    finish(study, UCF, records, {"videos": 2.0}, default_uri(study.root), flow_run_id="flow-2")
    assert not sent


def test_compare_gives_the_address_of_the_rows(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    page, count, first = compare(study.root, "table-2")
    records = json.loads((study.root / "results.json").read_text("utf-8"))["results"]
    runs = [record["run"] for record in records if record["status"] == "done"]
    assert count == 5 and first == f"make serve RUN={study.root}"
    assert page.startswith("http://127.0.0.1:5000/#/compare-runs?runs=")
    assert set(json.loads(unquote(page).split("runs=", 1)[1].split("&")[0])) == set(runs)
    assert main(["compare", str(study.root), "--address", "http://pages:1/"]) == 0
    said = capsys.readouterr().out
    assert "5 rows of table-2 side by side\n" in said and "http://pages:1/#/compare-runs" in said


def test_every_row_is_linked_to_its_run(study: Study, tmp_path: Path) -> None:
    uri = default_uri(study.root)
    page = links_page(study.root, uri)
    records = json.loads((study.root / "results.json").read_text("utf-8"))["results"]
    [experiment] = {tracking.client(uri).get_run(of["run"]).info.experiment_id for of in records if "run" in of}
    for of in records:
        if of["status"] == "done":
            assert f"[run](http://127.0.0.1:5000/#/experiments/{experiment}/runs/{of['run']}) |" in page
    assert f"`make serve RUN={study.root}`" in page and "table-2: [5 rows side by side](http://127.0.0.1" in page
    assert "did not answer" in links_page(study.root, f"sqlite:///{tmp_path}/no/folder.db")
    (tmp_path / "results.json").write_text(json.dumps({"results": [{"status": "failed"}]}))
    assert f"`pasnet track send {tmp_path}`" in links_page(tmp_path, uri)


def test_an_address_that_is_given_is_asked(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = f"sqlite:///{tmp_path}/other.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", elsewhere)
    assert compare(study.root, "table-2", f"sqlite:///{study.root}/mlflow.db")[1] == 5
    with pytest.raises(TrackingError, match=r"other\.db"):
        compare(study.root, "table-2")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert compare(study.root, "table-2")[1] == 5
    with pytest.raises(TrackingError, match=r"other\.db"):
        compare(study.root, "table-2", elsewhere)


def test_results_of_an_earlier_version_are_sent_and_shown_too(study: Study, tmp_path: Path) -> None:
    content = json.loads((study.root / "results.json").read_text("utf-8"))
    for name in ("figure_3", "seconds"):
        del content[name]
    for record in content["results"]:
        for name in ("weights", "classes", "history"):
            record.pop(name, None)
        record["history"] = []
    content["tags"]["study"] = "earlier"
    (tmp_path / "results.json").write_text(json.dumps(content), "utf-8")
    [line] = send([tmp_path], default_uri(tmp_path))
    assert "5 rows are at" in line and "Not drawn" in (tmp_path / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{study}", "--table", "table-9"], 2, "unknown table 'table-9'"),
        (["{study}", "--table", "table-1"], 1, "no experiment pasnet/training-strategy"),
        (["{empty}"], 2, "results.json: missing"),
    ],
)
def test_what_cannot_be_compared_is_said(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    given = [word.format(study=study.root, empty=tmp_path) for word in arguments]
    assert main(["compare", *given]) == code
    assert message in capsys.readouterr().err
