"""One training: ECO (fusion "A") or PAS-Net, from a random start, public weights, or a checkpoint of ours.

The loop is in `train`, on one screen. A run folder holds config.json, load_report.txt, history.json (one entry per
epoch), last.pt (rewritten after each epoch) and, when the last epoch is done, done.json. Started again, a run goes on
from last.pt; on a CPU the result is the same, bit for bit, as without the interruption.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pasnet import weights
from pasnet.config import ConfigError, OptimConfig, TrainConfig, digest, from_dict, to_dict
from pasnet.data import Batch, Loader, ShardSet, open_shards
from pasnet.evaluate import autocast, metrics, predict, set_precision
from pasnet.models.pasnet import PASNet, build, parameter_groups
from pasnet.provenance import commit, versions

# Part of every run's identity. Raise it when a change to networks, data or training changes what comes out, so that
# finished runs are not taken for new ones.
NUMERICS = 1


class TrainingError(RuntimeError):
    """A training that cannot go on; the message says where and what was at hand."""


def train(config: TrainConfig, out: Path, on_epoch: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Trains to the last epoch and returns {"last": ..., "best_on_test": ..., "seconds": ...}, also in done.json.

    `on_epoch` gets each epoch's record as it ends. Raises ConfigError, WeightsError and ShardError before the first
    step, TrainingError when the loss is not finite.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_precision(config.precision)
    shards = open_shards(Path(config.data.shards))
    if config.model.num_classes != len(shards.class_names):
        raise ConfigError(f"model.num_classes is {config.model.num_classes}, the shards have {len(shards.class_names)}")
    optim, micro = config.optim, min(config.optim.batch, config.optim.micro_batch)
    train_loader = Loader(shards, config.data, subset="train", batch=micro, seed=config.seed, device=device)
    test_loader = Loader(shards, config.data, subset="test", batch=micro, seed=config.seed, device=device)

    torch.manual_seed(config.seed)
    model = build(config.model)
    identity = run_digest(config, shards.digest, _identity_of(config.init.parent))
    state = _resume(out / "last.pt", config, shards, identity)
    if state is None:
        report = load_initial(model, config, shards)
        _write(out / "config.json", json.dumps(to_dict(config), indent=1))
        _write(out / "load_report.txt", report + "\n")
        print(report, flush=True)
    else:
        model.load_state_dict(state["model"])
    model.to(device)
    if model.pose is not None:
        model.pose.checkpoint = optim.checkpoint_pose
        if optim.freeze_pose:
            model.pose.requires_grad_(False)
    optimizer = torch.optim.SGD(
        parameter_groups(model, optim.lr, optim.weight_decay, optim.pose_lr_mult),
        momentum=optim.momentum,
        nesterov=optim.nesterov,
    )
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    history: list[dict[str, Any]] = []
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        history = state["history"]
        print(f"going on after epoch {len(history)} of {optim.epochs}", flush=True)

    for epoch in range(len(history), optim.epochs):
        # dropout's draws depend on the epoch, not on how the run got here
        torch.manual_seed((config.seed << 20) + epoch)
        lr_scale = lr_scale_at(epoch, optim, history)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        set_train_mode(model, optim)
        started, waited, total_loss, hits, seen = time.perf_counter(), 0.0, 0.0, 0, 0
        pending = time.perf_counter()
        for batch in _with_progress(train_loader.epoch(epoch), len(train_loader), f"epoch {epoch + 1}/{optim.epochs}"):
            waited += time.perf_counter() - pending
            clips, labels = batch.clips.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
            in_step = min(optim.batch, len(train_loader.rows) - seen // optim.batch * optim.batch)
            with autocast(device, config.precision):
                logits = model(clips)
                total = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
                loss = total / in_step  # the mean over the whole step, of which this is a part
            if not torch.isfinite(loss):
                names = ", ".join(shards.keys[row] for row in batch.rows.tolist())
                raise TrainingError(
                    f"loss is {loss.item()} in epoch {epoch + 1}, lr {optim.lr * lr_scale:g}, clips: {names}"
                )
            loss.backward()
            seen += len(labels)
            if seen % optim.batch == 0 or seen == len(train_loader.rows):
                nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            total_loss += loss.item() * in_step
            hits += int((logits.argmax(1) == labels).sum())
            pending = time.perf_counter()
        trained = time.perf_counter() - started
        test = metrics(predict(model, test_loader, shards.keys, device, config.precision))
        record = {
            "epoch": epoch + 1,
            "lr": optim.lr * lr_scale,
            "train_loss": total_loss / seen,
            "train_top1": 100 * hits / seen,
            "test_top1": test["top1"],
            "test_top5": test["top5"],
            "clips_per_second": seen / trained,
            "data_wait": waited / trained,  # share of the training time spent waiting for the loader
            "seconds": time.perf_counter() - started,
        }
        history.append(record)
        _save(out / "last.pt", model, optimizer, history, config, shards, identity)
        _write(out / "history.json", json.dumps(history, indent=1))
        print(describe(record, optim.epochs), flush=True)
        if on_epoch:
            on_epoch(record)

    best = max(history, key=lambda record: record["test_top1"])
    result = {
        "last": history[-1],
        "best_on_test": {"epoch": best["epoch"], "top1": best["test_top1"]},
        "seconds": sum(record["seconds"] for record in history),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "commit": commit(),
        **versions(),
    }
    _write(out / "done.json", json.dumps(result, indent=1))
    return result


def evaluate_checkpoint(checkpoint: Path, shards_folder: Path, out: Path) -> dict[str, float]:
    """Test-list metrics of a last.pt; writes out/predictions.parquet and out/metrics.json, and returns the metrics."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shards = open_shards(Path(shards_folder))
    model, config = model_of(read_own_checkpoint(Path(checkpoint), None, shards))
    set_precision(config.precision)
    batch = min(config.optim.batch, config.optim.micro_batch)
    loader = Loader(shards, config.data, subset="test", batch=batch, seed=config.seed, device=device)
    predictions = predict(model.to(device), loader, shards.keys, device, config.precision)
    numbers = metrics(predictions)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    predictions.save(out / "predictions.parquet")
    _write(out / "metrics.json", json.dumps(numbers, indent=1))
    return numbers


def run_digest(config: TrainConfig, shard_digest: str, parent_digest: str) -> str:
    """The identity of a training: everything that decides its result, and nothing that does not (paths, workers)."""
    values = to_dict(config)
    values["data"] |= {"shards": shard_digest, "workers": None}
    values["init"] |= {"parent": parent_digest}
    del values["optim"]["checkpoint_pose"]  # memory, not numbers
    for name in ("eco", "pose"):
        values["init"][name] = _content_of(values["init"][name])
    return digest([NUMERICS, values])


def _identity_of(parent: str) -> str:
    """The identity that a checkpoint of ours holds. Not its sha256: the file holds timings too."""
    if not Path(parent).is_file():
        return parent
    return str(torch.load(parent, map_location="cpu", weights_only=True).get("identity", ""))


def _content_of(path: str) -> str:
    """The sha256 of a weights file; the path itself where there is no file (whoever reads it complains)."""
    return weights.sha256_of(Path(path)) if Path(path).is_file() else path


def describe(record: dict[str, Any], epochs: int) -> str:
    """One line for one epoch."""
    return (
        f"epoch {record['epoch']:>3}/{epochs}  loss {record['train_loss']:.4f}  train {record['train_top1']:5.1f} %  "
        f"test {record['test_top1']:5.1f} %  lr {record['lr']:.0e}  {record['clips_per_second']:.1f} clips/s  "
        f"data wait {100 * record['data_wait']:.0f} %  {record['seconds']:.1f} s"
    )


def lr_scale_at(epoch: int, optim: OptimConfig, history: list[dict[str, Any]]) -> float:
    """Factor on every learning rate in this epoch, computed from the history: nothing else to save or restore."""
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "steps":
        return 0.1 ** sum(epoch >= step for step in optim.steps)
    best, since, drops = -1.0, 0, 0
    for record in history:
        best, since = (record["test_top1"], 0) if record["test_top1"] > best else (best, since + 1)
        if since == optim.patience:
            drops, since = drops + 1, 0
    return 0.1**drops


def set_train_mode(model: nn.Module, optim: OptimConfig) -> None:
    """model.train(), with batch norm as `bn_mode` says; called every epoch, since train() resets what it finds."""
    model.train()
    norms = [module for module in model.modules() if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d))]
    still = {"train": [], "partial": norms[1:], "frozen": norms}[optim.bn_mode]
    for norm in still:
        norm.eval()
        norm.requires_grad_(False)


def load_initial(model: PASNet, config: TrainConfig, shards: ShardSet) -> str:
    """Fills a fresh model from `config.init`; returns a report, one line per part. What has no source stays random."""
    state, lines = model.state_dict(), []
    pose = {key: value for key, value in state.items() if key.startswith("pose.")}
    # the one layer that the "I only" option makes anew (A8)
    remade = (
        ["temporal.res3a_2."] if config.model.fusion.i_only == "new_res3a" and config.model.fusion.style == "I" else []
    )
    if config.init.parent:
        parent = read_own_checkpoint(Path(config.init.parent), config, shards)["model"]
        new = ["pose.", "fusion."] if not any(key.startswith("pose.") for key in parent) else ["fusion."]
        lines.append(weights.merge(state, parent, source=config.init.parent, may_miss=[*new, *remade]).summary())
        if any(key.startswith("pose.") for key in parent):
            pose = {}  # a PAS-Net went on from a PAS-Net
            if config.init.pose:
                raise ConfigError(f"{config.init.parent} holds a pose network; leave init.pose empty")
    elif config.init.eco:
        start = weights.read_start(Path(config.init.eco))
        ours = {key: value for key, value in state.items() if key.startswith(("appearance.", "temporal.", "head."))}
        head = start.tensors.get("head.weight")
        # a head of other classes, such as Kinetics' 400, is trained anew
        other = ["head."] if head is not None and len(head) != config.model.num_classes else []
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


def read_own_checkpoint(path: Path, config: TrainConfig | None, shards: ShardSet) -> dict[str, Any]:
    """A last.pt of ours. Raises WeightsError when it was trained on other data or another split: the test videos of
    one split are training videos of another, and accuracies near 100 % have been published that way."""
    if not path.is_file():
        raise weights.WeightsError(f"{path}: no such checkpoint; train it first")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        trained_on = checkpoint["data"]
    except Exception as error:
        raise weights.WeightsError(
            f"{path}: not a checkpoint of pasnet train ({type(error).__name__}: {error})"
        ) from error
    split = config.data.split if config is not None else trained_on["split"]
    wanted = {"dataset": shards.manifest["dataset"], "digest": shards.digest, "split": split}
    for name, value in wanted.items():
        if trained_on[name] != value:
            raise weights.WeightsError(f"{path}: was trained on {name} {trained_on[name]}, this run is on {value}")
    return checkpoint


def model_of(checkpoint: dict[str, Any]) -> tuple[PASNet, TrainConfig]:
    """The network of a checkpoint, with its weights, and the config that trained it."""
    config: TrainConfig = from_dict(TrainConfig, checkpoint["config"])
    model = build(config.model)
    model.load_state_dict(checkpoint["model"])
    return model, config


def _resume(path: Path, config: TrainConfig, shards: ShardSet, identity: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    checkpoint = read_own_checkpoint(path, config, shards)
    if checkpoint["identity"] != identity:
        raise ConfigError(f"{path}: is a run with other settings; give another folder, or remove this one")
    return checkpoint


def _save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, Any]],
    config: TrainConfig,
    shards: ShardSet,
    identity: str,
) -> None:
    checkpoint = {
        "identity": identity,
        "config": json.loads(json.dumps(to_dict(config))),  # plain lists, which weights_only loading admits
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": history,
        "data": {
            "dataset": shards.manifest["dataset"],
            "digest": shards.digest,
            "split": config.data.split,
            "class_names": list(shards.class_names),
        },
    }
    scratch = path.with_suffix(".tmp")
    with open(scratch, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())  # a rename may reach the disk before the content does
    os.replace(scratch, path)


def _write(path: Path, text: str) -> None:
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text, "utf-8")
    os.replace(scratch, path)


def _with_progress(batches: Iterator[Batch], total: int, title: str) -> Iterator[Batch]:
    """A bar on a terminal; silence elsewhere, where each epoch prints its line."""
    if not sys.stderr.isatty():
        return batches
    from rich.progress import track

    return iter(track(batches, title, total=total, transient=True))
