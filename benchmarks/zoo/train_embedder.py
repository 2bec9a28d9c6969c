"""Train `photos-embedder`, the copy-detection network, with SSCD's objective; report held-out retrieval.

    python benchmarks/zoo/train_embedder.py --out amg/zoo/photos-embedder --work /tmp/photos-embedder

Four photographs are held out altogether; the crops of the rest are drawn afresh, never the ones of the training set.
"""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from training import arguments, train
from views import boxes, cut, degrade, jitter, load_sources, recolour, uniform

from amg.embed.photos import PhotosEmbedder
from amg.zoo.photos import PHOTOS

HELD_OUT = ("coffee", "cameraman", "temple", "handwriting")
TEMPERATURE, ENTROPY = 0.07, 0.1


def loss_of(embeddings: Tensor, pairs: int) -> Tensor:
    """InfoNCE over `pairs` copies (rows i and i + pairs) minus the weighted Kozachenko-Leonenko entropy."""
    unit = functional.normalize(embeddings)
    logits = (unit @ unit.T).fill_diagonal_(-torch.inf) / TEMPERATURE
    target = torch.arange(2 * pairs).roll(pairs)
    contrast = functional.cross_entropy(logits, target)
    nearest = (unit @ unit.T).masked_fill(torch.eye(2 * pairs, dtype=torch.bool), -2)
    nearest = nearest.scatter(1, target[:, None], -2.0).amax(1)
    distance = (2 - 2 * nearest).clamp(min=1e-6).sqrt()
    return contrast - ENTROPY * distance.log().mean()


def views_of(sources: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`count` pictures and an augmented copy of each, [count, 3, 64, 64]."""
    rows = torch.randint(len(sources), (count,))
    box = boxes(torch.where(torch.rand(count) < 0.2, 1.0, uniform(count, 0.2, 0.75)))
    original = degrade(cut(sources, rows, jitter(box, 0.95), 64, flip=0.0))
    copy = degrade(recolour(cut(sources, rows, jitter(box, 0.75), 64, rotate=0.08)))
    return original, copy


@torch.no_grad()
def retrieval(network: nn.Module, sources: Tensor, count: int = 400) -> tuple[float, float, float]:
    """Top-1 retrieval of augmented copies among `count` distinct pictures, and the medians of the two similarities."""
    torch.manual_seed(12345)
    original, copy = views_of(sources, count)
    originals, copies = (functional.normalize(network(batch)) for batch in (original, copy))
    similarity = copies @ originals.T
    own = similarity.diagonal()
    other = similarity.masked_fill(torch.eye(count, dtype=torch.bool), -1).amax(1)
    return (own > other).float().mean().item(), own.median().item(), other.median().item()


def main() -> None:
    args = arguments(__doc__ or "", steps=3000, batch=64, learning_rate=2e-3)
    torch.manual_seed(args.seed)
    sources = load_sources([photo for photo in PHOTOS if photo.key not in HELD_OUT])
    held_out = load_sources([photo for photo in PHOTOS if photo.key in HELD_OUT])

    def loss(network: nn.Module, step: int) -> Tensor:
        original, copy = views_of(sources, args.batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embeddings = network(torch.cat([original, copy]))
        return loss_of(embeddings.float(), args.batch)

    network = train(PhotosEmbedder(), loss, args)
    args.out.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}, args.out / "model.safetensors")
    figures = {"seen photographs, fresh crops": retrieval(network, sources), "held-out photographs": retrieval(network, held_out)}
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
