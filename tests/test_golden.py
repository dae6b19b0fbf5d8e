"""One seeded training step, one seeded forward pass and one short training, as they came out when tests/golden was
written.

Step and pass are on record in double precision, where processors agree to the last digits whatever their instructions;
in single precision, a unit at the edge of its ReLU, or a rounding, moves a gradient by a percent on one and not on
another.

A study takes a finished training for its own as long as pasnet/checkpoints.py has the same NUMERICS. Who changes what
comes out of a training must raise it: the short training is held to the number that it was written under.

`python -m tests.test_golden` in the repository root writes tests/golden anew, for a change that is meant to change
numbers; the commit says why.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pasnet.checkpoints import NUMERICS
from pasnet.config import (
    FUSION_TITLES,
    DataConfig,
    FusionConfig,
    InitConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from pasnet.models.pasnet import PASNet, build, parameter_groups
from pasnet.predictions import Predictions
from pasnet.synth import generate
from pasnet.train import evaluate_checkpoint, train
from shards import build as build_shards
from shards import ffmpeg_exe, find_dataset, scan

GOLDEN = Path(__file__).parent / "golden" / "networks.json"
TRAINING = GOLDEN.with_name("training.json")
LABELS = torch.tensor([0, 3])
EXACT = 1e-9  # of double precision; kernels for AVX-512, AVX2 and SSE4.1 are within 1e-13
ROUNDING = 4e-2  # of single precision: the same kernels are within 2.5 %, of these steps and of the short training


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


def statistics(style: str, dtype: torch.dtype) -> dict[str, Any]:
    """Loss and gradient norms by module of a training step, the loss after it, and the outputs in eval mode."""
    net, clips = seeded(style)
    net.to(dtype).train()
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


def training_of(shards: Path, out: Path) -> dict[str, Any]:
    """A training of ECO and of PAS-Net from there, through the loop itself: losses by epoch, how far each part's
    weights went, and the test list's probabilities. Little is learnt, lest rounding comes to decide."""
    found: dict[str, Any] = {}
    for style, parent in (("A", ""), ("Conv(A,I,F)", "A")):
        config = TrainConfig(
            model=ModelConfig(num_classes=3, width=0.125, fusion=FusionConfig(style=style)),
            data=DataConfig(shards=str(shards), num_segments=3, input_size=64, workers=0),
            optim=OptimConfig(epochs=2, lr=1e-4, batch=8, micro_batch=4, schedule="steps", steps=(1,)),
            init=InitConfig(parent=str(out / parent / "last.pt") if parent else ""),
        )
        torch.manual_seed(config.seed)
        before = build(config.model).state_dict()
        before |= torch.load(config.init.parent, weights_only=True)["model"] if parent else {}
        train(config, out / style)
        history = json.loads((out / style / "history.json").read_text("utf-8"))
        tensors = torch.load(out / style / "last.pt", weights_only=True)["model"]
        moved: dict[str, float] = {}
        for name, _ in build(config.model).named_parameters():
            module = name.partition(".")[0]
            moved[module] = moved.get(module, 0.0) + (tensors[name] - before[name]).double().pow(2).sum().item()
        evaluate_checkpoint(out / style / "last.pt", shards, out=out / style / "evaluation")
        predictions = Predictions.load(out / style / "evaluation" / "predictions.parquet")
        found[style] = {
            "train_loss": [record["train_loss"] for record in history],
            "moved": {module: square**0.5 for module, square in moved.items()},
            "probabilities": predictions.probabilities.tolist(),
        }
    return found


def close(found: Any, expected: Any, where: str, within: float) -> None:
    """Equal to a share of the value, or of the largest in its list."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected:
            close(found[name], expected[name], f"{where}.{name}", within)
    else:
        left, right = (torch.tensor(values, dtype=torch.float64) for values in (found, expected))
        near = torch.allclose(left, right, rtol=within, atol=within * right.abs().max().item())
        assert near, (where, found, expected)


@pytest.mark.parametrize("style", FUSION_TITLES)
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, EXACT), (torch.float32, ROUNDING)])
def test_a_seeded_step_is_what_it_was(style: str, dtype: torch.dtype, within: float) -> None:
    close(statistics(style, dtype), json.loads(GOLDEN.read_text("utf-8"))[style], style, within)


def test_a_short_training_is_what_it_was_under_this_numerics(shard_folder: Path, tmp_path: Path) -> None:
    expected = json.loads(TRAINING.read_text("utf-8"))
    assert expected.pop("numerics") == NUMERICS, "NUMERICS was raised: write tests/golden anew, see above"
    try:
        close(training_of(shard_folder, tmp_path), expected, "training", ROUNDING)
    except AssertionError as error:
        raise AssertionError(
            f"a training gives other numbers than under NUMERICS = {NUMERICS} before: if that is meant, raise it in "
            f"pasnet/checkpoints.py and write tests/golden anew ({error})"
        ) from None


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(
        json.dumps({style: statistics(style, torch.float64) for style in FUSION_TITLES}, indent=1) + "\n", "utf-8"
    )
    from tests import conftest

    with tempfile.TemporaryDirectory() as scratch:
        videos = generate(Path(scratch) / "videos", conftest.VIDEOS, ffmpeg=ffmpeg_exe())
        build_shards(scan(*find_dataset(videos)), Path(scratch) / "shards", num_shards=conftest.SHARDS)
        trained = training_of(Path(scratch) / "shards", Path(scratch))
    TRAINING.write_text(json.dumps({"numerics": NUMERICS, **trained}, indent=1) + "\n", "utf-8")
