"""What a PAS-Net costs, counted without computing: parameters, multiply-adds, and what training keeps in memory.

Counted by running the network on torch's "meta" device, where tensors have shapes and no numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pasnet.config import ModelConfig
from pasnet.models.pasnet import PASNet


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one clip. `gmacs`: 10^9 multiply-adds of convolutions and linear layers in a forward pass. The bytes are those
    of all tensors that autograd keeps for the backward pass in fp32, without parameters and without workspace: in
    full, with checkpointed pose parts, and with a frozen pose network (the three are equal without one)."""

    parameters: int
    gmacs: float
    activation_bytes: int
    checkpointed_bytes: int
    frozen_bytes: int


@lru_cache(maxsize=256)
def cost(config: ModelConfig, num_segments: int, input_size: int = 224) -> Cost:
    """The cost of a network on K = `num_segments` frames of `input_size` squared, both as in config.DataConfig."""
    with torch.device("meta"):
        model = PASNet(config)
        clip = torch.empty(1, num_segments, 3, input_size, input_size, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(clip)
    whole = kept_bytes(model, clip)
    checkpointed = frozen = whole
    if model.pose is not None:
        model.pose.checkpoint = True
        checkpointed = kept_bytes(model, clip)
        model.pose.checkpoint = False
        model.pose.requires_grad_(False)
        frozen = kept_bytes(model, clip)
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        gmacs=counter.get_total_flops() / 2e9,
        activation_bytes=whole,
        checkpointed_bytes=checkpointed,
        frozen_bytes=frozen,
    )


def kept_bytes(model: nn.Module, *inputs: Any) -> int:
    """Bytes of the distinct storages that a forward pass of `model` saves for its backward, parameters left out.

    Works on any device; the model is left as it was found, except that a BN in training has seen the input.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # holding the storages keeps their ids from being given away again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*inputs)
    total = sum(storage.nbytes() for storage in kept.values())
    del output
    return total
