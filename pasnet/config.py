"""Every setting of a run as frozen, keyword-only dataclasses (standard library only, so that the CLI starts at once).

The values that the paper's rows use are in `pasnet/experiments.py`; here are the fields, their defaults and why.
"A1".."A22" name the points that the paper leaves open; docs/paper.md lists them with the evidence for each default.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

# The nine fusion styles of Table II, equations (3) to (11) in the paper's order, and the control of Table I.
# `pasnet/models/fusion.py` writes each beside its equation; a test holds the two lists together.
FUSION_TITLES: dict[str, str] = {
    "A": "A",
    "I": "I",
    "E*A": "E∘A",
    "A+E*A": "A + 1.5 E∘A",
    "Conv(A,E*A)": "Conv(A, E∘A)",
    "A+pool(I)": "A + 1.5 pool(I)",
    "Conv(A,I)": "Conv(A, I)",
    "A+pool(I)+pool(F)": "A + 0.5 pool(I) + pool(F)",
    "Conv(A,I,F)": "Conv(A, I, F)",
    "A+1*1conv": "A + 1*1conv",
}


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line that a person can act on."""


def fusion_style(name: str) -> str:
    """The key in FUSION_TITLES for a style written as a key or as in the paper's tables; else ConfigError."""

    def squeeze(text: str) -> str:
        return text.replace(" ", "").replace("∘", "*").lower()

    known = {squeeze(text): key for key, title in FUSION_TITLES.items() for text in (key, title)}
    if squeeze(name) in known:
        return known[squeeze(name)]
    near = difflib.get_close_matches(squeeze(name), known, n=1)
    hint = f"; did you mean {known[near[0]]!r}?" if near else ""
    raise ConfigError(f"unknown fusion {name!r}{hint} (one of: {', '.join(FUSION_TITLES)})")


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """How appearance A (96 channels), implicit pose I (128), heat map E (1) and part affinity F (128) are joined."""

    style: str = "A+pool(I)+pool(F)"  # the paper's best, eq. (10)
    lambda1: float = 1.5  # eq. (6);  A9: constants as printed in section III-D and Table II
    lambda2: float = 1.5  # eq. (8)
    lambda3: float = 0.5  # eq. (10), on I
    lambda4: float = 1.0  # eq. (10), on F
    channel_pool: Literal["adaptive", "sliding33", "mean1", "first96"] = (
        "adaptive"  # A1: covers every channel, no weights
    )
    kernel: Literal[1, 3] = 1  # A2: the control of Table I is called 1*1 conv and is treated as the same kind of change
    act: Literal["none", "relu", "bn_relu"] = "none"  # A3: the equations have a convolution and nothing else
    init: Literal["xavier", "identity_on_a"] = "xavier"  # A4: an identity start could not fall to Table I's 78 %
    heatmap_background: bool = False  # A5: with channel 18 (background) E would be about 1 everywhere
    heatmap_clamp: Literal["none", "relu", "01"] = "none"  # A6: the original network has no ReLU there
    pose_feature: Literal["post_relu", "pre_relu"] = "post_relu"  # A7: Caffe's ReLU is in place; A is post-ReLU too
    i_only: Literal["pool", "new_res3a"] = "pool"  # A8: keeps the pretrained res3a_2
    control_mode: Literal["sequential", "residual"] = "sequential"  # A10: a residual 1*1 conv would not fall to 78.7 %

    def __post_init__(self) -> None:
        object.__setattr__(self, "style", fusion_style(self.style))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network. At width 1 it is the paper's; smaller widths scale every hidden channel count, for CPU runs."""

    num_classes: int
    fusion: FusionConfig = field(default_factory=FusionConfig)
    width: float = 1.0
    dropout: float = 0.3  # paper, and ECO-pytorch's Lite demo
    pose_input: Literal["openpose", "shared"] = "openpose"  # A11: BGR/256 - 0.5, which the public weights expect
    appearance_mean: tuple[float, float, float] = (104.0, 117.0, 128.0)  # BGR; what the PyTorch checkpoints saw

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ConfigError(f"num_classes must be at least 1, got {self.num_classes}")
        if not 0 < self.width <= 1:
            raise ConfigError(f"width must be in (0, 1], got {self.width}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def needs_pose(self) -> bool:
        """Whether the fusion style reads the pose network at all; without it the network is ECO-Lite."""
        return self.fusion.style not in ("A", "A+1*1conv")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which clips, and how frames become the network's input."""

    shards: str  # folder made by `pasnet shards build`
    split: int = 1
    num_segments: int = 8  # K
    sampling: Literal["segment", "eco_compatible"] = "segment"  # A19: K real-valued segments, or what ECO-pytorch took
    input_size: int = 224  # of the network; the field of view stays that of 224 in a 256-high frame
    crop: Literal["multiscale", "random"] = "multiscale"  # A18: ECO-pytorch's corner crops, or one size anywhere
    scales: tuple[float, ...] = (1.0, 0.875, 0.75, 0.66)
    flip: bool = True
    workers: int = 2  # loader processes; 0 loads in the training process
    train_fraction: float = 1.0  # share of the training videos used, the same share of every class
    held_out: float = 0.0  # share of the training videos, whole groups, kept from training to choose by

    def __post_init__(self) -> None:
        if self.num_segments < 1:
            raise ConfigError(f"num_segments (K) must be at least 1, got {self.num_segments}")
        if self.input_size < 40 or self.input_size % 8:
            raise ConfigError(f"input_size must be a multiple of 8 and at least 40, got {self.input_size}")
        if not self.scales or not all(0 < scale <= 1 for scale in self.scales):
            raise ConfigError(f"scales must be in (0, 1], got {self.scales}")
        if self.workers < 0:
            raise ConfigError(f"data.workers must be at least 0, got {self.workers}")
        if not 0 < self.train_fraction <= 1:
            raise ConfigError(f"train_fraction must be in (0, 1], got {self.train_fraction}")
        if not 0 <= self.held_out <= 0.5:
            raise ConfigError(f"held_out must be in [0, 0.5], got {self.held_out}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """SGD as in ECO-pytorch's Lite demo, whose lr, momentum, decay and dropout are the paper's (A15, A16)."""

    epochs: int = 40
    lr: float = 0.001
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4  # none on biases and batch norm
    batch: int = 64  # clips per optimiser step
    micro_batch: int = 16  # clips per forward pass; gradients are accumulated up to `batch`
    clip_norm: float = 50.0  # of the accumulated gradient, just before the step
    # A plateau divides lr by 10 when top-1 has not risen for `patience` epochs. "plateau_on_test_as_in_eco" looks at
    # the test list, as ECO-pytorch and so, most likely, the paper do: its numbers are a little too good.
    # "plateau_on_held_out" looks at data.held_out, a part of the training list; the others look at nothing.
    schedule: Literal["plateau_on_test_as_in_eco", "plateau_on_held_out", "steps", "constant"] = (
        "plateau_on_test_as_in_eco"
    )
    patience: int = 5
    steps: tuple[int, ...] = (20, 30)  # epochs after which "steps" divides lr by 10
    bn_mode: Literal["train", "partial", "frozen"] = "train"  # A13; partial: all but the first keep their statistics
    sync_bn: bool = False  # over processes with a GPU each: statistics of all their clips, as of one large batch
    pose_lr_mult: float = 1.0  # A12
    freeze_pose: bool = False
    # Keep a tenth of the pose network's activations and compute the others again in the backward pass: the same
    # gradients and results, so that a run's identity does not depend on it (`pasnet list --cost` prints the sizes).
    checkpoint_pose: bool = False

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ConfigError(f"epochs must be at least 1, got {self.epochs}")
        if self.batch < 1 or self.micro_batch < 1:
            raise ConfigError(f"batch and micro_batch must be at least 1, got {self.batch} and {self.micro_batch}")
        if self.batch % min(self.batch, self.micro_batch):
            raise ConfigError(f"batch must be a multiple of micro_batch, got {self.batch} and {self.micro_batch}")
        for name in ("lr", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.momentum < 1 or (self.nesterov and self.momentum == 0):
            raise ConfigError(f"momentum must be in [0, 1), and above 0 with nesterov, got {self.momentum}")
        if not 0 <= self.weight_decay < math.inf or not 0 <= self.pose_lr_mult < math.inf:
            raise ConfigError("weight_decay and pose_lr_mult must be at least 0")
        if self.patience < 1:
            raise ConfigError(f"patience must be at least 1, got {self.patience}")
        if not all(0 < one < next_ for one, next_ in itertools.pairwise((*self.steps, math.inf))):
            raise ConfigError(f"steps must be epochs in ascending order, got {self.steps}")


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Where the weights start. Empty strings mean a random start, which every report then says plainly."""

    eco: str = ""  # ECO-Lite checkpoint (Kinetics-400), or ECO's initial weights: appearance and temporal net of w0
    pose: str = ""  # OpenPose body checkpoint (COCO): pose network of w0
    parent: str = ""  # a checkpoint of ours, same dataset and split: step 1 of twice-finetune
    pretrained: str = ""  # a checkpoint of ours from another dataset (D0): all but the head; "recent", or a w0 of ours


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training: all that decides its result; pasnet/train.py makes its identity from it."""

    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    init: InitConfig = field(default_factory=InitConfig)
    seed: int = 0
    # bf16 and fp16 (with loss scaling) are autocast; weights and optimiser stay fp32
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    compile: bool = False  # torch.compile: minutes at the start, for trainings of hours on a GPU
    checkpoint_minutes: float = (
        10.0  # between checkpoints within an epoch: the training that a killed run loses at most
    )

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0, got {self.seed}")
        if not 0 <= self.checkpoint_minutes < math.inf:
            raise ConfigError(f"checkpoint_minutes must be at least 0, got {self.checkpoint_minutes}")
        given = [name for name in ("parent", "eco", "pretrained") if getattr(self.init, name)]
        if len(given) > 1:
            names = " and ".join(f"init.{name}" for name in given)
            raise ConfigError(f"{names} all give the appearance and temporal weights; give one of them")
        if self.optim.schedule == "plateau_on_held_out" and not self.data.held_out:
            raise ConfigError("schedule plateau_on_held_out needs data.held_out, such as data.held_out=0.1")
        if self.init.pose and not self.model.needs_pose:
            raise ConfigError(f"fusion {self.model.fusion.style} has no pose network for init.pose={self.init.pose}")


@dataclass(frozen=True, kw_only=True)
class PoseTrainConfig:
    """A training of the pose network on joints that are known, pasnet/pose_train.py: the start that COCO would give."""

    width: float = 0.125
    input_size: int = 112
    steps: int = 2000
    batch: int = 16  # frames
    lr: float = 1e-3  # of Adam: plain SGD moves 52 layers without normalisation only after a start from VGG
    warmup: int = 50  # steps up to that rate; it then falls to nothing along a half cosine
    clip_norm: float = 10.0
    sigma: float = 7.0  # of a joint's Gaussian, pixels of the network's input, as in OpenPose's training
    limb_width: float = 1.0  # half of a limb's, in cells of 8 pixels, as there
    flip: bool = True
    split: int = 1  # whose test list, groups of their own, the quality is measured on
    measure: int = 400  # frames of it
    seed: int = 0
    checkpoint_steps: int = 200  # between checkpoints: what a killed run loses at most

    def __post_init__(self) -> None:
        if not 0 < self.width <= 1:
            raise ConfigError(f"width must be in (0, 1], got {self.width}")
        if self.input_size < 40 or self.input_size % 8:
            raise ConfigError(f"input_size must be a multiple of 8 and at least 40, got {self.input_size}")
        for name in ("steps", "batch", "measure", "checkpoint_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "clip_norm", "sigma", "limb_width"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.warmup < 0 or self.seed < 0:
            raise ConfigError(f"warmup and seed must be at least 0, got {self.warmup} and {self.seed}")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested plain dictionaries, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(kind: type[Any], values: dict[str, Any], where: str = "") -> Any:
    """The config of type `kind` that `values` (nested dictionaries) describes. Raises ConfigError naming the field."""
    hints = typing.get_type_hints(kind)
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        near = difflib.get_close_matches(unknown[0], hints, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f" (one of: {', '.join(hints)})"
        raise ConfigError(f"unknown setting {where + unknown[0]!r}{hint}")
    try:
        return kind(**{name: _typed(hints[name], value, where + name) for name, value in values.items()})
    except TypeError as error:  # a required field is absent
        raise ConfigError(f"{kind.__name__}: {error}") from None


def replace(config: Any, overrides: dict[str, Any]) -> Any:
    """A copy with some fields changed: {"optim.epochs": 2, "model.fusion.style": "A"}. Values may be text."""
    values = to_dict(config)
    for path, value in overrides.items():
        *parents, name = path.split(".")
        inner = values
        for parent in parents:
            inner = inner.get(parent) if isinstance(inner, dict) else None  # type: ignore[assignment]
        if not isinstance(inner, dict) or name not in inner or isinstance(inner[name], dict):
            near = difflib.get_close_matches(path, flatten(to_dict(config)), n=3, cutoff=0.3)
            raise ConfigError(f"unknown setting {path!r}; near it: {', '.join(near) or 'nothing'}")
        inner[name] = value
    return from_dict(type(config), values)


def digest(values: Any) -> str:
    """First 12 hex digits of the sha256 of anything that JSON can hold: a short name for a set of settings."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}: the form that MLflow compares."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _typed(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type of a field; text is converted, as it comes from a command line."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} has settings of its own, give one of them, such as {where}.<name>=<value>")
        return from_dict(typing.cast(type, hint), value, where + ".")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        for choice in arguments:
            if value == choice or str(value) == str(choice):
                return choice
        raise ConfigError(f"{where} must be one of {', '.join(map(str, arguments))}, got {value!r}")
    if origin is tuple:
        items = (
            value.split(",") if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else [value]
        )
        if arguments[-1] is not Ellipsis and len(items) != len(arguments):
            raise ConfigError(f"{where} must be {len(arguments)} values, got {value!r}")
        return tuple(_typed(arguments[0], item, where) for item in items)
    if origin is types.UnionType:
        return None if value in (None, "none") else _typed(arguments[0], value, where)
    if hint is bool:
        known = {"true": True, "1": True, "false": False, "0": False}
        if str(value).lower() not in known:
            raise ConfigError(f"{where} must be true or false, got {value!r}")
        return known[str(value).lower()]
    try:
        if hint is int and isinstance(value, float) and not value.is_integer():
            raise ValueError
        return hint(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{where} must be {'a whole number' if hint is int else 'a number'}, got {value!r}") from None
