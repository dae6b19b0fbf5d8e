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
from pasnet.study import EMBEDDED, Study

Table = Literal["table-1", "table-2", "table-3", "table-4", "table-5", "figure-2", "strategies"]
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
    "dry_run": "true",
}


class ParametersError(ConfigError):
    """Parameters that no study can be made of; one line for each problem."""


class Parameters(BaseModel):
    """What `flows/reproduce.py` takes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    data: list[str] = Field(default=[EMBEDDED], min_length=1)
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
    dry_run: bool = False

    @model_validator(mode="after")
    def _as_a_study(self) -> Parameters:
        """What only the whole can show: folders that are there, styles, settings, sizes that fit each other."""
        for folder in self.data:
            planned = self.dry_run and Path(folder).name in OFFICIAL  # a plan needs no videos
            if folder != EMBEDDED and not planned and not Path(folder).is_dir():
                known = Path(folder).name in OFFICIAL
                fix = f"`pasnet shards fetch {Path(folder).name}` downloads it; else " if known else ""
                raise ValueError(
                    f"data: there is no folder {folder} in {Path.cwd()}, where this run is; {fix}give the folder that "
                    f'holds videos/ and the split lists, or "{EMBEDDED}"'
                )
        for name in ("splits", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: {values} names one twice; name each once")
        self.study()
        return self

    def study(self) -> Study:
        """The same, for pasnet/. Raises ConfigError."""
        return Study(
            data=tuple(self.data),
            out=self.out,
            preset=self.preset,
            tables=tuple(self.tables or ()),
            fusions=tuple(self.fusions or ()),
            splits=tuple(self.splits),
            seeds=tuple(self.seeds),
            num_segments=self.num_segments,
            eco_weights=self.eco_weights,
            pose_weights=self.pose_weights,
            pretrain=self.pretrain,
            overrides=self.overrides or {},
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
