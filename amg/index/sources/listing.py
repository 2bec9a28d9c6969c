"""What a folder holds: pictures, tables and archives, told by their content; the rest is counted."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from amg.index.claim import MARKER, is_marked
from amg.index.coverage import SKIPPED
from amg.index.decode import IMAGE_SUFFIXES
from amg.index.errors import IndexBuildError, IndexFault
from amg.index.notes import Tally
from amg.index.sources.source import Found
from amg.index.sources.tape import is_tar
from amg.index.store import MANIFEST, read_manifest

HIDDEN, BESIDE = "hidden, or the system's own", "captions beside a picture"
SEEN, SPECIAL = "links to a folder that was visited already", "neither a file nor a folder"
VECTOR, NO_PICTURE = "vector graphics or documents", "no picture"
OWN = "an index of amg's own"
DANGLING, REMEDY = "a link to nothing", "convert it to PNG, TIFF or JPEG"
# suffixes of pictures that viewers show and RASTER_FORMATS lacks: skipped by name, never passed over
UNREAD = (
    ".heic .heif .hif .jxl .jxr .psd .psb .xcf .kra .exr .hdr .dcm .icns .dng .nef .nrw .cr2 .cr3 .arw .srf "
    ".orf .rw2 .raf .pef .srw .x3f .3fr .iiq .erf .mrw .kdc"
)
KINDS = {
    "text or tables": (
        ".txt .caption .json .jsonl .csv .tsv .xml .yaml .yml .md .rst .html .htm .log .ini .toml .py"
    ),
    "class labels": ".cls",
    "arrays or weights": ".npy .npz .pt .pth .ckpt .safetensors .pkl .h5 .hdf5 .arrow .feather .mat .bin",
    "archives, not opened": ".zip .tar .gz .tgz .bz2 .xz .zst .7z .rar .tfrecord .mdb .lmdb",
    "video or sound": ".mp4 .m4v .mov .avi .webm .mkv .mpg .mpeg .mp3 .wav .flac",
    VECTOR: ".svg .eps .ps .pdf .ai .wmf .emf",
}
UNREAD_SUFFIXES = frozenset(UNREAD.split())
KIND_OF = {suffix: kind for kind, suffixes in KINDS.items() for suffix in suffixes.split()}
PICTURE = "picture"
SIDECARS = (".txt", ".caption", ".json")  # the preferred ones first
TABLES = (".parquet", ".arrow", ".feather")
ARCHIVES = (".tar", ".tgz", ".gz", ".tbz2", ".bz2", ".txz", ".xz")
METADATA = ("metadata.jsonl", "metadata.csv")
SYSTEM_FILES = ("thumbs.db", "desktop.ini", "__macosx")
SIGNATURE_BYTES = 64
_RASTER = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|II[*+]\0|MM\0[*+]|....ftypavi[fs]|....ftypm[is]f1"
    rb"|\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51|BM.{4}\0\0\0\0.{4}[\x0c-\x7c]\0\0\0|qoif.{8}[\3\4][\0\1]"
    rb"|DDS \x7c\0\0\0|\x59\xa6\x6a\x95|P[1-6]\s(?:#[^\n]*\n|\s)*\d+\s+\d+\s|P[Ff]\n\d+ \d+\s|P7\nWIDTH",
    re.DOTALL,
)
_UNREAD = re.compile(
    rb"....ftyp(?:hei|hev|mif)|\0\0\0\x0cJXL |8BPS\0|gimp xcf|\x76\x2f\x31\x01|#\?RADIANCE|icns\0", re.DOTALL
)
_VECTOR = re.compile(rb"\s*%!PS|\xc5\xd0\xd3\xc6|%PDF|\s*<svg|\xd7\xcd\xc6\x9a", re.DOTALL)


class Listing(NamedTuple):
    """Pictures, Parquet and Arrow files, and tar archives in path order; what is none of them, by reason;
    pictures' captions; and files called metadata, which may be tables of captions."""

    pictures: list[Found]
    tables: list[Found]
    archives: list[Found]
    passed_over: Tally
    captions: dict[str, Found]
    metadata: list[Found]


def list_folder(folder: Path) -> Listing:
    """Look through a folder and what it links to.

    Links are followed, also out of the folder, and every directory is visited once: under its own name where
    it has one here, else by its first link. A file is a picture by its suffix or its first bytes. What looks
    like one but cannot be opened (a link to nothing, no permission, HEIC, camera raw) is listed among the
    pictures with its fault. Raises IndexBuildError where the folder itself cannot be listed.
    """
    walk = _Walk(folder)
    walk.visit("", os.path.realpath(folder))
    for name in walk.links:  # grows while it is walked
        walk.visit(name, os.path.realpath(folder / name))
    pictures, tables, archives, metadata = (
        sorted(found, key=lambda file: file.name.split("/"))
        for found in (walk.pictures, walk.tables, walk.archives, walk.metadata)
    )
    return Listing(pictures, tables, archives, walk.passed_over, walk.captions(), metadata)


class _Walk:
    def __init__(self, folder: Path):
        self.folder = folder
        self.pictures: list[Found] = []
        self.tables: list[Found] = []
        self.archives: list[Found] = []
        self.metadata: list[Found] = []
        self.texts: list[Found] = []
        self.no_files: list[Found] = []  # called like a caption file
        self.links: list[str] = []
        self.visited: set[str] = set()
        self.passed_over = Tally()

    def visit(self, name: str, real: str) -> None:
        """A directory and those below it; links to directories are kept for later."""
        waiting = [(name, real)]
        while waiting:
            name, real = waiting.pop()
            if real in self.visited:
                self.passed_over.add(SEEN, name)
                continue
            self.visited.add(real)
            try:
                with os.scandir(real) as directory:
                    entries = sorted(directory, key=lambda entry: entry.name)
            except OSError as error:
                self._unlisted(name, error)
                continue
            own = _names_of_ours(Path(real), {entry.name for entry in entries}) if name else set()
            if own:
                self.passed_over.add(OWN, name)
            below = []
            for entry in entries:
                child = f"{name}/{entry.name}" if name else entry.name
                if entry.name in own:
                    continue
                if entry.name.startswith(".") or entry.name.lower() in SYSTEM_FILES:
                    self.passed_over.add(HIDDEN, child)
                    continue
                if entry.name.lower().endswith(SIDECARS[0]) and not _is_file(entry):
                    self.no_files.append(Found(child, 0))
                if entry.is_dir(follow_symlinks=False):
                    below.append((child, entry.path))
                elif entry.is_symlink() and os.path.isdir(entry.path):
                    self.links.append(child)
                else:
                    self._file(child, entry)
            waiting += reversed(below)

    def _unlisted(self, name: str, error: OSError) -> None:
        if not name:
            raise IndexBuildError(f"`images`: {self.folder} cannot be listed: {error.strerror}") from error
        self.pictures.append(Found(name, 0, f"a folder that cannot be listed: {error.strerror}"))

    def _file(self, name: str, entry: os.DirEntry) -> None:
        suffix = os.path.splitext(name)[1].lower()
        try:
            info = entry.stat()
            if not stat.S_ISREG(info.st_mode):
                self.passed_over.add(SPECIAL, name)
                return
            self._sort_in(Found(name, info.st_size, None, info.st_mtime_ns), suffix, entry.path)
        except OSError as error:
            dangling = isinstance(error, FileNotFoundError) and entry.is_symlink()
            fault = DANGLING if dangling else error.strerror or type(error).__name__
            if suffix in KIND_OF and suffix not in (*ARCHIVES, *TABLES):
                self.passed_over.add(f"{KIND_OF[suffix]}: {fault}", name)
            else:
                self.pictures.append(Found(name, 0, fault))

    def _sort_in(self, file: Found, suffix: str, path: str) -> None:
        def read() -> bytes:
            with open(path, "rb", buffering=0) as content:
                return content.read(SIGNATURE_BYTES)

        name = os.path.basename(file.name).lower()
        if suffix in TABLES:
            self.tables.append(file)
            return
        kind, fault = look(name, read)
        if kind == PICTURE:
            self.pictures.append(file._replace(fault=fault))
        elif name in METADATA:
            self.metadata.append(file)
        elif suffix in SIDECARS and kind != VECTOR:
            self.texts.append(file)
        elif (suffix in ARCHIVES and is_tar(path)) or (kind == NO_PICTURE and is_tar(path, empty=False)):
            self.archives.append(file)
        else:
            self.passed_over.add(kind, file.name)

    def captions(self) -> dict[str, Found]:
        """The caption file of each picture that has one, once all pictures are known."""
        captions = pair_captions([picture.name for picture in self.pictures], self.texts + self.no_files)
        used = {text.name for text in captions.values()}
        for text in self.texts:
            self.passed_over.add(BESIDE if text.name in used else KIND_OF[".txt"], text.name)
        return captions


def look(name: str, read: Callable[[], bytes]) -> tuple[str, str | None]:
    """What a file or a member of an archive is: (PICTURE, why it cannot be read) or (why it is none, None).

    name: in lower case; read(): its first SIGNATURE_BYTES, asked for only where the suffix does not tell.
    """
    suffix = os.path.splitext(name)[1]
    if suffix in UNREAD_SUFFIXES:
        return PICTURE, f"{suffix} is not read: {REMEDY}"
    if suffix in IMAGE_SUFFIXES:
        return PICTURE, None
    signature = read()
    if _RASTER.match(signature):
        return PICTURE, None
    if _UNREAD.match(signature):
        return PICTURE, f"a format that is not read: {REMEDY}"
    return VECTOR if _VECTOR.match(signature) else KIND_OF.get(suffix, NO_PICTURE), None


def pair_captions(pictures: list[str], texts: list[Found]) -> dict[str, Found]:
    """The caption file of each picture that has one: a.png.txt, else a.txt, for a.png, also .TXT; else
    a.caption, else a.json."""
    by_stem: dict[tuple[str, str], Found] = {}
    for text in sorted(texts, key=lambda text: (text.name.endswith(SIDECARS), text.name)):
        stem, suffix = os.path.splitext(text.name)
        by_stem[stem, suffix.lower()] = text  # of a.TXT and a.txt the latter
    captions: dict[str, Found] = {}
    for picture in pictures:
        stems = (picture, os.path.splitext(picture)[0])
        keys = ((stem, suffix) for suffix in SIDECARS for stem in stems)
        found = next((by_stem[key] for key in keys if key in by_stem), None)
        if found is not None:
            captions[picture] = found
    return captions


def _names_of_ours(directory: Path, names: set[str]) -> set[str]:
    """What in a directory belongs to an index of ours, finished or not; anything else there is looked at."""
    if MARKER in names and is_marked(directory):
        return names
    if MANIFEST in names:
        with suppress(IndexFault):
            return {MANIFEST, SKIPPED, *read_manifest(directory).files}
    return set()


def _is_file(entry: os.DirEntry) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link in a circle
        return False
