"""Does our study rank the rows of a table as the paper does? Every pair of rows, on the same videos and seeds.

Two rows of one table are compared video by video over the splits and seeds that both have finished, so that what is
hard for every network cancels. The 95 % interval of a difference is a bootstrap that draws videos (within a split) and,
where there are several, seeds. A pair is decided where it does not hold 0. Few seeds show their spread badly: with
three, intervals are rather too narrow.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pasnet.predictions import Predictions, ensemble, hits

Record = dict[str, Any]
RESAMPLES = 2000


def comparisons(records: Iterable[Record]) -> list[Record]:
    """One record per pair of rows that the paper ranks, and that both have a finished run of one split and seed.

    `records` are those of one study (pasnet/results.py: collect); their trainings' predictions are read. A comparison
    has `table`, `dataset` and:

    - `higher`, `lower`: {"title", "strategy"} of the row with the larger number in the paper, and of the other
    - `paper`: that difference in percent, more than 0; `ours`: our mean difference on the same runs
    - `low`, `high`: its 95 % interval; `splits`, `seeds`: what both rows have
    - `verdict`: "as in the paper", "the other way round", or "undecided" where the interval holds 0

    Pairs of equal numbers, rows without a printed number and evaluations without predictions (of before) give none.
    """
    tables: dict[tuple[str, str], dict[tuple[str, str], list[Record]]] = {}
    for record in records:
        if record["status"] == "done" and record["paper_top1"] is not None:
            rows = tables.setdefault((record["table"], record["dataset"]), {})
            rows.setdefault((record["title"], record["strategy"]), []).append(record)
    found = []
    known: dict[tuple[str, ...], dict[str, bool] | None] = {}
    for (table, dataset), rows in tables.items():
        for one, other in itertools.combinations(rows, 2):
            if rows[one][0]["paper_top1"] < rows[other][0]["paper_top1"]:
                one, other = other, one
            paper = round(rows[one][0]["paper_top1"] - rows[other][0]["paper_top1"], 2)
            differences = _differences(rows[one], rows[other], known)
            if paper > 0 and differences:
                about = {"table": table, "dataset": dataset, "paper": paper, **_estimate(differences)}
                places = (("higher", one), ("lower", other))
                found.append(about | {place: {"title": row[0], "strategy": row[1]} for place, row in places})
    return found


def _differences(
    higher: Sequence[Record], lower: Sequence[Record], known: dict[tuple[str, ...], dict[str, bool] | None]
) -> dict[int, dict[int, np.ndarray]]:
    """{split: {seed: int8 (videos,)}}: 1 where only the first row names the video's class, -1 where only the second.

    Only seeds that both rows have in every split that they share, so that a mean is of like with like.
    """
    by_place = [{(record["split"], record["seed"]): _hits_of(record, known) for record in of} for of in (higher, lower)]
    places = {at for at in by_place[0] if by_place[0][at] is not None and by_place[1].get(at) is not None}
    splits = sorted({split for split, _ in places})
    seeds = [seed for seed in sorted({seed for _, seed in places}) if all((split, seed) in places for split in splits)]
    found: dict[int, dict[int, np.ndarray]] = {}
    for split in splits if seeds else ():
        for seed in seeds:
            a, b = by_place[0][split, seed], by_place[1][split, seed]
            assert a is not None and b is not None
            keys = sorted(a.keys() & b.keys())
            signs = [int(a[key]) - int(b[key]) for key in keys]
            found.setdefault(split, {})[seed] = np.array(signs, np.int8)
    return found


def _hits_of(record: Record, known: dict[tuple[str, ...], dict[str, bool] | None]) -> dict[str, bool] | None:
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


def _estimate(differences: Mapping[int, Mapping[int, np.ndarray]]) -> Record:
    """Mean of the splits' means, and its interval; in percent."""
    rng = np.random.default_rng(0)
    splits = list(differences)
    seeds = list(differences[splits[0]])
    # how often a draw holds each seed; the same draw for all splits
    of_seeds = rng.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), RESAMPLES) / len(seeds)
    mean, draws = 0.0, np.zeros(RESAMPLES)
    for split in splits:
        by_seed = np.stack([differences[split][seed] for seed in seeds]).astype(np.float64)  # (seeds, videos)
        videos = by_seed.shape[1]
        of_videos = rng.multinomial(videos, np.full(videos, 1 / videos), RESAMPLES) / videos
        mean += float(by_seed.mean()) / len(splits)
        draws += np.einsum("rs,rs->r", of_seeds, of_videos @ by_seed.T) / len(splits)
    low, high = np.percentile(draws, [2.5, 97.5])
    verdict = "as in the paper" if low > 0 else "the other way round" if high < 0 else "undecided"
    return {
        "ours": round(100 * mean, 2),
        "low": round(100 * float(low), 2),
        "high": round(100 * float(high), 2),
        "splits": splits,
        "seeds": seeds,
        "verdict": verdict,
    }


def said(found: Sequence[Record]) -> list[str]:
    """What the comparisons of one table amount to, in sentences that claim no more; none where there are none."""
    if not found:
        return []
    same = sum(each["ours"] > 0 for each in found)
    opposite = sum(each["ours"] < 0 for each in found)
    count = {verdict: sum(each["verdict"] == verdict for each in found) for verdict in VERDICTS}
    runs = sorted({(len(each["splits"]), len(each["seeds"])) for each in found})
    drawn = "test videos and seeds" if runs[-1][1] > 1 else "test videos, which does not cover the spread of trainings"
    how_many = "; ".join(f"{_number(splits, 'split')}, {_number(seeds, 'seed')}" for splits, seeds in runs)
    chance = 0.05 * len(found)
    return [
        f"The paper ranks {_number(len(found), 'pair')} of these rows. Ours have {same} in the same order, {opposite} "
        f"in the other, {len(found) - same - opposite} equal (Kendall's tau {(same - opposite) / len(found):+.2f}).",
        f"Decided, that is, with a 95 % interval of our difference without 0 (same videos, {how_many}; bootstrap over "
        f"{drawn}): {count['as in the paper']} as in the paper, {count['the other way round']} the other way round; "
        f"{count['undecided']} undecided. Were all rows equal, some {chance:.1f} of so many would look decided.",
        "This holds for the data, the size of network and the start named above, and for nothing else.",
    ]


VERDICTS = ("as in the paper", "the other way round", "undecided")


def _number(count: int, name: str) -> str:
    return f"{count} {name}" + ("" if count == 1 else "s")


COLUMNS = ("higher in the paper", "lower", "paper's difference", "ours", "95 % interval", "verdict")


def cells(found: Iterable[Record]) -> list[tuple[str, ...]]:
    """A row of COLUMNS for each comparison, the paper's largest difference first."""
    return [
        (
            f"{each['higher']['title']}, {each['higher']['strategy']}",
            f"{each['lower']['title']}, {each['lower']['strategy']}",
            f"{each['paper']:+.2f}",
            f"{each['ours']:+.2f}",
            f"{each['low']:+.2f} to {each['high']:+.2f}",
            each["verdict"],
        )
        for each in sorted(found, key=lambda each: -each["paper"])
    ]
