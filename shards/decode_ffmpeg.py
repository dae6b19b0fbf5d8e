"""The default decoder: ffmpeg processes, through ffmpeg-python, raw planes over pipes.

A process of its own is worth its start (20 to 90 ms): a file that crashes or hangs the decoder loses itself only, and
time and memory are limited from outside. Small videos share one, a few at a time, as long as nothing goes wrong in it;
where something does, decode.py gives each of them a process of its own, and that one says which video it was.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import re
import resource
import selectors
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from shards.decode import DecodeError, DecoderStoppedError, DecodeSettings, Planes, SourceInfo

STOPPING = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # a crash has other numbers
STOPPED = re.compile(r"^(\[\w+\] )*Exiting normally, received signal \d", re.M)  # no title: those are indented
MAX_WORDS = 1 << 16  # bytes of what ffmpeg says that are kept; a damaged file can make it say megabytes
PIPE = 1 << 20  # bytes; what an unprivileged process may ask for
MAX_ADDRESS_SPACE = 8 << 30  # bytes; an ffmpeg that wants more is decoding a file made to exhaust memory


@functools.cache
def ffmpeg_exe() -> str:
    """Path of the ffmpeg binary: the one in IMAGEIO_FFMPEG_EXE if set, the one that the package imageio-ffmpeg carries
    (so that two machines with the same packages make the same bytes), else PATH's."""
    import imageio_ffmpeg

    return str(imageio_ffmpeg.get_ffmpeg_exe())


@functools.cache
def ffmpeg_version() -> str:
    """First word after "version" in ffmpeg's banner, such as "5.1.9" or "9.0.2-static"."""
    banner = subprocess.run([ffmpeg_exe(), "-version"], capture_output=True, text=True, timeout=60, check=True).stdout
    return banner.split("version", 1)[1].split()[0]


@functools.cache
def passthrough() -> dict[str, str | int]:
    """The option that means "every frame once": -fps_mode from ffmpeg 5.1 on, -vsync before."""
    number = re.match(r"n?(\d+)\.(\d+)", ffmpeg_version())
    old = number is not None and (int(number[1]), int(number[2])) < (5, 1)
    return {"vsync": 0} if old else {"fps_mode": "passthrough"}


def ffmpeg_command(videos: Sequence[Path], settings: DecodeSettings, pipes: Sequence[int]) -> list[str]:
    """Argument list (never a shell string: 536 names of HMDB-51 hold shell characters) that writes planar YUV 4:2:0 of
    each video to a pipe, given as the number of an open file.

    Full range and BT.601 are what JPEG (JFIF) means by YUV; most sources are limited range, so the scaler converts.
    """
    import ffmpeg  # here: those who only read shards do without

    scale = f"scale={settings.width}:{settings.height}:flags={settings.scaler}"
    scale += ":interl=-1:out_range=full:out_color_matrix=bt601"  # interl: field by field where the source is so marked
    to = passthrough() | {"threads": 1}  # of the copying of raw frames, too: threads for it cost more than it does
    outputs = []
    for video, pipe in zip(videos, pipes, strict=True):
        stream = ffmpeg.input(str(video.absolute()), threads=1, max_pixels=settings.max_pixels)
        if len(videos) > 1:  # else no stream is named: ffmpeg takes the best one, not a cover picture that comes first
            stream = stream["v:0"]
        output = ffmpeg.output(
            stream, f"pipe:{pipe}", an=None, vf=f"{scale},format=yuv420p", format="rawvideo", pix_fmt="yuv420p", **to
        )
        outputs.append(output)
    whole = ffmpeg.merge_outputs(*outputs) if len(outputs) > 1 else outputs[0]
    level = "level+error" if len(videos) > 1 else "level+info"  # what else several say is in their report
    return whole.global_args(
        "-filter_threads", "1", "-nostdin", "-hide_banner", "-loglevel", level, "-nostats"
    ).compile(cmd=ffmpeg_exe())


class FFmpegDecoder:
    """shards.decode.Decoder over an ffmpeg process of its own."""

    def __init__(self, video: Path, settings: DecodeSettings) -> None:
        self.video, self.settings = video, settings
        self.info: SourceInfo | None = None

    def __iter__(self) -> Iterator[Planes]:
        process = FFmpegProcess([self.video], self.settings)
        for _, planes in process:
            yield planes
        (self.info,) = process.infos


class FFmpegProcess:
    """One ffmpeg process for all of `videos`: (number of the video, planes) of every frame, in the order of each video,
    the videos' frames in any. `infos` is set once the iteration has ended.

    It is killed past settings.timeout or MAX_ADDRESS_SPACE. Raises DecodeError, which of several videos names the
    first, and is raised of several also for what one alone would get through with: any complaint of ffmpeg's, and more
    than one video stream to choose from. Raises DecoderStoppedError.

    What several complain of goes to stderr, and what is known of them to a report: ffmpeg's threads share a line, so
    that in one text a complaint could stand behind the beginning of another thread's line, where it would be missed.
    """

    def __init__(self, videos: Sequence[Path], settings: DecodeSettings) -> None:
        self.videos, self.settings = videos, settings
        self.infos: list[SourceInfo] = []

    def __iter__(self) -> Iterator[tuple[int, Planes]]:
        h, w = self.settings.height, self.settings.width
        frame_bytes = h * w * 3 // 2
        pixels = [np.empty(frame_bytes, np.uint8) for _ in self.videos]  # a frame's place, filled again and again
        counts, filled, overran = [0] * len(self.videos), [0] * len(self.videos), threading.Event()
        with contextlib.ExitStack() as stack:
            words_file = stack.enter_context(tempfile.TemporaryFile())  # a pipe could fill up and block ffmpeg
            report = stack.enter_context(tempfile.TemporaryFile())
            waiting = stack.enter_context(selectors.DefaultSelector())
            several = len(self.videos) > 1
            with contextlib.ExitStack() as for_ffmpeg:
                pipes = []
                for number in range(len(self.videos)):
                    ends = os.pipe()
                    reader = stack.enter_context(open(ends[0], "rb", buffering=0))
                    pipes.append(for_ffmpeg.enter_context(open(ends[1], "wb", buffering=0)).fileno())
                    os.set_blocking(ends[0], False)
                    waiting.register(reader, selectors.EVENT_READ, number)
                    with contextlib.suppress(AttributeError, OSError):  # Linux; a frame is larger than the usual 64 kB
                        fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, PIPE // len(self.videos))  # a user may have 64 MB
                command = ffmpeg_command(self.videos, self.settings, pipes)
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=words_file,
                    pass_fds=[*pipes, report.fileno()],
                    env=_without_report()
                    | ({"FFREPORT": f"file=/dev/fd/{report.fileno()}:level=32"} if several else {}),
                    start_new_session=True,  # Ctrl-C is for the build, which ends its decoders itself
                )
            if hasattr(resource, "prlimit"):  # Linux; the process may have ended already
                with contextlib.suppress(ProcessLookupError):
                    resource.prlimit(process.pid, resource.RLIMIT_AS, (MAX_ADDRESS_SPACE, MAX_ADDRESS_SPACE))

            def stop() -> None:
                overran.set()
                process.kill()

            watchdog = threading.Timer(self.settings.timeout, stop)
            watchdog.daemon = True
            watchdog.start()
            try:
                while waiting.get_map():
                    for key, _ in waiting.select():
                        number = key.data
                        got = key.fileobj.readinto(pixels[number].data[filled[number] :])  # type: ignore[union-attr]
                        if got is None:  # nothing there after all
                            continue
                        if not got:  # its end
                            waiting.unregister(key.fileobj)
                            continue
                        filled[number] += got
                        if filled[number] == frame_bytes:
                            filled[number] = 0
                            counts[number] += 1
                            chroma = pixels[number][h * w :].reshape(2, h // 2, w // 2)
                            yield number, (pixels[number][: h * w].reshape(h, w), chroma[0], chroma[1])
                code = process.wait()
            finally:
                watchdog.cancel()
                process.kill()
                process.wait()
            words, known = (_words_of(of) for of in (words_file, report))
            cut = bool(report.read(1))  # what is behind could be ffmpeg's own lines, and what is before it a title's
        first, count = self.videos[0], sum(counts)
        if overran.is_set():
            raise DecodeError(first, f"took longer than {self.settings.timeout:g} s", words)
        if -code in STOPPING or (code == 255 and re.search(STOPPED, words)):
            raise DecoderStoppedError(
                f"{first}: ffmpeg was stopped (signal {-code if code < 0 else 'from outside'}); if the machine is "
                f"short of memory use fewer --workers, then start again"
            )
        if code != 0 or not all(counts) or any(filled) or (several and (words or cut)):
            found = f"after {count} frames: " if count else ""
            raise DecodeError(first, found + _last_words(words), words)
        if several:
            order = [word for word in command if re.fullmatch(r"pipe:\d+", word)]  # ffmpeg-python may have changed it
            infos = _sources_of_several(known, [order.index(f"pipe:{pipe}") for pipe in pipes])
        else:
            infos = [_source_info(words)]
        if None in infos:
            raise DecodeError(first, "ffmpeg names no video stream", words)
        self.infos = [info for info in infos if info is not None]


def _without_report() -> dict[str, str]:
    """The environment, but for a report of the user's own, which would be among ffmpeg's words and hold the hour."""
    return {name: value for name, value in os.environ.items() if name != "FFREPORT"}


def _words_of(file: IO[bytes]) -> str:
    file.seek(0)
    return _without_names_of_the_moment(file.read(MAX_WORDS).decode("utf-8", "replace"))


def _sources_of_several(report: str, outputs: Sequence[int]) -> list[SourceInfo | None]:
    """What `_source_info` says of the one video stream of each input, by the number of its output. None where an input
    has other video streams, or where a title or a name of a file reads as if it were a line of ffmpeg's own."""
    found: list[SourceInfo | None] = []
    stream = re.compile(r"Stream #(\d+):(\d+) -> #(\d+):\d+")
    inputs, mapped = report.partition("Stream mapping:")[0], stream.findall(report)
    by_output = {int(output): (number, place) for number, place, output in mapped}
    for output in outputs:
        number, place = by_output.get(output, ("", ""))
        lines = re.findall(rf"Stream #{number}:\d+\b[^\n]*?: Video: .*", inputs)
        plain = len(lines) == 1 and lines[0].startswith(f"Stream #{number}:{place}")
        plain = plain and report.count("Stream mapping:") == 1 and len(mapped) == len(by_output) == len(outputs)
        found.append(_source_info(f"{lines[0]}\n", place=f"{number}:{place}") if plain else None)
    return found


def _source_info(words: str, place: str = "") -> SourceInfo | None:
    """Reads ffmpeg's line about the video stream it took, at `place` or where it says; imageio-ffmpeg carries no
    ffprobe to ask instead."""
    # "Stream #0:1 -> #0:0 (h264 (native) -> rawvideo ...)" says which; a title may hold anything, at another place
    mapped = re.search(r"^(?:\[info\] )?\s*Stream #(\d+:\d+) -> #0:0 ", words, re.M)
    place = place or (re.escape(mapped[1]) if mapped else r"0:\d+")
    line = re.search(rf"^(?:\[info\] )?\s*Stream #{place}\b[^\n]*?: Video: (.*)", words, re.M)
    if line is None:
        return None
    codec = re.match(r"\w+", line[1])
    size = re.search(r", ([1-9]\d{0,4})x([1-9]\d{0,4})(?= \[|,|$)", line[1])
    rate = re.search(r"([\d.]+)(k?) (?:fps|tbr)", line[1])
    if codec is None or size is None:
        return None
    fps = _exact(float(rate[1]) * (1000 if rate[2] else 1)) if rate else 0.0
    fault = re.compile(r"(\[[^]]*\] )*\[(error|fatal|panic)\]")
    errors = [line for line in map(str.strip, words.splitlines()) if fault.match(line)]
    errors = [line for line in errors if not line.startswith(("[rawvideo]", "[out#"))]  # of our pipe's timestamps
    complaint = "" if not errors else errors[0] + (f" (and {len(errors) - 1} more)" if len(errors) > 1 else "")
    return SourceInfo(codec=codec[0], width=int(size[1]), height=int(size[2]), fps=fps, errors=complaint)


def _exact(fps: float) -> float:
    """ffmpeg prints 30000/1001 as 29.97."""
    ntsc = round(fps) * 1000 / 1001
    return ntsc if abs(fps - ntsc) < 0.006 and abs(fps - round(fps)) > 0.006 else fps


def _without_names_of_the_moment(words: str) -> str:
    """Without addresses and numbers of pipes: the same failure gives the same words in every run."""
    return re.sub(r"\bpipe:\d+", "pipe:", re.sub(r" @ 0x[0-9a-f]+", "", words))


def _last_words(words: str) -> str:
    """The line of ffmpeg's output most likely to name the fault."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    too_large = [line for line in lines if "exceeds specified max pixel count" in line]
    if too_large:
        return re.sub(r"(\[[^]]*\] ?)+", "", too_large[0])
    fault = re.compile(r"invalid|error|corrupt|not found|could not|cannot|denied", re.IGNORECASE)
    faults = [line for line in lines if fault.search(line)]
    return re.sub(r"\[\w+\] ?", "", (faults or lines or ["ffmpeg said nothing"])[-1], count=1)
