"""The networks against their sources: names, counts, shapes, equations, the authors' own outputs."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pasnet.config import FUSION_TITLES, FusionConfig, ModelConfig
from pasnet.models import eco
from pasnet.models.eco import AppearanceTrunk, TemporalNet, scaled
from pasnet.models.fusion import READS, Fusion, channel_windows
from pasnet.models.openpose import BodyNet
from pasnet.models.pasnet import PASNet, build, parameter_groups

torch.set_num_threads(2)

STYLES = list(FUSION_TITLES)
SMALL = 0.125
GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


def model(style: str, *, classes: int = 5, width: float = SMALL, seed: int = 0, **options: Any) -> PASNet:
    """A network of one style; options are FusionConfig's, or ModelConfig's where it has no such field."""
    fusion_fields = {f.name for f in dataclasses.fields(FusionConfig)}
    fusion = {k: options.pop(k) for k in list(options) if k in fusion_fields}
    torch.manual_seed(seed)
    return build(ModelConfig(num_classes=classes, width=width, fusion=FusionConfig(style=style, **fusion), **options))


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


# ---- names and counts ------------------------------------------------------------------------------------

CONV2D = [
    "conv1_7x7_s2", "conv2_3x3_reduce", "conv2_3x3",
    "inception_3a_1x1", "inception_3a_3x3_reduce", "inception_3a_3x3", "inception_3a_double_3x3_reduce",
    "inception_3a_double_3x3_1", "inception_3a_double_3x3_2", "inception_3a_pool_proj",
    "inception_3b_1x1", "inception_3b_3x3_reduce", "inception_3b_3x3", "inception_3b_double_3x3_reduce",
    "inception_3b_double_3x3_1", "inception_3b_double_3x3_2", "inception_3b_pool_proj",
    "inception_3c_double_3x3_reduce", "inception_3c_double_3x3_1",
]  # fmt: skip
CONV3D = [
    "res3a_2", "res3b_1", "res3b_2", "res4a_1", "res4a_2", "res4a_down", "res4b_1", "res4b_2",
    "res5a_1", "res5a_2", "res5a_down", "res5b_1", "res5b_2",
]  # fmt: skip
BN3D = [
    "res3a_bn", "res3b_1_bn", "res3b_bn", "res4a_1_bn", "res4a_bn", "res4b_1_bn", "res4b_bn",
    "res5a_1_bn", "res5a_bn", "res5b_1_bn", "res5b_bn",
]  # fmt: skip
BN_ENTRIES = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def public(name: str) -> str:
    """Our name for an ECO tensor -> the public checkpoint's."""
    prefix, rest = name.split(".", 1)
    return f"module.new_fc.{rest}" if prefix == "head" else f"module.base_model.{rest}"


def test_eco_lite_has_exactly_the_216_public_names() -> None:
    layers = [f"{n}.{e}" for n in CONV2D + CONV3D for e in ("weight", "bias")]
    layers += [f"{n}.{e}" for n in [f"{c}_bn" for c in CONV2D] + BN3D for e in BN_ENTRIES]
    expected = {f"module.base_model.{n}" for n in layers} | {"module.new_fc.weight", "module.new_fc.bias"}
    with torch.device("meta"):
        state = {public(k): v for k, v in model("A", classes=400, width=1).state_dict().items()}
    assert set(state) == expected
    assert len(state) == 216
    assert state["module.new_fc.weight"].shape == (400, 512)
    assert state["module.base_model.res3a_2.weight"].shape == (128, 96, 3, 3, 3)
    assert state["module.base_model.inception_3c_double_3x3_1.weight"].shape == (96, 64, 3, 3)


@pytest.mark.parametrize(("paf", "heatmap"), [(True, True), (False, True), (True, False), (False, False)])
def test_pose_has_exactly_the_184_public_names_whatever_is_read(paf: bool, heatmap: bool) -> None:
    layers = [f"conv{i}_{j}" for i, n in ((1, 2), (2, 2), (3, 4), (4, 2)) for j in range(1, n + 1)]
    layers += ["conv4_3_CPM", "conv4_4_CPM"]
    layers += [f"conv5_{i}_CPM_{b}" for i in range(1, 6) for b in ("L1", "L2")]
    layers += [f"Mconv{i}_stage{s}_{b}" for i in range(1, 8) for s in range(2, 7) for b in ("L1", "L2")]
    with torch.device("meta"):
        net = BodyNet(1.0, paf, heatmap)
    assert set(net.state_dict()) == {f"{n}.{e}" for n in layers for e in ("weight", "bias")}
    assert len(net.state_dict()) == 184
    assert count(net) == 52_311_446


def test_parameter_counts_at_width_1() -> None:
    with torch.device("meta"):
        assert count(AppearanceTrunk()) == 681_568
        assert count(TemporalNet()) == 36_617_088
        assert [count(model("A", classes=c, width=1)) for c in (51, 101, 400)] == [
            37_324_819,
            37_350_469,
            37_503_856,
        ]
        assert count(model("A+pool(I)+pool(F)", classes=101, width=1)) == 89_661_915
        assert count(TemporalNet(in_channels=128).res3a_2) == 442_496


@pytest.mark.parametrize(
    ("style", "kernel", "expected"),
    [(s, k, 0) for s in STYLES if "onv" not in s for k in (1, 3)]
    + [("Conv(A,E*A)", 1, 18_528), ("Conv(A,I)", 1, 21_600), ("Conv(A,I,F)", 1, 33_888)]
    + [("Conv(A,E*A)", 3, 165_984), ("Conv(A,I)", 3, 193_632), ("Conv(A,I,F)", 3, 304_224)]
    + [("A+1*1conv", 1, 9_312), ("A+1*1conv", 3, 9_312)],
)
def test_fusion_adds_the_parameters_of_the_table(style: str, kernel: Any, expected: int) -> None:
    with torch.device("meta"):
        assert count(Fusion(style=style, kernel=kernel)) == expected


def test_fusion_and_config_agree() -> None:
    assert list(READS) == STYLES
    defaults = {f.name: f.default for f in dataclasses.fields(FusionConfig)}
    parameters = inspect.signature(Fusion).parameters.values()
    assert {p.name: p.default for p in parameters if not p.name.endswith("_channels")} == defaults
    with pytest.raises(ValueError, match="unknown fusion style"):
        Fusion(style="B")


def test_widths_round_to_multiples_of_four() -> None:
    assert [scaled(c, 0.125) for c in (32, 64, 96, 128, 512)] == [4, 8, 12, 16, 64]
    assert scaled(64, 0.01) == 4
    assert scaled(96, 0.3) == 28


# ---- shapes and cost -------------------------------------------------------------------------------------


def test_appearance_shapes_at_width_1() -> None:
    shapes = {
        "conv1_7x7_s2": (64, 112, 112), "conv2_3x3_reduce": (64, 56, 56), "conv2_3x3": (192, 56, 56),
        "inception_3a_1x1": (64, 28, 28), "inception_3b_1x1": (64, 28, 28),
        "inception_3c_double_3x3_reduce": (64, 28, 28), "inception_3c_double_3x3_1": (96, 28, 28),
    }  # fmt: skip
    with torch.device("meta"):
        net = AppearanceTrunk()
        seen = watch(net, list(shapes))
        assert net(torch.empty(2, 3, 224, 224)).shape == (2, 96, 28, 28)
    assert {name: tuple(out.shape[1:]) for name, (_, out) in seen.items()} == shapes
    assert seen["inception_3b_1x1"][0].shape[1] == 256
    assert seen["inception_3c_double_3x3_reduce"][0].shape[1] == 320


@pytest.mark.parametrize("k", [1, 4, 7, 8, 16, 18, 48])
def test_any_number_of_frames(k: int) -> None:
    with torch.device("meta"):
        net = TemporalNet()
        seen = watch(net, ["res3b_bn", "res4b_bn", "res5b_bn"])
        assert net(torch.empty(2, 96, k, 28, 28)).shape == (2, 512)
    half, quarter = math.ceil(k / 2), math.ceil(math.ceil(k / 2) / 2)
    assert [tuple(out.shape[1:]) for _, out in seen.values()] == [
        (128, k, 28, 28),
        (256, half, 14, 14),
        (512, quarter, 7, 7),
    ]
    with torch.inference_mode():
        small = model("A+pool(I)+pool(F)", channel_pool="sliding33").eval()
        logits = small(clip(2, k, 32))
        one = small(clip(2, k, 32)[1:])
    assert logits.shape == (2, 5)
    assert torch.allclose(logits[1:], one, atol=1e-5)  # clips do not mix
    assert not torch.allclose(logits[0], logits[1], atol=1e-5)


def test_global_pooling_is_the_originals_window_where_that_exists() -> None:
    net = TemporalNet(SMALL).eval()
    seen = watch(net, ["res5b_bn"])
    with torch.inference_mode():
        descriptor = net(torch.randn(1, 12, 8, 28, 28))
    original = nn.functional.avg_pool3d(seen["res5b_bn"][1].relu(), (8 // 4, 7, 7)).flatten(1)
    assert torch.allclose(descriptor, original, atol=1e-6)


def test_frames_reach_the_temporal_network_in_order() -> None:
    net = model("A").eval()
    seen = watch(net, ["temporal.res3a_2"])
    x = clip(2, 3)
    with torch.inference_mode():
        net(x)
        frame = net.features(x[1:, 2:], maps=True)["appearance"][0, 0]
        assert torch.allclose(seen["temporal.res3a_2"][0][0, :, 0], frame, atol=1e-5)  # the last call: K = 1
        net(x)
    stacked = seen["temporal.res3a_2"][0]  # (B,C,K,h,w)
    assert stacked.shape == (2, 12, 3, 8, 8)
    assert torch.allclose(stacked[1, :, 2], frame, atol=1e-5)
    assert not torch.allclose(stacked[1, :, 1], frame, atol=1e-2)


def gmacs(net: nn.Module, *inputs: Tensor, **options: Any) -> float:
    with FlopCounterMode(display=False) as counter:
        net(*inputs, **options)
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize(
    ("k", "eco", "pas"),
    [(8, 23.24, 426.2), (16, 46.49, 852.3), (32, 92.97, 1704.7), (48, 139.5, 2557)],
)
def test_multiply_adds_per_clip(k: int, eco: float, pas: float) -> None:
    with torch.device("meta"):
        x = torch.empty(1, k, 3, 224, 224, dtype=torch.uint8)
        assert gmacs(model("A", width=1), x) == pytest.approx(eco, rel=1e-3)
        assert gmacs(model("A+pool(I)+pool(F)", width=1), x) == pytest.approx(pas, rel=1e-3)


def test_multiply_adds_of_what_is_not_read_are_saved() -> None:
    with torch.device("meta"):
        x = torch.empty(1, 3, 224, 224)
        assert gmacs(BodyNet(1, True, True), x, everything=True) == pytest.approx(50.365, rel=1e-4)
        whole, no_paf = gmacs(BodyNet(1, True, True), x), gmacs(BodyNet(1, False, True), x)
        assert whole - no_paf == pytest.approx(3.44, rel=2e-3)
        no_heat = gmacs(BodyNet(1, True, False), x)
        assert whole - no_heat == pytest.approx(128 * 19 * 28 * 28 / 1e9, rel=1e-3)
        assert gmacs(AppearanceTrunk(), x) == pytest.approx(0.911, rel=1e-3)


# ---- fusion ----------------------------------------------------------------------------------------------


def letters(n: int = 3, a: int = 12, p: int = 16) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    A, I, F = (torch.randn(n, c, 5, 5, generator=g).relu() for c in (a, p, p))  # noqa: E741
    return {"A": A, "I": I, "F": F, "H": torch.randn(n, 19, 5, 5, generator=g)}


def fuse(style: str, maps: dict[str, Tensor] | None = None, **options: Any) -> Tensor:
    torch.manual_seed(0)
    net = Fusion(style=style, appearance_channels=12, pose_channels=16, **options)
    return net(**(maps or letters()))


def test_every_equation() -> None:
    A, I, F, H = letters().values()  # noqa: E741
    E = torch.stack([H[:, j] for j in range(18)]).max(dim=0).values[:, None]

    def pool(x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool1d(x.movedim(1, -1).flatten(1, 2), 12).movedim(-1, 1).view_as(A)

    def conv(style: str, *maps: Tensor) -> Tensor:
        torch.manual_seed(0)
        layer = Fusion(style=style, appearance_channels=12, pose_channels=16).conv.get_submodule("0")
        weight, bias = (t.detach() for t in (layer.get_parameter("weight"), layer.get_parameter("bias")))
        return torch.einsum("oi,nihw->nohw", weight[:, :, 0, 0], torch.cat(maps, 1)) + bias[:, None, None]

    expected = {
        "A": A,
        "I": pool(I),
        "E*A": E * A,
        "A+E*A": A + 1.5 * E * A,
        "Conv(A,E*A)": conv("Conv(A,E*A)", A, E * A),
        "A+pool(I)": A + 1.5 * pool(I),
        "Conv(A,I)": conv("Conv(A,I)", A, I),
        "A+pool(I)+pool(F)": A + 0.5 * pool(I) + pool(F),
        "Conv(A,I,F)": conv("Conv(A,I,F)", A, I, F),
        "A+1*1conv": conv("A+1*1conv", A),
    }
    assert list(expected) == STYLES
    for style, h in expected.items():
        assert torch.allclose(fuse(style), h, atol=1e-6), style


@pytest.mark.parametrize("style", STYLES)
def test_a_style_reads_what_it_says_and_nothing_else(style: str) -> None:
    net = Fusion(style=style)
    letter_of = {"A": net.needs_appearance, "I": "I" in style, "F": net.needs_paf, "H": net.needs_heatmap}
    assert net.needs_pose == any(letter_of[x] for x in "IFH")
    before = fuse(style)
    for letter, read in letter_of.items():
        maps = letters()
        maps[letter] = maps[letter] * 3
        assert torch.equal(fuse(style, maps), before) != read, letter


def test_adaptive_channel_pool_is_the_window_list() -> None:
    # {0,1} {1,2} {2,3} {4,5} ...
    expected = [(4 * g + j, 4 * g + j + 2) for g in range(32) for j in range(3)]
    assert channel_windows("adaptive", 128, 96) == expected
    for inputs, outputs in ((128, 96), (16, 12), (40, 28), (4, 4)):
        x = torch.randn(7, inputs)
        windows = channel_windows("adaptive", inputs, outputs)
        ours = torch.stack([x[:, a:b].mean(1) for a, b in windows], 1)
        assert torch.allclose(ours, nn.functional.adaptive_avg_pool1d(x, outputs), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "reference"),
    [
        ("sliding33", lambda x: nn.functional.avg_pool3d(x[:, None], (5, 1, 1), stride=1)[:, 0]),
        ("mean1", lambda x: x.mean(1, keepdim=True).expand(-1, 12, -1, -1)),
        ("first96", lambda x: x[:, :12]),
    ],
)
def test_other_channel_pools(kind: str, reference: Callable[[Tensor], Tensor]) -> None:
    out = fuse("I", channel_pool=kind)
    assert torch.allclose(out, reference(letters()["I"]), atol=1e-6)
    assert not torch.allclose(out, fuse("I"), atol=1e-3)
    assert channel_windows("sliding33", 128, 96)[-1] == (95, 128)


def test_e_ignores_the_background_unless_told() -> None:
    maps = letters()
    maps["H"][:, 18] = 100
    assert torch.equal(fuse("E*A", maps), fuse("E*A"))
    assert torch.allclose(fuse("E*A", maps, heatmap_background=True), 100 * maps["A"])


def test_heatmap_clamps() -> None:
    maps = letters()
    maps["H"][:] = -0.5
    assert torch.allclose(fuse("E*A", maps), -0.5 * maps["A"])
    assert torch.equal(fuse("E*A", maps, heatmap_clamp="relu").abs(), torch.zeros_like(maps["A"]))
    maps["H"][:, 7] = 3
    assert torch.allclose(fuse("E*A", maps, heatmap_clamp="relu"), 3 * maps["A"])
    assert torch.allclose(fuse("E*A", maps, heatmap_clamp="01"), maps["A"])
    maps["H"][:] = -0.5
    assert torch.equal(fuse("E*A", maps, heatmap_clamp="01").abs(), torch.zeros_like(maps["A"]))


@pytest.mark.parametrize(
    ("style", "name", "letter"),
    [
        ("A+E*A", "lambda1", "E"),
        ("A+pool(I)", "lambda2", "I"),
        ("A+pool(I)+pool(F)", "lambda3", "I"),
        ("A+pool(I)+pool(F)", "lambda4", "F"),
    ],
)
def test_lambdas_scale_their_own_term(style: str, name: str, letter: str) -> None:
    maps = letters()
    term = fuse("E*A") if letter == "E" else fuse("I", {"I": maps[letter]})
    seven, none = (fuse(style, maps, **{name: value}) for value in (7.0, 0.0))
    assert torch.allclose(seven - none, 7 * term, atol=1e-5)


def test_conv_kernel_activation_and_init() -> None:
    A = letters()["A"]
    for style in ("Conv(A,E*A)", "Conv(A,I)", "Conv(A,I,F)"):
        weight = Fusion(style=style, kernel=3).conv.get_parameter("0.weight")
        assert weight.shape[2:] == (3, 3)
        linear = fuse(style)
        assert linear.min() < 0
        assert torch.equal(fuse(style, act="relu"), linear.relu())
        normed = fuse(style, act="bn_relu")
        expected = nn.functional.batch_norm(linear, None, None, training=True).relu()
        assert torch.allclose(normed, expected, atol=1e-5)
        for kernel in (1, 3):
            assert torch.allclose(fuse(style, init="identity_on_a", kernel=kernel), A, atol=1e-6)
            assert not torch.allclose(fuse(style, kernel=kernel), A, atol=1e-2)


def test_control_modes() -> None:
    A = letters()["A"]
    sequential, residual = fuse("A+1*1conv"), fuse("A+1*1conv", control_mode="residual")
    assert torch.allclose(residual, A + sequential, atol=1e-6)
    for mode in ("sequential", "residual"):
        assert torch.allclose(fuse("A+1*1conv", control_mode=mode, init="identity_on_a"), A, atol=1e-6)


def test_i_only_can_widen_the_3d_network_instead_of_pooling() -> None:
    assert torch.equal(fuse("I", i_only="new_res3a"), letters()["I"])
    net = model("I", i_only="new_res3a")
    assert net.temporal.res3a_2.in_channels == 16
    assert model("I").temporal.res3a_2.in_channels == 12
    assert net(clip()).shape == (2, 5)


def test_pose_feature_before_or_after_relu() -> None:
    def pool(x: Tensor) -> Tensor:
        windows = channel_windows("adaptive", 16, 12)
        return torch.stack([x[:, a:b].mean(1) for a, b in windows], 1)

    for option in ("post_relu", "pre_relu"):
        net = model("A+pool(I)+pool(F)", pose_feature=option).eval()
        assert net.pose is not None
        seen = watch(net, ["pose.Mconv6_stage6_L2", "pose.Mconv6_stage6_L1"])
        with torch.inference_mode():
            found = net.features(clip(1, 2), maps=True)
        I, F = (seen[f"pose.Mconv6_stage6_{b}"][1] for b in ("L2", "L1"))  # noqa: E741
        assert I.min() < 0 and F.min() < 0
        if option == "post_relu":
            I, F = I.relu(), F.relu()  # noqa: E741
        expected = found["appearance"][0] + 0.5 * pool(I) + pool(F)
        assert torch.allclose(found["fused"][0], expected, atol=1e-5)


# ---- inside the two networks -----------------------------------------------------------------------------


def shake(net: nn.Module) -> None:
    """Random BN statistics and affine, so that a tensor before BN cannot pass for one after it."""
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            for tensor in (module.weight.data, module.running_var, module.bias.data, module.running_mean):
                assert tensor is not None
                tensor.uniform_(0.5, 1.5)


@pytest.mark.parametrize("k", range(1, 7))
@pytest.mark.parametrize("stride", [1, 2])
def test_bf16_gradients_of_3d_convolutions_on_a_cpu(k: int, stride: int) -> None:
    conv = eco.Conv3d(16, 16, 3, stride, padding=1)
    x = torch.randn(2, 16, k, 7, 7)
    up = torch.randn_like(conv(x))
    found = []
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = conv(x)
        found.append(torch.autograd.grad(out, conv.weight, up.to(out.dtype))[0])
    assert (found[1] - found[0]).norm() < 0.02 * found[0].norm()


def test_skips_carry_the_raw_sum() -> None:
    torch.manual_seed(0)
    net = TemporalNet(SMALL).eval()
    shake(net)
    for stage in "345":
        for parameter in net.get_submodule(f"res{stage}b_2").parameters():
            nn.init.zeros_(parameter)
    names = [f"res{s}{x}" for s in "45" for x in ("a_2", "a_down", "a_bn", "b_bn")]
    seen = watch(net, [*names, "res3a_2", "res3b_bn"])
    with torch.inference_mode():
        net(torch.randn(2, 12, 4, 8, 8))
    raw = seen["res3a_2"][1]
    assert torch.equal(seen["res3b_bn"][0], raw)
    for stage in "45":
        raw = seen[f"res{stage}a_down"][1] + seen[f"res{stage}a_2"][1]
        assert torch.equal(seen[f"res{stage}b_bn"][0], raw)
        assert not torch.allclose(seen[f"res{stage}a_bn"][1], raw, atol=0.1)


def test_pafs_come_first_in_the_concatenation() -> None:
    torch.manual_seed(0)
    net = BodyNet(SMALL).eval()
    stages = [("conv5_5_CPM", "Mconv1_stage2"), ("Mconv7_stage2", "Mconv1_stage3")]
    stages += [("Mconv7_stage5", "Mconv1_stage6")]
    names = [f"{n}_{b}" for pair in stages for n in pair for b in ("L1", "L2")]
    seen = watch(net, [*names, "conv4_4_CPM"])
    with torch.inference_mode():
        net(torch.randn(1, 3, 32, 32))
    trunk = seen["conv4_4_CPM"][1].relu()
    for maps, following in stages:
        parts = [seen[f"{maps}_L1"][1], seen[f"{maps}_L2"][1], trunk]
        assert [p.shape[1] for p in parts] == [38, 19, 16]
        for branch in ("L1", "L2"):
            assert torch.equal(seen[f"{following}_{branch}"][0], torch.cat(parts, 1))


def test_maps_have_no_relu_and_features_have() -> None:
    torch.manual_seed(0)
    net = BodyNet(SMALL).eval()
    nn.init.constant_(net.get_submodule("Mconv7_stage6_L2").get_parameter("bias"), -5)
    with torch.inference_mode():
        maps = net(torch.randn(1, 3, 32, 32), everything=True)
    assert maps.heatmaps.max() < 0
    assert maps.pafs.min() < 0
    assert maps.implicit_pre_relu.min() < 0 and maps.paf_feature_pre_relu.min() < 0
    assert torch.equal(maps.implicit, maps.implicit_pre_relu.relu())
    assert torch.equal(maps.paf_feature, maps.paf_feature_pre_relu.relu())


def test_pose_returns_what_is_read_and_everything_on_request() -> None:
    x = torch.randn(2, 3, 64, 64)
    for paf, heatmap in ((True, True), (False, True), (True, False), (False, False)):
        torch.manual_seed(0)
        net = BodyNet(SMALL, paf, heatmap).eval()
        with torch.inference_mode():
            some, whole = net(x), net(x, everything=True)
        assert (some.paf_feature is not None, some.heatmaps is not None) == (paf, heatmap)
        assert some.pafs is None
        assert torch.equal(some.implicit, whole.implicit)
        assert [m.shape for m in (whole.implicit, whole.paf_feature, whole.heatmaps, whole.pafs)] == [
            (2, c, 8, 8) for c in (16, 16, 19, 38)
        ]
        frozen = {n.rsplit(".", 1)[0] for n, p in net.named_parameters() if not p.requires_grad}
        assert frozen == set(net.unused)
        assert len(frozen) == (1 if paf else 7) + (0 if heatmap else 1)


# ---- the whole network -----------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_gradients_reach_every_trainable_parameter(style: str) -> None:
    net = model(style)
    nn.functional.cross_entropy(net(clip()), torch.tensor([1, 3])).backward()
    without = [n for n, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert [n for n, p in net.named_parameters() if not p.requires_grad and p.grad is not None] == []

    reached = {n for n, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    must = {"temporal.res3a_2.weight", "temporal.res5b_2.weight", "head.weight", "head.bias"}
    if net.fusion.needs_appearance:
        must |= {"appearance.conv1_7x7_s2.weight", "appearance.inception_3c_double_3x3_1.weight"}
    if net.fusion.needs_pose:
        must |= {"pose.conv1_1.weight", "pose.Mconv7_stage5_L1.weight", "pose.Mconv6_stage6_L2.weight"}
    must |= {"pose.Mconv7_stage6_L2.weight"} if net.fusion.needs_heatmap else set()
    must |= {"pose.Mconv6_stage6_L1.weight"} if net.fusion.needs_paf else set()
    must |= {"fusion.conv.0.weight", "fusion.conv.0.bias"} if "onv" in style else set()
    assert must <= reached

    assert (net.pose is None) == (style in ("A", "A+1*1conv"))
    assert any(n.startswith("pose.") for n in net.state_dict()) == (net.pose is not None)
    assert any(p.requires_grad for p in net.appearance.parameters()) == (style != "I")
    ran = net.get_buffer("appearance.conv1_7x7_s2_bn.num_batches_tracked")
    assert ran == (0 if style == "I" else 1)
    assert not any("matrix" in n or "mean" in n.split(".")[0] for n in net.state_dict())


@pytest.mark.parametrize("style", ["A", "A+pool(I)+pool(F)"])
def test_uint8_and_float_agree(style: str) -> None:
    net = model(style).eval()
    x = clip()
    with torch.inference_mode():
        logits = net(x)
        assert torch.equal(logits, net(x.float()))
        assert not torch.allclose(logits, net(x.flip(2)), atol=1e-4)  # RGB is not BGR
    with pytest.raises(ValueError, match=r"\(B,K,3,H,W\)"):
        net(x.transpose(1, 2))


def test_each_trunk_normalises_for_itself() -> None:
    net = model("A+pool(I)").eval()
    seen = watch(net, ["appearance.conv1_7x7_s2", "pose.conv1_1"])
    x = torch.zeros(1, 1, 3, 32, 32, dtype=torch.uint8)
    x[:, :, 0], x[:, :, 1], x[:, :, 2] = 10, 20, 255  # R, G, B
    with torch.inference_mode():
        net(x)
    appearance, pose = seen["appearance.conv1_7x7_s2"][0], seen["pose.conv1_1"][0]
    assert appearance[0, :, 0, 0].tolist() == [255 - 104, 20 - 117, 10 - 128]
    assert pose[0, :, 0, 0].tolist() == [255 / 256 - 0.5, 20 / 256 - 0.5, 10 / 256 - 0.5]
    mean = torch.tensor([104.0, 117.0, 128.0]).view(3, 1, 1)
    assert torch.equal((appearance + mean) / 256 - 0.5, pose)


def test_input_options() -> None:
    net = model("A+pool(I)", pose_input="shared", appearance_mean=(1.0, 2.0, 3.0)).eval()
    seen = watch(net, ["appearance.conv1_7x7_s2", "pose.conv1_1"])
    with torch.inference_mode():
        net(torch.full((1, 1, 3, 32, 32), 50.0))
    assert seen["appearance.conv1_7x7_s2"][0][0, :, 0, 0].tolist() == [49, 48, 47]
    assert torch.equal(seen["pose.conv1_1"][0], seen["appearance.conv1_7x7_s2"][0])


@pytest.mark.parametrize("style", ["A", "I", "E*A", "A+pool(I)+pool(F)"])
def test_features(style: str) -> None:
    net = model(style).eval()
    x = clip(2, 3)
    with torch.inference_mode():
        plain, found = net.features(x), net.features(x, maps=True)
        assert set(plain) == {"descriptor"}
        assert torch.allclose(net.head(plain["descriptor"]), net(x))
    assert torch.allclose(plain["descriptor"], found["descriptor"], atol=1e-6)
    channels = {"appearance": 12, "fused": 12}
    if net.fusion.needs_pose:
        channels |= {"implicit": 16, "paf_feature": 16, "heatmaps": 19, "explicit": 1, "pafs": 38}
    assert {k: tuple(v.shape) for k, v in found.items() if k != "descriptor"} == {
        k: (2, 3, c, 8, 8) for k, c in channels.items()
    }
    assert found["descriptor"].shape == (2, 64)


def test_dropout_sits_before_the_head() -> None:
    net = model("A", dropout=0.5)
    seen = watch(net, ["dropout", "head"])
    net(clip())
    assert (seen["head"][0] == 0).float().mean() > (seen["dropout"][0] == 0).float().mean() + 0.2
    assert torch.equal(seen["head"][0], seen["dropout"][1])
    net.eval()
    net(clip())
    assert torch.equal(seen["head"][0], seen["dropout"][0])


def test_parameter_groups() -> None:
    net = model("Conv(A,I)", act="bn_relu")
    groups = {g["name"]: g for g in parameter_groups(net, lr=0.1, weight_decay=0.01, pose_lr_mult=0.5)}
    rates = {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()}
    assert rates == {
        "weight": (0.1, 0.01),
        "bias": (0.2, 0),
        "bn": (0.1, 0),
        "pose_weight": (0.05, 0.01),
        "pose_bias": (0.1, 0),
    }
    listed = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(listed) == sorted(id(p) for p in net.parameters() if p.requires_grad)
    names = {id(p): n for n, p in net.named_parameters()}
    assert {names[id(p)].split(".")[0] for p in groups["pose_bias"]["params"]} == {"pose"}
    assert "fusion.conv.0.weight" in {names[id(p)] for p in groups["weight"]["params"]}
    assert len(groups["bn"]["params"]) == 2 * (19 + 11 + 1)
    assert len(groups["bias"]["params"]) == 19 + 13 + 1 + 1

    assert net.pose is not None
    net.pose.requires_grad_(False)
    assert {g["name"] for g in parameter_groups(net, 0.1, 0.01)} == {"weight", "bias", "bn"}
    torch.optim.SGD(parameter_groups(net, 0.1, 0.01), momentum=0.9, nesterov=True)


@pytest.mark.parametrize("width", [0.0625, SMALL, 0.25])
def test_fresh_pose_weights_keep_the_scale(width: float) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        net = BodyNet(width)
        with torch.inference_mode():
            maps = net(clip(1, 2)[0] / 256 - 0.5, everything=True)
        for tensor in (maps.implicit, maps.paf_feature, maps.heatmaps, maps.pafs):
            assert 5e-3 < tensor.pow(2).mean().sqrt() < 5


def test_a_fresh_network_can_be_trained() -> None:
    net = model("A+pool(I)+pool(F)", classes=4, dropout=0.0)
    optimiser = torch.optim.SGD(parameter_groups(net, 0.01, 5e-4), momentum=0.9, nesterov=True)
    x, y = clip(4, 2, 32), torch.arange(4)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > 1
    assert losses[-1] < 0.3 * losses[0]


# ---- the authors' own outputs ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> tuple[Any, Any]:
    if not (GOLDEN / "reference.npz").exists():
        pytest.skip(f"no golden outputs of the original networks at {GOLDEN}")
    spec = importlib.util.spec_from_file_location("seeded", GOLDEN / "seeded.py")
    assert spec is not None and spec.loader is not None
    seeded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(seeded)
    return seeded, np.load(GOLDEN / "reference.npz")


def fill(net: nn.Module, seeded: Any, rename: Callable[[str], str] = str) -> None:
    state = net.state_dict()
    net.load_state_dict({k: torch.tensor(seeded.tensor(rename(k), tuple(v.shape))) for k, v in state.items()})
    net.eval()


def compare(reference: Any, prefix: str, found: dict[str, Tensor]) -> None:
    assert {k for k in reference.files if k.startswith(prefix)} == {prefix + k for k in found}
    for name, ours in found.items():
        theirs = torch.from_numpy(reference[prefix + name])
        assert ours.shape == theirs.shape, name
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max(), name


@pytest.mark.shared
def test_eco_lite_answers_as_the_original(golden: tuple[Any, Any]) -> None:
    seeded, reference = golden

    def rename(name: str) -> str:
        prefix, rest = name.split(".", 1)
        return f"fc_final.{rest}" if prefix == "head" else rest

    net = model("A", classes=400, width=1)
    fill(net, seeded, rename)
    stages = ["res3b", "res4b", "res5b"]
    last = "appearance.inception_3c_double_3x3_1_bn"
    seen = watch(net, [*(f"temporal.{s}_bn" for s in stages), last, "head"])
    with torch.inference_mode():
        logits = net(torch.from_numpy(seeded.frames(8)).permute(0, 3, 1, 2)[None])
    appearance = seen[last][1].relu()
    found = {f"{s}_bn_relu_mean": seen[f"temporal.{s}_bn"][1].relu().mean((3, 4))[0] for s in stages}
    found |= {"appearance_mean": appearance.mean((2, 3)), "appearance_frame0": appearance[0, :, ::7, ::7]}
    found |= {"descriptor": seen["head"][0][0], "out": logits[0]}
    compare(reference, "eco_k8_", found)


@pytest.mark.shared
def test_pose_network_answers_as_the_original(golden: tuple[Any, Any]) -> None:
    seeded, reference = golden
    net = BodyNet()
    fill(net, seeded)
    rgb = torch.from_numpy(seeded.frames(8)[:2]).permute(0, 3, 1, 2)
    with torch.inference_mode():
        maps = net(rgb.flip(1) / 256 - 0.5, everything=True)
        E = Fusion(style="E*A").explicit(maps.heatmaps)
    found = {"I": maps.implicit, "F": maps.paf_feature, "P": maps.pafs, "H": maps.heatmaps, "E": E}
    entries = {f"{k}_mean": m.mean((2, 3)) for k, m in found.items()}
    entries |= {f"{k}_grid": m[:, :, ::7, ::7] for k, m in found.items()}
    compare(reference, "pose_", entries)
