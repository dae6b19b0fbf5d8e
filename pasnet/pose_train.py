"""The pose network's own start where COCO's is not at hand: BodyNet on joints that are known, frame by frame.

Cao, Simon, Wei, Sheikh: "Realtime Multi-Person 2D Pose Estimation using Part Affinity Fields" (CVPR 2017), section 2:
targets are a Gaussian for each joint and a field of unit vectors along each limb, the loss is L2 on both branches of
all six stages. Joints come from joints.parquet, which pasnet/synth.py leaves beside its videos; frames from shards of
the same videos. What comes out, pose.safetensors, has the public names, and init.pose takes it as it takes OpenPose's.

Deviations from the source: Adam and no VGG weights at the start; a joint that is hidden or outside gives no Gaussian
and no limb (COCO has people mark hidden joints, too); one person to a frame, so that nothing is averaged.

A folder holds config.json, last.pt (every config.checkpoint_steps), pose.safetensors and, last, quality.json. Started
again it goes on from last.pt: what a step sees depends on its number alone. Equal settings give equal weights on one
machine.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pasnet import weights
from pasnet.config import ConfigError, DataConfig, PoseTrainConfig, digest, to_dict
from pasnet.data import ShardSet, View, centre, open_shards, train_view
from pasnet.evaluate import set_precision
from pasnet.machine import hardware
from pasnet.models.openpose import MAPS, BodyNet, stage_layers
from pasnet.registry import OPENPOSE
from pasnet.synth import JOINTS

VERSION = 1  # part of a run's identity: raise it when a change here changes the weights that come out
STRIDE = 8  # pixels of the input to a cell of the maps; a cell's centre is at 8 * cell + 3.5
WEIGHTS, QUALITY = "pose.safetensors", "quality.json"
LICENCE = "our own, trained on synthetic videos by pasnet pose-train"

# The limbs of OpenPose's COCO model, (from, to), in the order of their channels: limb i has x in 2i and y in 2i + 1.
# (poseParameters.cpp of OpenPose lists them in another order, with the channels beside them.)
# fmt: off
LIMBS = ((1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 2), (2, 3), (3, 4), (2, 16),
         (1, 5), (5, 6), (6, 7), (5, 17), (1, 0), (0, 14), (0, 15), (14, 16), (15, 17))
# fmt: on
_OTHER = {"r_": "l_", "l_": "r_"}
MIRROR = tuple(JOINTS.index(_OTHER.get(name[:2], name[:2]) + name[2:]) for name in JOINTS)  # left for right

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


def draw_targets(xy: Floats, visible: Bools, size: int, sigma: float, limb_width: float) -> tuple[Floats, Floats]:
    """Joints -> heat maps (N,19,h,w) in 0..1 and part affinity fields (N,38,h,w), components of unit vectors.

    `xy` (N,18,2) is in pixels of the network's input, `size` (a multiple of 8) its height and width, h = w = size / 8;
    `visible` (N,18) says which joints count. `sigma` is in pixels, `limb_width` in cells. Channel 18 of the heat maps
    is the background, 1 minus the largest of the others. A limb covers the cells whose centres are at most limb_width
    from its line, and from the box around its ends.
    """
    cells = size // STRIDE
    at = ((np.asarray(xy, np.float32) - (STRIDE - 1) / 2) / STRIDE)[..., None, None]  # (N,18,2,1,1), in cells
    grid_x = np.arange(cells, dtype=np.float32)[None, :]
    grid_y = np.arange(cells, dtype=np.float32)[:, None]

    heat = np.zeros((len(xy), len(JOINTS) + 1, cells, cells), np.float32)
    squares = (grid_x - at[:, :, 0]) ** 2 + (grid_y - at[:, :, 1]) ** 2
    heat[:, :-1] = np.exp(-squares / (2 * (sigma / STRIDE) ** 2)) * visible[:, :, None, None]
    heat[:, -1] = 1 - heat[:, :-1].max(1)

    pafs = np.zeros((len(xy), 2 * len(LIMBS), cells, cells), np.float32)
    for limb, (start, end) in enumerate(LIMBS):
        a, b = at[:, start], at[:, end]  # (N,2,1,1)
        length = np.sqrt(((b - a) ** 2).sum(1, keepdims=True))
        way = (b - a) / np.maximum(length, 1e-6)
        away = np.abs(way[:, 0] * (grid_y - a[:, 1]) - way[:, 1] * (grid_x - a[:, 0]))  # from the line, (N,h,w)
        low, high = np.minimum(a, b) - limb_width, np.maximum(a, b) + limb_width
        inside = (grid_x >= low[:, 0]) & (grid_x <= high[:, 0]) & (grid_y >= low[:, 1]) & (grid_y <= high[:, 1])
        there = (visible[:, start] & visible[:, end])[:, None, None] & (length[:, 0] > 1e-3)
        pafs[:, 2 * limb : 2 * limb + 2] = way * (inside & (away <= limb_width) & there)[:, None]
    return heat, pafs


def in_view(xy: Floats, visible: Bools, view: View, frame: tuple[int, int], size: int) -> tuple[Floats, Bools]:
    """Joints (18,2) of a stored frame (height, width) -> as the network sees them in a `view` of size x size pixels.

    A mirrored view exchanges left and right, since they are the person's own. Joints outside it are not visible.
    """
    top, left, height, width = (number // 2 * 2 for number in view[:4])  # as frames are read, see View
    x = (xy[:, 0] + 0.5 - left) * size / width - 0.5
    y = (xy[:, 1] + 0.5 - top) * size / height - 0.5
    seen = visible & (x > -0.5) & (x < size - 0.5) & (y > -0.5) & (y < size - 0.5)
    if view.flip:
        order = list(MIRROR)
        x, y, seen = (size - 1 - x)[order], y[order], seen[order]
    return np.stack([x, y], 1).astype(np.float32), seen


def loss_of(stages: list[tuple[Tensor, Tensor]], heat: Tensor, pafs: Tensor) -> Tensor:
    """L2 of both branches of every stage: squared errors, summed over channels, averaged over frames and cells."""
    total = heat.new_zeros(())
    for field, maps in stages:
        total = total + (field - pafs).square().sum(1).mean() + (maps - heat).square().sum(1).mean()
    return total


class Frames:
    """Frames of shards with the joints that are known of them. Raises ConfigError where the two do not belong together.

    `joints` is a joints.parquet of pasnet/synth.py. Rows are those of the shards' index.
    """

    def __init__(self, shards: ShardSet, joints: Path) -> None:
        self.shards = shards
        joints = Path(joints)
        if not joints.is_file():
            raise ConfigError(f"{joints}: no such file; `pasnet synth` leaves joints.parquet beside its videos")
        try:
            table = pq.read_table(joints, columns=["key", "frame", "x", "y", "visible"])
            height, width = json.loads((joints.parent / "synth.json").read_text("utf-8"))["config"]["size"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{joints}: not a joints.parquet of pasnet synth with its synth.json ({error}); generate them again"
            ) from error

        def column(name: str) -> npt.NDArray[Any]:
            return table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)

        self.visible: Bools = column("visible").astype(bool)
        # from pixels of the video to those of the stored frame; pixel 0 reaches from -0.5 to 0.5
        scale = np.array([shards.frame_size[1] / width, shards.frame_size[0] / height], np.float32)
        self.xy: Floats = (np.stack([column("x"), column("y")], 2).astype(np.float32) + 0.5) * scale - 0.5
        first: dict[str, int] = {}
        count: dict[str, int] = {}
        for place, key in enumerate(table["key"].to_pylist()):
            first.setdefault(key, place)
            count[key] = count.get(key, 0) + 1
        self.first: list[int] = []  # by row: where its frames start
        for key, frames in zip(shards.keys, shards.num_frames, strict=True):
            name = key.rsplit("/", 1)[-1]  # the shards' keys have the class before them
            if count.get(name) != frames:
                raise ConfigError(
                    f"{joints}: has {count.get(name, 0)} frames of {key}, {shards.folder} has {frames}; "
                    f"give the joints of the same videos"
                )
            self.first.append(first[name])

    def read(self, chosen: list[tuple[int, int, View]], config: PoseTrainConfig) -> tuple[Tensor, Tensor, Tensor]:
        """(row, frame, view) of each -> the network's input (N,3,S,S) and its targets, heat maps and fields."""
        size, pictures, places, seen = config.input_size, [], [], []
        for row, frame, view in chosen:
            pictures.append(self.shards.read_clip(row, [frame], view, (size, size))[0])
            xy, visible = self.joints(row, frame, view, size)
            places.append(xy)
            seen.append(visible)
        heat, pafs = draw_targets(np.stack(places), np.stack(seen), size, config.sigma, config.limb_width)
        bgr = torch.from_numpy(np.stack(pictures)).flip(1).float()
        return bgr / 256 - 0.5, torch.from_numpy(heat), torch.from_numpy(pafs)

    def joints(self, row: int, frame: int, view: View, size: int) -> tuple[Floats, Bools]:
        """Joints of a frame in a view, as `in_view` gives them."""
        place = self.first[row] + frame
        return in_view(self.xy[place], self.visible[place], view, self.shards.frame_size, size)


def train_pose(config: PoseTrainConfig, shards_folder: Path, joints: Path, out: Path) -> dict[str, Any]:
    """Trains the pose network, on a GPU (in TF32) where there is one, and returns its quality (see `quality`), also in
    quality.json; nothing is done twice.

    Raises ConfigError and ShardError before the first step, ConfigError when `out` holds a run with other settings or
    the loss is not finite.
    """
    out = Path(out)
    shards = open_shards(Path(shards_folder))
    frames = Frames(shards, joints)
    rows = shards.select(config.split, "train")
    settings = {name: value for name, value in to_dict(config).items() if name != "checkpoint_steps"}
    identity = digest([VERSION, settings, shards.digest, weights.sha256_of(Path(joints))])
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    net = BodyNet(config.width).requires_grad_(True)  # also the layers that no fusion style reads
    for stage in range(1, 7):  # OpenPose's own start for what makes the maps: near nothing, which most of a map is
        for branch in MAPS:
            torch.nn.init.normal_(net.get_parameter(f"{stage_layers(stage, branch)[-1][0]}.weight"), std=0.01)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = "tf32" if device.type == "cuda" else "fp32"
    set_precision(precision)
    net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # as in models/pasnet.py
    optimizer = torch.optim.Adam(net.parameters(), lr=config.lr)
    step, losses, seconds = 0, [], 0.0
    if (out / "last.pt").is_file():
        state = torch.load(out / "last.pt", map_location="cpu", weights_only=True)
        if state["identity"] != identity:
            raise ConfigError(f"{out / 'last.pt'}: is a run with other settings; give another folder, or remove it")
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, losses, seconds = state["step"], state["losses"], state["seconds"]
        print(f"going on after step {step} of {config.steps}", flush=True)
        if step == config.steps and (out / QUALITY).is_file() and (out / WEIGHTS).is_file():
            return dict(json.loads((out / QUALITY).read_text("utf-8")))
    _write(out / "config.json", json.dumps(to_dict(config), indent=1).encode())

    data = DataConfig(shards=str(shards_folder), input_size=config.input_size, flip=config.flip)
    while step < config.steps:
        started, block = time.perf_counter(), []
        for number in range(step, min(step + config.checkpoint_steps, config.steps)):
            rng = np.random.default_rng([config.seed, VERSION, number])
            chosen = []
            for row in rng.choice(rows, config.batch):
                view = train_view(*shards.frame_size, rng, config=data)
                chosen.append((int(row), int(rng.integers(shards.num_frames[row])), view))
            pictures, heat, pafs = (each.to(device) for each in frames.read(chosen, config))
            for group in optimizer.param_groups:
                group["lr"] = config.lr * rate_at(number, config)
            loss = loss_of(net.stages(pictures), heat, pafs)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip_norm)
            block.append(float(loss.detach()))
            if not math.isfinite(block[-1]):
                raise ConfigError(f"{out}: loss is {block[-1]} at step {number + 1}; lower lr, now {config.lr:g}")
            optimizer.step()
        step = number + 1
        seconds += time.perf_counter() - started
        losses.append(sum(block) / len(block))
        _save(
            out / "last.pt",
            identity=identity,
            step=step,
            losses=losses,
            seconds=seconds,
            model=net.state_dict(),
            optimizer=optimizer.state_dict(),
        )
        print(
            f"step {step}/{config.steps}  loss {losses[-1]:.3f}  {step * config.batch / seconds:.0f} frames/s",
            flush=True,
        )

    found = {
        "dataset": shards.manifest["dataset"],
        "digest": shards.digest,
        "identity": identity,
        **quality(net, frames, config),
        "losses": losses,  # means over config.checkpoint_steps steps, all stages and branches together
        "seconds": seconds,
        "device": hardware(),
        "precision": precision,
    }
    weights.write(
        out / WEIGHTS,
        {name: value.cpu().contiguous() for name, value in net.state_dict().items()},
        kind="pose",
        source=(f"pasnet pose-train on {found['dataset']}",),
        source_sha256=(shards.digest,),
        licence=LICENCE,
        preprocessing=OPENPOSE,
    )
    _write(out / QUALITY, json.dumps(found, indent=1).encode())
    return found


def rate_at(step: int, config: PoseTrainConfig) -> float:
    """Share of the rate at a step, counted from 0: a linear rise, then half a cosine down to nothing."""
    rise = min(1.0, (step + 1) / (config.warmup + 1))
    return rise * 0.5 * (1 + math.cos(math.pi * step / config.steps))


@torch.no_grad()
def quality(net: BodyNet, frames: Frames, config: PoseTrainConfig) -> dict[str, Any]:
    """How good the last stage is on frames of the test list, whose groups were not trained on, in the test view.

    `heat_l2` and `paf_l2`: squared error, summed over the 18 joints (38 components), averaged over cells and frames;
    `..._zero` of maps that are 0 everywhere and `..._mean` of the mean of the training frames' maps, which know where
    people stand, but not how. `within_a_cell`: share of the visible joints whose heat map is largest in a cell whose
    centre is at most 8 pixels away, also by joint (None: never visible).
    """
    net.eval()
    device = next(net.parameters()).device
    rng = np.random.default_rng([config.seed, VERSION, config.steps, 1])
    view = centre(*frames.shards.frame_size)

    def some(subset: str) -> list[tuple[int, int, View]]:
        rows = rng.choice(frames.shards.select(config.split, subset), config.measure)
        return [(int(row), int(rng.integers(frames.shards.num_frames[row])), view) for row in rows]

    _, mean_heat, mean_pafs = (each.mean(0).to(device) for each in frames.read(some("train"), config))
    tested = some("test")
    sums = dict.fromkeys(("heat_l2", "heat_l2_zero", "heat_l2_mean", "paf_l2", "paf_l2_zero", "paf_l2_mean"), 0.0)
    hits, shown = np.zeros(len(JOINTS)), np.zeros(len(JOINTS))
    for first in range(0, len(tested), config.batch):
        chosen = tested[first : first + config.batch]
        pictures, heat, pafs = (each.to(device) for each in frames.read(chosen, config))
        field, maps = net.stages(pictures)[-1]
        maps, heat = maps[:, :-1], heat[:, :-1]
        for name, ours, true, mean in (("heat", maps, heat, mean_heat[:-1]), ("paf", field, pafs, mean_pafs)):
            for kind, guess in (("", ours), ("_zero", torch.zeros_like(true)), ("_mean", mean)):
                sums[f"{name}_l2{kind}"] += float((guess - true).square().sum(1).mean((1, 2)).sum())
        peaks = maps.flatten(2).argmax(2).cpu().numpy()  # (N,18)
        cells = maps.shape[3]
        at = np.stack([peaks % cells, peaks // cells], 2) * STRIDE + (STRIDE - 1) / 2
        for place, (row, frame, _) in zip(at, chosen, strict=True):
            xy, visible = frames.joints(row, frame, view, config.input_size)
            hits += visible & (np.sqrt(((place - xy) ** 2).sum(1)) <= STRIDE)
            shown += visible
    by_joint = {name: float(h / s) if s else None for name, h, s in zip(JOINTS, hits, shown, strict=True)}
    return {
        "frames": len(tested),
        **{name: value / len(tested) for name, value in sums.items()},
        "within_a_cell": float(hits.sum() / max(shown.sum(), 1)),
        "within_a_cell_by_joint": by_joint,
    }


def _save(path: Path, **state: Any) -> None:
    scratch = path.with_suffix(".tmp")
    torch.save(state, scratch)
    os.replace(scratch, path)


def _write(path: Path, content: bytes) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_bytes(content)
    os.replace(scratch, path)
