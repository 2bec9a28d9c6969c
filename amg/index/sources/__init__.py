"""Training sets as people have them, a file a kind; `open_source` says which one something is."""

from amg.index.sources.open import open_source, root_of
from amg.index.sources.source import ImageSource, TrainingImage

__all__ = ["ImageSource", "TrainingImage", "open_source", "root_of"]
