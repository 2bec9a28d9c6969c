"""An index over several processes or machines, by Ray: `build` it, `serve` it once, `connect` anywhere."""

from amg.index.ray.build import build
from amg.index.ray.serve import connect, serve, stop

__all__ = ["build", "connect", "serve", "stop"]
