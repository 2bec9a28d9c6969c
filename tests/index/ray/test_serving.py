"""A served index over Ray's actors: the answers, what happens when actors die, and what is refused."""

import os
import pickle
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import amg
from amg.index import Index, IndexCorrupt, IndexNotFound, IndexUnavailable

ray = pytest.importorskip("ray", reason="needs ray: pip install 'amg-sampler[ray]'")
pytest.importorskip("pyarrow")

from amg.index.ray import connect, serve, stop  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*has no guard")]


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    ray.init(
        "local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
        namespace="tests",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def training():
    generator = torch.Generator().manual_seed(5)
    first = torch.randint(0, 256, (100, 3, 8, 8), generator=generator, dtype=torch.uint8)
    second = (first[:40].int() + torch.randint(-2, 3, (40, 3, 8, 8), generator=generator)).clamp(0, 255)
    return torch.cat([first, second.to(torch.uint8)])


@pytest.fixture(scope="module")
def index(training, tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "pixels.amg"
    return Index.build(training, [f"picture {at}" for at in range(140)], None, path, progress=False)


@pytest.fixture(scope="module")
def served(index):
    found = serve(index.path, shards=3)
    yield found
    stop("pixels.amg")


def process(served, shard):
    return ray.get(served.everyone.shards.actors[shard].process.remote())


def same(found, expected):
    assert torch.equal(found.similarity, expected.similarity) and torch.equal(found.row, expected.row)


def test_every_answer_is_the_same(index, served, training):
    images = (training[60:110].float() / 255 + 0.01).clamp(0, 1)
    same(served.closest(images), index.closest(images))
    same(served.closest(images).guard, index.closest(images).guard)
    same(served.search(training[:9]), index.search(training[:9]))
    same(served.search(images, 55), index.search(images, 55))
    assert served.search(training[:9]).captions == index.search(training[:9]).captions
    numbers = torch.tensor([99, 0, 50])
    assert torch.equal(served.rows[numbers], index.rows[numbers])


def test_it_is_opened_by_its_name_and_pickled_by_it(index, served, training):
    again = pickle.loads(pickle.dumps(Index.open("ray:pixels.amg")))
    same(again.search(training[:3]), index.search(training[:3]))
    assert repr(again).endswith(", 100 rows of 192, cpu, 3 shards)")


def test_the_final_check_takes_it(index, served, training):
    images = torch.cat([training[:2].float() / 255, torch.rand(2, 3, 8, 8)])
    config = amg.AMGConfig.preset("main", guidance_scale=1.0)
    verdicts, expected = amg.check(images, served, config), amg.check(images, index, config)
    assert verdicts == expected and [one.memorized for one in verdicts] == [True, True, False, False]


def test_many_at_once_get_their_own_answers(index, served, training):
    images = training[:96].float() / 255
    expected = index.closest(images)
    with ThreadPoolExecutor(8) as pool:
        for at, found in enumerate(pool.map(served.closest, images.split(1))):
            assert found.similarity[0] == expected.similarity[at] and found.row[0] == expected.row[at]


def test_a_shard_killed_in_the_middle_of_a_search_is_waited_for(index, served, training):
    images = (training[:64].float() / 255 + 0.02).clamp(0, 1)
    vectors = index.encode(images)
    expected, before = index.nearest(vectors), process(served, 1)
    found = []
    asking = threading.Thread(target=lambda: found.extend(served.nearest(vectors) for _ in range(20)))
    asking.start()
    time.sleep(0.05)
    os.kill(before, signal.SIGKILL)
    asking.join(100)
    assert len(found) == 20 and process(served, 1) != before
    for one in found:
        same(one, expected)


def test_a_shard_that_stands_still_is_an_error_that_names_it(served, index, training):
    hasty, stopped = connect("pixels.amg", timeout=1.0), process(served, 2)
    vectors = index.encode(training[:2].float() / 255)
    os.kill(stopped, signal.SIGSTOP)
    try:
        message = r"shard 2 of 3 \(rows 66 to 99\) .*'pixels.amg' did not answer 'closest' within 1 s"
        with pytest.raises(IndexUnavailable, match=message):
            hasty.nearest(vectors)
    finally:
        os.kill(stopped, signal.SIGCONT)
    same(served.nearest(vectors), index.nearest(vectors))


def test_a_shard_that_is_gone_for_good_is_an_error(index, training):
    gone = serve(index.path, shards=2, name="gone", timeout=30)
    ray.kill(gone.everyone.shards.actors[1])
    with pytest.raises(IndexUnavailable, match=r"shard 1 of 2 .*'gone' cannot be asked any more"):
        gone.nearest(index.encode(training[:2].float() / 255))
    ray.kill(gone.everyone.shards.actors[0])


def test_a_shard_started_again_refuses_files_that_changed(training, tmp_path):
    built = Index.build(training, None, None, tmp_path / "changed.amg", progress=False)
    served = serve(built.path, shards=2)
    file = built.data / built.manifest.rows_file
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes(content)
    os.kill(process(served, 0), signal.SIGKILL)
    with pytest.raises(IndexCorrupt, match=r"rows\.u8 was changed or damaged"):
        served.nearest(served.encode(training[:2].float() / 255))
    stop("changed.amg")


def test_names_and_arguments(index, served, tmp_path):
    with pytest.raises(ValueError, match=r"`name` must be free, 'pixels.amg' is served already"):
        serve(index.path, shards=2)
    with pytest.raises(IndexNotFound, match="no index is served as 'nothing'"):
        connect("nothing")
    with pytest.raises(IndexNotFound, match="no index at"):
        serve(tmp_path / "none", shards=2)
    with pytest.raises(ValueError, match=r"`shards` must be an int in \[1, 100\]"):
        serve(index.path, shards=101)
    for wrong in (0, -1.0, "1", float("nan"), True):
        with pytest.raises(ValueError, match="`timeout` must be seconds above 0, got"):
            connect("pixels.amg", timeout=wrong)
    with pytest.raises(ValueError, match="`name` must be a str without '/'"):
        connect("a/b")
    with pytest.raises(ValueError, match="`cpus` must be above 0 or None, got 0"):
        serve(index.path, shards=2, name="b", cpus=0)
    same(served.search(torch.zeros(1, 3, 8, 8)), index.search(torch.zeros(1, 3, 8, 8)))  # as before
