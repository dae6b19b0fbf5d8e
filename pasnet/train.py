"""One training: ECO (fusion "A") or PAS-Net, from a random start, public weights, or a checkpoint of ours.

The loop is at the end of `_train`, on one screen. A run folder holds config.json, load_report.txt, history.json (one
entry per epoch), last.pt (rewritten after each epoch, and within one every config.checkpoint_minutes) and, when the
last epoch is done, done.json. Started again, a run goes on from last.pt; on a CPU the result is the same, bit for bit,
as without the interruption. Under torchrun it is one training of several processes, with the same steps as alone (while
a step has two clips or more for each), in which batch norm sees the clips of one process.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Literal

import filelock
import torch
from torch import Tensor, nn

from pasnet import checkpoints, weights
from pasnet.checkpoints import identity_of, load_initial, model_of, read_own_checkpoint, run_digest
from pasnet.config import ConfigError, OptimConfig, TrainConfig, digest, to_dict
from pasnet.data import Batch, Loader, ShardSet, lacking, open_shards
from pasnet.distributed import Processes, StoppedError, processes, stop_signal, without_averaging
from pasnet.evaluate import Source, Unfinished, autocast, metrics, predict, set_precision, write_evaluation
from pasnet.machine import hardware
from pasnet.models.pasnet import PASNet, build, compiled, for_tensor_cores, parameter_groups
from pasnet.progress import EpochBar
from pasnet.provenance import commit, versions
from pasnet.weights import WeightsError


class TrainingError(RuntimeError):
    """A training that cannot go on; the message says where and what was at hand."""


@dataclass(kw_only=True)
class Tally:
    """How far an epoch has come, over all processes: what a checkpoint within the epoch must know."""

    world: int  # how many those are: so many share each batch
    batches: int = 0  # of the loader
    seen: int = 0  # clips
    loss: float = 0.0  # summed over them
    hits: int = 0
    seconds: float = 0.0  # spent on it
    waited: float = 0.0  # of those, for the loader
    saving: float = 0.0  # besides, on checkpoints
    evaluating: float = 0.0  # and on the evaluations that follow
    held_out: dict[str, float] | None = None  # what the first of them found


def train(config: TrainConfig, out: Path, on_epoch: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Trains to the last epoch and returns {"last": ..., "best_on_test": ..., "seconds": ...}, also in done.json.

    `on_epoch` gets each epoch's record as it ends, in the main process; when a run goes on, the last one's again, lest
    it was missed. Raises ConfigError, WeightsError and ShardError before the first step, TrainingError when the loss is
    not finite (failure.json names the clips) or another training writes into `out`, StoppedError after SIGTERM.
    """
    with processes() as team, stop_signal() as stop, ExitStack() as stack:
        return _train(config, Path(out), on_epoch, team, stop, stack)


def _train(
    config: TrainConfig,
    out: Path,
    on_epoch: Callable[[dict[str, Any]], None] | None,
    team: Processes,
    stop: threading.Event,
    stack: ExitStack,
) -> dict[str, Any]:
    optim, device = config.optim, team.device
    set_precision(config.precision, training=True)
    shards = open_shards(Path(config.data.shards))
    if config.model.num_classes != len(shards.class_names):
        raise ConfigError(f"model.num_classes is {config.model.num_classes}, the shards have {len(shards.class_names)}")
    micro = micro_batch(optim, team.world)
    if team.world > 1 and optim.bn_mode != "frozen" and not optim.sync_bn:
        alone = min(optim.micro_batch, optim.batch)
        team.say(
            f"batch norm sees {micro} clips at a time in each of {team.world} processes, in one alone {alone}, and "
            "evaluations use the first one's statistics"
        )
    if optim.sync_bn and team.world > 1 and device.type != "cuda":
        raise ConfigError("optim.sync_bn needs GPUs: torch has no synchronised batch norm for CPUs")
    own = (config.init.parent, config.init.pretrained)
    for start in filter(None, (*own, config.init.eco, config.init.pose)):
        if not Path(start).is_file():  # else its path would stand for it in this run's identity
            if start in own:
                raise WeightsError(f"{start}: no such checkpoint; train it first")
            raise WeightsError(f"{start}: no such file; give its place of today, a run knows it by its content")
    if team.main:
        out.mkdir(parents=True, exist_ok=True)
        stack.enter_context(_alone_in(out))

    def loader(subset: Literal["train", "held_out", "test"]) -> Loader:
        made = Loader(
            shards,
            config.data,
            subset=subset,
            batch=micro,
            seed=config.seed,
            device=device,
            rank=team.rank,
            world=team.world,
            step=optim.batch if subset == "train" else None,
        )
        return stack.enter_context(closing(made))

    train_loader, test_loader = loader("train"), loader("test")
    _say_what_is_lacking(shards, team)
    lengths = shards.num_frames[train_loader.rows]
    if (short := (lengths < config.data.num_segments).mean()) > 0.01:
        team.say(
            f"{short:.0%} of the training videos have fewer frames than K = {config.data.num_segments}: they repeat"
        )
    held_out_loader = loader("held_out") if config.data.held_out else None

    torch.manual_seed(config.seed)
    model = build(config.model)
    identity = run_digest(config, shards.digest, identity_of(config.init.parent))
    state = checkpoints.resume(out / "last.pt", config, shards, identity)
    if state is None:
        report = load_initial(model, config, shards)
        if team.main:
            # of a run whose last.pt was removed
            for stale in (out / "done.json", out / "history.json", *out.glob("unfinished-*")):
                stale.unlink(missing_ok=True)
            _write(out / "config.json", json.dumps(to_dict(config), indent=1))
            _write(out / "load_report.txt", report + "\n")
        team.say(report)
    else:
        model.load_state_dict(state.pop("model"))
    if optim.sync_bn and team.world > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device)
    if device.type == "cuda" and config.precision in ("bf16", "fp16"):
        for_tensor_cores(model)
    if model.pose is not None:
        model.pose.checkpoint = optim.checkpoint_pose
        if optim.freeze_pose:
            model.pose.requires_grad_(False)
    set_bn_mode(model, optim)  # settles which parameters learn, before optimiser and processes look at them
    optimizer = torch.optim.SGD(
        parameter_groups(model, optim.lr, optim.weight_decay, optim.pose_lr_mult),
        momentum=optim.momentum,
        nesterov=optim.nesterov,
    )
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")  # type: ignore[attr-defined]
    history: list[dict[str, Any]] = []
    tally, made_by = Tally(world=team.world), commit()
    if state is not None:
        optimizer.load_state_dict(state.pop("optimizer"))  # popped: a second copy would stay as long as the training
        scaler.load_state_dict(state["scaler"])
        history, tally = state["history"], Tally(**(state["within"] or {"world": team.world}))
        if tally.world != team.world:
            raise ConfigError(
                f"{out / 'last.pt'}: is within an epoch of {tally.world} processes; go on with as many, not "
                f"{team.world}"
            )
        before = {record.get("processes", 1) for record in history}
        if before - {team.world} and len(history) < optim.epochs:
            team.say(
                f"epochs before this were trained by {', '.join(map(str, sorted(before)))} processes, now by "
                f"{team.world}: not bit for bit what either would have given alone"
            )
        if team.main and history:  # what a process that was killed right after saving could not do
            _write(out / "history.json", json.dumps(history, indent=1))
            if on_epoch:
                on_epoch(history[-1])
        if len(history) < optim.epochs:
            team.say(f"going on after epoch {len(history)} of {optim.epochs} and {tally.seen} clips of the next")
        elif (out / "done.json").is_file():  # with the device and commit that it was trained with
            finished: dict[str, Any] = json.loads((out / "done.json").read_text("utf-8"))
            return finished
    if len(set(team.gather((identity, len(history), tally.batches, tally.held_out is None)))) > 1:
        raise ConfigError(
            f"{out}: the processes find different states there; it must be on a disk that all of them see"
        )
    wrapped = team.wrap(model)
    graphs = config.compile and device.type == "cuda" and team.world == 1  # DDP's hooks are no part of a graph
    forward = compiled(wrapped, micro, graphs) if config.compile else wrapped
    # what CUDA graphs work in is not counted as allocated while they are replayed
    peak = torch.cuda.max_memory_reserved if graphs else torch.cuda.max_memory_allocated

    totals = train_loader.totals()
    step_of = [step for step in train_loader.steps() for _ in step]  # of a batch: what its step's batches hold
    ends = set(accumulate(map(len, train_loader.steps())))  # so many batches make whole steps
    saved = time.monotonic()

    def save(within: Tally | None) -> None:
        nonlocal saved
        started = time.perf_counter()
        if team.main:
            checkpoints.save(
                out / "last.pt",
                config,
                shards,
                identity,
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                scaler=scaler.state_dict(),
                history=history,
                within=asdict(within) if within else None,
            )
        saved = time.monotonic()
        tally.saving += time.perf_counter() - started

    def evaluate(on: Loader, subset: str, epoch: int) -> dict[str, float]:
        """Metrics of the network as it is after the epoch's last step; a kill costs no more than the interval."""
        since = time.perf_counter()

        def first() -> None:
            nonlocal since
            tally.evaluating += time.perf_counter() - since
            save(tally)
            since = time.perf_counter()

        unfinished = Unfinished(
            out / f"unfinished-{subset}",
            digest([identity, epoch, subset]),
            team=team,
            stop=stop,
            minutes=config.checkpoint_minutes,
            since=saved,
            first=first,
        )
        found = metrics(predict(model, on, shards.keys, team, config.precision, unfinished), resamples=0)
        tally.evaluating += time.perf_counter() - since
        return found

    for epoch in range(len(history), optim.epochs):
        lr = optim.lr * lr_scale_at(epoch, optim, history)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr / optim.lr
        model.train()
        number, step = tally.batches, Step(started=time.perf_counter(), waited=train_loader.waited)
        title = f"epoch {epoch + 1}/{optim.epochs}"
        with EpochBar(title, sum(totals), tally.seen, tally.waited, show=team.main) as bar:
            for batch in train_loader.epoch(epoch, start=number):
                clips_in_step, step_ends = sum(step_of[number]), number + 1 in ends
                # dropout's draws depend on the place in the training, not on how the run got here
                torch.manual_seed(_seed_at(config.seed, epoch, number, team.rank))
                clips, labels = batch.clips.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
                with nullcontext() if step_ends else without_averaging(wrapped):
                    with autocast(device, config.precision):
                        logits = forward(clips)
                    loss = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
                    # the mean over the whole step, of which this is a part; processes average their gradients
                    scaler.scale(loss * (team.world / clips_in_step)).backward()
                step.parts.append((batch, loss.detach(), (logits.argmax(1) == labels).sum()))
                number += 1
                if step_ends:
                    scaler.unscale_(optimizer)
                    norm = nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
                    due = time.monotonic() - saved >= 60 * config.checkpoint_minutes and number < len(totals)
                    # a step with an infinite gradient is left out, and the scale halved; below 1 that is no cure
                    may_skip = scaler.is_enabled() and scaler.get_scale() >= 1
                    # where the CPU waits for a GPU (which it also does to copy clips), and a process for the others
                    waited = train_loader.waited - step.waited
                    closed = _close(
                        step, norm, keys=shards.keys, scaled=may_skip, stop=stop, due=due, waited=waited, team=team
                    )
                    if closed.broken:
                        raise _not_finite(closed, title, lr, out, team)
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad(set_to_none=not graphs)
                    tally.batches, tally.seen = number, tally.seen + clips_in_step
                    tally.loss, tally.hits = tally.loss + closed.loss, tally.hits + closed.hits
                    tally.seconds += time.perf_counter() - step.started
                    tally.waited += closed.waited
                    bar.close_step(tally.seen, tally.loss / tally.seen, 100 * tally.hits / tally.seen, tally.waited)
                    if not history and tally.seen == clips_in_step:  # much above chance: weights that do not fit
                        chance = math.log(config.model.num_classes)
                        team.say(f"first step: loss {tally.loss / tally.seen:.3f}, of guessing {chance:.3f}")
                    if closed.due or closed.stop:
                        save(tally)
                    if closed.stop:
                        raise StoppedError(f"stopped in {title} after {tally.seen} clips; start again to go on")
                    step = Step(started=time.perf_counter(), waited=train_loader.waited)

        team.share_buffers(model)
        if held_out_loader and tally.held_out is None:
            tally.held_out = evaluate(held_out_loader, "held-out", epoch)
        test = evaluate(test_loader, "test", epoch)
        record = {
            "epoch": epoch + 1,
            "lr": lr,
            "train_loss": tally.loss / tally.seen,
            "train_top1": 100 * tally.hits / tally.seen,
            **({"held_out_top1": tally.held_out["top1"]} if tally.held_out else {}),
            "test_top1": test["top1"],
            "test_top5": test["top5"],
            "clips_per_second": tally.seen / tally.seconds,
            "data_wait": tally.waited / tally.seconds,  # share of the training time spent waiting for the loader
            "evaluation_seconds": tally.evaluating,
            "seconds": tally.seconds + tally.saving + tally.evaluating,
            "processes": team.world,
            "device": hardware(),
            "commit": made_by,
            **({"gpu_gib": peak() / 2**30} if device.type == "cuda" else {}),
        }
        history.append(record)
        tally = Tally(world=team.world)
        save(None)
        if team.main:
            for kept in out.glob("unfinished-*"):  # of this epoch's evaluations
                kept.unlink()
            _write(out / "history.json", json.dumps(history, indent=1))
            if on_epoch:
                on_epoch(record)
        team.say(describe(record, optim.epochs))
        if any(team.gather(stop.is_set())) and epoch + 1 < optim.epochs:
            raise StoppedError(f"stopped after {title}; start again to go on")

    result = {
        "last": history[-1],
        "best_on_test": _best(history, "test_top1"),
        **({"best_on_held_out": _best(history, "held_out_top1")} if held_out_loader else {}),
        "seconds": sum(record["seconds"] for record in history),
        "device": _all_of(history, "device"),
        "processes": _all_of(history, "processes"),
        "commit": _all_of(history, "commit"),
        **versions(),
    }
    if team.main:
        _write(out / "done.json", json.dumps(result, indent=1))
        (out / "failure.json").unlink(missing_ok=True)  # of an attempt before this one
    return result


@dataclass(kw_only=True)
class Step:
    """The parts of the optimiser step under way: (batch, sum of losses, hits), still on the device."""

    started: float
    waited: float  # what the loader had been waited for when it started

    def __post_init__(self) -> None:
        self.parts: list[tuple[Batch, Tensor, Tensor]] = []


@dataclass(kw_only=True)
class Closed:
    """What all processes know at the end of a step: sums over their clips, and what any of them wants."""

    loss: float
    hits: int
    broken: bool  # some loss or gradient is not finite
    bad: list[str]  # keys of the clips of such a loss; of the whole step when it is the gradient alone
    norm: float
    stop: bool
    due: bool  # for a checkpoint
    waited: float  # for the loader, seconds of the process that waited longest


def _close(
    step: Step,
    norm: Tensor,
    *,
    keys: list[str],
    scaled: bool,
    stop: threading.Event,
    due: bool,
    waited: float,
    team: Processes,
) -> Closed:
    *losses, gradient = torch.stack([*(loss for _, loss, _ in step.parts), norm.float()]).tolist()
    hits = int(torch.stack([of for _, _, of in step.parts]).sum())
    # loss scaling leaves out a step whose gradient is infinite, and goes on with a smaller scale
    broken = not all(map(math.isfinite, losses)) or not (scaled or math.isfinite(gradient))
    bad = [b for (b, _, _), loss in zip(step.parts, losses, strict=True) if not math.isfinite(loss)]
    named = [keys[row] for batch in bad for row in batch.rows.tolist()]
    everyone = [keys[row] for batch, _, _ in step.parts for row in batch.rows.tolist()] if broken else []
    found = team.gather((sum(losses), hits, broken, named, everyone, stop.is_set(), due, waited))
    loss, hit, broke, clips, all_clips, stops, dues, waits = zip(*found, strict=True)
    return Closed(
        loss=sum(loss),
        hits=sum(hit),
        broken=any(broke),
        bad=list(chain(*clips)) or list(chain(*all_clips)),
        norm=gradient,
        stop=any(stops),
        due=any(dues),
        waited=max(waits),
    )


def _not_finite(closed: Closed, where: str, lr: float, out: Path, team: Processes) -> TrainingError:
    """The error, after its circumstances are on record."""
    numbers = {"loss": str(closed.loss), "gradient_norm": str(closed.norm)}  # JSON has no NaN
    record = {"where": where, "lr": lr, **numbers, "clips": closed.bad}
    if team.main:
        _write(out / "failure.json", json.dumps(record, indent=1))
    return TrainingError(
        f"loss or gradient is not finite in {where} (sum of losses {closed.loss}, gradient norm {closed.norm}), "
        f"lr {lr:g}, clips: {', '.join(closed.bad[:16])}; {out / 'failure.json'} has them all, last.pt is from before"
    )


def evaluate_checkpoint(checkpoint: Path, shards_folder: Path, out: Path) -> dict[str, float]:
    """Test-list metrics of a last.pt, returned and, with all that belongs to them, in `out` (see write_evaluation).

    One that was killed goes on after the clips that it had kept in `out`, every config.checkpoint_minutes. Raises what
    `train` raises, and EvaluationError.
    """
    with processes() as team, stop_signal() as stop, ExitStack() as stack:
        shards = open_shards(Path(shards_folder))
        found = read_own_checkpoint(Path(checkpoint), None, shards)
        model, config = model_of(found)
        set_precision(config.precision)
        loader = Loader(
            shards,
            config.data,
            subset="test",
            batch=min(config.optim.batch, config.optim.micro_batch),
            seed=config.seed,
            device=team.device,
            rank=team.rank,
            world=team.world,
        )
        stack.enter_context(closing(loader))
        _say_what_is_lacking(shards, team)
        unfinished = Unfinished(
            Path(out) / "unfinished",
            digest([weights.sha256_of(Path(checkpoint)), shards.digest]),  # a training made anew has other numbers
            team=team,
            stop=stop,
            minutes=config.checkpoint_minutes,
        )
        predictions = predict(model.to(team.device), loader, shards.keys, team, config.precision, unfinished)
        if not team.main:
            return metrics(predictions)
        source = Source(
            dataset=shards.manifest["dataset"],
            split=config.data.split,
            shards=shards.digest,
            training=found["identity"],
            lacking=lacking(shards),
        )
        numbers = write_evaluation(predictions, shards.class_names, Path(out), source=source)
        unfinished.remove()
        return numbers


def _say_what_is_lacking(shards: ShardSet, team: Processes) -> None:
    if count := lacking(shards):
        team.say(f"{shards.folder} lacks {count} videos of the dataset's lists: accuracies are of the others")


def micro_batch(optim: OptimConfig, world: int) -> int:
    """Clips of one forward pass in one of `world` processes, so that whole ones make up a step.

    Raises ConfigError where the effective batch cannot be shared equally.
    """
    if optim.batch % world:
        raise ConfigError(f"optim.batch {optim.batch} cannot be shared by {world} processes equally")
    mine = optim.batch // world
    micro = min(mine, optim.micro_batch)
    if mine % micro:
        raise ConfigError(
            f"optim.batch {optim.batch} over {world} processes is {mine} clips each, no multiple of micro_batch {micro}"
        )
    return micro


def describe(record: dict[str, Any], epochs: int) -> str:
    """One line for one epoch."""
    held_out = f"held out {record['held_out_top1']:5.1f} %  " if "held_out_top1" in record else ""
    left = (epochs - record["epoch"]) * record["seconds"]
    memory = f"  {record['gpu_gib']:.1f} GiB" if "gpu_gib" in record else ""
    return (
        f"epoch {record['epoch']:>3}/{epochs}  loss {record['train_loss']:.4f}  train {record['train_top1']:5.1f} %  "
        f"{held_out}test {record['test_top1']:5.1f} %  lr {record['lr']:.3g}  "
        f"{record['clips_per_second']:.1f} clips/s  data wait {100 * record['data_wait']:.0f} %{memory}  "
        f"{record['seconds']:.1f} s, {_duration(left)} left"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def lr_scale_at(epoch: int, optim: OptimConfig, history: list[dict[str, Any]]) -> float:
    """Factor on every learning rate in this epoch, computed from the history: nothing else to save or restore."""
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "steps":
        return 0.1 ** sum(epoch >= step for step in optim.steps)
    looked_at = "held_out_top1" if optim.schedule == "plateau_on_held_out" else "test_top1"
    best, since, drops = -1.0, 0, 0
    for record in history:
        best, since = (record[looked_at], 0) if record[looked_at] > best else (best, since + 1)
        if since == optim.patience:
            drops, since = drops + 1, 0
    return 0.1**drops


def set_bn_mode(model: PASNet, optim: OptimConfig) -> None:
    """Batch norm as `bn_mode` says, whatever train() is called later: those that keep their statistics learn neither
    scale nor shift."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    # the first that learns: style "I" has an appearance trunk that it does not run
    first = next((norm for norm in norms if norm.weight.requires_grad), None)
    still = {"train": [], "partial": [norm for norm in norms if norm is not first], "frozen": norms}[optim.bn_mode]
    model.keep_still(still)


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Two trainings in one folder would write over each other's files. The kernel drops the lock with the process."""
    lock = filelock.FileLock(out / ".train.lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise TrainingError(f"{out}: another training is writing there; wait for it, or give another folder") from None
    try:
        yield
    finally:
        lock.release()


def _seed_at(seed: int, epoch: int, number: int, rank: int) -> int:
    text = f"{seed} {epoch} {number} {rank}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1  # torch takes 63 bits


def _all_of(history: list[dict[str, Any]], name: str) -> str:
    """What the epochs were trained with, in their order; those of before did not say."""
    return "; ".join(dict.fromkeys(str(record[name]) for record in history if name in record))


def _best(history: list[dict[str, Any]], by: str) -> dict[str, Any]:
    best = max(history, key=lambda record: record[by])
    return {"epoch": best["epoch"], "top1": best["test_top1"]}


def _write(path: Path, text: str) -> None:
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text, "utf-8")
    os.replace(scratch, path)
