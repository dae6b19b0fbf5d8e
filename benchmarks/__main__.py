"""`python -m benchmarks [build|read|index|loop|study|again|all]`: data path, training loop, conductor; JSON and tables.

`python -m benchmarks models ...` is benchmarks/model_speed.py, the networks; that file runs alone, too.
`python -m benchmarks page` writes docs/performance.md from the JSON that is there.
`python -m benchmarks.timed_study ...` is no measurement: a study, as far as a given time allows.

Peers need benchmarks/requirements.txt; those that are not installed are listed as not run. Without --data the videos
are generated. "study" and "again" are not among "all": they are the product as it is installed, Prefect and MLflow
included.
"""

from __future__ import annotations

import argparse
import datetime
import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as pasnet/cli.py does for trainings; before torch is loaded

import sys
from pathlib import Path
from typing import Any

from benchmarks import harness
from pasnet.machine import family
from pasnet.provenance import commit
from shards import find_dataset

ALL = ("build", "read", "index", "loop")
PARTS = (*ALL, "study", "again")


def main() -> None:
    """Runs the parts asked for and writes a JSON file for each."""
    if sys.argv[1:2] == ["models"]:
        from benchmarks import model_speed

        model_speed.main(sys.argv[2:])
    if sys.argv[1:] == ["page"]:
        from benchmarks import page

        page.write()
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="speed of the data path against peers")
    parser.epilog = "models: the networks, see models --help; page: docs/performance.md from the JSON that is there"
    parser.add_argument("part", nargs="?", help="all: all but study and again", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--data", type=Path, help="dataset folder; default: generated videos")
    parser.add_argument("--videos", type=int, default=24, help="how many of them (evenly spread); 0: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ffmpeg", default="bundled", help="bundled (imageio-ffmpeg's), path (PATH's own), or a file")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the JSON files")
    arguments = parser.parse_args()
    if arguments.data is not None:
        arguments.data = arguments.data.absolute()
    with harness.scratch_folder() as scratch:
        harness.use_ffmpeg(arguments.ffmpeg, scratch / "bin")
        parts = ALL if arguments.part == "all" else (arguments.part,)
        for part in parts:
            content, name = run(part, arguments, scratch / part)
            harness.report(content, arguments.out / f"{name}.json")


def run(part: str, arguments: argparse.Namespace, scratch: Path) -> tuple[dict[str, Any], str]:
    """Results of one part with the machine that they come from, and the name of their file."""
    scratch.mkdir()
    load = os.getloadavg()[0]
    head = {"date": datetime.date.today().isoformat(), "commit": commit(), "rounds": arguments.rounds}
    head |= harness.machine()
    if part == "index":
        from benchmarks import shards_index

        content = shards_index.run(arguments.rounds, scratch)
        name = "shards-index"
    elif part == "study":
        from benchmarks import study

        content = study.run(arguments.rounds, scratch)
        name = "study"
    elif part == "again":
        from benchmarks import second_run

        content = second_run.run(arguments.rounds, scratch)
        name = "second-run"
    else:
        dataset = harness.videos(arguments.data, arguments.videos, scratch)
        folder = arguments.data or scratch / "synthetic"
        set_name = find_dataset(folder)[0] if arguments.data else "synthetic"
        if part == "build":
            from benchmarks import shards_build

            content = shards_build.run(folder, dataset, arguments.rounds, scratch, all_videos=0)
        elif part == "read":
            from benchmarks import shards_read

            content = shards_read.run(dataset, arguments.rounds, scratch)
        else:
            from benchmarks import train_loop

            content = train_loop.run(dataset, arguments.rounds, scratch)
        name = f"train-loop-{set_name}" if part == "loop" else f"shards-{part}-{set_name}"
        head["dataset"] = set_name
    name += f"-{family(head['cpu'])}"
    return {**head, "load_before_and_after": [round(load, 2), round(os.getloadavg()[0], 2)], **content}, name


if __name__ == "__main__":
    main()
