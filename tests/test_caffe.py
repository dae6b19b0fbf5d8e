"""Caffe's files, made by hand: both layouts of layers, both of blobs, both of batch norm, and what is no such file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from pasnet.caffe import CaffeError, read_caffemodel, read_layers, tensors_of
from pasnet.registry import KINDS
from pasnet.weights import WeightsError, convert, inspect, read

# An encoder of protobuf's wire format, for what a NetParameter needs.


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def chunk(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def blob(
    values: np.ndarray, *, legacy: bool = False, packed: bool = True, double: bool = False, shape: bool = True
) -> bytes:
    flat = values.astype("<f8" if double else "<f4").reshape(-1)
    out = b""
    if legacy:
        dims = (1,) * (4 - values.ndim) + values.shape
        out += b"".join(number(index + 1, dim) for index, dim in enumerate(dims))
    elif shape:
        out += chunk(7, chunk(1, b"".join(map(varint, values.shape))))
    field = 8 if double else 5
    if packed:
        return out + chunk(field, flat.tobytes())
    return out + b"".join(varint(field << 3 | (1 if double else 5)) + value.tobytes() for value in flat)


def layer(name: str, kind: str, blobs: Iterable[bytes], *, bottom: str = "in", top: str = "") -> bytes:
    content = chunk(1, name.encode()) + chunk(2, kind.encode()) + chunk(3, bottom.encode())
    content += chunk(4, (top or name).encode()) + number(10, 1) + b"".join(chunk(7, each) for each in blobs)
    return chunk(100, content)


def layer_v1(name: str, kind: int, blobs: Iterable[bytes]) -> bytes:
    content = chunk(2, b"in") + chunk(3, name.encode()) + chunk(4, name.encode()) + number(5, kind)
    return chunk(2, content + b"".join(chunk(6, each) for each in blobs))


NAME = chunk(1, b"net")


def net(*layers: bytes) -> bytes:
    return NAME + b"".join(layers)


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def public_tensors(kind: str, classes: int = 5) -> dict[str, torch.Tensor]:
    """All names of a kind with small tensors that are told apart by their values; ranks as in the real ones."""
    found = {}
    for index, name in enumerate(sorted(KINDS[kind].names)):
        layer = name.rpartition(".")[0]
        shape: tuple[int, ...] = (3,)
        if name.endswith(".weight") and not layer.endswith("_bn"):
            shape = (3, 4, 1, 2, 2) if layer.startswith("res") else (3, 4, 2, 2)
        if layer == "fc_final":
            shape = (classes, 4) if name.endswith("weight") else (classes,)
        value = torch.from_numpy(values(*shape, seed=index))
        found[name] = value.abs() + 1 if name.endswith("running_var") else value
    return found


def caffemodel(tensors: dict[str, torch.Tensor], *, head: str = "fc8u", legacy: bool = False) -> bytes:
    """As ECO's authors and OpenPose's saved theirs: BN of the fork with [1, C] blobs, `res3a_2n`, `fc8u` or `fc8N`."""
    out = NAME + chunk(100, chunk(1, b"data") + chunk(2, b"VideoData"))  # a layer without blobs
    for name in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
        of = {key.rpartition(".")[2]: value.numpy() for key, value in tensors.items() if key.startswith(f"{name}.")}
        theirs = {"res3a_2": "res3a_2n", "fc_final": head}.get(name, name)
        if "running_mean" in of:
            four = (of[key][None] for key in ("weight", "bias", "running_mean", "running_var"))
            out += layer(theirs, "BN", [blob(value, legacy=legacy) for value in four])
        else:
            fits = legacy and of["weight"].ndim < 5
            kind = "InnerProduct" if name == "fc_final" else "Convolution"
            out += layer(theirs, kind, [blob(of["weight"], legacy=fits), blob(of["bias"], legacy=legacy)])
    return out


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(("kind", "head"), [("eco", "fc8u"), ("eco", "fc8"), ("eco-full", "fc8N"), ("pose", "")])
def test_a_whole_network_comes_back_under_its_public_names(tmp_path: Path, kind: str, head: str, legacy: bool) -> None:
    tensors = public_tensors(kind)
    path = tmp_path / "net.caffemodel"
    path.write_bytes(caffemodel(tensors, head=head, legacy=legacy))
    found = read(path)
    assert (found.format, found.kind, found.problems()) == ("caffe", kind, [])
    assert same(found.tensors, tensors)
    mean = {"pose": (0.5, 0.5, 0.5)}.get(kind, (104.0, 117.0, 123.0))  # Caffe's ECO: 123, where PyTorch's has 128
    assert found.preprocessing is not None and found.preprocessing.subtract == mean
    convert([path], kind, tmp_path / "net.safetensors")
    again = read(tmp_path / "net.safetensors")
    assert same(again.tensors, tensors) and again.preprocessing == found.preprocessing
    path.rename(tmp_path / "renamed")  # told by its first bytes too
    assert read(tmp_path / "renamed").format == "caffe"


def test_blobs_in_every_layout(tmp_path: Path) -> None:
    weight, bias = values(2, 3, 1, 2), values(2)
    written = {
        "shape": [blob(weight), blob(bias)],
        "legacy": [blob(weight, legacy=True), blob(bias, legacy=True)],
        "unpacked": [blob(weight, packed=False), blob(bias, packed=False)],
        "double": [blob(weight, double=True), blob(bias, double=True)],
        "with_diff": [blob(weight) + chunk(6, b"\0" * 48), blob(bias)],
    }
    path = tmp_path / "x.caffemodel"
    path.write_bytes(net(*(layer(name, "Convolution", blobs) for name, blobs in written.items())))
    found = read_caffemodel(path)
    for name in written:
        assert np.array_equal(found[f"{name}.weight"].numpy(), weight), name
        assert np.array_equal(found[f"{name}.bias"].numpy(), bias), name
        assert found[f"{name}.weight"].dtype == torch.float32
    assert len(found) == 2 * len(written)


def test_layers_of_the_old_layout() -> None:
    conv, fc = values(2, 3, 2, 2), values(4, 5)
    content = net(
        layer_v1("conv", 4, [blob(conv, legacy=True), blob(values(2), legacy=True)]),
        layer_v1("fc", 14, [blob(fc, legacy=True), blob(values(4), legacy=True)]),
    )
    found = tensors_of(read_layers(content))
    assert np.array_equal(found["conv.weight"].numpy(), conv)
    assert np.array_equal(found["fc.weight"].numpy(), fc)  # legacy (1, 1, 4, 5)
    assert found["conv.bias"].shape == (2,) and found["fc.bias"].shape == (4,)


def test_both_batch_norms_give_the_same_network() -> None:
    scale, shift, mean = values(3), values(3, seed=1), values(3, seed=2)
    variance, x = np.abs(values(3, seed=3)) + 1, torch.from_numpy(values(2, 3, 4, seed=4))
    fork = net(layer("x_bn", "BN", [blob(v[None]) for v in (scale, shift, mean, variance)]))
    factor = np.float32(7.5)
    two = net(
        layer("x_bn", "BatchNorm", [blob(v) for v in (mean * factor, variance * factor, np.array([factor]))], top="x"),
        layer("x_scale", "Scale", [blob(scale), blob(shift)], bottom="x", top="x"),
    )
    outputs = []
    for content in (fork, two):
        norm = torch.nn.BatchNorm1d(3).eval()
        norm.load_state_dict({key.removeprefix("x_bn."): v for key, v in tensors_of(read_layers(content)).items()})
        outputs.append(norm(x))
    expected = (x.numpy() - mean[:, None]) / np.sqrt(variance + 1e-5)[:, None] * scale[:, None] + shift[:, None]
    for output in outputs:
        assert np.allclose(output.detach().numpy(), expected, atol=1e-5)


def test_batch_norm_alone_scales_by_one() -> None:
    content = net(layer("x_bn", "BatchNorm", [blob(values(3)), blob(np.ones(3)), blob(np.array([1.0]))]))
    found = tensors_of(read_layers(content))
    assert found["x_bn.weight"].tolist() == [1, 1, 1] and found["x_bn.bias"].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([layer("a", "PReLU", [blob(values(3))])], "layer a: type PReLU with 1 blobs is none of ours"),
        ([layer("a", "Scale", [blob(values(3))])], "layer a: a Scale that follows no BatchNorm"),
        ([layer("a", "BN", [blob(values(3))] * 3)], "layer a: type BN with 3 blobs"),
        ([layer("a", "Convolution", [blob(values(3))])] * 2, "layer a is there twice"),
        ([layer("a", "Convolution", [chunk(7, chunk(1, varint(4))) + chunk(5, bytes(12))])], r"shape \(4,\) with 3"),
        ([layer("a", "Convolution", [chunk(5, bytes(12))])], r"shape \(0, 0, 0, 0\) with 3 values"),
        ([layer("a", "Convolution", [chunk(5, bytes(13))])], "13 bytes, which is no whole number"),
        ([layer("a", "Convolution", [chunk(7, chunk(1, varint(1 << 40))) + chunk(5, bytes(4))])], "blob of shape"),
        ([layer("a", "BatchNorm", [blob(values(3))] * 2 + [blob(np.zeros(1))])], "have seen no batch"),
        ([layer("a", "ReLU", [])], "holds no layer with weights"),
        ([b"\x0b"], "field 1 of wire type 3"),
        ([b"\xff" * 11], "a number of more than 10 bytes"),
        ([chunk(100, chunk(1, b"\xff\xfe") + chunk(7, blob(values(1))))], "as a name"),
    ],
)
def test_what_is_not_understood_is_refused(layers: list[bytes], message: str) -> None:
    with pytest.raises(CaffeError, match=message):
        tensors_of(read_layers(net(*layers)))


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """Within a field the reader says so; between two layers the bytes are a smaller network, and names are missing."""
    whole = caffemodel(public_tensors("pose"))
    path = tmp_path / "cut.caffemodel"
    ends, at = [0], 0
    while at < len(whole):  # fields of the net: a key of one or two bytes, a length, content
        length, start = 0, at + 1 + (whole[at] > 127)
        for shift in range(0, 35, 7):
            length |= (whole[start] & 127) << shift
            start += 1
            if whole[start - 1] < 128:
                break
        at = start + length
        ends.append(at)
    assert ends[-1] == len(whole) and len(ends) == 1 + 92 + 2
    for cut in sorted({*range(0, 400), *range(0, len(whole), 97), *ends[:-1], *(end - 1 for end in ends[1:])}):
        path.write_bytes(whole[:cut])
        if cut not in ends:
            with pytest.raises(WeightsError, match=f"{path}: not a whole .caffemodel .cut short.*download it again"):
                inspect(path)
        elif cut <= ends[2]:
            with pytest.raises(WeightsError, match="empty" if not cut else "holds no layer with weights"):
                inspect(path)
        else:
            try:
                problems = inspect(path).problems
            except WeightsError as error:
                assert "are none of" in str(error)  # too few layers to tell which network it was
            else:
                assert problems and all(each.startswith("missing ") for each in problems)
    path.write_bytes(whole)
    assert not inspect(path).problems


def test_random_bytes_never_do_more_than_fail() -> None:
    random = np.random.default_rng(0)
    whole = bytearray(net(*(layer(f"l{i}", "Convolution", [blob(values(2, 2)), blob(values(2))]) for i in range(3))))
    for _ in range(2000):
        content = bytearray(whole)
        for at in random.integers(0, len(content), 3):
            content[at] = random.integers(0, 256)
        try:
            found = tensors_of(read_layers(bytes(content)))
        except CaffeError:
            continue
        assert sum(value.numel() for value in found.values()) <= len(whole)
