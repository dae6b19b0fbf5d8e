"""How PAS-Net joins appearance and pose on a frame: the paper's equations (3) to (11) and Table I's control.

The paper's letters. All maps belong to N = B*K frames and are h x w (28 x 28 at 224 x 224), here at width 1:

    A  appearance features          (N, 96, h, w)   AppearanceTrunk, after ReLU
    I  implicit pose features       (N,128, h, w)   BodyNet: what its heat maps are computed from
    F  part affinity features       (N,128, h, w)   BodyNet: what its part affinity fields are computed from
    H  heat maps                    (N, 19, h, w)   BodyNet: 18 keypoints, and channel 18 for the background
    E  explicit pose feature        (N,  1, h, w)   maximum of H over the keypoints: where any keypoint is

`E*A` is the product at each position, E spread over the channels of A; `Conv` is one convolution of
concatenated channels, back to those of A; `pool` takes means over channels, 128 -> 96, at each position.

The paper leaves open which channels `pool` takes (A1), the kernel of `Conv` (A2), what follows it (A3), how
it starts (A4), whether E includes the background (A5) or clamps H (A6), whether I and F are taken after ReLU
(A7), how I alone fits the 3D network (A8), and whether the control's convolution replaces A (A10). Each is an
option; pasnet/config.py says why its default is what it is. The factors lambda (A9) are constants, as in the
paper.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

# What each style reads, in the order of its equation.
READS: dict[str, str] = {
    "A": "A",
    "I": "I",
    "E*A": "EA",
    "A+E*A": "AE",
    "Conv(A,E*A)": "AE",
    "A+pool(I)": "AI",
    "Conv(A,I)": "AI",
    "A+pool(I)+pool(F)": "AIF",
    "Conv(A,I,F)": "AIF",
    "A+1*1conv": "A",
}
BACKGROUND = 18  # the last channel of H

Map = Any  # a Tensor, or None where the style does not read it


def channel_windows(kind: str, inputs: int, outputs: int) -> list[tuple[int, int]]:
    """For each output channel of `pool`, the input channels [start, stop) that it is the mean of (A1)."""
    match kind:
        case "adaptive":  # as F.adaptive_avg_pool1d: {0,1} {1,2} {2,3} {4,5} ... for 128 -> 96
            return [(j * inputs // outputs, -(-(j + 1) * inputs // outputs)) for j in range(outputs)]
        case "sliding33":  # the one window that moves by 1 and fits: 33 wide for 128 -> 96
            return [(j, j + inputs - outputs + 1) for j in range(outputs)]
        case "mean1":  # one mean map, repeated
            return [(0, inputs)] * outputs
        case "first96":  # no mean at all
            return [(j, j + 1) for j in range(outputs)]
    raise ValueError(f"unknown channel_pool {kind!r}")


class ChannelPool(nn.Module):
    """`pool`: each output channel is the mean of a window of input channels. Nothing to learn.

    It is a 1x1 convolution with fixed weights because CUDA's adaptive pooling has no deterministic backward.
    """

    matrix: Tensor

    def __init__(self, kind: str, inputs: int, outputs: int) -> None:
        """`kind`, `inputs` and `outputs` as for channel_windows."""
        super().__init__()
        matrix = torch.zeros(outputs, inputs, 1, 1)
        for j, (start, stop) in enumerate(channel_windows(kind, inputs, outputs)):
            matrix[j, start:stop] = 1 / (stop - start)
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N,inputs,h,w) -> (N,outputs,h,w)."""
        return nn.functional.conv2d(x, self.matrix)


class Fusion(nn.Module):
    """One fusion style; the options are those of config.FusionConfig, under the same names.

    `pose_feature` (A7) is about what the caller passes as I and F. This module only keeps it, so that all
    answers are found in one place.
    """

    def __init__(
        self,
        *,
        appearance_channels: int = 96,
        pose_channels: int = 128,
        style: str = "A+pool(I)+pool(F)",
        lambda1: float = 1.5,
        lambda2: float = 1.5,
        lambda3: float = 0.5,
        lambda4: float = 1.0,
        channel_pool: Literal["adaptive", "sliding33", "mean1", "first96"] = "adaptive",
        kernel: Literal[1, 3] = 1,
        act: Literal["none", "relu", "bn_relu"] = "none",
        init: Literal["xavier", "identity_on_a"] = "xavier",
        heatmap_background: bool = False,
        heatmap_clamp: Literal["none", "relu", "01"] = "none",
        pose_feature: Literal["post_relu", "pre_relu"] = "post_relu",
        i_only: Literal["pool", "new_res3a"] = "pool",
        control_mode: Literal["sequential", "residual"] = "sequential",
    ) -> None:
        """Build what the style needs and nothing else; channel counts are those of A and of I and F."""
        super().__init__()
        if style not in READS:
            raise ValueError(f"unknown fusion style {style!r} (one of: {', '.join(READS)})")
        self.style = style
        self.needs_appearance = "A" in READS[style]
        self.needs_heatmap = "E" in READS[style]
        self.needs_paf = "F" in READS[style]
        self.needs_pose = READS[style] != "A"

        self.lambda1, self.lambda2, self.lambda3, self.lambda4 = lambda1, lambda2, lambda3, lambda4
        self.heatmap_background, self.heatmap_clamp = heatmap_background, heatmap_clamp
        self.pose_feature, self.i_only, self.control_mode = pose_feature, i_only, control_mode

        a, p = appearance_channels, pose_channels
        self.out_channels = p if style == "I" and i_only == "new_res3a" else a

        self.pool: nn.Module = nn.Identity()
        if "pool" in style or (style == "I" and i_only == "pool"):
            self.pool = ChannelPool(channel_pool, p, a)

        self.conv: nn.Module = nn.Identity()
        inputs = {"Conv(A,E*A)": a + a, "Conv(A,I)": a + p, "Conv(A,I,F)": a + p + p, "A+1*1conv": a}
        if style in inputs:
            size = 1 if style == "A+1*1conv" else kernel  # the control is 1*1 by name
            conv = nn.Conv2d(inputs[style], a, size, padding=size // 2)
            self._init_conv(conv, init)
            after: dict[str, list[nn.Module]] = {
                "none": [],
                "relu": [nn.ReLU()],
                "bn_relu": [nn.BatchNorm2d(a), nn.ReLU()],
            }
            self.conv = nn.Sequential(conv, *after[act])

    def _init_conv(self, conv: nn.Conv2d, init: str) -> None:
        """A4. With `identity_on_a` training starts from h = A, that is from ECO as it was."""
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        if init == "xavier":
            nn.init.xavier_uniform_(conv.weight)
        elif init == "identity_on_a":
            nn.init.zeros_(conv.weight)
            if not (self.style == "A+1*1conv" and self.control_mode == "residual"):  # there A is added anyway
                with torch.no_grad():
                    centre, c = conv.kernel_size[0] // 2, torch.arange(conv.out_channels)
                    conv.weight[c, c, centre, centre] = 1  # A comes first in every concatenation
        else:
            raise ValueError(f"unknown init {init!r}")

    def explicit(self, H: Tensor) -> Tensor:
        """E: the strongest keypoint at each position, (N,19,h,w) -> (N,1,h,w)."""
        if not self.heatmap_background:
            H = H[:, :BACKGROUND]
        if self.heatmap_clamp == "relu":
            H = H.relu()
        elif self.heatmap_clamp == "01":
            H = H.clamp(0, 1)
        return H.amax(dim=1, keepdim=True)

    def forward(self, A: Map = None, I: Map = None, F: Map = None, H: Map = None) -> Tensor:  # noqa: E741
        """The maps that the style reads -> h, (N,96w,h,w); with `new_res3a`, I as it is."""
        pool, conv, E = self.pool, self.conv, self.explicit(H) if self.needs_heatmap else None
        h: Tensor
        match self.style:
            case "A":  # (3)
                h = A
            case "I":  # (4)
                h = pool(I)
            case "E*A":  # (5)
                h = E * A
            case "A+E*A":  # (6)
                h = A + self.lambda1 * (E * A)
            case "Conv(A,E*A)":  # (7)
                h = conv(torch.cat([A, E * A], dim=1))
            case "A+pool(I)":  # (8)
                h = A + self.lambda2 * pool(I)
            case "Conv(A,I)":  # (9)
                h = conv(torch.cat([A, I], dim=1))
            case "A+pool(I)+pool(F)":  # (10)
                h = A + self.lambda3 * pool(I) + self.lambda4 * pool(F)
            case "Conv(A,I,F)":  # (11)
                h = conv(torch.cat([A, I, F], dim=1))
            case "A+1*1conv":  # Table I
                h = A + conv(A) if self.control_mode == "residual" else conv(A)
            case _:
                raise AssertionError(self.style)  # __init__ let it through
        return h
