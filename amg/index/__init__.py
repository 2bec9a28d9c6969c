"""The training set on disk: build, open, search, verify, change."""

from amg.index.add_guard import add_guard
from amg.index.change import extend, gc, merge, remove
from amg.index.errors import (
    EmbedderMismatch,
    IndexBuildError,
    IndexCorrupt,
    IndexFault,
    IndexNotFound,
    IndexStorageError,
    IndexUnavailable,
    IndexVersionError,
)
from amg.index.hits import Hits
from amg.index.index import Index

__all__ = [
    "EmbedderMismatch",
    "Hits",
    "Index",
    "IndexBuildError",
    "IndexCorrupt",
    "IndexFault",
    "IndexNotFound",
    "IndexStorageError",
    "IndexUnavailable",
    "IndexVersionError",
    "add_guard",
    "extend",
    "gc",
    "merge",
    "remove",
]
