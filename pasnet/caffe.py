"""The tensors of a .caffemodel, without Caffe: a reader of the few protobuf fields that hold them.

A .caffemodel is a NetParameter message of caffe.proto (BVLC Caffe, and the fork in ECO-efficient-video-understanding
that ECO was trained with). Of it only layers with blobs matter: name, type, bottom, top and blobs. Every length is
checked against the bytes that are there before anything is read, and nothing in the file is executed.

Blobs become tensors under PyTorch's names:

    convolution, inner product   weight, bias (where there is one)
    BN (ECO's and TSN's fork)    scale, shift, mean, variance        -> weight, bias, running_mean, running_var
    BatchNorm, then Scale        mean, variance, factor; scale, shift -> the same four, under BatchNorm's name
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types

# Field numbers of caffe.proto.
NET_LAYERS_V1, NET_LAYER = 2, 100
LAYER = {"name": 1, "type": 2, "bottom": 3, "top": 4, "blobs": 7}
LAYER_V1 = {"bottom": 2, "top": 3, "name": 4, "type": 5, "blobs": 6}
BLOB_LEGACY, BLOB_DATA, BLOB_SHAPE, BLOB_DOUBLE_DATA = (1, 2, 3, 4), 5, 7, 8
TYPES_V1 = {4: "Convolution", 14: "InnerProduct", 39: "Deconvolution"}  # V1's types are numbers; the ones with blobs

_MASK = (1 << 64) - 1


class CaffeError(ValueError):
    """Bytes that are no .caffemodel, or not all of it. The caller adds the name of the file."""


@dataclass(kw_only=True)
class Layer:
    """A layer that has blobs."""

    name: str = ""
    type: str = ""
    bottom: list[str] = field(default_factory=list)
    top: list[str] = field(default_factory=list)
    blobs: list[Array] = field(default_factory=list)


def read_caffemodel(path: Path) -> dict[str, Tensor]:
    """layer.weight, layer.bias ... -> float32 tensors. Raises CaffeError."""
    return tensors_of(read_layers(path.read_bytes()))


def read_layers(content: bytes) -> list[Layer]:
    """The layers with blobs, in the order of the file. Raises CaffeError."""
    layers = []
    for number, wire, value in _fields(memoryview(content), "the file"):
        if number in (NET_LAYER, NET_LAYERS_V1) and wire == BYTES:
            layer = _layer(value, LAYER if number == NET_LAYER else LAYER_V1)
            if layer.blobs:
                layers.append(layer)
    if not layers:
        raise CaffeError("holds no layer with weights")
    return layers


def tensors_of(layers: list[Layer]) -> dict[str, Tensor]:
    """Blobs of layers under PyTorch's names. Raises CaffeError for a layer that is not understood."""
    found: dict[str, Tensor] = {}
    norms: dict[str, str] = {}  # the blob that a BatchNorm writes -> its name: the Scale after it reads that blob

    def put(layer: str, **tensors: Array) -> None:
        for name, value in tensors.items():
            if f"{layer}.{name}" in found:
                raise CaffeError(f"layer {layer} is there twice")
            found[f"{layer}.{name}"] = torch.from_numpy(value.astype(np.float32))

    for layer in layers:
        name, blobs = layer.name, layer.blobs
        if layer.type == "BN" and len(blobs) == 4:
            scale, shift, mean, variance = (blob.reshape(-1) for blob in blobs)
            put(name, weight=scale, bias=shift, running_mean=mean, running_var=variance)
        elif layer.type == "BatchNorm" and len(blobs) == 3:
            mean, variance, factor = (blob.reshape(-1) for blob in blobs)
            if factor.size != 1 or not factor[0] > 0:
                raise CaffeError(f"layer {name}: its statistics have seen no batch (factor {factor.tolist()[:3]})")
            put(name, running_mean=mean / factor[0], running_var=variance / factor[0])
            put(name, weight=np.ones_like(mean), bias=np.zeros_like(mean))  # unless a Scale follows
            norms |= dict.fromkeys(layer.top or [name], name)
        elif layer.type == "Scale":
            norm = norms.pop(layer.bottom[0], None) if layer.bottom else None
            if norm is None or len(blobs) > 2:
                raise CaffeError(f"layer {name}: a Scale that follows no BatchNorm")
            del found[f"{norm}.weight"], found[f"{norm}.bias"]
            scale = blobs[0].reshape(-1)
            put(norm, weight=scale, bias=blobs[1].reshape(-1) if len(blobs) == 2 else np.zeros_like(scale))
        elif layer.type in ("Convolution", "InnerProduct") and len(blobs) <= 2:
            weight = blobs[0]
            if layer.type == "InnerProduct":  # legacy shapes have two ones in front
                weight = weight.reshape(weight.shape[-2:]) if math.prod(weight.shape[:-2]) == 1 else weight
            put(name, weight=weight)
            if len(blobs) == 2:
                put(name, bias=blobs[1].reshape(-1))
        else:
            raise CaffeError(f"layer {name}: type {layer.type or 'unknown'} with {len(blobs)} blobs is none of ours")
    return found


def _layer(content: memoryview, numbers: dict[str, int]) -> Layer:
    layer = Layer()
    blobs = []
    for number, wire, value in _fields(content, "a layer"):
        if number == numbers["blobs"] and wire == BYTES:
            blobs.append(value)
        elif number == numbers["type"]:
            layer.type = _text(value) if wire == BYTES else TYPES_V1.get(value, f"V1 {value}")
        elif wire == BYTES and number == numbers["name"]:
            layer.name = _text(value)
        elif wire == BYTES and number in (numbers["bottom"], numbers["top"]):
            (layer.bottom if number == numbers["bottom"] else layer.top).append(_text(value))
    layer.blobs = [_blob(blob, layer.name) for blob in blobs]
    return layer


def _blob(content: memoryview, layer: str) -> Array:
    """BlobProto -> array. `shape` where it is given, else the four legacy numbers."""
    legacy = [0, 0, 0, 0]
    shape: list[int] | None = None
    chunks: list[Array] = []
    for number, wire, value in _fields(content, f"a blob of layer {layer}"):
        if number in BLOB_LEGACY and wire == VARINT:
            legacy[number - 1] = value
        elif number == BLOB_SHAPE and wire == BYTES:
            shape = _dims(value, layer)
        elif number in (BLOB_DATA, BLOB_DOUBLE_DATA) and wire in (BYTES, FIXED32, FIXED64):
            dtype = "<f4" if number == BLOB_DATA else "<f8"
            if len(value) % np.dtype(dtype).itemsize:
                raise CaffeError(f"layer {layer}: a blob of {len(value)} bytes, which is no whole number of values")
            chunks.append(np.frombuffer(value, dtype))  # not packed: one value at a time; packed: many
    shape = legacy if shape is None else shape
    count = sum(chunk.size for chunk in chunks)
    if math.prod(shape) != count:
        raise CaffeError(f"layer {layer}: a blob of shape {tuple(shape)} with {count} values")
    return (np.concatenate(chunks) if chunks else np.zeros(0, "<f4")).reshape(shape)


def _dims(content: memoryview, layer: str) -> list[int]:
    dims: list[int] = []
    for number, wire, value in _fields(content, f"a shape in layer {layer}"):
        if number != 1:
            continue
        if wire == VARINT:
            dims.append(value)
        elif wire == BYTES:
            at = 0
            while at < len(value):
                dim, at = _varint(value, at, f"a shape in layer {layer}")
                dims.append(dim)
    if len(dims) > 8 or any(dim > 1 << 31 for dim in dims):
        raise CaffeError(f"layer {layer}: a blob of shape {tuple(dims[:9])}")
    return dims


def _fields(content: memoryview, what: str) -> Iterator[tuple[int, int, Any]]:
    """(field number, wire type, value) of a message: an int for VARINT, else a view of the bytes."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at, what)
        number, wire = key >> 3, key & 7
        if number == 0 or wire not in (VARINT, FIXED64, BYTES, FIXED32):
            raise CaffeError(f"no Caffe model: field {number} of wire type {wire} in {what}")
        if wire == VARINT:
            value, at = _varint(content, at, what)
            yield number, wire, value
            continue
        size = {FIXED64: 8, FIXED32: 4}.get(wire, 0)
        if wire == BYTES:
            size, at = _varint(content, at, what)
        if size > len(content) - at:
            raise CaffeError(f"cut short: {what} goes on for {size} bytes where {len(content) - at} are left")
        yield number, wire, content[at : at + size]
        at += size


def _varint(content: memoryview, at: int, what: str) -> tuple[int, int]:
    value = 0
    for index in range(10):
        if at + index >= len(content):
            raise CaffeError(f"cut short: {what} ends within a number")
        byte = content[at + index]
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value & _MASK, at + index + 1
    raise CaffeError(f"no Caffe model: a number of more than 10 bytes in {what}")


def _text(value: memoryview) -> str:
    try:
        return bytes(value).decode()
    except UnicodeDecodeError:
        raise CaffeError(f"no Caffe model: {bytes(value[:20])!r} as a name") from None
