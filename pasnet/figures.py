"""The study's pictures, drawn from its records alone: fusion styles as bars, Fig. 2, training curves, and Fig. 3 from
the trained network of a record."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pasnet.charts import OURS, PAPER, Bar, Drawing, Series, bars, curves, grid, points
from pasnet.summary import summaries

if TYPE_CHECKING:
    from pasnet.models.pasnet import PASNet

Record = dict[str, Any]
Shown = tuple[str, str, int, np.ndarray, np.ndarray, np.ndarray]  # key, class, frame, picture, map before, map after
CLIPS = 4  # of Fig. 3
SIDE = 224  # pixels of a frame in it
VERSION = 1  # of the picture: raise it with every change of what is drawn
NO_POSE = ("A", "A+1*1conv")  # styles without a pose network
# black to red to yellow to white, as heat maps are usually drawn; the colour at 0 is not seen, see `_overlay`
HEAT = np.array([[60, 0, 90], [214, 40, 40], [250, 170, 30], [255, 250, 210]], float)


def ours_of(records: Sequence[Record]) -> dict[str, Any] | None:
    """Our number of one row, from its records over splits and seeds: {"top1", "low", "high", "what"}; None where no run
    is done. One run has its bootstrap interval; several have the mean, plus and minus the standard deviation."""
    done = [record for record in records if record["status"] == "done"]
    if not done:
        return None
    whole = [of for of in summaries(records) if of["status"] == "done"]
    if len(done) == 1 or not whole:
        first = done[0]
        what = f"split {first['split']}, seed {first['seed']}; 95 % interval over test videos"
        return {"top1": first["top1"], "low": first["top1_low"], "high": first["top1_high"], "what": what}
    of = whole[-1]  # the mean over splits comes after split 1 alone
    mean, sd = of["mean"]["top1"], of["sd"]["top1"]
    return {
        "top1": mean,
        "low": None if sd is None else mean - sd,
        "high": None if sd is None else mean + sd,
        "what": f"mean of {of['runs']} runs" + ("" if sd is None else f", standard deviation over {of['sd_over']}"),
    }


def by_row(records: Sequence[Record]) -> dict[tuple[str, ...], list[Record]]:
    """The records of each row of the paper, over splits and seeds."""
    found: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        row = (record["table"], record["title"], record["strategy"], record["paper_dataset"])
        found.setdefault(row, []).append(record)
    return found


def comparable(records: Sequence[Record]) -> Sequence[Record]:
    """The records of one table that may stand in one drawing: all, unless some row with a result lacks the mean over
    splits that others have, as when a training of split 2 failed; then those of the split with most results. A row
    that has no record there is not run."""
    rows = by_row(records).values()
    splits = sorted({record["split"] for record in records})

    def done(of: Sequence[Record]) -> bool:
        return any(record["status"] == "done" for record in of)

    def whole(of: Sequence[Record]) -> bool:
        return any(mean["splits"] == splits and mean["status"] == "done" for mean in summaries(of))

    if len(splits) < 2 or all(whole(of) for of in rows if done(of)):
        return records

    def at(of: Sequence[Record], split: int) -> list[Record]:
        return [record for record in of if record["split"] == split]

    alone = max(splits, key=lambda split: (sum(done(at(of, split)) for of in rows), -split))
    missing = {"split": alone, "status": "not run", "reason": f"split {alone} was not asked for"}
    return [record for of in rows for record in at(of, alone) or [{**of[0], **missing}]]


def row_bars(records: Sequence[Record]) -> Drawing:
    """The rows of one table as bars: the paper's number and ours."""
    labels, items = _labels(records), []
    for row, of in by_row(comparable(records)).items():
        ours = ours_of(of)
        problem = of[0]["status"] if ours is None else ""
        items.append(
            Bar(
                label=labels[row],
                paper=of[0]["paper_top1"],
                ours=ours["top1"] if ours else None,
                low=ours["low"] if ours else None,
                high=ours["high"] if ours else None,
                note=problem,
            )
        )
    return bars("Top-1 accuracy, the paper beside ours", items)


def _labels(records: Sequence[Record]) -> dict[tuple[str, ...], str]:
    """A short name for each row: its title, and its strategy and dataset where the rows differ in them."""
    datasets = {record["paper_dataset"] for record in records}
    strategies = {record["strategy"] for record in records if record["fusion"] != "A"}
    return {
        row: row[1] + (f", {row[2]}" if len(strategies) > 1 else "") + (f", {row[3]}" if len(datasets) > 1 else "")
        for row in by_row(records)
    }


def figure_2(records: Sequence[Record]) -> list[Drawing]:
    """Accuracy over K, a drawing per dataset: the paper's printed points and ours. K without a printed value has ours
    alone."""
    drawings, records = [], comparable(records)
    for dataset in dict.fromkeys(record["paper_dataset"] for record in records):
        paper, ours = [], []
        rows = by_row([record for record in records if record["paper_dataset"] == dataset])
        ran_on = dict.fromkeys(r["dataset"] for of in rows.values() for r in of if r["status"] == "done")
        for of in rows.values():
            k = _k_of(of[0])
            if of[0]["paper_top1"] is not None:
                paper.append((k, of[0]["paper_top1"], None, None))
            if (found := ours_of(of)) is not None:
                ours.append((k, found["top1"], found["low"], found["high"]))
        title = f"Fig. 2, {dataset}" + "".join(f"; ours on {name}" for name in ran_on if name != dataset)
        series = [Series(name="paper, printed values", points=paper, colour=PAPER, hollow=True)]
        if ours:
            series.append(Series(name="ours", points=ours, colour=OURS))
        ticks = sorted({_k_of(of[0]) for of in rows.values()})
        drawings.append(points(title, series, x_label="segments K", y_label="top-1, %", ticks=ticks))
    return drawings


def training_curves(records: Sequence[Record]) -> list[Drawing]:
    """A panel per row with one network: accuracy on training and test clips over the epochs, of its first run."""
    labels, drawings = _labels(records), []
    for row, of in by_row(records).items():
        done = [record for record in of if record["status"] == "done" and record.get("history")]
        if not done:
            continue
        series = []
        for name, key, colour, hollow in (("train", "train_top1", PAPER, True), ("test", "test_top1", OURS, False)):
            values = [(h["epoch"], h[key], None, None) for h in done[0]["history"] if h.get(key) is not None]
            series.append(Series(name=name, points=values, colour=colour, hollow=hollow, dots=False))
        drawings.append(curves(labels[row], series))
    return drawings


def pictures_of_table(records: Sequence[Record]) -> dict[str, str]:
    """{file name: SVG} for the MLflow run of a table: its bars, its training curves and, of figure-2, its points."""
    found = {"bars.svg": row_bars(records).svg(alone=True)}
    if panels := training_curves(records):
        found["training-curves.svg"] = grid("Training curves", panels).svg(alone=True)
    if records and records[0]["table"] == "figure-2":
        found["figure-2.svg"] = grid("Fig. 2", figure_2(records)).svg(alone=True)
    return found


def pasnet_of_figure_3(records: Sequence[Record]) -> Record | None:
    """The finished run whose pose network is drawn: one network with a pose in it, of a style that reads the heat maps
    if there is one (the others do not train their last layer); of those the highest top-1, of equal ones the first."""
    from pasnet.models.fusion import READS

    usable = [
        record
        for record in records
        if record["status"] == "done" and record["fusion"] not in NO_POSE and len(record["trainings"]) == 1
    ]
    reads = [record for record in usable if "E" in READS[record["fusion"]]]
    return max(reads or usable, key=lambda record: record["top1"], default=None)


def figure_3(record: Record, out: Path) -> dict[str, Any]:
    """Heat maps of a record's pose network before and after its training, written into `out` as figure-3.png, with what
    it shows in figure-3.json, which is returned. Nothing is drawn again for the same training."""
    folder = Path(record["trainings"][0])
    about = {"training": folder.name, "shards": record["shard_digest"], "version": VERSION}
    noted = out / "figure-3.json"
    if noted.is_file() and (out / "figure-3.png").is_file():
        before: dict[str, Any] = json.loads(noted.read_text("utf-8"))
        if all(before.get(name) == value for name, value in about.items()):
            return before
    out.mkdir(parents=True, exist_ok=True)
    drawn = heat_maps(folder / "last.pt", Path(record["shards"]), out / "figure-3.png")
    names = ("title", "strategy", "dataset", "split", "seed")
    found = {**about, **{name: record[name] for name in names}, **drawn, "picture": "figure-3.png"}
    noted.write_text(json.dumps(found, indent=1), "utf-8")
    return found


def heat_maps(checkpoint: Path, shards_folder: Path, out: Path, keys: Sequence[str] = ()) -> dict[str, Any]:
    """A picture of E, the strongest keypoint at each position: frame, original pose network, tuned one, side by side.

    `keys` names test clips, else one each of CLIPS classes; the frame is that of the middle segment. The original is
    what the training started from, built and loaded again as the training did. Raises WeightsError, ShardError, and
    ValueError for a network without a pose or a key that is no test clip.
    """
    import torch

    from pasnet.checkpoints import load_initial, model_of, read_own_checkpoint
    from pasnet.data import ClipDataset, open_shards
    from pasnet.models.pasnet import build

    shards = open_shards(shards_folder)
    tuned, config = model_of(read_own_checkpoint(checkpoint, None, shards))
    if tuned.pose is None:
        raise ValueError(f"{checkpoint}: fusion {config.model.fusion.style} has no pose network; give one that has")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # as the training does: a random start is that very start
        original = build(config.model)
        load_initial(original, config, shards)
    rows = shards.select(config.data.split, "test")
    chosen = _test_rows(rows, shards.keys, shards.labels, keys)
    clips = ClipDataset(shards, config.data, train=False, seed=0)
    middle = config.data.num_segments // 2
    shown: list[Shown] = []
    for row in chosen:
        frames, label, _, indices = clips[0, row]
        frame = frames[middle : middle + 1]  # one frame: pose is read frame by frame
        picture = np.ascontiguousarray(frame[0].permute(1, 2, 0).numpy())
        before, after = (_explicit(net, frame[None]) for net in (original, tuned))
        shown.append((shards.keys[row], shards.class_names[label], int(indices[middle]), picture, before, after))
    pose = config.init.pose
    start = f"loaded from {Path(pose).name}" if pose else "a random start: no pose weights were given"
    if not pose and config.init.pretrained:
        start = f"that of {Path(config.init.pretrained).name}, trained on another dataset"
    _draw(shown, out)
    read = tuned.fusion.needs_heatmap
    return {
        "clips": [key for key, *_ in shown],
        "original": start,
        "last_layer": ""
        if read
        else "this style reads I and not the heat maps, whose last layer is the original's in both",
    }


def _explicit(net: PASNet, clip: Any) -> np.ndarray:
    """E of a clip of one frame (1,1,3,H,W) -> (h,w)."""
    import torch

    net.eval()
    with torch.inference_mode():
        found: np.ndarray = net.features(clip, maps=True)["heatmaps"][0, 0, :18].amax(0).float().numpy()
    return found


def _test_rows(rows: np.ndarray, keys: Sequence[str], labels: np.ndarray, wanted: Sequence[str]) -> list[int]:
    """The rows of named test clips, or the first one of each of some evenly spaced classes."""
    if wanted:
        of = {keys[row]: int(row) for row in rows}
        absent = [key for key in wanted if key not in of]
        if absent:
            raise ValueError(f"{absent[0]} is no test clip of this split; it has such as {keys[rows[0]]}")
        return [of[key] for key in wanted]
    first: dict[int, int] = {}
    for row in rows.tolist():
        first.setdefault(int(labels[row]), row)
    ordered = [first[label] for label in sorted(first)]
    places = np.unique(np.linspace(0, len(ordered) - 1, min(CLIPS, len(ordered))).round().astype(int))
    return [ordered[place] for place in places]


def _draw(shown: Sequence[Shown], out: Path) -> None:
    gap, head, under = 8, 30, 42
    text, small = ImageFont.load_default(15), ImageFont.load_default(12)
    sheet = Image.new("RGB", (3 * SIDE + 4 * gap, head + len(shown) * (SIDE + under) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(("frame", "original pose network", "tuned pose network")):
        pen.text((gap + column * (SIDE + gap), 8), title, fill=(20, 20, 20), font=text)
    for line, (key, label, index, frame, *maps) in enumerate(shown):
        top = head + line * (SIDE + under)
        picture = Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        sheet.paste(picture, (gap, top))
        name = key.rsplit("/", 1)[-1]
        pen.text((gap, top + SIDE + 4), _fitting(f"{label}, frame {index}", small), fill=(20, 20, 20), font=small)
        pen.text((gap, top + SIDE + 20), _fitting(name, small), fill=(90, 90, 90), font=small)
        for column, heat in enumerate(maps, 1):
            left = gap + column * (SIDE + gap)
            sheet.paste(_overlay(picture, heat), (left, top))
            pen.text((left, top + SIDE + 4), f"strongest {heat.max():.3g}", fill=(20, 20, 20), font=small)
    sheet.save(out)


def _overlay(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """The frame in grey under the map, which is scaled to its own maximum: 0 and below is the frame alone."""
    strength = np.maximum(heat, 0) / max(float(heat.max()), 1e-12)
    large = Image.fromarray(strength.astype(np.float32)).resize(picture.size, Image.Resampling.BILINEAR)
    share = np.asarray(large)[..., None]
    colours = np.stack([np.interp(share[..., 0], np.linspace(0, 1, len(HEAT)), channel) for channel in HEAT.T], -1)
    grey = np.asarray(picture.convert("L"), float)[..., None] * 0.7
    cover = np.clip(1.6 * share, 0, 0.85)
    return Image.fromarray((grey * (1 - cover) + colours * cover).round().astype(np.uint8))


def _fitting(line: str, font: Any) -> str:
    while font.getlength(line) > SIDE and len(line) > 4:
        line = line[:-3] + ".."
    return line


def _k_of(record: Mapping[str, Any]) -> int:
    """K of a row; a record that was not run has it in its title alone."""
    text = str(record.get("num_segments") or re.sub(r"\D", "", record["title"]))
    return int(text.split(",")[0])
