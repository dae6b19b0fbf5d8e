"""A 7x7 convolution by tiles and Fourier transforms: the same sums with a sixteenth of the multiplications.

Two thirds of PAS-Net's work are the 7x7 convolutions of the pose stages, and a CPU's direct convolution already runs
near the processor's fp32 peak. What is left is to multiply less. The map is cut into tiles of 20x20 that give 14x14
outputs each (overlap-save; 28 = 2 * 14, so that no output is wasted at 224 x 224). In the frequency domain the
convolution is a product per frequency, which over all channels is one matrix product per frequency:

    tiles (20,20 | N*4 tiles, C)  - columns, rows: small constant matrices ->  (3*220 | N*4, C)
        - a batch of matrix products with the transformed kernel (3*220 | C, C') ->  (3*220 | N*4, C')
        - rows, columns: small constant matrices ->  (14,14 | N*4, C')

Everything is a real matrix product (`|` separates what a constant matrix acts on from what it leaves alone). A complex
product takes three real ones (Karatsuba); its sums are part of the constant matrices, hence the 3. Per frame and
128 -> 128 channels: 43 million multiplications in the middle where the direct way has 629.

The price is memory: a kernel takes 660 numbers where it had 49. Inference only, fp32 only: in bf16 the direct
convolution is faster where the processor has it in hardware.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

TILE = 20  # 12 and 16 take less memory for the kernels; they, 34 and 36 were all slower
HALF = TILE // 2 + 1  # a real signal's spectrum is known by half of its columns


def _matrices(kernel: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four constant matrices: columns and rows forwards, rows and columns backwards; made in double precision.

    Shapes, with v = TILE - kernel + 1 valid outputs: (2*HALF,TILE), (3*TILE,TILE*2), (v*2,3*TILE), (v,2*HALF).
    """
    every = torch.arange(TILE, dtype=torch.float64)
    half, valid = every[:HALF], every[kernel - 1 :]

    def waves(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        angle = 2 * math.pi * a[:, None] * b[None] / TILE
        return angle.cos(), angle.sin()

    cos, sin = waves(half, every)
    columns = torch.cat([cos, -sin])
    cos, sin = waves(every, every)
    real, imaginary = torch.stack([cos, sin], -1).flatten(1), torch.stack([-sin, cos], -1).flatten(1)
    rows = torch.cat([real + imaginary, real, imaginary])
    # With P1 = (a+b)c, P2 = a(d-c), P3 = b(c+d): (a+ib)(c+id) = (P1-P3) + i(P1+P2).
    cos, sin = (wave / TILE for wave in waves(valid, every))
    real, imaginary = torch.cat([cos - sin, -sin, -cos], 1), torch.cat([sin + cos, cos, -sin], 1)
    back_rows = torch.stack([real, imaginary], 1).flatten(0, 1)
    cos, sin = (wave / TILE for wave in waves(valid, half))
    twice = torch.full((HALF,), 2.0, dtype=torch.float64)  # the other half of the spectrum is its conjugate
    twice[0] = twice[-1] = 1
    back_columns = torch.cat([twice * cos, -twice * sin], 1)
    return columns.float(), rows.float(), back_rows.float(), back_columns.float()


def _spectrum(weight: Tensor) -> Tensor:
    """A kernel (C',C,k,k) as the products of the middle take it, (3*220,C,C'): c, d - c and c + d of every c + id."""
    kernel = weight.shape[-1]
    columns, rows = (matrix.to(weight.device) for matrix in _matrices(kernel)[:2])
    # What the transforms make of each of the k*k taps; torch's "convolution" is a correlation, so they are turned round
    taps = torch.eye(kernel**2, device=weight.device).view(kernel, kernel, kernel**2).flip(0, 1)
    taps = pad(taps, (0, 0, 0, TILE - kernel, 0, TILE - kernel))  # (20,20,k*k)
    both, c, d = (rows @ (columns @ taps).view(2 * TILE, HALF * kernel**2)).view(3, TILE * HALF, kernel**2)
    spectrum = torch.cat([c, d - c, both]) @ weight.permute(2, 3, 1, 0).reshape(kernel**2, -1)
    return spectrum.view(3 * TILE * HALF, weight.shape[1], weight.shape[0])


class FourierConv2d(nn.Module):
    """(N,C,H,W) -> (N,C',H,W), what the given `nn.Conv2d` computes, to about 1e-6 of the largest output.

    Where tiles do not pay (few frames, or maps that fill them badly) the direct convolution runs.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        """`conv`: square odd kernel, stride 1, "same" zero padding, one group. Shares its tensors."""
        super().__init__()
        kernel = conv.kernel_size[0]
        same = (kernel // 2, kernel // 2)
        if conv.kernel_size != (kernel, kernel) or kernel % 2 == 0 or kernel > TILE // 2:
            raise ValueError(f"tiles of {TILE} are for odd square kernels up to {TILE // 2}, got {conv.kernel_size}")
        if conv.stride != (1, 1) or conv.dilation != (1, 1) or conv.groups != 1 or conv.padding != same:
            raise ValueError("tiles are for convolutions of stride 1, dilation 1, one group and padding (kernel - 1)/2")
        self.direct = conv
        self.kernel, self.valid = kernel, TILE - kernel + 1
        for name, matrix in zip(("columns", "rows", "back_rows", "back_columns"), _matrices(kernel), strict=True):
            self.register_buffer(name, matrix.to(conv.weight.device), persistent=False)
        self.register_buffer("spectrum", _spectrum(conv.weight.detach().float()), persistent=False)  # (3*220,C,C')

    def pays(self, frames: int, height: int, width: int) -> bool:
        """Whether tiles are expected to be faster: rows enough for every matrix product, and few wasted outputs."""
        down, across = -(-height // self.valid), -(-width // self.valid)
        wasted = down * across * self.valid**2 / (height * width)
        return frames * down * across >= 8 * wasted and wasted <= 2

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) -> (N,C',H,W), channels-last from the tiles."""
        n, channels, height, width = x.shape
        if not self.pays(n, height, width):
            return self.direct(x)
        columns, rows, back_rows, back_columns, spectrum = (
            self.get_buffer(name) for name in ("columns", "rows", "back_rows", "back_columns", "spectrum")
        )
        outputs, v, margin = spectrum.shape[2], self.valid, self.kernel // 2
        down, across = -(-height // v), -(-width // v)
        tiles = n * down * across

        x = x.permute(0, 2, 3, 1)  # channels innermost, where the matrices leave them alone
        x = pad(x, (0, 0, margin, across * v + margin - width, margin, down * v + margin - height))
        x = x.unfold(1, TILE, v).unfold(2, TILE, v).permute(4, 5, 0, 1, 2, 3)  # (20,20,N,down,across,C)
        x = columns @ x.reshape(TILE, TILE, tiles * channels)  # (20,2*11,tiles*C)
        x = rows @ x.view(2 * TILE, HALF * tiles * channels)  # (3*20,11*tiles*C)
        y = torch.bmm(x.view(3 * TILE * HALF, tiles, channels), spectrum)  # (3*220,tiles,C')
        y = back_rows @ y.view(3 * TILE, HALF * tiles * outputs)  # (14*2,11*tiles*C')
        y = back_columns @ y.view(v, 2 * HALF, tiles * outputs)  # (14,14,tiles*C')
        if self.direct.bias is not None:
            y = y.view(v, v, tiles, outputs) + self.direct.bias
        y = y.view(v, v, n, down, across, outputs).permute(2, 3, 0, 4, 1, 5).reshape(n, down * v, across * v, outputs)
        return y[:, :height, :width].permute(0, 3, 1, 2)
