"""Everything that can be wrong with an index, each under its own name."""


class IndexFault(Exception):
    """Base of every error that an index raises about itself or its inputs."""


class IndexBuildError(IndexFault, ValueError):
    """The images, captions or arguments given to a build do not make an index."""


class IndexStorageError(IndexFault, OSError):
    """The disk refused a write while an index was being built (full, over quota, file too large)."""


class IndexNotFound(IndexFault, FileNotFoundError):
    """There is no finished index at the path."""


class IndexCorrupt(IndexFault, RuntimeError):
    """A file of the index is missing, truncated or changed; the message names the file."""


class IndexVersionError(IndexFault, RuntimeError):
    """The index was written by a newer format version than this package reads."""


class EmbedderMismatch(IndexFault, ValueError):
    """The embedder is not the one the index was built with."""


class IndexUnavailable(IndexFault, TimeoutError):
    """A shard of a served index did not answer; the message names it. No other shards' answer is given."""
