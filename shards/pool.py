"""Many shards side by side, one process a worker, and the whole build made of them.

Processes, not threads: two processes build 1.8 to 1.9 times as fast as one (docs/performance.md), without sharing an
interpreter and its memory map. A file that crashes the decoder in a worker takes that worker with it, not the caller,
and is set aside like any other that cannot be decoded: decode_pyav.py says which it was.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_end
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from shards.datasets import Dataset, DatasetError
from shards.decode import DecodeSettings
from shards.pack import (
    BuildError,
    OnVideo,
    Progress,
    ShardPlan,
    build_shard,
    check_owner,
    check_space,
    finish,
    finished_part,
    forgiven,
    locked,
    plan,
    read_part,
    write_notes,
)


def build(
    dataset: Dataset,
    out: Path,
    settings: DecodeSettings | None = None,
    *,
    workers: int = 2,
    num_shards: int | None = None,
    shard_mib: int = 256,
    max_failed: float = 0.01,
    retry_failed: bool = False,
    on_video: OnVideo | None = None,
) -> dict[str, Any]:
    """plan + build_shard for each + finish, with the folder locked; returns the manifest.

    Finished shards are kept as they are; `retry_failed` builds those again in which a video could not be decoded.

    A script that calls this with more than one worker, or with decoder "pyav", needs `if __name__ == "__main__":`, as
    for all of Python's multiprocessing. Raises BuildError (see `finish`, `locked`, `build_shards`; also when the disk
    is too small by estimate).
    """
    if workers < 1:
        raise DatasetError(f"workers must be at least 1, got {workers}")
    if not 0 <= max_failed <= 1:
        raise DatasetError(f"max_failed is a share, 0 to 1, got {max_failed}")
    settings, out = settings or DecodeSettings(), Path(out)
    with locked(out):
        check_owner(dataset, out)
        plans = plan(dataset, settings, num_shards=num_shards, shard_mib=shard_mib)
        write_notes(dataset, plans, out, settings, max_failed)
        for shard in plans if retry_failed else ():
            if (read_part(shard.name, out) or {}).get("failures"):
                (out / "parts" / f"{shard.name}.json").unlink()
        known = {shard.name: part for shard in plans if (part := finished_part(shard, out)) is not None}
        todo = [shard for shard in plans if shard.name not in known]
        if on_video:
            for video in (video for shard in plans if shard.name in known for video in shard.videos):
                on_video(Progress(video=video, frames=0, bytes=0, known=True))
        check_space(dataset, settings, out, len(todo) / len(plans))
        most = forgiven(max_failed, len(dataset.videos))
        build_shards(todo, out, settings, workers=workers, on_video=on_video, max_ruinous=most)
        return finish(dataset, plans, out, settings, max_failed=max_failed, known=known)


def build_shards(
    shards: Sequence[ShardPlan],
    out: Path,
    settings: DecodeSettings,
    *,
    workers: int,
    on_video: OnVideo | None = None,
    expected: Mapping[str, str] | None = None,
    max_ruinous: float,
) -> None:
    """`build_shard` for each, `workers` of them at a time; `expected` holds sha256 by shard name.

    A video that crashes the fast decoder, or hangs in it, ends its worker. It is set aside, and the shards that are not
    finished are begun again: up to `max_ruinous` times.

    `on_video` is called in this process and thread. An error in a worker or in `on_video`, and Ctrl-C, stop every
    worker when the videos that it is at are done, and are raised when all have stopped. The caller holds `locked(out)`.
    Raises BuildError when a worker dies for another reason, or for one video too many, and as `build_shard` does.
    """
    expected, workers = expected or {}, min(workers, len(shards))
    apart = settings.decoder == "ffmpeg"  # decodes in processes of its own, whoever calls it
    if workers < 1 or (workers == 1 and apart):  # no worker to start, and none that a debugger could not follow
        for shard in shards:
            build_shard(shard, out, settings, on_video, expected=expected.get(shard.name))
        return
    ruinous: dict[str, str] = {}
    told: set[str] = set()

    def tell(progress: Progress) -> None:
        """Tells of a video once, also where its shard is begun again."""
        if on_video and progress.video.key not in told:
            on_video(progress)
        told.add(progress.video.key)

    notices: Path | None = None
    parts = Path(out) / "parts"
    try:
        while shards:
            if not apart:
                parts.mkdir(parents=True, exist_ok=True)
                notices = Path(tempfile.mkdtemp(prefix="notices-", dir=parts))
            try:
                return _side_by_side(shards, out, settings, workers, tell, expected, ruinous, notices)
            except BrokenProcessPool as error:
                found = _ruinous(notices, settings) if notices else {}
                if not found.keys() - ruinous.keys():
                    raise BuildError(
                        f"{out}: a worker process died: it was ended from outside (short of memory? use fewer "
                        f'--workers), or a script calls build without `if __name__ == "__main__":`; finished shards '
                        f"are kept, start again"
                    ) from error
                ruinous |= found
                if len(ruinous) > max_ruinous:
                    video, reason = next(iter(found.items()))
                    raise BuildError(
                        f"{out}: {len(ruinous)} videos crashed the decoder, or hung in it, such as {video}: {reason}; "
                        f"allow more with --max-failed (finished shards are kept), or build anew with --decoder ffmpeg"
                    ) from error
            shards = [shard for shard in shards if finished_part(shard, out) is None]
    finally:
        for of in parts.glob("notices-*"):  # those of builds that were killed, too
            shutil.rmtree(of, ignore_errors=True)


def _side_by_side(
    shards: Sequence[ShardPlan],
    out: Path,
    settings: DecodeSettings,
    workers: int,
    tell: OnVideo,
    expected: Mapping[str, str],
    ruinous: Mapping[str, str],
    notices: Path | None,
) -> None:
    """`build_shard` for each in `workers` processes. Raises BrokenProcessPool when one of them dies."""
    methods = multiprocessing.get_all_start_methods()
    # not fork: whoever calls may have threads, whose locks would be copied as they are
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["shards.pool", f"shards.decode_{settings.decoder}"])
    told: SimpleQueue[Progress] = context.SimpleQueue()
    cores: SimpleQueue[set[int]] = context.SimpleQueue()
    for chosen in _cores(workers):
        cores.put(chosen)
    stopped: Event = context.Event()

    def hear(listen: OnVideo | None) -> None:
        while not told.empty():
            progress = told.get()
            if listen:
                listen(progress)

    initargs = (told, stopped, cores, dict(os.environ), notices, settings)
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=initargs) as pool:
        waiting = {pool.submit(_work, shard, out, settings, expected.get(shard.name), ruinous) for shard in shards}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.1, return_when=FIRST_COMPLETED)
                hear(tell)
                for future in done:
                    future.result()
        except BaseException:
            stopped.set()  # shards not yet begun end at once; cancelled, they would confuse a pool whose worker dies
            while wait(waiting, timeout=0.1).not_done:
                hear(None)  # a worker must not wait for room in the pipe
            raise


def _ruinous(notices: Path, settings: DecodeSettings) -> dict[str, str]:
    """{path: reason} of the videos for which workers were ended."""
    from shards.decode_pyav import ended_by

    return dict(filter(None, (ended_by(notice, settings) for notice in notices.iterdir())))


def _cores(workers: int) -> list[set[int]]:
    """Which cores each worker keeps to. Where workers take all cores, each has one of its own, with the ffmpegs that it
    starts: frames then go from decoder to encoder through that core's cache (docs/performance.md)."""
    if not hasattr(os, "sched_getaffinity"):  # Linux has it
        return [set()] * workers
    cores = sorted(os.sched_getaffinity(0))
    if 1 < len(cores) <= workers:
        return [{cores[number % len(cores)]} for number in range(workers)]
    return [set(cores)] * workers


# In a worker process

_told: SimpleQueue[Progress]
_stopped: Event


def _start_worker(
    told: SimpleQueue[Progress],
    stopped: Event,
    cores: SimpleQueue[set[int]],
    environment: dict[str, str],
    notices: Path | None,
    settings: DecodeSettings,
) -> None:
    global _told, _stopped
    _told, _stopped = told, stopped
    os.environ.clear()  # the server that workers are forked from may be older than the last change of it
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who tells us to stop
    if keep_to := cores.get():
        with contextlib.suppress(OSError):  # where it is forbidden, workers are somewhat slower
            os.sched_setaffinity(0, keep_to)
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    if notices:
        from shards.decode_pyav import give_notice

        give_notice(notices / str(os.getpid()), settings)


def _end_with_the_caller() -> None:
    """A worker that outlives a killed build would write into a folder whose lock is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for_end([parent.sentinel])
    os._exit(1)  # ffmpeg ends with it: nobody reads its pipe


def _work(
    shard: ShardPlan, out: Path, settings: DecodeSettings, expected: str | None, ruinous: Mapping[str, str]
) -> None:
    """Returns nothing: 13,320 videos' offsets need not go through a pipe, they are in the part file."""
    _end_if_stopped()
    build_shard(shard, out, settings, _tell, expected=expected, ruinous=ruinous)


def _tell(progress: Progress) -> None:
    _end_if_stopped()
    _told.put(progress)


def _end_if_stopped() -> None:
    if _stopped.is_set():
        raise BuildError("stopped")  # never seen: the first error, or Ctrl-C, is what is raised
