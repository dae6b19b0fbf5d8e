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

from flows.loopback import spare_loopback
from pasnet.cli import call, default_out, study_arguments, study_of
from pasnet.study import EMBEDDED_SETS, check_datasets, default_data


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m flows", description="Raw videos to results table.")
    study_arguments(parser, preset="smoke")
    parser.add_argument(
        "--fetch", action="store_true", help="download first: data folders named ucf101, hmdb51 or jhmdb"
    )
    parser.add_argument("--mirror", action="append", default=[], metavar="URL", help="asked first, as URL/FILE")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, as `pasnet plan`, and stop")
    return call(_run, parser.parse_args(argv))


def _run(arguments: argparse.Namespace) -> None:
    from shards import find_dataset, scan

    data = tuple(arguments.data) or default_data(arguments.preset)
    # every mistake that can be found without work is found here, before Prefect starts
    study = study_of(arguments, data=data, out=default_out(arguments.preset, data), coming=arguments.fetch)
    if arguments.dry_run:
        from pasnet.planning import lines, plan

        print("\n".join(lines(plan(study))))
        return
    if not arguments.fetch:
        found = [scan(*find_dataset(Path(source))) for source in data if source not in EMBEDDED_SETS]
        embedded = [(source, (1, 2, 3)) for source in data if source in EMBEDDED_SETS]
        check_datasets(study, [*((dataset.name, dataset.usable_splits) for dataset in found), *embedded])

    os.environ.pop("PREFECT_API_URL", None)  # a server of the user's may not run; this door needs none
    home = os.environ.setdefault("PREFECT_HOME", str(Path("runs").absolute() / ".prefect"))
    Path(home).mkdir(parents=True, exist_ok=True)  # Prefect's server waits for ever for a folder that is not there
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")  # 20 is short on a busy machine
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")  # a failed task is reported by run_jobs, in a line
    os.environ.setdefault("DO_NOT_TRACK", "true")
    spare_loopback()  # Prefect's own server is on this machine
    from flows.reproduce import pasnet
    from pasnet.report import summary_table

    started, began = time.perf_counter(), time.time()
    seconds = {}
    try:
        # the flow's parameters are the study's fields, with lists for tuples
        given = {**dataclasses.asdict(study), "fetch": arguments.fetch, "mirrors": arguments.mirror}
        given |= {name: getattr(arguments, name) for name in ("eco_weights", "pose_weights")}  # names are fetched
        del given["coming"]
        as_lists = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
        finished: Any = pasnet(**as_lists)
        seconds = finished["seconds"]
    finally:  # a study with a failed row has a table too
        written = study.root / "results.json"
        if written.is_file() and written.stat().st_mtime >= began:
            print("\n" + summary_table(json.loads(written.read_text("utf-8"))["results"]))
    seconds["all, Prefect's start included"] = time.perf_counter() - started
    print("\nseconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))
    print(f"\nwhere to look next:\n  {study.root / 'RESULTS.md'}: this table in full, with what it is worth")
    print(f"  make serve RUN={study.root}: MLflow on http://127.0.0.1:5000, to compare the fusion styles")
    print(f"  {study.root / 'shards'}: shards for any other video model (shards/README.md)")


if __name__ == "__main__":
    sys.exit(main())
