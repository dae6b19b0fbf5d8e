"""The machine: its name on every result, and its load during an epoch, from what is there anyway (/proc, torch.cuda).

The load is not left to MLflow's own monitor: that needs psutil, and it sends straight to the server from a thread of
its own, so that its points are lost, and its end waits, when the server is away. Here the numbers are part of the
epoch's record, on disk before they are sent. A reading every ten seconds takes a fraction of a millisecond.
"""

from __future__ import annotations

import os
import re
import resource
import sys
import threading
from pathlib import Path
from typing import Any

EVERY = 10.0  # seconds; MLflow's own interval


def hardware() -> str:
    """The kind of machine that networks run on here: the GPU's name, or the processor's and how many cores we may use.

    Speeds are taken over from a benchmark, or a finished training, of the same kind alone.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text("utf-8"), re.MULTILINE) if info.is_file() else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else 'CPU'}, {cores} cores"


def family(cpu: str) -> str:
    """A processor's kind as a part of a file's name, since ratios differ between kinds: "amd-epyc", "intel-xeon"."""
    words = re.findall(r"[a-z]\w*", re.sub(r"\(\w+\)|processor|cpu", " ", cpu.lower()))
    return "-".join(words[:2]) or "unknown"


class Load:
    """Samples in a daemon thread; `take` returns means and peaks since it was last called."""

    def __init__(self) -> None:
        self._samples: dict[str, list[float]] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._cpu = _cpu_times()
        self._mute: set[str] = set()
        threading.Thread(target=self._watch, name="machine-load", daemon=True).start()

    def stop(self) -> None:
        """Ends the thread."""
        self._stop.set()

    def take(self) -> dict[str, float]:
        """{name: number} under MLflow's names for the same things; empty where the system tells nothing."""
        self._sample()
        now, before = _cpu_times(), self._cpu
        with self._lock:
            samples, self._samples = self._samples, {}
            self._cpu = now
        found = {name: sum(values) / len(values) for name, values in samples.items()}
        if now and before and now[1] > before[1]:  # the kernel counts: a mean over the whole epoch
            found["system/cpu_utilization_percentage"] = 100 * (now[0] - before[0]) / (now[1] - before[1])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["system/process_peak_memory_megabytes"] = peak / (1e6 if sys.platform == "darwin" else 1e3)
        return found

    def _watch(self) -> None:
        while not self._stop.wait(EVERY):
            self._sample()

    def _sample(self) -> None:
        for read in (_memory, _gpus):
            if read.__name__ in self._mute:
                continue
            try:
                now = read()
            except Exception as error:  # a reading is never worth a training
                print(f"no {read.__name__[1:]} load is recorded ({error})", file=sys.stderr)
                self._mute.add(read.__name__)
                continue
            with self._lock:
                for name, value in now.items():
                    self._samples.setdefault(name, []).append(value)


def _cpu_times() -> tuple[float, float] | None:
    """(busy, all) since boot, of all cores; None where there is no /proc."""
    try:
        with open("/proc/stat") as file:
            times = [float(word) for word in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    return sum(times) - times[3] - times[4], sum(times)  # idle, and waiting for a disk


def _memory() -> dict[str, float]:
    try:
        with open("/proc/meminfo") as file:
            kilobytes = {line.split(":")[0]: float(line.split()[1]) for line in file}
    except OSError:
        return {}
    used = kilobytes["MemTotal"] - kilobytes["MemAvailable"]
    return {
        "system/system_memory_usage_megabytes": used / 1e3,
        "system/system_memory_usage_percentage": 100 * used / kilobytes["MemTotal"],
    }


def _gpus() -> dict[str, float]:
    torch: Any = sys.modules.get("torch")
    # never the first to touch CUDA: a process that has a context can no longer be forked into loaders
    if torch is None or not torch.cuda.is_initialized():
        return {}
    found = {}
    for index in range(torch.cuda.device_count()):
        # the allocator's own books: no call of CUDA from this thread, which may come amid the capture of a graph
        if torch.cuda.memory_reserved(index) == 0:
            continue  # not a device of this process
        found[f"system/gpu_{index}_memory_reserved_megabytes"] = torch.cuda.memory_reserved(index) / 1e6
        found[f"system/gpu_{index}_peak_memory_megabytes"] = torch.cuda.max_memory_allocated(index) / 1e6
        try:
            found[f"system/gpu_{index}_utilization_percentage"] = float(torch.cuda.utilization(index))
        except Exception:  # needs nvidia-ml-py, which nothing else here does
            continue
    return found
