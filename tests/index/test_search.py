"""Search against a float64 brute force, against amg.kernels, and faiss against exact."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from amg.index import Index
from amg.index.exact import ExactPixels

pytest.importorskip("pyarrow")
few_rows = pytest.mark.filterwarnings("ignore:.*with fewer, its usual threshold")


def smooth(count: int, size: int = 16) -> torch.Tensor:
    """uint8 [count, 3, size, size], smooth and of many contrasts, with near neighbours."""
    base = torch.rand(count, 3, 4, 4).repeat_interleave(size // 4, 2).repeat_interleave(size // 4, 3)
    contrast = torch.rand(count, 1, 1, 1) ** 2
    return ((0.5 + contrast * (base - 0.5)) * 255).round().to(torch.uint8)


def nl2_oracle(queries: torch.Tensor, rows: torch.Tensor, k: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """float64: (−ℓ2 / (0.5 · mean of the k smallest ℓ2) [B, N], ℓ2 [B, N])."""
    difference = queries.double()[:, None] - (rows.float() / 255).double()
    distance = difference.square().mean(2).sqrt()
    smallest = distance.topk(min(k, len(rows)), largest=False).values
    return -distance / (0.5 * smallest.mean(1, keepdim=True)), distance


@pytest.fixture
def pixels(tmp_path) -> Index:
    return Index.build(smooth(300), path=tmp_path / "p", progress=False, near_duplicate=False)


@pytest.fixture
def vectors(tmp_path, embedder) -> Index:
    return Index.build(smooth(300), None, embedder, tmp_path / "v", progress=False, near_duplicate=False)


def queries_near(index: Index, count: int = 24) -> torch.Tensor:
    noise = torch.logspace(-3, -0.5, count)[:, None]
    return (index.rows[:count].float() / 255 + noise * torch.randn(count, index.dimension)).clamp(0, 1)


def test_nl2_is_the_float64_value(pixels):
    queries = queries_near(pixels)
    expected, distance = nl2_oracle(queries, pixels.rows)
    found = pixels.nearest(queries)
    assert torch.equal(found.row, distance.argmin(1))
    torch.testing.assert_close(found.similarity.double(), expected.amax(1), rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(found.extras.distance.double(), distance.amin(1), rtol=2e-6, atol=1e-7)
    denominator = 0.5 * distance.topk(50, largest=False).values.mean(1)
    torch.testing.assert_close(found.extras.denominator.double(), denominator, rtol=2e-6, atol=0)


@few_rows
@pytest.mark.parametrize("count", [2, 49, 50, 51, 52])
def test_nl2_with_few_rows(tmp_path, count):
    index = Index.build(smooth(count), path=tmp_path / "i", progress=False, near_duplicate=False)
    queries = queries_near(index, 2)
    expected, distance = nl2_oracle(queries, index.rows)
    found = index.nearest(queries)
    assert torch.equal(found.row, distance.argmin(1))
    torch.testing.assert_close(found.similarity.double(), expected.amax(1), rtol=2e-6, atol=1e-7)


def test_ties_go_to_the_lowest_row():
    rows = smooth(120).flatten(1)
    rows[77] = rows[33] = rows[5]
    queries = rows[[5, 6]].float() / 255
    searcher = ExactPixels(rows)
    assert searcher.nearest(queries).row.tolist() == [5, 6]
    assert searcher.top(queries, 3)[1][0].tolist() == [5, 33, 77]


def test_autocast_changes_nothing(pixels):
    queries = queries_near(pixels)
    plain = pixels.nearest(queries)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pixels.nearest(queries).similarity, plain.similarity)


@pytest.mark.parametrize("k", [1, 3, 60])
def test_pixel_top_k(pixels, k):
    queries = queries_near(pixels)
    expected, _ = nl2_oracle(queries, pixels.rows)
    hits = pixels.search(queries, k)
    best = expected.topk(k)
    if k == 1:
        assert hits.similarity.shape == hits.row.shape == (24,)
    similarity, row = hits.similarity.view(24, k).double(), hits.row.view(24, k)
    torch.testing.assert_close(similarity, best.values, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(expected.gather(1, row), best.values, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("k", [1, 5])
def test_cosine_is_the_float64_value(vectors, k):
    queries = torch.randn(10, vectors.dimension)
    unit = torch.nn.functional.normalize(queries.double(), dim=1)
    best = (unit @ vectors.rows.double().T).topk(k)
    hits = vectors.search(queries, k)
    assert torch.equal(hits.row.view(10, k), best.indices)
    torch.testing.assert_close(hits.similarity.view(10, k).double(), best.values, atol=1e-6, rtol=0)
    assert vectors.nearest(queries).extras is None


def test_queries_of_every_kind_agree(tmp_path, embedder):
    image_module = pytest.importorskip("PIL.Image")
    images = smooth(60)
    captions = [f"caption {at}" for at in range(60)]
    for kind in (None, embedder):
        path = tmp_path / ("e" if kind else "p")
        index = Index.build(images, captions, kind, path, progress=False, near_duplicate=False)
        some = images[10:14]
        listed = [image_module.fromarray(image.permute(1, 2, 0).numpy()) for image in some]
        expected = index.search(index.embed(some / 255))
        assert expected.row.tolist() == [10, 11, 12, 13]
        for queries in (some, some / 255, listed):
            hits = index.search(queries)
            assert torch.equal(hits.row, expected.row)
            torch.testing.assert_close(hits.similarity, expected.similarity, atol=1e-6, rtol=0)
        assert expected.captions == captions[10:14] and expected.ids == ["10", "11", "12", "13"]
        assert [row[0] for row in index.search(some, 2).captions] == captions[10:14]


def test_embed_is_differentiable_and_resizes(pixels, vectors, embedder):
    images = torch.rand(2, 3, 20, 12, dtype=torch.float64, requires_grad=True)
    flat = pixels.embed(images)
    assert flat.shape == (2, 768)
    flat.sum().backward()
    torch.testing.assert_close(
        images.grad.sum(), torch.tensor(2 * 768.0, dtype=torch.float64), rtol=1e-5, atol=0
    )
    unit = vectors.embed(images)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(unit, torch.nn.functional.normalize(embedder(images).float(), dim=1))
    assert unit.requires_grad


@pytest.mark.parametrize("name", ["pixels", "vectors"])
def test_two_threads_may_search_one_index(name, request):
    index = Index.open(request.getfixturevalue(name).path)
    queries = [torch.rand(4, index.dimension) for _ in range(40)]
    expected = [Index.open(index.path).search(query, 2).row for query in queries]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda query: index.search(query, 2), queries))
    assert all(torch.equal(hits.row, row) for hits, row in zip(found, expected, strict=True))
    assert found[0].ids == [[str(row) for row in pair] for pair in expected[0].tolist()]


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat;nprobe=4", "SQ8"])
@pytest.mark.parametrize("name", ["pixels", "vectors"])
def test_faiss_equals_exact(name, factory, request):
    pytest.importorskip("faiss")
    exact = request.getfixturevalue(name)
    faiss = Index.open(exact.path, searcher=f"faiss:{factory}")
    queries = torch.rand(16, exact.dimension) if name == "pixels" else torch.randn(16, exact.dimension)
    queries[:8] = queries_near(exact, 8) if name == "pixels" else exact.rows[:8].float()
    for k in (1, 4):
        ours, theirs = faiss.search(queries, k), exact.search(queries, k)
        assert torch.equal(ours.row, theirs.row)
        torch.testing.assert_close(ours.similarity, theirs.similarity, rtol=2e-6, atol=1e-6)
    assert torch.equal(faiss.with_searcher("exact").search(queries).row, exact.search(queries).row)


@pytest.mark.parametrize("name", ["pixels", "vectors"])
def test_faiss_states_the_similarity_of_the_row_it_found(name, request):
    """HNSW and PQ may miss the nearest row, never misstate one: equal where rows agree, else farther."""
    pytest.importorskip("faiss")
    exact = request.getfixturevalue(name)
    queries = torch.rand(32, exact.dimension)
    best = exact.search(queries)
    for factory in ("HNSW8", "PQ4x4"):
        hits = exact.with_searcher(f"faiss:{factory}").search(queries)
        same = hits.row == best.row
        assert same.float().mean() > 0.3
        if name == "vectors":
            torch.testing.assert_close(hits.similarity[same], best.similarity[same])
            assert (hits.similarity <= best.similarity + 1e-6).all()
        else:
            ours, theirs = (
                index.nearest(queries).extras.distance
                for index in (exact.with_searcher(f"faiss:{factory}"), exact)
            )
            torch.testing.assert_close(ours[same], theirs[same])
            assert (ours >= theirs - 1e-6).all()


def test_faiss_is_exact_where_it_returns_too_few(pixels):
    """Cells that hold fewer rows than nL2 needs: those queries are searched exactly."""
    pytest.importorskip("faiss")
    faiss = pixels.with_searcher("faiss:IVF32,Flat;nprobe=1")
    queries = queries_near(pixels)
    torch.testing.assert_close(
        faiss.nearest(queries).similarity, pixels.nearest(queries).similarity, rtol=2e-6, atol=1e-6
    )
