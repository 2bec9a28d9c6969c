"""Train `photos-embedder`, the copy-detection network, with SSCD's objective; report held-out retrieval.

    python benchmarks/zoo/train_embedder.py --out amg/zoo/photos-embedder --work /tmp/photos-embedder

Four photographs are held out altogether; the crops of the rest are drawn afresh, never the ones of the
training set.
"""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from training import arguments, train
from views import boxes, cut, degrade, jitter, load_sources, overlap, recolour, uniform

from amg.embed.photos import PhotosEmbedder
from amg.zoo.photos import PHOTOS

HELD_OUT = ("coffee", "cameraman", "temple", "handwriting")
TEMPERATURE, ENTROPY = 0.07, 0.1
NEIGHBOURLY = 0.35  # boxes that overlap more than this are neither copies nor different pictures
PHOTOS_A_BATCH = 5  # few, so that most negatives are other parts of the same photograph


def loss_of(embeddings: Tensor, neighbourly: Tensor) -> Tensor:
    """InfoNCE over copies (rows i and i + pairs) minus the weighted Kozachenko-Leonenko entropy.

    `neighbourly` [pairs, pairs] bool: pictures that overlap too much to be told apart, left out.
    """
    pairs = len(neighbourly)
    unit = functional.normalize(embeddings)
    ignored = neighbourly.repeat(2, 2) | torch.eye(2 * pairs, dtype=torch.bool)
    target = torch.arange(2 * pairs).roll(pairs)
    ignored[torch.arange(2 * pairs), target] = False
    similarity = unit @ unit.T
    contrast = functional.cross_entropy(similarity.masked_fill(ignored, -torch.inf) / TEMPERATURE, target)
    nearest = similarity.masked_fill(ignored, -1).scatter(1, target[:, None], -1.0).amax(1)
    distance = (2 - 2 * nearest).clamp(min=1e-4).sqrt()
    return contrast - ENTROPY * distance.log().mean()


def views_of(sources: Tensor, rows: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
    """The pictures in the boxes and an augmented copy of each, [count, 3, 64, 64]."""
    original = degrade(cut(sources, rows, jitter(box, 0.95), 64, flip=0.0, oversample=1))
    copy = degrade(recolour(cut(sources, rows, jitter(box, 0.8), 64, rotate=0.08, oversample=1)))
    return original, copy


@torch.no_grad()
def retrieval(network: nn.Module, sources: Tensor, count: int = 2000) -> dict[str, float]:
    """Top-1 retrieval of augmented copies among distinct pictures (boxes that hardly overlap)."""
    torch.manual_seed(12345)
    rows, box = torch.randint(len(sources), (count,)), boxes(uniform(count, 0.2, 1.0))
    near, kept = overlap(rows, box) > NEIGHBOURLY, list[int]()
    for row in range(count):
        if not bool(near[row, kept].any()):
            kept.append(row)
    original, copy = views_of(sources, rows[kept], box[kept])
    originals, copies = (functional.normalize(network(batch)) for batch in (original, copy))
    similarity = copies @ originals.T
    own = similarity.diagonal()
    other = similarity.masked_fill(torch.eye(len(kept), dtype=torch.bool), -1).amax(1)
    return {
        "pictures": len(kept),
        "top-1": (own > other).float().mean().item(),
        "copies, median similarity": own.median().item(),
        "copies above 0.5": (own > 0.5).float().mean().item(),
        "nearest other, median similarity": other.median().item(),
        "nearest other above 0.5": (other > 0.5).float().mean().item(),
    }


def main() -> None:
    args = arguments(__doc__ or "", steps=1600, batch=64, learning_rate=2e-3)
    torch.manual_seed(args.seed)
    sources = load_sources([photo for photo in PHOTOS if photo.key not in HELD_OUT], 128)
    held_out = load_sources([photo for photo in PHOTOS if photo.key in HELD_OUT], 128)

    def loss(network: nn.Module, step: int) -> Tensor:
        rows = torch.randperm(len(sources))[torch.randint(PHOTOS_A_BATCH, (args.batch,))]
        box = boxes(uniform(args.batch, 0.2, 1.0))
        original, copy = views_of(sources, rows, box)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embeddings = network.descriptor(torch.cat([original, copy]))  # type: ignore[operator]
        return loss_of(embeddings.float(), overlap(rows, box) > NEIGHBOURLY)

    network = train(PhotosEmbedder(), loss, args)
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.half().contiguous() for name, tensor in network.state_dict().items()},
        args.out / "model.safetensors",
    )
    figures = {
        "seen photographs, fresh crops": retrieval(network, sources),
        "held-out photographs": retrieval(network, held_out),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
