"""Public checkpoints, made by hand under their real names: read safely, renamed, merged strictly."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from pasnet import weights
from pasnet.config import FusionConfig, ModelConfig
from pasnet.models.pasnet import PASNet, build
from pasnet.weights import WeightsError, merge, read_checkpoint

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
    page = tmp_path / "page.pth"
    page.write_text("<!DOCTYPE html><html>Google Drive - Virus scan warning</html>")
    cut = tmp_path / "cut.pth"
    cut.write_bytes(save(tmp_path / "whole.pth", public_pose()).read_bytes()[:5000])
    code = tmp_path / "code.pth"
    mark = tmp_path / "was-run"
    code.write_bytes(pickle.dumps({"state_dict": _RunsCode(mark)}))
    pickle.loads(code.read_bytes())
    assert mark.exists(), "the pickle must be one that runs code"
    mark.unlink()
    dead = save(
        tmp_path / "dead.pth", {"module.base_model.res3a_1.weight": torch.zeros(1), "res3a_2.weight": torch.zeros(1)}
    )
    cases = [
        (page, "eco", "saved web page"),
        (cut, "pose", "not readable as plain tensors"),
        (code, "eco", "not readable as plain tensors"),
        (dead, "eco", "another network"),
        (tmp_path / "whole.pth", "eco", "no res3a_2.weight"),
        (save(tmp_path / "list.pth", [1, 2]), "eco", "no state dict"),
        (tmp_path / "nowhere.pth", "pose", r"no such file; OpenPose body network.*non-commercial.*huggingface"),
    ]
    for path, kind, message in cases:
        with pytest.raises(WeightsError, match=message) as raised:
            read_checkpoint(path, kind)
        assert str(path) in str(raised.value)
    assert not mark.exists()
