"""One video file -> every one of its frames once, as JPEG at a fixed size.

Two decoders keep one contract. `ffmpeg` (decode_ffmpeg.py, the default) is processes of its own, so that a file can
crash nothing but its decoder; `pyav` (decode_pyav.py) is the same libraries inside this process, at a lower cost.
Both scale in YUV and hand over planes, and the planes go straight into the JPEG encoder: a detour through RGB costs
more than the decoding itself (docs/performance.md) and gains nothing, since JPEG stores YUV. Neither drops or repeats
a frame, and the frame count is what came out of the decoder, never what a container claims.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import simplejpeg

Planes = tuple[np.ndarray, np.ndarray, np.ndarray]
DECODERS = ("ffmpeg", "pyav")
TOGETHER = 4  # small videos that share an ffmpeg process: three of four starts are spared
PATIENCE = 60.0  # seconds for such a process; then each is decoded alone, with its own limit
SMALL = 4 << 20  # bytes of such a video: beside its decoding a start is nothing, and its JPEGs wait for its neighbours'


class DecodeError(Exception):
    """A video that gives no usable frames. `reason` is one line; `detail` is what the decoder said."""

    def __init__(self, video: Path, reason: str, detail: str = "") -> None:
        super().__init__(f"{video}: {reason}")
        self.video, self.reason, self.detail = video, reason, detail


class DecoderStoppedError(Exception):
    """The decoder was ended from outside (a signal, the kernel out of memory), which says nothing about the video."""


@dataclass(frozen=True, kw_only=True)
class DecodeSettings:
    """What decides the bytes of a frame, recorded in the manifest: changing any of it rebuilds the shards.

    The limits (timeout, max_mib, max_pixels) decide only which videos are set aside. Raises ValueError for settings
    that make no sense.
    """

    height: int = 256  # PAS-Net section IV-B, TSN's frame size; the aspect ratio of the source is not kept
    width: int = 340
    scaler: Literal["bicubic", "bilinear"] = "bicubic"  # libswscale's, the same for both decoders
    quality: int = 90  # JPEG; 4:2:0, the subsampling of the sources themselves
    decoder: Literal["ffmpeg", "pyav"] = "ffmpeg"
    frames_per_video: int = 0  # keep so many, evenly spread; 0 keeps all
    timeout: float = 900.0  # seconds for one video
    max_mib: int = 256  # of JPEGs for one video, which are held in memory: some eight minutes at 25 frames/s
    max_pixels: int = 8192 * 4320  # of a source frame; a damaged header can ask for any size

    def __post_init__(self) -> None:
        if self.height < 16 or self.width < 16 or self.height % 2 or self.width % 2:
            raise ValueError(f"frame size must be even and at least 16, got {self.height}x{self.width}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"JPEG quality must be 1 to 100, got {self.quality}")
        if self.scaler not in ("bicubic", "bilinear"):
            raise ValueError(f"unknown scaler {self.scaler!r} (one of: bicubic, bilinear)")
        if self.decoder not in DECODERS:
            raise ValueError(f"unknown decoder {self.decoder!r} (one of: {', '.join(DECODERS)})")
        if self.frames_per_video < 0:
            raise ValueError(f"frames_per_video must be at least 1, or 0 for all, got {self.frames_per_video}")
        if not 0 < self.timeout <= 1e6:  # NaN, and what a timer cannot count, included
            raise ValueError(f"timeout must be above 0 and at most 1000000 seconds, got {self.timeout}")
        if self.max_mib < 1 or self.max_pixels < 1:
            raise ValueError(f"max_mib and max_pixels must be at least 1, got {self.max_mib} and {self.max_pixels}")


@dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """What the decoder says of the source's video stream."""

    codec: str
    width: int
    height: int
    fps: float  # 0 where the container names none
    errors: str = ""  # what the decoder complained of in a video that it decoded all the same: it may be damaged


class Decoder(Protocol):
    """Iterates over the frames of one video as planes (Y (H,W), U (H/2,W/2), V (H/2,W/2)), uint8, full range BT.601.

    `info` is set once the iteration has ended. Raises DecodeError when the video gives no frame, when the decoder
    fails, and past `settings.timeout`. Planes are valid until the next one is asked for.
    """

    info: SourceInfo | None

    def __iter__(self) -> Iterator[Planes]: ...


@dataclass(frozen=True, kw_only=True)
class DecodedVideo:
    """JPEGs in order, how many frames the decoder gave, and what the source was."""

    jpegs: list[bytes]
    source_frames: int  # len(jpegs), unless settings.frames_per_video thins them out
    source: SourceInfo


def open_video(video: Path, settings: DecodeSettings) -> Decoder:
    """The decoder that the settings ask for, at the start of `video`. Nothing is read yet."""
    if settings.decoder == "pyav":
        from shards.decode_pyav import PyAVDecoder  # here: imports what the other decoder does without

        return PyAVDecoder(video, settings)
    from shards.decode_ffmpeg import FFmpegDecoder

    return FFmpegDecoder(video, settings)


def decoder_version(decoder: str) -> str:
    """What is recorded, and decides pixels: the version of the ffmpeg binary, or of PyAV and its libraries."""
    if decoder == "pyav":
        from shards.decode_pyav import pyav_version

        return pyav_version()
    from shards.decode_ffmpeg import ffmpeg_version

    return ffmpeg_version()


def encoder_version() -> str:
    """What is recorded, and decides bytes: the JPEG encoder's version."""
    return f"simplejpeg {importlib.metadata.version('simplejpeg')}"


def decode_video(video: Path, settings: DecodeSettings) -> DecodedVideo:
    """Every frame of `video` (or settings.frames_per_video of them) as a JPEG of settings.height x settings.width.

    Raises DecodeError, also for a video whose JPEGs exceed settings.max_mib, and DecoderStoppedError.
    """
    video = Path(video)
    if not video.is_file():
        raise DecodeError(video, "no such file")
    if video.stat().st_size == 0:
        raise DecodeError(video, "the file is empty")
    chosen: set[int] | None = None
    if settings.frames_per_video:  # spreading them evenly needs the count, which only decoding gives
        count, keep = sum(1 for _ in open_video(video, settings)), settings.frames_per_video
        chosen = set(range(count)) if count <= keep else {(2 * i + 1) * count // (2 * keep) for i in range(keep)}
    decoder, size, number = open_video(video, settings), 0, -1
    jpegs: list[bytes] = []
    for number, planes in enumerate(decoder):
        if chosen is not None and number not in chosen:
            continue
        jpegs.append(_encode(planes, settings))
        size += len(jpegs[-1])
        if size > settings.max_mib << 20:
            raise DecodeError(
                video, f"more than {settings.max_mib} MiB of JPEGs ({len(jpegs)} frames); cut it, or raise --max-mib"
            )
    assert decoder.info is not None  # set when the iteration ends without an error
    errors = "; ".join(filter(None, (_cut_short(video), decoder.info.errors)))
    return DecodedVideo(jpegs=jpegs, source_frames=number + 1, source=replace(decoder.info, errors=errors))


def decode_videos(videos: Sequence[Path], settings: DecodeSettings) -> Iterator[DecodedVideo | DecodeError]:
    """`decode_video` of each, in order, or in its place the error that it would raise. Raises DecoderStoppedError.

    With the default decoder small videos go through one process a few at a time, since ffmpeg takes as long to start as
    to decode a good part of such a video. Where anything is amiss, that process counts for none of its videos, and each
    is decoded alone: what comes of a video never depends on its neighbours.
    """
    videos = list(map(Path, videos))
    while videos:
        small = 0
        if settings.decoder == "ffmpeg" and not settings.frames_per_video:
            while small < min(TOGETHER, len(videos)) and _is_small(videos[small]):
                small += 1
        some, videos = videos[: max(1, small)], videos[max(1, small) :]
        yield from (_together(some, settings) if len(some) > 1 else None) or (_alone(video, settings) for video in some)


def _is_small(video: Path) -> bool:
    return video.is_file() and 0 < video.stat().st_size <= SMALL


def _alone(video: Path, settings: DecodeSettings) -> DecodedVideo | DecodeError:
    try:
        return decode_video(video, settings)
    except DecodeError as error:
        return error


def _together(videos: Sequence[Path], settings: DecodeSettings) -> list[DecodedVideo] | None:
    """All of them from one process, or None where each has to be looked at alone."""
    from shards.decode_ffmpeg import FFmpegProcess

    process, size = FFmpegProcess(videos, replace(settings, timeout=min(settings.timeout, PATIENCE))), 0
    jpegs: list[list[bytes]] = [[] for _ in videos]
    try:
        for number, planes in process:
            jpegs[number].append(_encode(planes, settings))
            size += len(jpegs[number][-1])
            if size > settings.max_mib << 20:
                return None
    except (DecodeError, DecoderStoppedError):  # perhaps out of memory, as there were several
        return None
    return [
        DecodedVideo(jpegs=made, source_frames=len(made), source=replace(info, errors=_cut_short(video)))
        for video, made, info in zip(videos, jpegs, process.infos, strict=True)
    ]


def _encode(planes: Planes, settings: DecodeSettings) -> bytes:
    jpeg: bytes = simplejpeg.encode_jpeg_yuv_planes(*planes, quality=settings.quality)
    return jpeg


def _cut_short(video: Path) -> str:
    """A note where an .avi is shorter than its own header says, which decoders pass over in silence; "" otherwise.

    Only this: durations in containers are no witness (all of J-HMDB's clips claim 1.2 times their frames).
    """
    with video.open("rb") as file:
        head = file.read(8)
    whole, there = int.from_bytes(head[4:], "little") + 8, video.stat().st_size
    return f"the file is cut: {there} of {whole} bytes" if head[:4] == b"RIFF" and there < whole else ""
