"""Shared by the whole suite: GPU tests are skipped where there is no GPU, seeds are fixed."""

import pytest
import torch
from hypothesis import settings

# The same examples in every run; --hypothesis-profile=search draws many others.
settings.register_profile("same", max_examples=200, derandomize=True, deadline=None)
settings.register_profile("search", max_examples=5000, deadline=None)
settings.load_profile("same")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
