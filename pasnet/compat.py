"""Lets torchvision be imported over a CPU-only torch.

The registry's torchvision wheels are built against CUDA. Over a CPU torch their compiled part cannot be loaded, and
`import torchvision` then dies on `operator torchvision::nms does not exist`, although the transforms are pure Python
(pytorch/vision#9077). Declaring the two operators that the import looks up is enough; calling them still fails.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import torch

_declared: torch.library.Library | None = None  # the operators live as long as this object


def allow_torchvision() -> None:
    """Call before importing torchvision. Does nothing where torchvision's own compiled part can be loaded."""
    global _declared
    if _declared is not None or torch.version.cuda is not None or torch.version.hip is not None:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return
    compiled = sorted(Path(spec.origin).parent.glob("_C*.so"))
    try:
        for library in compiled:
            ctypes.CDLL(str(library))  # a CPU build of torchvision loads, and declares the operators itself
    except OSError:
        compiled = []
    if compiled:
        return
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        _declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
