"""A served index whose shards are in this process."""

from amg.index.ray.served import Everyone, Served, ServedIndex
from amg.index.ray.shard import Shard, parts_of


class Here:
    """amg.index.ray.served.Shards without Ray."""

    def __init__(self, served):
        self.shards = [Shard(served.path, served.manifest, part) for part in served.parts]

    def ask(self, question, arguments):
        return {shard: self.shards[shard].answer(question, *given) for shard, given in arguments.items()}


def sharded(index, shards):
    """`index` in so many shards, with its embedder."""
    parts = tuple(parts_of(index.manifest, shards))
    served = Served("here", index.path, index.manifest, index.manifest_sha256, parts)
    made = ServedIndex(Everyone(served, Here(served)), lambda embedder: index)
    return made if index.embedder is None else made.attach(index.embedder)
