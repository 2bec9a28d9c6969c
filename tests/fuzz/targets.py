"""What reads files, each with a valid one to start from, and what may come of another."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amg.index import Index
from amg.index.errors import IndexFault

QUERIES = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))


class Embedder:
    """Means of 2x2 blocks."""

    name, dimension, sha, preprocessing = "means", 12, "c" * 64, "none"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, (2, 2)).flatten(1) - 0.3


@dataclass(frozen=True)
class Target:
    """`make(folder)` writes valid files -> the one that is changed; `read(folder)` gives what a user would
    see of it, or raises one of `errors`. same: any other answer than the valid file's is wrong."""

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    errors: tuple[type[Exception], ...] = (ValueError,)
    same: bool = False


def pictures(count: int = 70) -> torch.Tensor:
    drawn = torch.randint(
        0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    near = drawn[:4].clone()
    near[:, 0, 0, 0] += 1
    return torch.cat([drawn, near, drawn[5:7]])


def build(folder: Path) -> Index:
    shown = pictures()
    captions = [f"caption {number % 3}" for number in range(len(shown))]
    return Index.build(shown, captions, Embedder(), folder / "i", progress=False)


def _file_of_an_index(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        build(folder)
        return folder / "i" / name

    return make


def read_index(folder: Path) -> Any:
    """All that an index answers, once its files were found to be its own."""
    index = Index.open(folder / "i", Embedder())
    index.seal.check()
    index.verify()
    found = index.nearest(QUERIES)
    return found.row.tolist(), found.similarity.tolist(), index.ids, index.captions, index.counts.tolist()


def read_index_at_once(folder: Path) -> Any:
    """The same without a look at hashes: answers may be wrong, errors may not be strange."""
    index = Index.open(folder / "i", Embedder())
    index.closest(pictures(3)[:2].float() / 255)
    index.nearest(QUERIES)
    return len(index.ids), len(index.captions), repr(index)


def _stopped(name: str) -> Callable[[Path], Path]:
    """A build that was stopped after three of its five shards."""

    def make(folder: Path) -> Path:
        import amg.index.journal as journal
        import amg.index.plan as plan

        commit, size = journal.Journal.commit, plan.SHARD_IMAGES

        def stopping(self: Any, *arguments: Any) -> None:
            commit(self, *arguments)
            if self.state.shards == 3:
                raise KeyboardInterrupt

        plan.SHARD_IMAGES, journal.Journal.commit = 16, stopping  # type: ignore[method-assign]
        try:
            _build_small(folder)
        except KeyboardInterrupt:
            pass
        finally:
            plan.SHARD_IMAGES, journal.Journal.commit = size, commit  # type: ignore[method-assign]
        return folder / "i.partial" / name

    return make


def _build_small(folder: Path) -> Index:
    return Index.build(pictures(), None, Embedder(), folder / "i", progress=False, batch_size=16)


def read_resumed(folder: Path) -> Any:
    """A build that goes on where the stopped one was: the whole one, or an error."""
    import shutil

    import amg.index.plan as plan

    size, plan.SHARD_IMAGES = plan.SHARD_IMAGES, 16
    shutil.copytree(folder / "i.partial", folder / "kept")
    try:
        index = _build_small(folder)
        return index.rows.tolist(), index.ids
    finally:
        plan.SHARD_IMAGES = size
        for left in ("i", "i.partial"):
            shutil.rmtree(folder / left, ignore_errors=True)
        (folder / "kept").rename(folder / "i.partial")


def _captions(name: str, content: str) -> Target:
    def make(folder: Path) -> Path:
        (folder / name).write_text(content, encoding="utf-8")
        return folder / name

    def read(folder: Path) -> Any:
        import shutil

        try:
            made = Index.build(
                pictures(3)[:3], folder / name, path=folder / "i", ids=["a", "b", "c"], progress=False
            )
            return made.captions
        finally:
            shutil.rmtree(folder / "i", ignore_errors=True)

    return Target(make, read, (IndexFault,))


def _calibration(folder: Path) -> Path:
    from ..guidance.test_gate import written

    return written(folder / "c.json")


def _read_calibration(folder: Path) -> Any:
    from amg.guidance.gate import Gate

    gate = Gate.load(folder / "c.json")
    return gate.rules, gate.ordinary


def _student(folder: Path) -> Path:
    from amg.embed.student import LIMITS, Agreement, Origin, Student, save_student

    torch.manual_seed(0)
    origin = Origin("teacher", "a" * 64, 12, 4, "b" * 64)
    rates = (0.1,) * len(LIMITS)
    agreement = [Agreement(0.0, 1.0, 9, 0.9, 0.9, 0.9, rates, rates)]
    save_student(Student(origin, width=8, blocks=1, agreement=agreement), folder / "s.safetensors", {})
    return folder / "s.safetensors"


def _read_student(folder: Path) -> Any:
    from amg.embed.student import load_student

    student = load_student(folder / "s.safetensors")
    return student.width, student.cut(0.5, 0.4), student(torch.zeros(1, student.origin.channels, 4, 4)).shape


def _prompts(name: str, content: str) -> Target:
    def make(folder: Path) -> Path:
        (folder / name).write_text(content, encoding="utf-8")
        return folder / name

    def read(folder: Path) -> Any:
        from amg.guidance.prompts import read_prompts

        return read_prompts(folder / name)

    return Target(make, read)


def _model_index(folder: Path) -> Path:
    record = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (folder / "model_index.json").write_text(json.dumps(record))
    return folder / "model_index.json"


def _read_model_index(folder: Path) -> Any:
    from amg.pipelines.supported import read_model_index

    return read_model_index(folder)


def _pictures_of(name: str, save: Callable[[Path], None]) -> Target:
    """A source of pictures: whatever can be read of it is indexed, the rest is skipped or refused."""

    def make(folder: Path) -> Path:
        save(folder / name)
        return folder / name

    def read(folder: Path) -> Any:
        import shutil

        try:
            index = Index.build(folder / name, path=folder / "i", size=8, progress=False)
            return index.count, index.captions
        finally:
            shutil.rmtree(folder / "i", ignore_errors=True)

    return Target(make, read, (IndexFault,))


def _save_tar(path: Path) -> None:
    import io
    import tarfile

    with tarfile.open(path, "w") as archive:
        for number, content in enumerate(_pngs()):
            for name, data in ((f"{number}.png", content), (f"{number}.txt", b"text")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def _pngs() -> list[bytes]:
    import io

    from PIL import Image

    found = []
    for picture in pictures(3)[:3]:
        content = io.BytesIO()
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(content, "PNG")
        found.append(content.getvalue())
    return found


def _save_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"image": _pngs(), "text": ["a", "b", "c"]})
    pyarrow.parquet.write_table(table, path)


def _save_arrow(path: Path) -> None:
    import pyarrow

    table = pyarrow.table({"image": _pngs(), "text": ["a", "b", "c"]})
    with pyarrow.ipc.new_stream(str(path), table.schema) as out:
        out.write_table(table)


def _save_npy(path: Path) -> None:
    import numpy

    numpy.save(path, pictures(3)[:3].permute(0, 2, 3, 1).numpy())


def _save_folder(path: Path) -> None:
    path.mkdir()
    for number, content in enumerate(_pngs()):
        (path / f"{number}.png").write_bytes(content)


def _png_of_a_folder(folder: Path) -> Path:
    _save_folder(folder / "pictures")
    return folder / "pictures" / "1.png"


def _metadata_of_a_folder(folder: Path) -> Path:
    _save_folder(folder / "pictures")
    lines = [{"file_name": f"{number}.png", "text": f"t{number}"} for number in range(3)]
    path = folder / "pictures" / "metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _read_folder(folder: Path) -> Any:
    import shutil

    try:
        index = Index.build(folder / "pictures", path=folder / "i", size=8, progress=False)
        return index.count, index.captions
    finally:
        shutil.rmtree(folder / "i", ignore_errors=True)


def quietly(read: Callable[[Path], Any], folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read(folder)


OF_AN_INDEX = (
    *("manifest.json", "rows.f16", "codes.i8", "codes.scales.f32", "codes.errors.f32", "codes.squares.i32"),
    *("meta.parquet", "pictures.parquet", "guard.f16", "members.f16", "members.rows.i64"),
)
TARGETS = {
    **{name: Target(_file_of_an_index(name), read_index, (IndexFault,), same=True) for name in OF_AN_INDEX},
    **{
        f"{name}, unsealed": Target(_file_of_an_index(name), read_index_at_once, (IndexFault,))
        for name in OF_AN_INDEX
    },
    **{
        f"stopped: {name}": Target(_stopped(name), read_resumed, (IndexFault,), same=True)
        for name in ("state.json", ".amg-unfinished.json", "shards/0000001.parquet", "members.rows.i64")
    },
    "captions.jsonl": _captions(
        "captions.jsonl", "".join(f'{{"id": "{one}", "caption": "x {one}"}}\n' for one in "abc")
    ),
    "captions.json": _captions("captions.json", '{"a": "x", "b": "y", "c": "z"}'),
    "captions.csv": _captions("captions.csv", "id,caption\na,x\nb,y\nc,z\n"),
    "calibration": Target(_calibration, _read_calibration),
    "student": Target(_student, _read_student),
    "prompts.txt": _prompts("prompts.txt", "a cat\na dog\n"),
    "prompts.jsonl": _prompts("prompts.jsonl", '{"caption": "a cat"}\n{"caption": "a dog"}\n'),
    "model_index.json": Target(_model_index, _read_model_index),
    "pictures.tar": _pictures_of("pictures.tar", _save_tar),
    "train.parquet": _pictures_of("train.parquet", _save_parquet),
    "train.arrow": _pictures_of("train.arrow", _save_arrow),
    "train.npy": _pictures_of("train.npy", _save_npy),
    "a picture": Target(_png_of_a_folder, _read_folder, (IndexFault,)),
    "metadata.jsonl": Target(_metadata_of_a_folder, _read_folder, (IndexFault,)),
}
