"""Groupers: fit groups to rows, assign rows to groups, save and reload."""

from commonit_trl.grouping.base import Grouper
from commonit_trl.grouping.cache import default_cache_dir, fit_assign_cached
from commonit_trl.grouping.embedding import EmbeddingGrouper
from commonit_trl.grouping.length import LengthGrouper
from commonit_trl.grouping.registry import build_grouper, load_grouper, resolve_task_columns
from commonit_trl.grouping.task import TaskGrouper

__all__ = [
    "EmbeddingGrouper",
    "Grouper",
    "LengthGrouper",
    "TaskGrouper",
    "build_grouper",
    "default_cache_dir",
    "fit_assign_cached",
    "load_grouper",
    "resolve_task_columns",
]
