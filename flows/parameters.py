"""The flow's parameters as a model: checked as a whole, with messages for whoever typed them.

The flow's signature has the same names, types and defaults (a test holds the two together), since Prefect makes its
form and its schema from a signature. A server refuses by that schema what it can; all the rest is refused here, before
anything runs, each problem as: which parameter, what is wrong with it, what would be right.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pasnet.config import ConfigError
from pasnet.planning import OFFICIAL
from pasnet.registry import REGISTRY
from pasnet.study import EMBEDDED_SETS, Study, default_data, public_weights
from shards.fetch import SOURCES

Table = Literal["table-1", "table-2", "table-3", "table-4", "table-5", "figure-2", "strategies", "equal-epochs"]
PresetName = Literal["full", "science", "smoke", "tiny"]
Split = Literal[1, 2, 3]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]

EXAMPLES = {
    "data": '["data/ucf101", "data/hmdb51"]',
    "tables": '["table-2"]',
    "fusions": '["A", "Conv(A, I)"]',
    "splits": "[1, 2, 3]",
    "seeds": "[0, 1]",
    "num_segments": "8",
    "overrides": '{"optim.epochs": 2}',
    "workers": "2",
    "fetch": "true",
    "mirrors": '["https://mirror.example/archives"]',
    "dry_run": "true",
}


class ParametersError(ConfigError):
    """Parameters that no study can be made of; one line for each problem."""


class Parameters(BaseModel):
    """What `flows/reproduce.py` takes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    data: Annotated[list[str], Field(min_length=1)] | None = None
    out: str = Field(default="runs/study", min_length=1)
    preset: PresetName = "full"
    tables: list[Table] | None = None
    fusions: list[str] | None = None
    splits: list[Split] = Field(default=[1], min_length=1)
    seeds: list[Seed] = Field(default=[0], min_length=1)
    num_segments: Positive | None = None
    eco_weights: str = ""
    pose_weights: str = ""
    pretrain: str = ""
    overrides: dict[str, Any] | None = None
    workers: Positive = 2
    fetch: bool = False
    mirrors: list[str] | None = None
    dry_run: bool = False

    @model_validator(mode="after")
    def _as_a_study(self) -> Parameters:
        """What only the whole can show: folders that are there, styles, settings, sizes that fit each other."""
        for folder in self.sources:
            # a plan needs no videos
            expected = (self.dry_run and Path(folder).name in OFFICIAL) or folder in self.datasets_to_fetch
            if folder not in EMBEDDED_SETS and not expected and not Path(folder).is_dir():
                known = Path(folder).name in SOURCES
                fix = f"`pasnet shards fetch {Path(folder).name}` or fetch=true downloads it; else " if known else ""
                raise ValueError(
                    f"data: there is no folder {folder} in {Path.cwd()}, where this run is; {fix}give the folder that "
                    f"holds videos/ and the split lists, or one of: {', '.join(EMBEDDED_SETS)}"
                )
        for name in ("splits", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: {values} names one twice; name each once")
        for mirror in self.mirrors or ():
            if not mirror.startswith(("http://", "https://")):
                raise ValueError(f"mirrors: {mirror} is no http or https address")
        self.planned()
        return self

    @property
    def sources(self) -> list[str]:
        """`data`, or the preset's."""
        return self.data or list(default_data(self.preset))

    @property
    def datasets_to_fetch(self) -> list[str]:
        """Folders of `data` that are downloaded first: all that are named like an official set, since what is there
        is checked and used."""
        return [folder for folder in self.sources if Path(folder).name in SOURCES] if self.fetch else []

    @property
    def weights_to_fetch(self) -> list[str]:
        """Public weights that are downloaded first: those that are given by name."""
        given = (self.eco_weights, self.pose_weights)
        return [name for name in given if name in REGISTRY and not Path(name).is_file()] if self.fetch else []

    def planned(self) -> Study:
        """The study before anything is downloaded: weights may still be on their way. Raises ConfigError."""
        return self.study(coming=self.fetch)

    def study(self, *, coming: bool = False) -> Study:
        """The same, for pasnet/. Raises ConfigError."""
        return Study(
            data=tuple(self.sources),
            out=self.out,
            preset=self.preset,
            tables=tuple(self.tables or ()),
            fusions=tuple(self.fusions or ()),
            splits=tuple(self.splits),
            seeds=tuple(self.seeds),
            num_segments=self.num_segments,
            eco_weights=public_weights(self.eco_weights),
            pose_weights=public_weights(self.pose_weights),
            pretrain=self.pretrain,
            overrides=self.overrides or {},
            coming=coming,
        )


def check(given: Mapping[str, Any]) -> Parameters:
    """The parameters of a run. Raises ParametersError with a line for each that is wrong."""
    try:
        return Parameters.model_validate(dict(given))
    except ValidationError as error:
        problems = list(dict.fromkeys(_sentence(problem) for problem in error.errors()))
        raise ParametersError("; ".join(problems)) from None


def _sentence(problem: Any) -> str:
    """One of pydantic's errors in words."""
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    if kind == "value_error":  # of ours: it is a sentence already
        return str(context["error"])
    name = str(problem["loc"][0])
    example = f", such as {EXAMPLES[name]}" if name in EXAMPLES else ""
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(name, Parameters.model_fields, n=1)
        return f"{name}: there is no such parameter; " + (
            f"did you mean {near[0]}?" if near else f"there are {', '.join(Parameters.model_fields)}"
        )
    if kind == "literal_error":
        choices = [choice.strip("'\"") for choice in context["expected"].replace(" or ", ", ").split(", ")]
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{name}: {value!r} is none of {', '.join(choices)}{hint}"
    if kind == "greater_than_equal":
        return f"{name}: {value} is too small; give at least {context['ge']}"
    if kind in ("too_short", "string_too_short"):
        return f"{name}: is empty; give at least one{example}"
    wanted = {"list_type": "a list", "dict_type": "an object", "string_type": "text", "missing": "a value"}.get(
        kind, "a whole number" if kind.startswith("int_") else "true or false" if kind.startswith("bool_") else ""
    )
    return f"{name}: {value!r} is not {wanted or 'what it takes (' + problem['msg'] + ')'}{example}"
