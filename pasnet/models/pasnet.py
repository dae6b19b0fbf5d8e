"""PAS-Net: two 2D networks look at each of K frames, a fusion joins their maps, a 3D network reads the clip.

Li, Zhang, Shan, Chen: "PAS-Net: Pose-based and Appearance-based Spatiotemporal Networks Fusion for Action
Recognition", section III. Shapes at width 1 and 224 x 224:

    clips (B,K,3,224,224)
        |
        +-- appearance -- A (B*K,96,28,28) -------+
        |                                         +-- fusion -- (B,96,K,28,28) -- temporal -- (B,512)
        +-- pose -- I, F, H (B*K,...,28,28) ------+                                              |
                                                                  logits -- head -- dropout -----+

With fusion "A" this is ECO-Lite, and there is no `pose`. (The paper's base is the Lite network: its N_st ends
in 512 numbers, where ECO-Full has 1536.) How frames enter the pose network the paper does not say; its
weights expect BGR / 256 - 0.5, so each trunk here gets the scaling that it was trained with (A11, option
`pose_input`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn

from pasnet.config import ModelConfig
from pasnet.models.eco import AppearanceTrunk, TemporalNet, init_weights, scaled
from pasnet.models.fusion import Fusion
from pasnet.models.hopper import is_hopper
from pasnet.models.openpose import BodyMaps, BodyNet


class PASNet(nn.Module):
    """RGB clips (B,K,3,H,W), uint8 or float 0..255, H and W multiples of 8, any K >= 1 -> (B,num_classes)."""

    appearance_mean: Tensor

    def __init__(self, config: ModelConfig) -> None:
        """Fresh weights; load checkpoints afterwards."""
        super().__init__()
        self.config = config
        width = config.width
        self.appearance = AppearanceTrunk(width)
        self.fusion = Fusion(
            appearance_channels=self.appearance.out_channels,
            pose_channels=scaled(128, width),
            **dataclasses.asdict(config.fusion),
        )
        self.pose: BodyNet | None = None
        if self.fusion.needs_pose:
            self.pose = BodyNet(width, paf=self.fusion.needs_paf, heatmap=self.fusion.needs_heatmap)
        if not self.fusion.needs_appearance:  # style "I" does not run it, but ECO's checkpoints hold it
            self.appearance.requires_grad_(False)
        self.temporal = TemporalNet(width, in_channels=self.fusion.out_channels)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(self.temporal.out_channels, config.num_classes)
        init_weights(self.head)
        mean = torch.tensor(config.appearance_mean).view(3, 1, 1)
        self.register_buffer("appearance_mean", mean, persistent=False)
        self._still: tuple[nn.Module, ...] = ()

    def keep_still(self, modules: Iterable[nn.Module]) -> None:
        """These stay as in evaluation and learn nothing, also after train(): batch norm that keeps its statistics."""
        self._still = tuple(modules)
        for module in self._still:
            module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As nn.Module's, but for what is kept still."""
        super().train(mode)
        for module in self._still:
            module.eval()
        return self

    def appearance_input(self, bgr: Tensor) -> Tensor:
        """What ECO's weights expect: 0..255 minus the mean."""
        return bgr - self.appearance_mean

    def pose_input(self, bgr: Tensor) -> Tensor:
        """What OpenPose's weights expect, unless asked to share the appearance network's input."""
        return self.appearance_input(bgr) if self.config.pose_input == "shared" else bgr / 256 - 0.5

    def forward(self, clips: Tensor) -> Tensor:
        """(B,K,3,H,W) -> (B,num_classes)."""
        return self.head(self.dropout(self.features(clips)["descriptor"]))

    def features(self, clips: Tensor, maps: bool = False) -> dict[str, Tensor]:
        """`descriptor` (B,512w), which the head reads; with `maps` also all per-frame maps (B,K,C,h,w).

        Those are, for pictures: appearance (A), fused and, where the style reads a pose, implicit (I),
        paf_feature (F), heatmaps (H), explicit (E) and pafs. All trunks run in full then, whatever the style
        reads.
        """
        if clips.dim() != 5 or clips.shape[2] != 3:
            raise ValueError(f"clips must be (B,K,3,H,W), got {tuple(clips.shape)}")
        frames = clips.flatten(0, 1)  # (B,K,3,224,224) -> (B*K,3,224,224)
        bgr = frames.flip(1).to(self.head.weight.dtype)

        seen: dict[str, Tensor | None] = {}  # the paper's letters, see fusion.py
        pafs = None
        if self.fusion.needs_appearance or maps:
            seen["A"] = self.appearance(self.appearance_input(bgr))  # (B*K,96,28,28)
        if self.pose is not None:
            pose: BodyMaps = self.pose(self.pose_input(bgr), everything=maps)
            post = self.fusion.pose_feature == "post_relu"
            seen["I"] = pose.implicit if post else pose.implicit_pre_relu  # (B*K,128,28,28)
            seen["F"] = pose.paf_feature if post else pose.paf_feature_pre_relu  # (B*K,128,28,28) or None
            seen["H"] = pose.heatmaps  # (B*K,19,28,28) or None
            pafs = pose.pafs  # (B*K,38,28,28) or None
        fused = self.fusion(**seen)  # (B*K,96,28,28)

        # The 3D network wants time behind the channels; for channels-last maps this is a view, not a copy.
        stacked = fused.unflatten(0, clips.shape[:2]).transpose(1, 2)  # (B,96,K,28,28)
        found = {"descriptor": self.temporal(stacked)}  # (B,512)
        if maps:
            heatmaps = seen.get("H")
            pictures = {
                "appearance": seen.get("A"),
                "implicit": seen.get("I"),
                "paf_feature": seen.get("F"),
                "heatmaps": heatmaps,
                "explicit": None if heatmaps is None else self.fusion.explicit(heatmaps),
                "pafs": pafs,
                "fused": fused,
            }
            found |= {k: v.unflatten(0, clips.shape[:2]) for k, v in pictures.items() if v is not None}
        return found


def build(config: ModelConfig) -> PASNet:
    """The network of a config, with fresh weights.

    The pose network, 95 % of the work, is laid out channels-last: the same numbers, and about 1.25 times the training
    speed on a CPU (measured at width 1/8).
    """
    net = PASNet(config)
    if net.pose is not None:
        net.pose.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return net


def for_tensor_cores(net: PASNet) -> PASNet:
    """Lays `net` out, in place, for training in 16 bits on the GPU that it is on: all maps channels-last, the pose
    network `merged` and, on Hopper, `turned`."""
    for part in (net.appearance, net.pose, net.fusion):
        if part is not None:
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    net.temporal.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    if net.pose is not None:
        net.pose.merged, net.pose.turned = True, is_hopper(net.head.weight.device)
    return net


def compiled(net: nn.Module, batch: int, graphs: bool) -> Callable[[Tensor], Tensor]:
    """A forward pass for training: torch.compile for batches of so many clips, the plain one for others. (An epoch ends
    with a few clips, and to compile for them takes longer than they will.)

    `graphs`: on a GPU, forward and backward pass are recorded as CUDA graphs and replayed. What a pass gives lies in
    memory that the next one overwrites, and gradients do, too, where nothing is there to add them to. So all parameters
    that learn get gradients of 0 here; set them to 0 between steps, never to None.
    """
    if graphs:
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    whole = torch.compile(net, dynamic=False, mode="reduce-overhead" if graphs else None)

    def forward(clips: Tensor) -> Tensor:
        if len(clips) != batch:
            return net(clips)
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return whole(clips)

    return forward


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, pose_lr_mult: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for torch.optim, by ECO-pytorch's rules; parameters with requires_grad False are left out.

    Weights learn at lr with decay; biases at twice lr without; BN at lr without. The paper trains the pose
    network at the rate of the rest, 6 to 25 times OpenPose's; `pose_lr_mult` scales every rate in it.
    """
    groups: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                kind, rate, decay = "bn", lr, 0.0
            elif name == "bias":
                kind, rate, decay = "bias", 2 * lr, 0.0
            else:
                kind, rate, decay = "weight", lr, weight_decay
            if "pose" in path.split("."):
                kind, rate = f"pose_{kind}", rate * pose_lr_mult
            empty = {"name": kind, "params": [], "lr": rate, "weight_decay": decay}
            groups.setdefault(kind, empty)["params"].append(parameter)
    return list(groups.values())
