"""The paper's tables and figures as data: the specification of the whole study.

A `Row` is one number of the paper: what to run and what the paper printed. Rows that need the same training share it
(`trainings` counts 39 per split and seed). Numbers are percent on UCF-101 or HMDB-51, top-1 and top-5; None where the
paper prints none. STRATEGIES says what a network is trained on before, and with it what a training starts from.
docs/paper.md holds the evidence for what the paper leaves open.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pasnet.config import (
    FUSION_TITLES,
    ConfigError,
    ModelConfig,
    OptimConfig,
    PoseTrainConfig,
    fusion_style,
)

Strategy = Literal["eco", "conventional", "conventional-long", "recent", "twice-finetune"]
Where = Literal["D0", "D1"]  # the set to learn from beforehand (the paper's Kinetics), and the target set
DEFAULT_FUSION = "A+pool(I)+pool(F)"
ENSEMBLE = (16, 20, 24, 28, 32)  # K of the five networks of Tables III and V, as in ECO

# Table I and II are K = 8: their best, 91.37, is Table IV's 8-frame entry, and their baseline is ECO's 8-frame number.
TABLE_K = 8


@dataclass(frozen=True, kw_only=True)
class Step:
    """One training of a strategy: which network, on what, and what it keeps.

    "w0": ECO and pose weights from elsewhere: public files; else our own ECO of D0 and our own pose network; else
    random. On D0 itself nothing of ours for ECO, which is what comes out. Of the step before, "features" are all
    weights but the head, whose classes are others, and "everything" the head, too (A14). A `long` one has as many
    epochs as the two finetunings of twice-finetune together.
    """

    network: Literal["eco", "pas-net"]
    on: Where
    keeps: Literal["w0", "features", "everything"]
    long: bool = False


STRATEGIES: dict[Strategy, tuple[Step, ...]] = {
    "eco": (Step(network="eco", on="D1", keeps="w0"),),
    "conventional": (Step(network="pas-net", on="D1", keeps="w0"),),
    "conventional-long": (Step(network="pas-net", on="D1", keeps="w0", long=True),),
    "recent": (
        Step(network="pas-net", on="D0", keeps="w0"),
        Step(network="pas-net", on="D1", keeps="features"),
    ),
    "twice-finetune": (
        Step(network="eco", on="D1", keeps="w0"),
        Step(network="pas-net", on="D1", keeps="everything"),
    ),
}
_ALONE: dict[str, Strategy] = {"eco": "eco", "pas-net": "conventional"}  # a first step is this strategy, whole


QUESTIONS = {  # one MLflow experiment per question
    "table-1": "pasnet/training-strategy",
    "table-2": "pasnet/fusion",
    "table-3": "pasnet/sota",
    "table-4": "pasnet/frames",
    "table-5": "pasnet/sota",
    "figure-2": "pasnet/num-segments",
    "strategies": "pasnet/training-strategy",  # rows of ours beside Table I
    "equal-epochs": "pasnet/training-strategy",  # Table I again
}


SPLIT_1, MEAN = "likely split 1", "likely a mean over three splits"  # protocols


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number of the paper. `num_segments` holds several K for an ensemble of separately trained networks.

    `protocol` is what the paper's number is most likely measured on, for the paper does not say (docs/paper.md, A22);
    "" where it prints none.
    """

    table: str
    title: str
    dataset: Literal["ucf101", "hmdb51"]
    fusion: str
    strategy: Strategy
    num_segments: tuple[int, ...] = (TABLE_K,)
    paper_top1: float | None
    paper_top5: float | None = None
    protocol: str = SPLIT_1
    remark: str = ""

    @property
    def name(self) -> str:
        """Unique and stable: table/dataset/title/strategy."""
        return f"{self.table}/{self.dataset}/{self.title}/{self.strategy}"


@dataclass(frozen=True, kw_only=True)
class Source:
    """D0, the set to learn from beforehand. `num_segments` is the K of the ECO that w0 is taken from: one for all."""

    dataset: str
    num_segments: int = TABLE_K


@dataclass(frozen=True, kw_only=True)
class Training:
    """One network to train for a dataset, split and seed; equal trainings are the same training.

    `source` is D0 where some of what comes before is trained on it, else None. A training on D0 itself (`on`) has none:
    it starts from public weights, or at random.
    """

    dataset: str
    fusion: str
    num_segments: int
    strategy: Strategy
    source: Source | None = None
    on: Where = "D1"

    @property
    def keeps(self) -> str:
        """What it takes over of `parent`, or of public weights, as in Step."""
        step = STRATEGIES[self.strategy][-1]
        return "features" if step.keeps == "w0" and self.parent else step.keeps

    @property
    def parent(self) -> Training | None:
        """The training before this one: the strategy's step before the last; before a first step, ECO on D0, if there
        is a D0 to take w0 from. Raises ConfigError for a strategy with a step on D0, without D0."""
        steps, source = STRATEGIES[self.strategy], self.source
        if len(steps) == 1:
            if source is None or self.on == "D0":
                return None
            k = source.num_segments
            return Training(dataset=source.dataset, fusion="A", num_segments=k, strategy="eco", on="D0")
        before = steps[-2]
        fusion, strategy = "A" if before.network == "eco" else self.fusion, _ALONE[before.network]
        if before.on == "D1":
            return dataclasses.replace(self, fusion=fusion, strategy=strategy)
        if source is None:
            raise ConfigError(
                f"strategy {self.strategy} starts with a training on another set (D0); give one with pretrain, such as "
                f"pretrain=synthetic"
            )
        return Training(
            dataset=source.dataset, fusion=fusion, num_segments=self.num_segments, strategy=strategy, on="D0"
        )

    @property
    def title(self) -> str:
        """For people: style, K and strategy."""
        return f"{FUSION_TITLES[self.fusion]}, K={self.num_segments}, {self.strategy}"


_QUOTED_ECO = "most likely quoted by the paper from ECO's own publication, a mean over three splits"


def _table_1() -> list[Row]:
    """Section IV-C: the same networks finetuned directly, and after ECO."""
    numbers = {"A+1*1conv": (78.73, 90.28), "Conv(A,I)": (77.54, 90.44), "Conv(A,I,F)": (77.22, 90.89)}
    rows = [
        Row(
            table="table-1",
            title="A",
            dataset="ucf101",
            fusion="A",
            strategy="eco",
            paper_top1=90.20,
            protocol=MEAN,
            remark=_QUOTED_ECO,
        )
    ]
    strategies: tuple[Strategy, ...] = ("conventional", "twice-finetune")
    for fusion, by_strategy in numbers.items():
        for strategy, top1 in zip(strategies, by_strategy, strict=True):
            rows.append(
                Row(
                    table="table-1",
                    title=FUSION_TITLES[fusion],
                    dataset="ucf101",
                    fusion=fusion,
                    strategy=strategy,
                    paper_top1=top1,
                )
            )
    return rows


def _table_2() -> list[Row]:
    """Section IV-D: the nine fusion styles, equations (3) to (11)."""
    numbers: dict[str, tuple[float, float | None]] = {
        "A": (90.20, None),
        "I": (57.44, 83.82),
        "E*A": (78.10, 94.65),
        "A+E*A": (90.94, 98.17),
        "Conv(A,E*A)": (90.81, 98.17),
        "A+pool(I)": (91.15, 98.20),
        "Conv(A,I)": (90.44, 98.23),
        "A+pool(I)+pool(F)": (91.37, 98.04),
        "Conv(A,I,F)": (90.89, 98.22),
    }
    return [
        Row(
            table="table-2",
            title=FUSION_TITLES[fusion],
            dataset="ucf101",
            fusion=fusion,
            strategy="eco" if fusion == "A" else "twice-finetune",
            paper_top1=top1,
            paper_top5=top5,
            protocol=MEAN if fusion == "A" else SPLIT_1,
            remark=_QUOTED_ECO if fusion == "A" else "",
        )
        for fusion, (top1, top5) in numbers.items()
    ]


# PAS-Net by K, Table IV; Fig. 2 draws the same networks, and K = 24 and 48 without printing a value.
_BY_K: dict[Literal["ucf101", "hmdb51"], dict[int, float | None]] = {
    "ucf101": {8: 91.4, 16: 93.2, 24: None, 32: 94.1, 48: None},
    "hmdb51": {8: 68.8, 16: 71.6, 24: None, 32: 70.1, 48: None},
}


def _table_4() -> list[Row]:
    """Section IV-E: ECO and PAS-Net by number of frames."""
    eco = {("ucf101", 8): 90.2, ("ucf101", 16): 91.6}  # the entries our sources give; the others are not guessed
    rows = []
    for dataset, by_k in _BY_K.items():
        for k in (8, 16, 32):
            rows.append(
                Row(
                    table="table-4",
                    title=f"ECO, {k} frames",
                    dataset=dataset,
                    fusion="A",
                    strategy="eco",
                    num_segments=(k,),
                    paper_top1=eco.get((dataset, k)),
                    protocol=MEAN if (dataset, k) in eco else "",
                    remark=_QUOTED_ECO if (dataset, k) in eco else "our sources do not give the paper's number",
                )
            )
            rows.append(
                Row(
                    table="table-4",
                    title=f"PAS-Net, {k} frames",
                    dataset=dataset,
                    fusion=DEFAULT_FUSION,
                    strategy="twice-finetune",
                    num_segments=(k,),
                    paper_top1=by_k[k],
                )
            )
    return rows


def _figure_2() -> list[Row]:
    return [
        Row(
            table="figure-2",
            title=f"K={k}",
            dataset=dataset,
            fusion=DEFAULT_FUSION,
            strategy="twice-finetune",
            num_segments=(k,),
            paper_top1=top1,
            protocol="" if top1 is None else SPLIT_1,
            remark="" if top1 is not None else "the figure prints no value",
        )
        for dataset, by_k in _BY_K.items()
        for k, top1 in by_k.items()
    ]


def _ensembles() -> list[Row]:
    """Tables III (UCF-101) and V (HMDB-51). Their other rows are other people's numbers and are not run."""
    where: tuple[tuple[str, Literal["ucf101", "hmdb51"], float], ...] = (
        ("table-3", "ucf101", 94.8),
        ("table-5", "hmdb51", 73.8),
    )
    return [
        Row(
            table=table,
            title="PAS-Net, ensemble of K = 16, 20, 24, 28, 32",
            dataset=dataset,
            fusion=DEFAULT_FUSION,
            strategy="twice-finetune",
            num_segments=ENSEMBLE,
            paper_top1=top1,
            protocol="not known: split 1 or a mean over three splits",
        )
        for table, dataset, top1 in where
    ]


@dataclass(frozen=True, kw_only=True)
class Quoted:
    """Rows of a table that are other people's networks: listed, not run. The paper has their numbers at second hand, so
    they are not repeated."""

    table: str
    dataset: Literal["ucf101", "hmdb51"]
    what: str


QUOTED: tuple[Quoted, ...] = (
    Quoted(
        table="table-3",
        dataset="ucf101",
        what="the other networks of Table III: their authors' numbers, as the paper quotes them",
    ),
    Quoted(
        table="table-5",
        dataset="hmdb51",
        what="the other networks of Table V: their authors' numbers, as the paper quotes them",
    ),
)


def _strategies() -> list[Row]:
    """Table I's networks by the third strategy, for which our sources give no number: run where asked for by name."""
    return [
        Row(
            table="strategies",
            title=row.title,
            dataset="ucf101",
            fusion=row.fusion,
            strategy="recent",
            paper_top1=None,
            protocol="",
            remark="our own row beside Table I: our sources give the paper's number for the other two strategies alone",
        )
        for row in _table_1()
        if row.strategy == "conventional"
    ]


def _equal_epochs() -> list[Row]:
    """Table I where finetuning directly takes as many epochs as twice-finetune. Epochs are then equal; computation is
    not (of twice-finetune's, those of ECO are cheaper), nor is the schedule, which twice-finetune begins anew."""
    remark = (
        "as many epochs as both finetunings of twice-finetune; the paper does not say how many its conventional "
        "finetuning had"
    )
    long: dict[str, Any] = {"strategy": "conventional-long", "remark": remark}
    return [
        dataclasses.replace(row, table="equal-epochs", **(long if row.strategy == "conventional" else {}))
        for row in _table_1()
    ]


ROWS: tuple[Row, ...] = (*_table_1(), *_table_2(), *_ensembles(), *_table_4(), *_figure_2())
# not of the paper: not among "all", only by the names of their tables
EXTRA_ROWS: tuple[Row, ...] = (*_strategies(), *_equal_epochs())
EXTRA_TABLES = tuple(dict.fromkeys(row.table for row in EXTRA_ROWS))


def select_rows(
    tables: Sequence[str] = (), fusions: Sequence[str] = (), datasets: Sequence[str] = ()
) -> tuple[Row, ...]:
    """The rows of some tables, styles and datasets; empty means all of the paper's, which "strategies" and
    "equal-epochs" are not among. Raises ConfigError for unknown names."""
    for table in tables:
        if table not in QUESTIONS:
            raise ConfigError(f"unknown table {table!r} (one of: {', '.join(QUESTIONS)})")
    wanted = [fusion_style(fusion) for fusion in fusions]
    rows = tuple(
        row
        for row in (*ROWS, *(EXTRA_ROWS if tables else ()))
        if (not tables or row.table in tables)
        and (not wanted or row.fusion in wanted)
        and (not datasets or row.dataset in datasets)
    )
    if not rows:
        raise ConfigError(f"no row of the paper is in tables {list(tables)} with fusions {list(fusions)}")
    return rows


def trainings_of(row: Row, dataset: str, source: Source | None = None) -> tuple[Training, ...]:
    """The networks that a row's number comes from: one, or one per K of an ensemble."""
    return tuple(
        Training(dataset=dataset, fusion=row.fusion, num_segments=k, strategy=row.strategy, source=source)
        for k in row.num_segments
    )


def trainings(rows: Iterable[Row], source: Source | None = None) -> tuple[Training, ...]:
    """Every distinct training that the rows need on their own datasets, parents first."""
    return in_order(training for row in rows for training in trainings_of(row, row.dataset, source))


def in_order(wanted: Iterable[Training]) -> tuple[Training, ...]:
    """Distinct trainings and all that they start from: D0 first, then ECO; nothing comes before its parent."""
    distinct: dict[Training, None] = {}
    for training in wanted:
        line: list[Training] = [training]
        while (parent := line[-1].parent) is not None:
            line.append(parent)
        for each in reversed(line):
            distinct.setdefault(each)
    return tuple(sorted(distinct, key=lambda training: (training.on != "D0", training.strategy != "eco")))


def micro_batch_for(num_segments: int) -> int:
    """Clips per forward pass of PAS-Net at width 1 that stay within about 20 GB of activations: 16 at K = 8, 2 at 48.

    131 MB per frame are kept for the backward pass (pose 101, ECO-Lite 30, fp32, counted). Batch norm sees a micro
    batch, so this decides numbers, and it does not depend on the card at hand.
    """
    fits = max(1, int(20_000 / (131 * num_segments)))
    return 1 << (fits.bit_length() - 1)


def lengthened(optim: OptimConfig, by: int) -> OptimConfig:
    """The same recipe with so many more epochs; schedule "steps" lowers the rate after the same share of them."""
    epochs, steps = optim.epochs + by, optim.steps
    if optim.schedule == "steps":
        steps = tuple(round(step * epochs / optim.epochs) for step in steps)
    return dataclasses.replace(optim, epochs=epochs, steps=steps)


def fitting(optim: OptimConfig, model: ModelConfig, num_segments: int) -> OptimConfig:
    """The same recipe with a micro batch that fits a card; ECO alone needs no smaller one."""
    if not model.needs_pose:
        return optim
    return dataclasses.replace(optim, micro_batch=min(optim.micro_batch, micro_batch_for(num_segments)))


_HMDB: dict[str, Any] = {"layout": "hmdb", "seed": 501}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A size at which the study is run. Everything that makes the numbers differ from the paper's setting is here."""

    width: float
    input_size: int
    num_segments: int | None  # K of every row instead of the paper's, or None
    optim: OptimConfig
    eco_optim: OptimConfig  # of the ECO finetune
    tables: tuple[str, ...] = ()
    fusions: tuple[str, ...] = ()
    also: tuple[str, ...] = ()  # names of further rows, where nothing but the preset says which, on what and at which K
    max_train_videos: int | None = None  # of a larger set, the same share of every class is used
    data: tuple[str, ...] = ("synthetic",)  # the study's datasets unless it names some
    synth: dict[str, Any] = field(default_factory=dict)  # settings of the embedded dataset, pasnet/synth.py
    hmdb_synth: dict[str, Any] = field(default_factory=lambda: dict(_HMDB))  # of synthetic-hmdb
    # D0, where there is one. Its networks start from nothing of ours, and so want a recipe of their own.
    pretrain: str = ""  # which it is unless the study says otherwise: "" none, "synthetic" the embedded one
    d0_synth: dict[str, Any] = field(default_factory=lambda: {"groups": 40, "seed": 1001})
    d0_eco_optim: OptimConfig | None = None  # None: as eco_optim
    d0_optim: OptimConfig | None = None  # of PAS-Net on D0, strategy "recent"; None: as optim
    pose: PoseTrainConfig = field(default_factory=PoseTrainConfig)  # width and input size are the study's
    rehearse: bool = False  # embedded sets and our own pose network are fetched, from a server on this machine
    remark: str = ""  # what every report of it must say of how these values came about


_TINY = OptimConfig(epochs=1, lr=0.01, batch=4, micro_batch=4, schedule="constant")

PRESETS: dict[str, Preset] = {
    # The paper's setting; the facts give no reason for other rates in the two finetunes.
    "full": Preset(width=1.0, input_size=224, num_segments=None, optim=OptimConfig(), eco_optim=OptimConfig()),
    # Minutes on two cores: shows that every part works, not how good PAS-Net is. Each kind of step is in it: fetching
    # videos and weights (from a server on this machine), a D0 with its ECO and its pose network, both layouts of split
    # lists, both finetunes, evaluations. Nothing here comes from Kinetics, hence ECO's 5 times higher rate and small
    # batch. (At 20 times, whether it learns at all hangs on the seed.)
    "smoke": Preset(
        width=0.125,
        input_size=112,
        num_segments=None,
        optim=OptimConfig(epochs=3, lr=0.005, batch=8, micro_batch=8, schedule="constant"),
        eco_optim=OptimConfig(epochs=15, lr=0.005, batch=8, micro_batch=8, schedule="constant"),
        tables=("table-2",),
        fusions=("A", "Conv(A,I)", "A+pool(I)+pool(F)"),
        also=("figure-2/hmdb51/K=8/twice-finetune",),
        max_train_videos=130,
        data=("synthetic", "synthetic-hmdb"),
        rehearse=True,
        synth={"num_classes": 6, "groups": 25, "frames": (24, 40), "difficulty": 0.0},
        hmdb_synth={**_HMDB, "num_classes": 6, "groups": 14, "frames": (24, 40), "difficulty": 0.0},
        pretrain="synthetic",
        d0_synth={"num_classes": 6, "groups": 30, "frames": (24, 40), "difficulty": 0.0, "seed": 1001},
        pose=PoseTrainConfig(steps=300, measure=100),
    ),
    # The paper's questions in half an hour to an hour on two cores: Tables I and II on `pasnet synth` data, one seed,
    # from a w0 of our own. Measured at this size on one core of a Xeon: training 8.5 clips/s with and 50 without a pose
    # network, evaluation 25 and 137; two cores are taken to do 1.7 times that. An epoch on D1 (216 training, 84 test
    # clips) is then 216 / 14.4 + 84 / 42 = 17 s with and 3 s without; on D0 (348 and 132) 5 s for ECO. So: 10 PAS-Nets
    # * 5 epochs * 17 s = 850 s; two A + 1*1conv * 5 * 3 s = 30 s; ECO on D1 30 * 3 s = 90 s and on D0 30 * 5 s = 150 s;
    # pose 32,000 frames at 110/s = 290 s; 780 videos made and packed at 3/s = 260 s; 14 trainings and as many
    # evaluations started at 6 s = 170 s. In all 1840 s, 31 minutes. (Table "strategies", where asked for: on D0 two
    # PAS-Nets * 30 epochs * 27 s, since they start from as little as ECO does there, and on D1 two * 5 * 17 s: 1790 s,
    # 30 minutes. Table "equal-epochs": two PAS-Nets * 35 epochs * 17 s and one A + 1*1conv * 35 * 3 s: 1300 s, 22
    # minutes.)
    # Appearance and 3D network, which start from less than the paper's, learn at five times its rate; the pose network,
    # which comes trained, at the paper's own 0.001. (At 0.005 its heat maps went flat, and what reads them with them.)
    "science": Preset(
        width=0.125,
        input_size=112,
        num_segments=None,
        optim=OptimConfig(epochs=5, lr=0.005, batch=8, micro_batch=8, schedule="steps", steps=(4,), pose_lr_mult=0.2),
        eco_optim=OptimConfig(epochs=30, lr=0.005, batch=8, micro_batch=8, schedule="steps", steps=(24,)),
        tables=("table-1", "table-2"),
        synth={"num_classes": 12, "groups": 25, "frames": (24, 40), "difficulty": 0.25},
        hmdb_synth={**_HMDB, "num_classes": 12, "groups": 25, "frames": (24, 40), "difficulty": 0.25},
        pretrain="synthetic",
        d0_synth={"num_classes": 12, "groups": 40, "frames": (24, 40), "difficulty": 0.25, "seed": 1001},
        d0_optim=OptimConfig(epochs=30, lr=0.005, batch=8, micro_batch=8, schedule="steps", steps=(24,)),
        remark="Rates and epochs of this preset were settled after runs on the same videos and test lists (at a rate "
        "of 0.005 the pose network's maps went flat; epochs by the time at hand): its numbers are no held-out test of "
        "them",
    ),
    # Seconds: for tests.
    "tiny": Preset(
        width=0.0625,
        input_size=48,
        num_segments=2,
        optim=_TINY,
        eco_optim=_TINY,
        tables=("table-2",),
        fusions=("A", "A+pool(I)+pool(F)"),
        synth={"num_classes": 3, "groups": 3, "frames": (6, 8)},
        hmdb_synth={**_HMDB, "num_classes": 3, "groups": 3, "frames": (6, 8)},
        d0_synth={"num_classes": 3, "groups": 4, "frames": (6, 8), "seed": 1001},
        pose=PoseTrainConfig(steps=3, batch=2, measure=4),
    ),
}
