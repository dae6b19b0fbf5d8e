"""cuDNN's convolutions in 16 bits on a Hopper GPU, by those of its kernels that are made for it.

Two thirds of PAS-Net's work are 7x7 convolutions. For them, and for the gradient of their weights, cuDNN 9.19 on an
H100 took kernels of the generation before (torch's profiler names them); kernels of Hopper's it took for the gradient
of their input, and for that of the weights of kernels of up to 32 taps. So a convolution is run here as the gradient of
another (the transposed convolution with its kernel turned round), and the weights' gradient in two parts, four rows of
the kernel and three. The same sums. docs/performance.md has training steps with and without this.

All functions take and give channels-last maps. They are operators of torch.library, since torch.compile would lay out
their results another way, and does not know the first. On a CPU they are the plain convolutions, for tests. None but
`conv_same` has gradients, and that has no second ones.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, pad

TAPS = 32  # the most that the fast kernel for the gradient of weights takes


def is_hopper(device: torch.device) -> bool:
    """Whether that is a GPU of compute capability 9, the one that this was measured on."""
    return _nvidia(device) and torch.cuda.get_device_capability(device)[0] == 9


def _nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.backends.cudnn.enabled


@functools.cache
def fuses_relu(device: torch.device) -> bool:
    """Whether `conv_relu` can be used there in bf16.

    It is tried: ATen hands cuDNN the memory of the result, which nobody has written yet, as a summand times 0, and from
    a kernel that took that literally NaN would come out where NaN was there before.
    """
    if not _nvidia(device) or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    generator = torch.Generator(device).manual_seed(0)
    for inputs, outputs, kernel, stride in ((8, 64, 7, 2), (64, 64, 3, 1), (128, 512, 1, 1), (256, 256, 3, 1)):
        x, weight, bias = (
            torch.randn(shape, generator=generator, device=device).to(torch.bfloat16)
            for shape in ((4, inputs, 28, 28), (outputs, inputs, kernel, kernel), (outputs,))
        )
        x, weight = (of.contiguous(memory_format=torch.channels_last) for of in (x, weight))
        expected = conv2d(x, weight, bias, stride, kernel // 2).relu()
        poison = torch.full_like(expected, torch.nan)
        del poison  # and the next that asks for as much memory gets just this
        try:
            found = conv_relu(x, weight, bias, [stride, stride], [kernel // 2, kernel // 2])
        except RuntimeError:  # no such kernel
            return False
        if not torch.allclose(found.float(), expected.float(), rtol=0.02, atol=0.02 * expected.abs().max().item()):
            return False
    return True


def conv_same(x: Tensor, weight: Tensor, bias: Tensor, turned: bool) -> Tensor:
    """A convolution (N,C,H,W) -> (N,C',H,W) of stride 1 with an odd kernel, with gradients, under autocast like torch's
    own; `turned`: one of more than 32 taps by the kernels above."""
    if not turned or weight.shape[2] * weight.shape[3] <= TAPS:
        return conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2))
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _conv(x, weight.to(x.dtype)) + bias.to(x.dtype)[:, None, None]


class TurnedConv2d(nn.Module):
    """For inference: a convolution as the gradient of another, its kernel turned round once."""

    def __init__(self, conv: nn.Conv2d) -> None:
        """`conv`: stride 1, dilation 1, one group."""
        super().__init__()
        self.padding = [size - 1 - p for size, p in zip(conv.kernel_size, padding_of(conv), strict=True)]
        self.weight = nn.Parameter(_turn(conv.weight.detach()))
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """(N,C,H,W) -> (N,C',H,W)."""
        assert self.bias is not None
        return turned_conv(x, self.weight, self.padding) + self.bias[:, None, None]


def padding_of(conv: nn.Conv2d) -> list[int]:
    """Its padding as numbers: no "same"."""
    assert not isinstance(conv.padding, str)
    return list(conv.padding)


@torch.library.custom_op("pasnet::conv_relu", mutates_args=())
def conv_relu(x: Tensor, weight: Tensor, bias: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    """A convolution, its bias and ReLU in one kernel, without gradients."""
    if not x.is_cuda:
        return conv2d(x, weight, bias, stride, padding).relu()
    return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, [1, 1], 1)


@conv_relu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, stride: list[int], padding: list[int]) -> Tensor:
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True)
    return _maps_like(x, len(weight), *((size + 2 * p - kernel) // s + 1 for size, kernel, s, p in sizes))


@torch.library.custom_op("pasnet::turned_conv", mutates_args=())
def turned_conv(x: Tensor, weight: Tensor, padding: list[int]) -> Tensor:
    """The transposed convolution with `weight` (C,C',k,k), of stride 1, without gradients."""
    return conv_transpose2d(x, weight, padding=padding)


@turned_conv.register_fake
def _(x: Tensor, weight: Tensor, padding: list[int]) -> Tensor:
    sizes = zip(x.shape[2:], weight.shape[2:], padding, strict=True)
    return _maps_like(x, weight.shape[1], *(size - 1 - 2 * p + kernel for size, kernel, p in sizes))


@torch.library.custom_op("pasnet::conv", mutates_args=())
def _conv(x: Tensor, weight: Tensor) -> Tensor:
    """(N,C,H,W), (C',C,k,k) -> (N,C',H,W)."""
    return conv_transpose2d(x, _turn(weight), padding=_margins(weight))


@_conv.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return _maps_like(x, len(weight), *x.shape[2:])


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
    return _maps_like(x, *x.shape[1:]), _maps_like(weight, *weight.shape[1:])


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


def _maps_like(x: Tensor, *shape: int) -> Tensor:
    return torch.empty((len(x), *shape), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
