"""ECO-Lite's halves, BN-Inception up to half of inception_3c and a 3D ResNet-18 after it; and ECO-Full, whole.

Zolfaghari, Singh, Brox: "ECO: Efficient Convolutional Network for Online Video Understanding" (ECCV 2018).
Layers follow the authors' ECO-pytorch (tf_model_zoo/ECO/ECO.yaml and ECOfull/ECOfull.yaml, commit b175e7c) and
its Caffe original; module names are theirs, so that a public checkpoint loads by name once its
`module.base_model.` prefix is gone. Every convolution has a bias, although a BN follows most of them: the
checkpoints carry those biases.

Deviations from the source:
  * the last poolings are global. The original pools over (K/4, 7, 7), which is the same for K = 4, 8, 12, ...
    and breaks for every other K;
  * ECO-Lite has no class here: `pasnet.py` has dropout and head, and ECO-Lite is PAS-Net with fusion "A".
    ECO-Full, which the paper compares with but does not build on, is a network of its own;
  * `width` scales every channel count (1.0 is the network of the paper), for tests and for runs on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv3d, max_pool2d, pad, relu


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
    """What BN-Inception is made of: conv-BN-ReLU triples under flat names, blocks of branches, and the front.

    The front is what ECO-Lite and ECO-Full have in common, conv1 to half of inception_3c.
    """

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

    def _run_block(self, name: str, x: Tensor, *, max_pool: bool = False) -> Tensor:
        # Padding counts in the average, as in Caffe; inception_5b takes the maximum instead.
        pooled = max_pool2d(x, 3, stride=1, padding=1) if max_pool else avg_pool2d(x, 3, stride=1, padding=1)
        branches = [
            self._chain(name, x, "1x1"),
            self._chain(name, x, "3x3_reduce", "3x3"),
            self._chain(name, x, "double_3x3_reduce", "double_3x3_1", "double_3x3_2"),
            self._chain(name, pooled, "pool_proj"),
        ]
        return torch.cat(branches, dim=1)

    def _chain(self, block: str, x: Tensor, *layers: str) -> Tensor:
        for layer in layers:
            x = self._run(f"{block}_{layer}", x)
        return x

    def _add_front(self) -> tuple[int, int]:
        """Register conv1 to inception_3c_double_3x3_1 in the order of the data. Returns the channels of both maps."""
        x = self._add("conv1_7x7_s2", 3, 64, 7, stride=2)
        x = self._add("conv2_3x3_reduce", x, 64, 1)
        x = self._add("conv2_3x3", x, 192, 3)
        x = self._add_block("inception_3a", x, one=64, three=(64, 64), double=(64, 96), pool=32)
        x = self._add_block("inception_3b", x, one=64, three=(64, 96), double=(64, 96), pool=64)
        a = self._add("inception_3c_double_3x3_reduce", x, 64, 1)
        return x, self._add("inception_3c_double_3x3_1", a, 96, 3)

    def _run_front(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """(N,3,H,W) -> inception_3b's maps (N,320w,H/8,W/8), and A (N,96w,H/8,W/8)."""
        x = self._run("conv1_7x7_s2", frames)  # (N,3,224,224) -> (N,64,112,112)
        x = max_pool2d(x, 3, stride=2, ceil_mode=True)  # (N,64,56,56); Caffe rounds pooled sizes up
        x = self._run("conv2_3x3_reduce", x)
        x = self._run("conv2_3x3", x)  # (N,192,56,56)
        x = max_pool2d(x, 3, stride=2, ceil_mode=True)  # (N,192,28,28)
        x = self._run_block("inception_3a", x)  # (N,256,28,28)
        x = self._run_block("inception_3b", x)  # (N,320,28,28)
        a = self._run("inception_3c_double_3x3_reduce", x)  # (N,64,28,28)
        return x, self._run("inception_3c_double_3x3_1", a)  # (N,96,28,28)


class AppearanceTrunk(_BNInception):
    """H_2D, the appearance network: normalised frames (N,3,H,W) -> A (N,96w,H/8,W/8), after ReLU.

    `normalised` means BGR, 0..255, minus the mean, which `pasnet.py` does. Shapes below: width 1, 224 x 224.
    """

    def __init__(self, width: float = 1.0) -> None:
        """Fresh weights."""
        super().__init__(width)
        self.out_channels = self._add_front()[1]
        init_weights(self)

    def forward(self, frames: Tensor) -> Tensor:
        """(N,3,H,W) -> (N,96w,H/8,W/8)."""
        return self._run_front(frames)[1]


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


class Conv3d(nn.Conv3d):
    """torch's. In bf16 on a CPU the zeros around two maps in time are put by hand: padding by itself, with a kernel of
    3x3x3 and stride 1, oneDNN (torch 2.13, AVX-512 BF16) returns memory that nobody has written as the gradient of the
    weights. res5 has two maps at K = 8. (It also fails for maps one pixel high or wide, which come from frames of less
    than 40 pixels alone.)
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,T,H,W) -> (N,C',T',H',W')."""
        bf16 = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
        if x.shape[2] == 2 and x.device.type == "cpu" and bf16 and torch.is_grad_enabled():
            before, *across = (int(p) for p in self.padding)
            x = pad(x, (0, 0, 0, 0, before, before))
            return conv3d(x, self.weight, self.bias, self.stride, (0, *across), self.dilation, self.groups)
        return super().forward(x)


def _conv3d(inputs: int, outputs: int, stride: int = 1) -> nn.Conv3d:
    return Conv3d(inputs, outputs, 3, stride, padding=1)


def _relu(x: Tensor) -> Tensor:
    return relu(x, inplace=True)  # only ever on a BN's own output; the skips hold other tensors


class FullTrunk(_BNInception):
    r"""ECO-Full's 2D network, all of BN-Inception: normalised frames (N,3,H,W) -> A and a vector per frame.

    Inception_3c and 4e halve the maps: stride 2 in the last convolution of two branches, and a third branch that
    is nothing but a maximum. A is read in the middle of 3c, before its stride:

        3b -+- 3c_3x3_reduce - 3c_3x3 (stride 2) ----------------------------------+
            |                                                                      |
            +- 3c_double_3x3_reduce - _3x3_1 -+- 3c_double_3x3_2 (stride 2) -------+- cat - 4a .. 5b - mean (N,1024)
            |                                 |                                    |
            |                                 +---------------- A (N,96,28,28)     |
            |                                                                      |
            +- max 3x3 (stride 2) -------------------------------------------------+
    """

    def __init__(self, width: float = 1.0) -> None:
        """Register the layers in the order of the data."""
        super().__init__(width)
        x, self.appearance_channels = self._add_front()
        x = self._add_reduction("inception_3c", x, three=(128, 160), double=(self.appearance_channels, 96))
        x = self._add_block("inception_4a", x, one=224, three=(64, 96), double=(96, 128), pool=128)
        x = self._add_block("inception_4b", x, one=192, three=(96, 128), double=(96, 128), pool=128)
        x = self._add_block("inception_4c", x, one=160, three=(128, 160), double=(128, 160), pool=128)
        x = self._add_block("inception_4d", x, one=96, three=(128, 192), double=(160, 192), pool=128)
        c = self._add("inception_4e_double_3x3_reduce", x, 192, 1)
        c = self._add("inception_4e_double_3x3_1", c, 256, 3)
        x = self._add_reduction("inception_4e", x, three=(128, 192), double=(c, 256))
        x = self._add_block("inception_5a", x, one=352, three=(192, 320), double=(160, 224), pool=128)
        self.out_channels = self._add_block("inception_5b", x, one=352, three=(192, 320), double=(192, 224), pool=128)
        init_weights(self)

    def _add_reduction(self, name: str, inputs: int, *, three: tuple[int, int], double: tuple[int, int]) -> int:
        """What ends a stride-2 block; `double` is (channels of double_3x3_1, outputs of _2). Returns its channels."""
        c1 = self._add(f"{name}_3x3", self._add(f"{name}_3x3_reduce", inputs, three[0], 1), three[1], 3, stride=2)
        c2 = self._add(f"{name}_double_3x3_2", double[0], double[1], 3, stride=2)
        return c1 + c2 + inputs

    def _run_reduction(self, name: str, x: Tensor, double: Tensor) -> Tensor:
        branches = [
            self._chain(name, x, "3x3_reduce", "3x3"),
            self._chain(name, double, "double_3x3_2"),
            max_pool2d(x, 3, stride=2, ceil_mode=True),
        ]
        return torch.cat(branches, dim=1)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """(N,3,H,W), H and W multiples of 32 -> A (N,96w,H/8,W/8), and inception_5b's mean over space (N,1024w)."""
        x, a = self._run_front(frames)  # (N,320,28,28), (N,96,28,28)
        x = self._run_reduction("inception_3c", x, a)  # (N,576,14,14)
        x = self._run_block("inception_4a", x)  # (N,576,14,14)
        x = self._run_block("inception_4b", x)  # (N,576,14,14)
        x = self._run_block("inception_4c", x)  # (N,608,14,14)
        x = self._run_block("inception_4d", x)  # (N,608,14,14)
        double = self._chain("inception_4e", x, "double_3x3_reduce", "double_3x3_1")  # (N,256,14,14)
        x = self._run_reduction("inception_4e", x, double)  # (N,1056,7,7)
        x = self._run_block("inception_5a", x)  # (N,1024,7,7)
        x = self._run_block("inception_5b", x, max_pool=True)  # (N,1024,7,7)
        return a, x.mean(dim=(2, 3))


class ECOFull(nn.Module):
    r"""RGB clips (B,K,3,H,W), uint8 or float 0..255, H and W multiples of 32, any K >= 1 -> (B,num_classes).

    What the ECO paper calls ECO Full: a 2D stream beside the 3D one. Shapes at width 1 and 224 x 224:

        clips (B,K,3,224,224)
            |
            BGR - (104,117,128)
            |
        appearance -+- A (B,96,K,28,28) - temporal -- (B,512) ------- dropout --------------+
                    |                                                                       +- cat - head - logits
                    +- a vector per frame (B,K,1024) - dropout - mean over frames (B,1024) -+
                                                                           2D first: (B,1536)

    A public checkpoint has 566 entries (564 and the head). Without its prefixes, names map as ECO-Lite's do:
    `res*` go under `temporal.`, `fc_final.*` become `head.*`, everything else goes under `appearance.`; that is
    `pasnet.weights.eco_to_pasnet`, for both networks. Likewise everything of ECO-Lite but its head fits here.
    """

    mean: Tensor

    def __init__(
        self,
        num_classes: int,
        width: float = 1.0,
        *,
        frame_dropout: float = 0.5,
        clip_dropout: float = 0.3,
        mean: tuple[float, float, float] = (104.0, 117.0, 128.0),
    ) -> None:
        """Fresh weights. Dropout rates are ECOfull.yaml's (Caffe, on UCF-101 and HMDB-51: 0.6 and 0.5); mean is BGR."""
        super().__init__()
        self.appearance = FullTrunk(width)
        self.temporal = TemporalNet(width, in_channels=self.appearance.appearance_channels)
        self.frame_dropout = nn.Dropout(frame_dropout)
        self.clip_dropout = nn.Dropout(clip_dropout)
        self.head = nn.Linear(self.appearance.out_channels + self.temporal.out_channels, num_classes)
        init_weights(self.head)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)

    def forward(self, clips: Tensor) -> Tensor:
        """(B,K,3,H,W) -> (B,num_classes). Raises ValueError for any other shape."""
        frames, clip = self._streams(clips)
        return self.head(torch.cat([self.frame_dropout(frames).mean(1), self.clip_dropout(clip)], dim=1))

    def features(self, clips: Tensor) -> dict[str, Tensor]:
        """`descriptor` (B,1536w), what the head reads, 2D before 3D and without dropout; `frames` (B,K,1024w)."""
        frames, clip = self._streams(clips)
        return {"descriptor": torch.cat([frames.mean(1), clip], dim=1), "frames": frames}

    def _streams(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """(B,K,3,H,W) -> a vector per frame (B,K,1024w), one per clip (B,512w)."""
        if clips.dim() != 5 or clips.shape[2] != 3:
            raise ValueError(f"clips must be (B,K,3,H,W), got {tuple(clips.shape)}")
        if clips.shape[3] % 32 or clips.shape[4] % 32:  # 3c's and 4e's branches would differ in size
            raise ValueError(f"height and width must be multiples of 32, got {tuple(clips.shape[3:])}")
        bgr = clips.flatten(0, 1).flip(1).to(self.head.weight.dtype)  # (B,K,3,224,224) -> (B*K,3,224,224)
        a, frames = self.appearance(bgr - self.mean)  # (B*K,96,28,28), (B*K,1024)
        stacked = a.unflatten(0, clips.shape[:2]).transpose(1, 2)  # (B,96,K,28,28)
        return frames.unflatten(0, clips.shape[:2]), self.temporal(stacked)
