"""cuDNN's convolutions in 16 bits on a GPU, by those of its kernels that are fast.

cuDNN 9 has no kernel of Hopper's generation for a 7x7 convolution, of which two thirds of PAS-Net's work consist, nor
for the gradient of its weights; but one for the gradient of its input, and one for that of the weights of kernels of up
to 32 taps. So a convolution is run as the gradient of another (the transposed convolution with its kernel turned
round), and the weights' gradient in two parts, four rows of the kernel and three. The same sums: for 128 frames of 128
channels, 28 x 28, an H100 takes 0.24 instead of 0.33 ms for the one, and about 0.4 instead of 0.6 for the other
(docs/performance.md has what it is worth). Other kernels and other GPUs are left to cuDNN's choice.

All functions take and give channels-last maps. They are operators of torch.library, since torch.compile would lay out
their results another way, and does not know the first. On a CPU they are the plain convolutions, for tests.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, pad

TAPS = 32  # the most that the fast kernel for the gradient of weights takes


def is_hopper(device: torch.device) -> bool:
    """Whether that is a GPU of compute capability 9 or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def conv_same(x: Tensor, weight: Tensor, bias: Tensor, turned: bool) -> Tensor:
    """A convolution (N,C,H,W) -> (N,C',H,W) of stride 1 with an odd kernel, with gradients; `turned`: one of more than
    32 taps by the kernels above. Under autocast like torch's own where x has its type."""
    if turned and weight.shape[2] * weight.shape[3] > TAPS:
        return _conv(x, weight.to(x.dtype)) + bias.to(x.dtype)[:, None, None]
    return conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2))


class TurnedConv2d(nn.Module):
    """For inference: a convolution as the gradient of another, its kernel turned round once."""

    def __init__(self, conv: nn.Conv2d) -> None:
        """`conv`: stride 1, dilation 1, one group."""
        super().__init__()
        self.padding = [size - 1 - p for size, p in zip(conv.kernel_size, numbers(conv.padding), strict=True)]
        self.weight = nn.Parameter(_turn(conv.weight.detach()))
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) -> (N,C',H,W)."""
        assert self.bias is not None
        return turned_conv(x, self.weight, self.padding) + self.bias[:, None, None]


def numbers(padding: str | tuple[int, ...]) -> list[int]:
    """The padding of an nn.Conv2d."""
    assert not isinstance(padding, str)
    return list(padding)


@torch.library.custom_op("pasnet::conv_relu", mutates_args=())
def conv_relu(x: Tensor, weight: Tensor, bias: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    """A convolution, its bias and ReLU in one kernel, without gradients."""
    if not x.is_cuda:
        return conv2d(x, weight, bias, stride, padding).relu()
    return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, [1, 1], 1)


@conv_relu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True)
    return _like(x, len(weight), *((size + 2 * p - kernel) // s + 1 for size, kernel, s, p in sizes))


@torch.library.custom_op("pasnet::turned_conv", mutates_args=())
def turned_conv(x: Tensor, weight: Tensor, padding: list[int]) -> Tensor:
    """The transposed convolution with `weight` (C,C',k,k), of stride 1, without gradients."""
    return conv_transpose2d(x, weight, padding=padding)


@turned_conv.register_fake
def _(x: Tensor, weight: Tensor, padding: list[int]) -> Tensor:
    sizes = zip(x.shape[2:], weight.shape[2:], padding, strict=True)
    return _like(x, weight.shape[1], *(size - 1 - 2 * p + kernel for size, kernel, p in sizes))


@torch.library.custom_op("pasnet::conv", mutates_args=())
def _conv(x: Tensor, weight: Tensor) -> Tensor:
    """(N,C,H,W), (C',C,k,k) -> (N,C',H,W)."""
    return conv_transpose2d(x, _turn(weight), padding=_margins(weight))


@_conv.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return _like(x, len(weight), *x.shape[2:])


@torch.library.custom_op("pasnet::conv_backward", mutates_args=())
def _conv_backward(gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weights."""
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    rows, columns = weight.shape[2:]
    most, parts = max(1, TAPS // columns), []
    for first in range(0, rows, most):
        taken = min(most, rows - first)
        # With these margins row y of the output sees row y + tap - rows//2 of x; the rows beyond have no gradient
        some = pad(gradient, (0, 0, first, rows - taken - first))
        like = torch.empty_like(weight[:, :, :taken], memory_format=torch.channels_last)
        parts.append(
            torch.ops.aten.convolution_backward(
                some, x, like, None, [1, 1], _margins(weight), [1, 1], False, [0, 0], 1, [False, True, False]
            )[1]
        )
    of_x = conv_transpose2d(gradient, weight, padding=_margins(weight))
    return of_x, torch.cat(parts, dim=2).contiguous(memory_format=torch.channels_last)


@_conv_backward.register_fake
def _(gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return _like(x, *x.shape[1:]), _like(weight, *weight.shape[1:])


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
    found: tuple[Tensor, Tensor] = _conv_backward(gradient, x, weight)
    return found


_conv.register_autograd(_backward, setup_context=_keep)


def _turn(weight: Tensor) -> Tensor:
    return weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)


def _margins(weight: Tensor) -> list[int]:
    return [size // 2 for size in weight.shape[2:]]


def _like(x: Tensor, *shape: int) -> Tensor:
    return torch.empty((len(x), *shape), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
