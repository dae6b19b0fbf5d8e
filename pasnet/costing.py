"""What the paper's rows cost: counted by pasnet/models/cost.py, and as fast as the benchmark measured them here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pasnet.config import FusionConfig, ModelConfig
from pasnet.experiments import Row
from pasnet.machine import hardware
from pasnet.models.cost import cost

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"  # of a checkout; elsewhere it is not there
CLASSES = {"ucf101": 101, "hmdb51": 51}


def measured_speeds(folder: Path = RESULTS, on: str | None = None) -> list[dict[str, Any]]:
    """What every model-speed*.json in `folder` from this kind of hardware has on forward passes of PAS-Net's styles."""
    on = hardware() if on is None else on
    found: list[dict[str, Any]] = []
    for path in sorted(folder.glob("model-speed*.json")):
        content = json.loads(path.read_text("utf-8"))
        if content["hardware"] == on:
            rows = [*content["tables"]["forward"], *content["tables"].get("styles", ())]
            found += [row for row in rows if "clips_per_second" in row]
    return found


def cost_rows(rows: Iterable[Row], speeds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One dictionary per row of the paper, ready for JSON. An ensemble's networks add up, except that they are trained
    one after the other: its memory is the largest. `clips_per_second` is the best batch's in evaluation, by precision;
    empty where no benchmark on this hardware has the network."""
    found = []
    for row in rows:
        config = ModelConfig(num_classes=CLASSES[row.dataset], fusion=FusionConfig(style=row.fusion))
        costs = [cost(config, k) for k in row.num_segments]
        by_k = [_speeds_of(row.fusion, k, speeds) for k in row.num_segments]
        forms = set(by_k[0]).intersection(*by_k[1:])
        found.append(
            {
                "name": row.name,
                "table": row.table,
                "dataset": row.dataset,
                "title": row.title,
                "strategy": row.strategy,
                "num_segments": list(row.num_segments),
                "parameters": sum(each.parameters for each in costs),
                "gmacs": round(sum(each.gmacs for each in costs), 3),
                "activation_bytes_per_clip": max(each.activation_bytes for each in costs),
                "activation_bytes_per_clip_checkpoint_pose": max(each.checkpointed_bytes for each in costs),
                "activation_bytes_per_clip_freeze_pose": max(each.frozen_bytes for each in costs),
                # an ensemble looks at a clip with every network in turn
                "clips_per_second": {form: round(1 / sum(1 / of[form] for of in by_k), 3) for form in sorted(forms)},
            }
        )
    return found


def cost_line(row: Mapping[str, Any]) -> str:
    """A row of `cost_rows` for a terminal."""
    k = ",".join(map(str, row["num_segments"]))
    gb = [f"{row[f'activation_bytes_per_clip{kind}'] / 1e9:.2f}" for kind in ("", "_checkpoint_pose", "_freeze_pose")]
    speed = ", ".join(f"{value:.2f} {form}" for form, value in row["clips_per_second"].items()) or "not measured"
    return (
        f"{row['table']:9} {row['dataset']:7} {row['title']:42} {row['strategy']:15} K={k:15}"
        f"{row['parameters'] / 1e6:7.2f} M {row['gmacs']:8.1f} GMACs  {' / '.join(gb)} GB  {speed}"
    )


def _speeds_of(fusion: str, k: int, speeds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Clips per second of the paper's network by form ("fp32", "bf16"), each with its best batch."""
    best: dict[str, float] = {}
    for row in speeds:
        if (row["style"], row["num_segments"], row["width"]) == (fusion, k, 1.0) and row["form"] != "reference":
            best[row["form"]] = max(best.get(row["form"], 0.0), row["clips_per_second"])
    return best
