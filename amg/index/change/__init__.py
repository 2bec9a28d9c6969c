"""An index that changes: pictures added and taken out, indexes joined, what nobody needs deleted."""

from amg.index.change.extend import extend
from amg.index.change.generations import gc
from amg.index.change.merge import merge
from amg.index.change.remove import remove

__all__ = ["extend", "gc", "merge", "remove"]
