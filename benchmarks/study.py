"""What the whole study costs beside its work: `make smoke` from nothing, and once more with nothing left to do.

Each round is the product's own command with a Prefect home of its own, one training at a time. The commands that it
starts (training, evaluation) are the peer: the time in which none of them runs is what it costs to conduct them. Where
nothing is left to do, all of the time is the conductor's, Python's and Prefect's start included, and is told per task.
The share of a full reproduction is an estimate of its training stage: its processes (`pasnet plan`) at that cost,
against the time in which a GPU would do their multiplications at PEAK; on any real one the share is smaller.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import bound
from pasnet.execute import IDLE

STUDY = "a study on two small sets"
REPORT = "tracking and report"  # the last stage
PEAK = 989e12  # FLOP/s of dense bf16 products that NVIDIA's data sheet gives an H100 SXM; no training comes near


def flow(scratch: Path, *arguments: str, trainings: int = 1) -> dict[str, Any]:
    """One run of a study, into scratch/out: seconds by the clock, and by stage; how many tasks Prefect ran, of which
    packed a shard, and processes we started."""
    home = scratch / "prefect"
    home.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "PREFECT_HOME": str(home), "PASNET_LOCKS": str(scratch), "PASNET_TRAININGS": str(trainings)}
    for server in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):  # not the user's own
        env.pop(server, None)
    before, packed = _tasks(home), _tasks(home, "pack %")
    command = [sys.executable, "-m", "flows", *arguments, "--out", str(scratch / "out")]
    started = time.perf_counter()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout[-1000:]} {done.stderr[-2000:]}")
    if not (tasks := _tasks(home) - before):
        raise RuntimeError(f"{home}: Prefect has no task of that run on record")
    stages = json.loads((scratch / "out" / "results.json").read_text("utf-8"))["seconds"]
    if last := re.search(rf"^seconds: .*\b{REPORT} ([\d.]+)", done.stdout, re.M):  # it writes results.json itself
        stages[REPORT] = float(last[1])
    said = [line for line in done.stdout.splitlines() if " processes started; " in line]
    processes = int(said[0].split()[0]) if said else 0
    packed = _tasks(home, "pack %") - packed
    return {"seconds": seconds, "stages": stages, "tasks": tasks, "packed": packed, "processes": processes}


def _tasks(home: Path, names: str = "%") -> int:
    """Task runs that Prefect has on record, of those names."""
    database = home / "prefect.db"
    if not database.is_file():
        return 0
    with sqlite3.connect(database) as connection:
        return int(connection.execute("select count(*) from task_run where name like ?", (names,)).fetchone()[0])


def run(rounds: int, scratch: Path) -> dict[str, Any]:
    """Every round from nothing, and again; medians."""
    from pasnet.planning import plan
    from pasnet.study import Study

    first, again = [], []
    for number in range(rounds):
        folder = scratch / str(number)
        first.append(flow(folder, "--preset", "smoke"))
        again.append(flow(folder, "--preset", "smoke"))
        print(f"  round {number + 1}: {first[-1]['seconds']:.0f} s, again {again[-1]['seconds']:.1f} s", flush=True)
    official = (str(scratch / "ucf101"), str(scratch / "hmdb51"))  # not there: the official counts
    return content(first, again, plan(Study(data=official, out=str(scratch / "full"))))


def content(first: list[dict[str, Any]], again: list[dict[str, Any]], full: dict[str, Any]) -> dict[str, Any]:
    """Tables and bounds of runs as of `flow`, and of the plan of a full reproduction."""
    rows = []
    for name, of in (("ours, from nothing", first), ("ours, with nothing left to do", again)):
        idle = [one["stages"].get(IDLE) for one in of]
        rows.append(
            {
                "peer": name,
                "seconds": _median([one["seconds"] for one in of]),
                "prefect_tasks": round(statistics.median(one["tasks"] for one in of)),
                "processes": round(statistics.median(one["processes"] for one in of)),
                "conducting_seconds": None if None in idle else _median(idle),
                "rounds_seconds": [round(one["seconds"], 1) for one in of],
            }
        )
    working = [one["stages"]["training and evaluation"] - one["stages"][IDLE] for one in first]
    rows.append({"peer": "its training and evaluation commands", "seconds": _median(working)})
    each = statistics.median(one["stages"][IDLE] / one["processes"] for one in first)
    task = statistics.median(one["seconds"] / one["tasks"] for one in again)
    processes = 2 * len(full["trainings"])  # each with its evaluation
    share = processes * each / (full["totals"]["pflop"] * 1e15 / PEAK)
    return {
        "what": "`python -m flows --preset smoke`, each round into a folder and a Prefect home of its own",
        "tables": {STUDY: rows},
        "full": {
            "processes": processes,
            "pflop": full["totals"]["pflop"],
            "conducting_seconds": round(processes * each, 1),
        },
        "bounds": [
            bound("smoke, from nothing, <= 600 s", rows[0]["seconds"], lambda seconds: seconds <= 600),
            bound("a study with nothing left to do <= 30 s", rows[1]["seconds"], lambda seconds: seconds <= 30),
            bound("of that, per Prefect task < 2 s", round(task, 2), lambda seconds: seconds < 2),
            bound("conducting a process of the study < 2 s", round(each, 2), lambda seconds: seconds < 2),
            bound("conducting, of a full reproduction at an H100's peak < 1 %", round(share, 5), lambda of: of < 0.01),
        ],
    }


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 1)
