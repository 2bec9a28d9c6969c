"""A folder, whatever it holds: its pictures, archives and tables, as one source."""

from __future__ import annotations

import os
from pathlib import Path

from amg.index.decode import RASTER_FORMATS
from amg.index.errors import IndexBuildError
from amg.index.notes import Tally
from amg.index.sources.columns import Table, image_columns, open_table, text_columns
from amg.index.sources.folder import FolderSource
from amg.index.sources.listing import KIND_OF, Listing, list_folder
from amg.index.sources.several import Joined
from amg.index.sources.source import Decoding, Fields, Found, ImageSource
from amg.index.sources.table import TableSource, arrow_names, is_status_table
from amg.index.sources.tar import Archive, TarSource
from amg.index.text import plain_name

CACHES, NO_IMAGES = "caches of datasets", "tables without pictures"


class _Tables:
    """The Parquet and Arrow files of a folder, by what they are for."""

    def __init__(self, folder: Path, listing: Listing, passed_over: Tally):
        self.pictures: list[Found] = []
        self.named: dict[str, Table] = {}
        self.statuses: dict[str, Table] = {}
        self.files: list[Found] = []  # of the latter two
        self.unfit: list[Found] = []
        self.broken: list[Found] = []
        saved: dict[str, set[str] | None] = {}
        for file in listing.tables:
            top, _, base = file.name.rpartition("/")
            if base.lower().endswith(".arrow"):
                names = saved.setdefault(top, arrow_names(folder / top))
                if base not in names if names is not None else base.startswith("cache-"):
                    passed_over.add(CACHES, plain_name(file.name))
                    continue
            self._sort_in(folder, file)

    def _sort_in(self, folder: Path, file: Found) -> None:
        try:
            table = open_table(folder / file.name)
        except IndexBuildError as error:
            self.broken.append(file._replace(fault=str(error).removeprefix("`images`: ")))
            return
        if image_columns(table):
            self.pictures.append(file)
        elif is_status_table(table):
            self.statuses[os.path.splitext(file.name)[0]] = table
            self.files.append(file)
        elif text_columns(table, "file_name"):
            self.named[file.name] = table
            self.files.append(file)
        else:
            self.unfit.append(file)


def open_folder(folder: Path, decoding: Decoding, fields: Fields) -> ImageSource:
    """All that a folder holds, of whatever kinds: pictures, then archives, then tables."""
    listing = list_folder(folder)
    passed_over = Tally()
    tables = _Tables(folder, listing, passed_over)
    pictures = sorted([*listing.pictures, *tables.broken], key=lambda file: file.name.split("/"))
    listing = listing._replace(pictures=pictures)
    holds = [bool(pictures or tables.named), bool(listing.archives), bool(tables.pictures)]
    if not any(holds) and not tables.statuses:
        if not tables.unfit:
            raise _without_images(folder, listing)
        tables.pictures, tables.unfit, holds = (
            tables.unfit,
            [],
            [False, False, True],
        )  # it says what they lack
    for file in tables.unfit:
        passed_over.add(NO_IMAGES, plain_name(file.name))
    parts: list[ImageSource] = []
    of_tars = {name: tables.statuses.pop(name) for name in _stems(listing) if name in tables.statuses}
    if holds[0] or tables.statuses:
        parts.append(_open_pictures(folder, listing, tables, decoding, fields, alone=sum(holds) == 1))
    else:
        passed_over.join(listing.passed_over, "")
        for file in listing.metadata:
            passed_over.add(KIND_OF[".txt"], plain_name(file.name))
    if holds[1]:
        archives = [Archive(file, folder / file.name, of_tars.get(_stem(file))) for file in listing.archives]
        parts.append(TarSource(archives, tables.files, decoding, fields))
    if holds[2]:
        parts.append(TableSource(folder, tables.pictures, decoding, fields))
    return Joined(parts, passed_over=passed_over)


def _open_pictures(
    folder: Path, listing: Listing, tables: _Tables, decoding: Decoding, fields: Fields, alone: bool
) -> FolderSource:
    """The pictures of a folder; where it holds other kinds too, a named column may be theirs alone."""
    known = listing.metadata or tables.named or alone
    fields = fields if known else fields._replace(caption=None)
    return FolderSource(folder, listing, tables.named, tables.statuses, tables.files, decoding, fields)


def _stem(file: Found) -> str:
    top, slash, base = file.name.rpartition("/")
    return f"{top}{slash}{base.split('.')[0]}"


def _stems(listing: Listing) -> list[str]:
    return [_stem(file) for file in listing.archives]


def _without_images(folder: Path, listing: Listing) -> IndexBuildError:
    rest = "; ".join(f"{what}: {count}" for what, count in listing.passed_over.counts.items()) or "nothing"
    return IndexBuildError(
        f"`images` is a folder without images: {folder} (formats read: {' '.join(RASTER_FORMATS)}, in files, "
        f"tar, Parquet and Arrow files; it holds {rest})"
    )
