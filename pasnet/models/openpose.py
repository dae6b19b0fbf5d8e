"""The OpenPose body network (COCO, 18 keypoints) that supplies PAS-Net's pose maps.

Cao, Simon, Wei, Sheikh: "Realtime Multi-Person 2D Pose Estimation using Part Affinity Fields" (CVPR 2017).
Layers and names follow the authors' Caffe model (_trained_COCO/pose_deploy.prototxt), as the keys of the
public body_pose_model.pth do. Caffe calls the part affinity branch L1 and the heat map branch L2.

Deviations from the source:
  * no ReLU after the last heat map. Caffe's network has none; the PyTorch port (pytorch-openpose) adds one,
    which is a slip in its list of layers;
  * what the fusion does not read is not run: `paf=False` leaves out stage 6 of L1, `heatmap=False` leaves out
    Mconv7_stage6_L2, and Mconv7_stage6_L1 (the fields themselves) runs only for pictures. Those layers exist
    as parameters all the same, so that a checkpoint loads whole, but with requires_grad False, so that
    neither an optimiser nor DDP waits for gradients that cannot come. `unused` names them: skip them when
    thawing a frozen network;
  * `width` scales the hidden channels; the 38 fields and 19 heat maps keep their meaning and number.

In training the network keeps 101 MB of maps per frame (width 1, 224 x 224, fp32) for its backward pass. With
`checkpoint` set it keeps what enters each of ten parts, and runs a part again when its gradients are due: the same
gradients, for one more forward pass. A network whose parameters are all frozen keeps nothing in either case.

With `merged` set the first convolutions of a stage's two branches, which read the same maps, are run as one; and the
maps have channels of zeros behind them, 40 + 24 + 128 = 192 with the trunk's, since 185 is no multiple of the eight
that tensor cores take at once. The same sums, put together anew from the public weights in each forward pass. With
`turned` set as well the 7x7 convolutions run as hopper.py says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, pad, relu
from torch.utils.checkpoint import checkpoint

from pasnet.models.hopper import conv_same

# VGG-19's first ten convolutions and two that narrow them down: (name, outputs), None for a 2x2 max pooling.
TRUNK: tuple[tuple[str, int] | None, ...] = (
    ("conv1_1", 64), ("conv1_2", 64), None,
    ("conv2_1", 128), ("conv2_2", 128), None,
    ("conv3_1", 256), ("conv3_2", 256), ("conv3_3", 256), ("conv3_4", 256), None,
    ("conv4_1", 512), ("conv4_2", 512), ("conv4_3_CPM", 256), ("conv4_4_CPM", 128),
)  # fmt: skip
MAPS = {"L1": 38, "L2": 19}  # x and y of 19 limbs; 18 keypoints and, as channel 18, the background
EIGHT = 8  # channels that tensor cores take at once
PADDED = {branch: -(-maps // EIGHT) * EIGHT for branch, maps in MAPS.items()}  # with channels of zeros: 40 and 24


def stage_layers(stage: int, branch: str) -> list[tuple[str, int, int]]:
    """(name, outputs, kernel) of one branch of one stage, in order. The last one makes the maps."""
    if stage == 1:
        hidden = [(f"conv5_{i}_CPM_{branch}", 128, 3) for i in (1, 2, 3)]
        return [*hidden, (f"conv5_4_CPM_{branch}", 512, 1), (f"conv5_5_CPM_{branch}", MAPS[branch], 1)]
    name = f"stage{stage}_{branch}"
    hidden = [(f"Mconv{i}_{name}", 128, 7) for i in (1, 2, 3, 4, 5)]
    return [*hidden, (f"Mconv6_{name}", 128, 1), (f"Mconv7_{name}", MAPS[branch], 1)]


def padded_maps(weight: Tensor, bias: Tensor, branch: str) -> tuple[Tensor, Tensor]:
    """A convolution that makes a branch's maps -> one that makes the zeros of PADDED behind them, too."""
    zeros = PADDED[branch] - MAPS[branch]
    return pad(weight, (0, 0, 0, 0, 0, 0, 0, zeros)), pad(bias, (0, zeros))


def padded_first(weight: Tensor) -> Tensor:
    """Weights (outputs, 57 + C, k, k) of a convolution that reads both branches' maps and the trunk -> (outputs,
    64 + C, k, k), of one that reads them with the zeros of PADDED."""
    *maps, trunk = weight.split([*MAPS.values(), weight.shape[1] - sum(MAPS.values())], dim=1)
    zeros = [PADDED[branch] - MAPS[branch] for branch in MAPS]
    return torch.cat([*(pad(of, (0, 0, 0, 0, 0, z)) for of, z in zip(maps, zeros, strict=True)), trunk], dim=1)


class BodyMaps(NamedTuple):
    """What a forward pass read off stage 6; maps that were not asked for are None. h = H/8, w = W/8."""

    implicit: Tensor  # I, (N,128w,h,w): Mconv6_stage6_L2 after ReLU, the last thing before the heat maps
    implicit_pre_relu: Tensor  # the same before ReLU (A7)
    paf_feature: Tensor | None = None  # F, (N,128w,h,w): Mconv6_stage6_L1 after ReLU
    paf_feature_pre_relu: Tensor | None = None
    heatmaps: Tensor | None = None  # H, (N,19,h,w): Mconv7_stage6_L2, no ReLU, can be negative
    pafs: Tensor | None = None  # (N,38,h,w): Mconv7_stage6_L1


class BodyNet(nn.Module):
    """Normalised frames (N,3,H,W), BGR / 256 - 0.5, -> BodyMaps.

    I is always there, F and H if `paf` and `heatmap` say so, all maps with forward(..., everything=True).
    """

    def __init__(self, width: float = 1.0, paf: bool = True, heatmap: bool = True) -> None:
        """`paf` and `heatmap`: whether training reads F and H."""
        super().__init__()
        self.paf, self.heatmap = paf, heatmap
        self.checkpoint = self.merged = self.turned = False  # see the module's docstring; set them before training

        def scaled(channels: int) -> int:
            return max(4, 4 * int(channels * width / 4 + 0.5))

        channels = 3
        for layer in TRUNK:
            if layer is not None:
                channels = self._add(layer[0], channels, scaled(layer[1]), 3)
        self.out_channels = channels

        for stage in range(1, 7):
            for branch in MAPS:
                x = channels if stage == 1 else sum(MAPS.values()) + channels
                *hidden, (last, maps, kernel) = stage_layers(stage, branch)
                for name, outputs, size in hidden:
                    x = self._add(name, x, scaled(outputs), size)
                self._add(last, x, maps, kernel)
        self._init_weights()

        unused = ["Mconv7_stage6_L1"] if paf else [name for name, _, _ in stage_layers(6, "L1")]
        self.unused = tuple(unused if heatmap else [*unused, "Mconv7_stage6_L2"])
        for name in self.unused:
            self.get_submodule(name).requires_grad_(False)

    def _add(self, name: str, inputs: int, outputs: int, kernel: int) -> int:
        self.add_module(name, nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2))
        return outputs

    def _init_weights(self) -> None:
        """He initialisation: 52 layers in a row without normalisation have to keep the scale themselves.

        Root mean square of I on a test picture (input 0.25), width 1: 0.2 with this; 6e-5 with Xavier, 1e-8
        with PyTorch's default, 6e-11 with OpenPose's own Gaussian of 0.01 (it starts from VGG weights and has
        a loss at every stage). Widths 1/4 and 1/8, five seeds each: 0.03 to 0.35, neither lost nor exploded.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # every convolution here has one

    def _conv(self, name: str, x: Tensor) -> Tensor:
        if self.merged:
            weight, bias = self.get_parameter(f"{name}.weight"), self.get_parameter(f"{name}.bias")
            return conv_same(x, weight, bias, self.turned)
        return self.get_submodule(name)(x)

    def _run(self, name: str, x: Tensor) -> Tensor:
        return relu(self._conv(name, x), inplace=True)

    def _part(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """function(*inputs), in training with `checkpoint` without keeping what it computes on the way."""
        learns = self.training and torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if not (self.checkpoint and learns):
            return function(*inputs)
        # no dropout in here, so that there is no state of random numbers to restore
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)

    def _trunk(self, x: Tensor) -> Tensor:
        """In four parts, each up to a pooling: what enters a part is small beside what is in it."""

        def part(x: Tensor, start: int, stop: int) -> Tensor:
            for layer in TRUNK[start:stop]:
                x = max_pool2d(x, 2) if layer is None else self._run(layer[0], x)
            return x

        start = 0
        for stop, layer in enumerate((*TRUNK, None), start=1):
            if layer is None:
                x, start = self._part(part, x, start, stop), stop
        return x

    def _stage(self, stage: int, x: Tensor, trunk: Tensor) -> Tensor:
        """A stage before the last: what the next one reads, the maps of both branches and the trunk."""
        hidden = zip(MAPS, self._hidden(stage, tuple(MAPS), x), strict=True)
        maps = [self._maps(stage, branch, relu(y, inplace=True), self.merged) for branch, y in hidden]
        return torch.cat([*maps, trunk], dim=1)  # (N,38,28,28), (N,19,28,28) and the trunk: (N,185,28,28)

    def _hidden(self, stage: int, branches: tuple[str, ...], x: Tensor) -> list[Tensor]:
        """Branches up to the convolution before their maps, whose ReLU is still to come."""
        found = []
        for branch, y in zip(branches, self._first(stage, branches, x), strict=True):
            _, *between, (last, _, _), _ = stage_layers(stage, branch)
            for name, _, _ in between:
                y = self._run(name, y)
            found.append(self._conv(last, y))
        return found

    def _first(self, stage: int, branches: tuple[str, ...], x: Tensor) -> tuple[Tensor, ...]:
        """The first convolution of each branch, after ReLU."""
        names = [stage_layers(stage, branch)[0][0] for branch in branches]
        if not self.merged:
            return tuple(self._run(name, x) for name in names)
        weight, bias = (torch.cat([self.get_parameter(f"{name}.{of}") for name in names]) for of in ("weight", "bias"))
        if stage > 1:
            weight = padded_first(weight)
        weight = weight.contiguous(memory_format=torch.channels_last)
        both = relu(conv_same(x, weight, bias, self.turned), inplace=True)
        # cuDNN takes no part of a map's channels
        return tuple(y.contiguous(memory_format=torch.channels_last) for y in both.chunk(len(branches), dim=1))

    def _maps(self, stage: int, branch: str, hidden: Tensor, padded: bool = False) -> Tensor:
        name = stage_layers(stage, branch)[-1][0]
        if not padded:
            return self._conv(name, hidden)
        weight, bias = padded_maps(self.get_parameter(f"{name}.weight"), self.get_parameter(f"{name}.bias"), branch)
        return conv_same(hidden, weight, bias, False)

    def forward(self, frames: Tensor, everything: bool = False) -> BodyMaps:
        """Run the six stages, of the last one only what is read. Shapes for width 1 and 224 x 224."""
        trunk = self._trunk(frames)  # (N,3,224,224) -> (N,128,28,28)
        x = trunk
        for stage in range(1, 6):
            x = self._part(self._stage, stage, x, trunk)

        branches = ("L2", "L1") if self.paf or everything else ("L2",)
        together = [branches] if self.merged else [(branch,) for branch in branches]
        raw = [y for some in together for y in self._part(self._hidden, 6, some, x)]  # each (N,128,28,28)
        out = BodyMaps(implicit=relu(raw[0]), implicit_pre_relu=raw[0])
        if self.heatmap or everything:
            out = out._replace(heatmaps=self._maps(6, "L2", out.implicit))  # (N,19,28,28)
        if len(branches) == 2:
            field = relu(raw[1])
            out = out._replace(paf_feature=field, paf_feature_pre_relu=raw[1])
            if everything:
                out = out._replace(pafs=self._maps(6, "L1", field))  # (N,38,28,28)
        return out

    def stages(self, frames: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What every stage says, for a loss at each: six pairs of part affinity fields (N,38,h,w) and heat maps
        (N,19,h,w). All layers run, also those that `unused` names."""
        x = trunk = self._trunk(frames)
        found = []
        for stage in range(1, 7):
            hidden = zip(MAPS, self._hidden(stage, tuple(MAPS), x), strict=True)
            pafs, heat = (self._maps(stage, branch, relu(y), self.merged) for branch, y in hidden)
            found.append((pafs[:, : MAPS["L1"]], heat[:, : MAPS["L2"]]))
            x = torch.cat([pafs, heat, trunk], dim=1)
        return found
