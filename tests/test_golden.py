"""One seeded training step and one seeded forward pass, as they came out when tests/golden was written.

`python -m tests.test_golden` in the repository root writes tests/golden anew, for a change that is meant to change
numbers; the commit says why.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pasnet.config import FUSION_TITLES, FusionConfig, ModelConfig
from pasnet.models.pasnet import PASNet, build, parameter_groups

GOLDEN = Path(__file__).parent / "golden" / "networks.json"
LABELS = torch.tensor([0, 3])


def seeded(style: str) -> tuple[PASNet, Tensor]:
    """A network and two clips of 3 frames that do not depend on the order in which torch draws for its layers."""
    net = build(ModelConfig(num_classes=5, width=0.125, dropout=0.0, fusion=FusionConfig(style=style)))
    with torch.no_grad():
        for number, (_, tensor) in enumerate(sorted(net.named_parameters())):
            wave = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64) * 12.9898 + number)
            fan_in = tensor[0].numel() if tensor.dim() > 1 else 1
            scale = (4 / fan_in) ** 0.5 if tensor.dim() > 1 else 0.1
            tensor.copy_((wave * scale).view(tensor.shape))
        for module in net.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
                module.weight.add_(1)
    pixels = torch.arange(2 * 3 * 3 * 64 * 64, dtype=torch.float64)
    clips = ((torch.sin(pixels * 0.37) + torch.sin(pixels * 0.0113)) * 63 + 127).to(torch.uint8)
    return net, clips.view(2, 3, 3, 64, 64)


def statistics(style: str) -> dict[str, Any]:
    """Loss and gradient norms by module of a training step, the loss after it, and the outputs in eval mode."""
    net, clips = seeded(style)
    net.train()
    optimiser = torch.optim.SGD(parameter_groups(net, 1e-3, 5e-4), momentum=0.9, nesterov=True)
    loss = nn.functional.cross_entropy(net(clips), LABELS)
    loss.backward()
    norms = {}
    for name, module in net.named_children():
        squares = [p.grad.double().pow(2).sum() for p in module.parameters() if p.grad is not None]
        if squares:
            norms[name] = torch.stack(squares).sum().sqrt().item()
    optimiser.step()
    with torch.no_grad():
        after = nn.functional.cross_entropy(net(clips), LABELS).item()
        net.eval()
        found = net.features(clips, maps=True)
        logits = net.head(found["descriptor"])
    outputs = {name: [t.double().mean().item(), t.double().std().item()] for name, t in found.items()}
    return {
        "loss": loss.item(),
        "gradient_norms": norms,
        "loss_after": after,
        "logits": logits.tolist(),
        "mean_and_std": outputs,
    }


def close(found: Any, expected: Any, where: str) -> None:
    """Equal to 1e-3: what processors and versions of torch may differ by, and far less than an error would."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected:
            close(found[name], expected[name], f"{where}.{name}")
    else:
        left, right = torch.tensor(found), torch.tensor(expected)
        assert torch.allclose(left, right, rtol=1e-3, atol=1e-3 * right.abs().max().item()), (where, found, expected)


@pytest.mark.parametrize("style", FUSION_TITLES)
def test_a_seeded_step_is_what_it_was(style: str) -> None:
    close(statistics(style), json.loads(GOLDEN.read_text("utf-8"))[style], style)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps({style: statistics(style) for style in FUSION_TITLES}, indent=1) + "\n", "utf-8")
