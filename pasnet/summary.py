"""A row over its splits and seeds: means and standard deviations of the records of pasnet/results.py.

Two protocols, each a number of its own and never in one mean (which of them the paper used is unknown, docs/paper.md
A22): one split alone, over seeds; and the mean over several splits. For the second, each seed's mean over the splits
comes first, then the mean and the standard deviation (n - 1) over seeds. A seed that lacks a split has no such mean
and is left out, by name. With one seed the standard deviation is that over its splits, which also holds how much the
splits differ in difficulty, and it is called so.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

Record = dict[str, Any]
METRICS = ("top1", "top5", "mean_class")
GROUP = (
    "table",
    "title",
    "strategy",
    "fusion",
    "paper_dataset",
    "dataset",
    "paper_top1",
    "paper_top5",
    "paper_protocol",
)


def summaries(records: Iterable[Record]) -> list[Record]:
    """One record per row, dataset and protocol, where the records have more than one split or seed.

    `records` are those of one study (pasnet/results.py: collect). A split alone is summarised when it was asked for
    with several seeds and is the only one or split 1; the mean over splits when several were asked for. A summary has
    GROUP and:

    - `splits`: what is averaged, ascending; [1] is split 1 alone
    - `seeds`: those that have all of these splits; `left_out`: {seed: reason} of the others
    - `status`: "done", or "incomplete" where no seed is left
    - `mean`, `sd`: {"top1", "top5", "mean_class"} in percent; an sd of None where there is one number only
    - `sd_over`: "seeds", "splits" or ""; `n`: how many numbers it is over; `runs`: how many runs the mean is of
    - `gap`, `gap_top5`: mean less the paper's, or None; `seconds`: of all its runs
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record.get(name) for name in GROUP), []).append(record)
    found = []
    for row, members in groups.items():
        if all(record["status"] == "not run" for record in members):
            continue  # the table of runs says why
        about = dict(zip(GROUP, row, strict=True))
        splits = sorted({record["split"] for record in members})
        seeds = sorted({record["seed"] for record in members})
        alone = 1 if 1 in splits else splits[0]
        if len(seeds) > 1 and (alone == 1 or len(splits) == 1):
            found.append({**about, **_over([alone], seeds, members)})
        if len(splits) > 1:
            found.append({**about, **_over(splits, seeds, members)})
    return found


def _over(splits: Sequence[int], seeds: Sequence[int], members: Sequence[Record]) -> Record:
    at = {(record["split"], record["seed"]): record for record in members}
    left_out: dict[int, str] = {}
    for seed in seeds:
        lacking = [split for split in splits if at.get((split, seed), {}).get("status") != "done"]
        if lacking:
            status = at.get((lacking[0], seed), {}).get("status", "not run")
            left_out[seed] = f"split {', '.join(map(str, lacking))} {status}"
    kept = [seed for seed in seeds if seed not in left_out]
    base = {"splits": list(splits), "seeds": kept, "left_out": left_out}
    if not kept:
        return {**base, "status": "incomplete"}
    used = [at[split, seed] for seed in kept for split in splits]
    mean, sd = {}, {}
    # one number each: a seed's mean over the splits, or, with one seed, a split's
    sd_over = "seeds" if len(kept) > 1 else "splits" if len(splits) > 1 else ""
    for name in METRICS:
        if any(record.get(name) is None for record in used):
            continue  # results.json of before had no mean_class
        by_seed = [statistics.fmean(at[split, seed][name] for split in splits) for seed in kept]
        numbers = by_seed if len(kept) > 1 else [at[split, kept[0]][name] for split in splits]
        mean[name] = round(statistics.fmean(by_seed), 4)
        sd[name] = round(statistics.stdev(numbers), 4) if sd_over else None
    gaps = {"gap": (used[0]["paper_top1"], mean["top1"]), "gap_top5": (used[0]["paper_top5"], mean["top5"])}
    return {
        **base,
        "status": "done",
        "mean": mean,
        "sd": sd,
        "sd_over": sd_over,
        "n": len(kept) if len(kept) > 1 else len(splits),
        "runs": len(used),
        "num_segments": used[0]["num_segments"],
        **{name: None if paper is None else round(ours - paper, 2) for name, (paper, ours) in gaps.items()},
        "seconds": round(sum(record["seconds"] for record in used), 1),
    }


def protocol(summary: Record) -> str:
    """What was averaged, for a heading: "split 1" or "mean over splits 1, 2, 3"."""
    splits = ", ".join(map(str, summary["splits"]))
    return f"mean over splits {splits}" if len(summary["splits"]) > 1 else f"split {splits}"
