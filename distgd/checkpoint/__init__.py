"""Checkpoints: a file for each shard, then a manifest. Tensors are safetensors, the rest JSON; nothing is unpickled."""

from distgd.checkpoint.folder import (
    Checkpoint,
    Restored,
    commit,
    folder_name,
    newest,
    open_checkpoint,
    prune,
    restore,
)
from distgd.checkpoint.manifest import Manifest, ShardEntry
from distgd.checkpoint.shardfile import Damaged, ShardState, check, name_parts, read, seal, sync_folder, write
from distgd.checkpoint.writing import Writing

__all__ = [
    "Checkpoint",
    "Damaged",
    "Manifest",
    "Restored",
    "ShardEntry",
    "ShardState",
    "Writing",
    "check",
    "commit",
    "folder_name",
    "name_parts",
    "newest",
    "open_checkpoint",
    "prune",
    "read",
    "restore",
    "seal",
    "sync_folder",
    "write",
]
