"""Datasets in memory: torch Datasets, DataLoaders, iterables of whatever their items are."""

import numpy
import pytest
import torch

from amg.index import IndexBuildError
from amg.index.sources.items import OTHERS

pytest.importorskip("pyarrow")
PIL = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.filterwarnings("ignore:.*with fewer, its usual threshold")
COUNT = 10


def to_pil(picture: torch.Tensor):
    return PIL.fromarray(picture.permute(1, 2, 0).numpy())


class Numbered(torch.utils.data.Dataset):
    """A dataset that knows its items by number and its length, and no end of its own."""

    def __init__(self, pictures: torch.Tensor, item):
        self.pictures, self.item = pictures, item

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, at: int):
        return self.item(self.pictures[at % COUNT], at)


class Streamed(torch.utils.data.IterableDataset):
    def __init__(self, pictures: torch.Tensor, item):
        self.pictures, self.item = pictures, item

    def __iter__(self):
        return (self.item(self.pictures[at], at) for at in range(COUNT))


TEXTS = [f"caption {at}" for at in range(COUNT)]
ITEMS = {
    "PIL": (lambda picture, at: to_pil(picture), None),
    "tensor": (lambda picture, at: picture, None),
    "float": (lambda picture, at: picture / 255, None),
    "array": (lambda picture, at: picture.permute(1, 2, 0).numpy(), None),
    "float array": (lambda picture, at: (picture / 255).permute(1, 2, 0).numpy(), None),
    "label": (lambda picture, at: (to_pil(picture), at), None),
    "tensor label": (lambda picture, at: (picture / 255, torch.tensor(at)), None),
    "one-hot": (lambda picture, at: (picture, torch.eye(COUNT)[at]), None),
    "caption": (lambda picture, at: (to_pil(picture), TEXTS[at]), TEXTS),
    "captions": (lambda picture, at: [picture, [TEXTS[at], "other"]], TEXTS),
    "label, caption": (lambda picture, at: (to_pil(picture), at, TEXTS[at]), TEXTS),
    "dict": (lambda picture, at: {"label": at, "image": to_pil(picture)}, None),
    "dict caption": (lambda picture, at: {"image": picture, "text": TEXTS[at], "n": at}, TEXTS),
    "pixel_values": (lambda picture, at: {"pixel_values": picture / 255, "Caption": TEXTS[at]}, TEXTS),
    "odd key": (lambda picture, at: {"__key__": str(at), "photo": to_pil(picture)}, None),
    "webdataset": (
        lambda p, at: {"__key__": str(at), "png": to_pil(p), "json": {"caption": TEXTS[at]}},
        TEXTS,
    ),
    "target": (lambda picture, at: (to_pil(picture), {"caption": TEXTS[at], "boxes": [1]}), TEXTS),
}


@pytest.mark.parametrize("kind", [*ITEMS])
@pytest.mark.parametrize("dataset", [Numbered, Streamed])
def test_items_of_every_kind(pictures, make, kind, dataset):
    item, captions = ITEMS[kind]
    index = make(dataset(pictures, item))
    assert torch.equal(index.rows, pictures[:COUNT].flatten(1))
    assert index.captions == (captions or [None] * COUNT) and index.coverage == 1


@pytest.mark.parametrize("form", ["bytes", "struct", "path", "path struct"])
def test_encoded_items_and_paths(tmp_path, pictures, png, make, form):
    def item(at: int):
        content = png(pictures[at])
        (tmp_path / f"{at}.png").write_bytes(content)
        return {
            "bytes": content,
            "struct": {"image": {"bytes": content, "path": None}},
            "path": (str(tmp_path / f"{at}.png"), TEXTS[at]),
            "path struct": {"image": {"bytes": None, "path": str(tmp_path / f"{at}.png")}},
        }[form]

    index = make(item(at) for at in range(4))
    assert torch.equal(index.rows, pictures[:4].flatten(1))
    assert index.captions == (TEXTS[:4] if form == "path" else [None] * 4)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_data_loader(pictures, make, batch):
    dataset = Numbered(pictures, ITEMS["dict caption"][0])
    index = make(torch.utils.data.DataLoader(dataset, batch_size=batch))
    assert torch.equal(index.rows, pictures[:COUNT].flatten(1)) and index.captions == TEXTS
    labelled = torch.utils.data.DataLoader(Numbered(pictures, ITEMS["tensor label"][0]), batch_size=batch)
    assert torch.equal(make(labelled).rows, index.rows)
    pairs = Numbered(pictures, lambda picture, at: (picture, TEXTS[at]))
    assert make(torch.utils.data.DataLoader(pairs, batch_size=batch)).captions == TEXTS


def test_one_channel_becomes_three(pictures, make):
    grey = [pictures[at, :1] for at in range(4)]
    expected = pictures[:4, :1].expand(-1, 3, -1, -1).flatten(1)
    for images in (grey, [g[0] for g in grey], [g[0].numpy() for g in grey], [(g / 255, 3) for g in grey]):
        assert torch.equal(make(images).rows, expected)
    tall = [g.permute(1, 2, 0).numpy() for g in grey]
    assert torch.equal(make(tall).rows, expected)


def test_arrays_with_alpha_are_composited(pictures, make):
    array = torch.cat([pictures[0], torch.zeros(1, 8, 8, dtype=torch.uint8)]).permute(1, 2, 0).numpy()
    assert make([array]).rows.unique().tolist() == [255]


def test_an_item_that_fails_to_open_is_skipped(pictures, make):
    def item(picture, at):
        if at == 3:
            raise OSError("truncated file")
        return None if at == 4 else {"image": to_pil(picture)} if at != 5 else {"image": None}

    with pytest.raises(IndexBuildError, match="item 4 is a NoneType"):
        make(Numbered(pictures, item))
    index = make(Numbered(pictures, lambda picture, at: item(picture, at if at != 4 else 9)))
    assert index.count == COUNT - 2 and index.coverage == 0.8
    reasons = {entry.id: entry.reason for entry in index.manifest.skipped}
    assert reasons == {"3": "truncated file", "5": "no image in this item"}


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([3], "must yield PIL images, .* item 0 is a int"),
        ([{"a": 1, "b": "x"}], "item 0 is a dict with keys a, b"),
        ([(1, 2)], "item 0 is a tuple"),
        ([torch.zeros(5, 8, 8)], r"item 0 is \[5, 8, 8\] torch.float32"),
        ([numpy.zeros((8, 8, 3), "int64")], r"item 0 is \[8, 8, 3\] int64"),
        ([torch.full((3, 8, 8), -1.0)], r"in \[0, 1\], item 0 has -1 to -1: undo its normalisation"),
        ([torch.full((3, 8, 8), torch.nan)], r"in \[0, 1\], item 0 has nan"),
    ],
)
def test_items_that_are_none_are_named(make, items, message):
    with pytest.raises(IndexBuildError, match=message):
        make(items)


def test_named_keys(pictures, make):
    items = [{"a": to_pil(pictures[at]), "b": to_pil(pictures[9 - at]), "alt": TEXTS[at]} for at in range(3)]
    index = make(items, "alt", image_column="b")
    assert torch.equal(index.rows, pictures[[9, 8, 7]].flatten(1)) and index.captions == TEXTS[:3]
    with pytest.raises(IndexBuildError, match="`captions` names 'text'; item 0 of `images` has a, b, alt"):
        make(items, "text", image_column="a")
    with pytest.raises(IndexBuildError, match=r"names a Parquet column or a key \('text'\), but .* no dicts"):
        make([to_pil(pictures[0])], "text")


@pytest.mark.parametrize("dataset", [Numbered, Streamed])
def test_an_interrupted_build_of_a_dataset_resumes(tmp_path, pictures, dataset, interrupted_twice):
    index = interrupted_twice(lambda: dataset(pictures, ITEMS["caption"][0]), tmp_path)
    assert torch.equal(index.rows, pictures[:COUNT].flatten(1)) and index.captions == TEXTS


def test_given_captions_come_before_those_of_the_items(pictures, make):
    given = [f"given {at}" for at in range(COUNT)]
    assert make(Numbered(pictures, ITEMS["caption"][0]), given).captions == given


def test_a_dict_of_datasets(pictures, make):
    parts = {name: Numbered(pictures, ITEMS["label"][0]) for name in ("train", "test")}
    index = make(parts)
    assert index.count == COUNT and index.counts.tolist() == [2] * COUNT and index.ids[0] == "train/0"


def test_pictures_beside_the_one_that_is_taken_are_counted(pictures, make):
    views = [to_pil(picture) for picture in pictures[:6]]
    index = make([(views[0], views[1], "a"), {"image": views[2], "mask": views[3]}, (views[4], 1)])
    assert torch.equal(index.rows, pictures[[0, 2, 4]].flatten(1)) and index.captions == ["a", None, None]
    assert index.manifest.passed_over == {OTHERS: 2}


def test_rows_of_paths(folder, pictures, make):
    rows = [{"caption": f"c{at}", "file_name": str(folder / "a" / f"{at}.png")} for at in range(3)]
    pandas = pytest.importorskip("pandas")
    for images in (rows, pandas.DataFrame(rows)):
        index = make(images)
        assert torch.equal(index.rows, pictures[:3].flatten(1)) and index.captions == ["c0", "c1", "c2"]


def test_what_webdataset_yields(tmp_path, pictures, png, make):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        for at in range(6):
            writer.write({"__key__": str(at), "png": png(pictures[at]), "txt": TEXTS[at]})
    shards = webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False)
    for images in (shards, shards.decode("pil"), shards.decode("torchrgb").to_tuple("png", "txt")):
        index = make(images)
        assert torch.equal(index.rows, pictures[:6].flatten(1)) and index.captions == TEXTS[:6]


def test_pictures_that_were_opened_are_not_kept_in_memory(folder, pictures, make):
    opened = [PIL.open(folder / "a" / f"{at}.png") for at in range(3)]
    index = make(opened)
    assert torch.equal(index.rows, pictures[:3].flatten(1))
    assert all(image.tile for image in opened), "still as they were given"
    opened[1].load()
    opened[2] = opened[2].rotate(90)
    turned = [pictures[0], pictures[1], pictures[2].rot90(1, (1, 2))]
    assert torch.equal(make(opened).rows, torch.stack(turned).flatten(1))
