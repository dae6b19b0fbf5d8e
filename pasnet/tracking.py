"""MLflow: the only module that imports it. Layout: one experiment per question, a parent run per table, a child run
per row x dataset x split x seed; and a run per training in "pasnet/trainings", live while it trains.

Uses MlflowClient with explicit run ids, since the fluent API's active run is per thread. Nothing here may stop a
training: `LiveRun` gives up, loudly and once, when the tracking server cannot be reached; the numbers are on disk.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pasnet.config import digest

if TYPE_CHECKING:
    from mlflow import MlflowClient

TRAININGS = "pasnet/trainings"


def default_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, else a SQLite file in `root` (MLflow's own file store is in maintenance)."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(root).absolute()}/mlflow.db"


def client(uri: str) -> MlflowClient:
    """A client for that address; telemetry off, migration messages off."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # MLflow's own defaults wait minutes for a server that is away, once per call
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    import logging

    from mlflow import MlflowClient

    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def experiment_id(mlflow: MlflowClient, name: str, uri: str) -> str:
    """The experiment's id; created where it is not, with its artifacts beside the SQLite file."""
    found = mlflow.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts" / name).as_uri()
    return str(mlflow.create_experiment(name, artifact_location=location))


def log_params(mlflow: MlflowClient, run: str, params: Mapping[str, Any]) -> None:
    """Parameters as text, in one call."""
    from mlflow.entities import Param

    mlflow.log_batch(run, params=[Param(name, str(value)) for name, value in params.items()])


def log_history(mlflow: MlflowClient, run: str, history: Iterable[Mapping[str, Any]]) -> None:
    """One step per epoch record, in one call."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    curves = [
        Metric(metric_name(name), float(value), now, int(record["epoch"]))
        for record in history
        for name, value in record.items()
        if name != "epoch"
    ]
    for start in range(0, len(curves), 1000):  # MLflow's limit for one call
        mlflow.log_batch(run, metrics=curves[start : start + 1000])


def metric_name(name: str) -> str:
    """test_top1 -> test/top1, so that the UI groups curves."""
    return name.replace("_", "/", 1) if name.startswith(("train_", "test_")) else name


class LiveRun:
    """A training's own run: parameters at the start, metrics per epoch. Off when `uri` is empty."""

    def __init__(self, uri: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        self.id = ""
        self._client: MlflowClient | None = None
        if not uri:
            return
        try:
            mlflow = client(uri)
            experiment = experiment_id(mlflow, TRAININGS, uri)
            self.id = mlflow.create_run(experiment, run_name=name, tags=dict(tags)).info.run_id
            log_params(mlflow, self.id, params)
            self._client = mlflow
        except Exception as error:  # any failure of tracking, of any kind, must leave the training alone
            self._give_up(error)

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Logs one epoch's record."""
        if self._client is None:
            return
        try:
            log_history(self._client, self.id, [record])
        except Exception as error:
            self._give_up(error)

    def finish(self, status: str = "FINISHED") -> None:
        """Ends the run with MLflow's word for how: FINISHED or FAILED."""
        if self._client is None:
            return
        try:
            self._client.set_terminated(self.id, status)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._client = None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        print(f"MLflow is not reachable ({reason}); training goes on, its numbers are in history.json", file=sys.stderr)


def record_rows(
    uri: str, results: Iterable[Mapping[str, Any]], *, experiments: Mapping[str, str], study: Mapping[str, str]
) -> dict[str, str]:
    """Writes a parent run per table and a child per result, unless a child with the same result is there already.

    `results` are the records of pasnet/results.py, `experiments` maps tables to experiment names, `study` holds tags
    that all runs share. Returns {record id: child run id}.
    """
    mlflow = client(uri)
    children: dict[str, str] = {}
    by_table: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        by_table.setdefault(result["table"], []).append(result)
    for table, rows in by_table.items():
        experiment = experiment_id(mlflow, experiments[table], uri)
        parent = _find(mlflow, experiment, {"study": study["study"], "table": table, "kind": "table"})
        if parent is None:
            tags = {**study, "table": table, "kind": "table"}
            parent = mlflow.create_run(experiment, run_name=f"{table}, {study['folder']}", tags=tags).info.run_id
        for result in rows:
            # the id holds a digest of the numbers: a row that was trained anew becomes a new run
            child = _find(mlflow, experiment, {"study": study["study"], "result": digest(result["id"])})
            children[result["id"]] = child or _record(mlflow, experiment, parent, result, study)
        mlflow.log_dict(parent, {"results": [dict(row) for row in rows]}, "results.json")
        mlflow.set_terminated(parent)
    return children


def _record(
    mlflow: MlflowClient, experiment: str, parent: str, result: Mapping[str, Any], study: Mapping[str, str]
) -> str:
    tags = {
        **study,
        "mlflow.parentRunId": parent,
        "mlflow.note.content": result["note"],
        "kind": "row",
        "result": digest(result["id"]),
        "commit": result["commit"],
        **{name: str(result[name]) for name in ("table", "title", "strategy", "dataset", "split", "seed")},
        "paper_top1": str(result["paper_top1"]),
        "shards.digest": result["shard_digest"],
    }
    name = f"{result['title']}  {result['dataset']}/{result['split']}  K{result['num_segments']}  seed{result['seed']}"
    run: str = mlflow.create_run(experiment, run_name=name, tags=tags).info.run_id
    log_params(mlflow, run, result["params"])
    # The final numbers first: MLflow's compare page opens with the metric that a run logged first. At the last epoch's
    # step, since the UI shows the value of the highest step.
    for metric, value in result["metrics"].items():
        mlflow.log_metric(run, metric, value, step=len(result["history"]))
    log_history(mlflow, run, result["history"])
    for path in result["artifacts"]:
        several = len(result["trainings"]) > 1  # the networks of an ensemble: files of the same names
        mlflow.log_artifact(
            run, path, next(Path(t).name for t in result["trainings"] if t in path) if several else None
        )
    mlflow.set_terminated(run)
    return run


def _find(mlflow: MlflowClient, experiment: str, tags: Mapping[str, str]) -> str | None:
    words = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    if tags.get("kind") != "table":  # a table's run is taken up again; a row's that broke off is made anew
        words += " and attributes.status = 'FINISHED'"
    found = mlflow.search_runs([experiment], words, max_results=1)
    return str(found[0].info.run_id) if found else None
