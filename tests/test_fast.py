"""The inference form, Fourier tiles, checkpoints and counted costs against the plain network."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pasnet import cli, costing
from pasnet.config import FUSION_TITLES, FusionConfig, ModelConfig
from pasnet.experiments import ROWS, select_rows
from pasnet.models import fast as fast_forms
from pasnet.models import hopper
from pasnet.models.cost import cost, kept_bytes
from pasnet.models.fast import InferencePASNet, for_evaluation, optimised
from pasnet.models.fourier import FourierConv2d
from pasnet.models.hopper import TurnedConv2d, conv_same
from pasnet.models.openpose import BodyNet
from pasnet.models.pasnet import PASNet, compiled, for_tensor_cores

SMALL = 0.125


def clips(batch: int = 2, k: int = 2, size: int = 64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, k, 3, size, size), dtype=torch.uint8, generator=generator)


def trained(style: str, width: float = SMALL, **options: Any) -> PASNet:
    """A network whose batch norms are not what they are when fresh: with those, folding them could go wrong unseen."""
    fusion_fields = {f.name for f in dataclasses.fields(FusionConfig)}
    fusion = {name: options.pop(name) for name in list(options) if name in fusion_fields}
    torch.manual_seed(0)
    net = PASNet(ModelConfig(num_classes=5, width=width, fusion=FusionConfig(style=style, **fusion), **options))
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
        elif isinstance(module, (nn.Conv2d, nn.Conv3d)) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
    with torch.no_grad():
        net.train()(clips(4, 2, 64, seed=2))
    return net.eval()


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


# ---- what a GPU runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("paf", "heatmap"), [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("everything", [False, True])
def test_merged_convolutions_of_the_pose_network_change_no_number(paf: bool, heatmap: bool, everything: bool) -> None:
    torch.manual_seed(0)
    plain = BodyNet(SMALL, paf=paf, heatmap=heatmap).double().train()
    merged = copy.deepcopy(plain)
    merged.merged = True
    x = torch.rand(2, 3, 40, 48, dtype=torch.float64) - 0.5
    answers = [net(x, everything=everything) for net in (plain, merged)]
    for of_plain, of_merged in zip(*answers, strict=True):
        assert (of_plain is None) == (of_merged is None)
        if of_plain is not None:
            assert of_plain.shape == of_merged.shape and error(of_merged, of_plain) < 1e-12
    for of_plain, of_merged in zip(*(net.stages(x) for net in (plain, merged)), strict=True):
        for ours, exact in zip(of_merged, of_plain, strict=True):
            assert ours.shape == exact.shape and error(ours, exact) < 1e-12
    for answer in answers:
        sum(maps.square().mean() for maps in answer if maps is not None).backward()
    gradients = [{name: p.grad for name, p in net.named_parameters() if p.grad is not None} for net in (plain, merged)]
    assert gradients[0].keys() == gradients[1].keys()
    assert all(error(gradients[1][name], gradient) < 1e-10 for name, gradient in gradients[0].items())


def test_merged_layers_and_checkpoints_go_together() -> None:
    gradients = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        net = for_tensor_cores(PASNet(ModelConfig(num_classes=5, width=SMALL))).double().train()
        assert net.pose is not None and net.pose.merged
        net.pose.checkpoint = checkpoint
        torch.manual_seed(1)
        net(clips()).sum().backward()
        gradients.append(net.pose.conv1_1.weight.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    "options",
    [
        *({"style": style} for style in FUSION_TITLES),
        {"style": "A+pool(I)+pool(F)", "pose_feature": "pre_relu"},
        {"style": "I", "i_only": "new_res3a"},
        {"style": "Conv(A,I,F)", "act": "bn_relu", "kernel": 3, "pose_input": "shared"},
    ],
)
def test_the_form_for_tensor_cores_agrees(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_forms, "is_hopper", lambda device: True)
    net = trained(**options)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = InferencePASNet(net, "fp32", fourier=False, tensor_cores=True)
    x = clips()
    with torch.inference_mode():
        assert error(found(x), net(x)) < 1e-4
    turned = [module for module in found.modules() if isinstance(module, TurnedConv2d)]
    assert bool(turned) == (net.pose is not None)
    for name, module in found.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels), name
    after = net.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())


def test_a_turned_convolution_is_the_convolution() -> None:
    for kernel, padding in ((7, 3), (3, 1), (5, 0)):
        conv = nn.Conv2d(5, 6, kernel, padding=padding).double()
        x = torch.rand(2, 5, 9, 11, dtype=torch.float64)
        assert error(TurnedConv2d(conv)(x), conv(x)) < 1e-12


@pytest.mark.parametrize("kernel", [(7, 7), (7, 5), (5, 7), (9, 9)])
def test_gradients_in_parts_are_the_gradients(kernel: tuple[int, int]) -> None:
    x, up = torch.randn(2, 8, 9, 12).double(), torch.randn(2, 6, 9, 12).double()
    weight, bias = torch.randn(6, 8, *kernel).double(), torch.randn(6).double()
    found = []
    for run, more in (
        (conv_same, {"turned": True}),
        (nn.functional.conv2d, {"padding": (kernel[0] // 2, kernel[1] // 2)}),
    ):
        given = [of.clone().requires_grad_() for of in (x, weight, bias)]
        out = run(*given, **more)
        out.backward(up)
        found.append([out, *(of.grad for of in given)])
    for ours, exact in zip(*found, strict=True):
        assert ours is not None and exact is not None and ours.shape == exact.shape and error(ours, exact) < 1e-12


@pytest.mark.parametrize("compiled", [False, True])
def test_a_network_with_turned_convolutions_learns_the_same(compiled: bool) -> None:
    plain = PASNet(ModelConfig(num_classes=5, width=SMALL, dropout=0)).double().train()
    turned = for_tensor_cores(copy.deepcopy(plain))
    assert turned.pose is not None
    turned.pose.turned = True
    gradients = []
    for net in (plain, turned):
        run = torch.compile(net, backend="aot_eager") if compiled and net is turned else net
        nn.functional.cross_entropy(run(clips()), torch.tensor([0, 1])).backward()
        gradients.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    # biases before a batch norm have none but rounding's
    whole = [torch.cat([of.flatten() for of in each.values()]) for each in gradients]
    assert error(whole[1], whole[0]) < 1e-9


@pytest.mark.parametrize("graphs", [False, True])
def test_compiled_training_learns_the_same(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of two batches, the second smaller; what CUDA graphs make of it, only a GPU shows (benchmarks models)."""
    real, asked, sizes = torch.compile, [], []

    def traced(of: nn.Module, **options: object) -> Callable[[Tensor], Tensor]:
        asked.append(options)
        run = real(of, backend="eager")
        return lambda x: (sizes.append(len(x)), run(x))[1]

    monkeypatch.setattr(torch, "compile", traced)
    plain = trained("A+pool(I)").train()
    assert plain.pose is not None
    plain.dropout.p = 0.0
    other = copy.deepcopy(plain)
    forward = compiled(other, 2, graphs)
    if graphs:  # before the first pass, whose gradients would else lie in a graph's memory
        assert all(p.grad is not None and not p.grad.any() for p in other.parameters() if p.requires_grad)
    x = clips()
    for net, run in ((plain, plain), (other, forward)):
        optimiser = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)
        for _ in range(2):
            for part in (x, x[:1]):
                nn.functional.cross_entropy(run(part), torch.arange(len(part)), reduction="sum").backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=not (graphs and net is other))
    assert asked == [{"dynamic": False, "mode": "reduce-overhead" if graphs else None}] and sizes == [2, 2]
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    kept = [p.grad is not None for p in other.parameters() if p.requires_grad]
    assert all(kept) if graphs else not any(kept)


def test_a_cpu_has_neither_of_cudnns_ways() -> None:
    assert not hopper.fuses_relu(torch.device("cpu")) and not hopper.is_hopper(torch.device("cpu"))
    net = for_tensor_cores(PASNet(ModelConfig(num_classes=5, width=SMALL)))
    assert net.pose is not None and net.pose.merged and not net.pose.turned


def test_under_autocast_a_turned_convolution_has_its_type() -> None:
    x, weight, bias = torch.rand(1, 8, 9, 9), torch.rand(8, 8, 7, 7), torch.rand(8)
    with torch.autocast("cpu", torch.bfloat16):
        assert {conv_same(x, weight, bias, turned).dtype for turned in (True, False)} == {torch.bfloat16}


def test_shapes_that_torch_compile_is_told_are_the_true_ones() -> None:
    x = torch.rand(2, 8, 9, 12).to(memory_format=torch.channels_last)
    weight, bias = torch.rand(6, 8, 7, 7), torch.rand(6)
    torch.library.opcheck(torch.ops.pasnet.conv_relu.default, (x, weight, bias, [2, 2], [3, 3]))
    torch.library.opcheck(torch.ops.pasnet.turned_conv.default, (x, torch.rand(8, 6, 7, 7), [3, 3]))
    weight.requires_grad_()
    torch.library.opcheck(torch.ops.pasnet.conv.default, (x.requires_grad_(), weight))


# ---- the inference form ----------------------------------------------------------------------------------


@pytest.mark.parametrize("style", FUSION_TITLES)
def test_the_fast_form_agrees_with_the_plain_one(style: str) -> None:
    net = trained(style)
    x = clips()
    with torch.inference_mode():
        expected = net(x)
        assert error(optimised(net)(x), expected) < 1e-4
        found = optimised(net, "bf16")(x)
        assert found.dtype == torch.float32
        assert error(found, expected) < 2e-2


@pytest.mark.parametrize(
    "options",
    [
        {"style": "Conv(A,I,F)", "act": "bn_relu", "kernel": 3},
        {"style": "Conv(A,I)", "pose_feature": "pre_relu", "act": "relu"},
        {"style": "I", "i_only": "new_res3a"},
        {"style": "A+pool(I)", "pose_input": "shared"},
        {"style": "E*A", "heatmap_background": True, "heatmap_clamp": "01"},
        {"style": "A+1*1conv", "control_mode": "residual"},
    ],
)
def test_options_of_the_fusion_survive(options: dict[str, Any]) -> None:
    net = trained(**options)
    x = clips()
    with torch.inference_mode():
        assert error(optimised(net)(x), net(x)) < 1e-4


def test_the_source_is_left_alone_and_the_copy_stays_in_eval() -> None:
    net = trained("A+pool(I)+pool(F)").train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    fast = optimised(net).train()
    assert not any(module.training for module in fast.modules())
    x = clips(1, 2, 32)
    y = fast(x)
    assert not y.requires_grad
    assert net.training and all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(fast(x.float()), y)
    with pytest.raises(ValueError, match=r"\(B,K,3,H,W\)"):
        fast(x.transpose(1, 2))


def test_borders_are_those_of_the_plain_form() -> None:
    """Zero padding after the mean and pooling after a bias: where a careless fold would differ is the border."""
    net = trained("A")
    fast = optimised(net)
    assert isinstance(fast, InferencePASNet) and fast.appearance is not None
    frames = clips(1, 3, 64)[0].float() - 110
    with torch.inference_mode():
        found, expected = fast.appearance(frames), net.appearance(frames)
    for edge in (found - expected)[:, :, [0, -1]], (found - expected)[:, :, :, [0, -1]]:
        assert edge.abs().max() < 1e-5 * expected.abs().max()


def test_without_a_compiler_there_is_a_reason_and_the_eager_form(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(UserWarning, match=r"torch.compile does not work here.*: no compiler$"):
        fast = optimised(trained("A"), compiled=True)
    assert isinstance(fast, InferencePASNet)


@pytest.mark.parametrize("style", ["A", "Conv(A,E*A)", "A+pool(I)+pool(F)"])
def test_export(style: str) -> None:
    net, x = trained(style), clips(1, 2, 32)
    with torch.no_grad():
        for form in (net, optimised(net)):
            program = torch.export.export(form, (x,))
            assert error(program.module()(x), form(x)) < 1e-5


# ---- Fourier tiles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [3, 5, 7, 9])
@pytest.mark.parametrize("size", [(28, 28), (14, 14), (32, 27), (5, 40)])
def test_fourier_tiles_are_the_convolution(kernel: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FourierConv2d, "pays", lambda *_: True)
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, kernel, padding=kernel // 2)
    x = torch.randn(3, 6, *size)
    with torch.inference_mode():
        assert error(FourierConv2d(conv)(x), conv(x)) < 1e-5
        assert error(FourierConv2d(conv)(x.to(memory_format=torch.channels_last)), conv(x)) < 1e-5


def test_fourier_tiles_run_in_the_wide_network_and_only_there() -> None:
    def tiles(net: nn.Module) -> int:
        return sum(isinstance(module, FourierConv2d) for module in net.modules())

    wide = trained("A+pool(I)+pool(F)", width=0.5)
    fast = optimised(wide)
    assert tiles(fast) == 5 + 5 * 2 * 4  # the first convolution of both branches is one
    assert tiles(optimised(wide, "bf16")) == tiles(optimised(trained("A+pool(I)"))) == 0
    ran: list[bool] = []
    first = next(module for module in fast.modules() if isinstance(module, FourierConv2d))
    first.register_forward_hook(lambda m, i, o: ran.append(m.pays(len(i[0]), *i[0].shape[2:])))
    x = clips(1, 4, 224)
    with torch.inference_mode():
        assert error(fast(x), wide(x)) < 1e-4
        assert error(fast(x[:, :1]), wide(x[:, :1])) < 1e-4
    assert ran == [True, False]  # one frame has too few tiles


def test_fourier_tiles_refuse_other_convolutions() -> None:
    for options in ({"stride": 2}, {"padding": 0}, {"groups": 2}, {"dilation": 2}):
        with pytest.raises(ValueError, match="tiles"):
            FourierConv2d(nn.Conv2d(4, 4, 7, **{"padding": 3, **options}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="odd square"):
        FourierConv2d(nn.Conv2d(4, 4, (3, 7), padding=(1, 3)))


# ---- checkpoints and memory ------------------------------------------------------------------------------


def gradients(net: PASNet) -> dict[str, Tensor]:
    net.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    nn.functional.cross_entropy(net(clips()), torch.tensor([1, 3])).backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("style", ["A+pool(I)+pool(F)", "Conv(A,E*A)"])
def test_checkpoints_change_memory_and_nothing_else(style: str) -> None:
    net = trained(style).train()
    assert net.pose is not None
    kept, expected = kept_bytes(net, clips()), gradients(net)
    net.pose.checkpoint = True
    assert kept_bytes(net, clips()) < 0.6 * kept
    found = gradients(net)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_frozen_pose_network_keeps_nothing() -> None:
    net = BodyNet(SMALL).requires_grad_(False)
    assert kept_bytes(net, torch.randn(2, 3, 64, 64)) == 0
    net.checkpoint = True
    assert kept_bytes(net, torch.randn(2, 3, 64, 64)) == 0


def test_counting_without_numbers_is_counting_with_them() -> None:
    config = ModelConfig(num_classes=5, width=SMALL, fusion=FusionConfig(style="Conv(A,I,F)"))
    counted = cost(config, 2, 64)
    net = PASNet(config)
    assert net.pose is not None
    assert counted.parameters == sum(p.numel() for p in net.parameters())
    assert counted.activation_bytes == kept_bytes(net, clips(1))
    net.pose.checkpoint = True
    assert counted.checkpointed_bytes == kept_bytes(net, clips(1))
    net.pose.requires_grad_(False)
    assert counted.frozen_bytes == kept_bytes(net, clips(1))


def test_costs_of_the_papers_networks() -> None:
    eco = cost(ModelConfig(num_classes=101, fusion=FusionConfig(style="A")), 8)
    pas = cost(ModelConfig(num_classes=101), 8)
    assert (eco.parameters, pas.parameters) == (37_350_469, 89_661_915)
    assert eco.gmacs == pytest.approx(23.24, rel=1e-3)
    assert pas.gmacs == pytest.approx(426.2, rel=1e-3)
    assert eco.activation_bytes == eco.checkpointed_bytes == eco.frozen_bytes
    assert pas.frozen_bytes - eco.activation_bytes == 8 * 96 * 28 * 28 * 4  # the sum of the maps, which res3a_2 reads
    assert (pas.checkpointed_bytes - pas.frozen_bytes) * 9 < pas.activation_bytes - pas.frozen_bytes


# ---- pasnet list --cost ----------------------------------------------------------------------------------


def test_cost_rows_take_speeds_of_this_hardware_alone(tmp_path: Path) -> None:
    row = {"style": "A", "num_segments": 8, "width": 1.0, "form": "fp32", "clips_per_second": 2.0}
    table = [row, {**row, "clips_per_second": 3.0}, {**row, "form": "reference"}, {"not_run": "why"}]
    for name, speed in (("here", 1), ("there", 2)):
        content = {
            "hardware": name,
            "tables": {"forward": [*table, {**row, "form": "bf16", "clips_per_second": speed}]},
        }
        (tmp_path / f"model-speed-{name}.json").write_text(json.dumps(content), "utf-8")
    speeds = costing.measured_speeds(tmp_path, on="here")
    found = costing.cost_rows(select_rows(["table-1"]), speeds)
    assert found[0]["clips_per_second"] == {"bf16": 1.0, "fp32": 3.0}
    assert found[0]["parameters"] == 37_350_469
    assert all(other["clips_per_second"] == {} for other in found[1:])
    assert "3.00 fp32" in costing.cost_line(found[0]) and "not measured" in costing.cost_line(found[1])
    assert costing.measured_speeds(tmp_path, on="elsewhere") == []


def test_list_prints_costs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "--tables", "table-1", "--cost", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in content["rows"]] == [row.name for row in ROWS if row.table == "table-1"]
    assert cli.main(["list", "--tables", "table-3", "--cost"]) == 0
    assert f"{5 * 89_661_915 / 1e6:.2f} M" in capsys.readouterr().out
    assert cli.main(["list", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(ROWS)


@pytest.mark.parametrize("style", ["A", "A+pool(I)+pool(F)"])
def test_evaluation_takes_the_fast_form_where_it_is_one(style: str) -> None:
    net, x = trained(style), clips()
    fast = for_evaluation(net, "fp32", 100)
    assert fast is not None
    with torch.inference_mode():
        assert error(fast(x), net(x)) < 1e-4
    assert for_evaluation(net, "tf32", 100) is None
    assert for_evaluation(nn.Linear(2, 2), "fp32", 100) is None
