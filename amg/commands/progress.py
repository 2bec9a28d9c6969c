"""The bar that every command shows: in what people count, pictures, not in batches of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from amg.extras import needed


def bar(total: int | None, title: str, done: int = 0, unit: str = "image") -> Any:
    """A tqdm bar, a context manager with `update(count)`, that starts at what is `done` already."""
    tqdm = needed("tqdm", "the progress bar").tqdm
    return tqdm(total=total, initial=done, desc=title, unit=unit, mininterval=0.5)


def counted(
    values: Iterable[Any], title: str, unit: str = "image", total: int | None = None
) -> Iterator[Any]:
    """`values`, each of them counted by a bar once it was dealt with."""
    with bar(total, title, unit=unit) as shown:
        for value in values:
            yield value
            shown.update()
