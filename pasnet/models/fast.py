"""The inference form of a trained PAS-Net: the same function, laid out for speed.

Derived from a network that keeps the public names; nothing is trained or saved in this form. What changes:

  * a batch norm that follows a convolution is folded into it (those of the 3D network that follow a raw sum stay);
  * convolutions that read the same tensor are one: the four 1x1 ones of an Inception block (average pooling and a 1x1
    convolution commute, the bias added afterwards), the first of both branches of a pose stage;
  * 2D maps are channels-last; in fp32 on a CPU the 7x7 convolutions go by Fourier tiles (fourier.py);
  * bf16: weights and maps are stored in bf16; the head stays fp32;
  * bf16 on a GPU: frames and maps have channels of zeros up to a multiple of eight (openpose.py), a convolution, its
    bias and its ReLU are one kernel of cuDNN's, and the 7x7 ones run as gradients (hopper.py).

The mean of the frames is subtracted before the first convolution, not inside it: zero padding comes after the
subtraction, so that folding it would change every border. Each choice was measured; docs/performance.md has the table.
"""

from __future__ import annotations

import copy
import warnings
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d, pad, relu
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pasnet.models.eco import AppearanceTrunk
from pasnet.models.fourier import FourierConv2d
from pasnet.models.hopper import TurnedConv2d, conv_relu, fuses_relu, is_hopper, padding_of
from pasnet.models.openpose import EIGHT, MAPS, BodyMaps, BodyNet, padded_first, padded_maps, stage_layers
from pasnet.models.pasnet import PASNet

FOURIER_CHANNELS = 64  # below, a direct 7x7 convolution is so short that the transforms do not pay

FRAMES = 8  # at a time on a CPU: enough rows for the Fourier tiles' matrix products


def optimised(
    model: PASNet,
    precision: Literal["fp32", "bf16"] = "fp32",
    *,
    fourier: bool | None = None,
    compiled: bool = False,
) -> nn.Module:
    """The inference form of `model`, an independent copy on the same device: clips (B,K,3,H,W) -> fp32 logits.

    It agrees with model.eval() to 1e-4 in fp32 and 2e-2 in bf16, relative to the largest logit. `fourier`: Fourier
    tiles for the 7x7 convolutions, by default in fp32 on a CPU; they take seconds to make and 2.4 GB at width 1.
    `compiled`: through torch.compile, with CUDA graphs on a GPU; where that cannot work, a warning says why and the
    eager form is returned. Without gradients, whatever the caller's mode.
    """
    device = model.head.weight.device
    if fourier is None:
        fourier = precision == "fp32" and device.type == "cpu"
    fast = InferencePASNet(model, precision, fourier, precision == "bf16" and fuses_relu(device))
    return _compiled(fast, device) if compiled else fast


def for_evaluation(model: nn.Module, precision: str, clips: int) -> nn.Module | None:
    """The form of `model` to evaluate `clips` clips with, or None where the plain one, under autocast, is to be used.

    The fast form is taken where it was measured to be faster: on CPUs, and in bf16 on an H100 (in fp32 it is not). For
    a few clips Fourier tiles would take longer to make than they save, as torch.compile would for a test list.
    """
    if not isinstance(model, PASNet):
        return None
    if precision == "fp32" and model.head.weight.device.type == "cpu":
        return optimised(model, fourier=clips >= 16)
    if precision == "bf16" and has_fast_bf16(model.head.weight.device):
        return optimised(model, "bf16")
    return None


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware. Elsewhere bf16 is emulated, and slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class InferencePASNet(nn.Module):
    """RGB clips (B,K,3,H,W), uint8 or float 0..255 -> logits (B,num_classes), fp32. Made by `optimised`."""

    def __init__(
        self, model: PASNet, precision: Literal["fp32", "bf16"], fourier: bool, tensor_cores: bool = False
    ) -> None:
        """Copies what is needed of `model`; always in eval mode, without gradients."""
        super().__init__()
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.source = (model.config.pose_input, model.fusion.pose_feature == "post_relu")
        self.appearance = FastAppearance(model.appearance, tensor_cores) if model.fusion.needs_appearance else None
        self.pose = FastBody(model.pose, fourier, tensor_cores) if model.pose is not None else None
        self.fusion = copy.deepcopy(model.fusion).eval()
        if isinstance(self.fusion.conv, nn.Sequential) and len(self.fusion.conv) == 3:  # conv, BN, ReLU
            self.fusion.conv[0], self.fusion.conv[1] = _fold(self.fusion.conv[0], self.fusion.conv[1]), nn.Identity()
        self.temporal = copy.deepcopy(model.temporal).eval()
        for name, norm in list(self.temporal.named_children()):
            if name.endswith("_1_bn"):  # res*_1_bn follows res*_1 alone; the others follow a sum
                conv = name.removesuffix("_bn")
                self.temporal.set_submodule(conv, _fold(self.temporal.get_submodule(conv), norm))
                self.temporal.set_submodule(name, nn.Identity())
        self.to(dtype)
        for part in (self.appearance, self.pose, self.fusion):
            if part is not None:
                part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if precision == "bf16" or model.head.weight.is_cuda:
            self.temporal.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.head = copy.deepcopy(model.head)  # behind `to`: stays fp32
        self.register_buffer("mean", model.appearance_mean.detach().to(dtype), persistent=False)
        self.requires_grad_(False)
        self.dtype = dtype
        self.train(False)

    def train(self, mode: bool = True) -> InferencePASNet:
        """There is no training mode; folded batch norms have none."""
        return super().train(False)

    def forward(self, clips: Tensor) -> Tensor:
        """(B,K,3,H,W) -> (B,num_classes)."""
        if clips.dim() != 5 or clips.shape[2] != 3:
            raise ValueError(f"clips must be (B,K,3,H,W), got {tuple(clips.shape)}")
        frames = clips.flatten(0, 1)
        # A CPU takes a few frames at a time through the 2D networks: their maps stay in its caches
        parts = (frames,) if frames.is_cuda else frames.split(FRAMES)
        fused = torch.cat([self._maps(part) for part in parts])
        stacked = fused.unflatten(0, clips.shape[:2]).transpose(1, 2)
        return self.head(self.temporal(stacked).float())

    def _maps(self, frames: Tensor) -> Tensor:
        """(N,3,H,W) -> the fused maps (N,96w,H/8,W/8)."""
        pose_input, post = self.source
        bgr = frames.flip(1).to(self.dtype, memory_format=torch.channels_last)
        centred = bgr - self.get_buffer("mean")
        A = self.appearance(centred) if self.appearance is not None else None
        I, F, H = None, None, None  # noqa: E741
        if self.pose is not None:
            maps: BodyMaps = self.pose(centred if pose_input == "shared" else bgr / 256 - 0.5)
            I, F = maps.implicit, maps.paf_feature  # noqa: E741
            if not post:
                I, F = maps.implicit_pre_relu, maps.paf_feature_pre_relu  # noqa: E741
            H = maps.heatmaps
        fused: Tensor = self.fusion(A=A, I=I, F=F, H=H)
        return fused


class FastAppearance(nn.Module):
    """eco.AppearanceTrunk with folded BN and the 1x1 convolutions of a block in one: (N,3,H,W) -> (N,96w,H/8,W/8)."""

    BLOCKS = ("inception_3a", "inception_3b")
    SHARED = ("1x1", "3x3_reduce", "double_3x3_reduce", "pool_proj")  # all but the last read the block's input

    def __init__(self, trunk: AppearanceTrunk, tensor_cores: bool = False) -> None:
        """Folds and merges copies of the trunk's layers, under the trunk's names where they remain."""
        super().__init__()
        self.tensor_cores = tensor_cores
        for name, conv in trunk.named_children():
            if not name.endswith("_bn"):
                self.add_module(name, _fold(conv, trunk.get_submodule(f"{name}_bn")))
        self.widths: dict[str, list[int]] = {}
        for block in self.BLOCKS:
            parts = [self.get_submodule(f"{block}_{name}") for name in self.SHARED]
            self.widths[block] = [part.get_parameter("weight").shape[0] for part in parts]
            merged = _merge(parts)
            # pool(W x + b) is not pool(W x) + b at the border, where padding counts as zero: b comes after the pool
            bias = merged.get_parameter("bias").detach()
            self.register_buffer(f"{block}_pool_bias", bias[-self.widths[block][-1] :].clone()[:, None, None])
            bias[-self.widths[block][-1] :] = 0
            self.add_module(f"{block}_shared", merged)
            for name in self.SHARED:
                delattr(self, f"{block}_{name}")
        if tensor_cores:
            _pad_inputs(self.get_submodule("conv1_7x7_s2"))

    def _run(self, name: str, x: Tensor) -> Tensor:
        return _conv_relu(self.get_submodule(name), x, self.tensor_cores)

    def _block(self, name: str, x: Tensor) -> Tensor:
        one, three, double, proj = self.get_submodule(f"{name}_shared")(x).split(self.widths[name], dim=1)
        pooled = avg_pool2d(proj, 3, stride=1, padding=1) + self.get_buffer(f"{name}_pool_bias")
        three = self.get_submodule(f"{name}_3x3")(relu(three))
        double = self._run(f"{name}_double_3x3_1", relu(double))
        double = self.get_submodule(f"{name}_double_3x3_2")(double)
        return relu(torch.cat([one, three, double, pooled], dim=1), inplace=True)

    def forward(self, frames: Tensor) -> Tensor:
        """(N,3,H,W) -> (N,96w,H/8,W/8); see AppearanceTrunk for the shapes between."""
        if self.tensor_cores:
            frames = _eight(frames)
        x = max_pool2d(self._run("conv1_7x7_s2", frames), 3, stride=2, ceil_mode=True)
        x = self._run("conv2_3x3", self._run("conv2_3x3_reduce", x))
        x = max_pool2d(x, 3, stride=2, ceil_mode=True)
        for block in self.BLOCKS:
            x = self._block(block, x)
        return self._run("inception_3c_double_3x3_1", self._run("inception_3c_double_3x3_reduce", x))


class FastBody(BodyNet):
    """openpose.BodyNet with one first convolution for both branches of a stage; reads stage 6 as its source does."""

    def __init__(self, body: BodyNet, fourier: bool, tensor_cores: bool = False) -> None:
        """Copies the layers of `body` that its maps need."""
        nn.Module.__init__(self)
        self.paf, self.heatmap, self.unused, self.checkpoint = body.paf, body.heatmap, (), False
        self.merged, self.turned = tensor_cores, False
        for name, conv in body.named_children():
            if name not in body.unused:
                self.add_module(name, copy.deepcopy(conv))
        for stage in range(1, 7):
            firsts = [stage_layers(stage, branch)[0][0] for branch in self._branches(stage)]
            first = _merge([self.get_submodule(name) for name in firsts])
            if stage > 1 and self.merged:
                first.weight = nn.Parameter(padded_first(first.weight.detach()))
                first.in_channels = first.weight.shape[1]
            self.add_module(f"first_{stage}", first)
            for name in firsts:
                delattr(self, name)
        if self.merged:
            _pad_inputs(self.get_submodule("conv1_1"))
            for stage, branch in ((stage, branch) for stage in range(1, 6) for branch in MAPS):
                conv = self.get_submodule(stage_layers(stage, branch)[-1][0])
                assert isinstance(conv, nn.Conv2d) and conv.bias is not None
                conv.weight, conv.bias = map(
                    nn.Parameter, padded_maps(conv.weight.detach(), conv.bias.detach(), branch)
                )
                conv.out_channels = len(conv.weight)
        for name, conv in list(self.named_children()):
            if not isinstance(conv, nn.Conv2d) or conv.kernel_size != (7, 7):
                continue
            if fourier and min(conv.in_channels, conv.out_channels) >= FOURIER_CHANNELS:
                self.set_submodule(name, FourierConv2d(conv))
            elif self.merged and is_hopper(conv.weight.device):
                self.set_submodule(name, TurnedConv2d(conv))

    def _branches(self, stage: int) -> tuple[str, ...]:
        return tuple(MAPS) if stage < 6 or self.paf else ("L2",)

    def _run(self, name: str, x: Tensor) -> Tensor:
        return _conv_relu(self.get_submodule(name), x, self.merged)

    def _trunk(self, x: Tensor) -> Tensor:
        return super()._trunk(_eight(x) if self.merged else x)

    def _both(self, stage: int, x: Tensor, after_relu: bool) -> dict[str, Tensor]:
        """Both branches of a stage up to the convolution before its maps, after its ReLU or before."""
        branches = self._branches(stage)
        shared = self._run(f"first_{stage}", x)
        found = {}
        for branch, y in zip(branches, shared.chunk(len(branches), dim=1), strict=True):
            _, *between, (last, _, _), _ = stage_layers(stage, branch)
            if self.merged:
                y = y.contiguous(memory_format=torch.channels_last)  # cuDNN takes no part of a map's channels
            for name, _, _ in between:
                y = self._run(name, y)
            found[branch] = self._run(last, y) if after_relu else self._conv(last, y)
        return found

    def forward(self, frames: Tensor, everything: bool = False) -> BodyMaps:
        """As BodyNet.forward, without the maps for pictures."""
        trunk = x = self._trunk(frames)
        for stage in range(1, 6):
            maps = [self._maps(stage, branch, y) for branch, y in self._both(stage, x, after_relu=True).items()]
            x = torch.cat([*maps, trunk], dim=1)
        raw = self._both(6, x, after_relu=False)
        out = BodyMaps(implicit=relu(raw["L2"]), implicit_pre_relu=raw["L2"])
        if self.heatmap:
            out = out._replace(heatmaps=self._maps(6, "L2", out.implicit))
        if self.paf:
            out = out._replace(paf_feature=relu(raw["L1"]), paf_feature_pre_relu=raw["L1"])
        return out


def _conv_relu(conv: nn.Module, x: Tensor, tensor_cores: bool) -> Tensor:
    """conv, its bias and ReLU; on tensor cores in one kernel, but for a turned one, which has none, and for narrow
    networks' counts of channels, which cuDNN need not take."""
    if tensor_cores and isinstance(conv, nn.Conv2d) and not any(count % EIGHT for count in conv.weight.shape[:2]):
        assert conv.bias is not None
        return conv_relu(x, conv.weight, conv.bias, list(conv.stride), padding_of(conv))
    return relu(conv(x), inplace=True)


def _eight(frames: Tensor) -> Tensor:
    """(N,3,H,W) -> (N,8,H,W), the rest zeros."""
    return pad(frames, (0, 0, 0, 0, 0, EIGHT - frames.shape[1]))


def _pad_inputs(conv: nn.Module) -> None:
    """Makes a convolution of three channels one of eight, whose last five count for nothing."""
    assert isinstance(conv, nn.Conv2d)
    weight = conv.weight.detach()
    conv.weight, conv.in_channels = nn.Parameter(pad(weight, (0, 0, 0, 0, 0, EIGHT - weight.shape[1]))), EIGHT


def _fold(conv: nn.Module, norm: nn.Module) -> nn.Module:
    """A convolution that does what `conv` and, behind it, `norm` in eval mode do. Computed in double precision."""
    conv, norm = copy.deepcopy(conv).eval(), copy.deepcopy(norm).eval()
    return fuse_conv_bn_eval(conv.double(), norm.double()).float()  # type: ignore[type-var,arg-type]


def _merge(convs: list[nn.Module]) -> nn.Conv2d:
    """One convolution with the outputs of all: they read the same input, with the same kernel size and padding."""
    first = convs[0]
    assert isinstance(first, nn.Conv2d)
    weight = torch.cat([conv.get_parameter("weight") for conv in convs]).detach()
    merged = nn.Conv2d(weight.shape[1], len(weight), first.kernel_size, padding=first.padding, device="meta")  # type: ignore[arg-type]
    merged.weight = nn.Parameter(weight)
    merged.bias = nn.Parameter(torch.cat([conv.get_parameter("bias") for conv in convs]).detach())
    return merged


def _compiled(net: nn.Module, device: torch.device) -> nn.Module:
    try:  # inductor needs a C++ compiler on a CPU and Triton on a GPU, and finds out when something first runs
        probe = torch.compile(lambda x: (x + 1).relu())
        probe(torch.zeros(8, device=device))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        warnings.warn(f"torch.compile does not work here, running without it: {reason}", stacklevel=3)
        return net
    if device.type == "cuda":  # a CUDA graph is of one shape anyway
        return torch.compile(net, mode="reduce-overhead", dynamic=False)  # type: ignore[return-value]
    return torch.compile(net)  # type: ignore[return-value]
