"""What is made here, by the way that official sets and public weights come.

An embedded set goes into archives: a server, a download, unpacking, every video checked. Our own pose network is the
file that a server has: a download, its size and sum, and its tensors by the names of the public one. Preset smoke does
so, and packs and trains from what came: who has seen it end knows that a fetch works on this machine, and needed no
network for it. The server is on loopback, and gone when the files have come.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from flows.loopback import served
from flows.obtain import fetch_dataset, fetch_weights
from pasnet import registry
from pasnet.study import PoseJob
from pasnet.weights import sha256_of
from shards import Dataset
from shards.fetch import Archive, Source
from shards.unpack import FetchError


def rehearse(made: Dataset) -> Dataset:
    """The same videos, fetched into a folder beside those that were made, where they are not there already. Another
    run that does so there is waited for.

    Raises FetchError as shards/fetch.py does, OSError where the disk is in the way, and ValueError for a set without
    split lists.
    """
    if made.lists is None:
        raise ValueError(f"{made.name}: has no split lists, which an official set comes with")
    root = made.folder.parent
    # Named after what was made: of other videos, or another version's, none is taken for these.
    known = hashlib.sha256((root / "synth.json").read_bytes()).hexdigest()[:10]
    folder = root / f"fetched-{known}"
    with FileLock(root / ".rehearsal.lock"):
        whole = (folder / "videos").is_dir()  # the last thing that a fetch makes
        for left in (*root.glob("archives-*"), *root.glob("fetched-*")):  # by runs that were killed, of other videos
            if left != folder or not whole:
                shutil.rmtree(left)
        if whole:  # the archives are not wanted then
            return fetch_dataset(str(folder), (), _source(made.name))
        with tempfile.TemporaryDirectory(prefix="archives-", dir=root) as archives:
            for part, of in (("videos", made.folder), ("splits", made.lists)):
                shutil.make_archive(str(Path(archives) / f"{made.name}-{part}"), "zip", of.parent, of.name)
            with served(Path(archives)) as address, _in_our_words(made.name, ", or with data of your own"):
                return fetch_dataset(str(folder), (), _source(made.name, Path(archives), address))


def rehearse_weights(job: PoseJob) -> None:
    """Our own pose network's file at `job.weights`, fetched where it is not there already, from `job.trained`.

    Raises as `rehearse`; WeightsError where what came is not what was sent.
    """
    trained, target = Path(job.trained), Path(job.weights)
    source = registry.Source(
        title="our own pose network",
        kind="pose",
        file=trained.name,
        licence="ours",
        preprocessing=registry.OPENPOSE,
        size=trained.stat().st_size,
        sha256=sha256_of(trained),
    )
    with FileLock(f"{target.parent}.lock"):
        if target.is_file():
            if sha256_of(target) == source.sha256:
                return fetch_weights(job.title, (), source, str(target.parent))
            target.unlink()  # of a training that was done anew
        with served(trained.parent) as address, _in_our_words(job.title):
            there = dataclasses.replace(source, urls=(f"{address}/{trained.name}",))
            return fetch_weights(job.title, (), there, str(target.parent))


@contextmanager
def _in_our_words(name: str, also: str = "") -> Iterator[None]:
    """A download's own advice is for a server of somebody else's."""
    try:
        yield
    except FetchError as error:
        raise FetchError(
            f"{name}: this machine does not get files from itself: {str(error).partition('; ')[0]}; "
            f"see to that, or leave downloads alone with another preset{also}"
        ) from error


def _source(name: str, archives: Path | None = None, address: str = "") -> Source:
    """Where an embedded set comes from: the archives in a folder that is served at `address`."""
    found = []
    for part in ("videos", "splits"):
        file = f"{name}-{part}.zip"
        if archives is None:
            found.append(Archive(name=file, urls=()))
            continue
        content = (archives / file).read_bytes()
        pinned = hashlib.sha256(content).hexdigest()
        found.append(Archive(name=file, urls=(f"{address}/{file}",), size=len(content), sha256=pinned))
    return Source(name=name, videos=found[0], splits=found[1], terms="ours, from a seed", homepage="pasnet/synth.py")
