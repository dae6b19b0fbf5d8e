"""The flow's parameters: what is refused, in which words, and that the deployments are made of them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.parameters import Parameters, ParametersError, check
from flows.reproduce import pasnet
from pasnet.config import ConfigError
from pasnet.experiments import EXTRA_TABLES, PRESETS, QUESTIONS

ROOT = Path(__file__).resolve().parents[1]


def test_the_flow_and_the_model_have_the_same_parameters() -> None:
    signature = inspect.signature(pasnet.fn).parameters
    assert list(signature) == list(Parameters.model_fields)
    assert {name: of.default for name, of in signature.items()} == Parameters().model_dump()
    described = inspect.getdoc(pasnet.fn) or ""
    assert all(f"\n    {name}: " in described for name in signature)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tables": ["table2"]}, "tables: 'table2' is none of table-1, .*figure-2.*; did you mean table-2?"),
        ({"tabels": ["table-2"]}, "tabels: there is no such parameter; did you mean tables?"),
        ({"splits": 1}, r"splits: 1 is not a list, such as \[1, 2, 3\]"),
        ({"splits": [4]}, "splits: 4 is none of 1, 2, 3"),
        ({"seeds": [-1]}, "seeds: -1 is too small; give at least 0"),
        ({"seeds": [1, 1]}, r"seeds: \[1, 1\] names one twice"),
        ({"data": []}, "data: is empty; give at least one, such as"),
        ({"data": ["nowhere/ucf101"]}, "no folder nowhere/ucf101 in .*`pasnet shards fetch ucf101`"),
        ({"data": ["nowhere"], "fetch": True}, "no folder nowhere in"),
        ({"mirrors": ["ftp://there"], "data": ["x/ucf101"], "fetch": True}, "mirrors: ftp://there is no http"),
        ({"pose_weights": "pose"}, "weights/body_pose_model.pth: no such .*`pasnet weights fetch pose` downloads it"),
        ({"data": ["nowhere"]}, "no folder nowhere in .*; give the folder that holds videos/"),
        ({"workers": "many"}, "workers: 'many' is not a whole number, such as 2"),
        ({"dry_run": "maybe"}, "dry_run: 'maybe' is not true or false"),
        ({"overrides": ["optim.epochs"]}, r"overrides: .* is not an object, such as \{"),
        ({"overrides": {"optim.epoch": 1}}, "unknown setting 'optim.epoch'; near it: optim.epochs"),
        ({"fusions": ["Conv(A,E)"]}, "unknown fusion 'Conv\\(A,E\\)'; did you mean"),
        ({"num_segments": 4}, "num_segments replaces the paper's K"),
        ({"preset": "ful", "workers": 0}, "preset: 'ful' .*did you mean full.*; workers: 0 is too small"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_its_fix(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ParametersError, match=message):
        check(given)


def test_a_dry_run_needs_no_videos_of_the_official_sets() -> None:
    assert check({"data": ["nowhere/ucf101"], "dry_run": True}).study().data == ("nowhere/ucf101",)
    with pytest.raises(ParametersError, match="no folder nowhere"):
        check({"data": ["nowhere"], "dry_run": True})


def test_what_will_be_fetched_need_not_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    asked = check({"data": ["data/ucf101", "own"], "fetch": True, "pose_weights": "pose"})
    assert asked.datasets_to_fetch == ["data/ucf101"] and asked.weights_to_fetch == ["pose"]
    assert asked.planned().pose_weights == "weights/body_pose_model.pth"  # not there yet, but the run will have it
    with pytest.raises(ConfigError, match="no such weights file"):
        asked.study()
    with pytest.raises(ParametersError, match=r"nowhere\.pth: no such weights file"):
        check({"data": ["own"], "fetch": True, "pose_weights": "nowhere.pth"})
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "body_pose_model.pth").write_bytes(b"")
    assert asked.study().pose_weights == asked.planned().pose_weights == "weights/body_pose_model.pth"
    assert check({"data": ["own"], "pose_weights": "pose"}).study().pose_weights == "weights/body_pose_model.pth"
    assert not check({"data": ["own"]}).datasets_to_fetch


def test_there_is_a_deployment_for_everything_and_each_is_valid() -> None:
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text("utf-8"))["deployments"]
    assert [of["name"] for of in deployments[:2]] == ["full-reproduction", "smoke"]
    wanted = set(QUESTIONS) - set(EXTRA_TABLES) | {"figure-3"}  # those are ours, not the paper's
    assert {of["name"] for of in deployments[2:]} >= wanted
    assert {of["entrypoint"] for of in deployments} == {"flows/reproduce.py:pasnet"}
    for of in deployments:
        asked = check({**of["parameters"], "dry_run": True})
        study = asked.planned()
        if study.preset == "full":  # starts where the paper does, or says why it cannot
            assert asked.weights_to_fetch == ["eco-lite-kinetics", "pose"]
        if of["name"] in QUESTIONS:
            assert study.tables == (of["name"],) and study.preset == "full"
            assert {Path(folder).name for folder in study.data} == {row.dataset for row in study.rows}
        if study.preset == "smoke":
            assert study.data == PRESETS["smoke"].data
        assert of["description"]
