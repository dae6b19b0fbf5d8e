"""Videos in, WebDataset shards out, clips back: usable by any video model (see shards/README.md for the format).

Nothing in this package imports Prefect, MLflow or any other package of this repository; stream.py alone imports torch,
and only if it is there.
"""

from shards.clips import Batches, Clip, Clips, centre
from shards.datasets import Dataset, DatasetError, Video, find_dataset, scan
from shards.decode import DecodedVideo, DecodeError, DecodeSettings, decode_video, decode_videos
from shards.decode_ffmpeg import ffmpeg_exe
from shards.pack import BuildError, build_shard, failures, finish, locked, plan
from shards.pool import build
from shards.read import ShardError, ShardSet, View, clip_shape, open_shards
from shards.sampling import dense_indices, eco_indices, multi_clip_indices, segment_indices, uniform_indices
from shards.verify import Problem, repair, verify

__all__ = [
    "Batches",
    "BuildError",
    "Clip",
    "Clips",
    "Dataset",
    "DatasetError",
    "DecodeError",
    "DecodeSettings",
    "DecodedVideo",
    "Problem",
    "ShardError",
    "ShardSet",
    "Video",
    "View",
    "build",
    "build_shard",
    "centre",
    "clip_shape",
    "decode_video",
    "decode_videos",
    "dense_indices",
    "eco_indices",
    "failures",
    "ffmpeg_exe",
    "find_dataset",
    "finish",
    "locked",
    "multi_clip_indices",
    "open_shards",
    "plan",
    "repair",
    "scan",
    "segment_indices",
    "uniform_indices",
    "verify",
]
