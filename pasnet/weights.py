"""State dicts in, state dicts out: reads public checkpoints safely, renames their keys, and merges strictly.

Never imports the models. ECO-pytorch drops every tensor whose name or shape differs and goes on with random values
there, which is behind many reports of low accuracy; here a merge fails unless each absent key was allowed by name.

`read` takes torch files, .caffemodel files and the safetensors files that `convert` writes, and brings names to the
public form of registry.py. Nothing in a file is executed: torch files are loaded with `weights_only`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import pickle
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pasnet.caffe import CaffeError, read_caffemodel
from pasnet.registry import KINDS, REGISTRY, Preprocessing, Source, recognise, source_of

StateDict = dict[str, Tensor]


class WeightsError(ValueError):
    """A checkpoint that cannot be used; the message names the file, the reason and the fix."""


# Files.


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a converted file says of the files that it was made from."""

    kind: str
    source: tuple[str, ...]  # file names, without folders
    source_sha256: tuple[str, ...]
    licence: str
    preprocessing: Preprocessing | None  # None: its sources differ
    tensors_sha256: str  # of names, types, shapes and values, so that a later change does not pass for a conversion


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The tensors of a weights file, under their public names."""

    path: Path
    format: str  # "torch", "caffe" or "safetensors"
    kind: str  # of KINDS
    tensors: StateDict
    licence: str
    preprocessing: Preprocessing | None
    origin: Origin | None = None  # of a converted file

    def problems(self) -> list[str]:
        """What keeps this from being a whole file of its kind, by name of tensor."""
        kind, names = KINDS[self.kind], set(self.tensors)
        found = [f"missing {name}" for name in sorted(kind.names - names)]
        known = kind.names | {name.replace("running_mean", "num_batches_tracked") for name in kind.names}
        return found + [f"unexpected {name}" for name in sorted(names - known) if not name.startswith(kind.ignored)]


def read(path: Path) -> Checkpoint:
    """The tensors of a public or a converted checkpoint, whatever it is.

    Accepts of torch's files a bare state dict or a container with `state_dict`; `module.`, `base_model.` and
    `modelX_Y.` prefixes; either name of ECO's head, returned as `fc_final.*`; batch norm vectors stored as [1, C].
    Of Caffe's, .caffemodel. Raises WeightsError for what is no such checkpoint, or not all of it; which tensors a
    whole one must have, `problems` of the result and `merge` say.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; `pasnet weights fetch` lists what there is and where")
    with open(path, "rb") as file:
        head = file.read(512)
    start = head.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    if not head:
        raise WeightsError(f"{path}: empty; download it again")
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        raise WeightsError(
            f"{path}: a saved web page, not a checkpoint; the download asked for a confirmation, so open the link in "
            f"a browser and confirm"
        )
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path}: a Git LFS pointer, not the file; fetch it with `git lfs pull`")
    raw: Mapping[str, Tensor]
    origin = None
    if path.suffix == ".safetensors" or (path.suffix != ".caffemodel" and head[8:9] == b"{"):
        form, (raw, origin) = "safetensors", _read_safetensors(path)
    elif path.suffix == ".caffemodel" or head[:1] in (b"\n", b"\x12"):  # a name, or V1 layers
        form, raw = "caffe", _read_caffe(path)
    else:
        form, raw = "torch", _read_torch(path)
    tensors: StateDict = {}
    for name, value in raw.items():
        public = _public_name(name, caffe=form == "caffe")
        if public in tensors:
            raise WeightsError(f"{path}: holds {public} under two names; it was put together from several files")
        row = value.ndim == 2 and value.shape[0] == 1 and "_bn." in public
        tensors[public] = value.squeeze(0) if row else value
    kind = recognise(tensors)
    if kind == "other-eco":
        raise WeightsError(
            f"{path}: another network (3D convolutions without bias, with res3a_1), such as kin_ECO_epoch-12; "
            f"take {REGISTRY['eco-lite-kinetics'].title}"
        )
    if not kind:
        known = ", ".join(dict.fromkeys(each.title for each in KINDS.values()))
        raise WeightsError(f"{path}: its {len(tensors)} tensors ({_some(list(tensors))}) are none of: {known}")
    broken = [name for name, value in tensors.items() if value.is_floating_point() and not _finite(value)]
    if broken:
        raise WeightsError(f"{path}: NaN or infinity in {_some(broken)}; it is damaged, get it again")
    source = source_of(kind, caffe=form == "caffe")
    return Checkpoint(
        path=path,
        format=form,
        kind=kind,
        tensors=tensors,
        licence=origin.licence if origin else source.licence if source else "",
        preprocessing=origin.preprocessing if origin else source.preprocessing if source else None,
        origin=origin,
    )


def _finite(value: Tensor) -> bool:
    """Whether all are numbers: the least and the largest show NaN and infinity, and need no tensor of truth values."""
    return not value.numel() or all(bool(edge.isfinite()) for edge in value.aminmax())


def read_checkpoint(path: Path, kind: str) -> StateDict:
    """The tensors of a checkpoint of a kind, under their public names. Raises WeightsError, also for another kind."""
    path = Path(path)
    if not path.is_file():
        source = source_of(kind) or REGISTRY["eco-lite-kinetics"]
        raise WeightsError(
            f"{path}: no such file; {source.title} ({source.licence}) is to be had from {' or '.join(source.where)}"
        )
    found = read(path)
    if found.kind != kind:
        raise WeightsError(f"{path}: is {KINDS[found.kind].title}, not {KINDS[kind].title}")
    return found.tensors


def _read_torch(path: Path) -> Mapping[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds; all mean that the file is not plain tensors
        if isinstance(error, pickle.UnpicklingError):  # not quoted: torch's own text advises to load it all the same
            asks = re.search(r"GLOBAL ([\w.]+)", str(error))
            reason = f"it wants {asks[1]} to be called" if asks else "it asks for more than that, or is damaged"
            raise WeightsError(
                f"{path}: refused, not readable as plain tensors: {reason}, and loading weights calls nothing; get the "
                f"file from its authors"
            ) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"{path}: not readable as plain tensors ({reason}); if it is cut short, download it again. A .pth.tar is a "
            f"torch file, do not unpack it"
        ) from error
    if isinstance(content, Mapping) and {"model", "config", "identity"} <= content.keys():
        raise WeightsError(f"{path}: a training of ours, not public weights; go on from it with --parent")
    tensors = content.get("state_dict", content) if isinstance(content, Mapping) else None
    named = isinstance(tensors, Mapping) and all(isinstance(name, str) for name in tensors)
    if not named or not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise WeightsError(f"{path}: holds no state dict")
    return tensors


def _read_caffe(path: Path) -> StateDict:
    try:
        return read_caffemodel(path)
    except CaffeError as error:
        raise WeightsError(f"{path}: not a whole .caffemodel ({error}); download it again") from error


@contextlib.contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    """An open file. Raises WeightsError for what is none."""
    from safetensors import SafetensorError, safe_open  # here: trainings from a random start do without

    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({error}); convert or download it again") from error


def _read_safetensors(path: Path) -> tuple[StateDict, Origin | None]:
    with _safetensors(path) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    origin = _origin(path, metadata)
    if origin and origin.tensors_sha256 != _digest(tensors):
        raise WeightsError(f"{path}: its tensors are not those that were converted; convert it again")
    return tensors, origin


def _origin(path: Path, metadata: Mapping[str, str]) -> Origin | None:
    """The record of `convert` in a safetensors file; None where there is none."""
    if "pasnet" not in metadata:
        return None
    try:
        values: dict[str, Any] = json.loads(metadata["pasnet"])
        frames = values.pop("preprocessing")
        values |= {name: tuple(values[name]) for name in ("source", "source_sha256")}
        if frames is not None:
            frames = Preprocessing(**{**frames, "subtract": tuple(frames["subtract"])})
        return Origin(**values, preprocessing=frames)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(
            f"{path}: its record of where it comes from is damaged ({error}); convert it again"
        ) from None


def _public_name(name: str, *, caffe: bool = False) -> str:
    name = re.sub(r"^(module\.)?(base_model\.)?", "", name)
    name = re.sub(r"^model\d(_\d)?\.", "", name)
    if caffe:  # names that were changed so that another network's layer is not loaded there
        name = re.sub(r"^fc8[uN]?\.", "fc_final.", re.sub(r"^res3a_2n\.", "res3a_2.", name))
    return re.sub(r"^new_fc\.", "fc_final.", name)


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# What a file is.


def sha256_of(path: Path) -> str:
    """Hex digest of a file; computed once for as long as its size and time stay the same."""
    state = Path(path).stat()
    return _hash_of(path, "sha256", state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _hash_of(path: Path, algorithm: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def matches(path: Path, source: Source) -> bool | None:
    """Whether a file is that public one, by its sum; None where no sum is known."""
    state = Path(path).stat()
    if source.sha256:
        return sha256_of(path) == source.sha256
    return _hash_of(path, "md5", state.st_size, state.st_mtime_ns) == source.md5 if source.md5 else None


def published(path: Path, kind: str) -> Source | None:
    """The public file of a kind that this one is, or was converted from; None if it is neither, or no sum is known."""
    path = Path(path)
    entries = [entry for entry in REGISTRY.values() if entry.kind == kind]
    if path.suffix == ".safetensors":
        with _safetensors(path) as file:
            origin = _origin(path, file.metadata() or {})
        if origin:
            known = {entry.sha256: entry for entry in entries if entry.sha256}
            return known.get(origin.source_sha256[0]) if len(origin.source_sha256) == 1 else None
    return next((entry for entry in entries if matches(path, entry)), None)


def is_published(path: Path, kind: str) -> bool:
    """Whether a file has the digest of a published one, or was converted from one that has."""
    return published(path, kind) is not None


def authenticity(path: Path, kind: str) -> str:
    """One line: whether a file is the published one, as far as its digest is known."""
    source = published(path, kind)
    if source:
        return f"{path}: the published {source.title}"
    entries = [entry for entry in REGISTRY.values() if entry.kind == kind]
    known = [entry for entry in entries if entry.sha256 or entry.md5]
    if not known:
        title = entries[0].title if entries else KINDS[kind].title
        return f"{path}: the digest of {title} is not known to us"
    return (
        f"{path}: NOT the published {known[0].title} (its sha256 differs); tensors fit, the values are your own matter"
    )


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a weights file is."""

    checkpoint: Checkpoint
    lines: tuple[str, ...]  # for people
    problems: tuple[str, ...]  # why it cannot be used; empty: it can


def inspect(path: Path) -> Inspection:
    """What a weights file is and whether it can be used. Raises WeightsError for what is none at all."""
    found = read(path)
    tensors, origin = found.tensors, found.origin
    counters = sum(name.endswith("num_batches_tracked") for name in tensors)
    learned = sum(value.numel() for name, value in tensors.items() if name.endswith((".weight", ".bias")))
    types = ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values()}))
    head = tensors.get("fc_final.weight")
    lines = [
        f"{found.path}: {KINDS[found.kind].title} (kind {found.kind}), a {found.format} file",
        f"entries        {len(tensors)}, {counters} of them counters of batch norm",
        f"parameters     {learned:,}",
        f"classes        {'no head' if head is None else len(head)}",
        f"types          {types}",
        f"sha256         {sha256_of(path)}",
        f"authenticity   {authenticity(path, found.kind).removeprefix(f'{path}: ')}",
        f"frames         {found.preprocessing or 'unknown, its sources differ'}",
        f"licence        {found.licence or 'unknown'}",
    ]
    if origin:
        pairs = zip(origin.source, origin.source_sha256, strict=True)
        lines += [f"converted from {name} (sha256 {digest})" for name, digest in pairs]
    return Inspection(checkpoint=found, lines=tuple(lines), problems=tuple(found.problems()))


# Conversion.


def convert(inputs: Sequence[Path], kind: str, out: Path) -> Origin:
    """Writes the tensors of a checkpoint, under their public names, into the safetensors file `out`.

    "eco-init" takes two inputs, a "bninception" and a "c3d", and makes of them what ECO-pytorch starts its Kinetics
    training from; every other kind takes one. The record of where they come from goes with them. The same input gives
    the same bytes. Raises WeightsError unless the input is a whole file of that kind.
    """
    out = Path(out)
    if kind not in KINDS:
        raise WeightsError(f"{kind!r}: no such kind; one of {', '.join(KINDS)}")
    if out.suffix != ".safetensors":
        raise WeightsError(f"{out}: converted weights are safetensors files; end the name in .safetensors")
    if out.exists() and any(Path(path).exists() and out.samefile(path) for path in inputs):
        raise WeightsError(f"{out}: is the input; give another name")
    parts = [read(path) for path in inputs]
    for part in parts:
        problems = part.problems()
        if problems:
            raise WeightsError(f"{part.path}: not all of {KINDS[part.kind].title}: {_some(problems)}")
    kinds = sorted(part.kind for part in parts)
    if kind == "eco-init" and kinds == ["bninception", "c3d"]:
        by_kind = {part.kind: part for part in parts}
        tensors = _used(by_kind["bninception"]) | _used(by_kind["c3d"])
    elif len(parts) == 1 and kinds == [kind]:
        tensors = parts[0].tensors
    else:
        given = " and ".join(f"{part.path} ({part.kind})" for part in parts)
        wanted = "a bninception and a c3d file" if kind == "eco-init" else f"one file of that kind, {KINDS[kind].title}"
        raise WeightsError(f"{given}: --kind {kind} wants {wanted}")
    frames = {part.preprocessing for part in parts}
    return write(
        out,
        tensors,
        kind=kind,
        source=tuple(name for part in parts for name in (part.origin.source if part.origin else (part.path.name,))),
        source_sha256=tuple(
            digest
            for part in parts
            for digest in (part.origin.source_sha256 if part.origin else (sha256_of(part.path),))
        ),
        licence="; ".join(dict.fromkeys(part.licence for part in parts)),
        preprocessing=frames.pop() if len(frames) == 1 else None,
    )


def write(
    out: Path,
    tensors: StateDict,
    *,
    kind: str,
    source: tuple[str, ...],
    source_sha256: tuple[str, ...],
    licence: str,
    preprocessing: Preprocessing | None,
) -> Origin:
    """Writes tensors under public names, and what they were made from, as the safetensors file `out`, whole or not at
    all. Equal arguments give equal bytes."""
    tensors = {name: tensors[name].contiguous() for name in sorted(tensors)}
    origin = Origin(
        kind=kind,
        source=source,
        source_sha256=source_sha256,
        licence=licence,
        preprocessing=preprocessing,
        tensors_sha256=_digest(tensors),
    )
    from safetensors.torch import save_file

    out.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f"{out.name}.", suffix=".tmp", dir=out.parent)
    os.close(handle)
    try:
        # One key: safetensors writes its metadata in an order that differs from process to process.
        save_file(tensors, name, {"pasnet": json.dumps(dataclasses.asdict(origin), sort_keys=True)})
        os.chmod(name, 0o644)
        os.replace(name, out)
    finally:
        Path(name).unlink(missing_ok=True)
    return origin


def _digest(tensors: StateDict) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


# Into the networks.


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a file gives the appearance and temporal networks and the head, under PAS-Net's names."""

    checkpoint: Checkpoint
    tensors: StateDict
    may_miss: tuple[str, ...]  # prefixes that a file of this kind has nothing for


def read_start(path: Path) -> Start:
    """A file to start ECO-Lite from: ECO-Lite itself, or of ECO-pytorch's initial weights either half or both.

    BN-Inception fills the appearance network, from conv1 to half of inception_3c; the 3D ResNet-18 fills the temporal
    one. Raises WeightsError for any other file, and for one that is not whole.
    """
    if not Path(path).is_file():
        read_checkpoint(path, "eco")  # which says where to get it
    found = read(path)
    if not KINDS[found.kind].lacks and found.kind != "eco":
        raise WeightsError(f"{path}: is {KINDS[found.kind].title}, which PAS-Net does not start from; give ECO-Lite")
    problems = found.problems()
    if problems:
        raise WeightsError(f"{path}: not all of {KINDS[found.kind].title}: {_some(problems)}")
    return Start(checkpoint=found, tensors=eco_to_pasnet(_used(found)), may_miss=KINDS[found.kind].lacks)


def _used(checkpoint: Checkpoint) -> StateDict:
    """Of initial weights only what ECO has a place for; of any other kind everything."""
    kind, tensors = KINDS[checkpoint.kind], checkpoint.tensors
    used = {
        name: value
        for name, value in tensors.items()
        if not kind.ignored or name.replace("num_batches_tracked", "running_mean") in kind.names
    }
    if checkpoint.kind == "c3d":  # its res3a_2 reads 128 channels, ECO's 96: ECO-pytorch keeps the first three quarters
        weight = used["res3a_2.weight"]
        used["res3a_2.weight"] = weight[:, : math.ceil(weight.shape[1] / 4) * 3]
    return used


def eco_to_pasnet(tensors: StateDict) -> StateDict:
    """ECO's public names -> PAS-Net's: 2D layers under `appearance.`, 3D under `temporal.`, head as `head.`

    ECO-Full has the same three parts under the same names.
    """

    def place(name: str) -> str:
        if name.startswith("fc_final."):
            return name.replace("fc_final.", "head.")
        return f"temporal.{name}" if name.startswith("res") else f"appearance.{name}"

    return {place(name): value for name, value in tensors.items()}


def pose_to_pasnet(tensors: StateDict) -> StateDict:
    """OpenPose's public names -> PAS-Net's: all of it under `pose.`"""
    return {f"pose.{name}": value for name, value in tensors.items()}


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What a merge did with every key of the model and of the checkpoint."""

    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]  # in the model, not in the checkpoint: left as they were
    unexpected: tuple[str, ...]  # in the checkpoint, not in the model: not used
    reshaped: tuple[str, ...]  # in both with different shapes: left as they were

    def summary(self) -> str:
        """One line for people."""
        left = len(self.missing) + len(self.reshaped)
        return (
            f"{self.source}: {len(self.loaded)} tensors loaded, {left} left as they were, {len(self.unexpected)} unused"
        )

    def details(self) -> str:
        """The summary and, by name, every key that was not loaded."""
        rest = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": self.reshaped}
        return "\n".join([self.summary(), *(f"  {name}: {', '.join(keys)}" for name, keys in rest.items() if keys)])


def merge(
    model: StateDict,
    incoming: StateDict,
    *,
    source: str,
    may_miss: Iterable[str] = (),
    may_ignore: Iterable[str] = (),
) -> LoadReport:
    """Copies `incoming` into the tensors of `model`, in place, and reports on every key.

    `may_miss` names prefixes of model keys that the checkpoint need not have, or may have in another shape;
    `may_ignore` prefixes of keys of the checkpoint that the model need not have. Batch norm's counters
    (`num_batches_tracked`, absent in files older than torch 0.4.1 and in Caffe's) never count as missing. Raises
    WeightsError, before anything is copied, for any other key that is missing, unexpected or of another shape.
    """
    allowed, ignored = tuple(may_miss), tuple(may_ignore)
    loaded = [key for key in model if key in incoming and model[key].shape == incoming[key].shape]
    reshaped = [key for key in model if key in incoming and model[key].shape != incoming[key].shape]
    missing = [key for key in model if key not in incoming and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in incoming if key not in model]
    faults = [f"missing {key}" for key in missing if not key.startswith(allowed)]
    faults += [f"unexpected {key}" for key in unexpected if not key.startswith(ignored)]
    faults += [
        f"{key} has shape {tuple(incoming[key].shape)}, the model wants {tuple(model[key].shape)}"
        for key in reshaped
        if not key.startswith(allowed)
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise WeightsError(f"{source} does not fit the model: {'; '.join(faults[:5])}{more}")
    with torch.no_grad():
        for key in loaded:
            model[key].copy_(incoming[key])
    return LoadReport(
        source=source,
        loaded=tuple(loaded),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        reshaped=tuple(reshaped),
    )
