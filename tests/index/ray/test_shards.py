"""What shards answer together is what one process answers, to the bit; Ray has no part in it."""

import asyncio
import threading
import time

import pytest
import torch

from amg.index import Index
from amg.index.errors import IndexCorrupt
from amg.index.ray.answers import best_of, nl2_of
from amg.index.ray.batch import Batcher
from amg.index.ray.shard import Ranked, Shard, parts_of

from .here import sharded

pytest.importorskip("pyarrow")


@pytest.fixture
def training():
    """uint8 [240, 3, 8, 8]: 80 pictures, 80 that are nearly these (folded), 80 of little contrast."""
    generator = torch.Generator().manual_seed(5)
    first = torch.randint(0, 256, (80, 3, 8, 8), generator=generator, dtype=torch.uint8)
    second = (first.int() + torch.randint(-2, 3, first.shape, generator=generator)).clamp(0, 255)
    third = torch.randint(100, 130, first.shape, generator=generator, dtype=torch.uint8)
    return torch.cat([first, second.to(torch.uint8), third])


@pytest.fixture(params=["cosine", "nl2"])
def index(request, tmp_path, training, embedder):
    captions = [f"picture {at % 60}" if at % 3 else None for at in range(len(training))]
    made = embedder if request.param == "cosine" else None
    return Index.build(training, captions, made, tmp_path / "i.amg", progress=False)


def queries(index, training):
    """Pictures near members, near rows, far from all."""
    near = training[70:110].float() / 255
    noise = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    return torch.cat([near, 0.9 * near + 0.1 * noise, noise, near.flip(-1)])


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        if one is None:
            assert other is None
        elif isinstance(one, tuple):
            same(one, other)
        else:
            assert torch.equal(one.nan_to_num(-9), other.nan_to_num(-9)) and one.dtype == other.dtype


@pytest.mark.parametrize("shards", [1, 2, 7])
def test_every_answer_is_the_same(index, training, shards):
    images, served = queries(index, training), sharded(index, shards)
    assert index.manifest.members > 0 and served.count == index.count
    vectors = index.encode(images).clone()
    vectors[3] = torch.nan
    vectors[5, 0] = torch.inf
    same(served.nearest(vectors), index.nearest(vectors))
    same(served.closest(images), index.closest(images))
    for k in (1, 3, 60, index.count):
        found, expected = served.search(images, k), index.search(images, k)
        same((found.similarity, found.row), (expected.similarity, expected.row))
        assert found.ids == expected.ids and found.captions == expected.captions


def test_the_closest_is_the_float64_one(index, training):
    """An oracle of its own: every difference, or dot product, in float64."""
    vectors = index.encode(queries(index, training)).double()
    if index.metric == "cosine":
        rows = index.rows.double()
        similarity, row = (torch.nn.functional.normalize(vectors, dim=1) @ rows.T).clamp(max=1).max(1)
    else:
        distance = (vectors[:, None] - (index.rows.float() / 255).double()).square().mean(2).sqrt()
        denominator = distance.topk(50, largest=False).values.mean(1) / 2
        similarity, row = -distance.amin(1) / denominator, distance.argmin(1)
    found = sharded(index, 5).nearest(vectors.float())
    assert torch.equal(found.row, row)
    torch.testing.assert_close(found.similarity.double(), similarity, rtol=2e-6, atol=2e-7)


def test_everything_else_that_is_asked_of_an_index(index):
    served = sharded(index, 4)
    numbers = torch.tensor([0, index.count - 1, 17, 17])
    assert torch.equal(served.rows[numbers], index.rows[numbers]) and len(served.rows) == index.count
    assert [*served.ids] == index.ids and [*served.captions] == index.captions
    assert [*served.sources] == index.sources and served.captioned == index.captioned
    assert torch.equal(served.counts, index.counts)
    assert torch.equal(served.caption_counts(), index.caption_counts())
    assert served.captions[-1] == index.captions[-1] and served.ids[7] == index.ids[7]
    assert served.manifest_sha256 == index.manifest_sha256
    served.seal.check()
    served.verify()


def test_ties_go_to_the_lowest_row_of_all():
    """Entries of one closeness in three shards; places, not shards, decide."""
    parts = [
        Ranked(torch.tensor([[0.5, 0.25]]), torch.tensor([[9, 2]]), torch.tensor([[90, 20]])),
        Ranked(torch.empty(1, 0), torch.empty(1, 0, dtype=torch.int64), torch.empty(1, 0, dtype=torch.int64)),
        Ranked(torch.tensor([[0.5, 0.5]]), torch.tensor([[4, 6]]), torch.tensor([[40, 60]])),
    ]
    found = best_of(parts, 3)
    assert found.place.tolist() == [[4, 6, 9]] and found.row.tolist() == [[40, 60, 90]]
    failed = best_of([*parts, Ranked(torch.tensor([[torch.nan]]), *[torch.tensor([[1]])] * 2)], 2)
    assert failed.closeness.isnan().all() and failed.row.tolist() == [[0, 0]]


def test_nl2_of_copies_is_zero():
    zeros = torch.zeros(1, 50)
    found = nl2_of(Ranked(-zeros, zeros.long(), zeros.long()))
    assert found.value.tolist() == [0] and found.denominator.tolist() == [0]


@pytest.mark.parametrize("shards", [0, -1, 1.5, True, None, 10**6])
def test_shards_that_cannot_be(index, shards):
    with pytest.raises(ValueError, match=r"`shards` must be an int in \[1, \d+\] \(rows of the index\), got"):
        parts_of(index.manifest, shards)


def test_a_served_index_stays_what_it_is(index, training):
    served = sharded(index, 2)
    for change in (lambda: served.extend(training), lambda: served.remove(ids=["0"])):
        with pytest.raises(ValueError, match="stays what it is until it is served anew"):
            change()
    with pytest.raises(ValueError, match='`searcher` must be "exact" for a served index'):
        served.with_searcher("faiss:Flat")
    with pytest.raises(TypeError, match="the rows lie with the shards"):
        served.rows[0]
    with pytest.raises(IndexError, match="`row` must be in"):
        served.ids[index.count]
    with pytest.raises(IndexError, match="`rows` must be in"):
        served.rows[torch.tensor([index.count])]


def test_a_shard_keeps_to_its_generation_and_refuses_changed_files(index, training):
    served, expected = sharded(index, 2), index.nearest(index.encode(training[:9].float() / 255))
    index.extend(255 - training[:20], ids=[f"new {at}" for at in range(20)], progress=False)
    again = Shard(index.path, index.manifest, parts_of(index.manifest, 2)[1])  # started again, later
    again.answer("check")
    same(served.nearest(served.encode(training[:9].float() / 255)), expected)
    file = index.data / index.manifest.rows_file
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(IndexCorrupt, match="rows"):
        served.nearest(served.encode(training[:9].float() / 255))


def test_questions_that_wait_are_answered_together():
    sizes, release = [], threading.Event()

    def search(question, queries, k):
        release.wait(5)
        sizes.append((question, len(queries), k))
        return Ranked(*(queries[:, :1].to(kind) for kind in (torch.float32, torch.int64, torch.int64)))

    async def ask():
        batcher = Batcher(search)
        first = asyncio.create_task(batcher.ask("closest", torch.full((2, 4), 0.0), 1))
        await asyncio.sleep(0.05)
        asked = [batcher.ask("closest", torch.full((at, 4), float(at)), 1) for at in (1, 2, 3)]
        others = [
            batcher.ask("closest", torch.full((1, 4), 9.0), 2),
            batcher.ask("alike", torch.ones(1, 4), 1),
        ]
        waiting = [asyncio.create_task(one) for one in (*asked, *others)]
        await asyncio.sleep(0.05)
        release.set()
        return await first, *[await one for one in waiting]

    answers = asyncio.run(ask())
    assert sizes == [("closest", 2, 1), ("closest", 6, 1), ("closest", 1, 2), ("alike", 1, 1)]
    assert [found.closeness[:, 0].tolist() for found in answers[1:4]] == [[1.0], [2.0, 2.0], [3.0] * 3]


def test_an_error_reaches_who_asked_and_nobody_later():
    def search(question, queries, k):
        time.sleep(0.01)
        if k == 2:
            raise IndexCorrupt("rows.f16 was changed")
        return Ranked(queries, queries.long(), queries.long())

    async def ask():
        batcher = Batcher(search)
        asked = [batcher.ask("closest", torch.ones(1, 4), k) for k in (2, 1)]
        return await asyncio.gather(*asked, return_exceptions=True)

    wrong, right = asyncio.run(ask())
    assert isinstance(wrong, IndexCorrupt) and torch.equal(right.closeness, torch.ones(1, 4))
