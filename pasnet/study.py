"""The whole study without an orchestrator: what is run, and in which folder.

`flows/` wraps these functions, and those of execute.py and results.py, in Prefect tasks. Every step is idempotent: its
result lies in a folder named by a digest of all that decides it, and a step whose result is there returns at once.

    out/data/<name>/                embedded synthetic videos
    out/pose/<name>-<digest>/       our own pose network: pose.safetensors, quality.json, last.pt, pose.log, and with
                                    preset smoke fetched/pose.safetensors, the same
    out/shards/<dataset>/           shards (shards/README.md)
    out/trainings/<name>-<digest>/  one per training: config.json, last.pt, history.json, done.json, train.log,
                                    evaluation/{metrics.json, predictions.parquet, per_class.csv, confusion.png}
    out/results.json                one record per row x dataset x split x seed
    out/RESULTS.md, report.html     the pages made from them; figures/ has the pictures of Fig. 3
    out/mlflow.db, mlartifacts/     tracking, unless MLFLOW_TRACKING_URI says otherwise
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pasnet.config import (
    FUSION_TITLES,
    ConfigError,
    DataConfig,
    FusionConfig,
    InitConfig,
    ModelConfig,
    PoseTrainConfig,
    TrainConfig,
    digest,
    from_dict,
    fusion_style,
    replace,
    to_dict,
)
from pasnet.experiments import (
    EXTRA_TABLES,
    PRESETS,
    ROWS,
    STRATEGIES,
    TABLE_K,
    Preset,
    Row,
    Source,
    Training,
    fitting,
    in_order,
    lengthened,
    select_rows,
    trainings_of,
)
from pasnet.registry import REGISTRY

if TYPE_CHECKING:  # it wants numpy and ffmpeg-python
    from pasnet.synth import SynthConfig

# These names stand for embedded datasets wherever a dataset folder is asked for.
EMBEDDED = "synthetic"
EMBEDDED_HMDB = "synthetic-hmdb"  # in HMDB-51's layout, which it stands in for, from a seed of its own
EMBEDDED_SETS = (EMBEDDED, EMBEDDED_HMDB)
NOTHING = "none"  # for `pretrain`: no D0, whatever the preset says
OFFICIAL = ("ucf101", "hmdb51")  # the paper's
AT_ANY_K = ("table-1", "table-2", *EXTRA_TABLES)  # tables that are about something else than K
WEIGHTS = "weights"  # the folder of public weights that are given by name
SIZES = {"model.width": "width", "data.input_size": "input_size"}  # the pose network's, where they are overridden
POSE = "pose."  # what overrides of its training start with; its width and input size stay the networks'
# Weights from D0 stand in for public ones: there is one set of them, whatever splits and seeds D1 is run on.
D0_SPLIT, D0_SEED = 1, 0


def default_data(preset: str) -> tuple[str, ...]:
    """The datasets of a study that names none."""
    return PRESETS[preset].data if preset in PRESETS else (EMBEDDED,)  # an unknown one is refused by Study


def public_weights(given: str) -> str:
    """The file that `given` names: a name of pasnet/registry.py stands for its file in weights/, whether it is there
    or not; all else for itself."""
    known = given in REGISTRY and not Path(given).is_file()
    return str(Path(WEIGHTS) / REGISTRY[given].file) if known else given


def _is_public(path: str) -> bool:
    return any(Path(path) == Path(WEIGHTS) / source.file for source in REGISTRY.values())


@dataclass(frozen=True, kw_only=True)
class Study:
    """What the user asked for. Raises ConfigError for anything that cannot be run, before anything runs."""

    data: tuple[str, ...] = ()  # dataset folders, or of EMBEDDED_SETS; empty: the preset's
    out: str = "runs/study"
    preset: str = "full"
    tables: tuple[str, ...] = ()  # empty: the preset's
    fusions: tuple[str, ...] = ()  # empty: the preset's
    splits: tuple[int, ...] = (1,)
    seeds: tuple[int, ...] = (0,)
    num_segments: int | None = None  # K for every row instead of the paper's
    eco_weights: str = ""
    pose_weights: str = ""
    pretrain: str = ""  # D0: EMBEDDED (another one, larger), a folder of videos or of shards, NOTHING; "": the preset's
    overrides: Mapping[str, Any] = field(default_factory=dict)  # {"optim.epochs": 2}; {"pose.steps": 500}, see POSE
    coming: bool = False  # public weights are fetched before it starts: a plan counts on them

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ConfigError(f"unknown preset {self.preset!r} (one of: {', '.join(PRESETS)})")
        if not self.data:
            object.__setattr__(self, "data", default_data(self.preset))
        if not self.splits or not self.seeds:
            raise ConfigError("splits and seeds must name at least one each")
        if any(split not in (1, 2, 3) for split in self.splits):
            raise ConfigError(f"splits are 1, 2 and 3, got {', '.join(map(str, self.splits))}")
        if any(seed < 0 for seed in self.seeds):
            raise ConfigError(f"seeds must be at least 0, got {', '.join(map(str, self.seeds))}")
        if self.num_segments is not None and self.num_segments < 1:
            raise ConfigError(f"num_segments (K) must be at least 1, got {self.num_segments}")
        for path in (self.eco_weights, self.pose_weights):
            if path and not Path(path).is_file() and not (self.coming and _is_public(path)):
                names = [name for name, source in REGISTRY.items() if Path(path).name == source.file]
                fix = f"; `pasnet weights fetch {names[0]}` downloads it" if names else ""
                raise ConfigError(f"{path}: no such weights file{fix}")
        if self.pretrain not in ("", EMBEDDED, NOTHING) and not Path(self.pretrain).is_dir():
            raise ConfigError(
                f"pretrain: no folder {self.pretrain}; give one of videos or of shards, {EMBEDDED} or {NOTHING}"
            )
        if self.k is not None and {row.table for row in self.rows} - set(AT_ANY_K):
            raise ConfigError(
                "num_segments replaces the paper's K, which tables 3, 4, 5 and figure 2 are about; "
                f"give it with tables {', '.join(AT_ANY_K)}"
            )
        for name in self.overrides:
            if name.startswith(
                ("model.num_classes", "model.fusion.style", "data.shards", "data.split", "init.", "seed")
            ) or name in [f"{POSE}{size}" for size in (*SIZES.values(), "split")]:
                raise ConfigError(f"{name} is set by the study itself; use its own parameter")
            if name == "data.num_segments":
                raise ConfigError("set K with num_segments, not with data.num_segments")
        asked = [name for name in self.overrides if name.startswith(POSE)]
        if asked and not (self.d0 and self.needs_pose_weights):
            raise ConfigError(f"{asked[0]}: this study trains no pose network of its own")
        self.pose_config  # noqa: B018  raises for an override that is none
        for row in self.rows:  # every config that will be made, at the sizes that it will have
            for training in in_order(self.at_k(trainings_of(row, row.dataset, self.source(row, "-")))):
                self.config_of(training, num_classes=2, shards="-", split=1, seed=0, parent="")

    @property
    def size(self) -> Preset:
        """The preset's values."""
        return PRESETS[self.preset]

    @property
    def k(self) -> int | None:
        """K for every row instead of the paper's, or None."""
        return self.num_segments or self.size.num_segments

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows of the paper that were asked for; where none were, the preset's."""
        chosen = self.tables or self.fusions or self.num_segments or set(self.data) != set(self.size.data)
        also = () if chosen else tuple(row for row in ROWS if row.name in self.size.also)
        found = select_rows(self.tables or self.size.tables, self.fusions or self.size.fusions)
        return (*found, *(row for row in also if row not in found))

    @property
    def narrowed(self) -> str:
        """What the preset leaves out of tables that were asked for, in words; "" where it leaves nothing out."""
        if not self.tables or self.fusions or not self.size.fusions:
            return ""
        left = len(select_rows(self.tables)) - len(self.rows)
        styles = ", ".join(FUSION_TITLES[fusion_style(name)] for name in self.size.fusions)
        return f"preset {self.preset} has the styles {styles}; {left} rows of other styles are left out" if left else ""

    @property
    def d0(self) -> str:
        """Where D0 is, as `pretrain`; "" where the study has none, or no use for it."""
        given = self.pretrain or self.size.pretrain
        wanted = not self.eco_weights or self.needs_pose_weights or any(map(_needs_d0, self.rows))
        return given if given != NOTHING and wanted else ""

    @property
    def needs_pose_weights(self) -> bool:
        """Whether some row has a pose network, and nothing public to start it from."""
        models = (FusionConfig(style=row.fusion) for row in self.rows)
        return not self.pose_weights and any(ModelConfig(num_classes=1, fusion=each).needs_pose for each in models)

    @property
    def pose_config(self) -> PoseTrainConfig:
        """Of our own pose network's training: the preset's at the networks' sizes, and what overrides say of it."""
        sizes = {"width": self.size.width, "input_size": self.size.input_size}
        sizes |= {name: value for key, name in SIZES.items() if (value := self.overrides.get(key)) is not None}
        own = {name.removeprefix(POSE): value for name, value in self.overrides.items() if name.startswith(POSE)}
        config: PoseTrainConfig = replace(self.size.pose, own | sizes)
        return config

    @property
    def joints(self) -> Path | None:
        """The joints.parquet of D0, which our own pose network is trained on; None where it has none."""
        if self.d0 == EMBEDDED:
            return self.root / "data" / D0_EMBEDDED / "joints.parquet"
        path = Path(self.d0) / "joints.parquet"
        return path if self.d0 and path.is_file() else None

    def source(self, row: Row, dataset: str | None) -> Source | None:
        """D0 as far as a row's trainings start from it; `dataset` is its name. Public ECO weights take its place, but
        in a strategy with a step on D0."""
        if dataset is None or not self.d0 or (self.eco_weights and not _needs_d0(row)):
            return None
        return Source(dataset=dataset, num_segments=self.k or TABLE_K)

    def at_k(self, trainings: Sequence[Training]) -> tuple[Training, ...]:
        """The same trainings at the study's own K, if it has one."""
        return tuple(trainings if self.k is None else (dataclasses.replace(t, num_segments=self.k) for t in trainings))

    def config_of(
        self, training: Training, *, num_classes: int, shards: str, split: int, seed: int, parent: str, pose: str = ""
    ) -> TrainConfig:
        """The whole configuration of one training. `parent` is the checkpoint of the training before it, `pose` our own
        pose network's weights, which public ones take the place of; or ""."""
        size = self.size
        model = ModelConfig(num_classes=num_classes, fusion=FusionConfig(style=training.fusion), width=size.width)
        eco = training.strategy == "eco"
        optim = size.eco_optim if eco else size.optim
        if training.on == "D0":
            optim = (size.d0_eco_optim if eco else size.d0_optim) or optim
        before = FusionConfig(style=training.parent.fusion) if training.parent else None
        has_pose = before is not None and ModelConfig(num_classes=1, fusion=before).needs_pose  # in what it starts from
        config = TrainConfig(
            model=model,
            data=DataConfig(shards=shards, split=split, num_segments=training.num_segments, input_size=size.input_size),
            optim=fitting(optim, model, training.num_segments),
            init=InitConfig(
                eco="" if parent else self.eco_weights,
                pose=(self.pose_weights or pose) if model.needs_pose and not has_pose else "",
                parent=parent if training.keeps == "everything" else "",
                pretrained=parent if training.keeps == "features" else "",
            ),
            seed=seed,
        )
        changes = {name: value for name, value in self.overrides.items() if not name.startswith(POSE)}
        config = replace(config, changes)
        if STRATEGIES[training.strategy][-1].long:
            first = replace(dataclasses.replace(config, optim=size.eco_optim), changes).optim
            config = dataclasses.replace(config, optim=lengthened(config.optim, by=first.epochs))
        return config

    @property
    def root(self) -> Path:
        """The folder of everything that the study writes."""
        return Path(self.out)


@dataclass(frozen=True, kw_only=True)
class Shards:
    """A finished shard folder, as much as the study needs to know of it."""

    dataset: str
    folder: str
    digest: str
    num_classes: int
    videos: int
    frames: int
    failed: int
    decoded_with_errors: int
    missing: int
    subsets: Mapping[str, Mapping[str, int]]  # {"split1": {"train": 9537, "test": 3783}}

    @property
    def splits(self) -> tuple[int, ...]:
        """Splits with videos in both subsets."""
        return tuple(int(name[5:]) for name, of in self.subsets.items() if of["train"] and of["test"])

    @staticmethod
    def of(folder: Path) -> Shards:
        """Reads the folder's manifest."""
        manifest = json.loads((Path(folder) / "manifest.json").read_text("utf-8"))
        return Shards(
            dataset=manifest["dataset"],
            folder=str(folder),
            digest=manifest["digest"],
            num_classes=len(manifest["class_names"]),
            videos=manifest["videos"],
            frames=manifest["frames"],
            failed=manifest["failed"],
            decoded_with_errors=manifest["decoded_with_errors"],
            missing=manifest["listed_but_missing"],
            subsets=manifest["subsets"],
        )


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training of the study: its configuration and its folder."""

    training: Training
    config: TrainConfig
    folder: str
    parent: str  # folder of the training that it starts from, or ""
    pose: str = ""  # folder of the training of our own pose network, if it starts from that

    @property
    def title(self) -> str:
        """For people and for run names."""
        config = self.config
        return f"{self.training.title}, {self.training.dataset} split {config.data.split}, seed {config.seed}"


@dataclass(frozen=True, kw_only=True)
class PoseJob:
    """The training of our own pose network on D0's joints."""

    config: PoseTrainConfig
    shards: str
    joints: str
    folder: str
    rehearse: bool = False  # what starts from it gets it as public weights come, from a server on this machine

    title = "pose network"

    @property
    def trained(self) -> str:
        """The file that the training makes."""
        return str(Path(self.folder) / "pose.safetensors")

    @property
    def weights(self) -> str:
        """The file that init.pose takes: that one, or where it has come to."""
        return str(Path(self.folder) / "fetched" / "pose.safetensors") if self.rehearse else self.trained


D0_EMBEDDED = f"{EMBEDDED}-d0"


def synth_config(study: Study, name: str) -> SynthConfig:
    """The settings of one of the embedded sets, D0_EMBEDDED among them.

    They have the same actions, but no actor, place or single motion in common: all of these are drawn from the seed.
    Raises ConfigError when two have one seed.
    """
    from pasnet.synth import SynthConfig

    size = study.size
    settings = {EMBEDDED: size.synth, EMBEDDED_HMDB: size.hmdb_synth, D0_EMBEDDED: size.d0_synth}
    configs = {of: from_dict(SynthConfig, dict(values)) for of, values in settings.items()}
    for other, config in configs.items():
        if other != name and config.seed == configs[name].seed:
            raise ConfigError(f"preset {study.preset}: {name} has the seed of {other}, {config.seed}; give it another")
    return configs[name]


def make_synthetic(study: Study, name: str, ffmpeg: str, workers: int) -> Path:
    """The folder of an embedded set's videos, generated where it is not complete. Raises as `synth_config`."""
    from pasnet.synth import generate

    return generate(study.root / "data" / name, synth_config(study, name), ffmpeg=ffmpeg, workers=workers)


def _needs_d0(row: Row) -> bool:
    return any(step.on == "D0" for step in STRATEGIES[row.strategy])


def dataset_for(row: Row, names: Sequence[str]) -> str | None:
    """The dataset on which a row is run: its own, else one that stands in for it: EMBEDDED_HMDB for HMDB-51, any other
    for UCF-101. None: the row is not run."""
    if row.dataset in names:
        return row.dataset
    of_hmdb = row.dataset == "hmdb51"
    stand_ins = [name for name in names if name not in OFFICIAL and (name == EMBEDDED_HMDB) == of_hmdb]
    return stand_ins[0] if stand_ins else None


def check_datasets(study: Study, datasets: Sequence[tuple[str, Sequence[int]]]) -> set[str]:
    """The names of the datasets that the study's rows run on; the others need not be packed.

    `datasets` holds (name, split numbers with training and test videos) for each source. Raises ConfigError, before
    anything is decoded, when the study cannot be run on them.
    """
    names = [name for name, _ in datasets]
    serving: dict[str, str] = {}  # {the paper's dataset: ours}
    for row in study.rows:
        if (name := dataset_for(row, names)) is not None:
            serving[row.dataset] = name
    used = set(serving.values())
    if not used:
        tables = ", ".join(sorted({row.table for row in study.rows}))
        hint = f" ({EMBEDDED_HMDB} stands in for HMDB-51 alone)" if EMBEDDED_HMDB in names else ""
        raise ConfigError(f"no row of {tables} runs on {', '.join(names)}{hint}; see `pasnet list`")
    for name, usable in datasets:
        if names.count(name) > 1:
            raise ConfigError(f"two of the data folders are {name}; run one study for each")
        of = "hmdb51" if name == EMBEDDED_HMDB else "ucf101"
        if name not in used and name not in OFFICIAL and of in serving:  # else it may belong to tables not asked for
            raise ConfigError(f"{name} would stand in for {of}, but {serving[of]} does; run a study for each")
        for split in study.splits if name in used else ():
            if split not in usable:
                raise ConfigError(f"{name}: split {split} has no train or no test videos; it has {list(usable)}")
    return used


def trainings_for(
    study: Study, row: Row, shards: Sequence[Shards], d0: Shards | None = None, lost: Collection[str] = ()
) -> tuple[Training, ...]:
    """The networks that a row needs here; none when the study has no dataset for it, or lost it."""
    dataset = dataset_for(row, [*(of.dataset for of in shards), *lost])
    if dataset is None or dataset in lost:
        return ()
    return study.at_k(trainings_of(row, dataset, study.source(row, d0.dataset if d0 else None)))


def pose_job(study: Study, d0: Shards | None) -> PoseJob | None:
    """The training of our own pose network; None where public weights take its place, or D0 has no joints."""
    joints = study.joints
    if d0 is None or joints is None or not study.needs_pose_weights:
        return None
    from pasnet.checkpoints import NUMERICS
    from pasnet.pose_train import VERSION
    from pasnet.weights import sha256_of

    known = sha256_of(joints) if joints.is_file() else ""  # a plan may come before them
    config = study.pose_config
    name = f"{d0.dataset}-{digest([NUMERICS, VERSION, to_dict(config), d0.digest, known])}"
    return PoseJob(
        config=config,
        shards=d0.folder,
        joints=str(joints),
        folder=str(study.root / "pose" / name),
        rehearse=study.size.rehearse,
    )


def jobs(
    study: Study, shards: Sequence[Shards], d0: Shards | None = None, lost: Collection[str] = ()
) -> tuple[Job, ...]:
    """Every training that the study needs, parents first; those on D0 once, whatever splits and seeds there are. None
    for rows of a dataset that could not be had (`lost`, names).

    Raises ConfigError as `check_datasets` does, since videos that could not be decoded may have emptied a subset, and
    for a D0 that is one of the datasets, or has no split 1.
    """
    check_datasets(study, [*((of.dataset, of.splits) for of in shards), *((name, (1, 2, 3)) for name in lost)])
    by_name = {of.dataset: of for of in shards}
    if d0 is not None:
        if d0.dataset in by_name or d0.digest in {of.digest for of in shards if of.folder}:
            raise ConfigError(f"pretrain: {d0.folder} is {d0.dataset}, which the study runs on; D0 must be another set")
        if D0_SPLIT not in d0.splits:
            raise ConfigError(f"pretrain: {d0.dataset} has no train or no test videos in split {D0_SPLIT}")
        by_name[d0.dataset] = d0
    pose = pose_job(study, d0)
    wanted = in_order(training for row in study.rows for training in trainings_for(study, row, shards, d0, lost))
    made: dict[tuple[Training, int, int], Job] = {}

    def place(training: Training, split: int, seed: int) -> tuple[Training, int, int]:
        return (training, D0_SPLIT, D0_SEED) if training.on == "D0" else (training, split, seed)

    for split in study.splits:
        for seed in study.seeds:
            for training in wanted:
                at = place(training, split, seed)
                if at not in made:
                    parent = made[place(training.parent, split, seed)] if training.parent else None
                    made[at] = _job(study, by_name[training.dataset], *at, parent, pose)
    return tuple(made.values())


def _job(
    study: Study, of: Shards, training: Training, split: int, seed: int, parent: Job | None, pose: PoseJob | None
) -> Job:
    from pasnet.checkpoints import run_digest

    config = study.config_of(
        training,
        num_classes=of.num_classes,
        shards=of.folder,
        split=split,
        seed=seed,
        parent=str(Path(parent.folder) / "last.pt") if parent else "",
        pose=pose.weights if pose else "",
    )
    train_videos, limit = of.subsets[f"split{split}"]["train"], study.size.max_train_videos
    if (
        training.on == "D1"
        and limit is not None
        and train_videos > limit
        and "data.train_fraction" not in study.overrides
    ):
        config = replace(config, {"data.train_fraction": limit / train_videos})
    # A name must not change when what it starts from comes to be: folders stand for files that are still to be made.
    before = Path(parent.folder).name if parent else ""
    own_pose = pose if pose and config.init.pose == pose.weights else None
    named = {"init.pretrained": f"training {before}"} if config.init.pretrained else {}
    named |= {"init.pose": f"pose {Path(own_pose.folder).name}"} if own_pose else {}
    identity = run_digest(replace(config, named), of.digest, before if config.init.parent else "")
    slug = re.sub(r"[^a-z0-9]+", "-", f"{training.strategy} {training.fusion}".lower()).strip("-")
    name = f"{of.dataset}-s{split}-k{training.num_segments}-{slug}-seed{seed}-{identity}"
    return Job(
        training=training,
        config=config,
        folder=str(study.root / "trainings" / name),
        parent=parent.folder if parent else "",
        pose=own_pose.folder if own_pose else "",
    )
