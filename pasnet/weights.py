"""State dicts in, state dicts out: reads public checkpoints safely, renames their keys, and merges strictly.

Never imports the models. ECO-pytorch drops every tensor whose name or shape differs and goes on with random values
there, which is behind many reports of low accuracy; here a merge fails unless each absent key was allowed by name.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

StateDict = dict[str, Tensor]


class WeightsError(ValueError):
    """A checkpoint that cannot be used; the message names the file, the reason and the fix."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A public checkpoint: where it comes from and how to know that it is the right file."""

    title: str
    where: tuple[str, ...]
    licence: str
    sha256: str = ""  # empty: not known


REGISTRY: dict[str, Source] = {
    "eco": Source(
        title="ECO-Lite, Kinetics-400 (ECO_Lite_rgb_model_Kinetics.pth.tar)",
        where=("Google Drive 1XNIq7byciKgrn011jLBggd2g79jKX4uD", "pan.baidu.com/s/1Hx52akJLR_ISfX406bkIog"),
        licence="BSD-2 (ECO-pytorch); research use",
    ),
    "pose": Source(
        title="OpenPose body network, COCO (body_pose_model.pth)",
        where=(
            "https://huggingface.co/lllyasviel/Annotators/resolve/main/body_pose_model.pth",
            "https://huggingface.co/lllyasviel/ControlNet/resolve/main/annotator/ckpts/body_pose_model.pth",
        ),
        licence="academic, non-commercial (OpenPose)",
        sha256="25a948c16078b0f08e236bda51a385d855ef4c153598947c28c0d47ed94bb746",
    ),
}


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What a merge did with every key of the model and of the checkpoint."""

    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]  # in the model, not in the checkpoint: left as they were
    unexpected: tuple[str, ...]  # in the checkpoint, not in the model: not used
    reshaped: tuple[str, ...]  # in both with different shapes: left as they were

    def summary(self) -> str:
        """One line for people."""
        left = len(self.missing) + len(self.reshaped)
        return (
            f"{self.source}: {len(self.loaded)} tensors loaded, {left} left as they were, {len(self.unexpected)} unused"
        )


def sha256_of(path: Path) -> str:
    """Hex digest of a file; computed once for as long as its size and time stay the same."""
    state = Path(path).stat()
    return _sha256_of(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _sha256_of(path: Path, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checkpoint(path: Path, kind: str) -> StateDict:
    """The tensors of a public checkpoint ("eco" or "pose"), under this project's names: ECO's and Caffe's own.

    Accepts a bare state dict or a container with `state_dict`; `module.`, `base_model.` and `modelX_Y.` prefixes;
    either name of ECO's head, returned as `fc_final.*`; batch norm vectors stored as [1, C]. Nothing in the file is
    executed. Raises WeightsError for what is no such checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        source = REGISTRY[kind]
        where = " or ".join(source.where)
        raise WeightsError(f"{path}: no such file; {source.title} ({source.licence}) is to be had from {where}")
    with open(path, "rb") as file:
        head = file.read(512).lstrip().lower()
    if head.startswith((b"<!doctype", b"<html")):
        raise WeightsError(f"{path}: a saved web page, not a checkpoint; the download asked for a confirmation")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds; all mean that the file is not plain tensors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"{path}: not readable as plain tensors ({reason}); if it is cut short, download it again. A .pth.tar is a "
            f"torch file, do not unpack it"
        ) from error
    tensors = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise WeightsError(f"{path}: holds no state dict")
    renamed = {_public_name(name): value for name, value in tensors.items()}
    if kind == "eco" and "res3a_1.weight" in renamed:
        raise WeightsError(
            f"{path}: another network (3D convolutions without bias, with res3a_1), such as kin_ECO_epoch-12; "
            f"take {REGISTRY['eco'].title}"
        )
    marker = {"eco": "res3a_2.weight", "pose": "Mconv7_stage6_L2.weight"}[kind]
    if marker not in renamed:
        raise WeightsError(f"{path}: no {marker} in it, so it is not {REGISTRY[kind].title}")
    return {
        name: value.squeeze(0) if value.ndim == 2 and value.shape[0] == 1 and "_bn." in name else value
        for name, value in renamed.items()
    }


def _public_name(name: str) -> str:
    name = re.sub(r"^(module\.)?(base_model\.)?", "", name)
    name = re.sub(r"^model\d(_\d)?\.", "", name)
    return re.sub(r"^new_fc\.", "fc_final.", name)


def is_published(path: Path, kind: str) -> bool:
    """Whether a file has the digest of the published one."""
    return sha256_of(path) == REGISTRY[kind].sha256


def authenticity(path: Path, kind: str) -> str:
    """One line: whether a file is the published one, as far as its digest is known."""
    source = REGISTRY[kind]
    if not source.sha256:
        return f"{path}: the digest of {source.title} is not known to us"
    if is_published(path, kind):
        return f"{path}: the published {source.title}"
    return f"{path}: NOT the published {source.title} (its sha256 differs); tensors fit, the values are your own matter"


def eco_to_pasnet(tensors: StateDict) -> StateDict:
    """ECO-Lite's public names -> PAS-Net's: 2D layers under `appearance.`, 3D under `temporal.`, head as `head.`"""

    def place(name: str) -> str:
        if name.startswith("fc_final."):
            return name.replace("fc_final.", "head.")
        return f"temporal.{name}" if name.startswith("res") else f"appearance.{name}"

    return {place(name): value for name, value in tensors.items()}


def pose_to_pasnet(tensors: StateDict) -> StateDict:
    """OpenPose's public names -> PAS-Net's: all of it under `pose.`"""
    return {f"pose.{name}": value for name, value in tensors.items()}


def merge(model: StateDict, incoming: StateDict, *, source: str, may_miss: Iterable[str] = ()) -> LoadReport:
    """Copies `incoming` into the tensors of `model`, in place, and reports on every key.

    `may_miss` names prefixes of model keys that the checkpoint need not have, or may have in another shape; batch
    norm's counters (`num_batches_tracked`, absent in files older than torch 0.4.1) never count. Raises WeightsError,
    before anything is copied, for any other key that is missing, unexpected or of another shape.
    """
    allowed = tuple(may_miss)
    loaded = [key for key in model if key in incoming and model[key].shape == incoming[key].shape]
    reshaped = [key for key in model if key in incoming and model[key].shape != incoming[key].shape]
    missing = [key for key in model if key not in incoming and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in incoming if key not in model]
    faults = [f"missing {key}" for key in missing if not key.startswith(allowed)]
    faults += [f"unexpected {key}" for key in unexpected]
    faults += [
        f"{key} has shape {tuple(incoming[key].shape)}, the model wants {tuple(model[key].shape)}"
        for key in reshaped
        if not key.startswith(allowed)
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise WeightsError(f"{source} does not fit the model: {'; '.join(faults[:5])}{more}")
    with torch.no_grad():
        for key in loaded:
            model[key].copy_(incoming[key])
    return LoadReport(
        source=source,
        loaded=tuple(loaded),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        reshaped=tuple(reshaped),
    )
