"""Does our study rank the rows of a table as the paper does? Every pair of rows, on the same videos and seeds.

Two rows of one table are compared video by video over the splits and seeds that both have finished, so that what is
hard for every network cancels. A difference between two trainings of one recipe is no smaller for being measured on
many videos, so a pair is judged only where there are several seeds. Its 95 % interval adds two variances: of the mean
over seeds, from how the seeds differ, and of the mean over videos, from how whole groups of them differ (videos of one
actor and place, or of one film, are not independent). It is Student's, with Welch's and Satterthwaite's degrees of
freedom for the sum. A pair is decided where the interval does not hold 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pasnet.data import open_shards
from pasnet.experiments import EXTRA_TABLES
from pasnet.predictions import Predictions, ensemble, hits
from pasnet.study import EMBEDDED_SETS

Record = dict[str, Any]
Hits = dict[str, bool]  # by video key: whether its class was named


def comparisons(records: Iterable[Record]) -> list[Record]:
    """One record per pair of rows that the paper ranks, and that both have a finished run of one split and seed.

    `records` are those of one study (pasnet/results.py: collect); their trainings' predictions are read. A comparison
    has `table`, `dataset` and:

    - `higher`, `lower`: {"title", "strategy"} of the row with the larger number in the paper, and of the other
    - `paper`: that difference in percent, more than 0; `ours`: our mean difference on the same runs
    - `epochs`: what both rows had on the target set, such as ["30 + 5", "5"], where the sums differ; else []
    - `mixed`: whether the paper's two numbers are likely of two protocols (docs/paper.md, A22)
    - `low`, `high`: its 95 % interval, None with one seed; `splits`, `seeds`: what both rows have
    - `verdict`: "as in the paper", "the other way round", "undecided" where the interval holds 0, "one seed"

    Pairs of equal numbers, rows without a printed number and evaluations without predictions (of before) give none.
    """
    tables: dict[tuple[str, str], dict[tuple[str, str], list[Record]]] = {}
    for record in records:
        if record["status"] == "done" and record["paper_top1"] is not None:
            rows = tables.setdefault((record["table"], record["dataset"]), {})
            rows.setdefault((record["title"], record["strategy"]), []).append(record)
    found = []
    known: dict[tuple[str, ...], Hits | None] = {}
    groups: dict[str, dict[str, str]] = {}
    for (table, dataset), rows in tables.items():
        for one, other in itertools.combinations(rows, 2):
            if rows[one][0]["paper_top1"] < rows[other][0]["paper_top1"]:
                one, other = other, one
            paper = round(rows[one][0]["paper_top1"] - rows[other][0]["paper_top1"], 2)
            differences = _differences(rows[one], rows[other], known) if paper > 0 else {}
            if differences:
                folder = rows[one][0].get("shards", "")
                if folder not in groups:
                    groups[folder] = _groups(folder, across_classes=dataset in EMBEDDED_SETS)
                protocols = {rows[row][0].get("paper_protocol") for row in (one, other)}
                about = {"table": table, "dataset": dataset, "paper": paper, "mixed": len(protocols) > 1}
                trained = [rows[row][0].get("epochs", "") for row in (one, other)]
                about["epochs"] = trained if all(trained) and len(set(map(_total, trained))) > 1 else []
                about |= _estimate(differences, groups[folder])
                places = (("higher", one), ("lower", other))
                found.append(about | {place: {"title": row[0], "strategy": row[1]} for place, row in places})
    return found


def _total(epochs: str) -> int:
    """35 of "30 + 5"."""
    return sum(map(int, epochs.split(" + ")))


def _differences(
    higher: Sequence[Record], lower: Sequence[Record], known: dict[tuple[str, ...], Hits | None]
) -> dict[int, dict[int, dict[str, int]]]:
    """{split: {seed: {key: 1 where only the first row names the video's class, -1 where only the second, else 0}}}.

    Only seeds that both rows have in every split that they share, so that a mean is of like with like.
    """
    by_place = [{(record["split"], record["seed"]): _hits_of(record, known) for record in of} for of in (higher, lower)]
    places = {at for at in by_place[0] if by_place[0][at] is not None and by_place[1].get(at) is not None}
    splits = sorted({split for split, _ in places})
    seeds = [seed for seed in sorted({seed for _, seed in places}) if all((split, seed) in places for split in splits)]
    found: dict[int, dict[int, dict[str, int]]] = {}
    for split in splits if seeds else ():
        for seed in seeds:
            a, b = by_place[0][split, seed], by_place[1][split, seed]
            assert a is not None and b is not None
            found.setdefault(split, {})[seed] = {key: a[key] - b[key] for key in sorted(a.keys() & b.keys())}
    return found


def _hits_of(record: Record, known: dict[tuple[str, ...], Hits | None]) -> Hits | None:
    """Whether the run names each test video's class, by key; None where its predictions are not there."""
    folders = tuple(record["trainings"])
    if folders not in known:
        files = [Path(folder) / "evaluation" / "predictions.parquet" for folder in folders]
        if not all(file.is_file() for file in files):
            known[folders] = None
        else:
            read = [Predictions.load(file) for file in files]
            predictions = read[0] if len(read) == 1 else ensemble(read, names=[str(file) for file in files])
            known[folders] = dict(zip(predictions.keys, hits(predictions)[0].tolist(), strict=True))
    return known[folders]


def _groups(folder: str, *, across_classes: bool) -> dict[str, str]:
    """Each video's group, by key; nothing where the shards are not there: every video is then one of its own.

    `across_classes`: g01 of one class has the actor and the place of g01 of another, which UCF-101's has not.
    """
    if not folder or not (Path(folder) / "index.parquet").is_file():
        return {}
    shards = open_shards(Path(folder))
    names = zip(shards.keys, shards.groups, strict=True)
    return {key: group.rpartition("/")[2] if across_classes else group for key, group in names if group}


def _estimate(differences: Mapping[int, Mapping[int, Mapping[str, int]]], groups: Mapping[str, str]) -> Record:
    """Mean of the splits' means, and its interval; in percent."""
    splits = list(differences)
    seeds = list(differences[splits[0]])
    by_seed = np.zeros(len(seeds))
    spread, clusters = 0.0, 0
    for split in splits:
        keys = list(differences[split][seeds[0]])
        values = np.array([[differences[split][seed][key] for key in keys] for seed in seeds], np.float64)
        by_seed += values.mean(1) / len(splits)
        names, of = np.unique([groups.get(key, key) for key in keys], return_inverse=True)
        rest = values.mean(0) - values.mean()
        sums = np.bincount(of, rest)
        many = len(names)
        # variance of a mean over clusters of unequal size, linearised (as of a ratio)
        spread += many / max(many - 1, 1) * float((sums**2).sum()) / len(keys) ** 2 / len(splits) ** 2
        clusters += many
    mean = float(by_seed.mean())
    about: Record = {"ours": round(100 * mean, 2), "splits": splits, "seeds": seeds}
    if len(seeds) == 1:
        return {**about, "low": None, "high": None, "verdict": "one seed"}
    of_seeds = float(by_seed.var(ddof=1)) / len(seeds)
    variance = of_seeds + spread
    freedom = float(clusters - len(splits))
    if variance:
        parts = [part**2 / max(n, 1) for part, n in ((of_seeds, len(seeds) - 1), (spread, clusters - len(splits)))]
        freedom = variance**2 / sum(parts)
    margin = student(freedom) * math.sqrt(variance) if variance else 0.0
    low, high = mean - margin, mean + margin
    verdict = "as in the paper" if low > 0 else "the other way round" if high < 0 else "undecided"
    return {**about, "low": round(100 * low, 2), "high": round(100 * high, 2), "verdict": verdict}


def student(freedom: float) -> float:
    """Within how many standard errors 95 % of Student's distribution lie. With x = sqrt(freedom) tan(a) its density is
    that of cos(a)^(freedom - 1)."""
    angle = np.linspace(0.0, np.pi / 2, 200_001)
    density = np.cos(angle) ** (freedom - 1)
    area = np.cumsum(density[1:] + density[:-1])
    return float(math.sqrt(freedom) * math.tan(angle[1 + np.searchsorted(area, 0.95 * area[-1])]))


def said(found: Sequence[Record]) -> list[str]:
    """What the comparisons of one table amount to, dataset by dataset, in sentences that claim no more; none where
    there are none."""
    if not found:
        return []
    datasets = list(dict.fromkeys(each["dataset"] for each in found))
    lines = []
    for dataset in datasets:
        before = f"{dataset}: " if len(datasets) > 1 else ""
        lines += [before + line for line in _said([each for each in found if each["dataset"] == dataset])]
    return [*lines, "This holds for the data, the size of network and the start named above, and for nothing else."]


def _said(found: Sequence[Record]) -> list[str]:
    """Of one dataset."""
    same = sum(each["ours"] > 0 for each in found)
    opposite = sum(each["ours"] < 0 for each in found)
    ranks = "The paper's numbers of Table I rank" if found[0]["table"] in EXTRA_TABLES else "The paper ranks"
    lines = [
        f"{ranks} {_number(len(found), 'pair')} of these rows. Ours have {same} in the same order, {opposite} "
        f"in the other, {len(found) - same - opposite} equal (Kendall's tau {(same - opposite) / len(found):+.2f})."
    ]
    if mixed := sum(each.get("mixed", False) for each in found):
        lines.append(
            f"In {_number(mixed, 'pair')} the paper's two numbers are likely of two protocols, split 1 and a mean over "
            "three splits (marked *): its order of those may be the protocols'."
        )
    judged = [each for each in found if each["verdict"] != "one seed"]
    if judged:
        count = {verdict: sum(each["verdict"] == verdict for each in judged) for verdict in VERDICTS}
        runs = sorted({(len(each["splits"]), len(each["seeds"])) for each in judged})
        how_many = "; ".join(f"{_number(splits, 'split')}, {_number(seeds, 'seed')}" for splits, seeds in runs)
        lines.append(
            f"Decided, that is, with a 95 % interval of our difference without 0 (same videos, {how_many}; over seeds "
            f"and groups of videos): {count['as in the paper']} as in the paper, {count['the other way round']} the "
            f"other way round; {count['undecided']} undecided. Pairs that share a row are not independent, and of many "
            "pairs some look decided by chance."
        )
    if unequal := [each for each in found if each.get("epochs")]:
        settled = sum(each["verdict"] in VERDICTS[:2] for each in unequal)
        lines.append(
            f"In {_number(len(unequal), 'pair')} (marked †), {settled} of them decided, the two rows have different "
            "numbers of epochs on the target set: a difference may be one of training time alone."
        )
    if len(judged) < len(found):
        some = "" if judged else "None is judged: "
        lines.append(
            f"{some}{_number(len(found) - len(judged), 'pair')} with one seed: two trainings of one recipe may differ "
            "by as much."
        )
    return lines


VERDICTS = ("as in the paper", "the other way round", "undecided")


def _number(count: int, name: str) -> str:
    return f"{count} {name}" + ("" if count == 1 else "s")


COLUMNS = ("higher in the paper", "lower", "paper's difference", "ours", "95 % interval", "verdict")


def cells(found: Sequence[Record]) -> list[tuple[str, ...]]:
    """A row of COLUMNS for each comparison, the paper's largest difference first."""
    several = len({each["dataset"] for each in found}) > 1  # Table IV and Fig. 2 have the same titles for both

    def name(each: Record, place: str) -> str:
        of = each[place]
        return f"{of['title']}, {of['strategy']}" + (f", {each['dataset']}" if several else "")

    return [
        (
            name(each, "higher"),
            name(each, "lower"),
            f"{each['paper']:+.2f}" + (" *" if each.get("mixed") else ""),
            f"{each['ours']:+.2f}" + (" †" if each.get("epochs") else ""),
            "–" if each["low"] is None else f"{each['low']:+.2f} to {each['high']:+.2f}",
            each["verdict"],
        )
        for each in sorted(found, key=lambda each: -each["paper"])
    ]
