"""Which frames of a video make a clip. numpy only; indices are 0-based.

The sampler of TSN (Wang et al. 2016), which ECO and PAS-Net (section III-A) use: cut the video into K equal segments
and take one frame from each. The bounds are real numbers, so that no frame at the end is out of reach and a video
with fewer than K frames spreads its repeats. ECO-pytorch returns K copies of the first frame there (its `dataset.py`),
which costs accuracy at K = 32 and 48: this is a deliberate deviation.
"""

from __future__ import annotations

import numpy as np


def segment_indices(num_frames: int, num_segments: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """int64 indices of shape (num_segments,), non-decreasing, each in [0, num_frames).

    Segment i is [i*n/K, (i+1)*n/K). With `rng` one uniform draw per segment (training), without it the segment's
    centre (test). Raises ValueError unless num_frames >= 1 and num_segments >= 1.
    """
    if num_frames < 1 or num_segments < 1:
        raise ValueError(f"need at least one frame and one segment, got {num_frames} frames, {num_segments} segments")
    position = np.full(num_segments, 0.5) if rng is None else rng.random(num_segments)
    indices = np.floor((np.arange(num_segments) + position) * num_frames / num_segments).astype(np.int64)
    return np.minimum(indices, num_frames - 1)  # the product may round up to num_frames
