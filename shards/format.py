"""What is on disk: schema of the index and of the failure table. shards/README.md is the contract in words."""

from __future__ import annotations

import pyarrow as pa

FORMAT_VERSION = 3  # 1 had no source_frames, source_bytes and frame_crc32; 2 had null for "" in the tars

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("video", pa.string()),  # <class folder>/<file>, as found on disk
        ("class_name", pa.string()),
        ("label", pa.int32()),
        ("group", pa.string()),
        ("split1", pa.string()),  # train, test, or null where the split does not use the video; "" in the tars
        ("split2", pa.string()),
        ("split3", pa.string()),
        ("shard", pa.string()),
        ("offset", pa.int64()),  # of the JPEGs' first byte in the shard file
        ("length", pa.int64()),
        ("num_frames", pa.int32()),
        ("frame_offsets", pa.list_(pa.int64())),  # num_frames + 1 numbers, relative to `offset`
        ("frame_crc32", pa.list_(pa.uint32())),  # of each JPEG: decoders let damage in the middle of one pass
        ("fps", pa.float64()),
        ("source_codec", pa.string()),
        ("source_width", pa.int32()),
        ("source_height", pa.int32()),
        ("source_frames", pa.int32()),  # = num_frames unless decode.frames_per_video thinned them out
        ("source_bytes", pa.int64()),  # of the video file
        ("decode_errors", pa.string()),  # "" or what the decoder complained of in a video that it decoded all the same
        ("sha256", pa.string()),  # of the JPEGs end to end
    ]
)
FAILURES_SCHEMA = pa.schema([("video", pa.string()), ("reason", pa.string()), ("detail", pa.string())])
