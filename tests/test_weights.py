"""Public checkpoints, made by hand under their real names: read safely, renamed, merged strictly."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_caffe import caffemodel, public_tensors

from pasnet import weights
from pasnet.cli import main
from pasnet.config import DataConfig, FusionConfig, InitConfig, ModelConfig, TrainConfig
from pasnet.models.eco import ECOFull
from pasnet.models.pasnet import PASNet, build
from pasnet.registry import KINDS, REGISTRY, recognise
from pasnet.train import load_initial
from pasnet.weights import WeightsError, convert, inspect, merge, read, read_checkpoint, read_start

WIDTH = 0.125


def model(classes: int = 400) -> PASNet:
    torch.manual_seed(1)
    return build(ModelConfig(num_classes=classes, width=WIDTH, fusion=FusionConfig(style="Conv(A,I)")))


def public_eco(prefix: str = "module.base_model.", head: str = "module.new_fc.") -> dict[str, torch.Tensor]:
    """As ECO-pytorch saves it."""
    torch.manual_seed(2)
    names = {}
    for name, value in model().state_dict().items():
        part, _, rest = name.partition(".")
        value = torch.randn(value.shape) if value.is_floating_point() else value
        if part in ("appearance", "temporal"):
            names[prefix + rest] = value
        elif part == "head":
            names[head + rest] = value
    return names


def public_pose() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    state = model().state_dict()
    return {name.removeprefix("pose."): torch.randn(v.shape) for name, v in state.items() if name.startswith("pose.")}


def save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("container", [True, False])
@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("module.base_model.", "module.new_fc."),
        ("module.base_model.", "module.base_model.fc_final."),
        ("", "fc_final."),
    ],
)
def test_eco_under_every_name(tmp_path: Path, container: bool, prefix: str, head: str) -> None:
    tensors = public_eco(prefix, head)
    assert len(tensors) == 216
    content = (
        {"epoch": 1, "arch": "ECO", "state_dict": tensors, "best_prec1": 0.1, "lr": 0.01} if container else tensors
    )
    read = weights.eco_to_pasnet(read_checkpoint(save(tmp_path / "eco.pth.tar", content), "eco"))
    state = model().state_dict()
    report = merge({k: v for k, v in state.items() if not k.startswith(("pose.", "fusion."))}, read, source="eco")
    assert len(report.loaded) == 216 and report.missing == report.unexpected == report.reshaped == ()
    assert torch.equal(state["temporal.res3a_2.weight"], tensors[f"{prefix}res3a_2.weight"])
    assert torch.equal(state["head.bias"], tensors[f"{head}bias"])


def test_old_files_have_flat_batch_norm_and_no_counters(tmp_path: Path) -> None:
    tensors = {k: v for k, v in public_eco().items() if not k.endswith("num_batches_tracked")}
    wide = {k: v[None] if "_bn." in k else v for k, v in tensors.items()}
    read = weights.eco_to_pasnet(read_checkpoint(save(tmp_path / "old.pth", wide), "eco"))
    state = model().state_dict()
    report = merge({k: v for k, v in state.items() if not k.startswith(("pose.", "fusion."))}, read, source="old")
    assert len(report.loaded) == 216 - 30 and report.missing == ()


def test_pose_under_both_names(tmp_path: Path) -> None:
    tensors = public_pose()
    assert len(tensors) == 184
    split = {("model0." if i % 2 else "model3_2.") + name: value for i, (name, value) in enumerate(tensors.items())}
    for index, content in enumerate((tensors, split)):
        read = weights.pose_to_pasnet(read_checkpoint(save(tmp_path / f"{index}.pth", content), "pose"))
        state = {k: v for k, v in model().state_dict().items() if k.startswith("pose.")}
        assert len(merge(state, read, source="pose").loaded) == 184
        assert torch.equal(state["pose.Mconv7_stage6_L2.bias"], tensors["Mconv7_stage6_L2.bias"])


def test_merge_fails_unless_each_absence_was_allowed() -> None:
    state = {"a.w": torch.zeros(2), "head.w": torch.zeros(3)}
    before = {key: value.clone() for key, value in state.items()}
    cases = [
        ({"a.w": torch.ones(2)}, "missing head.w"),
        ({"a.w": torch.ones(2), "head.w": torch.ones(4)}, r"head.w has shape \(4,\), the model wants \(3,\)"),
        ({"a.w": torch.ones(2), "head.w": torch.ones(3), "b": torch.ones(1)}, "unexpected b"),
    ]
    for incoming, message in cases:
        with pytest.raises(WeightsError, match=message):
            merge(state, incoming, source="file")
    assert all(torch.equal(state[key], before[key]) for key in state), "a refused merge must copy nothing"
    report = merge(state, cases[1][0], source="file", may_miss=["head."])
    assert report.loaded == ("a.w",) and report.reshaped == ("head.w",)
    assert state["a.w"].tolist() == [1, 1] and state["head.w"].tolist() == [0, 0, 0]


class _RunsCode:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch '{self.mark}'",)


def test_what_is_no_checkpoint_says_so(tmp_path: Path) -> None:
    def write(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    one = torch.ones(1)
    page = write("page.pth", b"<!DOCTYPE html><html>Google Drive - Virus scan warning</html>")
    convert([save(tmp_path / "pose.pth", public_pose())], "pose", tmp_path / "pose.safetensors")
    whole = (tmp_path / "pose.safetensors").read_bytes()
    cut = tmp_path / "cut.pth"
    cut.write_bytes(save(tmp_path / "whole.pth", public_pose()).read_bytes()[:5000])
    mark = tmp_path / "was-run"
    harm = {"state_dict": {"conv1_1.bias": one, "x": _RunsCode(mark)}}
    code, zipped = tmp_path / "code.pth", save(tmp_path / "zipped.pth", harm)
    code.write_bytes(pickle.dumps(harm, protocol=2))
    for load in (lambda: pickle.loads(code.read_bytes()), lambda: torch.load(zipped, weights_only=False)):
        load()
        assert mark.exists(), "the pickle must be one that runs code"
        mark.unlink()
    torch.save(public_pose(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    old = write("cut-old.pth", (tmp_path / "old.pth").read_bytes()[:-7])
    dead = save(
        tmp_path / "dead.pth", {"module.base_model.res3a_1.weight": torch.zeros(1), "res3a_2.weight": torch.zeros(1)}
    )
    cases = [
        (page, "eco", "saved web page"),
        (cut, "pose", "not readable as plain tensors.*cut short, download it again"),
        (old, "pose", "not readable as plain tensors.*cut short, download it again"),
        (code, "eco", r"refused, not readable as plain tensors: it wants [\w.]+ to be called"),
        (zipped, "eco", "refused, not readable as plain tensors: it wants (posix|nt).system to be called"),
        (write("new.pth", pickle.dumps(harm, protocol=4)), "eco", "refused, not readable as plain tensors"),
        (dead, "eco", "another network.*kin_ECO_epoch-12; take ECO-Lite, Kinetics-400"),
        (tmp_path / "whole.pth", "eco", "is OpenPose body network, COCO, not ECO-Lite"),
        (write("empty.pth", b""), "eco", "empty; download it again"),
        (write("bom.caffemodel", b"\xef\xbb\xbf\n <HTML>"), "eco", "saved web page"),
        (write("lfs.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "pose", "Git LFS pointer"),
        (write("cut.safetensors", whole[:-1]), "pose", "not a whole safetensors file"),
        (write("head.safetensors", whole[:40]), "pose", "not a whole safetensors file"),
        (save(tmp_path / "ours.pth", {"model": {}, "config": {}, "identity": ""}), "eco", "--parent"),
        (save(tmp_path / "bare.pth", {"state_dict": {}}), "eco", "no state dict"),
        (
            save(tmp_path / "other.pth", {"layer1.weight": torch.ones(1)}),
            "eco",
            r"1 tensors \(layer1.weight\) are none",
        ),
        (
            save(tmp_path / "two.pth", {"new_fc.bias": one, "fc_final.bias": one}),
            "eco",
            "fc_final.bias under two names",
        ),
        (
            save(tmp_path / "nan.pth", {**public_pose(), "conv1_1.bias": one * torch.nan}),
            "pose",
            "NaN or.*conv1_1.bias",
        ),
        (save(tmp_path / "list.pth", [1, 2]), "eco", "no state dict"),
        (tmp_path / "nowhere.pth", "pose", r"no such file; OpenPose body network.*non-commercial.*huggingface"),
    ]
    for path, kind, message in cases:
        with pytest.raises(WeightsError, match=message) as raised:
            read_checkpoint(path, kind)
        assert str(path) in str(raised.value) and "weights_only" not in str(raised.value)
    assert not mark.exists()


def wrapped(tensors: dict[str, torch.Tensor], prefix: str = "module.base_model.") -> dict[str, Any]:
    return {"epoch": 1, "arch": "ECO", "state_dict": {prefix + name: value for name, value in tensors.items()}}


def eco_full() -> ECOFull:
    torch.manual_seed(4)
    return ECOFull(5, width=WIDTH)


def test_the_names_in_the_registry_are_those_of_the_networks() -> None:
    def public(state: dict[str, torch.Tensor], parts: tuple[str, ...]) -> set[str]:
        mine = {name.partition(".")[2]: name for name in state if name.startswith(parts) and "num_batches" not in name}
        return {f"fc_final.{name}" if full.startswith("head.") else name for name, full in mine.items()}

    net = model().state_dict()
    assert public(net, ("appearance.", "temporal.", "head.")) == KINDS["eco"].names
    assert public(net, ("appearance.", "temporal.")) == KINDS["eco-init"].names
    assert public(net, ("appearance.",)) == KINDS["bninception"].names
    assert public(net, ("temporal.",)) == KINDS["c3d"].names
    assert public(net, ("pose.",)) == KINDS["pose"].names
    assert public(eco_full().state_dict(), ("appearance.", "temporal.", "head.")) == KINDS["eco-full"].names
    counters = {kind: sum(name.endswith("running_mean") for name in KINDS[kind].names) for kind in KINDS}
    assert [len(KINDS[kind].names) + counters[kind] for kind in ("eco", "eco-full", "pose")] == [216, 566, 184]
    for kind in ("eco", "eco-init", "eco-full", "bninception", "pose"):
        assert recognise(KINDS[kind].names) == kind
    assert all(source.kind in KINDS and source.where and source.licence for source in REGISTRY.values())
    assert len({source.file for source in REGISTRY.values()}) == len(REGISTRY)
    terms: dict[tuple[str, bool], Any] = {}  # a file is not known by its name: these must follow from what it is
    for source in REGISTRY.values():
        belongs = (source.licence, source.preprocessing)
        assert terms.setdefault((source.kind, source.file.endswith(".caffemodel")), belongs) == belongs


@pytest.mark.parametrize("head", ["fc_final", "new_fc"])
def test_eco_full_loads_whole(tmp_path: Path, head: str) -> None:
    tensors = {}
    for name, value in eco_full().state_dict().items():
        part, _, rest = name.partition(".")
        value = torch.rand(value.shape) if value.is_floating_point() else value
        tensors[f"{head}.{rest}" if part == "head" else rest] = value
    assert len(tensors) == 566
    path = save(tmp_path / "full.pth.tar", wrapped(tensors))
    state = eco_full().state_dict()
    report = merge(state, weights.eco_to_pasnet(read_checkpoint(path, "eco-full")), source="full")
    assert len(report.loaded) == 566 and report.missing == report.unexpected == report.reshaped == ()
    assert torch.equal(state["appearance.inception_5b_1x1.weight"], tensors["inception_5b_1x1.weight"])
    with pytest.raises(WeightsError, match="is ECO-Full, not ECO-Lite"):
        read_checkpoint(path, "eco")
    with pytest.raises(WeightsError, match="is ECO-Full, which PAS-Net does not start from"):
        read_start(path)


def test_the_real_shapes_are_counted_as_published(tmp_path: Path) -> None:
    with torch.device("meta"):
        net = PASNet(ModelConfig(num_classes=400, fusion=FusionConfig(style="Conv(A,I)")))
    shapes = {name: value.shape for name, value in net.state_dict().items()}
    cases = {"eco": ("37,503,856", ("appearance.", "temporal.", "head.")), "pose": ("52,311,446", ("pose.",))}
    for kind, (parameters, parts) in cases.items():
        # one value in each tensor's storage, seen as many: files of a few kB
        tensors = {
            ("new_fc." if name.startswith("head.") else "") + name.partition(".")[2]: torch.zeros(()).expand(shape)
            for name, shape in shapes.items()
            if name.startswith(parts)
        }
        found = inspect(save(tmp_path / f"{kind}.pth", wrapped(tensors)))
        assert found.problems == () and f"parameters     {parameters}" in found.lines


# Initial weights


def initial_2d(path: Path) -> Path:
    """As SSN's file: bare names, [1, C] vectors, no counters, all of BN-Inception and a head."""
    torch.manual_seed(5)
    state = model().appearance.state_dict()
    tensors = {name: torch.rand(value.shape) for name, value in state.items() if "num_batches" not in name}
    tensors = {name: value[None] if "_bn." in name else value for name, value in tensors.items()}
    rest = ("inception_3c_3x3.weight", "inception_4a_1x1_bn.bias", "inception_5b_pool_proj.bias", "fc.weight")
    return save(path, wrapped(tensors | {name: torch.rand(1, 4) for name in rest}, ""))


def initial_3d(path: Path) -> Path:
    """As C3DResNet18: the front of a 3D ResNet, and a res3a_2 that reads 128 channels (here 16) instead of 96 (12)."""
    torch.manual_seed(6)
    state = model().temporal.state_dict()
    tensors = {name: torch.rand(v.shape) if v.is_floating_point() else v for name, v in state.items()}
    tensors["res3a_2.weight"] = torch.rand(16, 16, 3, 3, 3)
    rest = ("conv1.weight", "conv1_bn.bias", "res2a_1.weight", "res2b_bn.bias", "res3a_1.weight", "res3a_1_bn.bias")
    rest += ("res3a_down.weight", "new_fc.weight", "new_fc.bias")
    return save(path, wrapped(tensors | {name: torch.rand(1) for name in rest}))


def ours(net: PASNet) -> dict[str, torch.Tensor]:
    state = net.state_dict()
    return {name: value for name, value in state.items() if name.startswith(("appearance.", "temporal.", "head."))}


def test_initial_weights_fill_their_half_and_nothing_else(tmp_path: Path) -> None:
    files = {"appearance.": initial_2d(tmp_path / "2d.pth"), "temporal.": initial_3d(tmp_path / "3d.pth.tar")}
    others = {"appearance.": ("temporal.", "head."), "temporal.": ("appearance.", "head.")}
    for part, path in files.items():
        start = read_start(path)
        assert start.may_miss == others[part] and all(name.startswith(part) for name in start.tensors)
        before, state = ours(model()), ours(model())
        with pytest.raises(WeightsError, match="missing"):
            merge(state, start.tensors, source="half", may_miss=start.may_miss[1:])
        report = merge(state, start.tensors, source="half", may_miss=start.may_miss)
        for name in (name for name in state if "num_batches" not in name):
            assert (name in start.tensors) == name.startswith(part)
            assert torch.equal(state[name], start.tensors[name] if name.startswith(part) else before[name])
        assert set(report.missing) == {n for n in state if not n.startswith(part) and "num_batches" not in n}
        assert "missing: " in report.details() and "head.weight" in report.details()
    three_quarters = torch.load(files["temporal."], weights_only=True)["state_dict"]["module.base_model.res3a_2.weight"]
    assert torch.equal(read_start(files["temporal."]).tensors["temporal.res3a_2.weight"], three_quarters[:, :12])


def test_initial_weights_that_lack_a_tensor_are_refused(tmp_path: Path) -> None:
    for path, name in ((initial_2d(tmp_path / "a"), "conv2_3x3.bias"), (initial_3d(tmp_path / "b"), "res5b_2.bias")):
        content = torch.load(path, weights_only=True)
        content["state_dict"] = {k: v for k, v in content["state_dict"].items() if not k.endswith(name)}
        save(path, content)
        assert inspect(path).problems == (f"missing {name}",)
        with pytest.raises(WeightsError, match=f"not all of .*: missing {name}"):
            read_start(path)
        content["state_dict"][f"module.base_model.{name}"] = torch.ones(1)
        content["state_dict"]["inception_9.bias"] = torch.ones(1)
        assert inspect(save(path, content)).problems == ("unexpected inception_9.bias",)


def test_both_halves_make_one_file_to_start_from(tmp_path: Path) -> None:
    two, three, out = initial_2d(tmp_path / "2d"), initial_3d(tmp_path / "3d"), tmp_path / "init.safetensors"
    origin = convert([three, two], "eco-init", out)
    assert origin.source == ("3d", "2d") and origin.source_sha256 == (weights.sha256_of(three), weights.sha256_of(two))
    start = read_start(out)
    expected = read_start(two).tensors | read_start(three).tensors
    assert start.may_miss == ("head.",) and start.tensors.keys() == expected.keys()
    assert all(torch.equal(start.tensors[name], expected[name]) for name in expected)
    state = ours(model())
    assert merge(state, start.tensors, source="init", may_miss=start.may_miss).missing == ("head.weight", "head.bias")
    with pytest.raises(WeightsError, match="wants a bninception and a c3d file"):
        convert([two], "eco-init", out)


@pytest.mark.parametrize("classes", [400, 7])
def test_a_training_starts_from_caffe_and_says_what_it_left(tmp_path: Path, classes: int) -> None:
    tensors = {name: value for name, value in public_eco("", "fc_final.").items() if "num_batches" not in name}
    path = tmp_path / "ECO_Lite_kinetics.caffemodel"
    path.write_bytes(caffemodel(tensors))
    config = TrainConfig(
        model=ModelConfig(num_classes=classes, width=WIDTH, fusion=FusionConfig(style="A")),
        data=DataConfig(shards="none"),
        init=InitConfig(eco=str(path)),
    )
    net = build(config.model)
    report = load_initial(net, config, None)  # type: ignore[arg-type]  # shards are asked for --parent only
    assert torch.equal(net.temporal.res3a_2.weight, tensors["res3a_2.weight"])
    assert torch.equal(net.head.bias, tensors["fc_final.bias"]) == (classes == 400)
    assert ("of another shape: head.weight, head.bias" in report) == (classes != 400)
    assert "minus (104, 117, 123); --set model.appearance_mean=104,117,123" in report
    same = dataclasses.replace(config.model, appearance_mean=(104.0, 117.0, 123.0))
    assert "--set" not in load_initial(net, dataclasses.replace(config, model=same), None)  # type: ignore[arg-type]


# Conversion


def test_a_conversion_keeps_every_value_and_where_it_comes_from(tmp_path: Path) -> None:
    source = save(tmp_path / "ECO_Lite_rgb_model_Kinetics.pth.tar", wrapped(public_eco("", "new_fc.")))
    out = tmp_path / "new" / "eco.safetensors"
    origin = convert([source], "eco", out)
    found = read(out)
    expected = read(source).tensors
    assert found.kind == "eco" and found.origin == origin and found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[name], expected[name]) for name in expected)
    assert origin.source == (source.name,) and origin.source_sha256 == (weights.sha256_of(source),)
    assert origin.licence == REGISTRY["eco-lite-kinetics"].licence
    assert found.preprocessing == REGISTRY["eco-lite-kinetics"].preprocessing
    assert str(tmp_path) not in out.read_bytes().decode("latin-1")
    assert oct(out.stat().st_mode & 0o777) == "0o644" and [path.name for path in out.parent.iterdir()] == [out.name]
    for again in range(3):  # safetensors' own order of metadata is random
        convert([source], "eco", tmp_path / f"{again}.safetensors")
        assert (tmp_path / f"{again}.safetensors").read_bytes() == out.read_bytes()
    assert convert([out], "eco", tmp_path / "twice.safetensors") == origin  # of the first file, not of the second


def test_a_conversion_refuses_what_is_not_whole_or_not_asked_for(tmp_path: Path) -> None:
    tensors = public_pose()
    source = save(tmp_path / "pose.pth", tensors)
    short = save(tmp_path / "short.pth", {k: v for k, v in tensors.items() if k != "conv4_2.bias"})
    out = tmp_path / "out.safetensors"
    cases: list[tuple[list[Path], str, Path, str]] = [
        ([short], "pose", out, "short.pth: not all of OpenPose.*: missing conv4_2.bias"),
        ([source], "eco", out, "pose.pth .pose.: --kind eco wants one file of that kind, ECO-Lite"),
        ([source], "posse", out, "no such kind; one of eco,"),
        ([source], "pose", tmp_path / "out.pth", "end the name in .safetensors"),
        ([source, source], "pose", out, "wants one file"),
    ]
    for inputs, kind, to, message in cases:
        with pytest.raises(WeightsError, match=message):
            convert(inputs, kind, to)
    convert([source], "pose", out)
    with pytest.raises(WeightsError, match="is the input"):
        convert([out], "pose", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "pose.pth", "short.pth"]


def test_a_changed_conversion_does_not_pass_for_one(tmp_path: Path) -> None:
    out = tmp_path / "pose.safetensors"
    convert([save(tmp_path / "pose.pth", public_pose())], "pose", out)
    content = bytearray(out.read_bytes())
    content[-1] ^= 1
    out.write_bytes(content)
    with pytest.raises(WeightsError, match="its tensors are not those that were converted"):
        read(out)
    tensors = {name: value.contiguous() for name, value in public_pose().items()}
    for record in (
        "no json",
        "{}",
        "[]",
        json.dumps({"preprocessing": {"colour": 1}, "source": [], "source_sha256": []}),
    ):
        save_file(tensors, out, {"pasnet": record})
        with pytest.raises(WeightsError, match="record of where it comes from is damaged"):
            read(out)
    save_file(tensors, out)  # anybody's safetensors file under the public names will do
    assert read(out).kind == "pose" and read(out).origin is None


# What a file is


def test_published_files_are_known_by_their_sum_also_when_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, caffe = save(tmp_path / "pose.pth", public_pose()), tmp_path / "pose.caffemodel"
    caffe.write_bytes(caffemodel(public_tensors("pose")))
    for path in (source, caffe):
        assert not weights.is_published(path, "pose")
        assert "NOT the published OpenPose" in weights.authenticity(path, "pose")
    convert([source], "pose", tmp_path / "a.safetensors")
    assert not weights.is_published(tmp_path / "a.safetensors", "pose")
    known = dataclasses.replace(REGISTRY["pose"], sha256=weights.sha256_of(source))
    monkeypatch.setitem(REGISTRY, "pose", known)
    import hashlib

    md5 = hashlib.md5(caffe.read_bytes()).hexdigest()
    monkeypatch.setitem(REGISTRY, "pose-caffe", dataclasses.replace(REGISTRY["pose-caffe"], md5=md5))
    for path in (source, caffe, tmp_path / "a.safetensors"):
        assert weights.is_published(path, "pose"), path
        assert ": the published OpenPose" in weights.authenticity(path, "pose")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert json.loads(file.metadata()["pasnet"])["source_sha256"] == [known.sha256]
    eco = save(tmp_path / "eco.pth", wrapped(public_eco("", "new_fc.")))
    assert "is not known to us" in weights.authenticity(eco, "eco")


def test_inspect_prints_what_a_file_is_and_fails_where_it_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = public_eco("", "new_fc.")
    whole = save(tmp_path / "eco.pth", wrapped(tensors))
    assert main(["weights", "inspect", str(whole)]) == 0
    said = capsys.readouterr().out
    for part in ("ECO-Lite (kind eco), a torch file", "216, 30 of them", "classes        400", "float32, int64"):
        assert part in said
    assert weights.sha256_of(whole) in said and "BGR 0..255, minus (104, 117, 128)" in said and "research use" in said
    out = tmp_path / "eco.safetensors"
    assert main(["weights", "convert", str(whole), "--kind", "eco", "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["weights", "inspect", str(out)]) == 0
    assert f"converted from eco.pth (sha256 {weights.sha256_of(whole)})" in capsys.readouterr().out
    short = save(tmp_path / "short.pth", wrapped({k: v for k, v in tensors.items() if k != "res4b_2.bias"}))
    assert main(["weights", "inspect", str(short)]) == 2
    said = capsys.readouterr()
    assert "ECO-Lite (kind eco)" in said.out and "cannot be used: missing res4b_2.bias" in said.err
    (tmp_path / "page.pth").write_text("<!DOCTYPE html>")
    assert main(["weights", "inspect", str(tmp_path / "page.pth")]) == 2
    assert "saved web page" in capsys.readouterr().err


def test_the_command_line_waits_for_torch_only_where_it_is_needed() -> None:
    code = (
        "import sys; from pasnet.cli import main, _parser; _parser(); main(['weights', 'fetch']); "
        "assert not {'torch', 'numpy', 'shards', 'safetensors'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "body_pose_model.pth" in done.stdout, done.stderr


def test_merge_leaves_out_only_what_may_be_ignored() -> None:
    state = {"a": torch.zeros(1)}
    incoming = {"a": torch.ones(1), "rest.b": torch.ones(1), "other": torch.ones(1)}
    with pytest.raises(WeightsError, match=r"file does not fit the model: unexpected other$"):
        merge(state, incoming, source="file", may_ignore=["rest."])
    report = merge(state, incoming, source="file", may_ignore=["rest.", "other"])
    assert report.unexpected == ("rest.b", "other") and "unexpected: rest.b, other" in report.details()
