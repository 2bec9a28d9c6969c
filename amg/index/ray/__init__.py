"""One search of an index over several processes or machines, by Ray: `serve` it once, `connect` anywhere."""

from amg.index.ray.serve import connect, serve, stop

__all__ = ["connect", "serve", "stop"]
