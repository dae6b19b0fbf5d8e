"""shards/: official lists, decoding, the format and its readers."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg
import webdataset
from PIL import Image

import shards
from pasnet.cli import main
from pasnet.synth import SynthConfig, generate
from shards import (
    BuildError,
    Dataset,
    DatasetError,
    DecodedVideo,
    DecodeError,
    DecodeSettings,
    ShardError,
    View,
    build,
    decode_pyav,
    decode_video,
    decode_videos,
    find_dataset,
    locked,
    open_shards,
    pack,
    pool,
    repair,
    scan,
    segment_indices,
    verify,
)
from shards.decode import DecoderStoppedError, Planes, decoder_version, open_video
from shards.decode_ffmpeg import ffmpeg_command, ffmpeg_exe, passthrough
from shards.format import FAILURES_SCHEMA, INDEX_SCHEMA
from shards.pack import Progress, estimate_bytes, failures, write_parquet
from shards.read import split_frames

SETTINGS = DecodeSettings()
PASSTHROUGH = tuple(word for name, value in passthrough().items() for word in (f"-{name}", str(value)))


def make_video(
    path: Path,
    frames: int = 10,
    size: str = "320x240",
    source: str = "testsrc",
    extra: tuple[str, ...] = (),
    encoder: tuple[str, ...] = ("-c:v", "mpeg4"),
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [ffmpeg_exe(), "-v", "error", "-y", "-f", "lavfi", "-i", f"{source}=size={size}:rate=25"]
    encoder = encoder or ("-c:v", "mpeg4")
    subprocess.run([*command, "-frames:v", str(frames), *extra, *encoder, "-q:v", "2", str(path)], check=True)
    return path


def rotate(video: Path, out: Path, degrees: int) -> None:
    """Tags a video as turned counterclockwise, without touching its frames: as phones do."""
    source = ["-i", str(video), "-c", "copy"]
    new = subprocess.run([ffmpeg_exe(), "-v", "error", "-y", "-display_rotation", str(degrees), *source, str(out)])
    if new.returncode:  # before ffmpeg 6 the tag was metadata, and clockwise
        tag = ["-metadata:s:v", f"rotate={360 - degrees}"]
        subprocess.run([ffmpeg_exe(), "-v", "error", "-y", *source, *tag, str(out)], check=True)


def urls_of(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def fork_workers_that(ruin: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers with a fast decoder that does so before each video. Forked, so that they have it, too."""
    frames, forked = decode_pyav.PyAVDecoder._frames, multiprocessing.get_context("fork")

    def ruinous(decoder: decode_pyav.PyAVDecoder) -> Iterator[Planes]:
        ruin(decoder.video)
        return frames(decoder)

    monkeypatch.setattr(decode_pyav.PyAVDecoder, "_frames", ruinous)
    monkeypatch.setattr(decode_pyav, "GRACE", 0.0)
    monkeypatch.setattr(decode_pyav, "MAX_ADDRESS_SPACE", 1 << 30)
    monkeypatch.setattr(pool.multiprocessing, "get_all_start_methods", lambda: ["fork"])
    monkeypatch.setattr(pool.multiprocessing, "get_context", lambda _: forked)


def index_of(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "index.parquet").to_pylist()


def children_of_this() -> list[str]:
    """Process ids of this process's own children."""
    found = []
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            found += task.read_text("utf-8").split()
    return found


def in_a_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def replace_videos(dataset: Dataset, count: int) -> Dataset:
    """The same few files under many names: what a plan looks at."""
    videos = [replace(dataset.videos[i % len(dataset.videos)], key=f"a/{i:04d}") for i in range(count)]
    return replace(dataset, videos=tuple(videos))


def digest_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".tar", ".parquet")}


@pytest.fixture(params=["ffmpeg", "pyav"])
def settings(request: pytest.FixtureRequest) -> DecodeSettings:
    """Both decoders keep one contract, so both take the same tests."""
    return replace(SETTINGS, decoder=request.param)


class TestDecode:
    @pytest.mark.parametrize("frames", [1, 10, 37])
    def test_every_frame_once(self, tmp_path: Path, frames: int, settings: DecodeSettings) -> None:
        decoded = decode_video(make_video(tmp_path / "a.avi", frames), settings)
        assert len(decoded.jpegs) == decoded.source_frames == frames
        height, width, _, subsampling = simplejpeg.decode_jpeg_header(decoded.jpegs[0])
        assert (height, width, subsampling) == (256, 340, "420")
        source = decoded.source
        assert (source.codec, source.width, source.height, source.fps) == ("mpeg4", 320, 240, 25.0)

    def test_colours_survive_the_planes(self, tmp_path: Path, settings: DecodeSettings) -> None:
        # against ffmpeg's own conversion to RGB: a wrong range or matrix costs far more than JPEG does
        video = make_video(tmp_path / "a.avi", 3)
        jpegs = decode_video(video, replace(settings, quality=95)).jpegs
        to_rgb = ["-vf", "scale=340:256", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
        command = [ffmpeg_exe(), "-v", "error", "-i", str(video), *to_rgb]
        raw = subprocess.run(command, capture_output=True, check=True).stdout
        expected = np.frombuffer(raw, np.uint8).reshape(3, 256, 340, 3).astype(float)
        got = np.stack([simplejpeg.decode_jpeg(jpeg) for jpeg in jpegs]).astype(float)
        assert np.abs(got.mean((1, 2)) - expected.mean((1, 2))).max() < 2
        assert 10 * np.log10(255**2 / ((got - expected) ** 2).mean()) > 30

    @pytest.mark.parametrize(
        "options",
        [
            (),
            ("-pix_fmt", "yuv422p", "-c:v", "mjpeg"),
            ("-pix_fmt", "yuv420p10le", "-c:v", "ffv1"),
            ("-pix_fmt", "gray", "-c:v", "ffv1"),
            ("-pix_fmt", "bgr0", "-c:v", "ffv1"),
            ("-colorspace", "bt709", "-c:v", "mpeg4"),
            ("-flags", "+ilme+ildct", "-vf", "setfield=tff", "-c:v", "mpeg2video"),
        ],
    )
    def test_both_decoders_see_the_same_planes(self, tmp_path: Path, options: tuple[str, ...]) -> None:
        video = make_video(tmp_path / "a.mkv", 4, size="330x250", encoder=options)
        one, other = (
            [[plane.copy() for plane in planes] for planes in open_video(video, replace(SETTINGS, decoder=name))]
            for name in ("ffmpeg", "pyav")
        )
        assert len(one) == len(other) == 4
        for planes in zip(one, other, strict=True):
            for a, b in zip(*planes, strict=True):
                assert a.shape == b.shape and np.abs(a.astype(int) - b).mean() < 0.6

    @pytest.mark.parametrize("degrees", [90, 180, 270])
    def test_a_rotated_video_stands_upright(self, tmp_path: Path, degrees: int, settings: DecodeSettings) -> None:
        plain = make_video(tmp_path / "plain.mp4", 2)
        turned = tmp_path / "turned.mp4"
        rotate(plain, turned, degrees)
        # ffplay and phones turn by the tag; np.rot90 turns counterclockwise, as display_rotation does
        frame = simplejpeg.decode_jpeg(decode_video(turned, settings).jpegs[0]).astype(int)
        upright = simplejpeg.decode_jpeg(decode_video(plain, settings).jpegs[0])
        expected = cv2.resize(np.ascontiguousarray(np.rot90(upright, degrees // 90)), (340, 256)).astype(int)
        assert np.abs(frame - expected).mean() < 6
        assert np.abs(frame - np.rot90(expected, 2)).mean() > 20

    def test_odd_names_reach_the_decoder_unharmed(self, tmp_path: Path, settings: DecodeSettings) -> None:
        # characters of HMDB-51's names, and a leading dash
        video = make_video(tmp_path / "plain.avi", 4)
        for name in ("a [b] #1 & (c); d!.avi", "-dash.avi", "ü@+~.avi", "per%03dcent.avi", "colon:1.avi", "$(id).avi"):
            odd = Path(shutil.copy(video, tmp_path / name))
            assert len(decode_video(odd, settings).jpegs) == 4

    def test_latin_1_metadata(self, tmp_path: Path, settings: DecodeSettings) -> None:
        video = make_video(tmp_path / "a.avi", 4, encoder=("-metadata", "title=caf@e ol@e", "-c:v", "mpeg4"))
        content = video.read_bytes()
        assert b"caf@e ol@e" in content
        video.write_bytes(content.replace(b"caf@e ol@e", b"caf\xe9e ol\xe9e"))
        assert len(decode_video(video, settings).jpegs) == 4

    def test_variable_rate_neither_drops_nor_repeats(self, tmp_path: Path, settings: DecodeSettings) -> None:
        gaps = ("-vf", "setpts='if(gt(N,4),N*3,N)/25/TB'", *PASSTHROUGH)
        video = make_video(tmp_path / "gaps.mkv", 10, extra=gaps)
        assert len(decode_video(video, settings).jpegs) == 10

    def test_frames_thinned_out_are_spread_evenly(self, tmp_path: Path, settings: DecodeSettings) -> None:
        video = make_video(tmp_path / "a.avi", 37)
        every = decode_video(video, settings).jpegs
        few = decode_video(video, replace(settings, frames_per_video=5))
        assert few.source_frames == 37
        assert few.jpegs == [every[int((i + 0.5) * 37 / 5)] for i in range(5)]
        assert decode_video(video, replace(settings, frames_per_video=50)).jpegs == every

    @pytest.mark.parametrize(
        ("content", "reason"),
        [(b"", "empty"), (b"<html>not a video</html>" * 50, "Invalid data"), (None, "no such file")],
    )
    def test_what_is_no_video_says_why(
        self, tmp_path: Path, content: bytes | None, reason: str, settings: DecodeSettings
    ) -> None:
        video = tmp_path / "bad.avi"
        if content is not None:
            video.write_bytes(content)
        with pytest.raises(DecodeError, match=reason) as raised:
            decode_video(video, settings)
        assert raised.value.video == video

    def test_the_same_failure_has_the_same_words(self, tmp_path: Path) -> None:
        path, words = self.sound(tmp_path), []
        for files in (0, 3):
            with contextlib.ExitStack() as stack, pytest.raises(DecodeError) as raised:
                for _ in range(files):
                    stack.enter_context(open(path, "rb"))
                decode_video(path, SETTINGS)
            words.append(raised.value.detail)
        assert words[0] == words[1] and "pipe:" in words[0]

    def test_sound_alone_is_no_video(self, tmp_path: Path, settings: DecodeSettings) -> None:
        with pytest.raises(DecodeError):
            decode_video(self.sound(tmp_path), settings)

    def sound(self, tmp_path: Path) -> Path:
        path = tmp_path / "sound.avi"
        sine = ["-f", "lavfi", "-i", "sine=duration=1", "-c:a", "pcm_s16le"]
        subprocess.run([ffmpeg_exe(), "-v", "error", "-y", *sine, str(path)], check=True)
        return path

    def test_limits(self, tmp_path: Path, settings: DecodeSettings) -> None:
        video = make_video(tmp_path / "long.avi", 300)
        with pytest.raises(DecodeError, match=r"longer than 0\.01 s"):
            decode_video(video, replace(settings, timeout=0.01))
        with pytest.raises(DecodeError, match="more than 1 MiB of JPEGs"):
            decode_video(video, replace(settings, max_mib=1))
        with pytest.raises(DecodeError):
            decode_video(video, replace(settings, max_pixels=320 * 240 - 1))

    def test_damage_in_the_middle_is_noted(self, tmp_path: Path) -> None:
        video = make_video(tmp_path / "a.avi", 40)
        content = bytearray(video.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 400] = bytes(range(200)) * 2
        counts = []
        for name in ("ffmpeg", "pyav"):
            settings = replace(SETTINGS, decoder=name)
            video.write_bytes(content)
            decoded = decode_video(video, settings)
            counts.append(len(decoded.jpegs))
            assert decoded.source.errors
        assert counts[0] == counts[1] and counts[0] in (39, 40)  # the damage may cover the start of a frame

    def test_a_cut_avi_is_noted(self, tmp_path: Path, settings: DecodeSettings) -> None:
        video = make_video(tmp_path / "a.avi", 60)
        video.write_bytes(video.read_bytes()[: video.stat().st_size * 6 // 10])
        decoded = decode_video(video, settings)
        assert 20 < len(decoded.jpegs) < 50 and "the file is cut" in decoded.source.errors

    def test_an_empty_packet_is_not_the_end(self, tmp_path: Path, settings: DecodeSettings) -> None:
        video = make_video(tmp_path / "a.mp4", 12, encoder=("-c:v", "mjpeg"))
        content = bytearray(video.read_bytes())
        table = content.index(b"stsz")  # the sizes of all packets
        content[table + 16 + 4 * 5 : table + 20 + 4 * 5] = bytes(4)
        video.write_bytes(bytes(content))
        decoded = decode_video(video, settings)
        assert len(decoded.jpegs) == 11

    def test_a_title_is_no_signal(self, tmp_path: Path, settings: DecodeSettings) -> None:
        title = ("-metadata", "title=Exiting normally, received signal 15", "-c:v", "mpeg4")
        assert len(decode_video(make_video(tmp_path / "a.mkv", 7, encoder=title), settings).jpegs) == 7

    def test_what_is_on_record_is_the_stream_and_not_a_title(self, tmp_path: Path, settings: DecodeSettings) -> None:
        title = ("-metadata", "title=Stream #0:0: Video: foo, 99x99, 7 fps", "-c:v", "mpeg4")
        ntsc = ("-vf", "fps=30000/1001")
        for name, codec in (("a.mkv", "mpeg4"), ("a.ts", "mpeg2video")):
            encoder = (*title[:2], "-c:v", codec)
            source = decode_video(make_video(tmp_path / name, 8, extra=ntsc, encoder=encoder), settings).source
            assert (source.codec, source.width, source.height) == (codec, 320, 240)
            assert abs(source.fps - 30000 / 1001) < 1e-6

    def test_a_cover_picture_is_not_the_video(self, tmp_path: Path, settings: DecodeSettings) -> None:
        video, cover = make_video(tmp_path / "a.mkv", 7), make_video(tmp_path / "c.jpg", 1, encoder=("-c:v", "mjpeg"))
        inputs = ["-i", str(cover), "-i", str(video), "-map", "0", "-map", "1", "-c", "copy"]
        marks = ["-disposition:v:0", "0", "-disposition:v:1", "default"]
        both = str(tmp_path / "both.mkv")
        subprocess.run([ffmpeg_exe(), "-v", "error", "-y", *inputs, *marks, both], check=True)
        decoded = decode_video(Path(both), settings)
        assert (len(decoded.jpegs), decoded.source.codec) == (7, "mpeg4")

    @pytest.mark.parametrize(
        "wrong",
        [{"height": 15}, {"width": 341}, {"quality": 0}, {"scaler": "x"}, {"decoder": "x"}, {"frames_per_video": -1}],
    )
    def test_settings_that_make_no_sense(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(
            ValueError, match=next(iter(wrong)).split("_")[0].replace("height", "size").replace("width", "size")
        ):
            replace(SETTINGS, **wrong)

    @pytest.mark.shared
    @pytest.mark.slow
    def test_real_clips_have_their_true_number_of_frames(self, shared: Path, settings: DecodeSettings) -> None:
        # J-HMDB's 928 are in TestDrills, packed and read back
        rows = list(csv.DictReader((shared / "data" / "frames.csv").read_text().splitlines()))
        for row in [row for row in rows if not row["path"].startswith("jhmdb/")]:
            decoded = decode_video(shared / "data" / row["path"], settings)
            source = decoded.source
            assert (len(decoded.jpegs), source.codec) == (int(row["frames"]), row["codec"]), row["path"]
            assert (source.width, source.height) == (int(row["width"]), int(row["height"])), row["path"]


class TestDecodeTogether:
    """Small videos share an ffmpeg; what comes of one must not depend on it."""

    @pytest.fixture
    def kinds(self, tmp_path: Path) -> list[Path]:
        """Codecs, containers, sizes, lengths and rates of all sorts, a turned one, one with sound, strange names."""
        made = [
            make_video(tmp_path / "a.avi", 10),
            make_video(tmp_path / "b 'x'; $(y) pipe:5 [1:v]\\.mkv", 31, "352x288", encoder=("-c:v", "mpeg2video")),
            make_video(tmp_path / "c.mp4", 1, "176x144", "testsrc2"),
            make_video(tmp_path / "d.avi", 60, "64x48", "testsrc2", ("-vf", "fps=30000/1001")),
            make_video(tmp_path / "e.avi", 12, encoder=("-c:v", "mjpeg")),
            make_video(tmp_path / "f.ts", 9, encoder=("-c:v", "mpeg2video", "-flags", "+ilme+ildct")),
            tmp_path / "sound.avi",
            tmp_path / "turned.mp4",
        ]
        sound = ["-f", "lavfi", "-t", "1", "-i", "sine", "-c:v", "copy", "-c:a", "pcm_s16le", str(made[-2])]
        video = make_video(tmp_path / "silent.avi", 20)
        subprocess.run([ffmpeg_exe(), "-v", "error", "-y", "-i", str(video), *sound], check=True)
        rotate(make_video(tmp_path / "plain.mp4", 5, "160x240"), made[-1], 90)
        return made

    @pytest.fixture
    def started(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """How many videos each ffmpeg process of a decoder was given."""
        popen, counts = subprocess.Popen, []

        def counted(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
            if "pass_fds" in options:
                counts.append(command.count("-i"))
            return popen(command, **options)

        monkeypatch.setattr("shards.decode_ffmpeg.subprocess.Popen", counted)
        return counts

    def test_is_the_same_as_alone(self, kinds: list[Path], started: list[int]) -> None:
        alone = [decode_video(video, SETTINGS) for video in kinds]
        assert started == [1] * 8
        assert list(decode_videos(kinds, SETTINGS)) == alone
        assert started[8:] == [4, 4] and [len(decoded.jpegs) for decoded in alone] == [10, 31, 1, 60, 12, 9, 20, 5]
        assert len({decoded.source for decoded in alone}) > 5
        assert list(decode_videos(kinds[5:], SETTINGS)) == alone[5:] and started[10:] == [3]

    @pytest.mark.parametrize("by", ["title", "tag", "name"])
    def test_none_can_speak_for_another(self, kinds: list[Path], by: str, tmp_path: Path, started: list[int]) -> None:
        lines = (
            "x\n[info]   Stream #1:0: Video: vp9, yuv420p, 4444x3333, 77 fps\n  Stream #1:0: Video: vp9, 9x9, 7 fps\n"
            "[info] Stream mapping:\n[info]   Stream #1:0 -> #1:0 (a)\n[info]   Stream #0:0 -> #0:0 (a)\n"
        )
        fakes = [f"Stream #{number}:0: Video: vp9, 9x9, 7 fps" for number in range(4)]
        texts = [lines, lines.split("[info] Stream mapping")[0], lines[lines.index("[info] Stream mapping") :]]
        texts.append(" ".join([*fakes, "Stream mapping:"]))  # of which each line's own is the first
        if by == "title":  # behind so much the true lines would be out of sight
            arrows = [f"Stream #{number}:0 -> #{number}:0" for number in range(4)]
            texts.append(" ".join([*fakes, "Stream mapping:", *arrows, "x" * (70 << 10)]))
        for text in texts:
            if by == "name":
                liar = tmp_path / f"{text}.avi"
                shutil.copy(kinds[0], liar)
            else:
                tag = ("-metadata", f"title={text}" if by == "title" else f"{text.replace('=', '')}=y")
                liar = make_video(tmp_path / "t.mp4", 7, extra=("-movflags", "use_metadata_tags"), encoder=(*tag,))
            for place in range(4):
                videos = [*kinds[2:5][:place], liar, *kinds[2:5][place:]]
                assert [str(of) for of in decode_videos(videos, SETTINGS)] == [
                    *(str(decode_video(of, SETTINGS)) for of in kinds[2:5][:place]),
                    str(self.alone(liar)),
                    *(str(decode_video(of, SETTINGS)) for of in kinds[2:5][place:]),
                ]
        assert 4 in started

    def test_a_report_of_the_users_own_changes_nothing(
        self, kinds: list[Path], tmp_path: Path, started: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = [decode_video(video, SETTINGS) for video in kinds[:3]]
        monkeypatch.setenv("FFREPORT", f"file={tmp_path / 'no such folder' / 'x'}")
        assert [decode_video(video, SETTINGS) for video in kinds[:3]] == expected
        assert list(decode_videos(kinds[:3], SETTINGS)) == expected and started == [1] * 6 + [3]

    def alone(self, video: Path) -> DecodedVideo | DecodeError:
        try:
            return decode_video(video, SETTINGS)
        except DecodeError as error:
            return error

    def test_complaints_are_never_missed(self, kinds: list[Path], started: list[int]) -> None:
        """In one text with what others say, they would be, once in some hundred times."""
        good = make_video(kinds[0].parent / "damaged.avi", 12)
        content = bytearray(good.read_bytes())
        first = content.index(b"00dc", content.index(b"movi")) + 8
        content[first + 400 : first + 440] = b"\xff" * 40
        good.write_bytes(content)
        errors = decode_video(good, SETTINGS).source.errors
        assert errors
        for _ in range(30):
            *_, found = decode_videos([*kinds[2:5], good], SETTINGS)
            assert isinstance(found, DecodedVideo) and found.source.errors == errors
        assert started.count(4) == 30 and started.count(1) == 121

    def test_the_order_of_outputs_is_ffmpegs(
        self, kinds: list[Path], started: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alone, command = [decode_video(video, SETTINGS) for video in kinds[:3]], ffmpeg_command

        def turned(videos: list[Path], settings: DecodeSettings, pipes: list[int]) -> list[str]:
            return command(videos[::-1], settings, pipes[::-1])

        monkeypatch.setattr("shards.decode_ffmpeg.ffmpeg_command", turned)
        assert list(decode_videos(kinds[:3], SETTINGS)) == alone and started == [1, 1, 1, 3]

    def test_neighbours_of_a_bad_one_are_spared(self, kinds: list[Path], started: list[int]) -> None:
        good = [decode_video(video, SETTINGS) for video in kinds[:4]]
        cut, header = kinds[4].read_bytes()[:4000], b"RIFF\x00\x00\x00\x00AVI LIST"
        for bad in (b"", header, b"<html>", cut):
            kinds[1].write_bytes(bad)
            alone: DecodedVideo | DecodeError
            try:
                alone = decode_video(kinds[1], SETTINGS)
            except DecodeError as error:
                alone = error
            first, found, *rest = decode_videos(kinds[:4], SETTINGS)
            assert [first, *rest] == [good[0], *good[2:]]
            assert type(found) is type(alone) and str(found) == str(alone)
        kinds[1].unlink()
        assert [type(found) for found in decode_videos(kinds[:4], SETTINGS)] == [
            *(DecodedVideo, DecodeError),
            *(DecodedVideo,) * 2,
        ]

    def test_damage_is_noted_of_the_damaged(self, kinds: list[Path], started: list[int]) -> None:
        content = bytearray(kinds[3].read_bytes())
        content[len(content) // 2 : len(content) // 2 + 400] = bytes(range(200)) * 2
        kinds[3].write_bytes(content)
        found = list(decode_videos(kinds[:4], SETTINGS))
        assert started == [4, 1, 1, 1, 1]
        assert [bool(isinstance(of, DecodedVideo) and of.source.errors) for of in found] == [False] * 3 + [True]

    def test_one_with_streams_to_choose_from_goes_alone(
        self, kinds: list[Path], tmp_path: Path, started: list[int]
    ) -> None:
        both, inputs = tmp_path / "both.mkv", ["-i", str(kinds[2]), "-i", str(kinds[0]), "-map", "0", "-map", "1"]
        marks = ["-disposition:v:0", "0", "-disposition:v:1", "default"]
        subprocess.run([ffmpeg_exe(), "-v", "error", "-y", *inputs, "-c", "copy", *marks, str(both)], check=True)
        one, two = decode_videos([both, kinds[3]], SETTINGS)
        assert started == [2, 1, 1]
        assert isinstance(one, DecodedVideo) and (len(one.jpegs), one.source.width) == (10, 320)  # ffmpeg's choice
        assert two == decode_video(kinds[3], SETTINGS)

    def test_large_ones_and_thinned_ones_go_alone(
        self, kinds: list[Path], started: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        few = replace(SETTINGS, frames_per_video=3)
        assert all(len(of.jpegs) <= 3 for of in decode_videos(kinds[:2], few) if isinstance(of, DecodedVideo))
        assert started == [1] * 4
        monkeypatch.setattr("shards.decode.SMALL", kinds[0].stat().st_size - 1)
        list(decode_videos([kinds[3], kinds[0], kinds[2], kinds[3]], SETTINGS))
        assert kinds[3].stat().st_size < kinds[0].stat().st_size and started[4:] == [1, 1, 2]
        assert list(decode_videos([kinds[2], kinds[2]], SETTINGS)) == [decode_video(kinds[2], SETTINGS)] * 2

    @pytest.mark.parametrize(
        "fault", ["exec sleep 60", "exit 3", "kill -SEGV $$", "kill -KILL $$", "yes '[error] x' | head -c 70000 >&2"]
    )
    def test_a_process_that_fails_counts_for_none(
        self, kinds: list[Path], fault: str, tmp_path: Path, started: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = [decode_video(video, SETTINGS) for video in kinds[:3]]
        faulty = tmp_path / "ffmpeg.sh"
        faulty.write_text(
            f'#!/bin/bash\n{ffmpeg_exe()} "$@"; code=$?\n[[ "$*" == *" -i "*" -i "* ]] || exit $code\n{fault}\n'
        )
        faulty.chmod(0o755)
        monkeypatch.setattr("shards.decode_ffmpeg.ffmpeg_exe", lambda: str(faulty))
        monkeypatch.setattr("shards.decode.PATIENCE", 3.0)
        assert list(decode_videos(kinds[:3], SETTINGS)) == expected
        assert started == [1, 1, 1, 3, 1, 1, 1]

    def test_much_of_it_is_too_much_only_for_one(self, tmp_path: Path, started: list[int]) -> None:
        videos = [make_video(tmp_path / f"{name}.avi", 60) for name in "ab"]
        size = sum(map(len, decode_video(videos[0], SETTINGS).jpegs))
        assert 0.5 < size / (1 << 20) < 1
        assert [type(of) for of in decode_videos(videos, replace(SETTINGS, max_mib=1))] == [DecodedVideo] * 2
        assert started == [1, 2, 1, 1]

    def test_nothing_is_left_behind(self, kinds: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(*_: object, **__: object) -> bytes:
            raise MemoryError

        files, children = len(os.listdir("/proc/self/fd")), set(children_of_this())
        list(decode_videos(kinds, SETTINGS))
        monkeypatch.setattr("shards.decode.simplejpeg.encode_jpeg_yuv_planes", fails)
        with pytest.raises(MemoryError):
            list(decode_videos(kinds, SETTINGS))
        assert len(os.listdir("/proc/self/fd")) == files and set(children_of_this()) == children


class TestDatasets:
    def ucf(self, root: Path, files: dict[str, str], classes: str = "1 Bow\r\n2 Kick\r\n") -> Path:
        (root / "lists").mkdir()
        (root / "lists" / "classInd.txt").write_bytes(classes.encode())
        for name, text in files.items():
            (root / "lists" / name).write_bytes(text.encode())
        for name in ("Bow/v_Bow_g01_c01.avi", "Bow/v_bow_g02_c01.avi", "Kick/v_Kick_g01_c01.avi"):
            path = root / "videos" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        return root

    def test_ucf_lists_with_their_oddities(self, tmp_path: Path) -> None:
        # CRLF, trailing blanks, no labels in test lists, and another case than the file's (UCF's HandStandPushups)
        lists = {
            "trainlist01.txt": "Bow/v_Bow_g01_c01.avi 1\r\nKick/v_Kick_g01_c01.avi 2 \r\n\r\n",
            "testlist01.txt": "Bow/v_Bow_g02_c01.avi\r\nKick/v_Kick_g09_c01.avi\r\n",
        }
        dataset = scan(*find_dataset(self.ucf(tmp_path, lists)))
        assert dataset.name == "ucf-layout" and dataset.class_names == ("Bow", "Kick")
        found = {video.key: (video.label, video.splits, video.group) for video in dataset.videos}
        assert found == {
            "Bow/v_Bow_g01_c01": (0, {1: "train"}, "Bow/g01"),
            "Bow/v_bow_g02_c01": (0, {1: "test"}, "Bow/g02"),
            "Kick/v_Kick_g01_c01": (1, {1: "train"}, "Kick/g01"),
        }
        assert dataset.missing == ("Kick/v_Kick_g09_c01.avi",)

    @pytest.mark.parametrize(
        ("lists", "message"),
        [
            ({"trainlist01.txt": "Jump/v_Jump_g01_c01.avi 1\n"}, r"trainlist01.txt:1: .*names no class"),
            ({"trainlist01.txt": "Bow/v_Bow_g01_c01.avi 2\n"}, r"label 2"),
            ({"trainlist01.txt": "Bow/v_Bow_g01_c01.avi 9\n"}, r"label 9"),
            (
                {"trainlist01.txt": "Bow/v_Bow_g01_c01.avi 1\n", "testlist01.txt": "Bow/v_Bow_g01_c01.avi\n"},
                "in train and in test of split 1",
            ),
            ({"trainlist01.txt": "Bow/v_Bow_g07_c01.avi 1\n"}, "holds none of the 1 videos"),
            ({"trainlist04.txt": "Bow/v_Bow_g01_c01.avi 1\n"}, "has lists of split 4"),
        ],
    )
    def test_wrong_lists_are_named(self, tmp_path: Path, lists: dict[str, str], message: str) -> None:
        with pytest.raises(DatasetError, match=message):
            scan(*find_dataset(self.ucf(tmp_path, lists)))

    def test_hmdb_lists_with_their_oddities(self, tmp_path: Path) -> None:
        # trailing blanks; code 0 is unused; kick is a prefix of kick_ball; J-HMDB writes @ for #; a stem with dots
        (tmp_path / "splits").mkdir()
        text = {
            "kick": "a#1_kick_f_cm_np1_ba_bad_0.avi 1 \nb.2_kick_f_cm_np1_ba_bad_0.avi 0 \n",
            "kick_ball": "c.avi 2 \n",
        }
        for class_name, lines in text.items():
            (tmp_path / "splits" / f"{class_name}_test_split1.txt").write_text(lines)
        for name in ("kick/a@1_kick_f_cm_np1_ba_bad_0.avi", "kick/b.2_kick_f_cm_np1_ba_bad_0.avi", "kick_ball/c.avi"):
            path = tmp_path / "videos" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        dataset = scan(*find_dataset(tmp_path))
        assert [(video.key, video.label, video.splits) for video in dataset.videos] == [
            ("kick/a@1_kick_f_cm_np1_ba_bad_0", 0, {1: "train"}),
            ("kick/b%2E2_kick_f_cm_np1_ba_bad_0", 0, {}),
            ("kick_ball/c", 1, {1: "test"}),
        ]
        assert dataset.videos[0].group == "a@1"

    def test_folder_without_videos(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match="no videos/ folder"):
            find_dataset(tmp_path)
        (tmp_path / "videos").mkdir()
        with pytest.raises(DatasetError, match="no split lists"):
            find_dataset(tmp_path)
        with pytest.raises(DatasetError, match="no such folder"):
            find_dataset(tmp_path / "nowhere")

    @pytest.mark.shared
    def test_official_lists(self, shared: Path) -> None:
        # `scan` itself refuses lists whose counts are not the official ones
        sizes = {}
        for name in ("ucf101", "hmdb51", "jhmdb"):
            dataset = scan(*find_dataset(shared / "data" / name))
            sizes[dataset.name] = (dataset.listed, len(dataset.class_names), len(dataset.videos), len(dataset.missing))
            by_group: dict[str, set[str]] = {}
            for video in dataset.videos if name == "ucf101" else ():
                if 1 in video.splits:
                    by_group.setdefault(video.group, set()).add(video.splits[1])
            assert all(len(subsets) == 1 for subsets in by_group.values())
        assert sizes == {"ucf101": (13320, 101, 91, 13229), "hmdb51": (6766, 51, 14, 6757), "jhmdb": (928, 21, 928, 0)}

    @pytest.mark.shared
    def test_a_list_with_a_line_less_is_refused(self, shared: Path, tmp_path: Path) -> None:
        lists = shutil.copytree(shared / "data" / "ucf101" / "ucfTrainTestlist", tmp_path / "lists")
        (lists / "testlist01.txt").chmod(0o644)
        lines = (lists / "testlist01.txt").read_text().splitlines()
        (lists / "testlist01.txt").write_text("\n".join(lines[1:]))
        with pytest.raises(DatasetError, match="not ucf101's official lists"):
            scan("ucf101", shared / "data" / "ucf101" / "videos", lists)


class TestFormat:
    def test_same_bytes_for_any_number_of_workers(self, videos: Path, shard_folder: Path, tmp_path: Path) -> None:
        build(scan(*find_dataset(videos)), tmp_path, workers=1, num_shards=8)
        assert digest_of(tmp_path) == digest_of(shard_folder)
        assert len(list(tmp_path.glob("*.tar"))) == 8

    def test_plain_webdataset_reads_the_same_frames(self, shard_folder: Path) -> None:
        store, seen = open_shards(shard_folder), {}
        for sample in webdataset.WebDataset(urls_of(shard_folder), shardshuffle=False):
            seen[json.loads(sample["json"])["key"]] = split_frames(sample)
        assert sorted(seen) == store.keys
        for row, key in enumerate(store.keys):
            assert seen[key] == store.read_jpegs(row, range(int(store.num_frames[row])))

    @pytest.mark.parametrize("streaming", [True, False])
    def test_hugging_face_datasets_reads_the_same_frames(
        self, streaming: bool, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        from datasets import load_dataset

        folder = shutil.copytree(videos, tmp_path / "set")
        [lists] = {path.parent for path in folder.glob("*/classInd.txt")}
        for path in lists.glob("t*list0[23].txt"):
            path.unlink()
        build(scan(*find_dataset(folder)), tmp_path / "before", num_shards=1)
        *_, last = webdataset.WebDataset(urls_of(tmp_path / "before"), shardshuffle=False)
        (lists / "testlist02.txt").write_text(json.loads(last["json"])["video"])  # alone, and the last to be read
        out = tmp_path / "shards"
        build(scan(*find_dataset(folder)), out, num_shards=1)
        found = load_dataset(
            "webdataset",
            data_files={"train": urls_of(out)},
            split="train",
            streaming=streaming,
            cache_dir=str(tmp_path / "cache"),
        )
        store, seen, splits = open_shards(out), {}, []
        for sample in found:
            seen[sample["json"]["key"]] = split_frames(sample)
            splits.append((sample["json"]["split2"], sample["json"]["split3"]))
        assert splits == [("", "")] * (len(splits) - 1) + [("test", "")]
        assert sorted(seen) == store.keys
        for row, key in enumerate(store.keys):
            assert seen[key] == store.read_jpegs(row, range(int(store.num_frames[row])))

    def test_what_the_readme_shows_runs(self, shard_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        text = (Path(shards.__file__).parent / "README.md").read_text()
        snippets = re.findall(r"```python\n(.*?)```", text, re.S)
        assert len(snippets) >= 3
        monkeypatch.setattr("builtins.print", lambda *_: None)
        for snippet in snippets:
            code = snippet.replace("OUT/", f"{shard_folder}/").replace('"OUT"', repr(str(shard_folder)))
            exec(compile(code, "shards/README.md", "exec"), {})

    def test_every_shard_holds_every_class(self, videos: Path) -> None:
        # 12 videos of 3 classes, 4 of each: over 4 shards each holds one of each class, over 8 none holds two of one
        dataset = scan(*find_dataset(videos))
        for count in (4, 8):
            for shard in shards.plan(dataset, SETTINGS, num_shards=count):
                classes = [video.class_name for video in shard.videos]
                assert len(classes) == len(set(classes)) and (count == 8 or len(classes) == 3)

    def test_frames_are_the_videos_frames(self, videos: Path, shard_folder: Path) -> None:
        store = open_shards(shard_folder)
        for video in scan(*find_dataset(videos)).videos[:3]:
            row = store.keys.index(video.key)
            jpegs = decode_video(video.path, SETTINGS).jpegs
            assert store.read_jpegs(row, range(int(store.num_frames[row]))) == jpegs

    def test_repeated_and_wrong_indices(self, shard_folder: Path) -> None:
        store = open_shards(shard_folder)
        third, again, first = store.read_frames(0, [2, 2, 0])
        assert (third == again).all() and (third == store.read_frames(0, [2])[0]).all()
        assert (first == simplejpeg.decode_jpeg(store.read_jpegs(0, [0])[0])).all() and (first != third).any()
        with pytest.raises(IndexError, match=r"frame 99 asked for"):
            store.read_jpegs(0, [99])

    def test_damaged_videos_are_set_aside_with_a_reason(self, videos: Path, tmp_path: Path) -> None:
        data = shutil.copytree(videos, tmp_path / "data")
        victim = sorted((data / "videos").rglob("*.avi"))[2]
        victim.write_bytes(b"not a video at all")
        manifest = build(scan(*find_dataset(data)), tmp_path / "out")
        assert (manifest["videos"], manifest["failed"]) == (11, 1)
        [failure] = shards.failures(tmp_path / "out")
        assert failure["video"] == f"{victim.parent.name}/{victim.name}" and "Invalid data" in failure["reason"]
        assert len(open_shards(tmp_path / "out")) == 11

    @pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="wants Linux")
    def test_a_video_that_cannot_be_read_is_one_that_failed(self, videos: Path, tmp_path: Path) -> None:
        data = Path(shutil.copytree(videos / "videos", tmp_path / "videos"))
        bad = sorted(data.rglob("*.avi"))[0].with_name("bad.avi")
        bad.symlink_to("/proc/self/mem")  # as from a disk with a bad sector: it is there, and reading it is an error
        for _ in range(2):  # the second finds all of it done
            manifest = build(scan("folder", data), tmp_path / "out", num_shards=2)
            assert (manifest["videos"], manifest["failed"]) == (12, 1)
            made = digest_of(tmp_path / "out")
        assert [row["video"] for row in failures(tmp_path / "out")] == [f"{bad.parent.name}/bad.avi"]
        known: list[bool] = []
        build(scan("folder", data), tmp_path / "out", num_shards=2, on_video=lambda of: known.append(of.known))
        assert known == [True] * 13 and digest_of(tmp_path / "out") == made

    def test_a_video_under_another_suffix_is_another_name(self, videos: Path, tmp_path: Path) -> None:
        data = Path(shutil.copytree(videos / "videos", tmp_path / "videos"))
        build(scan("folder", data), tmp_path / "out", num_shards=2)
        first = sorted(data.rglob("*.avi"))[0]
        first.rename(first.with_suffix(".mkv"))
        build(scan("folder", data), tmp_path / "out", num_shards=2)
        build(scan("folder", data), tmp_path / "anew", num_shards=2)
        assert f"{first.parent.name}/{first.stem}.mkv" in {row["video"] for row in index_of(tmp_path / "out")}
        assert digest_of(tmp_path / "out") == digest_of(tmp_path / "anew")

    def test_too_many_damaged_videos_stop_the_build(self, videos: Path, tmp_path: Path) -> None:
        data = shutil.copytree(videos, tmp_path / "data")
        for victim in sorted((data / "videos").rglob("*.avi"))[:4]:
            victim.write_bytes(b"not a video at all")
        with pytest.raises(BuildError, match="4 of 12 videos could not be decoded"):
            build(scan(*find_dataset(data)), tmp_path / "out")
        assert not (tmp_path / "out" / "manifest.json").exists()

    def test_finished_shards_are_skipped_and_lost_ones_rebuilt(self, videos: Path, tmp_path: Path) -> None:
        dataset, touched = scan(*find_dataset(videos)), []
        build(dataset, tmp_path, num_shards=8)
        before = digest_of(tmp_path)
        build(dataset, tmp_path, num_shards=8, on_video=lambda progress: touched.append(progress.frames))
        assert touched == [0] * 12  # reported as done, for a bar; none was decoded
        touched.clear()
        lost, cut = sorted(tmp_path.glob("*.tar"))[:2]
        lost.unlink()
        cut.write_bytes(cut.read_bytes()[:-512])
        build(dataset, tmp_path, num_shards=8, on_video=lambda progress: touched.append(progress.frames))
        assert len(touched) == 12 and 2 <= sum(frames > 0 for frames in touched) < 12
        assert digest_of(tmp_path) == before

    def test_what_is_finished_is_looked_at_once(
        self, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dataset, read, original = scan(*find_dataset(videos)), [], pack.read_part
        manifest = build(dataset, tmp_path, num_shards=8)
        monkeypatch.setattr(pack, "read_part", lambda name, out: read.append(name) or original(name, out))
        assert build(dataset, tmp_path, num_shards=8) == manifest
        assert sorted(read) == [shard["shard"] for shard in manifest["shards"]]

    def test_a_half_rebuilt_folder_does_not_open(self, videos: Path, shard_folder: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(shard_folder, tmp_path / "copy"))
        dataset, other = scan(*find_dataset(videos)), replace(SETTINGS, quality=50)
        shards.build_shard(shards.plan(dataset, other, num_shards=8)[0], copy, other)
        with pytest.raises(ShardError, match="not a finished shard folder"):
            open_shards(copy)

    def test_shards_of_an_earlier_plan_go(self, videos: Path, tmp_path: Path) -> None:
        dataset = scan(*find_dataset(videos))
        for tars in (12, 5):
            manifest = build(dataset, tmp_path, num_shards=tars)
            assert len(list(tmp_path.glob("*.tar"))) == len(manifest["shards"]) == tars
            assert len(list((tmp_path / "parts").glob("shard-*"))) == tars

    def test_a_video_that_is_damaged_in_the_middle_says_so(self, videos: Path, tmp_path: Path) -> None:
        data = shutil.copytree(videos, tmp_path / "data")
        victim = sorted((data / "videos").rglob("*.avi"))[0]
        content = bytearray(victim.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 400] = bytes(range(200)) * 2
        victim.write_bytes(content)
        manifest = build(scan(*find_dataset(data)), tmp_path / "out")
        assert (manifest["failed"], manifest["decoded_with_errors"]) == (0, 1)
        build(scan(*find_dataset(data)), tmp_path / "again")
        assert digest_of(tmp_path / "again") == digest_of(tmp_path / "out")

    def test_other_settings_rebuild(self, videos: Path, shard_folder: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(shard_folder, tmp_path / "copy")
        manifest = build(scan(*find_dataset(videos)), copy, replace(SETTINGS, quality=50), num_shards=8)
        assert manifest["digest"] != open_shards(shard_folder).digest
        assert open_shards(copy).read_jpegs(0, [0]) != open_shards(shard_folder).read_jpegs(0, [0])

    def test_unfinished_folder_and_missing_split(self, shard_folder: Path, tmp_path: Path) -> None:
        with pytest.raises(ShardError, match="not a finished shard folder"):
            open_shards(tmp_path)
        with pytest.raises(ShardError, match="split 4 does not exist"):
            open_shards(shard_folder).select(4, "test")

    @pytest.mark.parametrize("damage", ["start", "middle", "cut"])
    def test_damaged_shard_names_the_video(self, shard_folder: Path, tmp_path: Path, damage: str) -> None:
        copy = shutil.copytree(shard_folder, tmp_path / "copy")
        row = index_of(copy)[0]
        content = bytearray((copy / row["shard"]).read_bytes())
        start, end = row["frame_offsets"][:2]
        place = row["offset"] + (start if damage == "start" else (start + end) // 2)
        content[place : place + 40] = bytes(40)
        (copy / row["shard"]).write_bytes(content[:place] if damage == "cut" else content)
        store = open_shards(copy)
        view = View(16, 58, 224, 224)
        for read in (store.read_jpegs, store.read_frames, lambda i, k: store.read_clip(i, k, view, (224, 224))):
            with pytest.raises(ShardError, match=f"frame 0 of {row['key']} is damaged; run `pasnet shards repair"):
                read(0, [0])

    def test_an_older_format_is_read_and_not_mended(self, shard_folder: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(shard_folder, tmp_path / "copy")
        manifest = json.loads((copy / "manifest.json").read_text())
        (copy / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
        assert open_shards(copy).digest == open_shards(shard_folder).digest
        for mend in (verify, repair):
            with pytest.raises(BuildError, match=r"format 2, made by an older version.*shards build"):
                mend(copy)

    def test_a_newer_format_is_refused(self, shard_folder: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(shard_folder, tmp_path / "copy")
        manifest = json.loads((copy / "manifest.json").read_text())
        (copy / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
        with pytest.raises(ShardError, match="format 99"):
            open_shards(copy)

    def test_manifest_counts(self, shard_folder: Path) -> None:
        manifest = json.loads((shard_folder / "manifest.json").read_text())
        store = open_shards(shard_folder)
        assert manifest["frames"] == int(store.num_frames.sum())
        assert manifest["subsets"]["split1"] == {
            "train": len(store.select(1, "train")),
            "test": len(store.select(1, "test")),
        }
        assert set(store.select(1, "train")) & set(store.select(1, "test")) == set()
        assert manifest["decode"]["height"] == 256 and manifest["decode"]["width"] == 340

    def test_index_names_its_decode_settings(self, shard_folder: Path) -> None:
        described = json.loads(pq.read_schema(shard_folder / "index.parquet").metadata[b"decode"])
        manifest = json.loads((shard_folder / "manifest.json").read_text())
        assert described == manifest["decode"]
        assert described["decoder"] == "ffmpeg" and described["quality"] == 90 and described["subsampling"] == "4:2:0"
        assert described["version"] == decoder_version("ffmpeg")
        # nothing of this machine in what is published
        assert str(shard_folder) not in (shard_folder / "manifest.json").read_text()


class TestFolderOfClasses:
    def test_a_folder_of_class_folders(self, videos: Path, tmp_path: Path) -> None:
        root = tmp_path / "mine"
        for number, source in enumerate(sorted((videos / "videos").rglob("*.avi"))[:5]):
            target = root / ("zebra" if number % 2 else "Ant") / f"clip.{number}.avi"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
        dataset = scan(*find_dataset(root))
        assert (dataset.name, dataset.class_names, dataset.splits) == ("folder", ("Ant", "zebra"), ())
        manifest = build(dataset, tmp_path / "out", num_shards=2)
        assert (manifest["videos"], manifest["subsets"], manifest["listed_but_missing"]) == (5, {}, 0)
        store = open_shards(tmp_path / "out")
        assert store.keys == ["Ant/clip%2E0", "Ant/clip%2E2", "Ant/clip%2E4", "zebra/clip%2E1", "zebra/clip%2E3"]
        assert store.labels.tolist() == [0, 0, 0, 1, 1]
        with pytest.raises(ShardError, match="no train video in split 1"):
            store.select(1, "train")

    def test_the_lists_beside_the_videos_are_found(self, videos: Path, tmp_path: Path) -> None:
        assert scan("ucf-layout", videos / "videos").count(1, "train") > 0
        bare = Path(shutil.copytree(videos / "videos", tmp_path / "bare" / "videos"))
        assert (scan("mine", bare).name, scan("mine", bare).splits) == ("mine", ())
        with pytest.raises(DatasetError, match="no split lists beside it"):
            scan("ucf101", bare)

    def test_two_files_of_one_name(self, videos: Path, tmp_path: Path) -> None:
        bare = Path(shutil.copytree(videos / "videos", tmp_path / "videos"))
        first = sorted(bare.rglob("*.avi"))[0]
        shutil.copy(first, first.with_suffix(".mp4"))
        with pytest.raises(DatasetError, match="both give the key"):
            scan("folder", bare)


class TestVerifyAndRepair:
    @pytest.fixture
    def folder(self, shard_folder: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(shard_folder, tmp_path / "copy"))

    def test_a_sound_folder(self, folder: Path) -> None:
        read: list[str] = []
        assert verify(folder, decode=True, on_shard=lambda name, size: read.append(name)) == []
        assert sorted(read) == sorted(path.name for path in folder.glob("*.tar"))
        assert repair(folder) == ([], [])

    @pytest.mark.parametrize(
        ("harm", "named"),
        [
            ("frame", "its frames are damaged (sha256 differs)"),
            ("json", "in the tar"),
            ("header", "the tar does not hold it"),
            ("padding", "headers or padding"),
            ("cut", "cannot be read to its end"),
            ("lost", "the file is missing"),
            ("swapped", "the tar holds it, the index does not list it"),
        ],
    )
    def test_harm_is_named_and_only_that_is_rebuilt(
        self, folder: Path, shard_folder: Path, harm: str, named: str
    ) -> None:
        row = index_of(folder)[0]
        tar = folder / row["shard"]
        content = bytearray(tar.read_bytes())
        if harm == "frame":
            content[row["offset"] + row["length"] // 2] ^= 1
        elif harm == "json":
            place = content.index(b'"label": ') + 9
            content[place] = ord("7")
        elif harm == "header":
            content[:100] = bytes(100)
        elif harm == "padding":
            content[-1] ^= 1
        elif harm == "cut":
            del content[len(content) // 2 :]
        if harm == "lost":
            tar.unlink()
        elif harm == "swapped":
            other = next(path for path in sorted(folder.glob("*.tar")) if path != tar)
            tar.write_bytes(other.read_bytes())
        else:
            tar.write_bytes(content)
        problems = verify(folder)
        assert problems and {problem.shard for problem in problems} == {tar.name}
        assert any(named in problem.reason for problem in problems)
        if harm in ("frame", "json"):
            assert len(problems) == 1 and problems[0].key
        untouched = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar") if path != tar}
        found, rebuilt = repair(folder)
        assert found == problems and rebuilt == [tar.name]
        assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar") if path != tar} == untouched
        assert verify(folder) == [] and digest_of(folder) == digest_of(shard_folder)

    @pytest.mark.parametrize("name", ["manifest.json", "index.parquet", "failures.parquet", "both"])
    def test_lost_or_damaged_notes_are_written_again(self, folder: Path, shard_folder: Path, name: str) -> None:
        for lost in ["manifest.json", "index.parquet"] if name == "both" else [name]:
            (folder / lost).unlink()
        if name == "index.parquet":
            (folder / name).write_bytes(b"PAR1 not really")
        assert verify(folder)
        assert repair(folder)[1] == []
        assert verify(folder) == [] and digest_of(folder) == digest_of(shard_folder)
        assert (folder / "manifest.json").read_bytes() == (shard_folder / "manifest.json").read_bytes()

    def test_damage_is_found_behind_a_lost_manifest_too(self, folder: Path, shard_folder: Path) -> None:
        row = index_of(folder)[0]
        content = bytearray((folder / row["shard"]).read_bytes())
        content[row["offset"] + 50] ^= 1
        (folder / row["shard"]).write_bytes(content)
        (folder / "manifest.json").unlink()
        assert repair(folder)[1] == [row["shard"]]
        assert digest_of(folder) == digest_of(shard_folder)

    def test_an_index_that_was_changed(self, folder: Path, shard_folder: Path) -> None:
        rows, metadata = index_of(folder), pq.read_schema(folder / "index.parquet").metadata
        rows[0]["label"] += 1
        write_parquet(folder / "index.parquet", rows, INDEX_SCHEMA, metadata)
        problems = verify(folder)
        assert any("index.parquet is not the one" in problem.reason for problem in problems)
        assert any(problem.key == rows[0]["key"] and "is not its class" in problem.reason for problem in problems)
        repair(folder)
        assert digest_of(folder) == digest_of(shard_folder)

    def test_strangers_are_named_and_other_files_left_alone(self, folder: Path) -> None:
        (folder / "shard-00099.tar").write_bytes(b"x")
        (folder / "my-notes.tar").write_bytes(b"x")
        assert [problem.shard for problem in verify(folder)] == ["shard-00099.tar"]
        with pytest.raises(BuildError, match=r"shard-00099\.tar: no part of this folder's manifest; move it elsewhere"):
            repair(folder)
        assert (folder / "shard-00099.tar").exists() and (folder / "my-notes.tar").exists()
        assert [problem.shard for problem in verify(folder)] == ["shard-00099.tar"]

    def test_videos_that_moved_or_are_gone(self, videos: Path, tmp_path: Path) -> None:
        data = Path(shutil.copytree(videos, tmp_path / "data"))
        build(scan(*find_dataset(data)), tmp_path / "out")
        before = digest_of(tmp_path / "out")
        sorted((tmp_path / "out").glob("*.tar"))[0].unlink()
        data.rename(tmp_path / "elsewhere")
        with pytest.raises(DatasetError, match="no such folder of videos"):
            repair(tmp_path / "out")
        moved = tmp_path / "elsewhere"
        repair(tmp_path / "out", videos=moved / "videos", splits=moved / "ucfTrainTestlist")
        assert digest_of(tmp_path / "out") == before

    def test_another_decoder_is_refused(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sorted(folder.glob("*.tar"))[0].unlink()
        before = digest_of(folder)
        monkeypatch.setattr(sys.modules["shards.verify"], "decoder_version", lambda decoder: "another")
        with pytest.raises(BuildError, match=r"was made by .*, here are another, "):
            repair(folder)
        assert digest_of(folder) == before

    def test_another_source_is_refused_and_nothing_touched(self, videos: Path, tmp_path: Path) -> None:
        data = Path(shutil.copytree(videos, tmp_path / "data"))
        build(scan(*find_dataset(data)), tmp_path / "out", num_shards=4)
        row = index_of(tmp_path / "out")[0]
        source, tar = data / "videos" / row["video"], tmp_path / "out" / row["shard"]
        original, whole = source.read_bytes(), tar.read_bytes()
        damaged = whole[: row["offset"]] + bytes(300) + whole[row["offset"] + 300 :]
        tar.write_bytes(damaged)
        source.write_bytes(original + bytes(2))  # another file, of another size
        with pytest.raises(BuildError, match=r"not the videos .* that 1 shards"):
            repair(tmp_path / "out")
        longest = max((data / "videos").rglob("*.avi"), key=lambda path: path.stat().st_size).read_bytes()
        source.write_bytes(longest[: len(original)].ljust(len(original), b"\0"))  # another file, of the same size
        with pytest.raises(BuildError, match=f"{row['shard']}: would become another shard than it was"):
            repair(tmp_path / "out")
        assert tar.read_bytes() == damaged
        source.write_bytes(original)
        assert repair(tmp_path / "out")[1] == [row["shard"]] and tar.read_bytes() == whole

    def test_names_in_a_damaged_index_are_not_acted_on(self, folder: Path) -> None:
        precious = folder.parent / "precious.txt"
        precious.write_text("mine")
        rows, metadata = index_of(folder), pq.read_schema(folder / "index.parquet").metadata
        rows[0]["shard"], rows[1]["shard"] = "../precious.txt", "notes.txt"
        (folder / "notes.txt").write_text("mine")
        write_parquet(folder / "index.parquet", rows, INDEX_SCHEMA, metadata)
        assert any("places it in '../precious.txt'" in problem.reason for problem in verify(folder))
        repair(folder)
        assert verify(folder) == []
        assert precious.read_text() == (folder / "notes.txt").read_text() == "mine"

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("manifest.json", b"{"),
            ("manifest.json", b"[]"),
            ("manifest.json", b'{"format": 3, "shards": null}'),
            ("manifest.json", b'{"format": 3, "shards": [{"shard": "../x", "bytes": 1, "sha256": ""}]}'),
            ("index.parquet", b"junk"),
            ("index.parquet", None),
            ("failures.parquet", b"junk"),
        ],
    )
    def test_damaged_notes_are_a_line_and_mended(
        self, folder: Path, shard_folder: Path, name: str, content: bytes | None
    ) -> None:
        if content is None:  # a sound Parquet file of another kind
            write_parquet(folder / name, [], FAILURES_SCHEMA)
        else:
            (folder / name).write_bytes(content)
        assert [f"{name} cannot be read" in problem.reason for problem in verify(folder)] == [True]
        if (
            name != "failures.parquet"
            and content != b'{"format": 3, "shards": null}'
            and b"../x" not in (content or b"")
        ):
            with pytest.raises(ShardError, match=r"run `pasnet shards repair|not a finished"):
                open_shards(folder)
        assert repair(folder)[1] == []
        assert digest_of(folder) == digest_of(shard_folder)

    def test_a_manifest_that_was_changed(self, folder: Path) -> None:
        path, whole = folder / "manifest.json", json.loads((folder / "manifest.json").read_text())
        changes: list[dict[str, Any]] = [
            {"class_names": whole["class_names"][::-1]},
            {"class_names": whole["class_names"][:1]},
            {"failed": 3},
            {"decode": {**whole["decode"], "quality": 50}},
            {"videos": 11},
            {"decoded_with_errors": 1},
            {"dataset": "another"},
            {"shards": [{**shard, "videos": shard["videos"] + 1} for shard in whole["shards"]]},
        ]
        for change in changes:
            path.write_text(json.dumps(whole | change))
            assert verify(folder), change
        repair(folder)
        assert json.loads(path.read_text()) == whole

    def test_a_failure_table_that_was_changed(self, videos: Path, tmp_path: Path) -> None:
        data = Path(shutil.copytree(videos, tmp_path / "data"))
        sorted((data / "videos").rglob("*.avi"))[0].write_bytes(b"damaged")
        build(scan(*find_dataset(data)), tmp_path / "out")
        before, rows = digest_of(tmp_path / "out"), failures(tmp_path / "out")
        write_parquet(tmp_path / "out" / "failures.parquet", [{**rows[0], "reason": "none"}], FAILURES_SCHEMA)
        assert [problem.reason for problem in verify(tmp_path / "out")] == [
            "failures.parquet is not what the parts say"
        ]
        assert repair(tmp_path / "out")[1] == [] and digest_of(tmp_path / "out") == before

    def test_a_damaged_part_is_built_again(self, folder: Path, videos: Path, shard_folder: Path) -> None:
        for path, harm in zip(
            sorted((folder / "parts").glob("shard-*")), (b'"label": 0', b'"records": [', b'"sources"'), strict=False
        ):
            path.write_bytes(path.read_bytes().replace(harm, harm[:-1] + b"x"))
        build(scan(*find_dataset(videos)), folder, num_shards=8)
        assert verify(folder) == [] and digest_of(folder) == digest_of(shard_folder)

    def test_one_build_at_a_time(self, folder: Path, videos: Path) -> None:
        with locked(folder):
            for work in (lambda: repair(folder), lambda: build(scan(*find_dataset(videos)), folder)):
                with pytest.raises(BuildError, match="another build or repair is writing there"):
                    in_a_thread(work)
        assert repair(folder) == ([], [])

    def test_failures_are_tried_again_with_other_limits(self, videos: Path, tmp_path: Path) -> None:
        dataset = scan(*find_dataset(videos))
        with pytest.raises(BuildError, match=r"12 of 12 videos could not be decoded.*took longer"):
            build(dataset, tmp_path, replace(SETTINGS, timeout=0.001), num_shards=2, max_failed=1.0)
        assert build(dataset, tmp_path, num_shards=2)["failed"] == 0

    @pytest.mark.parametrize("limit", [0.0, 0.01])
    def test_one_damaged_video_is_forgiven_unless_none_is(self, videos: Path, tmp_path: Path, limit: float) -> None:
        copied = shutil.copytree(videos, tmp_path / "data")
        sorted((copied / "videos").rglob("*.avi"))[0].write_bytes(b"damaged")
        dataset = scan(*find_dataset(copied))
        if limit:
            assert build(dataset, tmp_path / "out", num_shards=2, max_failed=limit)["failed"] == 1
        else:
            with pytest.raises(BuildError, match=r"1 of 12 videos could not be decoded \(limit 0\.0%\)"):
                build(dataset, tmp_path / "out", num_shards=2, max_failed=limit)

    def test_a_full_disk_is_foreseen(self, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(BuildError, match=r"needs about 0\.0 GB.*--frames-per-video"):
            build(scan(*find_dataset(videos)), tmp_path)

    def test_a_disk_that_fills_up(self, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("shards.pack._add_offsets", full)
        with pytest.raises(BuildError, match="the disk is full"):
            build(scan(*find_dataset(videos)), tmp_path, workers=1)
        assert not list(tmp_path.glob("shard-*"))


class TestNothingOfOthers:
    def test_tars_of_somebody_else(self, videos: Path, tmp_path: Path) -> None:
        for name in ("shard-00000.tar", "shard-train-7.tar", "shard-foo.tmp", "shard-foo.tar.tmp"):
            (tmp_path / name).write_text("mine")
        dataset = scan(*find_dataset(videos))
        with pytest.raises(BuildError, match=r"shard-00000\.tar: was made by no build"):
            build(dataset, tmp_path)
        (tmp_path / "shard-00000.tar").unlink()
        build(dataset, tmp_path)
        left = {path.name for path in tmp_path.glob("shard-*") if not re.fullmatch(r"shard-\d{5}\.tar", path.name)}
        assert left == {"shard-train-7.tar", "shard-foo.tmp", "shard-foo.tar.tmp"}

    def test_another_dataset(self, videos: Path, shard_folder: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(shard_folder, tmp_path / "copy"))
        other = tmp_path / "mine" / "c"
        other.mkdir(parents=True)
        shutil.copy(sorted((videos / "videos").rglob("*.avi"))[0], other)
        for damaged in (False, True):  # then the manifest knows
            if damaged:
                (copy / "parts" / "build.json").write_text("{")
            with pytest.raises(BuildError, match="holds the shards of synthetic with 3 classes"):
                build(scan("folder", other.parent), copy)
        assert digest_of(copy) == digest_of(shard_folder)

    def test_a_source_replaced_by_one_of_the_same_size(self, videos: Path, tmp_path: Path) -> None:
        data = Path(shutil.copytree(videos, tmp_path / "data"))
        dataset = scan(*find_dataset(data))
        before = build(dataset, tmp_path / "out")["digest"]
        path = dataset.videos[0].path
        other = min((video.path for video in dataset.videos[1:]), key=lambda path: path.stat().st_size)
        size = max(path.stat().st_size, other.stat().st_size)
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
        padded = build(scan(*find_dataset(data)), tmp_path / "out")["digest"]
        assert padded == before  # the same frames
        path.write_bytes(other.read_bytes().ljust(size, b"\0"))
        assert build(scan(*find_dataset(data)), tmp_path / "out")["digest"] != before

    def test_an_ffmpeg_that_is_killed_is_no_bad_video(
        self, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dataset, popen = scan(*find_dataset(videos)), subprocess.Popen

        def killed(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
            process = popen(command, **options)
            if any(dataset.videos[5].path.name in word for word in command):
                process.kill()
            return process

        with monkeypatch.context() as patched:
            patched.setattr("shards.decode_ffmpeg.subprocess.Popen", killed)
            with pytest.raises(DecoderStoppedError, match="ffmpeg was stopped"):
                build(dataset, tmp_path, num_shards=4, workers=1)
        assert not (tmp_path / "manifest.json").exists()
        assert build(dataset, tmp_path, num_shards=4)["failed"] == 0

    @pytest.mark.parametrize("decoder", ["ffmpeg", "pyav"])
    def test_a_worker_that_dies_ends_the_build_with_a_reason(
        self, videos: Path, shard_folder: Path, tmp_path: Path, decoder: Literal["ffmpeg", "pyav"]
    ) -> None:
        dataset, settings = scan(*find_dataset(videos)), replace(SETTINGS, decoder=decoder)

        def kill(_: object) -> None:
            multiprocessing.active_children()[0].kill()

        with pytest.raises(BuildError, match=r"a worker process died.*finished shards are kept"):
            build(dataset, tmp_path, settings, num_shards=8, on_video=kill)
        assert not (tmp_path / "manifest.json").exists()
        assert build(dataset, tmp_path, settings, num_shards=8)["failed"] == 0
        if decoder == "ffmpeg":
            assert digest_of(tmp_path) == digest_of(shard_folder)

    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    @pytest.mark.parametrize("workers", [1, 2])
    def test_a_video_that_takes_its_worker_with_it_is_set_aside(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
    ) -> None:
        """One that crashes the fast decoder, one that hangs in it with the interpreter held, one that wants all memory;
        among the first of so many that sizes are estimated before."""
        for number in range(18):
            make_video(tmp_path / "set" / "a" / f"{number:02d}\n.avi", frames=3)
        dataset = scan("folder", tmp_path / "set")
        crashing, hanging, hungry = (dataset.videos[number].path for number in (0, 2, 9))
        seen: list[Progress] = []

        def ruin(video: Path) -> None:
            if video == crashing:
                ctypes.string_at(0)
            if video == hanging:
                ctypes.PyDLL(None).sleep(600)
            if video == hungry:
                bytes(2 * decode_pyav.MAX_ADDRESS_SPACE)

        fork_workers_that(ruin, monkeypatch)
        settings = replace(SETTINGS, decoder="pyav", timeout=3)
        out = tmp_path / "out"
        made = build(dataset, out, settings, workers=workers, max_failed=0.5, on_video=seen.append)
        assert (made["videos"], made["failed"]) == (15, 3)
        assert {Path(row["video"]).name: row["reason"] for row in failures(out)} == {
            crashing.name: "crashed the decoder (Segmentation fault)",
            hanging.name: "took longer than 3 s",
            hungry.name: "wants more memory than a decoder may have",
        }
        assert sorted(progress.video.key for progress in seen) == sorted(video.key for video in dataset.videos)
        assert len(open_shards(out).keys) == 15 and not list(out.glob("*.tmp"))
        assert not list(out.glob("parts/notices-*"))
        (out / "shard-00003.tar").write_bytes(b"damaged")
        for part in out.glob("parts/shard-*.json"):  # so that all of them are tried again
            part.unlink()
        assert repair(out, workers=workers)[1] and not verify(out)

    def test_a_crash_between_videos_is_nobodys(self, tmp_path: Path) -> None:
        notice = tmp_path / "1"
        for said in ("", "Fatal Python error: Segmentation fault\n\nThread 0x1:\n", '"a.avi"\n'):
            notice.write_text(said)
            assert decode_pyav.ended_by(notice, SETTINGS) is None
        notice.write_text(json.dumps("a\n.avi") + "\nFatal Python error: Aborted\n\nThread 0x1:\n")
        assert decode_pyav.ended_by(notice, SETTINGS) == ("a\n.avi", "crashed the decoder (Aborted)")

    def test_memory_that_runs_out_costs_no_frames(self, tmp_path: Path) -> None:
        """libav tells of it as of a fault in the video; whatever the limit, it is all frames or none."""
        video = make_video(tmp_path / "a.avi", frames=4, size="6000x3000", encoder=("-c:v", "mjpeg"))
        limited = """
import sys
from pathlib import Path
from shards import decode_pyav
from shards.decode import DecodeError, DecodeSettings, decode_video
settings = DecodeSettings(decoder="pyav", max_mib=1)
decode_pyav.MAX_ADDRESS_SPACE = int(sys.argv[1]) << 20
decode_pyav.give_notice(Path(sys.argv[2]), settings)
try:
    print(len(decode_video(Path(sys.argv[3]), settings).jpegs))
except DecodeError as error:
    print(error.reason)
"""
        seen = set()
        for mib in (30, 45, 60, 75, 400):
            command = [sys.executable, "-c", limited, str(mib), str(tmp_path / "notice"), str(video)]
            seen.add(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip())
        assert seen == {"4", "wants more memory than a decoder may have"}

    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_a_decoder_that_crashes_on_everything_ends_the_build(
        self, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fork_workers_that(lambda _: ctypes.string_at(0), monkeypatch)
        settings = replace(SETTINGS, decoder="pyav")
        with pytest.raises(
            BuildError, match=r"[34] videos crashed the decoder.*\(Segmentation fault\).*decoder ffmpeg"
        ):
            build(scan(*find_dataset(videos)), tmp_path, settings, num_shards=4, max_failed=0.2)
        with pytest.raises(BuildError, match=r"[12] videos crashed the decoder"):  # none is forgiven: the first ends it
            build(scan(*find_dataset(videos)), tmp_path / "none", settings, num_shards=4, max_failed=0)

    def test_what_the_listener_raises_stops_the_workers(self, videos: Path, tmp_path: Path) -> None:
        heard = []

        def stop(progress: Progress) -> None:
            heard.append(progress)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build(scan(*find_dataset(videos)), tmp_path, num_shards=12, on_video=stop)
        assert len(heard) == 1 and not multiprocessing.active_children()
        assert len(list(tmp_path.glob("shard-*.tar"))) < 12 and not list(tmp_path.glob("*.tmp"))

    def test_a_worker_that_dies_while_the_others_stop(self, videos: Path, tmp_path: Path) -> None:
        def stop(_: object) -> None:
            multiprocessing.active_children()[0].kill()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):  # and no waiting for ever
            build(scan(*find_dataset(videos)), tmp_path, num_shards=12, on_video=stop)
        assert build(scan(*find_dataset(videos)), tmp_path, num_shards=12)["videos"] == 12

    def test_workers_see_the_environment_of_the_moment(
        self, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dataset = scan(*find_dataset(videos))
        build(dataset, tmp_path / "before", num_shards=8)  # the server of worker processes is running from here on
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "nothing"))
        with pytest.raises(FileNotFoundError, match="nothing"):
            build(dataset, tmp_path / "after", num_shards=8)

    def test_failures_are_kept_until_they_are_to_be_tried_again(
        self, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dataset, decode = scan(*find_dataset(videos)), shards.decode_videos

        def flaky(videos: list[Path], settings: DecodeSettings) -> Iterator[DecodedVideo | DecodeError]:
            for video, found in zip(videos, decode(videos, settings), strict=True):
                yield DecodeError(video, "a bad day") if video == dataset.videos[3].path else found

        with monkeypatch.context() as patched:
            patched.setattr("shards.pack.decode_videos", flaky)
            assert build(dataset, tmp_path, num_shards=4, workers=1)["failed"] == 1
        assert build(dataset, tmp_path, num_shards=4)["failed"] == 1
        assert build(dataset, tmp_path, num_shards=4, retry_failed=True)["failed"] == 0

    def test_class_folders_that_webdataset_would_skip(self, videos: Path, tmp_path: Path) -> None:
        sources = sorted((videos / "videos").rglob("*.avi"))
        for number, name in enumerate(("__background__", "a__b__", "___", "plain_")):
            (tmp_path / "mine" / name).mkdir(parents=True)
            shutil.copy(sources[number], tmp_path / "mine" / name / "__clip__.x.avi")
        build(scan("folder", tmp_path / "mine"), tmp_path / "out", num_shards=2)
        seen = [
            json.loads(s["json"])["class_name"]
            for s in webdataset.WebDataset(urls_of(tmp_path / "out"), shardshuffle=False)
        ]
        assert sorted(seen) == sorted(("__background__", "a__b__", "___", "plain_"))

    def test_the_same_failure_gives_the_same_bytes(self, videos: Path, tmp_path: Path) -> None:
        data = Path(shutil.copytree(videos, tmp_path / "data"))
        victim = sorted((data / "videos").rglob("*.avi"))[0]
        victim.write_bytes(victim.read_bytes()[:2000])
        for name in ("one", "other"):
            build(scan(*find_dataset(data)), tmp_path / name)
        assert shards.failures(tmp_path / "one")[0]["detail"]
        assert digest_of(tmp_path / "one") == digest_of(tmp_path / "other")


class TestPlan:
    def test_shards_of_about_the_size_asked_for(self, videos: Path, tmp_path: Path) -> None:
        dataset = scan(*find_dataset(videos))
        estimate = estimate_bytes(dataset, SETTINGS)
        manifest = build(dataset, tmp_path, num_shards=3)
        assert 0.7 < estimate / sum(shard["bytes"] for shard in manifest["shards"]) < 1.4
        many = replace_videos(dataset, 40)
        sizes = shards.plan(many, SETTINGS, shard_mib=1, min_shards=1)
        assert len(sizes) == -(-estimate_bytes(many, SETTINGS) // (1 << 20))
        assert len(shards.plan(many, SETTINGS)) == 16  # small, and yet several for each of a reader's workers
        assert len(shards.plan(dataset, SETTINGS)) == 12  # never more than videos

    def test_both_decoders_pack_alike(self, videos: Path, shard_folder: Path, tmp_path: Path) -> None:
        build(scan(*find_dataset(videos)), tmp_path, replace(SETTINGS, decoder="pyav"), num_shards=8)
        ours, other = index_of(shard_folder), index_of(tmp_path)
        same = ("key", "video", "label", "num_frames", "fps", "source_codec", "source_width", "source_frames", "shard")
        assert [[row[name] for name in same] for row in ours] == [[row[name] for name in same] for row in other]
        assert verify(tmp_path) == []

    def test_few_frames_for_a_small_disk(self, videos: Path, tmp_path: Path) -> None:
        build(scan(*find_dataset(videos)), tmp_path, replace(SETTINGS, frames_per_video=4), num_shards=2)
        for row in index_of(tmp_path):
            assert row["num_frames"] == 4 and 8 <= row["source_frames"] <= 12
        assert verify(tmp_path) == []


class TestLook:
    def test_stats(self, shard_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["shards", "stats", str(shard_folder), "--json"]) == 0
        numbers = json.loads(capsys.readouterr().out)
        rows = index_of(shard_folder)
        assert numbers["frames"] == sum(row["num_frames"] for row in rows)
        assert numbers["videos_per_class"] == {"min": 4, "median": 4.0, "mean": 4.0, "max": 4}
        assert numbers["videos_with_fewer_frames_than"]["16"] == 12
        assert main(["shards", "stats", str(shard_folder)]) == 0
        assert "fewer than 16 frames" in capsys.readouterr().out or numbers["videos_with_fewer_frames_than"]["8"]

    def test_contact_sheet(self, shard_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out, store = tmp_path / "sheet.png", open_shards(shard_folder)
        name = index_of(shard_folder)[3]["video"]
        arguments = ["--video", name, "--video", store.keys[0], "--num-segments", "4", "--out", str(out)]
        assert main(["shards", "inspect", str(shard_folder), *arguments]) == 0
        assert store.keys[3] in capsys.readouterr().out
        picture = np.asarray(Image.open(out)).astype(int)
        assert picture.shape == (2 * (128 + 22), 4 * 172 + 2, 3)
        frame = store.read_frames(3, segment_indices(int(store.num_frames[3]), 4))[2]
        shown = picture[20 : 20 + 128, 2 + 2 * 172 : 2 + 2 * 172 + 170]
        expected = np.asarray(Image.fromarray(frame).resize((170, 128))).astype(int)
        assert np.abs(shown - expected)[20:].max() == 0  # below the frame's number

    def test_verify_and_repair_by_hand(
        self, shard_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = Path(shutil.copytree(shard_folder, tmp_path / "copy"))
        assert main(["shards", "verify", str(folder)]) == 0
        assert "sound: 12 videos" in capsys.readouterr().out
        lost = sorted(folder.glob("*.tar"))[0]
        lost.unlink()
        assert main(["shards", "verify", str(folder)]) == 1
        shown = capsys.readouterr()
        assert f"{lost.name}: the file is missing" in shown.out and "run `pasnet shards repair" in shown.err
        assert main(["shards", "repair", str(folder)]) == 0
        assert f"rebuilt: {lost.name}" in capsys.readouterr().out

    def test_the_other_door(self, shard_folder: Path) -> None:
        command = [sys.executable, "-m", "shards", "verify"]
        assert subprocess.run([*command, str(shard_folder)], capture_output=True).returncode == 0
        wrong = subprocess.run([*command, "nowhere"], capture_output=True, text=True)
        assert wrong.returncode == 2 and wrong.stderr == "error: nowhere: no such folder\n"


def processes_of(session: int) -> list[int]:
    """Ids of the living processes that a process which was started in a session of its own has left."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, of = path.read_text().rpartition(")")[2].split()[:4]
            if int(of) == session and state != "Z":
                found.append(int(path.parent.name))
    return found


def wait_until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


class TestDrills:
    @pytest.mark.slow
    @pytest.mark.parametrize("decoder", ["ffmpeg", "pyav"])
    def test_a_build_killed_ten_times_ends_byte_identical(self, tmp_path: Path, decoder: str) -> None:
        data = generate(
            tmp_path / "data", SynthConfig(num_classes=4, groups=8, frames=(30, 60), seed=1), ffmpeg=ffmpeg_exe()
        )
        command = [sys.executable, "-m", "shards", "build", "--data", str(data), "--num-shards", "16"]
        command += ["--decoder", decoder, "--out"]
        subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
        rng, kills, found = random.Random(decoder), 0, set()

        def built() -> list[Path]:
            return sorted((tmp_path / "killed").glob("*.tar"))

        while kills < 10:
            there = built()
            for path in rng.sample(there, max(0, len(there) - rng.randrange(12))):
                path.unlink()  # work for it, however far the last one came
            enough = rng.randint(len(built()), 15)
            build_process = subprocess.Popen([*command, str(tmp_path / "killed")], start_new_session=True)
            while build_process.poll() is None and len(built()) < enough:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))  # in the middle of the next shards, or at the end of all
            if build_process.poll() is None:
                # all of it, or the parent alone: its workers must not go on in a folder that is no longer locked
                (os.killpg if kills % 2 else os.kill)(build_process.pid, signal.SIGKILL)
                kills += 1
                found.add(len(built()))
            build_process.wait()
            wait_until(lambda session=build_process.pid: not processes_of(session))
        assert len(found) >= 3  # it was killed in different states of the work
        subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True)
        assert digest_of(tmp_path / "killed") == digest_of(tmp_path / "whole")
        for name in ("manifest.json", *(f"parts/shard-{number:05d}.tar.json" for number in range(16))):
            assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        assert not list((tmp_path / "killed").glob("*.tmp"))
        assert verify(tmp_path / "killed", decode=True) == []

    @pytest.mark.slow
    @pytest.mark.shared
    @pytest.mark.parametrize(("decoder", "workers"), [("ffmpeg", 2), ("pyav", 3)])
    def test_every_real_clip_is_packed_verified_and_read_back(
        self, shared: Path, tmp_path: Path, decoder: str, workers: int
    ) -> None:
        lines = (shared / "data" / "frames.csv").read_text().splitlines()
        true = {row["path"]: int(row["frames"]) for row in csv.DictReader(lines)}
        found = {}
        kinetics = tmp_path / "kinetics" / "kinetics"
        shutil.copytree(shared / "data" / "kinetics", kinetics)
        for name in ("ucf101", "hmdb51", "jhmdb", "kinetics"):
            root = kinetics.parent if name == "kinetics" else shared / "data" / name
            out = tmp_path / "shards" / name
            build(scan(*find_dataset(root)), out, replace(SETTINGS, decoder=decoder), workers=workers)
            assert verify(out) == [] and shards.failures(out) == []
            store, rows = open_shards(out), index_of(out)
            for number, row in enumerate(rows):
                place = (
                    f"kinetics/{row['video'].split('/')[1]}" if name == "kinetics" else f"{name}/videos/{row['video']}"
                )
                last = store.read_jpegs(number, range(row["num_frames"]))[-1]
                assert simplejpeg.decode_jpeg(last).shape == (256, 340, 3)
                found[place] = row["num_frames"]
        assert found == true and len(found) == 1036
