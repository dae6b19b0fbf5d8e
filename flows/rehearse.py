"""An embedded set by the way that official ones come: archives, a server, a download, unpacking, every video checked.

Preset smoke does so: who has seen it end knows that a fetch works on this machine, and needed no network for it. The
server is on loopback, and gone when the archives have come.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock

from flows.loopback import served
from flows.obtain import fetch_dataset
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
            with served(Path(archives)) as address:
                try:
                    return fetch_dataset(str(folder), (), _source(made.name, Path(archives), address))
                except FetchError as error:  # its advice is for a server of somebody else's
                    raise FetchError(
                        f"{made.name}: this machine does not get files from itself: {str(error).partition('; ')[0]}; "
                        "see to that, or leave downloads alone with another preset, or with data of your own"
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
