"""The command `pasnet`: each sub-command reads its arguments and calls the function that the flow calls too.

Imports happen inside the sub-commands, so that `pasnet --help` does not wait for torch. Errors of our own are
messages: one line and exit code 2 for what the user can mend, 1 for a run that failed. Anything else is a bug and
keeps its traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pasnet.config import ConfigError

if TYPE_CHECKING:
    from pasnet.experiments import Row
    from pasnet.study import Study


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code."""
    # GNU OpenMP's threads wait for each other by spinning. Where something else wants a core (a loader, another run)
    # that makes a small network six times slower; a short spin makes it two times. Must be set before torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["shards"]:  # a package of its own, with a command line of its own
        from shards.cli import parser

        arguments = parser("pasnet shards").parse_args(argv[1:])
    else:
        arguments = _parser().parse_args(argv)
    return call(arguments.run, arguments)


def call(run: Any, arguments: argparse.Namespace) -> int:
    """Runs a sub-command; our own errors become one line on stderr and an exit code."""
    try:
        run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `pasnet list | head`; anything longer has not been finished
        return 0 if run in (_list, _plan, _report) else 1
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        # a loader process's error comes as text alone
        name = error.name or str(error).rpartition("No module named ")[2].strip().strip("'")
        if name.split(".")[0] in ("pasnet", "shards", "flows"):
            raise
        print(f"error: this needs the package {name}, which is not installed", file=sys.stderr)
        return 1
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("pasnet", "shards", "flows"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2 if isinstance(error, ValueError) else 1)
    return 0


def overrides(pairs: Sequence[str]) -> dict[str, str]:
    """["optim.epochs=2"] -> {"optim.epochs": "2"}. Raises ConfigError for anything else."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set takes name=value, got {pair!r}")
        found[name.strip()] = value.strip()
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pasnet", description="PAS-Net: shards, training, evaluation, results.")
    commands = parser.add_subparsers(required=True, metavar="command")

    synth = commands.add_parser(
        "synth", help="write the synthetic dataset: .avi files in UCF-101's layout, or HMDB-51's"
    )
    synth.add_argument("--out", type=Path, required=True)
    synth.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="such as num_classes=6, groups=10"
    )
    synth.add_argument("--workers", type=int, default=2)
    synth.set_defaults(run=_synth)

    commands.add_parser("shards", help="videos to WebDataset shards: fetch, build, verify, repair, inspect, stats")

    _weights_parser(commands.add_parser("weights", help="public weights: fetch, convert, inspect"))

    listing = commands.add_parser("list", help="the paper's rows: what is run and what the paper printed")
    listing.add_argument("--tables", nargs="*", default=[])
    listing.add_argument("--cost", action="store_true", help="parameters, GMACs, memory per clip, measured clips/s")
    listing.add_argument("--json", action="store_true", help="as JSON, for programs")
    listing.set_defaults(run=_list)

    planned = commands.add_parser(
        "plan", help="what a study would do: trainings in order, work, hours, disk; runs nothing"
    )
    study_arguments(planned, preset="full")
    planned.add_argument(
        "--clips-per-second",
        type=float,
        help="training rate of the paper's PAS-Net (best style, K = 8, 224 px), where none was measured",
    )
    planned.add_argument("--on", metavar="DEVICE", help="plan for another machine: a name in benchmarks/results/*.json")
    planned.add_argument("--json", action="store_true", help="as JSON, for programs")
    planned.set_defaults(run=_plan)

    train = commands.add_parser("train", help="one training; started again, it goes on where it was")
    train.add_argument("--config", type=Path, help="a config.json; else give --shards")
    train.add_argument("--shards", type=Path)
    train.add_argument("--preset", default="full", help="full (the paper's size) or smoke (CPU)")
    train.add_argument("--fusion", default="A", help='style as in Table II, such as "A" (ECO) or "Conv(A,I)"')
    train.add_argument("--parent", default="", help="last.pt of the ECO finetune: twice-finetune")
    train.add_argument("--eco-weights", default="")
    train.add_argument("--pose-weights", default="")
    train.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="such as optim.epochs=2")
    train.add_argument("--out", type=Path, required=True)
    train.add_argument("--title", default="", help="name of the MLflow run")
    train.add_argument(
        "--tracking-uri",
        default="",
        metavar="URI",
        help="MLflow address, or off; default: MLFLOW_TRACKING_URI, else mlflow.db beside the folder of --out",
    )
    train.add_argument(
        "--log-model",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether the trained network goes to MLflow as a model: at the paper's size 150 to 360 MB, and up to a "
        "minute or two for its export",
    )
    train.set_defaults(run=_train)

    pose = commands.add_parser("pose-train", help="our own start of the pose network, from the joints of pasnet synth")
    pose.add_argument("--shards", type=Path, required=True)
    pose.add_argument("--joints", type=Path, required=True, help="joints.parquet of the same videos")
    pose.add_argument("--config", type=Path, help="a config.json of PoseTrainConfig; default: its defaults")
    pose.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="such as width=0.25, steps=500")
    pose.add_argument("--out", type=Path, required=True)
    pose.set_defaults(run=_pose_train)

    evaluate = commands.add_parser("evaluate", help="test-list accuracy and saved predictions of a checkpoint")
    evaluate.add_argument("--checkpoint", type=Path, required=True)
    evaluate.add_argument("--shards", type=Path, required=True)
    evaluate.add_argument("--out", type=Path, required=True)
    evaluate.set_defaults(run=_evaluate)

    ensemble = commands.add_parser("ensemble", help="averages saved predictions of networks that saw the same videos")
    ensemble.add_argument("predictions", type=Path, nargs="+", metavar="PRED.parquet", help="of pasnet evaluate")
    ensemble.add_argument("--mean", choices=("softmax", "logits"), default="softmax", help="what is averaged")
    ensemble.add_argument("--out", type=Path, required=True)
    ensemble.set_defaults(run=_ensemble)

    _track_parser(commands.add_parser("track", help="MLflow: send what a server that was away has not got"))

    compare = commands.add_parser(
        "compare", help="MLflow's page that sets the rows of a table side by side: its address"
    )
    compare.add_argument("study", type=Path, help="folder of a study that has ended")
    compare.add_argument("--table", default="table-2", help="default: table-2, the fusion styles")
    compare.add_argument(
        "--tracking-uri", default="", metavar="URI", help="default: MLFLOW_TRACKING_URI, or the study's"
    )
    compare.add_argument("--address", default="", metavar="URL", help="where MLflow's pages are, if not there")
    compare.add_argument("--open", action="store_true", help="open it in the browser too")
    compare.set_defaults(run=_compare)

    report = commands.add_parser("report", help="RESULTS.md and an HTML page from finished studies")
    report.add_argument("studies", type=Path, nargs="+", help="folders with a results.json")
    report.add_argument("--out", type=Path, default=Path("RESULTS.md"), help="the HTML page lies beside it, as .html")
    report.set_defaults(run=_report)
    return parser


def study_arguments(parser: argparse.ArgumentParser, preset: str) -> None:
    """The options that say which study: `study_of` reads them."""
    parser.add_argument("--preset", default=preset, help=f"full (the paper's size) or smoke (CPU); default: {preset}")
    parser.add_argument(
        "--data", action="append", default=[], help="folder, synthetic or synthetic-hmdb; again for more"
    )
    parser.add_argument("--out", default="", help="folder of everything that is written")
    parser.add_argument(
        "--tables",
        nargs="*",
        default=[],
        help="table-1 to table-5, figure-2, and of ours strategies and equal-epochs; default: the preset's",
    )
    parser.add_argument("--fusions", nargs="*", default=[], help="styles as in Table II; default: the preset's")
    parser.add_argument("--splits", nargs="*", default=["1"], metavar="SPLIT", help="of 1, 2 and 3, or all; default: 1")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--num-segments", type=int, help="K for every row instead of the paper's")
    known = "a checkpoint, or a name that `pasnet weights fetch` lists"
    parser.add_argument("--eco-weights", default="", help=f"of ECO-Lite: {known}")
    parser.add_argument("--pose-weights", default="", help=f"of OpenPose's body network: {known}")
    parser.add_argument(
        "--pretrain", default="", help="D0 to learn from beforehand: synthetic, a folder, none; default: the preset's"
    )
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="such as optim.epochs=2")


def study_of(arguments: argparse.Namespace, *, data: Sequence[str], out: str, coming: bool = False) -> Study:
    """The study that was asked for; `data` and `out` where the command line has none; `coming` as there. Raises
    ConfigError."""
    from pasnet.study import Study, public_weights

    return Study(
        data=tuple(arguments.data or data),
        out=arguments.out or out,
        preset=arguments.preset,
        tables=tuple(arguments.tables),
        fusions=tuple(arguments.fusions),
        splits=_splits(arguments.splits),
        seeds=tuple(arguments.seeds),
        num_segments=arguments.num_segments,
        eco_weights=public_weights(arguments.eco_weights),
        pose_weights=public_weights(arguments.pose_weights),
        pretrain=arguments.pretrain,
        overrides=overrides(arguments.set),
        coming=coming,
    )


def _splits(given: Sequence[str]) -> tuple[int, ...]:
    if list(given) == ["all"]:
        return (1, 2, 3)
    if not all(split.isdigit() for split in given):
        raise ConfigError(f"--splits takes 1, 2 and 3, or all, got {' '.join(given)}")
    return tuple(map(int, given))


def default_out(preset: str, data: Sequence[str]) -> str:
    """The folder of a study that was given none: runs/PRESET-DATASETS, or runs/PRESET-synthetic for embedded ones."""
    from pasnet.study import EMBEDDED, EMBEDDED_SETS

    names = [Path(source).name for source in data if source not in EMBEDDED_SETS]
    embedded = [EMBEDDED] if len(names) < len(data) else []
    return f"runs/{preset}-{'-'.join(embedded + names)}"


def _plan(arguments: argparse.Namespace) -> None:
    from pasnet.planning import lines, plan
    from pasnet.study import default_data

    # without options, of the deployment "full-reproduction"; else of what `python -m flows` would do
    alone = arguments.preset == "full" and not arguments.data
    data = ["data/ucf101", "data/hmdb51"] if alone else arguments.data or default_data(arguments.preset)
    out = "runs/full-reproduction" if alone else default_out(arguments.preset, data)
    study = study_of(arguments, data=data, out=out)
    found = plan(study, clips_per_second=arguments.clips_per_second, on=arguments.on)
    print(json.dumps(found, indent=1) if arguments.json else "\n".join(lines(found)))


def _track_parser(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="command")

    send = commands.add_parser("send", help="send what the journals in run folders hold; what was sent is not repeated")
    send.add_argument("folders", type=Path, nargs="+", metavar="RUNFOLDER", help="of a training, or of a study")
    send.add_argument(
        "--tracking-uri",
        default="",
        metavar="URI",
        help="default: MLFLOW_TRACKING_URI, else the one that the training was given",
    )
    send.set_defaults(run=_track_send)


def _weights_parser(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="command")

    fetch = commands.add_parser("fetch", help="download public weights, or take over a file; without a name, list them")
    fetch.add_argument("name", nargs="?")
    fetch.add_argument("--out", type=Path, default=Path("weights"), help="folder (default: weights)")
    fetch.add_argument("--have", type=Path, metavar="FILE", help="downloaded by hand; it is checked and copied")
    fetch.add_argument("--mirror", action="append", default=[], metavar="URL", help="tried first, as URL/<file name>")
    fetch.set_defaults(run=_weights_fetch)

    convert = commands.add_parser("convert", help="a checkpoint or .caffemodel as safetensors, its origin recorded")
    convert.add_argument("inputs", type=Path, nargs="+", metavar="IN")
    convert.add_argument("--kind", required=True, help="eco, eco-full, pose, bninception, c3d; eco-init: the last two")
    convert.add_argument("--out", type=Path, required=True, help="ends in .safetensors")
    convert.set_defaults(run=_weights_convert)

    inspect = commands.add_parser("inspect", help="what a weights file is; fails where it cannot be used")
    inspect.add_argument("file", type=Path)
    inspect.set_defaults(run=_weights_inspect)


def _weights_fetch(arguments: argparse.Namespace) -> None:
    if not arguments.name:
        from pasnet.registry import REGISTRY

        for name, source in REGISTRY.items():
            print(f"{name:24} {source.title}; {source.licence}\n{'':24} {', '.join(source.where)}")
        return
    from pasnet.download import fetch
    from shards.cli import bytes_progress

    with bytes_progress() as report:
        found = fetch(arguments.name, arguments.out, have=arguments.have, mirrors=arguments.mirror, progress=report)
    print("\n".join(found.lines))


def _weights_convert(arguments: argparse.Namespace) -> None:
    from pasnet.weights import convert

    origin = convert(arguments.inputs, arguments.kind, arguments.out)
    print(f"{arguments.out}: {origin.kind} from {', '.join(origin.source)}; {origin.licence}")


def _weights_inspect(arguments: argparse.Namespace) -> None:
    from pasnet.weights import WeightsError, inspect

    found = inspect(arguments.file)
    print("\n".join(found.lines))
    if found.problems:
        more = f" and {len(found.problems) - 10} more" if len(found.problems) > 10 else ""
        raise WeightsError(f"{arguments.file}: cannot be used: {'; '.join(found.problems[:10])}{more}")


def _synth(arguments: argparse.Namespace) -> None:
    from pasnet.config import from_dict
    from pasnet.synth import SynthConfig, generate
    from shards import ffmpeg_exe

    config = from_dict(SynthConfig, overrides(arguments.set))
    print(generate(arguments.out, config, ffmpeg=ffmpeg_exe(), workers=arguments.workers))


def _list(arguments: argparse.Namespace) -> None:
    from pasnet.experiments import QUOTED, select_rows, trainings
    from pasnet.report import of_two

    rows = select_rows(arguments.tables)
    if arguments.cost:
        _list_cost(rows, arguments.json)
        return
    if arguments.json:
        print(json.dumps([{"name": row.name, **asdict(row)} for row in rows], indent=1))
        return
    wide = {name: max(len(getattr(row, name)) for row in rows) for name in ("table", "dataset", "title", "strategy")}
    for row in rows:
        k = ",".join(map(str, row.num_segments))
        paper = of_two(row.paper_top1, row.paper_top5)
        said = " ".join(f"{getattr(row, name):{width}}" for name, width in wide.items())
        said += f" K={k:15} paper {paper:13}"
        print(said + (f" {row.protocol}" if row.paper_top1 is not None else "").rstrip())
    tables = {row.table for row in rows}
    for quoted in (of for of in QUOTED if of.table in tables):
        print(
            f"{quoted.table:{wide['table']}} {quoted.dataset:{wide['dataset']}} "
            f"quoted by the paper, not run: {quoted.what}"
        )
    print(f"{len(rows)} rows, {len(trainings(rows))} trainings per split and seed")


def _list_cost(rows: Sequence[Row], as_json: bool) -> None:
    from pasnet.costing import cost_line, cost_rows, measured_speeds
    from pasnet.machine import hardware

    speeds = measured_speeds()
    found = cost_rows(rows, speeds)
    if as_json:
        print(json.dumps({"hardware": hardware(), "rows": found}, indent=1))
        return
    for row in found:
        print(cost_line(row))
    print("GB: kept per clip for the backward pass, fp32; in full / with checkpoint_pose / with freeze_pose")
    print(f"clips/s: evaluation on {hardware()}" + ("" if speeds else "; run `python -m benchmarks.model_speed`"))


_NOT_WITH_CONFIG = {  # options that make a config, and their defaults
    "shards": None,
    "preset": "full",
    "fusion": "A",
    "parent": "",
    "eco_weights": "",
    "pose_weights": "",
}


def _train(arguments: argparse.Namespace) -> None:
    from pasnet.config import (
        DataConfig,
        FusionConfig,
        InitConfig,
        ModelConfig,
        TrainConfig,
        flatten,
        from_dict,
        fusion_style,
        replace,
        to_dict,
    )
    from pasnet.experiments import PRESETS, fitting
    from pasnet.study import Shards

    if arguments.config:
        if not arguments.config.is_file():
            raise ConfigError(f"{arguments.config}: no such file")
        given = {name: getattr(arguments, name) for name in _NOT_WITH_CONFIG}
        unused = [f"--{name.replace('_', '-')}" for name, value in given.items() if value != _NOT_WITH_CONFIG[name]]
        if unused:
            raise ConfigError(f"{arguments.config} says all of {', '.join(unused)}; change it there, or with --set")
        try:
            values = json.loads(arguments.config.read_text("utf-8"))
        except ValueError as error:
            raise ConfigError(f"{arguments.config}: not JSON ({error})") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{arguments.config}: not a config; expected an object with model, data, optim ...")
        config = from_dict(TrainConfig, values)
    elif arguments.shards:
        if arguments.preset not in PRESETS:
            raise ConfigError(f"unknown preset {arguments.preset!r} (one of: {', '.join(PRESETS)})")
        if not (arguments.shards / "manifest.json").is_file():
            raise ConfigError(f"{arguments.shards}: not a finished shard folder; run `pasnet shards build`")
        size = PRESETS[arguments.preset]
        config = TrainConfig(
            model=ModelConfig(
                num_classes=Shards.of(arguments.shards).num_classes,
                fusion=FusionConfig(style=arguments.fusion),
                width=size.width,
            ),
            data=DataConfig(shards=str(arguments.shards), input_size=size.input_size),
            optim=size.eco_optim if fusion_style(arguments.fusion) == "A" else size.optim,
            init=InitConfig(eco=arguments.eco_weights, pose=arguments.pose_weights, parent=arguments.parent),
        )
    else:
        raise ConfigError("give --config FILE or --shards FOLDER")
    changes = overrides(arguments.set)
    config = replace(config, changes)
    if "optim.micro_batch" not in changes and not arguments.config:
        optim = fitting(config.optim, config.model, config.data.num_segments)
        config = replace(config, {"optim.micro_batch": optim.micro_batch})

    from pasnet.tracking import LiveRun, default_uri, lineage
    from pasnet.train import train

    with LiveRun(
        arguments.tracking_uri or default_uri(arguments.out.absolute().parent),
        arguments.out,
        arguments.title or f"{config.model.fusion.style}, K={config.data.num_segments}",
        flatten(to_dict(config)),
        {"out": str(arguments.out)},
        dataset=lineage(Path(config.data.shards), config.data.split),
        log_model=arguments.log_model,
    ) as live:
        result = train(config, arguments.out, live.epoch)
    _say(f"last epoch: test top-1 {result['last']['test_top1']:.2f} %  ({arguments.out / 'last.pt'})")


def _pose_train(arguments: argparse.Namespace) -> None:
    from pasnet.config import PoseTrainConfig, from_dict, replace
    from pasnet.pose_train import WEIGHTS, train_pose

    values: dict[str, Any] = {}
    if arguments.config:
        if not arguments.config.is_file():
            raise ConfigError(f"{arguments.config}: no such file")
        try:
            values = json.loads(arguments.config.read_text("utf-8"))
        except ValueError as error:
            raise ConfigError(f"{arguments.config}: not JSON ({error})") from None
    config = replace(from_dict(PoseTrainConfig, values), dict(overrides(arguments.set)))
    found = train_pose(config, arguments.shards, arguments.joints, arguments.out)
    print(
        f"{arguments.out / WEIGHTS}: {100 * found['within_a_cell']:.1f} % of the visible joints of held-out groups "
        f"within a cell; heat maps' L2 {found['heat_l2']:.4f} (of zeros {found['heat_l2_zero']:.4f}, of the mean "
        f"{found['heat_l2_mean']:.4f})"
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    from pasnet.train import evaluate_checkpoint

    numbers = evaluate_checkpoint(arguments.checkpoint, arguments.shards, arguments.out)
    _say(_accuracy(numbers))


def _say(line: str) -> None:
    """Prints, of torchrun's processes in the first one only."""
    if os.environ.get("RANK", "0") == "0":
        print(line)


def _accuracy(numbers: dict[str, float]) -> str:
    return (
        f"top-1 {numbers['top1']:.2f} %  top-5 {numbers['top5']:.2f} %  mean class {numbers['mean_class']:.2f} %  "
        f"95 % interval {numbers['top1_low']:.1f} to {numbers['top1_high']:.1f}  ({numbers['videos']} videos)"
    )


def _ensemble(arguments: argparse.Namespace) -> None:
    from pasnet.predictions import Predictions, ensemble, metrics, write_evaluation

    out = arguments.out.resolve()
    if taken := [path for path in arguments.predictions if path.resolve().parent == out]:
        raise ConfigError(f"--out {arguments.out}: holds {taken[0].name}, a member, which it would replace")
    members = [Predictions.load(path) for path in arguments.predictions]
    fused = ensemble(members, arguments.mean, names=[str(path) for path in arguments.predictions])
    for path, member in zip(arguments.predictions, members, strict=True):
        print(f"{path}: {_accuracy(metrics(member))}")
    numbers = write_evaluation(fused, fused.names, arguments.out)
    print(f"{arguments.out}, mean of {arguments.mean}: {_accuracy(numbers)}")


def _track_send(arguments: argparse.Namespace) -> None:
    from pasnet.results import send

    print("\n".join(send(arguments.folders, arguments.tracking_uri)))


def _compare(arguments: argparse.Namespace) -> None:
    from pasnet.results import compare

    page, rows, first = compare(arguments.study, arguments.table, arguments.tracking_uri, arguments.address)
    print(
        f"{rows} rows of {arguments.table} side by side" + (f"; first, in another terminal: {first}" if first else "")
    )
    print(page)
    if arguments.open:
        import webbrowser

        if not webbrowser.open(page):
            print("no browser to open it in", file=sys.stderr)


def _report(arguments: argparse.Namespace) -> None:
    from pasnet.page import html_page
    from pasnet.report import results_page

    studies = []
    for folder in arguments.studies:
        path = folder / "results.json"
        if not path.is_file():
            raise ConfigError(f"{path}: missing; it is written when a study ends")
        studies.append(json.loads(path.read_text("utf-8")))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(results_page(studies), "utf-8")
    page = arguments.out.with_suffix(".html")
    page.write_text(html_page(studies, arguments.studies), "utf-8")
    print(f"{arguments.out}\n{page}")
