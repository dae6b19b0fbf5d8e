"""Fetching datasets: a local server serves tiny archives made here, breaks off, changes its mind and lies."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import threading
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import rarfile
from filelock import FileLock

from shards import download as download_module
from shards import fetch as fetch_module
from shards import unpack as unpack_module
from shards.datasets import find_dataset
from shards.fetch import SOURCES, Archive, FetchError, Source, fetch
from shards.unpack import UnreachableError

# RAR archives with stored members: nothing that may be installed here writes RAR.


def vint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def rar5_block(kind: int, fields: bytes, *, extra: bytes = b"", data: bytes | None = None) -> bytes:
    flags = bool(extra) | (data is not None) << 1
    header = vint(kind) + vint(flags)
    header += (vint(len(extra)) if extra else b"") + (vint(len(data)) if data is not None else b"")
    header += fields + extra
    header = vint(len(header)) + header
    return struct.pack("<L", zlib.crc32(header)) + header + (data or b"")


def rar5_member(
    name: str, data: bytes, *, extra: bytes = b"", crc: int | None = None, mode: int = 0o100644, method: int = 0
) -> bytes:
    """`extra` is one record, type and data; `method` 1 to 5 says that the data is compressed, which it is not."""
    raw = name.encode()
    fields = vint(4) + vint(len(data)) + vint(mode)
    fields += struct.pack("<L", zlib.crc32(data) if crc is None else crc)
    fields += vint(method << 7) + vint(1) + vint(len(raw)) + raw
    return rar5_block(2, fields, extra=vint(len(extra)) + extra if extra else b"", data=data)


def rar5(*members: bytes) -> bytes:
    return b"Rar!\x1a\x07\x01\x00" + rar5_block(1, vint(0)) + b"".join(members) + rar5_block(5, vint(0))


def rar5_of(files: dict[str, bytes]) -> bytes:
    return rar5(*(rar5_member(name, data) for name, data in files.items()))


def rar4_block(kind: int, flags: int, fields: bytes, data: bytes = b"") -> bytes:
    header = struct.pack("<BHH", kind, flags, 7 + len(fields)) + fields
    return struct.pack("<H", zlib.crc32(header) & 0xFFFF) + header + data


def rar4_of(files: dict[str, bytes], mode: int = 0o100644, flags: int = 0) -> bytes:
    out = b"Rar!\x1a\x07\x00" + rar4_block(0x73, 0, bytes(6))
    for name, data in files.items():
        raw = name.replace("/", "\\").encode("ascii")
        fields = struct.pack(
            "<LLBLLBBHL", len(data), len(data), 3, zlib.crc32(data), 1 << 21 | 1 << 16, 20, 0x30, len(raw), mode
        )
        out += rar4_block(0x74, 0x8000 | flags, fields + raw, data)
    return out + rar4_block(0x7B, 0x4000, b"")


def zip_of(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


# Two tiny datasets. The videos are noise: nothing here decodes them.


def noise(name: str, size: int = 3000) -> bytes:
    return hashlib.shake_128(name.encode()).digest(size)


UCF_VIDEOS = {
    f"{folder}/v_{stem}_g0{group}_c01.avi": noise(f"{stem}{group}")
    for folder, stem in (("Archery", "Archery"), ("HandstandPushups", "HandStandPushups"))
    for group in (1, 2)
}
UCF_LISTS = {
    "classInd.txt": b"1 Archery\r\n2 HandstandPushups\r\n",
    "trainlist01.txt": b"Archery/v_Archery_g02_c01.avi 1\r\nHandstandPushups/v_HandStandPushups_g02_c01.avi 2\r\n",
    "testlist01.txt": b"Archery/v_Archery_g01_c01.avi\r\nHandstandPushups/v_HandStandPushups_g01_c01.avi\r\n",
}
HMDB_VIDEOS = {
    "kick": ("-April_[09]_kick_u_nm_np1_ba_goo_0.avi", "Ünï#(x)&;!~_kick_f_cm_np10_fr_med_1.avi"),
    "kick_ball": ("+a b@c_kick_ball_h_nm_np1_le_bad_0.avi", "--kick_ball_h_nm_np1_le_bad_1.avi"),
}
HMDB_LISTS = {
    f"testTrainMulti_7030_splits/{name}_test_split1.txt": f"{train} 1 \n{test} 2 \n".encode()
    for name, (train, test) in HMDB_VIDEOS.items()
}
UCF_RAR = rar5_of({f"UCF-101/{name}": data for name, data in UCF_VIDEOS.items()} | {"UCF-101/.DS_Store": b"junk"})
UCF_ZIP = zip_of({f"ucfTrainTestlist/{name}": data for name, data in UCF_LISTS.items()} | {"__MACOSX/._x": b"junk"})
HMDB_RAR = rar5_of(
    {
        f"{number}.rar": rar5_of({f"{name}/{f}": noise(f) for f in files})
        for number, (name, files) in enumerate(HMDB_VIDEOS.items())
    }
)
HMDB_SPLITS = rar4_of(HMDB_LISTS)


@dataclass
class Served:
    """What the server answers, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    etag: str = '"1"'
    dates: bool = True
    ignore_range: bool = False
    ignore_if_range: bool = False
    cuts: list[int] = field(default_factory=list)  # the next answers break off after so many bytes of body
    statuses: list[int] = field(default_factory=list)  # the next answers are these errors
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # (path, Range, If-Range)
    sent: list[int] = field(default_factory=list)  # bytes of body, per answer
    url: str = ""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    served = Served()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            start = self.headers.get("Range", "")
            condition = self.headers.get("If-Range", "")
            served.asked.append((self.path, start, condition))
            body = served.files.get(self.path.lstrip("/"))
            if served.statuses or body is None:
                self.send_error(served.statuses.pop(0) if served.statuses else 404)
                return
            validators = [served.etag, "Thu, 01 Jan 2026 00:00:00 GMT"]
            fresh = not condition or condition in validators or served.ignore_if_range
            first = int(start[6:-1]) if start and fresh and not served.ignore_range else 0
            if first >= len(body) > 0:
                self.send_error(416)
                return
            self.send_response(206 if first else 200)
            self.send_header("Content-Length", str(len(body) - first))
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
            if served.etag:
                self.send_header("ETag", served.etag)
            if served.dates:
                self.send_header("Last-Modified", validators[1])
            self.end_headers()
            rest = body[first:]
            if served.cuts:
                rest = rest[: served.cuts.pop(0)]
            served.sent.append(len(rest))
            self.wfile.write(rest)
            self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    served.url = f"http://127.0.0.1:{httpd.server_port}"
    yield served
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture
def no_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH of an empty folder; tests put tools into it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture
def idle_tool(no_tools: Path) -> Path:
    """An extractor that can be found and unpacks nothing: stored members need none."""
    (no_tools / "bsdtar").write_text("#!/bin/sh\nexit 1\n")
    (no_tools / "bsdtar").chmod(0o755)
    return no_tools


def tool(folder: Path, name: str, script: str) -> None:
    """An executable of our own; `argv` in the script is what it was given."""
    (folder / name).write_text(f"#!{sys.executable} -IS\nimport os, sys\nargv = sys.argv[1:]\n{script}\n")
    (folder / name).chmod(0o755)


def archive(served: Served, name: str, body: bytes, *, pinned: bool = True) -> Archive:
    served.files[name] = body
    known = {"size": len(body), "sha256": hashlib.sha256(body).hexdigest()} if pinned else {}
    return Archive(name=name, urls=(f"{served.url}/{name}",), **known)  # type: ignore[arg-type]


def register(monkeypatch: pytest.MonkeyPatch, name: str, videos: Archive, splits: Archive) -> None:
    source = Source(name=name, videos=videos, splits=splits, terms="none", homepage="none")
    monkeypatch.setitem(SOURCES, name, source)


@pytest.fixture
def ucf(server: Served, idle_tool: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    videos = archive(server, "UCF101.rar", UCF_RAR)
    register(monkeypatch, "tiny-ucf", videos, archive(server, "lists.zip", UCF_ZIP))
    return server


@pytest.fixture
def hmdb(server: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    videos = archive(server, "hmdb51_org.rar", HMDB_RAR)
    register(monkeypatch, "tiny-hmdb", videos, archive(server, "test_train_splits.rar", HMDB_SPLITS))
    return server


def quick(name: str, out: Path, **options: Any) -> Any:
    """fetch() that does not wait."""
    return fetch(name, out, sleep=lambda seconds: None, **options)


def ranges(served: Served, name: str) -> list[str]:
    return [start for path, start, _ in served.asked if path == f"/{name}"]


def files_in(folder: Path) -> dict[str, bytes]:
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return dict(sorted(found.items()))


# The whole of it


def test_ucf_is_downloaded_unpacked_and_found(ucf: Served, tmp_path: Path) -> None:
    seen = []
    dataset = quick("tiny-ucf", tmp_path / "out", progress=lambda what, done, total: seen.append((what, done, total)))
    assert files_in(tmp_path / "out" / "videos") == dict(sorted(UCF_VIDEOS.items()))
    assert (len(dataset.videos), dataset.missing, dataset.class_names) == (4, (), ("Archery", "HandstandPushups"))
    assert find_dataset(tmp_path / "out")[1:] == (tmp_path / "out" / "videos", tmp_path / "out" / "splits")
    assert sorted(files_in(tmp_path / "out" / "archives")) == ["UCF101.rar", "lists.zip"]
    assert ("UCF101.rar: downloading", len(UCF_RAR), len(UCF_RAR)) in seen
    assert ("UCF101.rar: checking", len(UCF_RAR), len(UCF_RAR)) in seen
    assert not list((tmp_path / "out").glob("*.tmp"))
    asked = len(ucf.asked)
    assert quick("tiny-ucf", tmp_path / "out") == dataset
    assert len(ucf.asked) == asked  # nothing was missing


def test_keep_archives_false_deletes_them_and_nothing_else(ucf: Served, tmp_path: Path) -> None:
    quick("tiny-ucf", tmp_path, keep_archives=False)
    assert not (tmp_path / "archives").exists() and (tmp_path / "videos" / "Archery").is_dir()


@pytest.mark.parametrize("name", ["python", *unpack_module.EXTRACTORS])
def test_nested_rars_and_odd_names_through_every_extractor(
    name: str, hmdb: Served, tmp_path: Path, no_tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "python":
        tool(no_tools, "bsdtar", "sys.exit(1)")
    else:
        exe = shutil.which(name, path=os.defpath + ":/usr/local/bin:/opt/homebrew/bin")
        if not exe:
            pytest.skip(f"{name} is not installed")
        if name.startswith("7z") and b"Rar5" not in subprocess.run([exe, "i"], capture_output=True, check=True).stdout:
            pytest.skip(f"{name} was built without RAR")
        (no_tools / name).symlink_to(exe)
        # An extractor that fails would be hidden by the fallback for stored members.
        monkeypatch.setattr(unpack_module, "_copy_members", lambda *_: pytest.fail(f"{name} did not unpack"))
    dataset = quick("tiny-hmdb", tmp_path / "out")
    expected = {f"{folder}/{f}": noise(f) for folder, files in HMDB_VIDEOS.items() for f in files}
    assert files_in(tmp_path / "out" / "videos") == dict(sorted(expected.items()))
    assert dataset.missing == () and dataset.count(1, "train") == dataset.count(1, "test") == 2
    assert files_in(tmp_path / "out" / "splits") == {Path(n).name: data for n, data in sorted(HMDB_LISTS.items())}


def test_class_folders_are_found_in_whatever_wraps_them(
    server: Served, idle_tool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"JHMDB_video/ReCompress_Videos/{name}": data for name, data in UCF_VIDEOS.items()}
    files |= {"JHMDB_video/README.txt": b"read me", "__MACOSX/JHMDB_video/._README.txt": b"junk"}
    videos = archive(server, "JHMDB_video.zip", zip_of(files), pinned=False)
    register(monkeypatch, "tiny", videos, archive(server, "lists.zip", UCF_ZIP))
    quick("tiny", tmp_path)
    assert files_in(tmp_path / "videos") == dict(sorted(UCF_VIDEOS.items()))


def test_a_listed_video_that_no_archive_holds_is_an_error(
    server: Served, idle_tool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = dict(list(UCF_VIDEOS.items())[:3])
    register(monkeypatch, "tiny", archive(server, "v.rar", rar5_of(some)), archive(server, "lists.zip", UCF_ZIP))
    with pytest.raises(FetchError, match="1 of 4 listed videos are not there, such as HandstandPushups/v_HandStand"):
        quick("tiny", tmp_path)


def test_lists_that_are_not_the_official_ones_are_an_error(
    server: Served, idle_tool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, "ucf101", archive(server, "v.rar", UCF_RAR), archive(server, "lists.zip", UCF_ZIP))
    with pytest.raises(FetchError, match=r"lists.zip: holds no split lists of ucf101"):
        quick("ucf101", tmp_path)
    classes = "".join(f"{number} Class{number}\n" for number in range(1, 102))  # 101 of them, but too few videos
    lists = {"classInd.txt": classes.encode(), "trainlist01.txt": b"Class1/v_Class1_g01_c01.avi 1\n"}
    body = rar5_of({"Class1/v_Class1_g01_c01.avi": b"x"})
    register(monkeypatch, "ucf101", archive(server, "v.rar", body), archive(server, "l.zip", zip_of(lists)))
    with pytest.raises(FetchError, match="not ucf101's official lists"):
        quick("ucf101", tmp_path)


def test_the_sources_are_complete() -> None:
    for name in ("ucf101", "hmdb51", "jhmdb"):
        source = SOURCES[name]
        assert source.name == name and source.terms and source.homepage.startswith("http")
        for item in (source.videos, source.splits):
            assert item.name.endswith((".rar", ".zip")) and item.size != 0
            assert all(url.startswith(("https://", "http://")) and url.endswith(item.name) for url in item.urls)
            assert item.sha256 is None or re.fullmatch("[0-9a-f]{64}", item.sha256)


def test_wrong_arguments_are_errors_before_any_request(ucf: Served, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="no such dataset; one of ucf101"):
        quick("ucf102", tmp_path / "out")
    with pytest.raises(FetchError, match="not an http or https URL"):
        quick("tiny-ucf", tmp_path / "out", mirrors=["file:///etc"])
    with pytest.raises(FetchError, match="no such folder"):
        quick("tiny-ucf", tmp_path / "out", have=tmp_path / "nowhere")
    assert not ucf.asked and not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_named(ucf: Served, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FetchError, match=r"file/out/archives: Not a directory"):
        quick("tiny-ucf", tmp_path / "file" / "out")


def test_one_fetch_at_a_time(ucf: Served, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".fetch.lock"), pytest.raises(FetchError, match="another fetch into this folder"):
        quick("tiny-ucf", tmp_path)
    assert not ucf.asked


# Downloads


def test_a_broken_download_goes_on_where_it_broke(ucf: Served, tmp_path: Path) -> None:
    ucf.files["lists.zip"], zipped = UCF_ZIP, len(UCF_ZIP)
    ucf.cuts = [zipped, 5000, 1000]
    waits: list[float] = []
    fetch("tiny-ucf", tmp_path, sleep=waits.append)
    assert ranges(ucf, "UCF101.rar") == ["", "bytes=5000-", "bytes=6000-"]
    assert [condition for path, _, condition in ucf.asked if path == "/UCF101.rar"] == ["", '"1"', '"1"']
    assert ucf.sent == [zipped, 5000, 1000, len(UCF_RAR) - 6000]
    assert waits == [1.0, 1.0]  # both attempts got further
    assert sorted(files_in(tmp_path / "archives")) == ["UCF101.rar", "lists.zip"]


def test_a_later_run_resumes(ucf: Served, tmp_path: Path) -> None:
    ucf.cuts = [len(UCF_ZIP), 4000]
    with pytest.raises(KeyboardInterrupt):
        fetch("tiny-ucf", tmp_path, sleep=lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
    assert (tmp_path / "archives" / "UCF101.rar.part").stat().st_size == 4000
    quick("tiny-ucf", tmp_path)
    assert ranges(ucf, "UCF101.rar") == ["", "bytes=4000-"] and ranges(ucf, "lists.zip") == [""]


def test_a_finished_part_is_not_asked_for_again(ucf: Served, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int | None) -> None:
        if what == "UCF101.rar: checking":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quick("tiny-ucf", tmp_path, progress=stop)
    quick("tiny-ucf", tmp_path)
    assert ranges(ucf, "UCF101.rar") == [""]


def test_a_server_without_ranges_starts_over(ucf: Served, tmp_path: Path) -> None:
    ucf.ignore_range, ucf.cuts = True, [len(UCF_ZIP), 5000]
    quick("tiny-ucf", tmp_path)
    assert ranges(ucf, "UCF101.rar") == ["", "bytes=5000-"]
    assert ucf.sent[1:] == [5000, len(UCF_RAR)]


@pytest.mark.parametrize("ignore_if_range", [False, True])
def test_a_file_that_changed_on_the_server_is_not_spliced(
    ignore_if_range: bool, server: Served, idle_tool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = rar5_of({name: data[::-1] for name, data in UCF_VIDEOS.items()})
    videos = archive(server, "v.rar", UCF_RAR, pinned=False)
    register(monkeypatch, "tiny", videos, archive(server, "lists.zip", UCF_ZIP))
    server.cuts, server.ignore_if_range = [len(UCF_ZIP), 5000], ignore_if_range

    def change(seconds: float) -> None:
        server.files["v.rar"], server.etag = new, '"2"'

    fetch("tiny", tmp_path, sleep=change)
    assert (tmp_path / "archives" / "v.rar").read_bytes() == new
    assert ranges(server, "v.rar")[:2] == ["", "bytes=5000-"]


def test_without_etag_date_or_sum_nothing_is_spliced(
    server: Served, idle_tool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.etag, server.dates = "", False
    videos = archive(server, "v.rar", UCF_RAR, pinned=False)
    register(monkeypatch, "tiny", videos, archive(server, "lists.zip", UCF_ZIP))
    server.cuts = [len(UCF_ZIP), 5000]
    quick("tiny", tmp_path)
    assert ranges(server, "v.rar") == ["", ""]


def test_a_known_sum_is_enough_to_resume(ucf: Served, tmp_path: Path) -> None:
    ucf.etag, ucf.dates, ucf.cuts = "", False, [len(UCF_ZIP), 5000]
    quick("tiny-ucf", tmp_path)
    assert ranges(ucf, "UCF101.rar") == ["", "bytes=5000-"]


def test_a_weak_etag_gives_way_to_the_date(ucf: Served, tmp_path: Path) -> None:
    ucf.etag, ucf.cuts = 'W/"1"', [len(UCF_ZIP), 5000]
    quick("tiny-ucf", tmp_path)
    assert ucf.asked[-1] == ("/UCF101.rar", "bytes=5000-", "Thu, 01 Jan 2026 00:00:00 GMT")


def test_a_part_longer_than_the_file_starts_over(ucf: Served, tmp_path: Path) -> None:
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / "UCF101.rar.part").write_bytes(bytes(len(UCF_RAR) + 7))
    quick("tiny-ucf", tmp_path)  # the server answers 416
    assert ranges(ucf, "UCF101.rar") == [f"bytes={len(UCF_RAR) + 7}-", ""]


def test_attempts_are_counted_while_nothing_comes(ucf: Served, tmp_path: Path) -> None:
    ucf.statuses = [503] * 99
    waits: list[float] = []
    with pytest.raises(FetchError, match=r"lists.zip: not downloaded .*HTTP 503 .*--mirror URL.*--have FOLDER"):
        fetch("tiny-ucf", tmp_path, sleep=waits.append)
    assert waits == [2.0, 4.0, 8.0, 16.0, 32.0] and len(ucf.asked) == 6


def test_a_server_that_is_not_there_is_retried_and_named(ucf: Served, tmp_path: Path) -> None:
    lists = Archive(name="lists.zip", urls=("http://127.0.0.1:9/lists.zip",))
    source = Source(name="tiny-ucf", videos=SOURCES["tiny-ucf"].videos, splits=lists, terms="", homepage="")
    SOURCES["tiny-ucf"] = source
    with pytest.raises(FetchError, match=r"http://127.0.0.1:9/lists.zip: .*refused, 6 times in a row"):
        quick("tiny-ucf", tmp_path)


AWAY = ["503", "408", "429", "cut", "refused"]
WRONG = ["404", "page", "sum", "url", "416"]


@pytest.mark.parametrize("first", AWAY + WRONG)
@pytest.mark.parametrize("second", ["503", "404"])
def test_what_may_pass_is_told_from_what_will_not(
    first: str, second: str, server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_module, "RETRIES", 1)
    wanted = Archive(name="a.zip", urls=(f"{server.url}/a.zip", f"{server.url}/b.zip"), sha256="0" * 64)
    urls = [f"{server.url}/a.zip", f"{server.url}/b.zip"]
    if first.isdigit():
        server.statuses = [int(first)] * (1 if first == "404" else 2)
    elif first in ("refused", "url"):
        urls[0] = "http://127.0.0.1:9/a.zip" if first == "refused" else "http://127.0.0.1:port/a.zip"
    else:
        server.files["a.zip"] = b"<html>" * 9 if first == "page" else UCF_ZIP
        server.cuts = [0] * 2 if first == "cut" else []
    waits: list[float] = []
    original = download_module._transfer

    def transfer(url: str, *rest: Any) -> None:
        if url == urls[1] and second == "503":
            server.statuses = [503]
        original(url, *rest)

    monkeypatch.setattr(download_module, "_transfer", transfer)
    with pytest.raises(FetchError, match=r"a.zip: not downloaded \(.*by hand") as caught:
        download_module.obtain(wanted, tmp_path, urls=urls, by_hand="by hand", sleep=waits.append)
    passes = first in AWAY or second == "503"
    assert type(caught.value) is (UnreachableError if passes else FetchError)
    assert len(waits) == (first in AWAY or first == "416") + (second == "503")


def test_the_next_url_is_tried_at_once_after_404(ucf: Served, tmp_path: Path) -> None:
    waits: list[float] = []
    fetch("tiny-ucf", tmp_path, mirrors=[f"{ucf.url}/mirror/"], sleep=waits.append)
    assert [path for path, _, _ in ucf.asked] == [
        "/mirror/lists.zip",
        "/lists.zip",
        "/mirror/UCF101.rar",
        "/UCF101.rar",
    ]
    assert waits == []


def test_a_mirror_goes_on_with_what_another_server_began(ucf: Served, tmp_path: Path) -> None:
    ucf.files["mirror/UCF101.rar"] = UCF_RAR
    ucf.cuts = [len(UCF_ZIP), 5000] + [0] * 6
    quick("tiny-ucf", tmp_path, mirrors=[f"{ucf.url}/mirror"])
    assert ranges(ucf, "mirror/UCF101.rar") == [""] + ["bytes=5000-"] * 6
    assert ranges(ucf, "UCF101.rar") == ["bytes=5000-"] and ucf.sent[-1] == len(UCF_RAR) - 5000


@pytest.mark.parametrize("pinned", [True, False])
def test_a_web_page_is_no_archive_and_leaves_the_part_alone(
    pinned: bool, server: Served, idle_tool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = archive(server, "v.rar", UCF_RAR, pinned=pinned)
    register(monkeypatch, "tiny", videos, archive(server, "lists.zip", UCF_ZIP))
    server.cuts = [len(UCF_ZIP), 5000]
    page = b"\n<!DOCTYPE html>" + bytes(len(UCF_RAR) - 16)

    def captive(seconds: float) -> None:
        server.files["v.rar"], server.etag = page, '"2"'

    with pytest.raises(FetchError, match="is a web page, not a RAR archive"):
        fetch("tiny", tmp_path, sleep=captive)
    assert (tmp_path / "archives" / "v.rar.part").read_bytes() == UCF_RAR[:5000]
    server.files["v.rar"], server.etag = UCF_RAR, '"1"'
    quick("tiny", tmp_path)
    assert ranges(server, "v.rar")[-1] == "bytes=5000-"


def test_a_wrong_sum_names_both_and_is_kept_aside(ucf: Served, tmp_path: Path) -> None:
    wrong = UCF_RAR[:-1] + b"!"
    ucf.files["UCF101.rar"] = wrong
    got, expected = hashlib.sha256(wrong).hexdigest(), hashlib.sha256(UCF_RAR).hexdigest()
    with pytest.raises(FetchError, match=f"has sha256 {got}, expected {expected}; kept as UCF101.rar.rejected"):
        quick("tiny-ucf", tmp_path)
    assert (tmp_path / "archives" / "UCF101.rar.rejected").read_bytes() == wrong
    assert ranges(ucf, "UCF101.rar") == [""]  # the same bytes again would not help
    ucf.files["UCF101.rar"] = UCF_RAR
    quick("tiny-ucf", tmp_path)
    assert sorted(files_in(tmp_path / "archives")) == ["UCF101.rar", "lists.zip"]


def test_a_wrong_size_is_refused_before_the_download(ucf: Served, tmp_path: Path) -> None:
    ucf.files["UCF101.rar"] = UCF_RAR + b"!"
    with pytest.raises(FetchError, match=f"has {len(UCF_RAR) + 1} bytes, expected {len(UCF_RAR)}"):
        quick("tiny-ucf", tmp_path)
    assert not (tmp_path / "archives" / "UCF101.rar.part").exists()


def test_a_bad_file_put_among_the_archives_is_set_aside(ucf: Served, tmp_path: Path) -> None:
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / "UCF101.rar").write_bytes(b"<html>Sorry</html>")
    with pytest.raises(FetchError, match=r"UCF101.rar: is a web page, not a RAR archive; moved to UCF101.rar.rejected"):
        quick("tiny-ucf", tmp_path)
    quick("tiny-ucf", tmp_path)


def test_a_bad_certificate_is_named_and_not_retried(
    ucf: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ssl
    from urllib.error import URLError

    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_message = "unable to get local issuer certificate"
    calls = []

    def urlopen(*args: Any, **options: Any) -> Any:
        calls.append(args)
        raise URLError(error)

    monkeypatch.setattr(download_module, "urlopen", urlopen)
    with pytest.raises(FetchError, match=r"certificate does not verify \(unable to get local issuer .*--have FOLDER"):
        quick("tiny-ucf", tmp_path)
    assert len(calls) == 1


def test_a_disk_too_small_is_named_before_the_download(
    ucf: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(download_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(FetchError, match=f"{len(UCF_ZIP)} bytes to come, 100 free; free some space"):
        quick("tiny-ucf", tmp_path)
    assert len(ucf.asked) == 1


# What the user has


def test_archives_of_the_users_are_read_where_they_are(ucf: Served, tmp_path: Path) -> None:
    have = tmp_path / "have"
    have.mkdir()
    (have / "UCF101.rar").write_bytes(UCF_RAR)
    (have / "lists.zip").write_bytes(UCF_ZIP)
    quick("tiny-ucf", tmp_path / "out", have=have, keep_archives=False)
    assert not ucf.asked and sorted(files_in(have)) == ["UCF101.rar", "lists.zip"]
    assert files_in(tmp_path / "out" / "videos") == dict(sorted(UCF_VIDEOS.items()))


@pytest.mark.parametrize("inside", ["", "UCF-101", "data/UCF-101"])
def test_folders_of_the_users_are_linked(inside: str, ucf: Served, tmp_path: Path) -> None:
    have = tmp_path / "have"
    for name, data in UCF_VIDEOS.items():
        path = have / inside / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (have / "ucfTrainTestlist").mkdir()
    for name, data in UCF_LISTS.items():
        (have / "ucfTrainTestlist" / name).write_bytes(data)
    dataset = quick("tiny-ucf", tmp_path / "out", have=have)
    assert not ucf.asked and len(dataset.videos) == 4
    assert (tmp_path / "out" / "videos").readlink() == have / inside
    assert quick("tiny-ucf", tmp_path / "out") == dataset


def test_only_what_the_user_has_not_is_downloaded(ucf: Served, tmp_path: Path) -> None:
    for name, data in UCF_VIDEOS.items():
        path = tmp_path / "have" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    quick("tiny-ucf", tmp_path / "out", have=tmp_path / "have")
    assert [path for path, _, _ in ucf.asked] == ["/lists.zip"]
    shutil.move(tmp_path / "have", tmp_path / "moved")
    quick("tiny-ucf", tmp_path / "out", have=tmp_path / "moved")  # over the dead link
    assert (tmp_path / "out" / "videos").readlink() == tmp_path / "moved"


def test_hmdb_beside_jhmdb_is_told_apart(server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("HMDB/kick/a.avi", "HMDB/kick_ball/b.avi", "HMDB/smile/c.avi", "JHMDB/kick/a.avi"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"x")
    roots = [fetch_module._videos_root(tmp_path, frozenset(names)) for names in (("kick", "kick_ball"), ("kick",))]
    assert roots == [tmp_path / "HMDB", tmp_path / "JHMDB"]


def test_a_bad_archive_of_the_users_is_left_alone(ucf: Served, tmp_path: Path) -> None:
    have = tmp_path / "have"
    have.mkdir()
    (have / "UCF101.rar").write_bytes(b"<html>404</html>")
    with pytest.raises(FetchError, match=r"have/UCF101.rar: is a web page"):
        quick("tiny-ucf", tmp_path / "out", have=have)
    assert files_in(have) == {"UCF101.rar": b"<html>404</html>"}


def test_a_useless_folder_is_an_error_not_a_download(ucf: Served, tmp_path: Path) -> None:
    flat = tmp_path / "flat" / "all"
    flat.mkdir(parents=True)
    with pytest.raises(FetchError, match=r"holds neither UCF101.rar nor lists.zip, nor class folders"):
        quick("tiny-ucf", tmp_path / "out", have=tmp_path / "flat")
    assert not ucf.asked
    (flat / "v_Archery_g01_c01.avi").write_bytes(b"x")
    with pytest.raises(FetchError, match="its videos are not in folders named like the classes"):
        quick("tiny-ucf", tmp_path / "out", have=tmp_path / "flat")
    assert ranges(ucf, "UCF101.rar") == []


# Unpacking


def unpack(tmp_path: Path, name: str, body: bytes) -> dict[str, bytes]:
    """What comes out; the folder around it shows what went past it."""
    path, folder = tmp_path / name, tmp_path / "inside" / "folder"
    path.write_bytes(body)
    folder.mkdir(parents=True)
    unpack_module.unpack(path, folder, lambda what, done, total: None)
    return files_in(folder)


def zip_member(name: str, mode: int, data: bytes = b"/etc/passwd") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as written:
        info = zipfile.ZipInfo(name)
        info.create_system, info.external_attr = 3, mode << 16
        written.writestr(info, data)
    return out.getvalue()


def encrypted_zip() -> bytes:
    body = bytearray(zip_of({"a": b"x"}))
    body[6] |= 1
    body[body.index(b"PK\x01\x02") + 8] |= 1
    return bytes(body)


def zip_bomb() -> bytes:
    return zip_of({"zeros": bytes(3 << 20)})


REDIRECTED = [vint(kind) + vint(0) + vint(len(b"/etc/passwd")) + b"/etc/passwd" for kind in (1, 2, 3, 4, 5)]
MALICIOUS = {
    **{
        f"{shape} in {kind.__name__}": (f"a.{suffix}", kind({"good": b"x", name: b"x"}), "points outside")
        for shape, name in {
            "parent": "../evil",
            "inner parent": "a/../../evil",
            "absolute": "/tmp/evil",
            "drive": "C:/evil",
        }.items()
        for kind, suffix in ((rar5_of, "rar"), (rar4_of, "rar"), (zip_of, "zip"))
    },
    "backslashes in rar5_of": ("a.rar", rar5_of({"..\\evil": b"x"}), "points outside"),
    "backslashes in rar4_of": ("a.rar", rar4_of({"..\\evil": b"x"}), "points outside"),
    "backslashes in zip_of": ("a.zip", zip_of({"..\\evil": b"x"}), "points outside"),
    **{
        f"link of kind {number} in rar5": ("a.rar", rar5(rar5_member("l", b"", extra=vint(5) + data)), "link")
        for number, data in enumerate(REDIRECTED, 1)
    },
    "link in rar4": ("a.rar", rar4_of({"l": b"/etc/passwd"}, mode=0o120777), "link"),
    "link in zip": ("a.zip", zip_member("l", stat.S_IFLNK | 0o777), "link"),
    "device in rar5": ("a.rar", rar5(rar5_member("d", b"", mode=stat.S_IFCHR | 0o666)), "device"),
    "device in rar4": ("a.rar", rar4_of({"d": b""}, mode=stat.S_IFCHR | 0o666), "device"),
    "device in zip": ("a.zip", zip_member("d", stat.S_IFCHR | 0o666), "device"),
    "encrypted rar5": (
        "a.rar",
        rar5(rar5_member("a", b"x" * 16, extra=vint(1) + vint(0) + vint(0) + bytes([15]) + bytes(32))),
        "encrypted",
    ),
    "encrypted headers in rar5": (
        "a.rar",
        b"Rar!\x1a\x07\x01\x00" + rar5_block(4, vint(0) + vint(0) + bytes([15]) + bytes(16)) + bytes(64),
        "encrypted",
    ),
    "encrypted rar4": ("a.rar", rar4_of({"a": b"x" * 16}, flags=4), "encrypted"),
    "encrypted zip": ("a.zip", encrypted_zip(), "encrypted"),
    "twice in rar5": ("a.rar", rar5(rar5_member("a", b"x"), rar5_member("a", b"y")), "twice"),
    "bomb": ("a.zip", zip_bomb(), "bytes unpack to 3145728"),
}


@pytest.mark.parametrize("case", MALICIOUS)
@pytest.mark.parametrize("tools", ["without tools", "with tools"])
def test_a_malicious_archive_is_refused_before_anything_is_written(
    case: str, tools: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, body, reason = MALICIOUS[case]
    monkeypatch.setattr(unpack_module, "MAX_EXTRA", 1 << 20)
    if tools == "without tools":
        monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match=rf"a\.(rar|zip): refused: .*{reason}.*not the official file"):
        unpack(tmp_path, name, body)
    assert files_in(tmp_path) == {name: body}


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("name", ["a.rar", "a.zip"])
def test_a_cut_archive_is_an_error(name: str, cut: float, tmp_path: Path, no_tools: Path) -> None:
    body = {"a.rar": UCF_RAR, "a.zip": UCF_ZIP}[name]
    with pytest.raises(FetchError, match=r"damaged or cut short"):
        unpack(tmp_path, name, body[: int(len(body) * cut)])


def test_a_flipped_bit_is_an_error_whatever_unpacks(tmp_path: Path) -> None:
    body = bytearray(rar5_of({"a": noise("a")}))
    body[500] ^= 1
    with pytest.raises(FetchError, match="damaged or cut short"):
        unpack(tmp_path, "a.rar", bytes(body))


def test_compressed_members_need_an_extractor(tmp_path: Path, no_tools: Path) -> None:
    with pytest.raises(FetchError, match=r"no RAR extractor on PATH; install one: `apt-get install unar`"):
        unpack(tmp_path, "a.rar", rar5(rar5_member("a", b"packed", method=3)))


def test_a_rar_that_nothing_here_unpacks_is_not_downloaded(ucf: Served, tmp_path: Path, no_tools: Path) -> None:
    (no_tools / "bsdtar").unlink()
    tool(no_tools, "unrar", "print('unrar-free 0.3.1')")
    tool(no_tools, "7zz", "print('7z Zip Lzma')")  # Debian's
    with pytest.raises(FetchError, match=r"UCF101.rar: no RAR extractor on PATH; install one: `apt-get install unar`"):
        quick("tiny-ucf", tmp_path / "out")
    assert [path for path, _, _ in ucf.asked] == ["/lists.zip"]
    for name, data in UCF_VIDEOS.items():
        path = tmp_path / "have" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert quick("tiny-ucf", tmp_path / "out", have=tmp_path / "have").missing == ()  # nothing to unpack
    (tmp_path / "out" / "videos").unlink()
    tool(no_tools, "7zz", "print('7z Rar Rar5 Zip') if argv == ['i'] else sys.exit(2)")
    assert quick("tiny-ucf", tmp_path / "out").missing == ()  # members that are stored, in the end


def test_a_rar_that_is_there_is_read_without_an_extractor(ucf: Served, tmp_path: Path, no_tools: Path) -> None:
    (no_tools / "bsdtar").unlink()
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / "UCF101.rar").write_bytes(UCF_RAR)
    assert quick("tiny-ucf", tmp_path).missing == ()
    assert [path for path, _, _ in ucf.asked] == ["/lists.zip"]


COMPRESSED = rar5(rar5_member("a", b"hello", method=3), rar5_member("b/c", b"world", method=3))
WRITE = """
folder = argv[argv.index("-o") + 1]
os.makedirs(folder + "/b")
open(folder + "/a", "w").write("hello")
open(folder + "/b/c", "w").write("world")
"""


def test_an_extractor_runs_once_and_the_next_follows_where_it_fails(tmp_path: Path, no_tools: Path) -> None:
    tool(no_tools, "unrar", f"print('unrar-free 0.3.1'); argv and open({str(tmp_path / 'ran')!r}, 'a')")
    tool(no_tools, "unar", WRITE + "open(folder + '/../../log', 'a').write('one run, ')")
    assert unpack(tmp_path, "a.rar", COMPRESSED) == {"a": b"hello", "b/c": b"world"}
    assert (tmp_path / "log").read_text() == "one run, "
    assert not (tmp_path / "ran").exists()


def test_unar_sees_one_volume_and_stops_at_inner_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("unar"):
        pytest.skip("unar is not installed")
    monkeypatch.setattr(unpack_module, "EXTRACTORS", {"unar": unpack_module.EXTRACTORS["unar"]})
    monkeypatch.setattr(unpack_module, "_copy_members", lambda *_: pytest.fail("unar did not unpack"))
    inner = rar5_of({"b": b"2"})
    (tmp_path / "a1.rar").write_bytes(rar5_of({"x": b"1"}))  # the first volume of a2.rar, by its name
    assert unpack(tmp_path, "a2.rar", rar5_of({"inner.rar": inner})) == {"inner.rar": inner}


def test_the_last_words_of_every_extractor_are_in_the_error(tmp_path: Path, no_tools: Path) -> None:
    tool(no_tools, "unrar", "print('UNRAR 7.00 (c) 1993-2024 Alexander Roshal'); sys.exit(3 if argv else 0)")
    tool(no_tools, "7z", "print('Rar5'); sys.exit(0 if argv == ['i'] else 'cannot open it')")
    with pytest.raises(FetchError, match=r"unrar: exit status 3, UNRAR 7.00 .* 7z: exit status 1, .*cannot open it"):
        unpack(tmp_path, "a.rar", COMPRESSED)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ("os.symlink('/etc/passwd', folder + '/l')", "'l', which is no plain file"),
        ("os.remove(folder + '/a'); os.symlink('/etc/passwd', folder + '/a')", "'a', which is no plain file"),
        ("os.link(folder + '/a', folder + '/l')", "which is no plain file"),
        ("os.symlink('/etc', folder + '/d')", "'d', which is no plain file"),
        ("open(folder + '/x', 'w')", "'x', which the archive does not list"),
        ("os.remove(folder + '/b/c')", "left out 1 files, such as 'b/c'"),
        ("open(folder + '/a', 'a').write('!')", "'a' with 6 of 5 bytes"),
        ("open(folder + '/a', 'w').write('HELLO')", "'a' with 5 of 5 bytes or a wrong sum"),
    ],
)
def test_what_an_extractor_wrote_is_not_trusted(extra: str, reason: str, tmp_path: Path, no_tools: Path) -> None:
    tool(no_tools, "unar", f"{WRITE}\n{extra}")
    with pytest.raises(FetchError, match=f"unar: .*{reason}"):
        unpack(tmp_path, "a.rar", COMPRESSED)
    assert files_in(tmp_path / "inside" / "folder") == {}


def test_an_extractor_that_hangs_is_killed(tmp_path: Path, no_tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack_module, "EXTRACT_TIMEOUT", 0.2)
    tool(no_tools, "unar", "assert sys.stdin.read() == ''; import time; time.sleep(60)")
    with pytest.raises(FetchError, match="unar: not done after 0 s"):
        unpack(tmp_path, "a.rar", COMPRESSED)


@pytest.mark.parametrize("calls", [1, 2, 3, 4])
def test_a_killed_unpack_starts_over(
    calls: int, hmdb: Served, tmp_path: Path, idle_tool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the lists, the outer archive, and each inner one are being unpacked; no cleaning up is done."""
    copy, left = unpack_module._copy_members, [calls]

    def killed(archive: Any, members: Any, folder: Path) -> None:
        left[0] -= 1
        copy(archive, members if left[0] else members[:1], folder)
        if left[0] == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(unpack_module, "_copy_members", killed)
        patched.setattr(fetch_module._Scratch, "__exit__", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            quick("tiny-hmdb", tmp_path / "out")
    assert list((tmp_path / "out").glob("*.tmp")) and not (tmp_path / "out" / "videos").exists()
    asked = len(hmdb.asked)
    assert quick("tiny-hmdb", tmp_path / "out").missing == ()
    assert len(hmdb.asked) - asked == (1 if calls == 1 else 0)  # archives that came are not asked for again
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == [
        "archives",
        "splits",
        "videos",
    ]


def test_another_datasets_folder_is_left_alone(ucf: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, "ucf101", SOURCES["tiny-ucf"].videos, SOURCES["tiny-ucf"].splits)
    for name in ("splits/kick_test_split1.txt", "videos/kick/a.avi"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"a.avi 1")
    before = files_in(tmp_path)
    with pytest.raises(FetchError, match="splits: is there already, but is not what belongs there"):
        quick("ucf101", tmp_path)
    assert files_in(tmp_path).items() >= before.items() and not ucf.asked


def test_the_archives_made_here_read_like_real_ones(tmp_path: Path) -> None:
    for body in (rar5_of({"a/b": b"1", "c": b"22"}), rar4_of({"a/b": b"1", "c": b"22"})):
        (tmp_path / "a.rar").write_bytes(body)
        with rarfile.RarFile(tmp_path / "a.rar", errors="strict") as opened:
            assert [(i.filename, i.file_size, opened.read(i)) for i in opened.infolist()] == [
                ("a/b", 1, b"1"),
                ("c", 2, b"22"),
            ]
