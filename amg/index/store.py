"""The index on disk: a directory of manifest.json, rows.*, meta.parquet and, optionally, codes.*.

rows.f16 | rows.f32   [count, dimension] unit vectors, little-endian, row-major (metric "cosine")
rows.u8               [count, 3 * H * W] pixels in CHW order (metric "nl2")
codes.i8              int8 codes of the rows, in panels of columns    } optional, cosine only; count padded as
codes.scales.f32      [count] one scale per row                       } in amg.kernels.Panels; up to version 2
codes.errors.f32      [count] norm of each row's rounding error       } codes are [count, dimension], nothing
codes.squares.i32     [count] sum of the squares of a row's codes     } padded, without the last two files
codes.rotation.f64    [dimension, dimension] basis of the codes       } only where it saves work
skipped.jsonl         the first 1,000 images that were skipped, with the reason; none where there are none
meta.parquet          id, caption, count, source, caption_count: one line per row
pictures.parquet      every picture seen, in order: id, source, caption, row (-1: skipped, with the reason),
                      content hashes of its vector and sketch; what extend, remove and merge start from
guard.f16             [count + M, 2048] sketches of the rows' pictures, then of M folded ones, see guard.py
members.rows.i64      [M] the row that each of these was folded into           } where M > 0
members.f16|f32|u8    [M, dimension] their vectors or pixels, as in rows.*     }
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import secrets
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amg.extras import needed
from amg.index.coverage import SKIPPED, Coverage, make_coverage
from amg.index.decode import check_background
from amg.index.errors import IndexBuildError, IndexCorrupt, IndexNotFound, IndexVersionError
from amg.index.fields import read_fields
from amg.kernels.top1_cosine.contract import GROUP, panel_shape

FORMAT = "amg-index"
FORMAT_VERSION = 3  # written where codes are in panels; else 2 where the files lie in a folder, 1 where not
MANIFEST = "manifest.json"
META, PICTURES = "meta.parquet", "pictures.parquet"
TEMPORARY = ".amg-temporary-"  # what a killed write leaves, with a random ending
CODES, CODE_SCALES, CODE_ERRORS = "codes.i8", "codes.scales.f32", "codes.errors.f32"
CODE_SQUARES, CODE_ROTATION = "codes.squares.i32", "codes.rotation.f64"
GUARD, MEMBER_ROWS = "guard.f16", "members.rows.i64"
SKETCH_BYTES = 4096  # of one picture in the guard
HASH_THREADS = 4  # files are read side by side; sha256 of one file is serial
MEMBERS_FILE = {"float16": "members.f16", "float32": "members.f32", "uint8": "members.u8"}
ROWS_FILE = {"float16": "rows.f16", "float32": "rows.f32", "uint8": "rows.u8"}
DTYPES = {"float16": torch.float16, "float32": torch.float32, "uint8": torch.uint8}
METRICS = ("cosine", "nl2")
OWN_FILES = {*ROWS_FILE.values(), *MEMBERS_FILE.values(), CODES, CODE_SCALES, CODE_ERRORS, META, PICTURES}
OWN_FILES |= {
    CODE_SQUARES,
    CODE_ROTATION,
    GUARD,
    MEMBER_ROWS,
    SKIPPED,
}  # all that an index may hold beside its manifest
MOST_TEXT = 1 << 20  # bytes of one id, source or caption, on average at most


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and sha256 of one file of the index."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Skipped:
    """An image that could not be read while the index was built."""

    position: int
    id: str
    reason: str


@dataclass(frozen=True)
class EmbedderRecord:
    """Which embedder made the rows; another one is refused."""

    name: str
    sha256: str
    preprocessing: str


@dataclass(frozen=True)
class Imported:
    """Rows that were embedded elsewhere. pictures: how many were embedded again to compare them; cosine: the
    least of these with their rows, 0 where none was."""

    pictures: int = 0
    cosine: float = 0.0


@dataclass(frozen=True)
class Manifest:
    """What an index holds and how it was made; contains no time, so equal builds give equal bytes.

    count: rows after folding. images: training images folded into them. skipped: the first unreadable images
    (in indexes without `coverage` all of them). coverage: what became of all images seen.
    near_duplicate: fold threshold (cosine similarity, or RMS distance on [0, 1] for pixels), None if off.
    preprocessing: what happened to an image before it became a row (or entered the embedder). passed_over:
    how many entries of the source were not taken for images, by reason. notes: how many images something
    noteworthy was done to, by what. examples: the first few names for each of these. background: what
    transparent pictures, queries too, are composited over; None: alpha is dropped. guard: how
    the pictures' sketches were made, None without. imported: None where the rows were made of pictures.
    generation: how often it was changed; folder: within the index, where this generation's files lie. Fields
    with a default are absent from indexes of earlier versions.
    """

    metric: str
    dimension: int
    count: int
    images: int
    dtype: str
    image_size: tuple[int, int] | None
    embedder: EmbedderRecord | None
    preprocessing: str
    near_duplicate: float | None
    skipped: tuple[Skipped, ...]
    files: dict[str, FileRecord]
    version: int = 1
    passed_over: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: dict[str, int] = dataclasses.field(default_factory=dict)
    guard: str | None = None
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    background: str | None = None
    coverage: Coverage | None = None
    imported: Imported | None = None
    generation: int = 0
    folder: str = ""

    @property
    def verified(self) -> bool:
        """Whether pictures were seen whose embeddings the rows are."""
        return self.imported is None or self.imported.pictures > 0

    @property
    def covered(self) -> Coverage:
        """The coverage, of indexes of earlier versions too."""
        if self.coverage is not None:
            return self.coverage
        reasons = Counter(entry.reason for entry in self.skipped)
        return make_coverage(self.count, self.images - self.count, dict(reasons))

    @property
    def rows_file(self) -> str:
        return ROWS_FILE[self.dtype]

    @property
    def has_codes(self) -> bool:
        return CODES in self.files

    @property
    def in_panels(self) -> bool:
        return CODE_SQUARES in self.files

    @property
    def members_file(self) -> str:
        return MEMBERS_FILE[self.dtype]

    @property
    def members(self) -> int:
        """M: folded pictures that are kept beside the row they were folded into."""
        return self.files[MEMBER_ROWS].size // 8 if MEMBER_ROWS in self.files else 0


def _digest_of(record: dict[str, Any]) -> str:
    canonical = json.dumps({key: value for key, value in record.items() if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json, with a sha256 of its own content."""
    record = {"format": FORMAT, **dataclasses.asdict(manifest)}
    record = json.loads(json.dumps(record))
    record["sha256"] = _digest_of(record)
    write_atomically(directory / MANIFEST, json.dumps(record, indent=1, sort_keys=True) + "\n")


def read_manifest(directory: Path) -> Manifest:
    """Read and check manifest.json. Raises IndexNotFound, IndexVersionError or IndexCorrupt."""
    path = directory / MANIFEST
    if not path.is_file():
        raise IndexNotFound(_missing_message(directory))
    try:
        record = json.loads(path.read_bytes())
        digest = _digest_of(record) if isinstance(record, dict) else ""
    except (ValueError, RecursionError) as error:
        raise IndexCorrupt(
            f"{path} is not valid JSON ({error}): the index is damaged, build it again"
        ) from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise IndexCorrupt(f"{path} is not the manifest of an {FORMAT} (its `format` field says otherwise)")
    version = record.get("version")
    if type(version) is int and version > FORMAT_VERSION:
        raise IndexVersionError(
            f"{path} has format version {version}, this package reads up to {FORMAT_VERSION}: "
            "upgrade amg, or build the index again"
        )
    if record.get("sha256") != digest:
        raise IndexCorrupt(f"{path} does not match its own sha256: it was changed or damaged")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise IndexCorrupt(f"{path}: `version` must be in [1, {FORMAT_VERSION}], got {version!r}")
    return _manifest_of(record, path)


def _missing_message(directory: Path) -> str:
    partial = partial_path(directory)
    if partial.is_dir():
        return f"no index at {directory}, but an unfinished build at {partial}: build again to resume it"
    if directory.is_dir():
        return f"{directory} is not an index: it has no {MANIFEST}"
    return f"no index at {directory}: there is no such directory"


def _manifest_of(record: dict[str, Any], path: Path) -> Manifest:
    known = {field.name for field in dataclasses.fields(Manifest)}
    try:
        manifest = read_fields(Manifest, {name: record[name] for name in record.keys() & known})
        _check_values(manifest)
    except ValueError as error:
        raise IndexCorrupt(f"{path} lacks a field or holds a wrong one: {error}") from error
    return manifest


def _check_values(manifest: Manifest) -> None:
    """Raises ValueError for fields that are of their types and mean nothing."""
    pixels = manifest.metric == "nl2"
    dtypes = (
        tuple(DTYPES) if manifest.metric not in METRICS else ("uint8",) if pixels else ("float16", "float32")
    )
    for name, allowed in (("metric", METRICS), ("dtype", dtypes)):
        if getattr(manifest, name) not in allowed:
            raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(manifest, name)!r}")
    size = manifest.image_size
    if pixels and (size is None or 3 * size[0] * size[1] != manifest.dimension):
        raise ValueError(f"`image_size` must be [H, W] with 3 H W = {manifest.dimension}, got {size}")
    if manifest.background is not None:
        check_background(manifest.background)
    least = {"dimension": manifest.dimension, "count": manifest.count}
    least["image_size"] = min(size) if size is not None else 1
    for name, value in least.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
    coverage = manifest.coverage
    if coverage is not None and coverage != make_coverage(
        coverage.indexed, coverage.folded, coverage.skipped
    ):
        raise ValueError(f"`coverage` must have the sum in `seen`, and the share of it, got {coverage}")
    if manifest.folder != folder_of(manifest.generation):
        raise ValueError(
            f"`folder` must be {folder_of(manifest.generation)!r} in generation {manifest.generation}, "
            f"got {manifest.folder!r}"
        )
    if strange := [name for name in manifest.files if os.path.basename(name) != name]:
        raise ValueError(f"`files` must name no file outside the index, got {strange[0]!r}")
    if strange := sorted(manifest.files.keys() - OWN_FILES):
        raise ValueError(f"`files` must name files of an index, got {strange[0]!r}")


def folder_of(generation: int) -> str:
    """Where the files of a generation lie within an index: beside its manifest at first, then in a folder."""
    return f"generation-{generation}" if generation else ""


def partial_path(path: Path) -> Path:
    """Where an index is built before it is renamed to `path`."""
    return path.with_name(path.name + ".partial")


def write_atomically(path: Path, text: str) -> None:
    """Write, flush to disk, then rename over `path`; nothing that lies there is written through a link."""
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def truncate(path: Path, size: int) -> None:
    """Cut a file of a build to `size` bytes. Raises IndexBuildError where it is shorter."""
    if size and (not path.is_file() or path.stat().st_size < size):
        raise IndexBuildError(
            f"{path} is shorter than the build's state says: pass resume=False to discard it"
        )
    with open(path, "ab") as file:
        file.truncate(size)


def append(path: Path, values: torch.Tensor) -> None:
    """Append a tensor's bytes to a file and flush them to disk."""
    with open(path, "ab") as file:
        file.write(values.contiguous().numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())


def file_record(path: Path) -> FileRecord:
    """Size and sha256 of a file, read in blocks."""
    return FileRecord(path.stat().st_size, sha256_of(path))


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sizes(directory: Path, manifest: Manifest) -> None:
    """Every file there, with the size the manifest states: O(files), no content read. Raises IndexCorrupt."""
    required = {manifest.rows_file, META, *([GUARD] if manifest.guard is not None else [])}
    for name in sorted(required | set(manifest.files)):
        if name not in manifest.files:
            raise IndexCorrupt(f"{directory / MANIFEST} does not list {name}")
        path, expected = directory / name, manifest.files[name].size
        if not path.is_file():
            raise IndexCorrupt(f"{path} is missing (its manifest expects {expected} bytes)")
        if path.stat().st_size != expected:
            raise IndexCorrupt(f"{path} has {path.stat().st_size} bytes, its manifest expects {expected}")
    for name, expected in _sizes_needed(manifest).items():
        if name in manifest.files and manifest.files[name].size != expected:
            raise IndexCorrupt(
                f"{directory / name} has {manifest.files[name].size} bytes, {manifest.count} rows of "
                f"{manifest.dimension} {manifest.dtype} and {manifest.members} folded pictures need "
                f"{expected}"
            )


def _sizes_needed(manifest: Manifest) -> dict[str, int]:
    """Bytes of each file whose size follows from the manifest's numbers."""
    count, width, folded = manifest.count, manifest.dimension, manifest.members
    row = width * DTYPES[manifest.dtype].itemsize
    sizes = {manifest.rows_file: count * row, manifest.members_file: folded * row, MEMBER_ROWS: 8 * folded}
    return {**sizes, **_code_sizes(manifest), GUARD: (count + folded) * SKETCH_BYTES}


def _code_sizes(manifest: Manifest) -> dict[str, int]:
    count, width = manifest.count, manifest.dimension
    if not manifest.in_panels:
        return {CODES: count * width, CODE_SCALES: 4 * count, CODE_ERRORS: 4 * count}
    panels, groups, *inner = panel_shape(count, width)
    of_rows = dict.fromkeys((CODE_SCALES, CODE_ERRORS, CODE_SQUARES), 4 * GROUP * groups)
    return {CODES: panels * groups * math.prod(inner), **of_rows, CODE_ROTATION: 8 * width**2}


def check_hashes(directory: Path, manifest: Manifest, digest: Callable[[Path], str] = sha256_of) -> None:
    """Sizes and sha256 of every file; reads all of them, `HASH_THREADS` at a time. Raises IndexCorrupt naming
    the first that is wrong. digest: what gives the sha256 of a file."""
    check_sizes(directory, manifest)
    names = sorted(manifest.files)
    with ThreadPoolExecutor(HASH_THREADS, "amg-hash") as pool:
        for name, found in zip(names, pool.map(digest, [directory / name for name in names]), strict=True):
            if found != manifest.files[name].sha256:
                raise IndexCorrupt(
                    f"{directory / name} was changed or damaged: sha256 {found}, "
                    f"not {manifest.files[name].sha256}"
                )


def map_file(path: Path, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A private memory map of a raw file as a tensor [*shape]; nothing is read until it is used."""
    size = 1
    for extent in shape:
        size *= extent
    return torch.from_file(str(path), shared=False, size=size, dtype=dtype).view(*shape)


def map_rows(directory: Path, manifest: Manifest) -> torch.Tensor:
    """The exact rows [count, dimension] over their memory map."""
    return map_file(
        directory / manifest.rows_file, DTYPES[manifest.dtype], manifest.count, manifest.dimension
    )


def read_meta(directory: Path, manifest: Manifest) -> dict[str, list]:
    """Columns of meta.parquet as lists. Raises IndexCorrupt if it cannot be read or does not match, before
    more is unpacked than so many rows may hold."""
    parquet = import_parquet()
    path = directory / META
    try:
        with parquet.ParquetFile(path, read_dictionary=["id", "caption", "source"]) as file:
            _require_rows(path, file.metadata.num_rows, manifest.count)
            groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
            _require_bounded(path, sum(group.total_byte_size for group in groups), manifest.count)
            table = file.read(columns=["id", "caption", "count", "source", "caption_count"])
        _require_rows(path, table.num_rows, manifest.count)
        _require_bounded(path, sum(map(_text_bytes, table.columns)), manifest.count)
        columns = table.to_pydict()
    except IndexCorrupt:
        raise
    except Exception as error:  # pyarrow raises many types on damaged files
        raise IndexCorrupt(f"{path} cannot be read ({error})") from error
    return columns


def _require_rows(path: Path, found: int, expected: int) -> None:
    if found != expected:
        raise IndexCorrupt(f"{path} has {found} lines, its manifest expects {expected}")


def _require_bounded(path: Path, size: int, count: int) -> None:
    if size > MOST_TEXT * (count + 1):
        raise IndexCorrupt(
            f"{path} must hold at most {MOST_TEXT:,} bytes a row, {MOST_TEXT * (count + 1):,} in all, "
            f"got {size:,}"
        )


def _text_bytes(column: Any) -> int:
    """Bytes of the texts of a column, of repeated ones as often as they are repeated."""
    import pyarrow
    import pyarrow.compute as compute

    if not pyarrow.types.is_dictionary(column.type):
        return int(column.nbytes)
    sizes = (compute.binary_length(chunk.dictionary).take(chunk.indices) for chunk in column.chunks)
    return sum(compute.sum(size).as_py() or 0 for size in sizes)


def import_parquet() -> Any:
    """pyarrow.parquet, or an error that names the extra to install."""
    return needed("pyarrow.parquet", "an index")
