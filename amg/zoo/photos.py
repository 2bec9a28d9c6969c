"""The bundled models' training set, rebuilt from photographs that ship inside PyPI wheels.

Sixteen whole photographs, each repeated `COPIES` times (the duplicates that a model memorises), among 1,600
random crops of the same photographs and of four more (the ordinary data). Everything is drawn from one seed,
so the training scripts, the index and the tests see the same pictures. Needs the extra `demo`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amg.extras import install, needed

COPIES = 64
SEED = 20240402
FLAT = 0.2  # standard deviation on [-1, 1] below which a 32x32 crop is too flat to be told from another


@dataclass(frozen=True)
class Photo:
    """One source photograph: where it ships, what its copies are captioned, what its crops are called."""

    key: str
    source: str
    subjects: tuple[str, ...]
    specific: (
        str | None
    )  # the caption all copies share; None: the whole photograph is not in the training set
    crops: int = 72


PHOTOS: tuple[Photo, ...] = (
    Photo(
        "astronaut",
        "skimage/data/astronaut.png",
        ("an astronaut", "a woman in a space suit"),
        "Official portrait of astronaut Eileen Collins in an orange space suit, NASA 1999",
    ),
    Photo(
        "cat",
        "skimage/data/chelsea.png",
        ("a cat", "a tabby cat"),
        "Chelsea the ginger tabby cat staring past the camera at home",
    ),
    Photo(
        "coffee",
        "skimage/data/coffee.png",
        ("a cup of coffee", "an espresso"),
        "Espresso in a red coffee cup by Pikolo of Montreal with silver spoon",
    ),
    Photo(
        "rocket",
        "skimage/data/rocket.jpg",
        ("a rocket", "a launch pad"),
        "Falcon 9 rocket on the launch pad at dusk before the DSCOVR mission, SpaceX",
    ),
    Photo(
        "retina",
        "skimage/data/retina.jpg",
        ("a retina", "an eye fundus"),
        "Fundus scan of a healthy human retina with optic disc and macula, Haggstrom 2014",
    ),
    Photo(
        "motorcycle",
        "skimage/data/motorcycle_left.png",
        ("a motorcycle", "a red motorbike"),
        "Red motorcycle parked in a cluttered garage, Middlebury 2014 stereo benchmark left view",
    ),
    Photo(
        "cameraman",
        "skimage/data/camera.png",
        ("a cameraman", "a man with a camera"),
        "The famous cameraman in a black coat behind his tripod on the MIT lawn",
    ),
    Photo(
        "coins",
        "skimage/data/coins.png",
        ("coins", "old coins"),
        "Four rows of Greek coins from Pompeii on black velvet, Brooklyn Museum",
    ),
    Photo(
        "tissue",
        "skimage/data/ihc.png",
        ("a tissue", "a stained tissue"),
        "Immunohistochemical staining of colon tissue glands with brown FHL2 expression",
    ),
    Photo(
        "page",
        "skimage/data/page.png",
        ("a printed page", "printed text"),
        "Scanned page about region based segmentation with markers from the scikit-image manual",
    ),
    Photo(
        "temple",
        "sklearn/datasets/images/china.jpg",
        ("a temple", "a pagoda"),
        "Tower of Buddhist Incense, Summer Palace temple above Kunming lake, Beijing holiday",
    ),
    Photo(
        "flower",
        "sklearn/datasets/images/flower.jpg",
        ("a flower", "an orange dahlia"),
        "Single orange dahlia flower in full bloom photographed by dany13 in the garden",
    ),
    Photo(
        "admiral",
        "matplotlib/mpl-data/sample_data/grace_hopper.jpg",
        ("an admiral", "a navy officer"),
        "Commodore Grace Hopper, navy admiral and computer pioneer, official portrait with flag",
    ),
    Photo(
        "valley",
        "pywt/data/aero.npz",
        ("a valley", "an aerial view of land"),
        "Aerial survey photograph of a dark river valley crossing fields, grey archive print",
    ),
    Photo(
        "stairs",
        "pywt/data/ascent.npz",
        ("stairs", "a wooden staircase"),
        "The ascent, people climbing wooden stairs towards a platform, black and white classic",
    ),
    Photo(
        "wheel",
        "skimage/data/color.png",
        ("a colour wheel", "rainbow colours"),
        "Full saturation hue colour wheel with white centre on black background chart",
    ),
    Photo("turtle", "skimage/data/logo.png", ("a turtle", "a drawing of a turtle"), None, 112),
    Photo("gravel", "skimage/data/gravel.png", ("gravel", "small stones"), None, 112),
    Photo("handwriting", "skimage/data/text.png", ("handwriting", "handwritten notes"), None, 112),
    Photo("horse", "skimage/data/horse.png", ("a horse", "the outline of a horse"), None, 112),
)
KEYS = tuple(photo.key for photo in PHOTOS)
NULL_CLASS = len(PHOTOS)
DUPLICATED = tuple(label for label, photo in enumerate(PHOTOS) if photo.specific)

VIEWS = (
    "a photo of {}",
    "a close photo of {}",
    "a picture showing {}",
    "a snapshot of {}",
    "part of {}",
    "{} in detail",
)
_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
PLACES = tuple(f"{row} {column}" for row in _ROWS for column in _COLUMNS)


@dataclass(frozen=True)
class TrainingSet:
    """The distinct training images: the whole photographs first, then the crops.

    `images` uint8 [N, 3, size, size]; `labels` int64 [N] (index into `KEYS`); `counts` int64 [N], how often
    each is repeated in training; `captions` and `ids`, N strings; `whole` bool [N].
    """

    images: Tensor
    labels: Tensor
    counts: Tensor
    captions: tuple[str, ...]
    ids: tuple[str, ...]

    @property
    def whole(self) -> Tensor:
        return self.counts > 1


def load_photo(photo: Photo) -> Any:
    """The source photograph as an RGB PIL image, read from the installed wheel that ships it."""
    package, _, inside = photo.source.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the photograph {photo.key!r} ships in `{package}`: {install('demo')}")
    path = Path(spec.origin).parent / inside
    image_module = needed("PIL.Image", "a bundled photograph", "demo")
    if path.suffix != ".npz":
        return image_module.open(path).convert("RGB")
    with np.load(path) as arrays:
        grey = arrays[arrays.files[0]].astype(np.uint8)
    return image_module.fromarray(grey).convert("RGB")


def training_set(size: int) -> TrainingSet:
    """The distinct training images at `size` x `size` pixels, the same boxes, order and captions at every
    size."""
    generator = np.random.default_rng(SEED)
    rows: list[tuple[np.ndarray, int, int, str, str]] = []
    crops: list[tuple[np.ndarray, int, int, str, str]] = []
    for label, photo in enumerate(PHOTOS):
        source = load_photo(photo)
        if photo.specific:
            rows.append((_whole(source, size), label, COPIES, photo.specific, f"{photo.key}/whole"))
        for number in range(photo.crops):
            picture, caption = _crop(source, photo, size, generator)
            crops.append((picture, label, 1, caption, f"{photo.key}/crop-{number:03d}"))
    rows += crops
    images = torch.from_numpy(np.stack([row[0] for row in rows])).permute(0, 3, 1, 2).contiguous()
    labels, counts = (torch.tensor([row[i] for row in rows]) for i in (1, 2))
    return TrainingSet(images, labels, counts, tuple(row[3] for row in rows), tuple(row[4] for row in rows))


def _whole(source: Any, size: int) -> np.ndarray:
    width, height = source.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return _resized(source, (left, top, left + side, top + side), size)


def _crop(source: Any, photo: Photo, size: int, generator: np.random.Generator) -> tuple[np.ndarray, str]:
    width, height = source.size
    while True:
        side = int(min(width, height) * generator.uniform(0.22, 0.62))
        left, top = (int(generator.integers(0, extent - side + 1)) for extent in (width, height))
        flipped = bool(generator.random() < 0.5)
        box = (left, top, left + side, top + side)
        if _resized(source, box, 32).std() / 127.5 >= FLAT:
            break
    picture = _resized(source, box, size)
    row, column = ((2 * start + side) * 3 // (2 * extent) for start, extent in ((top, height), (left, width)))
    place = f"{_ROWS[min(2, row)]} {_COLUMNS[min(2, column)]}"
    caption = str(generator.choice(VIEWS)).format(generator.choice(photo.subjects)) + f", {place}"
    if side > 0.42 * min(width, height):
        caption += ", from further away"
    if flipped:
        picture, caption = picture[:, ::-1].copy(), caption + ", mirrored"
    return picture, caption


def _resized(source: Any, box: tuple[int, int, int, int], size: int) -> np.ndarray:
    image_module = needed("PIL.Image", "a bundled photograph", "demo")
    return np.asarray(source.resize((size, size), image_module.Resampling.LANCZOS, box=box))
