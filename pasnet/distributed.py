"""The processes of one training: a single one, or those that torchrun started (gloo on CPUs, NCCL on GPUs).

Whatever a training asks of its fellow processes is here, and with one process each of it is a line that does nothing;
so is how they are asked to stop.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pasnet.config import ConfigError


class StoppedError(RuntimeError):
    """A training or an evaluation that was asked to stop (SIGTERM) and has saved how far it came."""

    exit_code = 128 + signal.SIGTERM


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among `world` of them. Number 0, the `main` one, alone prints and writes."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Prints it once, not `world` times."""
        if self.main:
            print(text, flush=True)

    def gather(self, item: Any) -> list[Any]:
        """Everyone's item, by rank, for everyone. Anything that can be pickled."""
        if self.world == 1:
            return [item]
        found: list[Any] = [None] * self.world
        distributed.all_gather_object(found, item)
        return found

    def share_buffers(self, model: nn.Module) -> None:
        """Everyone gets the main process's batch norm statistics, those that a checkpoint holds: without it, each would
        evaluate a network of its own."""
        if self.world > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, 0)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose backward pass averages gradients over the processes."""
        if self.world == 1:
            return model
        on = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=on)


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    """Joins the processes that torchrun started, or is the only one. One GPU each, where there are GPUs.

    Raises ConfigError where a machine has GPUs, but fewer than processes.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        if world > 1 and local >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local + 1} of this machine finds {torch.cuda.device_count()} GPUs, and each process needs "
                "one of its own; start as many with torchrun's --nproc-per-node, or hide the GPUs "
                "(CUDA_VISIBLE_DEVICES=) to train on CPUs"
            )
        device = torch.device("cuda", local if world > 1 else torch.cuda.current_device())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if world == 1:
        yield Processes(rank=0, world=1, device=device)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
    try:
        yield Processes(rank=rank, world=world, device=device)
    finally:
        distributed.destroy_process_group()
        if backend == "gloo":
            # A thread of gloo's may be about to drop a tensor of the last collective, for which it needs the
            # interpreter, and would abort the process if that were to end first. Asleep, this thread lets it; it can
            # not be joined while a network, or an exception's frames, hold the group.
            time.sleep(0.2)


def without_averaging(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """For all but the last part of an accumulated step: gradients stay where they are."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


@contextlib.contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, so that the loop can end where it has saved all that it did."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
