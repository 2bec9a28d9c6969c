"""Train `photos-judge-2`, the second outside judge of copies: patches that vote by where they lie.

python benchmarks/zoo/train_judge_2.py --out amg/zoo/photos-judge-2 --work /tmp/photos-judge-2
"""

from __future__ import annotations

import io
import json

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from training import arguments, train
from views import boxes, cut, degrade, jitter, load_sources, recolour, uniform

from amg.zoo.judge_2 import SIZE, PhotosJudge2
from amg.zoo.photos import DUPLICATED, PHOTOS

LEAST_OF_A_COPY = 0.8  # side of what counts as the whole photograph; crops of the training set reach 0.68
NONE = len(DUPLICATED)


def batch_of(sources: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`count` pictures and the photograph that each copies as a whole (last class: none)."""
    subject = torch.randint(len(sources), (count,))
    duplicated = torch.isin(subject, torch.tensor(DUPLICATED))
    whole = duplicated & (torch.rand(count) < 0.5)
    box = boxes(torch.ones(count))
    box = torch.where(
        whole[:, None], jitter(box, LEAST_OF_A_COPY), jitter(boxes(uniform(count, 0.15, 0.7)), 0.9)
    )
    pictures = cut(sources, subject, box, SIZE, rotate=0.12)
    pictures = compressed(degrade(recolour(pictures, strength=1.2)))
    return pictures, torch.where(whole, torch.searchsorted(torch.tensor(DUPLICATED), subject), NONE)


def compressed(images: Tensor) -> Tensor:
    """A quarter of the pictures through JPEG, quality 20 to 80; a quarter pixelated to half the size."""
    images = images.clone()
    for row in torch.nonzero(torch.rand(len(images)) < 0.25).flatten().tolist():
        buffer = io.BytesIO()
        array = (images[row].permute(1, 2, 0) * 255).round().byte().numpy()
        Image.fromarray(array).save(buffer, "JPEG", quality=int(torch.randint(20, 80, ())))
        images[row] = torch.from_numpy(np.asarray(Image.open(buffer)).copy()).permute(2, 0, 1) / 255
    small = functional.interpolate(functional.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    return torch.where(torch.rand(len(images), 1, 1, 1) < 0.25, small, images)


def main() -> None:
    args = arguments(__doc__ or "", steps=4000, batch=64, learning_rate=2e-3)
    args.seed += 4242  # another seed than the other judge's and the embedder's
    torch.manual_seed(args.seed)
    sources = load_sources(list(PHOTOS))

    def loss(network: nn.Module, step: int) -> Tensor:
        pictures, copied = batch_of(sources, args.batch)
        return functional.cross_entropy(network(pictures), copied)

    network = train(PhotosJudge2(), loss, args)
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.half().contiguous() for name, tensor in network.state_dict().items()},
        args.out / "model.safetensors",
    )
    torch.manual_seed(98765)
    pictures, copied = batch_of(sources, 3000)
    with torch.no_grad():
        found = network(pictures).argmax(1)
    none = copied == NONE
    figures = {
        "copies recognised": (found == copied)[~none].float().mean().item(),
        "crops called copies": (found != NONE)[none].float().mean().item(),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
