"""Opening the index of a dataset as large as UCF-101: 13,320 videos of 186 frames, in fresh processes."""

from __future__ import annotations

import itertools
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import bound
from shards.format import FORMAT_VERSION, INDEX_SCHEMA
from shards.pack import write_parquet

VIDEOS, FRAMES, CLASSES = 13_320, 186, 101
OPEN = """
import sys, time
from shards import open_shards
start = time.perf_counter(); shards = open_shards(sys.argv[1]); print(time.perf_counter() - start, len(shards))
"""


def write_index(folder: Path) -> None:
    """A finished shard folder without its tars: what `open_shards` reads is there."""
    draw = random.Random(0)
    records = []
    for number in range(VIDEOS):
        label = number * CLASSES // VIDEOS
        sizes = [draw.randrange(8_000, 32_000) for _ in range(FRAMES)]
        name, stem = f"Class{label:03d}", f"v_Class{label:03d}_g{number % 25:02d}_c{number:05d}"
        subset = ["train", "train", "test"]
        records.append(
            {
                "key": f"{name}/{stem}",
                "video": f"{name}/{stem}.avi",
                "class_name": name,
                "label": label,
                "group": f"g{number % 25:02d}",
                **{f"split{split}": subset[(number + split) % 3] for split in (1, 2, 3)},
                "shard": f"shard-{number % 180:05d}.tar",
                "offset": draw.randrange(256 << 20),
                "length": sum(sizes),
                "num_frames": FRAMES,
                "frame_offsets": [0, *itertools.accumulate(sizes)],
                "frame_crc32": [draw.getrandbits(32) for _ in range(FRAMES)],
                "fps": 25.0,
                "source_codec": "mpeg4",
                "source_width": 320,
                "source_height": 240,
                "source_frames": FRAMES,
                "source_bytes": draw.randrange(200_000, 900_000),
                "decode_errors": "",
                "sha256": f"{draw.getrandbits(256):064x}",
            }
        )
    folder.mkdir(parents=True)
    write_parquet(folder / "index.parquet", records, INDEX_SCHEMA, {"decode": "{}"})
    manifest = {
        "format": FORMAT_VERSION,
        "dataset": "synthetic index",
        "class_names": [f"Class{label:03d}" for label in range(CLASSES)],
        "decode": {"height": 256, "width": 340},
        "digest": "0" * 64,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")


def run(rounds: int, scratch: Path) -> dict[str, Any]:
    """Seconds of `open_shards` alone (imports are done before), median over processes."""
    write_index(scratch / "index")
    command = [sys.executable, "-c", OPEN, str(scratch / "index")]
    seconds = []
    for _ in range(max(rounds, 5) + 1):
        said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
        taken, count = said.stdout.split()
        assert int(count) == VIDEOS
        seconds.append(float(taken))
    median = round(statistics.median(seconds[1:]), 4)  # the first one compiles and warms the cache
    return {
        "what": f"open_shards on an index of {VIDEOS:,} videos with {FRAMES} frames each, seconds in new processes",
        "tables": {
            "open_shards": [
                {
                    "peer": "open_shards",
                    "wall_s": median,
                    "index_mb": round((scratch / "index" / "index.parquet").stat().st_size / 1e6, 1),
                    "wall_s_of_rounds": [round(value, 4) for value in seconds[1:]],
                }
            ]
        },
        "bounds": [bound("opening the index of 13,320 videos takes < 0.2 s", median, lambda value: value < 0.2)],
    }
