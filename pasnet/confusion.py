"""A confusion matrix as a picture that can be read at 6, 51 and 101 classes.

Drawn with Pillow, which the contact sheets need anyway: a plotting library for one kind of picture is not worth its
weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 1320  # pixels that the matrix may take: 25 a class with 51 classes, 13 with 101
LARGEST, SMALLEST = 56, 3  # pixels of a cell
LABELLED = 10  # a cell as high as this has room for its class's name, ...
NUMBERED = 22  # ... and one like this for a number
LISTED = 25  # confusions named beside the matrix
MARGIN = 16
NAME = 24  # letters of a class name that are shown

INK, FAINT, GRID, EMPTY, MARK = (20, 20, 20), (130, 130, 130), (232, 232, 232), (214, 214, 214), (230, 97, 1)
# of a share of 0, 0.5 and 1; exactly 0 is white, so that one confused video of a hundred shows
BLUES = np.array([[204, 224, 242], [66, 146, 198], [8, 40, 95]], float)


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """`videos` test videos of class `label`, of `of`, were taken for class `taken_for`. Classes as numbers."""

    label: int
    taken_for: int
    videos: int
    of: int


def worst(matrix: np.ndarray, count: int = LISTED) -> list[Confusion]:
    """The largest entries off the diagonal of a matrix of counts (C, C), rows the true classes.

    By number of videos, then by share of the class; ties in the order of the classes. At most `count`, none that is 0.
    """
    total = matrix.sum(1)
    found = [
        Confusion(label=int(i), taken_for=int(j), videos=int(matrix[i, j]), of=int(total[i]))
        for i, j in np.argwhere(matrix > 0)
        if i != j
    ]
    return sorted(found, key=lambda one: (-one.videos, one.of, one.label, one.taken_for))[:count]


def shares(matrix: np.ndarray) -> np.ndarray:
    """Counts (C, C) -> shares of each row's sum, float64 from 0 to 1; a row without videos is NaN."""
    total = matrix.sum(1, keepdims=True)
    return np.divide(matrix, total, out=np.full(matrix.shape, np.nan), where=total > 0)


def draw(matrix: np.ndarray, names: Sequence[str], title: str, path: Path) -> None:
    """Writes the picture (.png).

    `matrix` int (C, C): videos of class row that were taken for class column. Shown are shares of the row, since
    classes have different numbers of test videos; in percent in the cells and with names beside them where there is
    room; the worst confusions by name, and outlined in the matrix.
    """
    n = len(names)
    if matrix.shape != (n, n):
        raise ValueError(f"{path}: a confusion matrix of {matrix.shape} for {n} class names")
    cell = max(SMALLEST, min(LARGEST, SIDE // max(n, 1)))
    text, small, large = (ImageFont.load_default(size) for size in (13, 11, 17))
    label_font = ImageFont.load_default(max(LABELLED - 1, min(14, cell - 1)))
    shown = [_shortened(name) for name in names] if cell >= LABELLED else [""] * n
    beside = round(max((label_font.getlength(name) for name in shown), default=0)) + 8
    listed = worst(matrix, min(LISTED, n))  # with few classes every cell would be outlined
    lines = [
        f"{one.videos} of {one.of} ({100 * one.videos / one.of:.0f} %)  {_shortened(names[one.label])}"
        f"  as  {_shortened(names[one.taken_for])}"
        for one in listed
    ]
    notes = [
        "rows: true class",
        "columns: predicted class",
        "colour: share of the row's test videos, in percent",
        *(["grey row: no test video"] if (matrix.sum(1) == 0).any() else []),
    ]
    heading = "Most frequent confusions (outlined)" if lines else "No confusions"
    list_width = round(max(text.getlength(line) for line in [heading, *notes, *lines])) + MARGIN

    left, top = MARGIN + beside, MARGIN + 34
    right = left + n * cell + 2 * MARGIN
    width = max(right + max(list_width, 240) + MARGIN, round(large.getlength(title)) + 2 * MARGIN)
    height = max(top + n * cell + beside + MARGIN, top + 20 * (len(lines) + len(notes) + 6) + MARGIN)
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), title, fill=INK, font=large)

    share = shares(matrix)
    pixels = _colours(share).repeat(cell, 0).repeat(cell, 1)
    sheet.paste(Image.fromarray(pixels), (left, top))
    if cell >= 8:
        for line in range(n + 1):  # every fifth is darker, to follow a row by eye
            colour = (200, 200, 200) if line % 5 == 0 and n > 10 else GRID
            pen.line((left, top + line * cell, left + n * cell, top + line * cell), fill=colour)
            pen.line((left + line * cell, top, left + line * cell, top + n * cell), fill=colour)
    pen.rectangle((left - 1, top - 1, left + n * cell, top + n * cell), outline=FAINT)
    if cell >= NUMBERED:
        number_font = ImageFont.load_default(16 if cell > 40 else 10)
        for i, j in np.argwhere(matrix > 0):
            at = (left + j * cell + cell / 2, top + i * cell + cell / 2)
            ink = "white" if share[i, j] > 0.4 else INK
            pen.text(at, f"{100 * share[i, j]:.0f}", fill=ink, font=number_font, anchor="mm")
    for one in listed:
        x, y = left + one.taken_for * cell, top + one.label * cell
        pen.rectangle((x, y, x + cell, y + cell), outline=MARK, width=2 if cell > 8 else 1)
    for index, name in enumerate(shown):
        if name:
            middle = index * cell + cell / 2
            pen.text((left - 5, top + middle), name, fill=INK, font=label_font, anchor="rm")
            _upwards(sheet, name, label_font, round(left + middle), top + n * cell + 4)

    down = top
    for note in notes:
        pen.text((right, down), note, fill=INK, font=text)
        down += 20
    ramp = _colours(np.linspace(0, 1, 200)[None]).repeat(14, 0)
    sheet.paste(Image.fromarray(ramp), (right, down + 6))
    pen.rectangle((right - 1, down + 5, right + 200, down + 20), outline=FAINT)
    for percent in (0, 50, 100):
        pen.text((right + 2 * percent, down + 24), str(percent), fill=INK, font=small, anchor="ma")
    down += 56
    pen.text((right, down), heading, fill=INK, font=text)
    pen.line((right, down + 18, right + list_width - MARGIN, down + 18), fill=MARK, width=2)
    down += 26
    for entry in lines:
        pen.text((right, down), entry, fill=INK, font=text)
        down += 20
    sheet.save(path)


def _colours(share: np.ndarray) -> np.ndarray:
    """Shares (H, W), NaN for none -> RGB uint8 (H, W, 3)."""
    known = np.nan_to_num(share)
    colours = np.stack([np.interp(known, (0, 0.5, 1), channel) for channel in BLUES.T], -1)
    colours[share == 0] = 255
    colours[np.isnan(share)] = EMPTY
    return colours.round().astype(np.uint8)


def _shortened(name: str) -> str:
    return name if len(name) <= NAME else name[: NAME - 2].rstrip() + ".."


def _upwards(
    sheet: Image.Image, name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, centre: int, top: int
) -> None:
    """Writes a name that reads from below to `top`, where it ends, about the vertical line at `centre`."""
    height = round(font.getbbox("Mg", anchor="la")[3]) + 4  # the same for all names: they stand on one line
    line = Image.new("L", (max(1, round(font.getlength(name)) + 1), height), 0)
    ImageDraw.Draw(line).text((0, height / 2), name, fill=255, font=font, anchor="lm")
    turned = line.rotate(90, expand=True)
    sheet.paste(INK, (centre - turned.width // 2, top), turned)
