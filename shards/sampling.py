"""Which frames of a video make a clip. numpy only; indices are 0-based, int64, and valid for every video length >= 1.

`segment_indices` is the sampler of TSN (Wang et al. 2016), which ECO and PAS-Net (section III-A) use: cut the video
into K equal segments and take one frame from each. The bounds are real numbers, so that no frame at the end is out of
reach and a video with fewer than K frames spreads its repeats. ECO-pytorch returns K copies of the first frame there
(its `dataset.py`), which costs accuracy at K = 32 and 48: this is a deliberate deviation, and `eco_indices` is the
original.

The others are for other models: `dense_indices` (a stretch of neighbouring frames: I3D, SlowFast), `multi_clip_indices`
(several such stretches for testing) and `uniform_indices` (first and last frame included).
"""

from __future__ import annotations

from typing import Literal

import numpy as np


def segment_indices(num_frames: int, num_segments: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Shape (num_segments,), non-decreasing, each in [0, num_frames).

    Segment i is [i*n/K, (i+1)*n/K). With `rng` one uniform draw per segment (training), without it the segment's
    centre (test). Raises ValueError unless num_frames >= 1 and num_segments >= 1.
    """
    _check(num_frames, num_segments=num_segments)
    position = np.full(num_segments, 0.5) if rng is None else rng.random(num_segments)
    indices = np.floor((np.arange(num_segments) + position) * num_frames / num_segments).astype(np.int64)
    return np.minimum(indices, num_frames - 1)  # the product may round up to num_frames


def uniform_indices(num_frames: int, num_samples: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Shape (num_samples,): evenly spaced from the first frame to the last, both included; one sample is the middle.

    Nothing is drawn: `rng` is there so that a reader can call all samplers alike. Raises ValueError unless both numbers
    are at least 1.
    """
    _check(num_frames, num_samples=num_samples)
    if num_samples == 1:
        return np.array([(num_frames - 1) // 2])
    return np.rint(np.linspace(0, num_frames - 1, num_samples)).astype(np.int64)


def dense_indices(
    num_frames: int, clip_len: int, stride: int = 1, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Shape (clip_len,): every stride-th frame of one stretch; the stretch is placed by `rng`, else in the middle.

    A video shorter than the stretch of (clip_len - 1) * stride + 1 frames starts over from its first frame (loops), as
    I3D's and PySlowFast's users expect. Raises ValueError unless all numbers are at least 1.
    """
    _check(num_frames, clip_len=clip_len, stride=stride)
    room = max(num_frames - ((clip_len - 1) * stride + 1), 0)
    start = room // 2 if rng is None else int(rng.integers(room + 1))
    return (start + np.arange(clip_len, dtype=np.int64) * stride) % num_frames


def multi_clip_indices(
    num_frames: int, clip_len: int, stride: int, num_clips: int, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Shape (num_clips, clip_len): stretches as in `dense_indices`, spread evenly from the video's start to its end.

    One clip is the middle one. Nothing is drawn, as in `uniform_indices`. Raises ValueError unless all numbers are at
    least 1.
    """
    _check(num_frames, clip_len=clip_len, stride=stride, num_clips=num_clips)
    room = max(num_frames - ((clip_len - 1) * stride + 1), 0)
    starts = uniform_indices(room + 1, num_clips)
    return (starts[:, None] + np.arange(clip_len, dtype=np.int64) * stride) % num_frames


def eco_indices(
    num_frames: int,
    num_segments: int,
    mode: Literal["train", "val", "test"],
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Shape (num_segments,): what ECO-pytorch's `dataset.py` takes, short videos included, to compare with its numbers.

    train (needs `rng`): a uniform draw in each of K blocks of n // K frames; the n % K last frames are never seen, and
    fewer than K frames give K times the first. val: centres of n / K for n > K, else K times the first. test: those
    centres for every n. Raises ValueError for another mode, for train without `rng`, and for numbers below 1.
    """
    _check(num_frames, num_segments=num_segments)
    if mode == "train":
        if rng is None:
            raise ValueError("mode 'train' draws at random and needs an rng")
        block = num_frames // num_segments
        if block == 0:
            return np.zeros(num_segments, np.int64)
        return np.arange(num_segments, dtype=np.int64) * block + rng.integers(block, size=num_segments)
    if mode not in ("val", "test"):
        raise ValueError(f"unknown mode {mode!r} (one of: train, val, test)")
    if mode == "val" and num_frames <= num_segments:
        return np.zeros(num_segments, np.int64)
    step = num_frames / num_segments
    return np.array([int(step / 2 + step * i) for i in range(num_segments)], np.int64)


def _check(num_frames: int, **numbers: int) -> None:
    for name, value in {"num_frames": num_frames, **numbers}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
