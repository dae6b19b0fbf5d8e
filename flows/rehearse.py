"""An embedded set by the way that official ones come: archives, a server, a download, unpacking, every video checked.

Preset smoke does so: who has seen it end knows that a fetch works on this machine, and needed no network for it. The
server is on loopback, and gone when the archives have come.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from flows.obtain import fetch_dataset
from shards import Dataset
from shards.fetch import Archive, Source


def rehearse(made: Dataset) -> Dataset:
    """The same videos, fetched into a folder beside those that were made, where they are not there already.

    Raises FetchError as shards/fetch.py does, and ValueError for a set without split lists.
    """
    if made.lists is None:
        raise ValueError(f"{made.name}: has no split lists, which an official set comes with")
    root = made.folder.parent
    # Named after what was made: of other videos, or another version's, none is taken for these.
    known = hashlib.sha256((root / "synth.json").read_bytes()).hexdigest()[:10]
    folder = root / f"fetched-{known}"
    if (folder / "videos").is_dir():  # the last thing that a fetch makes; nobody is asked for the archives then
        return fetch_dataset(str(folder), (), _source(made.name))
    for stale in root.glob("fetched-*"):
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(prefix="archives-", dir=root) as archives:
        for part, of in (("videos", made.folder), ("splits", made.lists)):
            shutil.make_archive(str(Path(archives) / f"{made.name}-{part}"), "zip", of.parent, of.name)
        with served(Path(archives)) as address:
            return fetch_dataset(str(folder), (), _source(made.name, Path(archives), address))


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


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which this machine, and no other, gets the files of `folder`, past any proxy."""
    handler = functools.partial(_Quiet, directory=str(folder))
    before = os.environ.get("no_proxy")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        serving.start()
        # urllib takes the small letters where there are both
        os.environ["no_proxy"] = ",".join(filter(None, (before or os.environ.get("NO_PROXY"), "127.0.0.1")))
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            if before is None:
                del os.environ["no_proxy"]
            else:
                os.environ["no_proxy"] = before
            server.shutdown()
            serving.join()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass
