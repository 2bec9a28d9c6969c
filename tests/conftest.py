"""Shared by the whole suite: GPU tests are skipped where there is no GPU, seeds are fixed."""

import os

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

# The same examples in every run; --hypothesis-profile=search draws many others.
settings.register_profile("same", max_examples=200, derandomize=True, deadline=None)
settings.register_profile("search", max_examples=5000, deadline=None)
settings.load_profile("same")


# The longest first: begun last, one would keep a core busy while the others are idle.
LONG = (
    "kernels/test_interpreted.py",
    "engine/test_table.py",
    "integrations/test_protect.py",
    "commands/test_demo_index.py",
    "benchmarks/test_bench_engine_gpu.py",
    "integrations/test_precision.py",
    "test_cli.py",
    "integrations/test_photos_flow.py",
    "kernels/test_ops.py",
)


def _rank(item: pytest.Item) -> int:
    return next((at for at, file in enumerate(LONG) if str(item.path).endswith(f"tests/{file}")), len(LONG))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_rank)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def photos_sd_index(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of the index of photos-sd's training set, built once for all workers: not to be changed."""
    from amg import zoo

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    path = folder / "photos-sd.amg"
    with FileLock(folder / "photos-sd.lock"):
        if not path.exists():
            zoo.build_index("photos-sd", path, progress=False)
    return str(path)
