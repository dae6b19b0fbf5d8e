"""The public weights as data: which files there are and where, which names make which network, what frames they expect.

Names are the public ones: ECO-pytorch's and Caffe's own, without `module.` and `base_model.`, the head as `fc_final`.
Addresses: the README files and download scripts of mzolfaghari's ECO-pytorch and ECO-efficient-video-understanding
(Caffe), Hzzone/pytorch-openpose and CMU-Perceptual-Computing-Lab/openpose. Sums are given where they were published.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The frames that weights were trained on: 0..255, channels in this order, value / divide_by - subtract."""

    channels: str = "BGR"
    divide_by: float = 1.0
    subtract: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __str__(self) -> str:
        divided = "" if self.divide_by == 1 else f" / {self.divide_by:g}"
        return f"{self.channels} 0..255{divided}, minus ({', '.join(f'{value:g}' for value in self.subtract)})"


ECO_TORCH = Preprocessing(subtract=(104.0, 117.0, 128.0))
ECO_CAFFE = Preprocessing(subtract=(104.0, 117.0, 123.0))  # the last mean differs between the two ports of ECO
OPENPOSE = Preprocessing(divide_by=256.0, subtract=(0.5, 0.5, 0.5))


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A network that public weights come in, told by the names of its tensors."""

    title: str
    names: frozenset[str]  # what a file must hold; batch norm's counters need not be there
    ignored: tuple[str, ...] = ()  # prefixes of what it may hold besides, which nothing here reads
    lacks: tuple[str, ...] = ()  # prefixes of ECO-Lite within PAS-Net that it has nothing for


def _conv_bn(layers: Iterable[str], *, bn: bool = True) -> list[str]:
    names = []
    for layer in layers:
        names += [f"{layer}.weight", f"{layer}.bias"]
        names += _norm(f"{layer}_bn") if bn else []
    return names


def _norm(layer: str) -> list[str]:
    return [f"{layer}.{name}" for name in ("weight", "bias", "running_mean", "running_var")]


_BLOCK = ("1x1", "3x3_reduce", "3x3", "double_3x3_reduce", "double_3x3_1", "double_3x3_2", "pool_proj")


def _blocks(*blocks: str, layers: Iterable[str] = _BLOCK) -> list[str]:
    return [f"inception_{block}_{layer}" for block in blocks for layer in layers]


_FRONT = ["conv1_7x7_s2", "conv2_3x3_reduce", "conv2_3x3"]
_TRUNK = _conv_bn([*_FRONT, *_blocks("3a", "3b"), *_blocks("3c", layers=("double_3x3_reduce", "double_3x3_1"))])
_SIDE = _conv_bn(  # what ECO-Full has beyond ECO-Lite: the rest of BN-Inception; 3c and 4e have no 1x1 and no pool_proj
    _blocks("3c", layers=("3x3_reduce", "3x3", "double_3x3_2"))
    + _blocks("4a", "4b", "4c", "4d")
    + _blocks("4e", layers=_BLOCK[1:-1])
    + _blocks("5a", "5b")
)
_DOWN = [f"res{stage}a_{layer}" for stage in (4, 5) for layer in ("1", "2", "down")]
_TEMPORAL = _conv_bn(["res3a_2", *_DOWN, *(f"res{s}b_{n}" for s in (3, 4, 5) for n in (1, 2))], bn=False)
_TEMPORAL += [name for s in (3, 4, 5) for norm in ("a", "b_1", "b") for name in _norm(f"res{s}{norm}_bn")]
_TEMPORAL += [*_norm("res4a_1_bn"), *_norm("res5a_1_bn")]
_HEAD = ["fc_final.weight", "fc_final.bias"]
_POSE = [f"conv{n}_{i}" for n, count in ((1, 2), (2, 2), (3, 4), (4, 2)) for i in range(1, count + 1)]
_POSE += ["conv4_3_CPM", "conv4_4_CPM", *(f"conv5_{i}_CPM_{branch}" for i in range(1, 6) for branch in ("L1", "L2"))]
_POSE += [f"Mconv{i}_stage{s}_{branch}" for s in range(2, 7) for i in range(1, 8) for branch in ("L1", "L2")]

KINDS: dict[str, Kind] = {
    "eco": Kind(title="ECO-Lite", names=frozenset(_TRUNK + _TEMPORAL + _HEAD)),
    "eco-init": Kind(
        title="ECO-Lite without a head", names=frozenset(_TRUNK + _TEMPORAL), lacks=("head.",)
    ),  # what `convert` makes of the two that follow
    "bninception": Kind(
        title="BN-Inception, the initial weights of ECO's 2D network",
        names=frozenset(_TRUNK),
        ignored=("inception_3c_", "inception_4", "inception_5", "fc", "last_linear."),
        lacks=("temporal.", "head."),
    ),
    "c3d": Kind(
        title="3D ResNet-18, the initial weights of ECO's 3D network",
        names=frozenset(_TEMPORAL),
        ignored=("conv1", "res2", "res3a_1", "res3a_down", "fc"),
        lacks=("appearance.", "head."),
    ),
    "eco-full": Kind(title="ECO-Full", names=frozenset(_TRUNK + _SIDE + _TEMPORAL + _HEAD)),
    "pose": Kind(title="OpenPose body network, COCO", names=frozenset(_conv_bn(_POSE, bn=False))),
}


def recognise(names: Collection[str]) -> str:
    """The kind that has these public names, "other-eco" for the network that is often taken for ECO, or "". Goes by a
    few layers that only one network has, so that an incomplete file is still called what it is."""
    if "res3a_2.weight" in names or "res3a_2.bias" in names:
        if "res2a_1.weight" in names:
            return "c3d"
        if "res3a_1.weight" in names:
            return "other-eco"
        if any(name.startswith(("inception_4", "inception_5")) for name in names):
            return "eco-full"
        return "eco" if "fc_final.weight" in names else "eco-init"
    if "conv1_7x7_s2.weight" in names:
        return "bninception"
    return "pose" if "Mconv7_stage6_L2.weight" in names or "conv4_4_CPM.weight" in names else ""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A public file: where it comes from, how to know that it is the right one, and what belongs to it."""

    title: str
    kind: str  # of KINDS
    file: str  # its name; a .caffemodel is Caffe's, anything else is torch's
    urls: tuple[str, ...] = ()  # in order of preference
    by_hand: tuple[str, ...] = ()  # links that want a browser
    licence: str
    preprocessing: Preprocessing
    size: int | None = None  # bytes; None: not known
    sha256: str = ""  # empty: not known
    md5: str = ""

    @property
    def where(self) -> tuple[str, ...]:
        """All addresses, those first that need no browser."""
        return self.urls + self.by_hand


_BAIDU = "https://pan.baidu.com/s/1Hx52akJLR_ISfX406bkIog"
_ECO_TERMS = "BSD-2 (ECO-pytorch); research use"
_CAFFE_TERMS = "MIT file in ECO-efficient-video-understanding; its README says research use"
_POSE_TERMS = "academic, non-commercial (OpenPose)"


def _drive(identity: str) -> str:
    return f"https://drive.google.com/file/d/{identity}/view"


def _drive_file(identity: str) -> str:
    """Where Drive gives the file itself, without the page that asks whether a large one is really wanted. It answers
    with a page all the same where a file is gone or was fetched too often."""
    return f"https://drive.usercontent.google.com/download?id={identity}&export=download&confirm=t"


def _eco(title: str, file: str, *drive: str, kind: str = "eco", urls: tuple[str, ...] = ()) -> Source:
    urls, by_hand = (*urls, *map(_drive_file, drive)), (*map(_drive, drive), _BAIDU)
    return Source(
        title=f"{title} ({file})",
        kind=kind,
        file=file,
        urls=urls,
        by_hand=by_hand,
        licence=_ECO_TERMS,
        preprocessing=ECO_TORCH,
    )


def _eco_caffe(title: str, file: str, *drive: str, kind: str = "eco") -> Source:
    scripts = "https://github.com/mzolfaghari/ECO-efficient-video-understanding (its download scripts)"
    uploads = "https://drive.google.com/drive/folders/1gWInNekKJmiSsqUn0_w0pc329mh4zekM"  # UCF-101 and HMDB-51 again
    return Source(
        title=f"{title}, Caffe ({file})",
        kind=kind,
        file=file,
        urls=tuple(map(_drive_file, drive)),
        by_hand=(*map(_drive, drive), *(() if "kinetics" in file else (uploads,)), scripts),
        licence=_CAFFE_TERMS,
        preprocessing=ECO_CAFFE,
    )


# The first of a kind and format is the one that PAS-Net starts from.
REGISTRY: dict[str, Source] = {
    "eco-lite-kinetics": _eco(
        "ECO-Lite, Kinetics-400", "ECO_Lite_rgb_model_Kinetics.pth.tar", "1XNIq7byciKgrn011jLBggd2g79jKX4uD"
    ),
    "eco-lite-kinetics-v3": _eco(
        "ECO-Lite, Kinetics-400, v3",
        "eco_lite_rgb_16F_kinetics_v3.pth.tar",
        "17SnoxH8tkuUCvW-4ifa4Hk7ITm93nMqI",
        "11cVEZHPaNv6Bl5eTkvBA-JvE0arpUEIe",
    ),
    "eco-lite-kinetics-v2": _eco(
        "ECO-Lite, Kinetics-400, v2", "eco_lite_rgb_16F_kinetics_v2.pth.tar", "1GsMyNxkbEr_2q6pn5cgVo3TMxAFthnrZ"
    ),
    "eco-lite-kinetics-v1": _eco(
        "ECO-Lite, Kinetics-400, v1", "eco_lite_rgb_16F_kinetics_v1.pth.tar", "17rQFmTgB_NSjY8Fq3UaBHOrbZOdwQxFM"
    ),
    "eco-full-kinetics": _eco(
        "ECO-Full, Kinetics-400",
        "ECO_Full_rgb_model_Kinetics.pth.tar",
        "1ATuN_KctsbFAbcNgWDlETZVsy2vhxZay",
        kind="eco-full",
    ),
    "c3d-kinetics": _eco(
        "3D ResNet-18, Kinetics-400",
        "C3DResNet18_rgb_16F_kinetics_v1.pth.tar",
        "1J2mV0Kl9pWOK0FJ23ApHnJHQ3eq76D8a",
        "1XXwuEpn1t-AbsIg5xDXBPOqS37QY0Y9X",
        kind="c3d",
    ),
    "bninception-kinetics": _eco(
        "BN-Inception, Kinetics-400",
        "bninception_rgb_kinetics_init-d4ee618d3399.pth",
        "1ITB2Q8IBPI9VfqBD6xdqs0fXC3N-bKB7",
        kind="bninception",
        urls=("https://yjxiong.blob.core.windows.net/ssn-models/bninception_rgb_kinetics_init-d4ee618d3399.pth",),
    ),
    "eco-lite-kinetics-caffe": _eco_caffe(
        "ECO-Lite, Kinetics-400", "ECO_Lite_kinetics.caffemodel", "1Zbu7m6Gu5NmCQlYdrP6iHsFTvIspUgrl"
    ),
    "eco-lite-ucf101-caffe": _eco_caffe(
        "ECO-Lite, UCF-101", "ECO_Lite_UCF101.caffemodel", "1FMFjtzt_sBWRUyBV86d1cuwHAlnw7HpB"
    ),
    "eco-lite-hmdb51-caffe": _eco_caffe(
        "ECO-Lite, HMDB-51", "ECO_Lite_HMDB51.caffemodel", "1cmRvhpMp_Rr2xfUfc9nZ7DORdjfTl6Jw"
    ),
    "eco-full-kinetics-caffe": _eco_caffe("ECO-Full, Kinetics-400", "ECO_full_kinetics.caffemodel", kind="eco-full"),
    "eco-full-ucf101-caffe": _eco_caffe("ECO-Full, UCF-101", "ECO_full_ucf101.caffemodel", kind="eco-full"),
    "eco-full-hmdb51-caffe": _eco_caffe("ECO-Full, HMDB-51", "ECO_full_HMDB51.caffemodel", kind="eco-full"),
    "pose": Source(
        title="OpenPose body network, COCO (body_pose_model.pth)",
        kind="pose",
        file="body_pose_model.pth",
        urls=(
            "https://huggingface.co/lllyasviel/Annotators/resolve/main/body_pose_model.pth",
            "https://huggingface.co/lllyasviel/ControlNet/resolve/main/annotator/ckpts/body_pose_model.pth",
        ),
        licence=_POSE_TERMS,
        preprocessing=OPENPOSE,
        size=209_267_595,
        sha256="25a948c16078b0f08e236bda51a385d855ef4c153598947c28c0d47ed94bb746",
    ),
    "pose-caffe": Source(
        title="OpenPose body network, COCO, Caffe (pose_iter_440000.caffemodel)",
        kind="pose",
        file="pose_iter_440000.caffemodel",
        urls=("http://posefs1.perception.cs.cmu.edu/OpenPose/models/pose/coco/pose_iter_440000.caffemodel",),
        by_hand=(f"{_drive('1QCSxJZpnWvM00hx49CJ2zky7PWGzpcEh')} (a zip of all models)",),
        licence=_POSE_TERMS,
        preprocessing=OPENPOSE,
        md5="5156d31f670511fce9b4e28b403f2939",
    ),
}


def source_of(kind: str, *, caffe: bool = False) -> Source | None:
    """The registry's first entry for a kind in that format; the others of them have the same licence and preprocessing.
    None: there is no such file, as of "eco-init"."""
    entries = (entry for entry in REGISTRY.values() if entry.kind == kind)
    return next((entry for entry in entries if entry.file.endswith(".caffemodel") == caffe), None)
