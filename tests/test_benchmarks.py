"""docs/performance.md is what benchmarks/page.py makes of the JSON; nothing is measured here."""

from __future__ import annotations

import copy
import fcntl
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import model_speed, second_run, study, timed_study, train_loop
from benchmarks.harness import RESULTS
from benchmarks.page import PAGE, prose, render
from benchmarks.timed_study import OVER, Conductor, Task
from pasnet import execute
from pasnet import train as training
from pasnet.config import DataConfig, FusionConfig, ModelConfig, OptimConfig, TrainConfig
from pasnet.data import Loader, open_shards
from pasnet.execute import StudyError
from pasnet.machine import family
from pasnet.models import hopper
from pasnet.models.pasnet import PASNet, for_tensor_cores
from shards import find_dataset, scan

MODELS = {
    "date": "2026-12-01",
    "hardware": "Some(R) Graphics Processor 9000",
    "torch": "2.13.0",
    "python": "3.11.7",
    "threads": 2,
    "gmac_per_second_of_matmul": {"fp32": 50.0, "bf16": 400.0},
    "rounds": 3,
    "tables": {
        "agreement": [
            {"network": "A", "what": "logits", "form": "fp32", "error": 1.2e-06, "bound": 1e-4, "agrees": True},
            {"network": "A", "what": "logits", "form": "bf16", "error": 0.3, "bound": 2e-2, "agrees": False},
        ],
        "forward": [
            {
                **{"network": "PAS-Net", "style": "A", "num_segments": 8, "width": 1.0, "form": form, "batch": batch},
                **{"clips_per_second": speed, "utilisation": 1.25, "seconds": [1.0], "peak_mb": 1234.5},
            }
            for form, batch, speed in (("reference", 1, 0.5), ("fp32", 1, 1.0), ("fp32", 4, 1.5))
        ]
        + [{"network": "I3D", "not_run": "no such module"}],
        "styles": [{"style": "A", "width": 0.125, "form": "fp32", "times_faster": 1.75}],
        "training": [],
        "memory": [{"num_segments": 8, "gb": 2.5, "gb_checkpoint": 1.5, "gb_frozen": 0.5}],
    },
    "bounds": [
        {"bound": "fast fp32 faster", "measured": 1.4, "met": False},
        {"bound": "fast bf16 faster", "measured": None, "met": None},
    ],
    "not_run": {"bf16": "not in this processor's hardware"},
    "others_share_of_samples": {"median": 0.012, "ninth decile": 0.25},
    "load_before_and_after": [0.1, 0.2],
}


def change(folder: Path, name: str, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / name
    content = json.loads(path.read_text("utf-8"))
    edit(content)
    path.write_text(json.dumps(content), "utf-8")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RESULTS, tmp_path / "results"))


def test_the_page_is_what_the_json_says() -> None:
    assert PAGE.read_text("utf-8") == render(), "run python -m benchmarks page"


def test_lines_are_short_and_begin_nothing_by_accident() -> None:
    lines = render().splitlines()
    assert max(len(line) for line in lines if not line.startswith("|")) <= 120
    assert "nan" not in render() and "None" not in render()
    for width in range(105, 121):
        words = "x" * width
        for sign in (">= 2", "- 2", "3. at", "# 1"):
            assert all(line[:1] not in ">-#3" for line in prose(words, sign, "y").splitlines())


@pytest.mark.parametrize(
    ("measured", "met", "cell"),
    [(0.7, False, "0.7, **not met**"), (0.6, True, "0.6, met"), (None, None, "not measured")],
)
def test_verdicts_come_from_the_json(results: Path, measured: float | None, met: bool | None, cell: str) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["bounds"] = [{"bound": "ours <= 0.65x a peer", "measured": measured, "met": met}]

    for path in results.iterdir():
        if "amd-epyc" not in path.name:
            path.unlink()
    change(results, "shards-build-ucf101-amd-epyc.json", edit)
    assert f"| ours <= 0.65x a peer | {cell} |" in render(results).splitlines()


def test_a_column_for_every_machine(results: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        content |= {"cpu": "Acme(TM) Anvil Processor", "date": "2027-01-01", "commit": "abc1234"}
        content["tables"]["CPU per frame, one worker"].append({"peer": "a peer", "not_run": "not installed"})
        for row in content["tables"]["wall time of whole builds"]:
            if "2 workers" in row["peer"]:  # as a harness has it that does not see worker processes
                row |= {"others_share": 0.8, "cpu_ms_per_frame": 0.01}

    name = "shards-build-ucf101-acme-anvil.json"
    for path in results.iterdir():  # as the first measurements were
        change(results, path.name, lambda content: content.pop("commit", None))
    change(results, "shards-build-ucf101-amd-epyc.json", lambda content: content.update(date="2026-11-24"))
    shutil.copy(results / "shards-build-ucf101-intel-xeon.json", results / name)
    change(results, name, edit)
    page = render(results)
    assert page.count("| bound | AMD EPYC | Acme Anvil | Intel Xeon |") == 1
    assert "| commit | not recorded | abc1234 | not recorded |" in page
    assert "Not run: a peer (not installed)." in page
    # the EPYC's builds are older than worker processes; the harness did not see those of the Xeon
    assert "Building on AMD EPYC (2026-11-24): several workers of a build were threads" in " ".join(page.split())
    careful = {part.splitlines()[0]: "To be read with care" in part for part in page.split("### Building on ")[1:]}
    assert careful == {"AMD EPYC": False, "Acme Anvil": True, "Intel Xeon": False}


def test_networks(results: Path) -> None:
    for path in results.glob("model-speed*"):
        path.unlink()
    (results / "model-speed-gpu.json").write_text(json.dumps(MODELS), "utf-8")
    (results / "model-speed-cpu-quick.json").write_text(json.dumps({**MODELS, "hardware": "Quick"}), "utf-8")
    page = render(results)
    lines = page.splitlines()
    assert "### Networks on Some Graphics 9000" in lines and "Quick" not in page
    assert "| bound | Some Graphics 9000 |" in lines
    assert "| fast fp32 faster | 1.4, **not met** |" in lines and "| fast bf16 faster | not measured |" in lines
    assert "| PAS-Net, K = 8, batch 1 | 0.500 (125 %) | 1.00 (125 %) |" in lines
    assert "| PAS-Net, K = 8, batch 4 | – | 1.50 (125 %) |" in lines
    assert "| `A`, logits, bf16 | 0.3 | 0.02 | **no** |" in lines
    assert "Others used 1.2 % (median) and 25.0 % (ninth decile) of the machine" in " ".join(page.split())
    assert "Not run: I3D (no such module); bf16 (not in this processor's hardware)." in lines


def test_a_part_without_words_of_its_own(results: Path) -> None:
    content = json.loads((results / "shards-index-intel-xeon.json").read_text("utf-8"))
    content |= {
        "dataset": "ucf101",
        "what": "a step",
        "tables": {"steps": [{"peer": "a|b", "a_share": 0.25, "of": []}]},
    }
    content["bounds"] = [{"bound": "a step is short", "measured": 3.0, "met": False}]
    (results / "some-loop-ucf101-intel-xeon.json").write_text(json.dumps(content), "utf-8")
    lines = render(results).splitlines()
    assert "### some-loop on Intel Xeon" in lines and "| steps | a share |" in lines and "| a\\|b | 0.25 |" in lines
    assert "| a step is short | – | 3, **not met** |" in lines


def test_without_results_there_is_a_page(tmp_path: Path) -> None:
    assert render(tmp_path).startswith("# Performance\n")


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [("AMD EPYC", "amd-epyc"), ("Intel(R) Xeon(R) Processor", "intel-xeon"), ("AMD EPYC 7B13 64-Core", "amd-epyc")],
)
def test_family_names_a_file(cpu: str, expected: str) -> None:
    assert family(cpu) == expected


def test_the_loops_share_is_of_its_steps(shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    config = TrainConfig(
        model=ModelConfig(num_classes=3, fusion=FusionConfig(style="A"), width=0.0625, dropout=0),
        data=DataConfig(shards=str(shard_folder), num_segments=2, input_size=48, workers=0),
        optim=OptimConfig(epochs=train_loop.STARTING + 1, batch=4, micro_batch=2, schedule="constant"),
    )
    loader = Loader(open_shards(shard_folder), config.data, subset="train", batch=2, seed=0)
    clips = [(batch.clips.clone(), batch.labels) for batch in loader.epoch(0)]
    monkeypatch.setattr(train_loop, "bare", lambda *a: 1e9)  # the network alone takes no time
    found = train_loop.measure(config, clips, device, tmp_path / "out")
    assert 0 < found["share_outside_forward_and_backward"] < 1 and found["share_beside_the_network"] > 0.99
    assert len(found["shares_of_epochs"]) == train_loop.STARTING + 1
    slow = training._close
    monkeypatch.setattr(training, "_close", lambda *a, **named: time.sleep(0.5) or slow(*a, **named))
    longer = train_loop.measure(config, clips, device, tmp_path / "longer")
    assert longer["share_outside_forward_and_backward"] > 0.5  # passes of milliseconds, also on a busy machine


def test_what_a_study_costs_beside_its_work(tmp_path: Path) -> None:
    def ran(seconds: float, tasks: int, processes: int, stage: float, idle: float | None) -> dict[str, Any]:
        stages = {"training and evaluation": stage} | ({} if idle is None else {study.IDLE: idle})
        return {"seconds": seconds, "stages": stages, "tasks": tasks, "processes": processes}

    first = [ran(seconds, 60, 20, 300.0, idle) for seconds, idle in ((500.0, 30.0), (650.0, 10.0), (400.0, 20.0))]
    again = [ran(seconds, 40, 0, 5.0, None) for seconds in (31.0, 10.0, 20.0)]
    full = {"trainings": [{}] * 39, "totals": {"pflop": 40_000.0}}
    found = study.content(first, again, full)
    assert [row["seconds"] for row in found["tables"][study.STUDY]] == [500.0, 20.0, 280.0]
    measured = {line["bound"]: (line["measured"], line["met"]) for line in found["bounds"]}
    share = 78 * 1.0 / (40_000 / 989 * 1000)
    assert list(measured.values()) == [(500.0, True), (20.0, True), (0.5, True), (1.0, True), (round(share, 5), True)]
    late = study.content([ran(700.0, 60, 20, 300.0, 60.0)], [ran(100.0, 40, 0, 5.0, None)], full)
    assert [line["met"] for line in late["bounds"]] == [False, False, False, False, True]

    machine = {"cpu": "Some(R) Kind", "cores": 2, "memory_gib": 8, "system": "s", "python": "3", "ffmpeg": "7"}
    about = {"date": "2026-11-26", "rounds": 3, "load_before_and_after": [0, 1], "versions": {}}
    (tmp_path / "study-some-kind.json").write_text(json.dumps({**machine, **about, **found}))
    page = render(tmp_path)
    assert "| **ours, with nothing left to do** | 20.0 | 40 | 0 | – |" in page
    assert "has 78 processes; to conduct them takes 78.0 s" in " ".join(page.split())


def test_a_second_run_is_one_that_found_everything_done(tmp_path: Path) -> None:
    def ran(seconds: float, processes: int, packed: int = 0) -> dict[str, Any]:
        counts = {"tasks": 100, "packed": packed, "processes": processes}
        return {"seconds": seconds, "stages": {"videos": 2.0, "shards": 5.0}, **counts}

    first, again = ran(1200.0, 78, 32), [ran(seconds, 0) for seconds in (31.0, 20.0, 29.0)]
    found = second_run.content(first, again, 39, 0.5)
    table = {row["peer"]: row["seconds"] for row in found["tables"][second_run.AGAIN]}
    assert table == {"videos": 2.0, "shards": 5.0, "starting and ending": 22.0, second_run.WEIGHTS: 0.5, "all": 29.5}
    assert [(line["measured"], line["met"]) for line in found["bounds"]] == [(29.5, True), (0.29, True)]
    assert second_run.content(first, again[:1], 39, 0.5)["bounds"][0]["met"] is False
    for runs in ((ran(1.0, 76), again), (first, [ran(1.0, 2)]), (first, [*again, ran(20.0, 0, 1)])):
        with pytest.raises(RuntimeError, match="39 trainings are not done, and then left alone"):
            second_run.content(*runs, 39, 0.5)

    machine = {"cpu": "Some(R) Kind", "cores": 2, "memory_gib": 8, "system": "s", "python": "3", "ffmpeg": "7"}
    about = {"date": "2026-11-26", "rounds": 3, "load_before_and_after": [0, 1], "versions": {}}
    (tmp_path / "second-run-some-kind.json").write_text(json.dumps({**machine, **about, **found}))
    page = " ".join(render(tmp_path).split())
    assert (
        "39 trainings, 78 processes in 20.0 minutes; then, 3 times, 100 Prefect tasks in 31.0, 20.0 and 29.0 s" in page
    )
    assert "| all | 29.5 |" in page


@pytest.mark.parametrize("name", ["ucf101", "hmdb51"])
def test_the_second_runs_sets_pass_for_official_ones(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(second_run, "FRAMES", {name: 2})
    found = scan(*find_dataset(second_run.official(name, tmp_path)))  # which holds the lists against official counts
    assert found.name == name and not found.missing and found.usable_splits == (1, 2, 3)
    for split in found.splits:  # every class is in both subsets
        for subset in ("train", "test"):
            assert {video.label for video in found.videos if video.splits.get(split) == subset} == set(
                range(len(found.class_names))
            )


def test_prefects_tasks_are_counted(tmp_path: Path) -> None:
    assert study._tasks(tmp_path) == 0
    with sqlite3.connect(tmp_path / "prefect.db") as connection:
        connection.execute("create table task_run (name text)")
        connection.executemany("insert into task_run values (?)", [("pack shard-00000.tar",), ("train pose network",)])
    assert study._tasks(tmp_path) == 2 and study._tasks(tmp_path, "pack %") == 1


@pytest.mark.parametrize("wrong", [False, True])
def test_a_compiled_step_is_held_against_the_eager_one(wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def traced(of: torch.nn.Module, **_: object) -> Callable[[Tensor], Tensor]:
        return (lambda x: of(x).square()) if wrong else of

    monkeypatch.setattr(torch, "compile", traced)
    net = PASNet(ModelConfig(num_classes=5, width=0.0625, fusion=FusionConfig(style="A+E*A"))).train()
    step = model_speed.Step(net, torch.randint(0, 256, (2, 2, 3, 64, 64)), bf16=True, compile=True, times=2)
    step()
    times, off = step.compare()
    assert (times == pytest.approx(1) and off < 1e-5) != wrong and step.first_seconds > 0
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters() if p.requires_grad)


@pytest.mark.parametrize("wrong", ["", "forward", "backward"])
def test_without_kinks_gradients_agree_in_fp32(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(num_classes=5, width=0.0625, fusion=FusionConfig(style="A+pool(I)+pool(F)"), dropout=0.0)
    plain = PASNet(config).train()
    ours = for_tensor_cores(copy.deepcopy(plain))
    assert ours.pose is not None and ours.pose.merged
    ours.pose.turned = True
    if wrong == "forward":
        with torch.no_grad():
            ours.pose.conv3_2.weight[:, 0] *= 1.1
    elif wrong:
        backward = hopper._conv_backward

        def without_a_row(*of: Tensor) -> tuple[Tensor, Tensor]:
            of_x, of_weight = backward(*of)
            of_weight[:, :, 3] = 0
            return of_x, of_weight

        monkeypatch.setattr(hopper, "_conv_backward", without_a_row)
    generator = torch.Generator().manual_seed(0)
    clips = torch.randint(0, 256, (2, 2, 3, 64, 64), dtype=torch.uint8, generator=generator)
    for net in (plain, ours):  # in train() a bias before a batch norm has no gradient but rounding's
        net.eval()
    found = []
    with model_speed.Smooth():
        for net in (plain, ours):
            torch.nn.functional.cross_entropy(net(clips), torch.tensor([0, 1])).backward()
            found.append({name: p.grad.double() for name, p in net.named_parameters() if p.grad is not None})
    assert (model_speed._worst(found[1], found[0]) < 1e-4) != bool(wrong)


def test_smooth_is_a_relu_without_a_kink_and_an_average() -> None:
    x = torch.linspace(-3, 3, 601).reshape(1, 1, 1, 601)
    with model_speed.Smooth():
        found, pooled = torch.nn.functional.relu(x), torch.nn.functional.max_pool2d(x, (1, 3), stride=1)
    assert not torch.equal(found, x.relu()) and (found - x.relu()).abs().max() < 0.5
    assert torch.allclose(found[..., 0] + x[..., -1], found[..., -1], atol=1e-5)  # f(x) - f(-x) = x, as for ReLU
    assert found.diff().diff().abs().max() < 2e-4 < x.relu().diff().diff().abs().max()
    assert torch.allclose(pooled, x[..., 1:-1], atol=1e-6)
    assert torch.equal(torch.nn.functional.relu(x), x.relu())


def timed(name: str, rank: int, run: Callable[[], object], *after: str, kind: str = "any") -> Task:
    return Task(name=name, after=after, kind=kind, rank=(0, rank), run=run)


def test_what_is_wanted_most_runs_first_and_a_failure_stops_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASNET_TRAININGS", "1")
    ran: list[str] = []

    def fails() -> None:
        raise StudyError("out of memory")

    tasks = [
        timed("last", 3, lambda: ran.append("last")),
        timed("child", 0, lambda: ran.append("child"), "parent"),
        timed("parent", 2, lambda: ran.append("parent")),
        timed("orphan", 1, lambda: ran.append("orphan"), "broken"),
        timed("broken", 1, fails),
    ]
    conductor = Conductor(tasks, time.monotonic() + 60)
    assert conductor.run() == {"broken": "out of memory", "orphan": "not begun, since out of memory"}
    assert ran == ["parent", "child", "last"]


def test_what_an_earlier_call_has_done_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timed_study, "stop_all", lambda reason, patience: None)
    ran: list[str] = []
    tasks = [timed("old", 0, lambda: ran.append("old")), timed("new", 1, lambda: ran.append("new"), "old")]
    assert Conductor(tasks, time.monotonic() + 60, {"old"}).run() == {} and ran == ["new"]
    assert Conductor(tasks, time.monotonic(), {"old"}).run() == {"new": OVER}


def test_when_the_time_is_over_what_runs_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASNET_TRAININGS", "2")
    stop = threading.Event()
    monkeypatch.setattr(timed_study, "stop_all", lambda reason, patience: stop.set())

    def stopped() -> None:
        assert stop.wait(60)
        raise StudyError("it was sent SIGTERM")

    ends = time.monotonic() + 1.5
    tasks = [
        timed("quick", 0, lambda: time.sleep(0.6), kind="short"),
        timed("long", 1, stopped, kind="long"),
        timed("as long as quick", 2, lambda: None, "between", kind="short"),
        timed("between", 1, lambda: time.sleep(0.5), "quick"),
        timed("never begun", 3, lambda: None, "long"),
    ]
    found = Conductor(tasks, ends).run()
    assert found == {"long": OVER, "as long as quick": OVER, "never begun": OVER} and stop.is_set()


def test_what_does_not_end_when_asked_to_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "up\n"
    monkeypatch.setattr(execute, "_PROCESSES", {process})
    monkeypatch.setattr(execute, "_CLOSED", [])
    execute.stop_all("time is over", patience=0.3)
    assert process.wait(10) == -signal.SIGKILL
    with pytest.raises(StudyError, match="time is over"):
        execute._run(["--version"], tmp_path / "log", "one that comes late", execute.Slot(0, 0))


@pytest.mark.slow
def test_a_study_in_a_given_time(tmp_path: Path) -> None:
    """On a machine without Prefect and MLflow, as far as Python can tell."""
    script = "import runpy, sys\n"
    script += "sys.modules |= dict.fromkeys(('prefect', 'mlflow'))\n"  # to import them fails
    script += (
        "sys.argv = ['timed_study', *sys.argv[1:]]\nrunpy.run_module('benchmarks.timed_study', run_name='__main__')"
    )
    command = [sys.executable, "-c", script, "--preset", "tiny", "--seconds", "300", "--workers", "2"]
    command += ["--out", str(tmp_path / "study"), "--tar", str(tmp_path / "study.tar.gz")]
    environment = os.environ | {"PASNET_TRAININGS": "2"}
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    while not (begun := list((tmp_path / "study").glob("trainings/*/train.log"))) and first.poll() is None:
        time.sleep(0.05)
    first.terminate()
    assert begun and first.wait(60) == 143
    # its trainings have ended, too: their folders' locks are free
    with open(begun[0].parent / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "study" / "results.json").read_text("utf-8"))["results"]
    assert [row["status"] for row in results] == ["done", "done"]
    with tarfile.open(tmp_path / "study.tar.gz") as archive:
        names = archive.getnames()
    assert "study/results.json" in names and "study/RESULTS.md" in names
    assert not [name for name in names if name.endswith((".pt", ".avi", ".tar", ".safetensors"))]
