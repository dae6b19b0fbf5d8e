"""The specification against the paper, and the settings against their users."""

from __future__ import annotations

import pytest

from pasnet.config import (
    FUSION_TITLES,
    ConfigError,
    DataConfig,
    FusionConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    flatten,
    from_dict,
    fusion_style,
    replace,
    to_dict,
)
from pasnet.experiments import EXTRA_ROWS, PRESETS, QUESTIONS, ROWS, Row, in_order, select_rows, trainings, trainings_of
from pasnet.models.fusion import READS

CONFIG = TrainConfig(model=ModelConfig(num_classes=5), data=DataConfig(shards="somewhere"))


class TestPaper:
    def by(self, table: str, dataset: str = "ucf101") -> dict[tuple[str, str], Row]:
        return {(row.fusion, row.strategy): row for row in select_rows([table]) if row.dataset == dataset}

    def test_table_1(self) -> None:
        printed = {key: row.paper_top1 for key, row in self.by("table-1").items()}
        assert printed == {
            ("A", "eco"): 90.20,
            ("A+1*1conv", "conventional"): 78.73,
            ("A+1*1conv", "twice-finetune"): 90.28,
            ("Conv(A,I)", "conventional"): 77.54,
            ("Conv(A,I)", "twice-finetune"): 90.44,
            ("Conv(A,I,F)", "conventional"): 77.22,
            ("Conv(A,I,F)", "twice-finetune"): 90.89,
        }

    def test_table_2(self) -> None:
        printed = [(row.fusion, row.paper_top1, row.paper_top5) for row in select_rows(["table-2"])]
        assert printed == [
            ("A", 90.20, None),
            ("I", 57.44, 83.82),
            ("E*A", 78.10, 94.65),
            ("A+E*A", 90.94, 98.17),
            ("Conv(A,E*A)", 90.81, 98.17),
            ("A+pool(I)", 91.15, 98.20),
            ("Conv(A,I)", 90.44, 98.23),
            ("A+pool(I)+pool(F)", 91.37, 98.04),
            ("Conv(A,I,F)", 90.89, 98.22),
        ]

    def test_table_4_and_ensembles(self) -> None:
        printed = {
            (row.dataset, row.num_segments): row.paper_top1
            for row in ROWS
            if row.table == "table-4" and row.strategy != "eco"
        }
        assert printed == {
            ("ucf101", (8,)): 91.4,
            ("ucf101", (16,)): 93.2,
            ("ucf101", (32,)): 94.1,
            ("hmdb51", (8,)): 68.8,
            ("hmdb51", (16,)): 71.6,
            ("hmdb51", (32,)): 70.1,
        }
        ensembles = {row.table: (row.num_segments, row.paper_top1) for row in select_rows(["table-3", "table-5"])}
        assert ensembles == {"table-3": ((16, 20, 24, 28, 32), 94.8), "table-5": ((16, 20, 24, 28, 32), 73.8)}

    def test_every_printed_number_has_a_protocol(self) -> None:
        printed = [row for row in ROWS if row.paper_top1 is not None]
        eco = [row for row in printed if row.strategy == "eco"]
        ensembles = [row for row in printed if row.table in ("table-3", "table-5")]
        assert {row.protocol for row in eco} == {"likely a mean over three splits"}
        assert {row.protocol for row in ensembles} == {"not known: split 1 or a mean over three splits"}
        assert {row.protocol for row in printed if row not in eco + ensembles} == {"likely split 1"}
        assert not any(row.protocol for row in (*ROWS, *EXTRA_ROWS) if row.paper_top1 is None)

    def test_figure_2_guesses_nothing(self) -> None:
        points = {(row.dataset, row.num_segments[0]): row.paper_top1 for row in select_rows(["figure-2"])}
        assert len(points) == 10
        assert all(points[dataset, k] is None for dataset in ("ucf101", "hmdb51") for k in (24, 48))

    def test_rows_share_their_trainings(self) -> None:
        assert len(ROWS) == 40
        assert len(trainings(ROWS)) == 39
        assert sum(training.strategy == "eco" for training in trainings(ROWS)) == 14

    def test_names_are_unique_and_tables_known(self) -> None:
        assert len({row.name for row in (*ROWS, *EXTRA_ROWS)}) == len(ROWS) + len(EXTRA_ROWS)
        assert {row.table for row in (*ROWS, *EXTRA_ROWS)} == set(QUESTIONS)

    def test_parents_come_first(self) -> None:
        order = in_order(reversed([training for row in ROWS for training in trainings_of(row, row.dataset)]))
        place = {training: index for index, training in enumerate(order)}
        twice = [training for training in order if training.strategy == "twice-finetune"]
        assert twice and all(place[t.parent] < place[t] and t.parent.num_segments == t.num_segments for t in twice)
        assert all(t.parent is None for t in order if t.strategy != "twice-finetune")

    def test_the_full_preset_is_the_papers_recipe(self) -> None:
        full = PRESETS["full"]
        assert (full.width, full.input_size, full.num_segments, full.tables, full.fusions) == (1.0, 224, None, (), ())
        for optim in (full.optim, full.eco_optim):
            assert (optim.lr, optim.momentum, optim.weight_decay, optim.batch) == (0.001, 0.9, 5e-4, 64)
        assert CONFIG.model.dropout == 0.3

    @pytest.mark.parametrize(("tables", "fusions"), [(["table-9"], []), ([], ["A+J"]), (["table-3"], ["E*A"])])
    def test_unknown_or_empty_selections(self, tables: list[str], fusions: list[str]) -> None:
        with pytest.raises(ConfigError):
            select_rows(tables, fusions)


class TestConfig:
    def test_fusion_names_are_the_networks(self) -> None:
        assert set(FUSION_TITLES) == set(READS)

    @pytest.mark.parametrize("key", FUSION_TITLES)
    def test_styles_are_known_by_key_and_by_the_papers_words(self, key: str) -> None:
        assert fusion_style(key) == fusion_style(FUSION_TITLES[key]) == fusion_style(f" {key.upper()} ") == key

    def test_unknown_fusion_gets_a_hint(self) -> None:
        with pytest.raises(ConfigError, match=r"unknown fusion 'conv\(A,J\)'; did you mean"):
            FusionConfig(style="conv(A,J)")

    def test_there_and_back(self) -> None:
        assert from_dict(TrainConfig, to_dict(CONFIG)) == CONFIG

    def test_text_overrides_are_typed(self) -> None:
        changed = replace(
            CONFIG,
            {
                "optim.epochs": "3",
                "optim.lr": "1e-2",
                "data.flip": "false",
                "data.scales": "1,0.5",
                "model.fusion.kernel": "3",
            },
        )
        assert changed.optim.epochs == 3 and changed.optim.lr == 0.01 and changed.data.flip is False
        assert changed.data.scales == (1.0, 0.5) and changed.model.fusion.kernel == 3
        assert CONFIG.optim.epochs == 40

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("optim.epoch", 3, "unknown setting 'optim.epoch'; near it: optim.epochs"),
            ("optim", 3, "unknown setting 'optim'"),
            ("optim.epochs", "many", "optim.epochs must be a whole number"),
            ("optim.epochs", 0, "epochs must be at least 1"),
            ("optim.epochs", 2.5, "must be a whole number"),
            ("data.num_segments", 0, r"num_segments \(K\) must be at least 1"),
            ("data.flip", "maybe", "must be true or false"),
            ("optim.schedule", "cosine", "must be one of plateau_on_test_as_in_eco, plateau_on_held_out, st"),
            ("model.width", 2, "width must be in"),
            ("model.fusion.style", "B", "unknown fusion"),
            ("optim.micro_batch", 24, "batch must be a multiple of micro_batch"),
            ("data.input_size", 100, "multiple of 8"),
            ("seed", -1, "seed must be at least 0"),
            ("data.scales", 2, "scales must be in"),
            ("data.workers", -1, "data.workers must be at least 0"),
            ("optim.clip_norm", 0, "clip_norm must be above 0"),
            ("optim.lr", "nan", "lr must be above 0"),
            ("optim.momentum", 0, "above 0 with nesterov"),
            ("optim.patience", 0, "patience must be at least 1"),
            ("model.appearance_mean", "1,2", "model.appearance_mean must be 3 values"),
        ],
    )
    def test_wrong_settings_say_what_is_wrong(self, name: str, value: object, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            replace(CONFIG, {name: value})

    def test_unknown_field_in_a_file(self) -> None:
        values = to_dict(CONFIG)
        values["optim"]["learning_rate"] = 1
        with pytest.raises(ConfigError, match=r"unknown setting 'optim\.learning_rate'"):
            from_dict(TrainConfig, values)

    def test_flat_names_are_the_override_names(self) -> None:
        flat = flatten(to_dict(CONFIG))
        assert replace(CONFIG, flat) == CONFIG

    def test_batch_smaller_than_micro_batch(self) -> None:
        assert OptimConfig(batch=4, micro_batch=16).batch == 4
