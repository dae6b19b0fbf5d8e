"""`python -m flows`: the flow in this process, without a server, and the table at the end. `make smoke` is this."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pasnet.cli import call, overrides
from pasnet.study import EMBEDDED, Study, check_datasets


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows", description="Raw videos to results table.")
    parser.add_argument("--preset", default="smoke", help="smoke (minutes on a CPU) or full (the paper's size)")
    parser.add_argument(
        "--data", action="append", default=[], help="dataset folder, may be given again; default: synthetic"
    )
    parser.add_argument("--out", default="", help="default: runs/<preset>-<data>")
    parser.add_argument("--tables", nargs="*", default=[])
    parser.add_argument("--fusions", nargs="*", default=[])
    parser.add_argument("--splits", nargs="*", type=int, default=[1])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--num-segments", type=int)
    parser.add_argument("--eco-weights", default="")
    parser.add_argument("--pose-weights", default="")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="such as optim.epochs=2")
    return call(_run, parser.parse_args(argv))


def _run(arguments: argparse.Namespace) -> None:
    from shards import find_dataset, scan

    data = tuple(arguments.data) or (EMBEDDED,)
    name = "-".join(Path(source).name for source in data)
    study = Study(  # every mistake that can be found without work is found here, before Prefect starts
        data=data,
        out=arguments.out or f"runs/{arguments.preset}-{name}",
        preset=arguments.preset,
        tables=tuple(arguments.tables),
        fusions=tuple(arguments.fusions),
        splits=tuple(arguments.splits),
        seeds=tuple(arguments.seeds),
        num_segments=arguments.num_segments,
        eco_weights=arguments.eco_weights,
        pose_weights=arguments.pose_weights,
        overrides=overrides(arguments.set),
    )
    found = [scan(*find_dataset(Path(source))) for source in data if source != EMBEDDED]
    embedded = [(EMBEDDED, (1, 2, 3))] if EMBEDDED in data else []
    check_datasets(study, [*((dataset.name, dataset.usable_splits) for dataset in found), *embedded])

    os.environ.pop("PREFECT_API_URL", None)  # a server of the user's may not run; this door needs none
    home = os.environ.setdefault("PREFECT_HOME", str(Path("runs").absolute() / ".prefect"))
    Path(home).mkdir(parents=True, exist_ok=True)  # Prefect's server waits for ever for a folder that is not there
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")  # 20 is short on a busy machine
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")  # a failed task is reported by run_jobs, in a line
    os.environ.setdefault("DO_NOT_TRACK", "true")
    from flows.reproduce import pasnet
    from pasnet.report import summary_table

    started, began = time.perf_counter(), time.time()
    seconds = {}
    try:
        # the flow's parameters are the study's fields, with lists for tuples
        given = dataclasses.asdict(study).items()
        finished: Any = pasnet(**{name: list(value) if isinstance(value, tuple) else value for name, value in given})
        seconds = finished["seconds"]
    finally:  # a study with a failed row has a table too
        written = study.root / "results.json"
        if written.is_file() and written.stat().st_mtime >= began:
            print("\n" + summary_table(json.loads(written.read_text("utf-8"))["results"]))
    seconds["all, Prefect's start included"] = time.perf_counter() - started
    print("\nseconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    print(f"\nwhere to look next:\n  {study.root / 'RESULTS.md'}: this table in full, with what it is worth")
    print(f"  make serve RUN={study.root}: MLflow on http://127.0.0.1:5000, to compare the fusion styles")
    print(f"  {study.root / 'shards'}: shards for any other video model (shards/README.md)")


if __name__ == "__main__":
    sys.exit(main())
