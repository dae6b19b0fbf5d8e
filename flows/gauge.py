"""How far something is, as a progress artifact of Prefect's."""

from __future__ import annotations

from typing import Any

from prefect.artifacts import create_progress_artifact, update_progress_artifact


class Gauge:
    """Call it with the percentage. A server of Prefect's that does not take an artifact stops no work: a line says so,
    once until it takes one again."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.artifact: Any = None
        self.failed = False

    def __call__(self, percent: float) -> None:
        """Shows `percent`, 0 to 100."""
        try:
            if self.artifact is None:
                self.artifact = create_progress_artifact(percent, description=self.what)
            else:
                update_progress_artifact(self.artifact, percent)
            self.failed = False
        except Exception as error:  # whatever the API, the network or Prefect's client raises
            if not self.failed:
                print(f"  {self.what}: Prefect does not show it ({type(error).__name__}: {error})", flush=True)
            self.failed = True
