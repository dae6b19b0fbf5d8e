"""Videos in, WebDataset shards out, clips back: usable by any video model (see shards/README.md for the format).

Nothing in this package imports torch, Prefect, MLflow or any other package of this repository.
"""

from shards.datasets import Dataset, DatasetError, Video, find_dataset, scan
from shards.decode import DecodeError, DecodeSettings, decode_video, ffmpeg_exe
from shards.pack import BuildError, build, build_shard, failures, finish, plan
from shards.read import ShardError, ShardSet, open_shards, stream
from shards.sampling import segment_indices

__all__ = [
    "BuildError",
    "Dataset",
    "DatasetError",
    "DecodeError",
    "DecodeSettings",
    "ShardError",
    "ShardSet",
    "Video",
    "build",
    "build_shard",
    "decode_video",
    "failures",
    "ffmpeg_exe",
    "find_dataset",
    "finish",
    "open_shards",
    "plan",
    "scan",
    "segment_indices",
    "stream",
]
