"""This machine as a server to itself, past any proxy."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import getproxies_environment


def spare_loopback() -> None:
    """Excepts this machine from the environment's proxies, in `no_proxy`. Nothing is changed where there is none, or
    where all addresses are excepted."""
    given = getproxies_environment()
    excepted = given.pop("no", "")
    if given and excepted.strip() != "*":
        os.environ["no_proxy"] = ",".join(filter(None, (excepted, "127.0.0.1", "localhost")))


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which this machine, and no other, gets the files of `folder`."""
    before = os.environ.get("no_proxy")
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder))) as server:
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        serving.start()
        spare_loopback()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            if before is None:
                os.environ.pop("no_proxy", None)
            else:  # at once: other threads may be looking
                os.environ["no_proxy"] = before
            server.shutdown()
            serving.join()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass
