"""ECO-Full against its source: names, counts, shapes, pooling, the authors' own outputs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from pasnet.models.eco import AppearanceTrunk, ECOFull, FullTrunk, TemporalNet
from pasnet.weights import WeightsError, eco_to_pasnet, merge

SMALL = 0.125
GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


def network(classes: int = 5, width: float = SMALL, seed: int = 0, **options: Any) -> ECOFull:
    torch.manual_seed(seed)
    return ECOFull(classes, width, **options)


def clip(batch: int = 2, k: int = 2, size: int = 64, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, k, 3, size, size), dtype=torch.uint8, generator=g)


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def watch(net: nn.Module, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Filled by the next forward pass: for each named layer copies of its input and its output."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda _, inputs, output: seen.__setitem__(name, (inputs[0].clone(), output.clone()))

    for name in names:
        net.get_submodule(name).register_forward_hook(hook(name))
    return seen


def shake(net: nn.Module) -> None:
    """Random BN statistics and affine, so that a tensor before BN cannot pass for one after it."""
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            for tensor in (module.weight.data, module.running_var, module.bias.data, module.running_mean):
                assert tensor is not None
                tensor.uniform_(0.5, 1.5)


# ---- names and counts ------------------------------------------------------------------------------------

# BN-Inception's table (TSN's bninception, which ECOfull.yaml repeats): block -> what each convolution gives.
BLOCKS: dict[str, dict[str, int]] = {
    "3a": {"1x1": 64, "3x3_reduce": 64, "3x3": 64, "double": 64, "_1": 96, "_2": 96, "pool_proj": 32},
    "3b": {"1x1": 64, "3x3_reduce": 64, "3x3": 96, "double": 64, "_1": 96, "_2": 96, "pool_proj": 64},
    "3c": {"3x3_reduce": 128, "3x3": 160, "double": 64, "_1": 96, "_2": 96},
    "4a": {"1x1": 224, "3x3_reduce": 64, "3x3": 96, "double": 96, "_1": 128, "_2": 128, "pool_proj": 128},
    "4b": {"1x1": 192, "3x3_reduce": 96, "3x3": 128, "double": 96, "_1": 128, "_2": 128, "pool_proj": 128},
    "4c": {"1x1": 160, "3x3_reduce": 128, "3x3": 160, "double": 128, "_1": 160, "_2": 160, "pool_proj": 128},
    "4d": {"1x1": 96, "3x3_reduce": 128, "3x3": 192, "double": 160, "_1": 192, "_2": 192, "pool_proj": 128},
    "4e": {"3x3_reduce": 128, "3x3": 192, "double": 192, "_1": 256, "_2": 256},
    "5a": {"1x1": 352, "3x3_reduce": 192, "3x3": 320, "double": 160, "_1": 224, "_2": 224, "pool_proj": 128},
    "5b": {"1x1": 352, "3x3_reduce": 192, "3x3": 320, "double": 192, "_1": 224, "_2": 224, "pool_proj": 128},
}
SPELLING = {"double": "double_3x3_reduce", "_1": "double_3x3_1", "_2": "double_3x3_2"}
CONV2D = {"conv1_7x7_s2": 64, "conv2_3x3_reduce": 64, "conv2_3x3": 192} | {
    f"inception_{block}_{SPELLING.get(layer, layer)}": outputs
    for block, layers in BLOCKS.items()
    for layer, outputs in layers.items()
}
CONV3D = {
    "res3a_2": 128, "res3b_1": 128, "res3b_2": 128,
    "res4a_1": 256, "res4a_2": 256, "res4a_down": 256, "res4b_1": 256, "res4b_2": 256,
    "res5a_1": 512, "res5a_2": 512, "res5a_down": 512, "res5b_1": 512, "res5b_2": 512,
}  # fmt: skip
BN3D = {
    "res3a_bn": 128, "res3b_1_bn": 128, "res3b_bn": 128,
    "res4a_1_bn": 256, "res4a_bn": 256, "res4b_1_bn": 256, "res4b_bn": 256,
    "res5a_1_bn": 512, "res5a_bn": 512, "res5b_1_bn": 512, "res5b_bn": 512,
}  # fmt: skip


def public_outputs() -> dict[str, int | None]:
    """The 566 public names without prefix, and the length of each tensor's first axis; None for counters."""
    entries: dict[str, int | None] = {"fc_final.weight": 400, "fc_final.bias": 400}
    for layer, outputs in (CONV2D | CONV3D).items():
        entries |= {f"{layer}.{e}": outputs for e in ("weight", "bias")}
    for layer, outputs in ({f"{c}_bn": n for c, n in CONV2D.items()} | BN3D).items():
        entries |= {f"{layer}.{e}": outputs for e in ("weight", "bias", "running_mean", "running_var")}
        entries[f"{layer}.num_batches_tracked"] = None
    return entries


def public(name: str) -> str:
    """Our name -> the public one without its prefix."""
    prefix, rest = name.split(".", 1)
    return f"fc_final.{rest}" if prefix == "head" else rest


def test_exactly_the_566_public_names_with_the_channels_of_the_table() -> None:
    with torch.device("meta"):
        state = {public(k): v for k, v in network(400, 1).state_dict().items()}
    assert {k: v.shape[0] if v.ndim else None for k, v in state.items()} == public_outputs()
    assert len(state) == 566
    assert state["fc_final.weight"].shape == (400, 1536)
    inputs = {"3c_3x3_reduce": 320, "3c_double_3x3_2": 96, "4a_1x1": 576, "4b_1x1": 576, "4c_1x1": 576, "4d_1x1": 608}
    inputs |= {"4e_3x3_reduce": 608, "4e_double_3x3_2": 256, "5a_1x1": 1056, "5b_1x1": 1024, "5b_pool_proj": 1024}
    assert {k: state[f"inception_{k}.weight"].shape[1] for k in inputs} == inputs


def test_parameter_counts_at_width_1() -> None:
    with torch.device("meta"):
        assert [count(network(c, 1)) for c in (51, 101, 400)] == [46_965_715, 47_042_565, 47_502_128]
        assert count(FullTrunk()) - count(AppearanceTrunk()) == 9_588_672


def test_the_names_of_eco_lite_are_a_part_of_them() -> None:
    with torch.device("meta"):
        full = {k: v.shape for k, v in network(5, 1).state_dict().items()}
        halves = {"appearance": AppearanceTrunk(), "temporal": TemporalNet()}
        lite = {f"{p}.{k}": v.shape for p, net in halves.items() for k, v in net.state_dict().items()}
    assert lite.items() <= full.items()
    assert len(lite) == 214


# ---- public checkpoints ----------------------------------------------------------------------------------


def test_a_fake_public_checkpoint_loads_strictly() -> None:
    net = network(400)
    shapes = {public(k): v for k, v in net.state_dict().items()}
    fakes = {f"module.base_model.{k}": torch.full_like(shapes[k], i + 1) for i, k in enumerate(public_outputs())}
    assert len(fakes) == 566
    tensors = eco_to_pasnet({k.removeprefix("module.base_model."): v for k, v in fakes.items()})
    net.load_state_dict(tensors, strict=True)
    found = {public(k): v.flatten()[0].item() for k, v in net.state_dict().items()}
    assert found == {k: i + 1 for i, k in enumerate(public_outputs())}

    report = merge(network(400).state_dict(), tensors, source="test")
    assert len(report.loaded) == 566
    del tensors["appearance.inception_5b_pool_proj.bias"]
    with pytest.raises(WeightsError, match=r"missing appearance\.inception_5b_pool_proj\.bias"):
        merge(net.state_dict(), tensors, source="test")


# ---- shapes and cost -------------------------------------------------------------------------------------


def test_shapes_at_width_1() -> None:
    maps = {"3c_3x3": (160, 14, 14), "3c_double_3x3_1": (96, 28, 28), "3c_double_3x3_2": (96, 14, 14)}
    maps |= {"4a_1x1": (224, 14, 14), "4d_3x3": (192, 14, 14), "4e_double_3x3_1": (256, 14, 14)}
    maps |= {"4e_3x3": (192, 7, 7), "4e_double_3x3_2": (256, 7, 7), "5a_1x1": (352, 7, 7), "5b_pool_proj": (128, 7, 7)}
    with torch.device("meta"):
        net = FullTrunk()
        seen = watch(net, [f"inception_{name}" for name in maps])
        a, vectors = net(torch.empty(2, 3, 224, 224))
    assert (a.shape, vectors.shape) == ((2, 96, 28, 28), (2, 1024))
    assert {name.removeprefix("inception_"): tuple(out.shape[1:]) for name, (_, out) in seen.items()} == maps


@pytest.mark.parametrize("k", [1, 4, 7, 8, 16, 18, 48])
def test_any_number_of_frames(k: int) -> None:
    net = network().eval()
    x = clip(2, k, 32)
    with torch.inference_mode():
        logits, alone, found = net(x), net(x[1:]), net.features(x)
    assert logits.shape == (2, 5)
    assert found["descriptor"].shape == (2, 128 + 64)
    assert found["frames"].shape == (2, k, 128)
    assert torch.allclose(logits[1:], alone, atol=1e-5)  # clips do not mix
    assert not torch.allclose(logits[0], logits[1], atol=1e-5)


def test_sides_that_are_no_multiples_of_32_are_refused() -> None:
    net = network().eval()
    with torch.inference_mode():
        assert net(torch.zeros(1, 1, 3, 64, 96)).shape == (1, 5)
        for size in ((64, 72), (72, 64)):
            with pytest.raises(ValueError, match="multiples of 32"):
                net(torch.zeros(1, 1, 3, *size))
        with pytest.raises(ValueError, match=r"\(B,K,3,H,W\)"):
            net(torch.zeros(1, 3, 1, 64, 64))
        with pytest.raises(ValueError, match=r"\(B,K,3,H,W\)"):
            net(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(("k", "expected"), [(8, 32.21), (16, 64.41), (32, 128.8), (48, 193.2)])
def test_multiply_adds_per_clip(k: int, expected: float) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network(400, 1)(torch.empty(1, k, 3, 224, 224, dtype=torch.uint8))
    assert counter.get_total_flops() / 2e9 == pytest.approx(expected, rel=1e-3)


# ---- inside ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", ["3a", "3b", "4a", "4b", "4c", "4d", "5a", "5b"])
def test_pool_branches_take_the_mean_with_padding_but_5b_the_maximum(block: str) -> None:
    net = network().eval()
    shake(net)
    names = [f"appearance.inception_{block}_{layer}" for layer in ("1x1", "pool_proj")]
    seen = watch(net, names)
    with torch.inference_mode():
        net(clip(1, 1, 96))
    x, pooled = (seen[name][0] for name in names)
    assert x.shape[2] >= 3
    padded = nn.functional.pad(x, (1, 1, 1, 1))  # zeros; x comes after a ReLU, so they never win a maximum
    windows = padded.unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)
    assert x.min() >= 0
    assert torch.allclose(pooled, windows.amax(4) if block == "5b" else windows.sum(4) / 9, atol=1e-4)


@pytest.mark.parametrize(("block", "after"), [("3c", "4a"), ("4e", "5a")])
def test_stride_2_blocks_join_two_convolutions_and_a_maximum(block: str, after: str) -> None:
    net = network().eval()
    shake(net)
    layers = [f"appearance.inception_{block}_{layer}" for layer in ("3x3_reduce", "3x3_bn", "double_3x3_2_bn")]
    following = f"appearance.inception_{after}_1x1"
    seen = watch(net, [*layers, following])
    with torch.inference_mode():
        net(clip(1, 1, 128))
    x = seen[layers[0]][0]
    # Rounded up without padding: windows start at 0, 2, 4, ...; the last one hangs over the edge.
    hanging = nn.functional.pad(x, (0, 1, 0, 1), value=-torch.inf)
    maximum = hanging.unfold(2, 3, 2).unfold(3, 3, 2).amax((4, 5))
    parts = [seen[layers[1]][1].relu(), seen[layers[2]][1].relu(), maximum]
    assert x.shape[2] % 2 == 0 and maximum.shape[2] == x.shape[2] // 2
    assert torch.equal(seen[following][0], torch.cat(parts, 1))


def test_a_is_read_in_the_middle_of_3c() -> None:
    net = network().eval()
    shake(net)
    last = "appearance.inception_3c_double_3x3_1_bn"
    seen = watch(net, [last, "appearance.inception_3c_double_3x3_2", "temporal.res3a_2"])
    x = clip(2, 3)
    with torch.inference_mode():
        net(x)
    a = seen[last][1].relu()
    assert torch.equal(seen["appearance.inception_3c_double_3x3_2"][0], a)
    stacked = seen["temporal.res3a_2"][0]  # (B,C,K,h,w)
    assert torch.equal(stacked[1, :, 2], a[5])
    assert torch.equal(stacked[0, :, 1], a[1])
    assert not torch.allclose(stacked[1, :, 1], a[5], atol=1e-2)


def test_the_front_is_eco_lites() -> None:
    full, lite = FullTrunk(SMALL).eval(), AppearanceTrunk(SMALL).eval()
    shake(full)
    lite.load_state_dict({k: v for k, v in full.state_dict().items() if k in lite.state_dict()}, strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(full(x)[0], lite(x))


def test_two_dimensions_come_first_and_are_a_mean_over_frames() -> None:
    net = network().eval()
    seen = watch(net, ["head", "temporal", "appearance.inception_5b_1x1_bn"])
    x = clip(2, 3)
    with torch.inference_mode():
        logits, found = net(x), net.features(x)
        read = seen["head"][0]
        assert torch.allclose(net.head(found["descriptor"]), logits)
    assert torch.equal(read, found["descriptor"])
    assert torch.allclose(read[:, :128], found["frames"].mean(1), atol=1e-6)
    assert torch.equal(read[:, 128:], seen["temporal"][1])
    first_branch = seen["appearance.inception_5b_1x1_bn"][1].relu().mean((2, 3)).unflatten(0, (2, 3))
    assert torch.allclose(found["frames"][..., : first_branch.shape[2]], first_branch, atol=1e-6)


def test_frame_order_matters_to_the_3d_stream_alone() -> None:
    net = network().eval()
    x = clip(1, 4)
    with torch.inference_mode():
        forward, backward = net.features(x)["descriptor"], net.features(x.flip(1))["descriptor"]
    assert torch.allclose(forward[:, :128], backward[:, :128], atol=1e-5)
    assert not torch.allclose(forward[:, 128:], backward[:, 128:], atol=1e-3)


def test_each_stream_has_its_own_dropout() -> None:
    net = network(frame_dropout=0.5, clip_dropout=0.3)
    seen = watch(net, ["frame_dropout", "clip_dropout", "head"])
    net(clip(8, 2, 32))
    frames, clips = seen["frame_dropout"], seen["clip_dropout"]
    assert frames[0].shape == (8, 2, 128)  # before the mean over frames, each frame for itself
    assert clips[0].shape == (8, 64)
    alive = frames[0] > 0
    assert (frames[1][alive] == 0).float().mean() == pytest.approx(0.5, abs=0.08)
    assert torch.allclose(frames[1][alive & (frames[1] > 0)], 2 * frames[0][alive & (frames[1] > 0)])
    alive = clips[0] > 0
    assert (clips[1][alive] == 0).float().mean() == pytest.approx(0.3, abs=0.1)
    assert torch.equal(seen["head"][0], torch.cat([frames[1].mean(1), clips[1]], 1))
    defaults = network()
    assert (defaults.frame_dropout.p, defaults.clip_dropout.p) == (0.5, 0.3)


def test_input_is_rgb_and_becomes_bgr_minus_mean() -> None:
    net = network().eval()
    seen = watch(net, ["appearance.conv1_7x7_s2"])
    x = torch.zeros(1, 1, 3, 32, 32, dtype=torch.uint8)
    x[:, :, 0], x[:, :, 1], x[:, :, 2] = 10, 20, 255  # R, G, B
    with torch.inference_mode():
        logits = net(x)
        assert seen["appearance.conv1_7x7_s2"][0][0, :, 0, 0].tolist() == [255 - 104, 20 - 117, 10 - 128]
        assert torch.equal(logits, net(x.float()))
        caffe = network(mean=(104.0, 117.0, 123.0)).eval()
        seen = watch(caffe, ["appearance.conv1_7x7_s2"])
        caffe(x)
    assert seen["appearance.conv1_7x7_s2"][0][0, :, 0, 0].tolist() == [255 - 104, 20 - 117, 10 - 123]


def test_gradients_reach_every_parameter() -> None:
    net = network()
    cross_entropy(net(clip(2, 4)), torch.tensor([1, 3])).backward()
    grads = {n: p.grad for n, p in net.named_parameters()}
    assert [n for n, grad in grads.items() if grad is None] == []
    # The bias of a convolution before a BN that trains moves nothing: what it gets is rounding noise.
    felt = {n: g for n, g in grads.items() if n.endswith(".weight") or "_bn." in n or n.startswith("head.")}
    assert [n for n, grad in felt.items() if grad is None or not grad.abs().max() > 0] == []


# ---- the authors' own outputs ----------------------------------------------------------------------------


@pytest.mark.shared
def test_eco_full_answers_as_the_original() -> None:
    if not (GOLDEN / "reference.npz").exists():
        pytest.skip(f"no golden outputs of the original networks at {GOLDEN}")
    spec = importlib.util.spec_from_file_location("seeded", GOLDEN / "seeded.py")
    assert spec is not None and spec.loader is not None
    seeded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(seeded)
    reference = np.load(GOLDEN / "reference.npz")

    net = ECOFull(400).eval()
    net.load_state_dict(
        {k: torch.tensor(seeded.tensor(public(k), tuple(v.shape))) for k, v in net.state_dict().items()}
    )
    last = "appearance.inception_3c_double_3x3_1_bn"
    stages = ["res3b", "res4b", "res5b"]
    seen = watch(net, [*(f"temporal.{s}_bn" for s in stages), last, "temporal"])
    with torch.inference_mode():
        logits = net(torch.from_numpy(seeded.frames(8)).permute(0, 3, 1, 2)[None])
    a = seen[last][1].relu()
    found = {f"{s}_bn_relu_mean": seen[f"temporal.{s}_bn"][1].relu().mean((3, 4))[0] for s in stages}
    found |= {"appearance_mean": a.mean((2, 3)), "appearance_frame0": a[0, :, ::7, ::7]}
    found |= {"descriptor": seen["temporal"][1][0], "out": logits[0]}

    prefix = "ecofull_k8_"
    assert {k for k in reference.files if k.startswith(prefix)} == {prefix + k for k in found}
    for name, ours in found.items():
        theirs = torch.from_numpy(reference[prefix + name])
        assert ours.shape == theirs.shape, name
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max(), name
