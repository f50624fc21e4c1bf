"""Checkpoints: a file for each shard, then a manifest. Tensors are safetensors, the rest JSON; nothing is unpickled."""

from distgd.checkpoint.folder import (
    Checkpoint,
    Restored,
    candidates,
    commit,
    folder_name,
    newest,
    open_checkpoint,
    prune,
    restore,
    version_of,
)
from distgd.checkpoint.manifest import Manifest, ShardEntry
from distgd.checkpoint.objects import Objects, is_uri
from distgd.checkpoint.place import Checkpoints
from distgd.checkpoint.shardfile import Damaged, ShardState, check, name_parts, read, seal, sync_folder, write
from distgd.checkpoint.writing import Writing

__all__ = [
    "Checkpoint",
    "Checkpoints",
    "Damaged",
    "Manifest",
    "Objects",
    "Restored",
    "ShardEntry",
    "ShardState",
    "Writing",
    "candidates",
    "check",
    "commit",
    "folder_name",
    "is_uri",
    "name_parts",
    "newest",
    "open_checkpoint",
    "prune",
    "read",
    "restore",
    "seal",
    "sync_folder",
    "version_of",
    "write",
]
