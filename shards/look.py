"""What is in a shard folder: numbers (`stats`) and a picture (`contact_sheet`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shards.read import ShardError, ShardSet, open_shards
from shards.sampling import segment_indices

SEGMENTS = (8, 16, 24, 32, 48)  # the K of the paper's Fig. 2


def stats(folder: Path) -> dict[str, Any]:
    """Counts of videos, frames, classes, subsets and bytes, and how many videos are shorter than K for usual K."""
    shards = open_shards(folder)
    frames, manifest = shards.num_frames, shards.manifest
    per_class = np.bincount(shards.labels, minlength=len(shards.class_names))
    sizes = [shard["bytes"] for shard in manifest["shards"]]
    return {
        "dataset": manifest["dataset"],
        "videos": len(shards),
        "frames": int(frames.sum()),
        "classes": len(shards.class_names),
        "videos_per_class": _spread(per_class),
        "frames_per_video": _spread(frames),
        "videos_with_fewer_frames_than": {str(k): int((frames < k).sum()) for k in SEGMENTS},
        "subsets": manifest["subsets"],
        "failed": manifest["failed"],
        "decoded_with_errors": manifest.get("decoded_with_errors", 0),
        "listed_but_missing": manifest.get("listed_but_missing", 0),
        "shards": len(sizes),
        "bytes": sum(sizes),
        "bytes_per_shard": _spread(np.array(sizes)),
        "bytes_per_frame": round(sum(sizes) / int(frames.sum())),
        "decode": manifest["decode"],
        "digest": shards.digest,
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    return {
        "min": int(values.min()),
        "median": float(np.median(values)),
        "mean": round(float(values.mean()), 2),
        "max": int(values.max()),
    }


def choose_rows(shards: ShardSet, keys: Sequence[str], videos: int) -> list[int]:
    """Rows of the videos named (by key, or by file name), or of `videos` evenly spaced ones.

    Raises ShardError for a name that is not there, or is there more than once.
    """
    if not keys:
        return [int(i) for i in np.unique(np.linspace(0, len(shards) - 1, max(1, videos)).round())]
    rows = []
    for name in keys:
        found = [
            row
            for row, (key, video) in enumerate(zip(shards.keys, shards.videos, strict=True))
            if name in (key, video, video.rpartition("/")[2], video.rpartition("/")[2].rpartition(".")[0])
        ]
        if len(found) != 1:
            problem = "no video" if not found else f"{len(found)} videos"
            raise ShardError(f"{shards.folder}: {problem} called {name!r}; give a key such as {shards.keys[0]!r}")
        rows += found
    return rows


def contact_sheet(shards: ShardSet, rows: Sequence[int], num_segments: int, path: Path) -> None:
    """A picture: a line for each video, its K test frames from left to right with their numbers.

    What a network would see of each video: a sheet of K times the same frame is the sign of wrong frame counts.
    """
    from PIL import Image, ImageDraw, ImageFont

    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ShardError(f"{path}: a contact sheet is a .png or a .jpg; name it so")

    height, width = shards.frame_size
    scale = min(1.0, 170 / width)
    size, title = (round(width * scale), round(height * scale)), 20
    font = ImageFont.load_default(12)
    sheet = Image.new("RGB", (num_segments * (size[0] + 2) + 2, len(rows) * (size[1] + title + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for line, row in enumerate(rows):
        indices = segment_indices(int(shards.num_frames[row]), num_segments)
        top = line * (size[1] + title + 2)
        label = f"{shards.keys[row]}   label {shards.labels[row]}, {shards.num_frames[row]} frames"
        draw.text((4, top + 2), label, fill="black", font=font)
        for column, (index, frame) in enumerate(zip(indices, shards.read_frames(row, indices), strict=True)):
            left = 2 + column * (size[0] + 2)
            sheet.paste(Image.fromarray(frame).resize(size), (left, top + title))
            draw.rectangle((left, top + title, left + 8 + 7 * len(str(index)), top + title + 15), fill="black")
            draw.text((left + 3, top + title + 1), str(index), fill="white", font=font)
    sheet.save(path)
