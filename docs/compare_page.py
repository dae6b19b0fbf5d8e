"""A picture of MLflow's compare page for a run's fusion styles: .venv/bin/python docs/compare_page.py [RUN] [OUT.png]

Serves RUN/mlflow.db on loopback for as long as headless Chromium takes. Not part of the package, not run in CI.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pasnet.config import ConfigError
from pasnet.results import compare
from pasnet.tracking import TrackingError

TABLE = "table-2"
# Chromium resolves *.localhost to loopback. MLflow opens its Assistant, a quarter of the page, under the plain names.
HOST = "mlflow.localhost"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
# The window is tall enough for the metrics table; the plot takes the metric that a run logged first, no URL changes it.
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-proxy-server",
    "--window-size=1600,2060",
    "--virtual-time-budget=30000",
]


class RefusedError(Exception):
    """What stands in the way, in one line."""


@contextmanager
def served(database: Path, log: Path) -> Iterator[str]:
    """The address of an MLflow server over that database; it is gone afterwards, whatever happens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://{HOST}:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{database}"]
    command += ["--allowed-hosts", f"{HOST}:{port}", "--cors-allowed-origins", address]
    off = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env={**os.environ, **off},
            start_new_session=True,
        )
    try:
        for _ in range(240):
            if server.poll() is not None or answers(f"http://127.0.0.1:{port}/health"):
                break
            time.sleep(0.5)
        else:
            raise RefusedError("MLflow's server did not answer within two minutes")
        if server.poll() is not None:
            raise RefusedError(f"MLflow's server ended: {log.read_text(errors='replace').strip().splitlines()[-1:]}")
        yield address
    finally:
        stop(server)


def answers(url: str) -> bool:
    """Whether that page can be had; asked without a proxy, since it is on this machine."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


def stop(server: subprocess.Popen[bytes]) -> None:
    """Ends the whole process group, workers too: kindly, then not."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, how)
            server.wait(timeout=10)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def take(chromium: str, url: str, out: Path, profile: Path) -> None:
    """The page as Chromium shows it once nothing moves any more."""
    command = [chromium, *FLAGS, f"--user-data-dir={profile}", f"--screenshot={out}", url]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        raise RefusedError("Chromium made no picture within five minutes") from None
    if done.returncode or not out.is_file():
        raise RefusedError(f"Chromium made no picture: {done.stderr.strip().splitlines()[-1:]}")


def main() -> int:
    """Command line; 2 where something is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/smoke-synthetic"), metavar="RUN")
    parser.add_argument("out", nargs="?", type=Path, default=Path("compare.png"), metavar="OUT.png")
    arguments = parser.parse_args()
    database, out = (arguments.run / "mlflow.db").absolute(), arguments.out.absolute()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped then too
    try:
        chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
        if chromium is None:
            raise RefusedError(f"none of {', '.join(CHROMIUM)} is installed; on Debian: apt-get install -y chromium")
        if not database.is_file():
            raise RefusedError(f"there is no {database}; make smoke writes one")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory() as temp, served(database, Path(temp) / "server.log") as address:
            page, rows, _ = compare(arguments.run, TABLE, f"sqlite:///{database}", address)
            take(chromium, page, out, Path(temp) / "profile")
    except (RefusedError, TrackingError, ConfigError) as refused:
        print(f"error: {refused}", file=sys.stderr)
        return 2
    print(f"{rows} rows of {TABLE} side by side: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
