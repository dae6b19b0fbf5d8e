"""A synthetic dataset of human actions in UCF-101's or HMDB-51's layout: what pasnet trains on without a download.

Real .avi files of one articulated person (COCO's 18 joints) before a procedural scene. It is built so that
results on it mean something: only the *motion of the body* tells the classes apart, and some classes differ
by its order in time alone. Whatever else is in a picture comes from random streams that never see the class:

- stream (seed, group): actor, clothes, background, view, scale, stool, look of the distractors: the film set;
- stream (seed, group, clip): length, place, light, camera shake and pan, paths of the distractors: the take;
- stream (seed, motion, group, clip): tempo, phase, amplitude, idle sway: the performance.

So one group shows every class on one film set, and clip c of a group has one length and one camera path in
all classes. The two classes of a pair such as StandUp and SitDown share their performance too, and one plays
it backwards: relative to the hips their joints are exact reverses, and a model that is blind to order stays
at chance on them. No class needs left and right told apart, because training flips pictures.

A clip depends on these numbers alone: not on the order of work, nor on the number of workers or classes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ffmpeg as ff
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pasnet.config import ConfigError

VERSION = 1  # of the generator: raise it with every change that changes a pixel, a joint or a list

Floats = npt.NDArray[np.floating[Any]]

# COCO-18 in OpenPose's order (architecture facts, 2.4). Left and right are the person's own.
# fmt: off
JOINTS = ("nose", "neck", "r_shoulder", "r_elbow", "r_wrist", "l_shoulder", "l_elbow", "l_wrist", "r_hip",
          "r_knee", "r_ankle", "l_hip", "l_knee", "l_ankle", "r_eye", "l_eye", "r_ear", "l_ear")
# fmt: on


# ----------------------------------------------------------------------------------------------------------
# Motions. A pose is a row of angles (degrees); a motion is a few key poses and how time runs through them.

# Of the trunk: pitch (bends forward), roll (leans), twist (shoulders against hips), turn (whole body about
# the vertical), nod and look (head). hop is a height in units of the body's height.
_TRUNK = ("pitch", "roll", "twist", "turn", "nod", "look", "hop")
# Of a segment: el, the angle from straight down (90 = level, 180 = up), and az, where it points then (0 =
# outward, 90 = forward, 180 = inward, -90 = back). Both are absolute in the trunk's frame (arms) or the
# pelvis's (legs), which makes key poses easy to write: no joint angle depends on the one before it.
_SEGMENTS = ("arm", "fore", "thigh", "shin")
_PARAMS = _TRUNK + tuple(f"{s}_{segment}_{a}" for s in "rl" for segment in _SEGMENTS for a in ("el", "az"))
_INDEX = {name: i for i, name in enumerate(_PARAMS)}

_REST = dict.fromkeys(_PARAMS, 0.0)
for _side in "rl":
    _REST |= {f"{_side}_arm_el": 9, f"{_side}_arm_az": 15, f"{_side}_fore_el": 14, f"{_side}_fore_az": 60}
    _REST |= {f"{_side}_thigh_el": 4, f"{_side}_shin_el": 2}


def _pose(base: dict[str, float] | None = None, **angles: float) -> dict[str, float]:
    """`base` (default: at rest) with some angles replaced; a name without "r_" or "l_" sets both sides."""
    pose = dict(base or _REST)
    for name, value in angles.items():
        names = [name] if name in pose else [f"r_{name}", f"l_{name}"]
        for n in names:
            if n not in pose:
                raise KeyError(n)
            pose[n] = value
    return pose


@dataclass(frozen=True)
class _Motion:
    # (phase in [0, 1], pose); a cycle ends on the pose that it starts with
    keys: tuple[tuple[float, dict[str, float]], ...]
    hertz: float | None = None  # cycles per second; None: it happens once in the clip
    feet: str = "both"  # which feet stay where they are: "both", "l" (the standing leg), "none" (the hips do)
    vary: tuple[str, ...] = ()  # angles of the key poses that a clip may turn by up to 25 degrees: its style
    smooth: bool = True  # come to rest at each key pose


# fmt: off
def _motions() -> dict[str, _Motion]:
    rest = _pose()
    sit = _pose(thigh_el=86, thigh_az=82, shin_el=4, shin_az=-90, arm_el=28, arm_az=80, fore_el=62,
                fore_az=100)
    half = _pose(thigh_el=48, thigh_az=82, shin_el=24, shin_az=-90, pitch=38, arm_el=42, arm_az=84,
                 fore_el=52, fore_az=90)
    guard = _pose(arm_el=26, arm_az=60, fore_el=138, fore_az=108, thigh_el=9, shin_el=6)
    up = _pose(arm_el=166, arm_az=28, fore_el=174, fore_az=28)
    open_ = _pose(arm_el=86, arm_az=2, fore_el=90, fore_az=4)
    closed = _pose(arm_el=84, arm_az=92, fore_el=84, fore_az=104)
    step_r = _pose(r_thigh_el=72, r_thigh_az=88, r_shin_el=14, r_shin_az=-90, l_arm_el=42, l_arm_az=88,
                   l_fore_el=88, l_fore_az=92, r_arm_el=32, r_arm_az=-86, r_fore_el=26, r_fore_az=88)
    jack = _pose(arm_el=162, arm_az=4, fore_el=172, fore_az=4, thigh_el=27, shin_el=25)
    turn = [_pose(turn=180 * t) for t in (0, 0.25, 0.5, 0.75, 1)]
    for i, side in ((1, "r"), (3, "l")):  # a turn is walked: each foot is lifted once
        turn[i] = _pose(turn[i], **{f"{side}_thigh_el": 32, f"{side}_thigh_az": 80, f"{side}_shin_el": 22,
                                    f"{side}_shin_az": -90})
    cock = _pose(guard, r_thigh_el=61, r_thigh_az=88, r_shin_el=36, r_shin_az=-90, pitch=-4)
    kick = _pose(guard, r_thigh_el=84, r_thigh_az=88, r_shin_el=82, r_shin_az=88, pitch=-16)
    squat = _pose(thigh_el=88, thigh_az=58, shin_el=36, shin_az=-112, pitch=30, arm_el=74, arm_az=82,
                  fore_el=82, fore_az=92)
    punch = _pose(guard, r_arm_el=88, r_arm_az=98, r_fore_el=90, r_fore_az=100, twist=24)
    bow = _pose(pitch=74, nod=22, arm_el=6)
    wave = _pose(r_arm_el=112, r_arm_az=12, r_fore_az=12)
    return {
        "JumpingJack": _Motion(
            ((0, rest), (0.25, _pose(jack, hop=0.05, arm_el=90, fore_el=92, thigh_el=17)), (0.5, jack),
             (0.75, _pose(jack, hop=0.05, arm_el=90, fore_el=92, thigh_el=17)), (1, rest)),
            hertz=1.0, smooth=False),
        "Bow": _Motion(((0, rest), (0.42, bow), (0.58, bow), (1, rest))),
        "Kick": _Motion(((0, guard), (0.25, cock), (0.45, kick), (0.65, cock), (1, guard)),
                        hertz=0.85, feet="l"),
        "TurnAround": _Motion(tuple((i / 4, pose) for i, pose in enumerate(turn)), feet="none", smooth=False),
        "StandUp": _Motion(((0, sit), (0.5, half), (1, rest))),
        "RaiseArms": _Motion(((0, rest), (1, up)), vary=("arm_az", "fore_az")),
        "ArmWave": _Motion(((0, _pose(wave, r_fore_el=128)), (0.5, _pose(wave, r_fore_el=206)),
                            (1, _pose(wave, r_fore_el=128))), hertz=1.5, vary=("arm_el",)),
        "Squat": _Motion(((0, rest), (0.5, squat), (1, rest)), hertz=0.75),
        "Punch": _Motion(((0, guard), (0.2, punch), (0.5, guard), (0.7, _swap(punch)), (1, guard)),
                         hertz=1.1),
        "Clap": _Motion(((0, _pose(arm_el=60, arm_az=52, fore_el=110, fore_az=75)),
                         (0.5, _pose(arm_el=55, arm_az=88, fore_el=110, fore_az=142)),
                         (1, _pose(arm_el=60, arm_az=52, fore_el=110, fore_az=75))), hertz=1.8),
        "March": _Motion(((0, rest), (0.25, step_r), (0.5, rest), (0.75, _swap(step_r)), (1, rest)),
                         hertz=1.0, feet="none"),
        "OpenArms": _Motion(((0, closed), (1, open_))),
        "ArmCircle": _Motion(((0, _pose(arm_el=0, arm_az=72, fore_el=0, fore_az=72)),
                              (1, _pose(arm_el=360, arm_az=72, fore_el=360, fore_az=72))),
                             hertz=0.9, smooth=False),
    }


# fmt: on
def _swap(pose: dict[str, float]) -> dict[str, float]:
    """The mirror image of a pose."""
    other = {"r_": "l_", "l_": "r_"}
    mirrored = {other.get(n[:2], n[:2]) + n[2:]: v for n, v in pose.items()}
    return mirrored | {n: -mirrored[n] for n in ("roll", "twist", "turn", "look")}


_MOTIONS = _motions()
# Classes that are another one played backwards.
REVERSES: dict[str, str] = {"SitDown": "StandUp", "LowerArms": "RaiseArms", "CloseArms": "OpenArms"}
# In the order in which `num_classes` takes them: pairs stay together, the easiest to tell apart come first.
# fmt: off
CLASSES: tuple[str, ...] = ("JumpingJack", "Bow", "Kick", "TurnAround", "StandUp", "SitDown", "RaiseArms",
                            "LowerArms", "ArmWave", "Squat", "Punch", "Clap", "OpenArms", "CloseArms",
                            "March", "ArmCircle")
# fmt: on

Layout = Literal["ucf", "hmdb"]
# Where each layout has its lists. shards/datasets.py reads the first such folder, so there is never more than one.
_LISTS: dict[Layout, str] = {"ucf": "ucfTrainTestlist", "hmdb": "testTrainMulti_7030_splits"}


def class_folder(label: str, layout: Layout) -> str:
    """What a class is called on disk: JumpingJack, or jumping_jack."""
    return label if layout == "ucf" else re.sub(r"(?<!^)(?=[A-Z])", "_", label).lower()


@dataclass(frozen=True, kw_only=True)
class SynthConfig:
    """What to generate. Equal configs give equal clips; more classes, groups or clips leave the others alone.

    frames is the range of clip lengths, both ends included; size is (height, width) in pixels; difficulty in
    [0, 1] widens the views, shakes the camera, clutters the scene, adds noise and distractors and varies the
    performances. layout says whose names and lists the same videos get: UCF-101's or HMDB-51's.
    """

    num_classes: int = 12
    groups: int = 25
    clips_per_group: int = 1
    frames: tuple[int, int] = (32, 64)
    seed: int = 0
    difficulty: float = 0.5
    size: tuple[int, int] = (240, 320)  # UCF-101's
    fps: int = 25  # UCF-101's
    layout: Layout = "ucf"

    def __post_init__(self) -> None:
        """Refuse what cannot be generated, with one line that says why."""
        # Lists, as JSON gives them, would not compare equal.
        object.__setattr__(self, "frames", tuple(self.frames))
        object.__setattr__(self, "size", tuple(self.size))
        most, frames, size = len(CLASSES), self.frames, self.size
        sizes_good = len(size) == 2 and all(n >= 48 and n % 2 == 0 for n in size)
        frames_good = len(frames) == 2 and 2 <= frames[0] <= frames[1]
        checks = (
            (2 <= self.num_classes <= most, f"num_classes must be in 2..{most}", self.num_classes),
            # Three disjoint test sets need three groups; the file names have two digits.
            (3 <= self.groups <= 99, "groups must be in 3..99", self.groups),
            (1 <= self.clips_per_group <= 99, "clips_per_group must be in 1..99", self.clips_per_group),
            (frames_good, "frames must be (min, max) with 2 <= min <= max", frames),
            (self.seed >= 0, "seed must not be negative", self.seed),
            (0 <= self.difficulty <= 1, "difficulty must be in [0, 1]", self.difficulty),
            (sizes_good, "size must be (height, width), even numbers of at least 48", size),
            (1 <= self.fps <= 120, "fps must be in 1..120", self.fps),
            (self.layout in _LISTS, f"layout must be one of {', '.join(_LISTS)}", self.layout),
        )
        for good, rule, value in checks:
            if not good:
                raise ConfigError(f"{rule}, got {value}")

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes in the order of their labels: alphabetical whatever the case, as in UCF-101, or by folder."""
        return tuple(sorted(CLASSES[: self.num_classes], key=lambda name: class_folder(name, self.layout).lower()))

    @property
    def record(self) -> dict[str, Any]:
        """What synth.json holds: no default layout, so that folders of before there was a choice are recognised."""
        values = dataclasses.asdict(self)
        if self.layout == "ucf":
            del values["layout"]
        return values


@dataclass(frozen=True)
class Clip:
    """One clip: its class, its group (1..groups) and its number in the group (1..clips_per_group)."""

    label: str
    group: int
    number: int
    layout: Layout = "ucf"

    @property
    def key(self) -> str:
        """The file name without ".avi", as in the lists and in joints.parquet.

        HMDB-51's names begin with the film, which a group is, and end with tags (body parts seen, camera motion,
        people, view, quality), here the same for all, and the number in the film, from 0.
        """
        if self.layout == "hmdb":
            return f"synth{self.group:02d}_{self.folder}_f_cm_np1_fr_med_{self.number - 1}"
        return f"v_{self.label}_g{self.group:02d}_c{self.number:02d}"

    @property
    def folder(self) -> str:
        """The class folder."""
        return class_folder(self.label, self.layout)

    @property
    def name(self) -> str:
        """The path under videos/, as UCF-101's lists write it."""
        return f"{self.folder}/{self.key}.avi"


@dataclass(frozen=True)
class Rendered:
    """A clip before it is encoded.

    frames: uint8 (T, height, width, 3), RGB.  xy: float32 (T, 18, 2), pixels, (0, 0) is the centre of the top
    left pixel.  visible: bool (T, 18), False where a joint is outside the picture or behind something.
    """

    frames: npt.NDArray[np.uint8]
    xy: npt.NDArray[np.float32]
    visible: npt.NDArray[np.bool_]


def clips(config: SynthConfig) -> list[Clip]:
    """All clips of the dataset in the order of the lists."""
    return [
        Clip(label, g, c, config.layout)
        for label in config.classes
        for g in range(1, config.groups + 1)
        for c in range(1, config.clips_per_group + 1)
    ]


def held_out(config: SynthConfig, split: int) -> range:
    """The test groups of split 1, 2 or 3: 1-7, 8-14 and 15-21 of 25, in proportion for other counts."""
    n = min(max(1, round(config.groups * 7 / 25)), config.groups // 3)
    return range((split - 1) * n + 1, split * n + 1)


# ----------------------------------------------------------------------------------------------------------
# Random streams and what is drawn from them.


def _rng(config: SynthConfig, stream: str, *numbers: int) -> np.random.Generator:
    return np.random.default_rng([config.seed, zlib.crc32(stream.encode()), *numbers])


def _hsv(rng: np.random.Generator, s: tuple[float, float], v: tuple[float, float]) -> Floats:
    """A colour of any hue, float (3,), RGB in 0..255."""
    hue, sat, val = rng.uniform(0, 6), rng.uniform(*s), rng.uniform(*v)
    return 255 * val * (1 - sat * np.clip(2 - np.abs((hue + np.array([3, 1, -1])) % 6 - 3), 0, 1))


@dataclass(frozen=True)
class Looks:
    """The film set of a group: what all its clips have in common. Colours are float (3,), RGB in 0..255."""

    skin: Floats
    hair: Floats
    shirt: Floats
    stripe: Floats
    stripes: int  # on the shirt; 0: none
    trousers: Floats
    shoes: Floats
    long_sleeves: bool
    long_trousers: bool
    height: float  # of the body, as a share of the picture's height
    build: float  # width of the limbs; 1 is average
    yaw: float  # of the view, radians; 0 is frontal, positive shows the person facing to the right
    tilt: float  # how far the camera looks down, radians
    place: tuple[float, float]  # of the feet, as shares of the picture's width and height
    stool: Floats | None  # its colour; it stands behind the person in every class, or in none
    background: Floats  # float32 (3, h + 2 * margin, w + 2 * margin), RGB in 0..255
    margin: int  # pixels by which the background is larger on each side: room for the camera
    # Distractors: colour, radius and length (shares of the picture's height), whether it passes in front.
    balls: tuple[tuple[Floats, float, float, bool], ...]


@functools.lru_cache(maxsize=16)
def looks(config: SynthConfig, group: int) -> Looks:
    """The looks of a group: they depend on seed, group, size and difficulty, and there is no class to see."""
    rng = _rng(config, "looks", group)
    hard = config.difficulty
    skin = np.array([232, 188, 158]) - rng.uniform(0, 1) * np.array([120, 114, 106])
    wall = _hsv(rng, (0.05, 0.2 + 0.3 * hard), (0.4, 0.9))

    def cloth(*others: Floats) -> Floats:
        apart = 110 - 50 * hard  # how different from the wall clothes must be, and from skin
        for _ in range(100):
            colour = _hsv(rng, (0.25, 0.95), (0.15, 0.95))
            if all(np.abs(colour - o).sum() > apart for o in (wall, skin, *others)):
                break
        return colour

    shirt = cloth()
    margin = math.ceil(0.1 * config.size[0])
    balls = tuple(
        (
            _hsv(rng, (0.3, 1), (0.3, 1)),
            rng.uniform(0.02, 0.03 + 0.03 * hard),
            rng.choice([0, rng.uniform(0.02, 0.1)]),
            bool(rng.uniform() < 0.4 * hard),
        )
        for _ in range(round(0.6 + 2.4 * hard * rng.uniform()))
    )
    return Looks(
        skin=skin,
        hair=np.array([20, 15, 12]) + rng.uniform(0, 1) ** 2 * np.array([190, 140, 70]),
        shirt=shirt,
        stripe=cloth(shirt),
        stripes=int(rng.choice([0, 0, 3, 5])),
        trousers=cloth(shirt),
        shoes=_hsv(rng, (0, 0.8), (0.1, 0.9)),
        long_sleeves=bool(rng.uniform() < 0.5),
        long_trousers=bool(rng.uniform() < 0.6),
        # With both arms up a person is 1.25 of this; the picture must hold that, hops and the camera's path.
        height=rng.uniform(0.66 - 0.14 * hard, 0.68),
        build=rng.uniform(0.9, 1.15),
        yaw=rng.choice([-1, 1]) * math.radians(rng.uniform(12, 30 + 40 * hard)),
        tilt=math.radians(rng.uniform(2, 9)),
        place=(rng.uniform(0.42, 0.58), rng.uniform(0.9, 0.935)),
        stool=_hsv(rng, (0.1, 0.6), (0.2, 0.7)) if rng.uniform() < 0.6 else None,
        background=_background(rng, config.size, margin, wall, hard),
        margin=margin,
        balls=balls,
    )


def _blow_up(grid: Floats, shape: tuple[int, int]) -> Floats:
    """A small grid enlarged bilinearly to shape (h, w): smooth noise."""
    for axis, n in enumerate(shape):
        at = np.linspace(0, grid.shape[axis] - 1, n)
        low = np.minimum(at.astype(int), grid.shape[axis] - 2)
        weight = (at - low).reshape((-1, 1) if axis == 0 else (1, -1))
        grid = np.take(grid, low, axis) * (1 - weight) + np.take(grid, low + 1, axis) * weight
    return grid


def _background(rng: np.random.Generator, size: tuple[int, int], margin: int, wall: Floats, hard: float) -> Floats:
    """A wall with pictures, a floor, light that falls off, texture: float32 (3, h + 2m, w + 2m), 0..255."""
    h, w = size[0] + 2 * margin, size[1] + 2 * margin
    scene = np.repeat(wall[:, None], h, 1)[:, :, None] * np.ones((1, 1, w))
    scene *= np.linspace(rng.uniform(0.8, 1.15), 1, h)[None, :, None]
    scene *= np.linspace(rng.uniform(0.8, 1.15), rng.uniform(0.8, 1.15), w)[None, None, :]
    if rng.uniform() < 0.3 + 0.4 * hard:  # wallpaper
        angle, period = rng.uniform(0, math.pi), rng.uniform(8, 40)
        across = np.arange(w)[None, :] * math.cos(angle) + np.arange(h)[:, None] * math.sin(angle)
        scene *= 1 + 0.12 * (0.3 + hard) * np.sign(np.sin(2 * math.pi * across / period))
    horizon = margin + round(size[0] * rng.uniform(0.66, 0.78))
    for _ in range(round(1 + 7 * hard * rng.uniform(0.5, 1))):  # pictures, doors, shelves
        bh, bw = rng.uniform(0.08, 0.45, 2) * (h, w) * (1, 0.6)
        y, x = int(rng.uniform(0, horizon - bh)), int(rng.uniform(0, w - bw))
        colour = _hsv(rng, (0.05, 0.3 + 0.5 * hard), (0.25, 0.95))
        y2, x2 = y + int(bh), x + int(bw)
        scene[:, y:y2, x:x2] = 0.3 * colour[:, None, None]  # a frame of 2 pixels
        scene[:, y + 2 : y2 - 2, x + 2 : x2 - 2] = colour[:, None, None]
    floor = _hsv(rng, (0.05, 0.45), (0.25, 0.75))[:, None, None]
    scene[:, horizon:] = floor * np.linspace(0.75, 1.1, h - horizon)[None, :, None]
    scene[:, horizon - 3 : horizon] = 0.5 * floor
    grain = np.zeros((h, w))
    for cell, weight in ((64, 10), (20, 8), (6, 6)):
        grain += weight * _blow_up(rng.standard_normal((max(2, h // cell), max(2, w // cell))), (h, w))
    scene = np.clip(scene + (0.3 + 0.9 * hard) * grain, 8, 247).astype(np.float32)
    scene.setflags(write=False)  # looks() are cached and shared
    return scene


@dataclass(frozen=True)
class Take:
    """The circumstances of a clip, the same in all classes: length, place, light, camera, distractors.

    camera: int (T, 2), the shift (x, y) of the camera in pixels.  balls: float (n, T, 3), for each distractor
    its centre (x, y) in pixels before that shift and its angle in radians.
    """

    length: int
    mirrored: bool  # the person acts with the other hand or foot
    place: tuple[float, float]
    light: float
    camera: npt.NDArray[np.int_]
    balls: Floats
    noise: npt.NDArray[np.int_]  # int (T, 2), where in the tile of noise a frame starts


def take(config: SynthConfig, group: int, number: int) -> Take:
    """The take of clip `number` of a group. It does not know the class."""
    rng = _rng(config, "take", group, number)
    hard, (h, w) = config.difficulty, config.size
    length = int(rng.integers(config.frames[0], config.frames[1] + 1))
    t = np.arange(length) / config.fps
    room = math.ceil(0.1 * h) - 1
    pan = rng.uniform(-0.05, 0.05, 2) * (w, h) * hard * (1, 0.3)
    shake = np.zeros((length, 2))
    for hertz in (0.7, 1.9, 4.1):  # a hand-held camera: slow and large, fast and small
        size = rng.normal(0, 0.006 * h / hertz, 2)
        shake += size * np.sin(2 * math.pi * (hertz * t[:, None] + rng.uniform(0, 1, 2)))
    path = np.linspace(-0.5, 0.5, length)[:, None] * pan + 2 * hard * shake
    n = len(looks(config, group).balls)
    start, speed = rng.uniform((0.05, 0.1), (0.95, 0.9), (n, 2)), rng.normal(0, 0.35, (n, 2))
    at = start[:, None] + speed[:, None] * t[None, :, None]
    at = 1 - np.abs(1 - at % 2)  # bounces between the edges
    angle = rng.uniform(0, 2 * math.pi, (n, 1)) + rng.normal(0, 3, (n, 1)) * t
    return Take(
        length=length,
        mirrored=bool(rng.uniform() < 0.5),
        place=(rng.normal(0, 0.02), rng.normal(0, 0.004)),
        light=float(np.clip(1 + 0.12 * hard * rng.standard_normal(), 0.75, 1.25)),
        camera=np.clip(np.rint(path), -room, room).astype(int),
        balls=np.concatenate([at * (w, h), angle[:, :, None]], -1),
        noise=rng.integers(0, 64, (length, 2)),
    )


# ----------------------------------------------------------------------------------------------------------
# From a motion to joints.


def performance(config: SynthConfig, clip: Clip, take: Take) -> tuple[Floats, _Motion]:
    """The angles of a clip, float (T, len(_PARAMS)) in degrees (hop: body heights), and their motion."""
    name = REVERSES.get(clip.label, clip.label)
    motion, hard, n = _MOTIONS[name], config.difficulty, take.length
    # A pair draws from one stream: the reverse is exact, so that neither tempo nor amplitude gives it away.
    rng = _rng(config, f"motion {name}", clip.group, clip.number)
    u = np.linspace(0, 1, n)
    # Faster here, slower there, and never backwards: the slope is at least 1 - 0.5.
    u = u + rng.uniform(-0.5, 0.5) * hard * np.sin(2 * math.pi * u) / (2 * math.pi)
    if motion.hertz is None:
        begin, end = rng.uniform(0.04, 0.22), rng.uniform(0.74, 0.96)
        phase = np.clip((u - begin) / (end - begin), 0, 1)
    else:
        hertz = motion.hertz * math.exp((0.06 + 0.14 * hard) * rng.standard_normal())
        phase = (rng.uniform(0, 1) + max(hertz * n / config.fps, 1.1) * u) % 1
    times = np.array([t for t, _ in motion.keys])
    rows = np.array([[pose[p] for p in _PARAMS] for _, pose in motion.keys])
    style = rng.uniform(-25, 25) * (0.4 + hard)
    for part in motion.vary:
        columns = [_INDEX[f"{side}_{part}"] for side in "rl"]
        rows[:, columns] += style * (np.abs(rows - rows[0]).max(0)[columns] > 1)  # what moves, not what hangs
    low = np.clip(np.searchsorted(times, phase, side="right") - 1, 0, len(times) - 2)
    part_way = (phase - times[low]) / (times[low + 1] - times[low])
    if motion.smooth:
        part_way = part_way**2 * (3 - 2 * part_way)
    angles = rows[low] + part_way[:, None] * (rows[low + 1] - rows[low])
    rest = np.array([_REST[p] for p in _PARAMS])
    amplitude = np.full(len(_PARAMS), 1 + 0.16 * hard * np.clip(rng.standard_normal(), -1.5, 1.5))
    amplitude[_INDEX["turn"]] = 1  # half a turn is half a turn
    amplitude[[i for p, i in _INDEX.items() if p.endswith("_az")]] = 1  # a direction has no size
    angles = rest + amplitude * (angles - rest)
    # Nobody stands still, and no two people hold their arms alike.
    sway = 2.5 * rng.standard_normal(len(_PARAMS)) * (0.4 + hard)
    for hertz in (0.4, 0.9):
        cycles = hertz * np.arange(n)[:, None] / config.fps + rng.uniform(0, 1, len(_PARAMS))
        sway = sway + (0.5 + hard) * rng.standard_normal(len(_PARAMS)) * np.sin(2 * math.pi * cycles)
    sway[:, [i for p, i in _INDEX.items() if p in ("hop", "turn") or "thigh" in p or "shin" in p]] *= 0.3
    sway[:, _INDEX["hop"]] = 0
    angles = angles + sway
    if rng.uniform() < 0.5:  # which way round one turns is no class
        angles[:, _INDEX["turn"]] *= -1
    return (angles[::-1] if clip.label in REVERSES else angles), motion


# Lengths in body heights, from drawing books; the head is a little large, so that it shows at 240 lines.
_UPPER_ARM, _FOREARM, _THIGH, _SHIN, _SPINE, _NECK = 0.165, 0.145, 0.235, 0.235, 0.275, 0.125
_SHOULDER, _HIP, _ANKLE, _FOOT = 0.112, 0.062, 0.035, 0.085


def _directions(angles: Floats, side: str, segment: str) -> Floats:
    """Unit vectors (T, 3) of a segment in its frame: x to the person's left, y up, z forward."""
    el = np.radians(angles[:, _INDEX[f"{side}_{segment}_el"]])
    az = np.radians(angles[:, _INDEX[f"{side}_{segment}_az"]])
    outward = 1 if side == "l" else -1
    return np.stack([outward * np.sin(el) * np.cos(az), -np.cos(el), np.sin(el) * np.sin(az)], -1)


def _rotate(points: Floats, axis: int, degrees: Floats) -> Floats:
    """Points (T, 3) turned about x (0), y (1) or z (2) by degrees (T,), right-handed."""
    i, j = ((1, 2), (2, 0), (0, 1))[axis]
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    out = points.copy()
    out[:, i] = points[:, i] * cos - points[:, j] * sin
    out[:, j] = points[:, i] * sin + points[:, j] * cos
    return out


def skeleton(angles: Floats, feet: str = "both") -> dict[str, Floats]:
    """Points of the body from angles (T, len(_PARAMS)): name -> float (T, 3), body heights.

    x to the left of a person who faces forward, y up from the floor, z forward. Names are JOINTS and those of
    the extra points that only drawing needs ("head", "hair", "r_hand", "r_toe", "pelvis", ...).
    """
    angle = {p: angles[:, i] for p, i in _INDEX.items()}
    n = len(angles)

    def fixed(x: float, y: float, z: float) -> Floats:
        return np.tile(np.array([x, y, z], float), (n, 1))

    def torso(points: Floats) -> Floats:  # from the trunk's frame into the pelvis's
        points = _rotate(points, 1, angle["twist"])
        return _rotate(_rotate(points, 0, angle["pitch"]), 2, angle["roll"])

    def head(points: Floats) -> Floats:
        return torso(_rotate(_rotate(points, 1, angle["look"]), 0, angle["nod"]))

    p: dict[str, Floats] = {"pelvis": fixed(0, 0, 0), "neck": torso(fixed(0, _SPINE, 0))}
    for side, out in (("r", -1), ("l", 1)):
        p[f"{side}_shoulder"] = torso(fixed(out * _SHOULDER, _SPINE - 0.005, 0))
        p[f"{side}_elbow"] = p[f"{side}_shoulder"] + _UPPER_ARM * torso(_directions(angles, side, "arm"))
        fore = torso(_directions(angles, side, "fore"))
        p[f"{side}_wrist"] = p[f"{side}_elbow"] + _FOREARM * fore
        p[f"{side}_hand"] = p[f"{side}_wrist"] + 0.02 * fore
        p[f"{side}_hip"] = fixed(out * _HIP, 0, 0)
        p[f"{side}_knee"] = p[f"{side}_hip"] + _THIGH * _directions(angles, side, "thigh")
        shin = _directions(angles, side, "shin")
        p[f"{side}_ankle"] = p[f"{side}_knee"] + _SHIN * shin
        # The foot stays square to the shin when the shin is lifted, flat on the floor when the shin is steep.
        flat = np.array([out * 0.25, 0.12 - 0.5, 0.95])
        square = np.stack([0 * shin[:, 0] + out * 0.2, -shin[:, 2] - 0.3, -shin[:, 1]], -1)
        lifted = np.clip(2 * np.abs(shin[:, 2:3]) - 0.7, 0, 1)
        toe = flat + lifted * (square - flat)
        p[f"{side}_toe"] = p[f"{side}_ankle"] + _FOOT * toe / np.linalg.norm(toe, axis=1, keepdims=True)
    centre = p["head"] = p["neck"] + head(fixed(0, _NECK, 0.012))
    for name, at in {
        "nose": (0, -0.006, 0.07),
        "r_eye": (-0.026, 0.018, 0.062),
        "l_eye": (0.026, 0.018, 0.062),
        "r_ear": (-0.06, 0.004, -0.004),
        "l_ear": (0.06, 0.004, -0.004),
        "hair": (0, 0.026, -0.027),
        "crown": (0, 0.028, 0),
        "chin": (0, -0.026, 0.004),
    }.items():
        p[name] = centre + head(fixed(*at))
    # Put the body where its feet are: the lower ankle on the floor, and the feet that stand do not slide.
    lift = angle["hop"] + _ANKLE - np.minimum(p["r_ankle"][:, 1], p["l_ankle"][:, 1])
    slide = {
        "both": (p["r_ankle"] + p["l_ankle"]) / 2,
        "l": p["l_ankle"] - fixed(_HIP, 0, 0),
        "none": 0 * lift[:, None],
    }
    shift = -slide[feet] * np.array([1, 0, 1]) + lift[:, None] * np.array([0, 1, 0])
    return {name: _rotate(at + shift, 1, angle["turn"]) for name, at in p.items()}


def _project(points: Floats, looks: Looks, take: Take, size: tuple[int, int]) -> Floats:
    """Points (T, 3) of the body as the camera sees them: x and y in pixels, nearness in body heights."""
    scale = looks.height * min(size[0], 0.75 * size[1])
    seen = _rotate(points, 1, np.full(len(points), math.degrees(looks.yaw)))
    x = (looks.place[0] + take.place[0]) * size[1] + scale * seen[:, 0]
    floor = (looks.place[1] + take.place[1]) * size[0]
    y = floor - scale * (seen[:, 1] * math.cos(looks.tilt) - seen[:, 2] * math.sin(looks.tilt))
    return np.stack([x - take.camera[:, 0], y - take.camera[:, 1], seen[:, 2]], -1)


# ----------------------------------------------------------------------------------------------------------
# Drawing. Everything is a union of capsules that get thinner (or thicker) towards one end. The distance field
# of a part is computed for all frames of the clip at once, in a patch just large enough: that is what makes
# it fast.


@dataclass(frozen=True)
class _Part:
    capsules: tuple[tuple[Floats, Floats, float, float], ...]  # ends (T, 2 or more) in pixels, radii in pixels
    colour: Floats
    depth: Floats  # (T,), larger is nearer; parts are painted from far to near
    owns: tuple[str, ...] = ()  # joints that this part cannot hide: they are its own
    opacity: float = 1.0
    round: float = 0.45  # how much darker the rim is than the middle
    stripe: tuple[Floats, int] | None = None  # a second colour, and how many stripes of it there are


def _parts(
    p: dict[str, Floats], looks: Looks, take: Take, size: tuple[int, int], stool: dict[str, Floats]
) -> list[_Part]:
    """What is in the picture besides the background. p: projected points of the body, (T, 3) each."""
    unit = looks.height * min(size[0], 0.75 * size[1])
    thick = unit * looks.build
    n = take.length

    def limb(a: str, b: str, ra: float, rb: float, colour: Floats, near: float = 0, **more: Any) -> _Part:
        depth = (p[a][:, 2] + p[b][:, 2]) / 2 + near
        return _Part(((p[a], p[b], ra * thick, rb * thick),), colour, depth, owns=(a, b), **more)

    parts = []
    # The shadow lies on the floor, however high the feet are.
    floor = (looks.place[1] + take.place[1]) * size[0] - take.camera[:, 1]
    shade = {side: np.stack([p[f"{side}_ankle"][:, 0], floor], -1) for side in "rl"}
    parts.append(
        _Part(
            ((shade["r"], shade["l"], 0.045 * unit, 0.045 * unit),),
            np.zeros(3),
            np.full(n, -9.0),
            opacity=0.35,
            round=0,
        )
    )
    if looks.stool is not None:
        for a, b, r in (("r_top", "r_leg", 0.012), ("l_top", "l_leg", 0.012), ("r_seat", "l_seat", 0.03)):
            parts.append(_Part(((stool[a], stool[b], r * unit, r * unit),), looks.stool, np.full(n, -8.0)))
    for (colour, radius, length, front), path in zip(looks.balls, take.balls, strict=True):
        at = path[:, :2] - take.camera
        half = length * size[0] / 2 * np.stack([np.cos(path[:, 2]), np.sin(path[:, 2])], -1)
        parts.append(
            _Part(
                ((at - half, at + half, radius * size[0], radius * size[0]),),
                colour,
                np.full(n, 9.0 if front else -7.0),
            )
        )

    sleeve = looks.shirt if looks.long_sleeves else looks.skin
    leg = looks.trousers if looks.long_trousers else looks.skin
    for side in "rl":
        parts.append(limb(f"{side}_ankle", f"{side}_toe", 0.026, 0.02, looks.shoes, 0.012))
        parts.append(limb(f"{side}_knee", f"{side}_ankle", 0.036, 0.025, leg, -0.004))
        parts.append(limb(f"{side}_hip", f"{side}_knee", 0.055, 0.038, looks.trousers, -0.002))
        parts.append(limb(f"{side}_shoulder", f"{side}_elbow", 0.037, 0.029, looks.shirt, 0.012))
        parts.append(limb(f"{side}_elbow", f"{side}_wrist", 0.028, 0.021, sleeve, 0.016))
        hand = limb(f"{side}_wrist", f"{side}_hand", 0.026, 0.026, looks.skin, 0.022, round=0.3)
        # A sleeve never covers the hand, even one that points away from the camera.
        parts.append(dataclasses.replace(hand, depth=np.maximum(hand.depth, parts[-1].depth + 0.002)))
    hips = p["pelvis"][:, 2]
    chest = (p["neck"][:, 2] + hips) / 2
    box = [
        (p["neck"], p["pelvis"], 0.064, 0.062),
        (p["r_shoulder"], p["l_shoulder"], 0.034, 0.034),
        (p["r_shoulder"], p["r_hip"], 0.04, 0.044),
        (p["l_shoulder"], p["l_hip"], 0.04, 0.044),
    ]
    parts.append(
        _Part(
            tuple((a, b, ra * thick, rb * thick) for a, b, ra, rb in box),
            looks.shirt,
            chest,
            owns=("neck", "r_shoulder", "l_shoulder", "r_hip", "l_hip"),
            round=0.35,
            stripe=(looks.stripe, looks.stripes) if looks.stripes else None,
        )
    )
    parts.append(
        _Part(
            ((p["r_hip"], p["l_hip"], 0.056 * thick, 0.056 * thick),),
            looks.trousers,
            np.maximum(chest, hips) + 0.003,  # the shirt is tucked in
            owns=("r_hip", "l_hip"),
            round=0.3,
        )
    )
    parts.append(limb("neck", "head", 0.03, 0.03, 0.85 * looks.skin, 0.005))
    face = ("nose", "r_eye", "l_eye", "r_ear", "l_ear")
    nearness = p["head"][:, 2] + 0.015
    parts.append(
        _Part(((p["crown"], p["chin"], 0.062 * unit, 0.05 * unit),), looks.skin, nearness, owns=face, round=0.3)
    )
    parts.append(
        _Part(
            ((p["hair"], p["hair"], 0.07 * unit, 0.07 * unit),),
            looks.hair,
            nearness + p["hair"][:, 2] - p["head"][:, 2] - 0.008,
            owns=face,
        )
    )
    for name, radius, colour in (
        ("r_eye", 0.011, np.full(3, 25.0)),
        ("l_eye", 0.011, np.full(3, 25.0)),
        ("nose", 0.012, 0.78 * looks.skin),
        ("r_ear", 0.015, 0.88 * looks.skin),
        ("l_ear", 0.015, 0.88 * looks.skin),
    ):
        # Eyes and nose belong to the front of the head: they vanish as soon as it turns away.
        near = nearness + (1.0 if "ear" not in name else 0.5) * (p[name][:, 2] - p["head"][:, 2] - 0.004)
        parts.append(_Part(((p[name], p[name], radius * unit, radius * unit),), colour, near, owns=face, round=0))
    return parts


def _field(part: _Part, x: Floats, y: Floats) -> tuple[Floats, Floats, Floats]:
    """Of a part at pixels x, y: signed distance to its rim, distance to its bone in radii, share along."""
    best = ratio = along = np.zeros(())
    for i, (a, b, ra, rb) in enumerate(part.capsules):
        a, b = (e[:, :2].astype(np.float32).reshape(-1, *(1,) * (x.ndim - 1), 2) for e in (a, b))
        bone = b - a
        px, py = x - a[..., 0], y - a[..., 1]
        share = (px * bone[..., 0] + py * bone[..., 1]) / ((bone**2).sum(-1) + np.float32(1e-6))
        np.clip(share, 0, 1, out=share)
        px, py = px - share * bone[..., 0], py - share * bone[..., 1]
        distance = np.sqrt(px * px + py * py)
        radius = np.float32(ra) + share * np.float32(rb - ra)
        signed, relative = distance - radius, distance / radius
        if i == 0:
            best, ratio, along = signed, relative, share
        else:
            best, ratio = np.minimum(best, signed), np.minimum(ratio, relative)
    return best, ratio, along


@functools.lru_cache(maxsize=2)
def _noise_tile(h: int, w: int) -> Floats:
    """Grey sensor noise of deviation 1, larger than the picture: each frame takes another cut of it."""
    tile = np.random.default_rng(0).standard_normal((h + 64, w + 64)).astype(np.float32)
    tile.setflags(write=False)
    return tile


def _paint(parts: list[_Part], looks: Looks, take: Take, size: tuple[int, int], grain: float) -> npt.NDArray[np.uint8]:
    """The frames of a clip, uint8 (T, h, w, 3); grain is the deviation of the noise, 0..255."""
    (h, w), n = size, take.length
    patches = []
    for part in parts:
        ends = np.stack(
            [np.stack([e[:, :2] - r, e[:, :2] + r]) for a, b, ra, rb in part.capsules for e, r in ((a, ra), (b, rb))]
        )
        low = np.floor(ends.min((0, 1))).astype(int) - 1
        high = np.ceil(ends.max((0, 1))).astype(int) + 2
        width, height = (high - low).max(0)
        x = (low[:, 0, None, None] + np.arange(width)).astype(np.float32)
        y = (low[:, 1, None, None] + np.arange(height)[:, None]).astype(np.float32)
        signed, ratio, along = _field(part, x, y)
        cover = np.clip(0.5 - signed, 0, 1) * np.float32(part.opacity)
        lit = cover * (np.float32(1.06) - np.float32(part.round) * np.minimum(ratio, 1) ** 2)
        second = None
        if part.stripe is not None:
            second = (np.floor(along * (2 * part.stripe[1] + 1)) % 2 == 1).astype(np.float32)
        patches.append((low, height, width, 1 - cover, lit, second))
    order = np.argsort(np.stack([part.depth for part in parts]), axis=0, kind="stable")
    colours = [(take.light * part.colour).astype(np.float32)[:, None, None] for part in parts]
    scene = looks.background * np.float32(take.light)
    noise = _noise_tile(h, w) * np.float32(grain) if grain else None
    frames = np.empty((n, h, w, 3), np.uint8)
    canvas = np.empty((3, h, w), np.float32)
    for t in range(n):
        dx, dy = take.camera[t] + looks.margin
        canvas[:] = scene[:, dy : dy + h, dx : dx + w]
        for i in order[:, t]:
            low, height, width, clear, lit, second = patches[i]
            x, y = low[t]
            x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + width, w), min(y + height, h)
            if x1 >= x2 or y1 >= y2:
                continue
            inside = np.s_[t, y1 - y : y2 - y, x1 - x : x2 - x]
            colour = colours[i]
            if second is not None:
                other = (take.light * parts[i].stripe[0]).astype(np.float32)[:, None, None]
                colour = colour + second[inside] * (other - colour)
            view = canvas[:, y1:y2, x1:x2]
            view *= clear[inside]
            view += lit[inside] * colour
        if noise is not None:
            nx, ny = take.noise[t]
            canvas += noise[ny : ny + h, nx : nx + w]
        np.clip(canvas, 0, 255, out=canvas)
        frames[t] = canvas.astype(np.uint8).transpose(1, 2, 0)
    return frames


# Where a stool stands so that a sitting person sits on it, in body heights as in skeleton().
_STOOL = {
    "r_seat": (-0.075, 0.2, -0.24),
    "l_seat": (0.075, 0.2, -0.24),
    "r_top": (-0.05, 0.19, -0.25),
    "l_top": (0.05, 0.19, -0.23),
    "r_leg": (-0.09, 0.01, -0.31),
    "l_leg": (0.09, 0.01, -0.17),
}


def render_clip(config: SynthConfig, clip: Clip, *, draw: bool = True) -> Rendered:
    """One clip, from nothing but its name. draw=False leaves the frames out (T is 0 there)."""
    set_, shot = looks(config, clip.group), take(config, clip.group, clip.number)
    angles, motion = performance(config, clip, shot)
    body = skeleton(angles, motion.feet)
    if shot.mirrored:
        other = {"r_": "l_", "l_": "r_"}
        body = {other.get(n[:2], n[:2]) + n[2:]: at * (-1, 1, 1) for n, at in body.items()}
    points = {n: _project(at, set_, shot, config.size) for n, at in body.items()}
    stool = {n: _project(np.tile(np.array(at), (shot.length, 1)), set_, shot, config.size) for n, at in _STOOL.items()}
    parts = _parts(points, set_, shot, config.size, stool)
    joints = np.stack([points[n] for n in JOINTS], 1)
    # A hundredth of a pixel, so that the last bits of another machine's sine do not show in the record.
    xy = np.round(joints[..., :2], 2).astype(np.float32)
    frames = np.empty((0, *config.size, 3), np.uint8)
    if draw:
        frames = _paint(parts, set_, shot, config.size, 7 * config.difficulty)
    return Rendered(frames, xy, _visible(joints, points, parts, config.size))


def _visible(
    joints: Floats, points: dict[str, Floats], parts: list[_Part], size: tuple[int, int]
) -> npt.NDArray[np.bool_]:
    """bool (T, 18): inside the picture, not behind another part, not on the far side of the head."""
    x, y = joints[..., 0], joints[..., 1]
    visible = (x > -0.5) & (x < size[1] - 0.5) & (y > -0.5) & (y < size[0] - 0.5)
    owned = np.array([[n in part.owns for n in JOINTS] for part in parts])
    depth = np.stack([part.depth for part in parts])
    nearest = np.where(owned[:, None], depth[:, :, None], -np.inf).max(0)  # of the joint's own parts, (T, 18)
    for i, part in enumerate(parts):
        signed, _, _ = _field(part, x.astype(np.float32), y.astype(np.float32))
        visible &= ~((signed < 0) & (depth[i][:, None] > nearest) & ~owned[i])
    for name in ("nose", "r_eye", "l_eye", "r_ear", "l_ear"):
        i = JOINTS.index(name)
        visible[:, i] &= joints[:, i, 2] > points["head"][:, 2] - (0.03 if "ear" in name else 0.005)
    return visible


# ----------------------------------------------------------------------------------------------------------
# Files.


def _replace(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    part = path.with_name(path.name + ".tmp")
    part.write_bytes(data)
    part.replace(path)


def _encode(frames: npt.NDArray[np.uint8], path: Path, fps: int, ffmpeg: str) -> None:
    """Frames uint8 (T, h, w, 3) to an .avi like UCF-101's: MPEG-4 part 2, 4:2:0, with reproducible bytes."""
    part = path.with_name(path.name + ".tmp")
    _, h, w, _ = frames.shape
    stream = ff.input("pipe:", format="rawvideo", pix_fmt="rgb24", s=f"{w}x{h}", framerate=fps)
    stream = stream.output(
        str(part),
        format="avi",
        vcodec="mpeg4",
        vtag="XVID",
        pix_fmt="yuv420p",
        threads=1,
        sws_flags="bilinear+bitexact",
        fflags="+bitexact",
        map_metadata=-1,
        **{"q:v": 3, "flags:v": "+bitexact"},
    ).overwrite_output()
    try:
        stream.run(cmd=ffmpeg, input=frames.tobytes(), quiet=True)
    except ff.Error as error:
        part.unlink(missing_ok=True)
        tail = error.stderr.decode(errors="replace").strip().splitlines()[-3:]
        raise RuntimeError(f"ffmpeg could not write {path}: {' | '.join(tail)}") from error
    part.replace(path)


def _lists(config: SynthConfig) -> dict[str, bytes]:
    """File name -> content of the official lists: UCF-101's, CRLF line ends and all, or HMDB-51's."""
    if config.layout == "hmdb":
        written: dict[str, str] = {}
        for split in (1, 2, 3):
            test = held_out(config, split)
            for c in clips(config):
                name = f"{c.folder}_test_split{split}.txt"
                line = f"{c.key}.avi {2 if c.group in test else 1} \n"  # the blank is theirs too
                written[name] = written.get(name, "") + line
        return {name: lines.encode("ascii") for name, lines in written.items()}

    def text(lines: Iterable[str]) -> bytes:
        return "".join(line + "\r\n" for line in lines).encode("ascii")

    label = {name: i for i, name in enumerate(config.classes, 1)}
    out = {"classInd.txt": text(f"{i} {name}" for name, i in label.items())}
    for split in (1, 2, 3):
        test = held_out(config, split)
        out[f"trainlist0{split}.txt"] = text(f"{c.name} {label[c.label]}" for c in clips(config) if c.group not in test)
        out[f"testlist0{split}.txt"] = text(c.name for c in clips(config) if c.group in test)
    return out


def _sizes(out: Path, names: Iterable[str]) -> str | None:
    """sha256 of the files' names and sizes, or None if one is missing: a cheap check that all is there."""
    digest = hashlib.sha256()
    for name in names:
        try:
            digest.update(f"{name} {(out / name).stat().st_size}\n".encode())
        except OSError:
            return None
    return digest.hexdigest()


def _files(config: SynthConfig) -> list[str]:
    """Every file of the dataset but synth.json, relative to its folder."""
    return (
        [f"videos/{c.name}" for c in clips(config)]
        + [f"{_LISTS[config.layout]}/{n}" for n in _lists(config)]
        + ["joints.parquet"]
    )


# What a clip of any config is called, or its half-written form; and a list.
_FOLDERS = "|".join(class_folder(name, "hmdb") for name in CLASSES)
_OURS = re.compile(
    rf"videos/(({'|'.join(CLASSES)})/v_\2_g\d\d_c\d\d|({_FOLDERS})/synth\d\d_\3_f_cm_np1_fr_med_\d+)\.avi(\.tmp)?"
)
_OUR_LISTS = re.compile(
    rf"{_LISTS['ucf']}/(classInd|(train|test)list0[123])\.txt(\.tmp)?"
    rf"|{_LISTS['hmdb']}/({_FOLDERS})_test_split[123]\.txt(\.tmp)?"
)


def is_complete(out: Path, config: SynthConfig) -> bool:
    """Whether `out` holds the whole dataset of this config and of this version of the generator."""
    try:
        record = json.loads((out / "synth.json").read_text())
    except (OSError, ValueError):
        return False
    return (
        isinstance(record, dict)
        and record.get("finished") is True
        and record.get("version") == VERSION
        and record.get("config") == json.loads(json.dumps(config.record))
        and record.get("sizes_sha256") == _sizes(out, _files(config)) is not None
    )


def generate(
    out: Path,
    config: SynthConfig,
    *,
    ffmpeg: str = "ffmpeg",
    workers: int = 1,
    progress: Callable[[int, int], object] | None = None,
) -> Path:
    """Write the dataset into `out` and return `out`; nothing is done if it is there already.

    out/videos/<Class>/v_<Class>_gNN_cMM.avi, out/ucfTrainTestlist/*.txt, out/joints.parquet (one row per
    frame: key, frame from 0, x[18] and y[18] in pixels, visible[18]) and, last of all, out/synth.json. In
    HMDB-51's layout: out/videos/<class>/synthNN_<class>_<tags>_M.avi and
    out/testTrainMulti_7030_splits/<class>_test_split{1,2,3}.txt. A folder that an interrupted run or another
    config left is regenerated, and its clips and lists that do not belong are removed; a folder with anybody
    else's videos, or lists that would be read for ours, is refused with ConfigError.

    ffmpeg: the executable.  workers: threads; the files are the same for any number (numpy and ffmpeg work
    outside Python's lock for most of the time).  progress: called as progress(clips done, clips in all) after
    each clip.
    """
    out = Path(out)
    if is_complete(out, config):
        return out
    wanted = {f"videos/{c.name}" for c in clips(config)}
    present = {p.relative_to(out).as_posix() for p in (out / "videos").glob("*/*")}
    wanted_lists = {f"{_LISTS[config.layout]}/{n}" for n in _lists(config)}
    lists = {p.relative_to(out).as_posix() for folder in _LISTS.values() for p in (out / folder).glob("*.txt*")}
    # Real data must never be overwritten or removed, whatever folder somebody names.
    foreign = {n for n in present if not _OURS.fullmatch(n)}
    if not (out / "synth.json").exists():
        foreign |= {n for n in present if n.removesuffix(".tmp") not in wanted}
    if foreign:
        raise ConfigError(f"{out} holds other videos, such as {min(foreign)}: choose another folder")
    # Lists of HMDB-51 would be read with ours, or before them; UCF-101's have the names of ours.
    foreign = {n for n in lists if n.startswith(_LISTS["hmdb"]) and "_test_split" in n and not _OUR_LISTS.fullmatch(n)}
    if not (out / "synth.json").exists():
        foreign |= {n for n in lists - wanted_lists if _OUR_LISTS.fullmatch(n)}
    if foreign:
        raise ConfigError(f"{out} holds other lists, such as {min(foreign)}: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"finished": False, "version": VERSION, "config": config.record}
    # From here on the folder is known as ours, and as unfinished.
    _replace(out / "synth.json", json.dumps(record, indent=1).encode())
    for name in (present - wanted) | {n for n in lists - wanted_lists if _OUR_LISTS.fullmatch(n)}:
        (out / name).unlink()
    for folder in [*(out / "videos").glob("*"), *(out / name for name in _LISTS.values())]:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    for label in config.classes:
        (out / "videos" / class_folder(label, config.layout)).mkdir(parents=True, exist_ok=True)

    def one(clip: Clip) -> Rendered:
        done = render_clip(config, clip)
        _encode(done.frames, out / "videos" / clip.name, config.fps, ffmpeg)
        # The joints are small, the pictures are not (and a view of them would keep them all in memory).
        return dataclasses.replace(done, frames=done.frames[:0].copy())

    todo = clips(config)
    # By group, so that a film set is built once.
    order = sorted(range(len(todo)), key=lambda i: (todo[i].group, i))
    joints: list[Rendered | None] = [None] * len(todo)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            for count, (i, done) in enumerate(zip(order, pool.map(one, [todo[i] for i in order]), strict=True), 1):
                joints[i] = done
                if progress is not None:
                    progress(count, len(todo))
        except BaseException:
            # Else leaving the block would wait for every clip that is still queued.
            pool.shutdown(cancel_futures=True)
            raise

    found = [j for j in joints if j is not None]
    record["joints_sha256"] = _write_joints(out / "joints.parquet", todo, found)
    record["names_sha256"] = hashlib.sha256("\n".join(c.name for c in todo).encode()).hexdigest()
    (out / _LISTS[config.layout]).mkdir(exist_ok=True)
    for name, content in _lists(config).items():
        _replace(out / _LISTS[config.layout] / name, content)
    record |= {
        "finished": True,
        "frames": sum(len(j.xy) for j in found),
        "sizes_sha256": _sizes(out, _files(config)),
    }
    _replace(out / "synth.json", json.dumps(record, indent=1).encode())
    return out


def _write_joints(path: Path, todo: list[Clip], joints: list[Rendered]) -> str:
    """Write joints.parquet and return the sha256 of its values."""
    lengths = [len(j.xy) for j in joints]
    xy, visible = np.concatenate([j.xy for j in joints]), np.concatenate([j.visible for j in joints])

    def rows(values: npt.NDArray[Any]) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), len(JOINTS))

    keys = [c.key for c, n in zip(todo, lengths, strict=True) for _ in range(n)]
    table = pa.table(
        {
            "key": pa.array(keys).dictionary_encode(),
            "frame": pa.array(np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])),
            "x": rows(xy[..., 0]),
            "y": rows(xy[..., 1]),
            "visible": rows(visible),
        }
    )
    part = path.with_name(path.name + ".tmp")
    pq.write_table(table, part)
    part.replace(path)
    digest = hashlib.sha256("\n".join(f"{c.key} {n}" for c, n in zip(todo, lengths, strict=True)).encode())
    digest.update(np.ascontiguousarray(xy, "<f4").tobytes())
    digest.update(np.packbits(visible).tobytes())
    return digest.hexdigest()
