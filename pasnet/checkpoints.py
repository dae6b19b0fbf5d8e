"""Checkpoints of ours: what a training starts from, what it leaves behind, and the identity that ties them together.

A checkpoint holds the network, the optimiser, the history, the data it was trained on and, within an epoch, how far
the epoch has come. Files are read with weights_only: nothing in them is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pasnet import weights
from pasnet.config import ConfigError, TrainConfig, digest, flatten, from_dict, to_dict
from pasnet.data import ShardSet, rows_of
from pasnet.models.pasnet import PASNet, build

# Part of every run's identity, in the place of a version of the code, which would train all of a study again for a
# changed comment. Raise it when a change to networks, data or training changes what comes out, so that finished runs
# are not taken for new ones; tests/test_golden.py fails for a change that forgets to.
NUMERICS = 3
SIXTEEN_BITS = 2  # the same for trainings in bf16 and fp16 alone; in bf16 on a CPU, gradients were wrong before 2
FREE = ("data.shards", "data.workers", "checkpoint_minutes", "optim.checkpoint_pose")  # of which it is no part
# Datasets that have videos in common: an official one with itself, packed twice, and J-HMDB with what it is part of.
SHARED_VIDEOS = ({"ucf101"}, {"hmdb51", "jhmdb"})


def run_digest(config: TrainConfig, shard_digest: str, parent_digest: str) -> str:
    """The identity of a training: everything in its config that decides its result, and nothing that does not (paths,
    workers, how often it is saved). The machine is no part of it, nor how many processes share the work, although
    batch norm and dropout know that: both are on record."""
    values = to_dict(config)
    values["data"] |= {"shards": shard_digest, "workers": None}
    if config.data.sampling == "segment":  # so that runs of before there was a choice keep their names
        del values["data"]["sampling"]
    values["init"] |= {"parent": parent_digest, "pretrained": identity_of(config.init.pretrained)}
    for name in ("eco", "pose"):
        values["init"][name] = _content_of(values["init"][name])
    del values["checkpoint_minutes"]
    del values["optim"]["checkpoint_pose"]  # memory, not numbers
    return digest([NUMERICS, values, *([SIXTEEN_BITS] if config.precision in ("bf16", "fp16") else [])])


def identity_of(parent: str) -> str:
    """The identity that a checkpoint of ours holds; what is no file (yet) stands for itself. Not its sha256: the file
    holds timings too. Raises WeightsError for what is no checkpoint of ours."""
    return str(_read(Path(parent))["identity"]) if Path(parent).is_file() else parent


def _content_of(path: str) -> str:
    """The sha256 of a weights file; the path itself where there is no file (whoever reads it complains)."""
    return weights.sha256_of(Path(path)) if Path(path).is_file() else path


def load_initial(model: PASNet, config: TrainConfig, shards: ShardSet) -> str:
    """Fills a fresh model from `config.init`; returns a report, one line per part. What has no source stays random."""
    state, lines = model.state_dict(), []
    pose = {key: value for key, value in state.items() if key.startswith("pose.")}
    # the one layer that the "I only" option makes anew (A8)
    remade = (
        ["temporal.res3a_2."] if config.model.fusion.i_only == "new_res3a" and config.model.fusion.style == "I" else []
    )
    if config.init.parent:
        checkpoint = read_own_checkpoint(Path(config.init.parent), config, shards)
        lines += _compared(Path(config.init.parent), checkpoint, config, shards)
        parent = checkpoint["model"]
        new = ["pose.", "fusion."] if not any(key.startswith("pose.") for key in parent) else ["fusion."]
        lines.append(weights.merge(state, parent, source=config.init.parent, may_miss=[*new, *remade]).summary())
        if any(key.startswith("pose.") for key in parent):
            pose = {}  # a PAS-Net went on from a PAS-Net
            if config.init.pose:
                raise ConfigError(f"{config.init.parent} holds a pose network; leave init.pose empty")
    elif config.init.pretrained:
        pretrained = read_pretrained(Path(config.init.pretrained), shards, config.data.split)
        kept = {key: value for key, value in pretrained.items() if not key.startswith("head.")}
        has_pose = any(key.startswith("pose.") for key in kept)
        new = ["head.", *([] if has_pose else ["pose."]), *([] if has_pose else ["fusion."]), *remade]
        lines.append(weights.merge(state, kept, source=config.init.pretrained, may_miss=new).summary())
        if has_pose:
            pose = {}
            if config.init.pose:
                raise ConfigError(f"{config.init.pretrained} holds a pose network; leave init.pose empty")
    elif config.init.eco:
        start = weights.read_start(Path(config.init.eco))
        ours = {key: value for key, value in state.items() if key.startswith(("appearance.", "temporal.", "head."))}
        head = start.tensors.get("head.weight")
        # a head of other classes, such as Kinetics' 400, is trained anew
        other = ["head."] if head is not None and len(head) != config.model.num_classes else []
        if head is not None and not other:
            lines.append(
                f"{config.init.eco}: its head, of {len(head)} classes, is kept. If it was finetuned on this set: in "
                "which order are its classes, and was its split this one? Other splits train on this one's test videos"
            )
        may_miss = [*start.may_miss, *other, *remade]
        lines.append(weights.merge(ours, start.tensors, source=config.init.eco, may_miss=may_miss).details())
        frames = start.checkpoint.preprocessing
        if frames and frames.subtract != config.model.appearance_mean:
            mean = ",".join(f"{value:g}" for value in frames.subtract)
            lines.append(
                f"{config.init.eco}: was trained on {frames}; --set model.appearance_mean={mean} does the same"
            )
    else:
        lines.append("appearance, temporal, head: random start")
    if pose and config.init.pose:
        tensors = weights.pose_to_pasnet(weights.read_checkpoint(Path(config.init.pose), "pose"))
        lines.append(weights.merge(pose, tensors, source=config.init.pose).summary())
        lines.append(weights.authenticity(Path(config.init.pose), "pose"))
    elif pose:
        lines.append("pose: random start")
    return "\n".join(lines)


def _compared(path: Path, checkpoint: dict[str, Any], config: TrainConfig, shards: ShardSet) -> list[str]:
    """In what a parent's own input differs from what it will get now, a line each. Raises WeightsError where it has
    learnt from clips that this run keeps apart to choose by."""
    theirs: TrainConfig = from_dict(TrainConfig, checkpoint["config"])
    ours, known = (set(rows_of(shards, each.data, "held_out").tolist()) for each in (config, theirs))
    if not ours <= known:
        raise weights.WeightsError(
            f"{path}: was trained with data.held_out={theirs.data.held_out:g}, and so on clips that this run holds out "
            f"({config.data.held_out:g}) to choose by; train it with as much held out"
        )
    pairs = {
        "model.appearance_mean": (theirs.model.appearance_mean, config.model.appearance_mean),
        "model.pose_input": (theirs.model.pose_input, config.model.pose_input),
        "data.input_size": (theirs.data.input_size, config.data.input_size),
        "data.num_segments": (theirs.data.num_segments, config.data.num_segments),
        "data.sampling": (theirs.data.sampling, config.data.sampling),
    }
    if not theirs.model.needs_pose:
        del pairs["model.pose_input"]
    return [f"{path}: was trained with {name} {a}, this run has {b}" for name, (a, b) in pairs.items() if a != b]


def read_own_checkpoint(
    path: Path, config: TrainConfig | None, shards: ShardSet, *, finished: bool = True
) -> dict[str, Any]:
    """A last.pt of ours. Raises WeightsError when it was trained on other data or another split: the test videos of
    one split are training videos of another, and accuracies near 100 % have been published that way. And, unless
    `finished` is False, when its training has not come to its end."""
    checkpoint = _read(path)
    if finished:
        _check_finished(path, checkpoint)
    trained_on = checkpoint["data"]
    split = config.data.split if config is not None else trained_on["split"]
    wanted = {"dataset": shards.manifest["dataset"], "split": split}
    for name, value in wanted.items():
        if trained_on[name] != value:
            raise weights.WeightsError(f"{path}: was trained on {name} {trained_on[name]}, this run is on {value}")
    if trained_on["digest"] != shards.digest:
        raise weights.WeightsError(
            f"{path}: was trained on other shards of {wanted['dataset']} (digest {trained_on['digest'][:12]}) than "
            f"those in {shards.folder} ({shards.digest[:12]}): other videos, or packed with other settings; give "
            "those, or train on these"
        )
    return checkpoint


def model_of(checkpoint: dict[str, Any]) -> tuple[PASNet, TrainConfig]:
    """The network of a checkpoint, with its weights, and the config that trained it."""
    config: TrainConfig = from_dict(TrainConfig, checkpoint["config"])
    model = build(config.model)
    model.load_state_dict(checkpoint["model"])
    return model, config


def resume(path: Path, config: TrainConfig, shards: ShardSet, identity: str) -> dict[str, Any] | None:
    """The checkpoint to go on from, None where there is none. Raises ConfigError when it is another run's."""
    if not path.is_file():
        return None
    checkpoint = read_own_checkpoint(path, config, shards, finished=False)
    if checkpoint["identity"] != identity:
        theirs, ours = flatten(checkpoint["config"]), flatten(json.loads(json.dumps(to_dict(config))))
        names = [name for name in ours if name not in FREE and theirs.get(name) != ours[name]]
        differ = [f"{name} {theirs.get(name)}, now {ours[name]}" for name in names]
        other = checkpoint.get("numerics", 2) != NUMERICS  # those of before it was written down
        why = "another version of the training" if other else "; ".join(differ[:5]) or "other weights to start from"
        raise ConfigError(f"{path}: is a run with other settings ({why}); give another folder")
    return checkpoint


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise weights.WeightsError(f"{path}: no such checkpoint; train it first")
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["data"]["digest"], checkpoint["model"], checkpoint["identity"], checkpoint["history"]
        checkpoint["config"]["optim"]["epochs"], checkpoint["within"]
    except Exception as error:
        raise weights.WeightsError(
            f"{path}: not a checkpoint of pasnet train ({type(error).__name__}: {error})"
        ) from error
    return checkpoint


def _check_finished(path: Path, checkpoint: dict[str, Any]) -> None:
    done, epochs = len(checkpoint["history"]), checkpoint["config"]["optim"]["epochs"]
    if done < epochs or checkpoint["within"]:
        raise weights.WeightsError(f"{path}: has trained {done} of {epochs} epochs; start that training again first")


def read_pretrained(path: Path, shards: ShardSet, split: int) -> weights.StateDict:
    """The weights of a checkpoint of ours from another dataset (D0). Raises WeightsError when it is this one, packed
    otherwise perhaps: when an official set has videos in common with it, or, of one name, training videos of its are
    test videos here (by class and name)."""
    checkpoint = _read(path)
    _check_finished(path, checkpoint)
    theirs, ours = checkpoint["data"]["dataset"], shards.manifest["dataset"]
    if checkpoint["data"]["digest"] == shards.digest:
        raise weights.WeightsError(f"{path}: was trained on this very dataset; give it as init.parent")
    # packed anew it has another digest, and another split's training list holds this one's test videos
    if any({theirs, ours} <= shared for shared in SHARED_VIDEOS):
        raise weights.WeightsError(
            f"{path}: was trained on {theirs}, whose training videos include some of {ours}'s test videos in one split "
            "or another; D0 must be another set"
        )
    if theirs == ours and (known := checkpoint["data"].get("train_videos")) is not None:
        test = shards.select(split, "test")
        seen = np.isin(_names([shards.keys[row] for row in test]), known.numpy())
        if seen.any():
            raise weights.WeightsError(
                f"{path}: was trained on {theirs}, too, and on {seen.sum()} of the {len(test)} test videos of split "
                f"{split} here, such as {shards.keys[test[seen.argmax()]]}; if it is another set, pack it under "
                "another name (--dataset)"
            )
    tensors: weights.StateDict = checkpoint["model"]
    return tensors


def _names(keys: Sequence[str]) -> npt.NDArray[np.int64]:
    """A number for each video's class and name."""
    digests = [hashlib.sha256(key.encode()).digest()[:8] for key in keys]
    return np.array([int.from_bytes(each, "little", signed=True) for each in digests], np.int64)


def save(
    path: Path,
    config: TrainConfig,
    shards: ShardSet,
    identity: str,
    *,
    model: dict[str, Any],
    optimizer: dict[str, Any],
    scaler: dict[str, Any],
    history: list[dict[str, Any]],
    within: dict[str, Any] | None,
) -> None:
    """Writes a checkpoint so that a crash at any moment leaves the old one or the new one. `within` is the state of an
    epoch that is not over."""
    checkpoint = {
        "identity": identity,
        "numerics": NUMERICS,
        "config": json.loads(json.dumps(to_dict(config))),  # plain lists, which weights_only loading admits
        "model": model,
        "optimizer": optimizer,
        "scaler": scaler,
        "history": history,
        "within": within,
        "data": {
            "dataset": shards.manifest["dataset"],
            "digest": shards.digest,
            "split": config.data.split,
            "class_names": list(shards.class_names),
            "train_videos": torch.from_numpy(
                _names([shards.keys[row] for row in rows_of(shards, config.data, "train")])
            ),
        },
    }
    scratch = path.with_suffix(".tmp")
    with open(scratch, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())  # a rename may reach the disk before the content does
    os.replace(scratch, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # and the new name only with the folder
    finally:
        os.close(folder)
