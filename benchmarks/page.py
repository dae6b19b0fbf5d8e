"""docs/performance.md from the JSON in benchmarks/results/: `python -m benchmarks page`.

The prose is fixed; every measured number is taken from the JSON. A paragraph on a bound that is missed appears where
one is. tests/test_benchmarks.py holds the page in docs/ against this: it is neither edited by hand nor outdated.
"""

from __future__ import annotations

import functools
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import QUIET, RESULTS, TRIES
from benchmarks.second_run import AGAIN
from benchmarks.shards_build import HEIGHT, WIDTH, X264, name_of
from benchmarks.shards_read import PLANES, RAW
from benchmarks.study import PEAK, STUDY
from benchmarks.train_loop import LOOP, SHARES
from pasnet.machine import family

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
PARTS = {
    "build": "building",
    "read": "reading",
    "index": "the index",
    "train-loop": "the training loop",
    "study": "the study",
    "second-run": "the second run",
}
# What older results are results of: until which day, which part, what it did otherwise
CHANGES = (
    ("2026-11-25", "build", "several workers of a build were threads of one process; now each is a process"),
    ("2026-11-26", "build", "one worker of decoder pyav was the caller's process; now it is one of its own"),
    ("2026-11-26", "build", "every video had an ffmpeg process of its own; now small ones share it, four at a time"),
    ("2026-11-26", "build", "by the clock, builds were of 91 videos, two in a shard; now they are larger"),
    ("2026-11-25", "read", "the loader gave a GPU planes cropped and resized on the CPU; now it gives whole frames"),
)

LOOP_SHARES = {
    "outside the network": "share_outside_forward_and_backward",
    "slower than alone": "share_beside_the_network",
    "in the first two epochs": "share_in_the_first_two_epochs",
    "waiting for data": "data_wait",
}

Row = dict[str, Any]


class Result(NamedTuple):
    """One JSON file: which part it measures, the name of its machine (a column), its content."""

    part: str
    machine: str
    content: dict[str, Any]


def rate_of(row: dict[str, Any], content: dict[str, Any]) -> str:
    """Clips per second and, of a GPU, utilisation: a CPU's cores are shared, and the rate that it is a share of too."""
    rate, on_cpu = str(number(row["clips_per_second"])), content["hardware"].endswith(" cores")
    return rate if on_cpu else f"{rate} ({100 * row['utilisation']:.0f} %)"


def write(results: Path = RESULTS, page: Path = PAGE) -> None:
    """Writes the page."""
    page.write_text(render(results), "utf-8")
    print(page)


def render(results: Path = RESULTS) -> str:
    """The page for the JSON files in `results`."""
    found = read(results)
    data = [result for result in found if result.part != "models"]
    models = [result for result in found if result.part == "models"]
    blocks = [*head(data), *(bounds_section(data) if data else [])]
    for part, section in (
        ("build", building),
        ("read", reading),
        ("index", index),
        ("train-loop", looping),
        ("study", conducting),
        ("second-run", repeating),
    ):
        if of := [result for result in data if result.part == part]:
            blocks += section(of)
    for part in dict.fromkeys(result.part for result in data if result.part not in PARTS):
        blocks += anything([result for result in data if result.part == part])
    blocks += networks(models) if models else ["## Networks", "There is no JSON on the speed of the networks yet."]
    return "\n\n".join(blocks) + "\n"


def read(folder: Path) -> list[Result]:
    """The JSON files, by machine and then by part. Quick runs of the networks say nothing and are left out."""
    contents = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))}
    sets = sorted({content["dataset"] for content in contents.values() if "dataset" in content})
    usual = "ucf101" if "ucf101" in sets else sets[0] if sets else ""
    found = []
    for stem, content in contents.items():
        if stem.startswith("model-speed") and not stem.endswith("-quick"):
            found.append(Result("models", short(content["hardware"]), content))
        elif "cpu" in content:
            part = stem.removeprefix("shards-").removesuffix(f"-{family(content['cpu'])}")
            part = part.removesuffix(f"-{content.get('dataset')}")
            other = content.get("dataset", usual)
            machine = " ".join(short(content["cpu"]).split()[:2]) + (f", {other}" if other != usual else "")
            found.append(Result(part, machine, content))
    return sorted(found, key=lambda result: (result.machine, order(result)))


def order(result: Result) -> tuple[int, str]:
    """Where a part has its place: as in PARTS, then what this page has no words for."""
    return (list(PARTS).index(result.part) if result.part in PARTS else len(PARTS), result.part)


def short(name: str) -> str:
    """A processor's or GPU's name without its trade marks."""
    return re.sub(r"\s+(?=,|$)|\s+(?=\s)", "", re.sub(r"\(\w+\)|\b(Processor|CPU)\b", "", name))


# ---- Markdown ----


def prose(*sentences: str, first: str = "") -> str:
    """A paragraph of at most 120 columns; `first` is what a list's item begins with. No word that Markdown would take
    for the beginning of something else comes to begin a line."""
    text = re.sub(r" (?=>|(?:[+#*-]+|\d+[.)])\s)", "\0", " ".join(filter(None, sentences)))
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    lines = textwrap.wrap(text, 120, initial_indent=first, subsequent_indent=" " * len(first), **options)
    return "\n".join(lines).replace("\0", " ")


def table(columns: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A Markdown table; None is a dash."""
    cells = [["–" if cell is None else str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *cells))


def number(value: float | None) -> str | None:
    """Three digits or so."""
    if value is None:
        return None
    return f"{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3}f}"


def peer(row: Row) -> str:
    """A row's name, ours in bold."""
    return f"**{row['peer']}**" if row["peer"].startswith("ours") else row["peer"]


def series(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def by_machine(of: Iterable[Result], value: Callable[[Result], float | str | None], unit: str = "") -> str:
    """`1.73x (AMD EPYC) and 1.88x (Intel Xeon)`."""
    pairs = [(value(result), result.machine) for result in of]
    texts = [(found if isinstance(found, str) else number(found), machine) for found, machine in pairs]
    return series([f"{text}{unit} ({machine})" for text, machine in texts if text is not None])


def machines(of: Iterable[Result]) -> list[str]:
    """The columns."""
    return list(dict.fromkeys(result.machine for result in of))


# ---- what the JSON holds ----


def rows(result: Result, title: str) -> list[Row]:
    """The rows of the table whose title begins so, without the peers that were not run."""
    return [row for row in all_rows(result, title) if "not_run" not in row]


def all_rows(result: Result, title: str) -> list[Row]:
    """All rows of that table."""
    return next((table for name, table in result.content["tables"].items() if name.startswith(title)), [])


def one(result: Result, title: str, name: str) -> Row:
    """The row of a peer, empty where there is none."""
    return next((row for row in rows(result, title) if row["peer"] == name), {})


def not_run(result: Result, title: str) -> list[str]:
    """A paragraph on the peers of a table that were not run, if any."""
    missing = [f"{row['peer']} ({row['not_run']})" for row in all_rows(result, title) if "not_run" in row]
    return [prose(f"Not run: {'; '.join(missing)}.")] if missing else []


def measured(result: Result, *words: str) -> float | None:
    """What was measured for the bound whose text holds these words."""
    of = [line["measured"] for line in result.content["bounds"] if all(word in line["bound"] for word in words)]
    return of[0] if of else None


def missed(of: Iterable[Result], *words: str) -> bool:
    """Whether a bound whose text holds these words is missed anywhere."""
    lines = [line for result in of for line in result.content["bounds"] if line["met"] is False]
    return any(all(word in line["bound"] for word in words) for line in lines)


def bounds_table(of: Sequence[Result]) -> str:
    """A line per bound, a column per machine. Newer results give the order, what only older ones have comes last."""
    lines: dict[tuple[tuple[int, str], str], dict[str, str]] = {}
    for result in sorted(of, key=lambda result: result.content["date"], reverse=True):
        for line in result.content["bounds"]:
            verdict = {True: "met", False: "**not met**", None: "not measured"}[line["met"]]
            value = "" if line["measured"] is None else f"{line['measured']:g}, "
            lines.setdefault((order(result), line["bound"]), {})[result.machine] = value + verdict
    columns = machines(of)
    ordered = sorted(lines.items(), key=lambda item: item[0][0])
    return table(("bound", *columns), [(text, *map(cells.get, columns)) for (_, text), cells in ordered])


# ---- sections ----


def head(data: Sequence[Result]) -> Iterator[str]:
    """How it is measured, and on what."""
    yield "# Performance"
    yield prose("Generated by `python -m benchmarks page` from the JSON in `benchmarks/results/`; do not edit.")
    yield prose(
        "`python -m benchmarks [build|read|index|loop|all] --data FOLDER` (`make bench DATA=FOLDER`, which writes this",
        "page, too) runs the data path against named peers, and the training loop: alternated in a new order every",
        "round, a ratio within each round, medians over rounds. (Studies are not alternated: `python -m benchmarks",
        "study` has a process tree of its own as the peer, `python -m benchmarks again` none.) CPU time (user +",
        "system of the process tree) where one process works; the clock where several do, and then a sample in which",
        "other processes used more than",
        f"{100 * QUIET:.0f} % of the machine is taken again, up to {TRIES - 1} times. The peers live in an environment",
        "of their own (`benchmarks/requirements.txt`); one that is not installed is listed as not run. The JSON holds",
        "every round, and the machine's load before and after, since the machines have other work, too. Read the",
        "ratios.",
    )
    if not data:
        return
    yield "## Machines"
    columns = machines(data)

    def line(name: str, parts: Iterable[str], text: Callable[[dict[str, Any]], str]) -> list[str]:
        texts: dict[str, list[str]] = {machine: [] for machine in columns}
        for result in data:
            if result.part in parts and (said := text(result.content)) not in texts[result.machine]:
                texts[result.machine].append(said)
        return [name, *("; ".join(of) or "–" for of in texts.values())]

    def when(content: dict[str, Any]) -> str:
        load = " to ".join(map(str, content["load_before_and_after"]))
        return f"{content['date']}, {content['rounds']} rounds, load {load}"

    parts = dict.fromkeys(result.part for result in sorted(data, key=order))
    facts = [
        line("processor", parts, lambda of: f"{of['cpu']}, {of['cores']} cores, {of['memory_gib']} GiB"),
        line("system", parts, lambda of: of["system"]),
        line("Python", parts, lambda of: of["python"]),
        line("ffmpeg", parts, lambda of: of["ffmpeg"]),
        line("commit", parts, lambda of: of.get("commit", "not recorded")),
        *(line(PARTS.get(part, part), [part], when) for part in parts),
    ]
    yield table(("", *columns), facts)
    versions: dict[str, list[Result]] = {}
    for result in data:
        said = ", ".join(f"{name} {version}" for name, version in result.content["versions"].items())
        versions.setdefault(said, []).append(result)
    for said, of in versions.items():
        titles = series([PARTS.get(part, part) for part in parts if any(result.part == part for result in of)])
        yield prose(f"Packages for {titles} ({series(machines(of))}): {said}.")
    old = [
        f"{PARTS[part]} on {result.machine} ({result.content['date']}): {change}"
        for date, part, change in CHANGES
        for result in data
        if result.part == part and result.content["date"] < date
    ]
    if old:
        yield prose(f"Some results are of older code. {'. '.join(text[0].upper() + text[1:] for text in old)}.")


def bounds_section(data: Sequence[Result]) -> Iterator[str]:
    """The table of bounds, and what is behind those that are missed."""
    yield "## Bounds"
    yield prose(
        "What was measured is a ratio where the bound does not name a unit. A dash: those results do not have the",
        "bound, or have it under the name of what older code did.",
    )
    yield bounds_table(data)
    builds, reads, loops = ([of for of in data if of.part == part] for part in ("build", "read", "train-loop"))
    why = [*missed_in_building(builds), *missed_in_reading(reads), *missed_in_looping(loops)]
    if why:
        yield "What is behind bounds that are not met, or not everywhere:"
        yield "\n".join(why)


def missed_in_building(of: Sequence[Result]) -> Iterator[str]:
    """Workers; video2dataset."""
    title, per_frame = "wall time of whole builds", "CPU per frame"

    def busy(result: Result) -> str | None:
        row = one(result, title, name_of("ffmpeg", 1, 2))
        return f"{row['cpu_ms_per_frame'] / row['wall_ms_per_frame']:.1f}" if row else None

    careful = [result.machine for result in of if list(unseen(rows(result, title)))]
    if missed(of, "2 workers on 2 cores"):
        ratios = [
            f"with decoder {decoder} "
            + by_machine(of, lambda r, d=decoder: measured(r, f"decoder {d}: 2 workers", "1 core"), "x")  # type: ignore[misc]
            for decoder in ("ffmpeg", "pyav")
        ]
        yield prose(
            f"**Workers.** Two workers on two cores are, of one worker that has one core, {'; '.join(ratios)}.",
            "One worker with decoder ffmpeg that has two cores is two processes already, ffmpeg and the encoder, and",
            f"keeps about {by_machine(of, busy)} cores busy (CPU time over the clock): two cores do not leave the",
            "bound's ratio over that. Workers that take all cores of a machine keep to one each.",
            f"The times of two workers on {series(careful)} want care, see there." if careful else "",
            first="- ",
        )
    if missed(of, X264):
        yield prose(
            "**video2dataset.** Its path takes",
            f"{by_machine(of, lambda r: one(r, per_frame, X264).get('cpu_ms_per_frame'))} ms of CPU a frame, less than",
            "the note has that the bound was taken from. Against the fast decoder the ratio is",
            f"{by_machine(of, lambda r: measured(r, X264, 'the fast decoder'))}, against the default decoder",
            f"{by_machine(of, lambda r: measured(r, X264, 'the default decoder'))}. In the note, 7.7 to 8.9 ms are 3.2",
            "times the 2.4 to 2.8 ms of ffmpeg to RGB and Pillow: 8x less is 0.40x of those, the bound of the fast",
            "decoder, and the default decoder's own, 0.65x, is 4.9x less.",
            first="- ",
        )


def missed_in_reading(of: Sequence[Result]) -> Iterator[str]:
    """The raw memory-map; RGB through a plain loader."""
    title, alone = "DataLoader", "one process"

    def spread(result: Result, which: Callable[[list[float]], float]) -> float | None:
        raw, ours = one(result, title, RAW), reference(result)
        if not raw or not ours:
            return None
        return which([a / b for a, b in zip(raw["wall_ms_of_rounds"], ours["wall_ms_of_rounds"], strict=True)])

    def ring(result: Result) -> Row:
        return next((row for row in rows(result, title) if row["peer"].startswith(f"{RAW}, through")), {})

    def times(result: Result) -> float | None:
        raw, through = one(result, title, RAW), ring(result)
        return raw["wall_ms_per_clip"] / through["wall_ms_per_clip"] if raw and through else None

    if missed([r for r in of if reference(r)], "loader", RAW):
        ranges = [f"{number(spread(r, min))} to {number(spread(r, max))} ({r.machine})" for r in of if spread(r, min)]
        yield prose(
            f"**The raw memory-map.** From round to round the ratio is {series(ranges)}. The peer decodes nothing: in",
            f"all it takes {by_machine(of, lambda r: one(r, title, RAW).get('cpu_ms_per_clip'))} ms of CPU a clip,",
            "loader included. Reading, decoding and resizing a clip's JPEGs takes us",
            f"{by_machine(of, lambda r: one(r, alone, PLANES).get('cpu_ms_per_clip'))} ms in one process, without any",
            "loader. The peer is spared the decoding: where a machine's memory is quick beside its decoding, the ratio",
            "falls. About the peer: it is opened anew in every epoch, since an epoch of a whole dataset would find",
            "none of the last one's pages, and makes new shared memory for every batch, which our ring of slots does",
            f"without. Through such a ring it would be {by_machine(of, times)} times as fast: that is the ceiling",
            "without JPEG, for many times the disk.",
            first="- ",
        )
    if missed(of, "for comparison"):
        yield prose(
            "**For comparison.** The loader's bounds are held against what a GPU is given, whole frames as planes,",
            "whose crop, resize and colour are still to be done there. These lines hold what workers finish, through a",
            "plain DataLoader, against the same numbers: planes that are cropped and resized, and RGB, which a CPU is",
            "given.",
            first="- ",
        )


def missed_in_looping(of: Sequence[Result]) -> Iterator[str]:
    """The loader's workers beside a small network."""
    slower = SHARES["share_beside_the_network"]
    cases = {line["bound"].partition(":")[0]: result for result in of for line in result.content["bounds"]
             if line["met"] is False and slower in line["bound"]}  # fmt: skip
    for case, result in cases.items():
        row = one(result, LOOP, case)
        yield prose(
            f"**{case} ({result.machine}).** Outside forward and backward pass are",
            f"{100 * row['share_outside_forward_and_backward']:.1f} % of a step. The rest of the",
            f"{100 * row['share_beside_the_network']:.1f} % that it is slower by than the network alone is in those",
            "passes: the loader's workers decode on the cores that they run on.",
            first="- ",
        )


def reference(result: Result) -> Row:
    """Ours for a GPU in the table of loaders: what the other rows' ratios are of."""
    return next((row for row in rows(result, "DataLoader") if row["wall_times_ours"] == 1), {})


def building(of: Sequence[Result]) -> Iterator[str]:
    """Tables of building, machine by machine."""
    yield "## Building, .avi to JPEG in tar"
    yield prose(
        f"Every frame of a video, {WIDTH}x{HEIGHT}, into a tar; checksums, tar and index included for ours. The",
        "encoders' qualities differ: ours and Pillow's are quality 90, 4:2:0. video2dataset's path runs on a part of",
        "the videos, scaled by their frames, for it takes long. Memory is the peak of PSS (shared pages by share) of",
        "all processes together.",
    )
    for result in of:
        content = result.content
        yield f"### Building on {result.machine}"
        copies, each = content.get("copies_by_the_clock"), content.get("videos_a_shard")
        yield prose(
            f"{content['videos']} videos of {content['dataset']}, {content['frames']:,} frames, one worker; whole",
            f"builds and memory: {content['videos_of_workers_and_memory']} videos,",
            f"{content['frames_of_workers_and_memory']:,} frames.",
            f"For the builds that are timed, each is used {copies} times; a shard holds about {each}."
            if copies
            else "",
        )
        costs = rows(result, "CPU per frame")
        cells = [(peer(row), number(row["cpu_ms_per_frame"]), number(row["cpu_times_ours"])) for row in costs]
        yield table(("one worker", "CPU ms per frame", "x default"), cells)
        yield from not_run(result, "CPU per frame")
        walls = {tuple(row["peer"].split(", ", 1)): row for row in rows(result, "wall time")}
        cases, decoders = sorted({case for _, case in walls}), sorted({decoder for decoder, _ in walls})
        values = [(d, *(number(walls.get((d, case), {}).get("wall_ms_per_frame")) for case in cases)) for d in decoders]
        yield table(("whole builds, ms per frame by the clock", *cases), values)
        yield from not_run(result, "wall time")
        yield from unseen(rows(result, "wall time"))
        yield "\n".join(
            f"- the whole UCF-101 on two cores, {row['peer']}: {row['arithmetic']} = {row['minutes']} minutes"
            for row in rows(result, "the whole")
        )
        title = next(name for name in content["tables"] if name.startswith("memory"))
        thirds = ("first_third_peak_mib", "middle_third_peak_mib", "last_third_peak_mib")
        columns = (f"{title}, MiB", "first third", "middle", "last third")
        yield table(columns, [(row["peer"], *(f"{row[third]:.0f}" for third in thirds)) for row in rows(result, title)])


def unseen(walls: Sequence[Row]) -> Iterator[str]:
    """A warning on builds whose worker processes were not counted as ours."""
    least = min((row["cpu_ms_per_frame"] for row in walls if "1 worker" in row["peer"]), default=0.0)
    of = [row for row in walls if row["others_share"] > QUIET and row["cpu_ms_per_frame"] < least / 2]
    if of:
        cases = [f"{row['peer']} ({100 * row['others_share']:.0f} %)" for row in of]
        yield prose(
            f"To be read with care: {series(cases)}. The share is what others seem to have used of the machine, but",
            "the harness did not see the CPU time of these builds' own worker processes and took it for that of",
            f"others. So whether the machine was calm was not checked here, and of up to {TRIES} samples a round the",
            "one with the smallest such share was kept. The times themselves are the build's own clock.",
        )


def reading(of: Sequence[Result]) -> Iterator[str]:
    """Tables of reading, machine by machine."""
    yield "## Reading"
    yield prose(
        "The same random frames under the same random crop for all peers of a round, and the very same JPEGs.",
        "*Pixels*: mean absolute difference to ours (of 255), so that a peer that reads other frames is noticed; those",
        "on the .avi never saw a JPEG. *Mapped*: read through a memory map, which the kernel does not count.",
    )
    yield prose(
        "What the loader gives a GPU are whole frames as planes; crop, mirror, resize and colour are left to the",
        "device (`pasnet.data.rgb_of_planes`). What that costs on one CPU thread stands below each table of loaders:",
        "planes are for GPUs, whose cost for it is not in these files, and a CPU gets RGB.",
    )
    for result in of:
        content = result.content
        yield f"### Reading on {result.machine}"
        yield prose(f"{content['videos']} videos of {content['dataset']}. {content['what']}.")

        def mapped(share: float | None) -> str | None:
            return "mapped" if share is None or share < 0.5 else number(share)

        lines = [
            (
                peer(row),
                number(row["cpu_ms_per_clip"]),
                number(row["cpu_times_ours"]),
                mapped(row["bytes_read_over_bytes_used"]),
                None if row["mean_difference_to_ours"] is None else f"{row['mean_difference_to_ours']:.2f}",
            )
            for row in rows(result, "one process")
        ]
        yield table(("one process", "CPU ms per clip", "x ours, RGB", "bytes read / used", "pixels"), lines)
        yield from not_run(result, "one process")
        title = next(name for name in content["tables"] if name.startswith("DataLoader"))
        loaders = [
            (peer(row), number(row["clips_per_s"]), number(row["cpu_ms_per_clip"]), number(row["wall_times_ours"]))
            for row in rows(result, title)
        ]
        yield table((title, "clips/s", "CPU ms per clip", "time, x ours for a GPU"), loaders)
        yield from not_run(result, title)
        for name in content["tables"]:
            if "which a GPU would do" in name:
                for row in rows(result, name):
                    yield prose(f"`{row['peer'].split()[0]}` on one CPU thread ({name}):",
                                f"{number(row['cpu_ms_per_clip'])} ms of CPU a clip.")  # fmt: skip


def index(of: Sequence[Result]) -> Iterator[str]:
    """One line per machine."""
    yield "## The index"
    yield prose(f"Measured is {of[-1].content['what']}; imports are done before.")
    lines = [
        (result.machine, f"{row['wall_s']:.3f}", row["index_mb"])
        for result in of
        for row in rows(result, "open_shards")
    ]
    yield table(("", "seconds", "index, MB"), lines)


def looping(of: Sequence[Result]) -> Iterator[str]:
    """benchmarks/train_loop.py, machine by machine."""
    yield "## The training loop"
    yield prose(
        "`pasnet train`'s own loop. *Outside the network* is the share of a step's time that is not in forward or",
        "backward pass. *Slower than alone* is what an epoch loses against the same passes with nothing in between and",
        "no workers, an epoch of each in turn; the median of the rounds. The first two epochs are apart: the workers",
        "of the training and of the test list are forked there, and until the training process has written to all of",
        "its memory once more, each page that it shares with a fork costs it a copy.",
    )
    for result in of:
        yield f"### The training loop on {result.machine}"
        yield prose(f"{result.content['training_clips']} training clips; {result.content['what']}.")
        heads = ("network", "clips/s", "network alone", *(f"{name}, %" for name in LOOP_SHARES))
        yield table(
            heads,
            [
                (
                    peer(row),
                    number(row["clips_per_s"]),
                    number(row["network_alone_clips_per_s"]),
                    *("–" if row[of] is None else f"{100 * row[of]:.1f}" for of in LOOP_SHARES.values()),
                )
                for row in rows(result, LOOP)
            ],
        )


def conducting(of: Sequence[Result]) -> Iterator[str]:
    """benchmarks/study.py, machine by machine."""
    yield "## The study"
    yield prose(
        "`python -m benchmarks study`: what `make smoke` runs, from nothing and then with nothing left to do.",
        "*Conducting* is the time of its training and evaluation stage in which none of the commands that it starts",
        "is running; those commands alone are the peer. With nothing left to do, all of the time is Prefect's,",
        "MLflow's, and what it takes to find everything done.",
    )
    for result in of:
        yield f"### The study on {result.machine}"
        full = result.content["full"]
        yield prose(
            f"{result.content['what']}. A full reproduction has {full['processes']} processes; to conduct them takes",
            f"{number(full['conducting_seconds'])} s at that cost, and the {number(full['pflop'])} PFLOP of their work",
            "at the rate that NVIDIA gives for an H100, which no training comes near, would take",
            f"{number(full['pflop'] * 1e15 / PEAK / 3600)} hours.",
        )
        names = ("prefect_tasks", "processes", "conducting_seconds")
        yield table(
            (STUDY, "seconds", *(name.replace("_", " ") for name in names)),
            [(peer(row), number(row["seconds"]), *(row.get(name) for name in names)) for row in rows(result, STUDY)],
        )


def repeating(of: Sequence[Result]) -> Iterator[str]:
    """benchmarks/second_run.py, machine by machine."""
    yield "## A second full reproduction"
    yield prose(
        "`python -m benchmarks again`: how long it takes to find that nothing is left to do. Networks, frames and",
        "clips are small; the numbers of videos, frames and predictions, lists, rows and trainings are the true ones.",
        "Shards are dozens, not hundreds, and there are no checkpoints or pictures of full size, which a second run",
        "does not open. To look at the public weights, which so small networks cannot start from, is timed by itself,",
        "on files of their size, and added.",
    )
    for result in of:
        content = result.content
        yield f"### A second full reproduction on {result.machine}"
        yield prose(
            f"{content['what']}: {content['trainings']} trainings, {content['first']['processes']} processes in",
            f"{number(content['first']['seconds'] / 60)} minutes; then, {content['rounds']} times,",
            f"{content['tasks']} Prefect tasks in {series([number(s) or '' for s in content['rounds_seconds']])} s.",
        )
        yield table((AGAIN, "seconds"), [(peer(row), number(row["seconds"])) for row in rows(result, AGAIN)])


def anything(of: Sequence[Result]) -> Iterator[str]:
    """A part that this page has no words for: its tables as they are, machine by machine."""
    yield f"## {of[0].part}"
    for result in of:
        yield f"### {of[0].part} on {result.machine}"
        yield prose(f"{result.content['what']}.")
        for title in result.content["tables"]:
            found = rows(result, title)
            names = [name for name in (found[0] if found else {}) if not isinstance(found[0][name], list | dict)]
            if names:
                cells = [[peer(row), *map(row.get, names[1:])] for row in found]
                yield table((title, *(name.replace("_", " ") for name in names[1:])), cells)
            yield from not_run(result, title)


def networks(of: Sequence[Result]) -> Iterator[str]:
    """benchmarks/model_speed.py: bounds, then machine by machine."""
    yield "## Networks"
    yield prose(
        "`python -m benchmarks models` runs PAS-Net, ECO-Lite and I3D on random clips, with random weights.",
        "*Reference* is the plain form: module by module, fp32, eager, maps in torch's usual order. The other forms",
        "are those that `pasnet.models.fast` gives for inference (of I3D: channels last, and autocast), and in",
        "training what `pasnet train` runs (of bf16 on a GPU of Hopper's generation: with `pasnet.models.hopper`'s",
        "convolutions, but for *not turned*; *compiled*: with CUDA graphs). They alternate in a new order every round,",
        "and a ratio is one of samples of the same round. *Utilisation*, in brackets, is the share of the machine's",
        "own rate of large matrix products in that precision; Fourier tiles leave out multiplications that the count",
        "includes, so that it can be above 100 %. Memory is the peak above what was there before on a CPU, and on a",
        "GPU all that was allocated, with the weights (and what is compiled, its gradients) of the forms that",
        "alternate; of a CUDA graph it cannot be said.",
    )
    yield bounds_table(of)
    for result in of:
        content = result.content
        yield f"### Networks on {result.machine}"
        rates = [f"{number(rate)} ({form})" for form, rate in content["gmac_per_second_of_matmul"].items()]
        yield prose(
            f"{content['date']}, {content['rounds']} rounds, commit {content.get('commit', 'not recorded')}, torch",
            f"{content['torch']}, Python {content['python']}, {content['threads']} threads, load",
            f"{' to '.join(map(str, content['load_before_and_after']))}. {samples(result)} Matrix products, 10^9",
            f"multiply-adds per second: {series(rates)}.",
        )
        if remark := content.get("remark"):
            yield prose(remark)
        for title, name in (("forward", "forward, clips/s"), ("training", "forward and backward, clips/s")):
            yield pivot(result, title, name, functools.partial(rate_of, content=content))
            yield pivot(
                result,
                title,
                f"{title}, peak MB",
                lambda row: "–" if row["peak_mb"] is None else f"{row['peak_mb']:,.0f}",
            )
        yield from headline(result)
        missing = {row["network"]: row["not_run"] for title in ("forward", "training")
                   for row in all_rows(result, title) if "not_run" in row} | content["not_run"]  # fmt: skip
        if missing:
            yield prose(f"Not run: {'; '.join(f'{name} ({why})' for name, why in missing.items())}.")
        styles = rows(result, "styles")
        cases = list(dict.fromkeys((row["form"], row["width"]) for row in styles))
        faster = {(row["style"], row["form"], row["width"]): row["times_faster"] for row in styles}
        if styles:
            lines = [
                (f"`{style}`", *(number(faster.get((style, *case))) for case in cases))
                for style in dict.fromkeys(row["style"] for row in styles)
            ]
            yield table(
                ("times as fast as the reference", *(f"{form}, width {width:g}" for form, width in cases)), lines
            )
        errors = [
            (
                f"`{row['network']}`, {row['what']}, {row['form']}",
                f"{row['error']:g}",
                f"{row['bound']:g}",
                "yes" if row["agrees"] else "**no**",
            )
            for row in rows(result, "agreement")
        ]
        yield table(("agreement with the reference", "error", "bound", "within"), errors)
        if any(row["what"].startswith("gradients (") and not row["agrees"] for row in rows(result, "agreement")):
            yield prose(
                "In fp64 the forms have the same gradients. In fp32 and bf16 a unit whose input is nearly 0 may fall",
                "on either side of its ReLU, so that the gradients of any two forms differ by about the root of what",
                "their maps differ by; the plain form's own are as far from fp64 as the rows say.",
            )
        if any(row["what"].startswith("smooth") for row in rows(result, "agreement")):
            yield prose(
                "Smooth: in both forms ReLU and maximum pooling are replaced by functions without kinks (SiLU, at the",
                "size of the channel; the average), so that no unit can change sides. That is another network, and a",
                "better conditioned one, the less sharp the function is: a sharper one gives bf16 larger distances,",
                "and ReLU those of the lines before. So these lines say how exact our arithmetic is beside the plain",
                "form's, and not how far bf16 is from fp32 in PAS-Net itself.",
            )
        kept = [[row["num_segments"], *(number(row[f"gb{of}"]) for of in ("", "_checkpoint", "_frozen"))]
                for row in rows(result, "memory")]  # fmt: skip
        yield table(("counted GB a clip for the backward pass, K", "in full", "pose checkpoints", "pose frozen"), kept)


def headline(result: Result) -> Iterator[str]:
    """The paper's claim of speed: PAS-Net of 32 frames against I3D of 64, in clips and in multiply-adds."""

    def fastest(network: str, k: int) -> Row:
        found = [row for row in rows(result, "forward") if (row["network"], row["num_segments"]) == (network, k)]
        return max(found, key=lambda row: row["clips_per_second"], default={})

    ours, theirs = fastest("PAS-Net", 32), fastest("I3D", 64)
    if "gmac_per_second" not in ours or "gmac_per_second" not in theirs:
        return
    clips = [row["clips_per_second"] for row in (ours, theirs)]
    work = [row["gmac_per_second"] / row["clips_per_second"] for row in (ours, theirs)]
    rates = [row["gmac_per_second"] for row in (ours, theirs)]
    yield prose(
        "In the paper PAS-Net of 32 frames handles 3 times the clips of I3D of 64, which can only be of the",
        "0.9 videos a second that ECO's publication gives for I3D. Here, each in its fastest form",
        f"({ours['form']}, batch {ours['batch']}; {theirs['form']}, batch {theirs['batch']}), it is",
        f"{number(clips[0])} against {number(clips[1])} clips/s, {number(clips[0] / clips[1])} times. A clip costs",
        f"{number(work[0])} and {number(work[1])} GMACs, {number(work[0] / work[1])} times; PAS-Net does",
        f"{number(rates[0])} GMACs a second and I3D {number(rates[1])}, {number(rates[0] / rates[1])} times.",
    )


def samples(result: Result) -> str:
    """How many samples a speed is the median of, and how much of the machine others used meanwhile."""
    counts = [len(row["seconds"]) for title in ("forward", "training") for row in rows(result, title)]
    least, most = min(counts, default=0), max(counts, default=0)
    span = f"{least}" if least == most else f"{least} to {most}"
    said = f"A speed is the median of {span} samples." if counts else ""
    shares = [f"{100 * x:.1f} % ({name})" for name, x in result.content.get("others_share_of_samples", {}).items()]
    return f"{said} Others used {series(shares)} of the machine during samples." if shares else said


def pivot(result: Result, title: str, name: str, text: Callable[[Row], str]) -> str:
    """A line per network, K and batch, a column per form."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows(result, title):
        width = "" if row["width"] == 1 else f", width {row['width']:g}"
        line = f"{row['network']}, K = {row['num_segments']}, batch {row['batch']}{width}"
        lines.setdefault(line, {})[row["form"]] = text(row)
    forms = list(dict.fromkeys(row["form"] for row in rows(result, title)))
    return table((name, *forms), [(line, *map(cells.get, forms)) for line, cells in lines.items()])
