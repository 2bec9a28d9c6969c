"""Train `photos-judge`, the independent network that names subjects and recognises copies of whole
photographs.

python benchmarks/zoo/train_judge.py --out amg/zoo/photos-judge --work /tmp/photos-judge
"""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from training import arguments, train
from views import boxes, cut, degrade, jitter, load_sources, recolour, uniform

from amg.zoo.judge import PhotosJudge
from amg.zoo.photos import DUPLICATED, PHOTOS


def batch_of(sources: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """`count` pictures with their subject and the whole photograph they copy (last class: none)."""
    subject = torch.randint(len(sources), (count,))
    duplicated = torch.isin(subject, torch.tensor(DUPLICATED))
    whole = duplicated & (torch.rand(count) < 0.4)
    box = torch.where(whole[:, None], jitter(boxes(torch.ones(count)), 0.9), boxes(uniform(count, 0.2, 0.68)))
    pictures = degrade(recolour(cut(sources, subject, box, 32, rotate=0.06), strength=0.8))
    copied = torch.where(whole, torch.searchsorted(torch.tensor(DUPLICATED), subject), len(DUPLICATED))
    return pictures, subject, copied


def main() -> None:
    args = arguments(__doc__ or "", steps=1800, batch=64, learning_rate=2e-3)
    args.seed += 777  # another seed than the embedder's
    torch.manual_seed(args.seed)
    sources = load_sources(list(PHOTOS))

    def loss(network: nn.Module, step: int) -> Tensor:
        pictures, subject, copied = batch_of(sources, args.batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            named, copies = network(pictures)
        return functional.cross_entropy(named.float(), subject) + functional.cross_entropy(
            copies.float(), copied
        )

    network = train(PhotosJudge(), loss, args)
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.half().contiguous() for name, tensor in network.state_dict().items()},
        args.out / "model.safetensors",
    )
    torch.manual_seed(54321)
    pictures, subject, copied = batch_of(sources, 2000)
    with torch.no_grad():
        named, copies = (logits.argmax(1) for logits in network(pictures))
    none = copied == len(DUPLICATED)
    figures = {
        "subject accuracy": (named == subject).float().mean().item(),
        "copies recognised": (copies == copied)[~none].float().mean().item(),
        "crops called copies": (copies != copied)[none].float().mean().item(),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
