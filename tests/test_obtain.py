"""What the flow does about downloads and shards: again or not, shown or not, gone without or not. No network."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from test_caffe import public_tensors

from flows import gauge as gauge_module
from flows import obtain as obtain_module
from flows import prepare as prepare_module
from flows import rehearse as rehearse_module
from flows import reproduce as reproduce_module
from flows.loopback import spare_loopback
from flows.obtain import _may_pass, _Shown, fetch_dataset, fetch_weights, obtain
from flows.prepare import prepare
from flows.rehearse import rehearse, rehearse_weights
from flows.reproduce import packed, used_sets
from pasnet.config import ConfigError, PoseTrainConfig
from pasnet.execute import StudyError
from pasnet.registry import OPENPOSE
from pasnet.study import PoseJob, Shards, Study
from pasnet.weights import WeightsError, write
from shards import Dataset, find_dataset, scan
from shards.unpack import FetchError, UnreachableError


class Ended:
    """A state of Prefect's, or a future, that holds this value or error."""

    def __init__(self, value: Any = None) -> None:
        self.value, self.waited = value, False

    def wait(self) -> None:
        self.waited = True

    def result(self, raise_on_failure: bool = True) -> Any:
        if raise_on_failure and isinstance(self.value, BaseException):
            raise self.value
        return self.value


def caught(call: Callable[[], object]) -> BaseException:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


# Tried again


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (UnreachableError("a.rar: not downloaded"), True),
        (FetchError("a.rar: is a web page"), False),
        (WeightsError("a.pth: not to be had without a browser"), False),
        (ConnectionError("not one of the downloader's"), False),
        (None, False),
    ],
)
def test_only_a_server_that_did_not_answer_is_asked_again(error: Exception | None, passes: bool) -> None:
    assert _may_pass(None, None, Ended(error)) is passes


@pytest.mark.parametrize("kind", [UnreachableError, FetchError])
def test_the_hint_of_a_dataset_keeps_the_kind_of_error(kind: type[FetchError], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise kind("a.rar: gone; run again")

    monkeypatch.setattr(obtain_module, "fetch", fails)
    error = caught(lambda: fetch_dataset.fn("data/ucf101", ()))
    assert type(error) is kind
    assert str(error) == "a.rar: gone; run again; or take what is there, with fetch=false"
    assert _may_pass(None, None, Ended(error)) is (kind is UnreachableError)


def test_both_tasks_ask_that(monkeypatch: pytest.MonkeyPatch) -> None:
    for one in (fetch_dataset, fetch_weights):
        assert one.retry_condition_fn is _may_pass and one.retries == 2


def test_weights_share_a_folder_one_after_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inside, most = [0], [0]
    pause = threading.Event()

    def fetch(*_: object, **__: object) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        pause.wait(0.02)
        inside[0] -= 1
        return SimpleNamespace(lines=[])

    monkeypatch.setattr(obtain_module.download, "fetch", fetch)
    threads = [threading.Thread(target=fetch_weights.fn, args=(name, ())) for name in ("eco", "pose")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


# Gone without


def submitted(monkeypatch: pytest.MonkeyPatch, ends: dict[str, Exception | None]) -> dict[str, Ended]:
    """The two tasks replaced by ones that end so; what they gave out."""
    futures = {name: Ended(value) for name, value in ends.items()}
    for task in ("fetch_dataset", "fetch_weights"):
        monkeypatch.setattr(obtain_module, task, SimpleNamespace(submit=lambda name, mirrors: futures[name]))
    return futures


def test_datasets_that_could_not_be_fetched_are_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = {
        "data/ucf101": None,
        "data/hmdb51": UnreachableError("refused, 6 times"),
        "data/jhmdb": OSError(),
        "eco": None,
    }
    submitted(monkeypatch, ends)
    assert obtain(list(ends)[:3], ["eco"], ()) == {"data/hmdb51": "refused, 6 times", "data/jhmdb": "OSError"}
    assert obtain(["data/ucf101"], [], ()) == {}


def test_weights_that_could_not_be_fetched_raise_when_all_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = {"data/hmdb51": FetchError("gone"), "eco": None, "pose": WeightsError("wants a browser")}
    futures = submitted(monkeypatch, ends)
    with pytest.raises(WeightsError, match="wants a browser"):
        obtain(["data/hmdb51"], ["eco", "pose"], ())
    assert all(future.waited for future in futures.values())


def test_a_set_that_could_not_be_fetched_is_the_reason_why_nothing_runs() -> None:
    found = [cast(Dataset, SimpleNamespace(name="ucf101", usable_splits=(1, 2, 3)))]
    study = Study(tables=("table-5",), data=("data/ucf101",))
    with pytest.raises(StudyError, match=r"^hmdb51: not fetched: refused, 6 times$"):
        used_sets(study, found, {"hmdb51": "not fetched: refused, 6 times"})
    with pytest.raises(ConfigError, match="no row of table-5"):
        used_sets(study, found, {})


def test_embedded_sets_that_no_row_runs_on_are_not_made() -> None:
    both = ("synthetic", "synthetic-hmdb")
    assert used_sets(Study(tables=("table-2",), data=both), [], {}) == {"synthetic"}
    assert used_sets(Study(tables=("table-5",), data=both), [], {}) == {"synthetic-hmdb"}
    assert used_sets(Study(preset="smoke"), [], {}) == set(both)


def test_a_set_that_cannot_be_packed_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cast(Shards, SimpleNamespace(splits=(1, 3)))

    def prepare(study: Study, dataset: Dataset, workers: int) -> Shards:
        if dataset.name != "ucf101":
            raise OSError("no space left")
        return whole

    monkeypatch.setattr(reproduce_module, "prepare", prepare)
    found = [cast(Dataset, SimpleNamespace(name=name)) for name in ("hmdb51", "ucf101")]
    lost: dict[str, str] = {}
    assert packed(Study(), found, 2, lost) == [whole]
    assert lost == {"hmdb51": "not packed: no space left"}
    with pytest.raises(StudyError, match=r"^hmdb51: not packed: no space left$"):
        packed(Study(), found[:1], 2, {})
    with pytest.raises(
        StudyError, match=r"^ucf101: not packed: no train or no test video of split 2 could be decoded$"
    ):
        packed(Study(splits=(1, 2)), found[1:], 2, {})


def test_shards_that_are_finished_cost_no_task(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, artifacts: SimpleNamespace
) -> None:
    submitted: list[str] = []
    packing, indexing = prepare_module.pack.fn, prepare_module.index.fn

    def submit(plan: Any, folder: Path, settings: Any) -> Ended:
        submitted.append(plan.unquote().name)
        return Ended(packing(plan.unquote(), folder, settings))

    def index(dataset: Any, plans: Any, folder: Path, settings: Any, known: Any) -> Shards:
        return indexing(dataset.unquote(), plans.unquote(), folder, settings, known.unquote())

    monkeypatch.setattr(prepare_module, "pack", SimpleNamespace(submit=submit))
    monkeypatch.setattr(prepare_module, "index", index)
    study, dataset = Study(out=str(tmp_path)), scan(*find_dataset(videos))
    first = prepare(study, dataset, 5)
    names = [f"shard-{number:05d}.tar" for number in range(12)]
    assert submitted == names
    shown = [*artifacts.created, *artifacts.updated]
    assert shown[0] == 0 and shown[-1] == 100 and shown == sorted(shown) and len(set(shown)) > 5
    assert prepare(study, dataset, 5) == first and submitted == names
    (tmp_path / "shards" / "synthetic" / names[3]).unlink()
    assert prepare(study, dataset, 5) == first and submitted == [*names, names[3]]


# Rehearsed


@pytest.fixture
def made(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, artifacts: SimpleNamespace) -> Dataset:
    """An embedded set as it was generated, and the fetching task without Prefect."""
    monkeypatch.setattr(rehearse_module, "fetch_dataset", fetch_dataset.fn)
    return scan(*find_dataset(shutil.copytree(videos, tmp_path / "made")))


def test_a_rehearsal_brings_the_same_videos_past_any_proxy(made: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "_opener", None)  # it keeps the proxies that it first saw
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.delenv("no_proxy", raising=False)
    came = rehearse(made)
    assert came.name == made.name == "synthetic" and came.class_names == made.class_names and not came.missing
    assert came.folder != made.folder and came.lists != made.lists
    for ours, theirs in zip(came.videos, made.videos, strict=True):
        assert (ours.key, ours.label, ours.splits) == (theirs.key, theirs.label, theirs.splits)
        assert ours.path != theirs.path and ours.path.read_bytes() == theirs.path.read_bytes()
    assert "no_proxy" not in os.environ
    assert not list(made.folder.parent.glob("archives-*"))  # what was served


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"no_proxy": "example.org"}, "example.org"),
        ({"http_proxy": "http://proxy:3128"}, "127.0.0.1,localhost"),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "example.org"}, "example.org,127.0.0.1,localhost"),
        ({"http_proxy": "http://proxy:3128", "no_proxy": "*"}, "*"),
    ],
)
def test_this_machine_is_excepted_where_there_is_a_proxy(
    environment: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in os.environ:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.delenv("no_proxy")  # what the function sets is gone after the test
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    spare_loopback()
    assert os.environ.get("no_proxy") == expected


def test_a_rehearsal_is_held_once(made: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    came = rehearse(made)
    with monkeypatch.context() as patch:
        patch.setattr(rehearse_module, "served", lambda folder: pytest.fail("somebody is asked again"))
        assert rehearse(made) == came
        came.videos[0].path.unlink()
        with pytest.raises(FetchError, match=r"1 of 12 listed videos are not there.*delete .*/videos and run again"):
            rehearse(made)
    (made.folder.parent / "archives-of-a-killed-run").mkdir()
    record = made.folder.parent / "synth.json"
    record.write_text(record.read_text() + " ")  # other videos than those that were fetched
    again = rehearse(made)
    assert again.folder != came.folder and len(again.videos) == 12
    assert not came.folder.parent.exists() and not list(made.folder.parent.glob("archives-*"))


def test_a_machine_that_does_not_reach_itself_says_so(made: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise UnreachableError("a.zip: not downloaded (http://127.0.0.1:1/a.zip: refused); name another with --mirror")

    monkeypatch.setattr(obtain_module, "fetch", refused)
    with pytest.raises(FetchError, match=r"^synthetic: this machine .* itself: a\.zip: .*refused\); see to that, or"):
        rehearse(made)


@pytest.fixture
def pose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, artifacts: SimpleNamespace) -> PoseJob:
    """A finished training of our own pose network, which is to be rehearsed, and the fetching task without Prefect."""
    monkeypatch.setattr(rehearse_module, "fetch_weights", fetch_weights.fn)
    job = PoseJob(config=PoseTrainConfig(), shards="-", joints="-", folder=str(tmp_path / "pose"), rehearse=True)
    save_pose(job, public_tensors("pose"))
    return job


def save_pose(job: PoseJob, tensors: dict[str, torch.Tensor]) -> None:
    Path(job.folder).mkdir(exist_ok=True)
    origin: Any = {"source": ("us",), "source_sha256": ("0",), "licence": "ours", "preprocessing": OPENPOSE}
    Path(job.trained).unlink(missing_ok=True)
    write(Path(job.trained), tensors, kind="pose", **origin)


def test_a_pose_network_comes_as_public_weights_do(pose: PoseJob, capsys: pytest.CaptureFixture[str]) -> None:
    rehearse_weights(pose)
    came = Path(pose.weights)
    assert came != Path(pose.trained) and came.read_bytes() == Path(pose.trained).read_bytes()
    said = capsys.readouterr().out
    assert "pose.safetensors: downloading: 100 %" in said and f"{came}: OpenPose body network, COCO" in said
    stamp = came.stat().st_mtime_ns
    rehearse_weights(pose)  # checked, not fetched
    assert came.stat().st_mtime_ns == stamp and "100 %" not in capsys.readouterr().out
    save_pose(pose, {name: value + 1 for name, value in public_tensors("pose").items()})  # done anew
    rehearse_weights(pose)
    assert came.read_bytes() == Path(pose.trained).read_bytes()


def test_a_pose_network_that_does_not_come_says_why(pose: PoseJob, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise UnreachableError("pose.safetensors: not downloaded (refused); name another with --mirror")

    with monkeypatch.context() as patch:
        patch.setattr(obtain_module.download, "fetch", refused)
        with pytest.raises(
            FetchError, match=r"^pose network: this machine .* itself: pose.*\(refused\); see to that, or"
        ):
            rehearse_weights(pose)
    tensors = public_tensors("pose")
    del tensors["Mconv7_stage6_L2.weight"]
    save_pose(pose, tensors)
    with pytest.raises(WeightsError, match=r"not all of our own pose network: .*Mconv7_stage6_L2\.weight"):
        rehearse_weights(pose)
    assert not Path(pose.weights).exists()


# Shown


@pytest.fixture
def artifacts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What Prefect was asked to show; it answers while `away` is false."""
    asked = SimpleNamespace(created=[], updated=[], away=False)

    def create(percent: float, description: str) -> str:
        asked.created.append(percent)
        if asked.away:
            raise RuntimeError("503 Service Unavailable")
        return "id"

    def update(artifact: str, percent: float) -> None:
        assert artifact == "id"
        asked.updated.append(percent)
        if asked.away:
            raise RuntimeError("503 Service Unavailable")

    monkeypatch.setattr(gauge_module, "create_progress_artifact", create)
    monkeypatch.setattr(gauge_module, "update_progress_artifact", update)
    return asked


def test_every_hundredth_is_an_artifact_and_every_tenth_a_line(
    artifacts: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = itertools.count()  # between one call and the next
    shown = _Shown("ucf101", lambda: float(next(seconds)))
    for done in range(1001):
        shown("a.rar: downloading", done, 1000)
    assert artifacts.created == [0] and artifacts.updated == list(range(1, 101))
    assert capsys.readouterr().out.splitlines() == [f"  a.rar: downloading: {p} %" for p in range(0, 101, 10)]
    shown("b.rar: downloading", 5, None)  # of a length that nobody knows
    assert artifacts.updated[-1] == 0


def test_what_is_over_in_a_moment_has_two_lines_a_step(
    artifacts: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = _Shown("ucf101", lambda: 0.0)
    for what in ("downloading", "checking"):
        for done in range(1001):
            shown(f"a.zip: {what}", done, 1000)
    shown("a.zip: unpacking", 0, 7)  # which says no more until it has ended
    assert artifacts.created == [0] and artifacts.updated == [100, 0, 100, 0]
    shown("a.zip: unpacking", 7, 7)
    said = capsys.readouterr().out.splitlines()
    assert said == [f"  a.zip: {what}: {p} %" for what in ("downloading", "checking", "unpacking") for p in (0, 100)]


def test_a_server_of_prefects_that_fails_stops_no_download(
    artifacts: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = itertools.count(0, 2)
    shown = _Shown("ucf101", lambda: float(next(seconds)))
    artifacts.away = True
    for percent in range(35):
        shown("a.rar: downloading", percent, 100)
    assert artifacts.created == [0, 10, 20, 30] and artifacts.updated == []  # not asked at every step
    artifacts.away = False
    for percent in range(35, 43):
        shown("a.rar: downloading", percent, 100)
    assert artifacts.created[4:] == [40] and artifacts.updated == [41, 42]  # it is back
    artifacts.away = True
    for percent in range(43, 101):
        shown("a.rar: downloading", percent, 100)
    assert artifacts.updated[2:] == [43, 50, 60, 70, 80, 90, 100]
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.endswith("%")] == [f"  a.rar: downloading: {p} %" for p in range(0, 101, 10)]
    other = [line for line in said if not line.endswith("%")]
    assert other == ["  ucf101: fetched: Prefect does not show it (RuntimeError: 503 Service Unavailable)"] * 2
