"""Pictures under a folder: class folders, sidecar captions, Hugging Face's metadata, img2dataset's files."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from pathlib import Path

from amg.index.errors import IndexBuildError
from amg.index.sources.columns import Table
from amg.index.sources.listing import KIND_OF, Listing
from amg.index.sources.metadata import Metadata, add_records
from amg.index.sources.records import caption_in, read_records, read_table_records, record_of
from amg.index.sources.source import Decoding, Fields, Found, TrainingImage, identity_of, loader
from amg.index.sources.status import failed
from amg.index.text import Caption, make_caption, plain_name, read_sidecar


class FolderSource:
    """Pictures under a folder, in path order, with those that metadata or img2dataset's tables speak of and
    that are not there; `name.png.txt` or `name.txt` is the caption of `name.png`, unless metadata has one."""

    identity_tells = True

    def __init__(
        self,
        folder: Path,
        listing: Listing,
        named: dict[str, Table],
        statuses: dict[str, Table],
        tables: list[Found],
        decoding: Decoding,
        fields: Fields,
    ):
        self.folder, self.decoding, self.fields = folder, decoding, fields
        self.passed_over, self.captions = listing.passed_over, listing.captions
        self.metadata = self._read_metadata(listing, named)
        pictures = [*listing.pictures, *self._missing(listing.pictures, statuses)]
        self.files = sorted(pictures, key=lambda file: file.name.split("/"))
        self.length: int | None = len(self.files)
        texts = (self.captions.get(file.name) for file in self.files)
        self.identity = identity_of(
            "folder", [*self.files, *(text for text in texts if text is not None), *listing.metadata, *tables]
        )
        if fields.caption is not None and not self.metadata.captions:
            raise IndexBuildError(
                f"`captions` names a Parquet column or a field ({fields.caption!r}) but {folder} holds no "
                "Parquet and no metadata with it"
            )

    def first(self) -> TrainingImage:
        return self._image(0)

    def read(self, start: int) -> Iterator[TrainingImage]:
        for position in range(start, len(self.files)):
            yield self._image(position)

    def _read_metadata(self, listing: Listing, named: dict[str, Table]) -> Metadata:
        captions: dict[str, tuple[Caption, str]] = {}
        for file in listing.metadata:
            content = (self.folder / file.name).read_bytes()
            if not add_records(captions, read_records(content, file.name, file.name), file.name, self.fields):
                self.passed_over.add(KIND_OF[".txt"], plain_name(file.name))
        for name, table in named.items():
            add_records(captions, read_table_records(table.file, name), name, self.fields)
        return Metadata(captions)

    def _missing(self, pictures: list[Found], statuses: dict[str, Table]) -> Iterator[Found]:
        present = {file.name for file in pictures}
        for name, reason in self.metadata.missing(present):
            yield Found(name, 0, reason, missing=True)
        for shard, table in statuses.items():
            keys = {_key(name) for name in present if name.startswith(f"{shard}/")}
            for row in failed(table, keys):
                yield Found(f"{shard}/{row.key}", 0, row.reason, missing=True)

    def _image(self, position: int) -> TrainingImage:
        file = self.files[position]
        name = plain_name(file.name)
        load = loader(self.folder / file.name, file, self.decoding)
        caption = self.metadata.caption_of(file.name) or self._caption(file.name)
        return TrainingImage(position, name, name, caption, load)

    def _caption(self, name: str) -> Caption:
        text = self.captions.get(name)
        if text is None:
            return Caption()
        caption = read_sidecar(self.folder / text.name, self.folder, plain_name(text.name))
        if text.name.lower().endswith(".json") and caption.text is not None:
            return _of_json(caption, plain_name(text.name))
        return caption


def _key(name: str) -> str:
    return posixpath.basename(name).partition(".")[0]


def _of_json(content: Caption, where: str) -> Caption:
    """The caption in a JSON file beside a picture; one that is not JSON, or has none, is none."""
    record = record_of((content.text or "").encode(), where)
    value = None if record is None else caption_in(record, None)
    return Caption() if value is None else make_caption(value, where)
