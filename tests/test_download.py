"""Fetching public weights: a local server that breaks off, lies and has other files; files taken over by hand."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from test_caffe import caffemodel, public_tensors
from test_fetch import Served, ranges, server  # noqa: F401 - a fixture

from pasnet.cli import main
from pasnet.download import fetch
from pasnet.registry import REGISTRY, Source
from pasnet.weights import Inspection, WeightsError
from shards.unpack import FetchError

FILE = "body_pose_model.pth"
PAGE = b"<!DOCTYPE html><html>Google Drive - Virus scan warning</html>"


@pytest.fixture(scope="module")
def pose(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("pose") / FILE
    torch.save(public_tensors("pose"), path)
    return path.read_bytes()


@pytest.fixture
def source(server: Served, pose: bytes, monkeypatch: pytest.MonkeyPatch) -> Source:  # noqa: F811
    """The registry's "pose" on the local server, with its sum."""
    server.files = {FILE: pose, f"second/{FILE}": pose}
    return register(
        monkeypatch,
        urls=(f"{server.url}/{FILE}", f"{server.url}/second/{FILE}"),
        size=len(pose),
        sha256=hashlib.sha256(pose).hexdigest(),
    )


def register(monkeypatch: pytest.MonkeyPatch, name: str = "pose", **changes: object) -> Source:
    source = dataclasses.replace(REGISTRY[name], **changes)  # type: ignore[arg-type]
    monkeypatch.setitem(REGISTRY, name, source)
    return source


def quick(name: str, folder: Path, **options: object) -> Inspection:
    """fetch() that does not wait."""
    return fetch(name, folder, sleep=lambda seconds: None, **options)  # type: ignore[arg-type]


def test_a_download_is_kept_checked_and_not_repeated(
    server: Served,  # noqa: F811
    source: Source,
    tmp_path: Path,
    pose: bytes,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["weights", "fetch", "pose", "--out", str(tmp_path / "weights")]) == 0
    assert (tmp_path / "weights" / FILE).read_bytes() == pose
    assert "kind pose" in (said := capsys.readouterr().out) and "the published OpenPose body network" in said
    asked = len(server.asked)
    assert quick("pose", tmp_path / "weights").checkpoint.kind == "pose"
    assert len(server.asked) == asked == 1
    (tmp_path / "weights" / FILE).write_bytes(pose[:-1])
    with pytest.raises(WeightsError, match=r"not the published.*cut short.*move it elsewhere and run again"):
        quick("pose", tmp_path / "weights")


def test_what_broke_off_goes_on_where_it_was(server: Served, source: Source, tmp_path: Path, pose: bytes) -> None:  # noqa: F811
    server.cuts = [1000, 5000]
    assert quick("pose", tmp_path).problems == ()
    assert ranges(server, FILE) == ["", "bytes=1000-", "bytes=6000-"]
    assert (tmp_path / FILE).read_bytes() == pose and sorted(p.name for p in tmp_path.iterdir()) == [
        ".fetch.lock",
        FILE,
    ]


def test_the_next_server_is_asked_where_one_has_another_file(
    server: Served,  # noqa: F811
    source: Source,
    tmp_path: Path,
    pose: bytes,
) -> None:
    for other in (PAGE, pose[:-1] + b"!", pose[:-20], b""):
        folder = tmp_path / str(len(other))
        server.files[FILE] = other
        assert quick("pose", folder).checkpoint.kind == "pose"
        assert (folder / FILE).read_bytes() == pose
        server.files[f"second/{FILE}"] = other
        with pytest.raises(FetchError, match=f"not downloaded.*second.*{FILE}:.*in a browser.*fetch pose --have FILE"):
            quick("pose", folder / "again")
        assert not (folder / "again" / FILE).exists()
        server.files[f"second/{FILE}"] = pose


def test_why_a_server_was_refused_is_said(server: Served, source: Source, tmp_path: Path, pose: bytes) -> None:  # noqa: F811
    server.files = {FILE: PAGE.ljust(len(pose)), f"second/{FILE}": pose[:-1] + b"!"}
    with pytest.raises(FetchError, match=r"is a web page; .*has sha256 \w+, expected \w+; kept as"):
        quick("pose", tmp_path)


def test_without_a_sum_a_download_is_known_by_its_tensors(
    server: Served,  # noqa: F811
    source: Source,
    tmp_path: Path,
    pose: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    register(monkeypatch, size=None, sha256="")
    assert quick("pose", tmp_path / "good").checkpoint.kind == "pose"
    other = tmp_path / "other"
    torch.save(public_tensors("eco"), other)
    short = tmp_path / "short"
    torch.save({k: v for k, v in public_tensors("pose").items() if k != "conv1_1.bias"}, short)
    cases = [
        (other.read_bytes(), "is ECO-Lite, not OpenPose body"),
        (short.read_bytes(), "not all of OpenPose.*missing conv1_1.bias"),
        (pose[:-5000], "not readable as plain tensors"),
    ]
    for index, (content, message) in enumerate(cases):
        server.files[FILE] = content
        folder = tmp_path / str(index)
        with pytest.raises(WeightsError, match=message):
            quick("pose", folder)
        assert not (folder / FILE).exists() and (folder / f"{FILE}.rejected").read_bytes() == content


def test_a_caffe_file_is_known_by_its_md5(
    server: Served,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = caffemodel(public_tensors("pose"))
    source = register(
        monkeypatch,
        "pose-caffe",
        urls=(f"{server.url}/x.caffemodel",),
        md5=hashlib.md5(content).hexdigest(),
    )
    server.files["x.caffemodel"] = content
    assert "the published" in "\n".join(quick("pose-caffe", tmp_path / "good").lines)
    changed = bytearray(content)
    changed[-2] ^= 1
    server.files["x.caffemodel"] = bytes(changed)
    with pytest.raises(WeightsError, match=f"not the published.*expected md5 {source.md5}.*with other values.*kept as"):
        quick("pose-caffe", tmp_path / "changed")
    assert not (tmp_path / "changed" / source.file).exists()


def test_a_mirror_comes_first_also_as_a_folder(server: Served, source: Source, tmp_path: Path, pose: bytes) -> None:  # noqa: F811
    quick("pose", tmp_path / "a", mirrors=[f"{server.url}/second/"])
    assert [path for path, _, _ in server.asked] == [f"/second/{FILE}"]
    folder = tmp_path / "my mirror"
    folder.mkdir()
    (folder / FILE).write_bytes(pose)
    assert quick("pose", tmp_path / "b", mirrors=[folder.as_uri()]).checkpoint.path == tmp_path / "b" / FILE
    assert len(server.asked) == 1
    with pytest.raises(WeightsError, match="not an http, https or file URL"):
        quick("pose", tmp_path / "c", mirrors=["ftp://x"])


def test_drive_is_asked_for_the_file_itself(
    server: Served,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    known = REGISTRY["eco-lite-kinetics"]
    [url] = known.urls
    host, path = "https://drive.usercontent.google.com", url.removeprefix("https://drive.usercontent.google.com")
    assert url.startswith(host) and known.by_hand[0].split("/")[-2] in path
    register(monkeypatch, "eco-lite-kinetics", urls=(server.url + path,))
    server.files[path[1:]] = PAGE  # gone, or fetched too often
    by_hand = r"is a web page.*drive\.google\.com/file/.*fetch eco-lite-kinetics --have FILE"
    with pytest.raises(FetchError, match=by_hand):
        quick("eco-lite-kinetics", tmp_path)
    torch.save({"state_dict": public_tensors("eco")}, tmp_path / "eco")
    server.files[path[1:]] = (tmp_path / "eco").read_bytes()
    assert quick("eco-lite-kinetics", tmp_path).checkpoint.path == tmp_path / known.file


def test_links_that_want_a_browser_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError, match=r"without a browser.*github\.com/mzolf.*fetch eco-full-kinetics-caffe --have FILE"
    ):
        quick("eco-full-kinetics-caffe", tmp_path)
    with pytest.raises(WeightsError, match=r"no such weights; one of eco-lite-kinetics,"):
        quick("eco", tmp_path)


def test_a_file_downloaded_by_hand_is_checked_and_copied(source: Source, tmp_path: Path, pose: bytes) -> None:
    have, folder = tmp_path / "Downloads (1).pth", tmp_path / "weights"
    have.write_bytes(pose)
    assert quick("pose", folder, have=have).checkpoint.path == folder / FILE
    assert (folder / FILE).read_bytes() == pose and have.exists()
    assert quick("pose", folder, have=folder / FILE).problems == ()  # already where it belongs
    cases = [(PAGE, "a saved web page"), (pose[:-1], "cut short"), (pose[:-1] + b"!", "not the published")]
    for content, message in cases:
        have.write_bytes(content)
        with pytest.raises(WeightsError, match=message):
            quick("pose", folder, have=have)
    assert (folder / FILE).read_bytes() == pose
    with pytest.raises(WeightsError, match="no such file; --have takes the file that you downloaded"):
        quick("pose", folder, have=tmp_path / "none")
    eco = tmp_path / "eco.pth.tar"
    torch.save({"state_dict": public_tensors("eco")}, eco)
    assert quick("eco-lite-kinetics", folder, have=eco).checkpoint.kind == "eco"
    with pytest.raises(WeightsError, match="is ECO-Lite, not ECO-Full"):
        quick("eco-full-kinetics", folder, have=eco)


def test_one_fetch_at_a_time(source: Source, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".fetch.lock"), pytest.raises(WeightsError, match="another fetch into this folder"):
        quick("pose", tmp_path)
