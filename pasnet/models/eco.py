"""ECO-Lite's halves: BN-Inception up to half of inception_3c per frame, then the rest of a 3D ResNet-18.

Zolfaghari, Singh, Brox: "ECO: Efficient Convolutional Network for Online Video Understanding" (ECCV 2018).
Layers follow the authors' ECO-pytorch (tf_model_zoo/ECO/ECO.yaml, commit b175e7c) and its Caffe original;
module names are theirs, so that a public checkpoint loads by name once its `module.base_model.` prefix is
gone. Every convolution has a bias, although a BN follows most of them: the checkpoints carry those biases.

Deviations from the source:
  * the last pooling is global. The original pools over (K/4, 7, 7), which is the same for K = 4, 8, 12, ...
    and breaks for every other K;
  * the classifier is not here: `pasnet.py` has dropout and head, and ECO-Lite is PAS-Net with fusion "A";
  * `width` scales every channel count (1.0 is the network of the paper), for tests and for runs on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d, relu


def scaled(channels: int, width: float) -> int:
    """A channel count of the paper at a given width: the nearest multiple of 4, at least 4."""
    return max(4, 4 * int(channels * width / 4 + 0.5))


def init_weights(net: nn.Module) -> None:
    """ECO-pytorch's rule for tensors without a checkpoint. BN re-scales each layer, so Xavier will do."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class _BNInception(nn.Module):
    """What BN-Inception is made of: conv-BN-ReLU triples under flat names, and blocks of four branches."""

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = width

    def _add(self, name: str, inputs: int, outputs: int, kernel: int, stride: int = 1) -> int:
        """Register convolution `name` and its BN; `outputs` is the paper's count. Returns the scaled one."""
        outputs = scaled(outputs, self.width)
        self.add_module(name, nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2))
        self.add_module(f"{name}_bn", nn.BatchNorm2d(outputs))
        return outputs

    def _run(self, name: str, x: Tensor) -> Tensor:
        # In place is safe here: BN's backward needs its input, and nobody else holds its output.
        return relu(self.get_submodule(f"{name}_bn")(self.get_submodule(name)(x)), inplace=True)

    def _add_block(
        self, name: str, inputs: int, *, one: int, three: tuple[int, int], double: tuple[int, int], pool: int
    ) -> int:
        """A stride-1 block: 1x1, reduce-3x3, reduce-3x3-3x3, pool-1x1 side by side. Returns its channels."""
        c1 = self._add(f"{name}_1x1", inputs, one, 1)
        c2 = self._add(f"{name}_3x3", self._add(f"{name}_3x3_reduce", inputs, three[0], 1), three[1], 3)
        c3 = self._add(f"{name}_double_3x3_reduce", inputs, double[0], 1)
        c3 = self._add(f"{name}_double_3x3_1", c3, double[1], 3)
        c3 = self._add(f"{name}_double_3x3_2", c3, double[1], 3)
        c4 = self._add(f"{name}_pool_proj", inputs, pool, 1)
        return c1 + c2 + c3 + c4

    def _run_block(self, name: str, x: Tensor) -> Tensor:
        def chain(y: Tensor, *layers: str) -> Tensor:
            for layer in layers:
                y = self._run(f"{name}_{layer}", y)
            return y

        branches = [
            chain(x, "1x1"),
            chain(x, "3x3_reduce", "3x3"),
            chain(x, "double_3x3_reduce", "double_3x3_1", "double_3x3_2"),
            chain(avg_pool2d(x, 3, stride=1, padding=1), "pool_proj"),  # padding zeros count, as in Caffe
        ]
        return torch.cat(branches, dim=1)


class AppearanceTrunk(_BNInception):
    """H_2D, the appearance network: normalised frames (N,3,H,W) -> A (N,96w,H/8,W/8), after ReLU.

    `normalised` means BGR, 0..255, minus the mean, which `pasnet.py` does. Shapes below: width 1, 224 x 224.
    """

    def __init__(self, width: float = 1.0) -> None:
        """Register the layers in the order of the data."""
        super().__init__(width)
        x = self._add("conv1_7x7_s2", 3, 64, 7, stride=2)
        x = self._add("conv2_3x3_reduce", x, 64, 1)
        x = self._add("conv2_3x3", x, 192, 3)
        x = self._add_block("inception_3a", x, one=64, three=(64, 64), double=(64, 96), pool=32)
        x = self._add_block("inception_3b", x, one=64, three=(64, 96), double=(64, 96), pool=64)
        x = self._add("inception_3c_double_3x3_reduce", x, 64, 1)
        self.out_channels = self._add("inception_3c_double_3x3_1", x, 96, 3)
        init_weights(self)

    def forward(self, frames: Tensor) -> Tensor:
        """(N,3,H,W) -> (N,96w,H/8,W/8)."""
        x = self._run("conv1_7x7_s2", frames)  # (N,3,224,224) -> (N,64,112,112)
        x = max_pool2d(x, 3, stride=2, ceil_mode=True)  # (N,64,56,56); Caffe rounds pooled sizes up
        x = self._run("conv2_3x3_reduce", x)
        x = self._run("conv2_3x3", x)  # (N,192,56,56)
        x = max_pool2d(x, 3, stride=2, ceil_mode=True)  # (N,192,28,28)
        x = self._run_block("inception_3a", x)  # (N,256,28,28)
        x = self._run_block("inception_3b", x)  # (N,320,28,28)
        x = self._run("inception_3c_double_3x3_reduce", x)  # (N,64,28,28)
        return self._run("inception_3c_double_3x3_1", x)  # (N,96,28,28)


class TemporalNet(nn.Module):
    r"""H_3D, the spatiotemporal network: stacked maps (B,96w,K,h,w) -> one descriptor (B,512w) per clip.

    A pre-activation ResNet: BN and ReLU sit before the convolutions, and the skip carries the raw sum, which
    has seen no BN. All kernels are 3x3x3. There is no `res3a_1`, the 2D network has taken its place; the two
    `down` convolutions (stride 2 in time and space) have no BN. Below, `_bn >` stands for that BN and a ReLU:

        x - res3a_2 -+-----------------------------------------------(+)- res3b_bn > u       (128,K,28,28)
                     |                                                |
                     +- res3a_bn > res3b_1 - res3b_1_bn > res3b_2 ----+

        u -+- res4a_down -----------------------(+)- raw                                     (256,K/2,14,14)
           |                                     |
           +- res4a_1 - res4a_1_bn > res4a_2 ----+

        raw -+----------------------------------------------(+)- res4b_bn > v                (256,K/2,14,14)
             |                                               |
             +- res4a_bn > res4b_1 - res4b_1_bn > res4b_2 ---+

        v - res5, built like res4 - mean over time and space                      (512,K/4,7,7) -> (512)
    """

    def __init__(self, width: float = 1.0, in_channels: int | None = None) -> None:
        """`in_channels` differs from 96w only where a fusion hands over something else (A8)."""
        super().__init__()
        c0 = scaled(96, width) if in_channels is None else in_channels
        c3, c4, c5 = (scaled(c, width) for c in (128, 256, 512))
        self.out_channels = c5

        self.res3a_2 = _conv3d(c0, c3)
        self.res3a_bn = nn.BatchNorm3d(c3)
        self.res3b_1 = _conv3d(c3, c3)
        self.res3b_1_bn = nn.BatchNorm3d(c3)
        self.res3b_2 = _conv3d(c3, c3)
        self.res3b_bn = nn.BatchNorm3d(c3)

        self.res4a_1 = _conv3d(c3, c4, stride=2)
        self.res4a_1_bn = nn.BatchNorm3d(c4)
        self.res4a_2 = _conv3d(c4, c4)
        self.res4a_down = _conv3d(c3, c4, stride=2)
        self.res4a_bn = nn.BatchNorm3d(c4)
        self.res4b_1 = _conv3d(c4, c4)
        self.res4b_1_bn = nn.BatchNorm3d(c4)
        self.res4b_2 = _conv3d(c4, c4)
        self.res4b_bn = nn.BatchNorm3d(c4)

        self.res5a_1 = _conv3d(c4, c5, stride=2)
        self.res5a_1_bn = nn.BatchNorm3d(c5)
        self.res5a_2 = _conv3d(c5, c5)
        self.res5a_down = _conv3d(c4, c5, stride=2)
        self.res5a_bn = nn.BatchNorm3d(c5)
        self.res5b_1 = _conv3d(c5, c5)
        self.res5b_1_bn = nn.BatchNorm3d(c5)
        self.res5b_2 = _conv3d(c5, c5)
        self.res5b_bn = nn.BatchNorm3d(c5)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B,96w,K,h,w) -> (B,512w)."""
        raw = self.res3a_2(x)  # (B,96,K,28,28) -> (B,128,K,28,28)
        y = self.res3b_1(_relu(self.res3a_bn(raw)))
        raw = raw + self.res3b_2(_relu(self.res3b_1_bn(y)))
        x = _relu(self.res3b_bn(raw))

        y = self.res4a_1(x)  # (B,256,K/2,14,14); K/2 rounds up
        raw = self.res4a_down(x) + self.res4a_2(_relu(self.res4a_1_bn(y)))
        y = self.res4b_1(_relu(self.res4a_bn(raw)))
        raw = raw + self.res4b_2(_relu(self.res4b_1_bn(y)))
        x = _relu(self.res4b_bn(raw))

        y = self.res5a_1(x)  # (B,512,K/4,7,7)
        raw = self.res5a_down(x) + self.res5a_2(_relu(self.res5a_1_bn(y)))
        y = self.res5b_1(_relu(self.res5a_bn(raw)))
        raw = raw + self.res5b_2(_relu(self.res5b_1_bn(y)))
        x = _relu(self.res5b_bn(raw))

        return x.mean(dim=(2, 3, 4))  # (B,512)


def _conv3d(inputs: int, outputs: int, stride: int = 1) -> nn.Conv3d:
    return nn.Conv3d(inputs, outputs, 3, stride, padding=1)


def _relu(x: Tensor) -> Tensor:
    return relu(x, inplace=True)  # only ever on a BN's own output; the skips hold other tensors
