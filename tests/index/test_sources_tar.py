"""Pictures in tar archives: WebDataset shards as its own writer makes them, and the odd ones people have."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
import torch

from amg.index import Index, IndexBuildError
from amg.index.sources.listing import BESIDE, DANGLING, HIDDEN, SPECIAL
from amg.index.sources.tape import NO_END
from amg.index.sources.tar import CUT, OUT, expand_braces

pytest.importorskip("pyarrow")
PIL = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.filterwarnings("ignore:.*with fewer, its usual threshold")


def write(path: Path, members: dict, mode: str = "w") -> Path:
    """A tar of {name: bytes, or a TarInfo made ready}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def reasons(index: Index) -> dict[str, str]:
    return {entry.id: entry.reason for entry in index.manifest.skipped}


def test_shards_as_webdataset_writes_them(tmp_path, pictures, png, make):
    webdataset = pytest.importorskip("webdataset")
    pattern = str(tmp_path / "shards" / "%05d.tar")
    (tmp_path / "shards").mkdir()
    with webdataset.ShardWriter(pattern, maxcount=4, verbose=0) as writer:
        for at in range(10):
            sample = {"__key__": f"{at:09d}", "png": png(pictures[at]), "txt": f"caption {at}"}
            writer.write({**sample, "json": {"key": at, "caption": "of json"}, "cls": at % 3})
    index = make(tmp_path / "shards")
    assert torch.equal(index.rows, pictures[:10].flatten(1)) and index.manifest.skipped == ()
    assert index.captions == [f"caption {at}" for at in range(10)]
    assert index.ids[4] == index.sources[4] == "00001.tar/000000004.png"
    assert index.manifest.passed_over == {BESIDE: 10, "text or tables": 10, "class labels": 10}
    assert index.coverage == 1.0
    listed = [str(tmp_path / "shards" / f"{at:05d}.tar") for at in range(3)]
    for images in (listed, str(tmp_path / "shards" / "{00000..00002}.tar")):
        other = make(images)
        assert torch.equal(other.rows, index.rows) and other.ids == index.ids
        assert other.captions == index.captions
    alone = make(listed[1])
    assert alone.ids == index.ids[4:8] and torch.equal(alone.rows, index.rows[4:8])
    assert make(tmp_path / "shards", "caption").captions == ["of json"] * 10
    with pytest.raises(IndexBuildError, match=r"names 'prompt', which no sample .* are: caption, key, txt"):
        make(tmp_path / "shards", "prompt")


def test_captions_come_from_the_sample_in_text_or_json(tmp_path, pictures, png, make):
    members = {
        "a.png": png(pictures[0]),
        "a.TXT": b"\xef\xbb\xbfof a\n",
        "b.json": json.dumps({"text": ["of b", "again"]}).encode(),
        "b.png": png(pictures[1]),
        "c.png": png(pictures[2]),
        "c.json": b"{broken",
        "d.caption": b"of d",
        "d.png": png(pictures[3]),
        "e/f.png": png(pictures[4]),
        "e/f.txt": b"of f",
        "f.png": png(pictures[5]),
        "g.left.png": png(pictures[6]),
        "g.right.png": png(pictures[7]),
        "g.right.txt": b"right",
        "g.txt": b"both",
    }
    index = make(write(tmp_path / "x.tar", members))
    assert torch.equal(index.rows, pictures[:8].flatten(1))
    assert index.captions == ["of a", "of b", None, "of d", "of f", None, "both", "right"]
    assert index.ids[4] == "x.tar/e/f.png"


def test_members_that_lie_apart_are_still_a_sample(tmp_path, pictures, png, make):
    members = {f"{at}.png": png(pictures[at]) for at in range(3)}
    members |= {f"{at}.txt": f"caption {at}".encode() for at in (2, 0)}
    index = make(write(tmp_path / "x.tar", members))
    assert index.captions == ["caption 0", None, "caption 2"]


@pytest.mark.parametrize("suffix", ["JPG", "jpeg", "JPEG", "jfif", "img", ""])
def test_pictures_are_told_by_content_or_suffix(tmp_path, pictures, png, make, suffix):
    name = f"a/b.{suffix}" if suffix else "a/b"
    index = make(
        write(tmp_path / "x.tar", {name: png(pictures[0]), "a/b.cls": b"3", "a/b.npy": b"\x93NUMPY"})
    )
    assert torch.equal(index.rows[0], pictures[0].flatten()) and index.captions == [None]
    assert index.manifest.passed_over == {"class labels": 1, "arrays or weights": 1}


def test_two_members_of_one_key_or_one_name(tmp_path, pictures, png, make):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in [
            ("k.png", png(pictures[0])),
            ("k.bmp", png(pictures[1], "BMP")),
            ("k.txt", b"one"),
            ("l.png", png(pictures[2])),
            ("k.png", png(pictures[3])),
            ("k.txt", b"two"),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    index = make(path)
    assert torch.equal(index.rows, pictures[:4].flatten(1))
    assert index.ids == ["x.tar/k.png", "x.tar/k.bmp", "x.tar/l.png", "x.tar/k.png#2"]
    assert index.captions[:3] == ["one", "one", None] and index.captions[3] == "two"


@pytest.mark.parametrize(
    ("mode", "name"), [("w:gz", "x.tar.gz"), ("w:gz", "x.TGZ"), ("w:bz2", "x.tar"), ("w:xz", "x.txz")]
)
def test_compressed_archives(tmp_path, pictures, png, make, mode, name):
    members = {}
    for at in range(6):
        members |= {f"{at}.png": png(pictures[at]), f"{at}.txt": f"caption {at}".encode()}
    write(tmp_path / "root" / name, members, mode)
    for images in (tmp_path / "root", tmp_path / "root" / name):
        index = make(images)
        assert torch.equal(index.rows, pictures[:6].flatten(1))
        assert index.captions == [f"caption {at}" for at in range(6)]


def test_nothing_leads_out_of_an_archive(tmp_path, pictures, png, make):
    (tmp_path / "secret.png").write_bytes(png(pictures[9]))
    (tmp_path / "secret.txt").write_text("secret")
    members = {
        "../up.png": png(pictures[0]),
        "/etc/root.png": png(pictures[1]),
        "a/../../b.png": png(pictures[2]),
        "a/in.png": png(pictures[3]),
        "l1": link("same.png", "a/in.png"),
        "l2": link("hard.png", "a/in.png", tarfile.LNKTYPE),
        "l3": link("a/chain.png", "../same.png"),
        "l4": link("secret.png", "../secret.png"),
        "l5": link("absolute.png", str(tmp_path / "secret.png")),
        "l6": link("gone.png", "nowhere.png"),
        "l7": link("loop.png", "loop.png"),
        "l8": link("a/in.txt", "../../secret.txt"),
        "dev": link("device.png", "", tarfile.CHRTYPE),
    }
    path = write(tmp_path / "in" / "x.tar", members)
    before = sorted(tmp_path.rglob("*"))
    index = make(path, path=tmp_path / "i")
    assert index.ids == [f"x.tar/{name}" for name in ("up.png", "etc/root.png", "b.png", "a/in.png")]
    assert torch.equal(index.rows, pictures[:4].flatten(1)) and index.counts.tolist() == [1, 1, 1, 4]
    assert reasons(index) == {
        "x.tar/secret.png": OUT,
        "x.tar/absolute.png": OUT,
        "x.tar/gone.png": DANGLING,
        "x.tar/loop.png": DANGLING,
    }
    assert index.captions == [None] * 4 and index.manifest.passed_over[SPECIAL] == 1
    assert index.coverage == 7 / 11
    assert [
        file for file in sorted(tmp_path.rglob("*")) if tmp_path / "i" not in (file, *file.parents)
    ] == before


def test_what_the_system_leaves_in_archives_is_hidden(tmp_path, pictures, png, make):
    names = ["./._a.png", "__MACOSX/a.png", ".DS_Store", "b/.hidden.png"]
    path = write(tmp_path / "x.tar", {"./a.png": png(pictures[0]), **dict.fromkeys(names, b"\0\5\x16\7")})
    index = make(path)
    assert index.ids == ["x.tar/a.png"] and index.manifest.passed_over == {HIDDEN: 4} and index.coverage == 1


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("where", ["data", "header"])
def test_a_truncated_archive(tmp_path, pictures, png, make, where, compressed):
    members = {f"{at}.png": png(pictures[at]) for at in range(4)}
    content = write(tmp_path / "w.tar", members).read_bytes()
    with tarfile.open(tmp_path / "w.tar") as archive:
        last = archive.getmembers()[-1]
    cut = content[: last.offset_data + 40 if where == "data" else last.offset + 100]
    path = tmp_path / ("x.tar.gz" if compressed else "x.tar")
    path.write_bytes(gzip.compress(cut) if compressed else cut)
    index = make(path)
    assert torch.equal(index.rows, pictures[:3].flatten(1))
    found = reasons(index)
    assert found.pop(path.name).startswith("the archive is damaged or cut short after byte")
    assert found == ({f"{path.name}/3.png": CUT} if where == "data" else {})
    assert index.coverage == 3 / (5 if where == "data" else 4)


def test_a_gzip_stream_that_ends_early(tmp_path, pictures, png, make):
    members = {f"{at}.png": png(pictures[at]) for at in range(40)}
    whole = write(tmp_path / "w.tgz", members, "w:gz").read_bytes()
    (tmp_path / "x.tgz").write_bytes(whole[: len(whole) // 2])
    index = make(tmp_path / "x.tgz")
    assert 5 < index.count < 40 and torch.equal(index.rows, pictures[: index.count].flatten(1))
    assert "x.tgz" in reasons(index) and index.coverage < 1
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 40] = b"\xff" * 40
    (tmp_path / "y.tgz").write_bytes(bytes(damaged))
    assert make(tmp_path / "y.tgz").coverage < 1


def test_damage_in_the_middle_is_said(tmp_path, pictures, png, make):
    content = bytearray(
        write(tmp_path / "x.tar", {f"{at}.png": png(pictures[at]) for at in range(4)}).read_bytes()
    )
    with tarfile.open(tmp_path / "x.tar") as archive:
        at = archive.getmembers()[2].offset
    content[at : at + 512] = b"\xff" * 512
    (tmp_path / "x.tar").write_bytes(bytes(content))
    index = make(tmp_path / "x.tar")
    assert index.count == 2 and reasons(index) == {
        "x.tar": f"the archive is damaged or cut short after byte {at:,}"
    }


def test_archives_that_were_joined_are_read_on(tmp_path, pictures, png, make):
    parts = [write(tmp_path / f"{at}.tar", {f"{at}.png": png(pictures[at])}).read_bytes() for at in range(3)]
    (tmp_path / "all.tar").write_bytes(b"".join(parts))
    index = make(tmp_path / "all.tar")
    assert torch.equal(index.rows, pictures[:3].flatten(1)) and index.coverage == 1


def test_an_archive_without_an_end_mark(tmp_path, pictures, png, make):
    content = write(tmp_path / "x.tar", {"a.png": png(pictures[0])}).read_bytes()
    (tmp_path / "x.tar").write_bytes(content.rstrip(b"\0") + b"\0" * (-len(content.rstrip(b"\0")) % 512))
    index = make(tmp_path / "x.tar")
    assert index.count == 1 and index.manifest.passed_over == {NO_END: 1}


def test_empty_shards_and_what_is_no_archive(tmp_path, pictures, png, make):
    root = tmp_path / "root"
    write(root / "0.tar", {})
    write(root / "1.tar", {"a.png": png(pictures[0]), "b/": link("b", "", tarfile.DIRTYPE)})
    (root / "2.tar").write_bytes(b"")
    (root / "3.tar").write_bytes(b"no archive" * 100)
    write(root / "4.tar", {"only.txt": b"text"})
    index = make(root)
    assert index.ids == ["1.tar/a.png"] and index.coverage == 1
    assert index.manifest.passed_over == {"archives, not opened": 2, "text or tables": 1}
    with pytest.raises(IndexBuildError, match="`images` is empty"):
        make(root / "0.tar")


def test_a_picture_that_is_damaged_is_skipped_and_the_archive_read_on(tmp_path, pictures, png, make):
    whole = png(pictures[1])
    path = write(
        tmp_path / "x.tar",
        {"0.png": png(pictures[0]), "1.png": whole[:60], "2.png": png(pictures[2]), "3.heic": b"?"},
    )
    index = make(path)
    assert index.ids == ["x.tar/0.png", "x.tar/2.png"] and index.coverage == 0.5
    assert [entry.position for entry in index.manifest.skipped] == [1, 3]
    with pytest.raises(IndexBuildError, match=r"x\.tar/1\.png cannot be read"):
        make(path, on_error="raise")


def test_archives_are_told_by_content_and_dangling_ones_are_skipped(tmp_path, folder, pictures, png, make):
    write(folder / "shard", {"9.png": png(pictures[9])})
    write(folder / "shard.dat", {"8.png": png(pictures[8])}, "w:gz")
    (folder / "zeros").write_bytes(bytes(2048))
    (folder / "gone.tar").symlink_to("nowhere.tar")
    index = make(folder)
    assert index.ids[6:] == ["shard/9.png", "shard.dat/8.png"] and index.coverage == 8 / 9
    assert reasons(index) == {"gone.tar": DANGLING} and index.manifest.passed_over["no picture"] == 1


def test_pictures_and_archives_in_one_folder(tmp_path, folder, pictures, png, make):
    write(folder / "more.tar", {"9.png": png(pictures[9])})
    index = make(folder)
    assert index.ids[:1] == ["a/0.png"] and index.ids[-1] == "more.tar/9.png" and index.count == 7


def test_metadata_within_an_archive(tmp_path, pictures, png, make):
    lines = [{"file_name": "0.png", "text": "zero"}, {"file_name": "gone.png", "text": "lost"}]
    members = {"train/metadata.jsonl": "\n".join(map(json.dumps, lines)).encode()}
    members |= {f"train/{at}.png": png(pictures[at]) for at in range(2)}
    index = make(write(tmp_path / "x.tar", members))
    assert index.captions == ["zero", None]
    assert reasons(index) == {"x.tar/train/gone.png": "named in metadata.jsonl, not there"}


@pytest.mark.parametrize("suffix", ["tar", "tgz"])
def test_an_interrupted_build_of_shards_resumes_to_the_same_bytes(
    tmp_path, pictures, png, interrupted_twice, suffix
):
    for shard in range(4):
        members = {}
        for at in range(3 * shard, 3 * shard + 3):
            members |= {f"{at}.png": png(pictures[at]), f"{at}.txt": f"caption {at}".encode()}
        members["bad.png"] = b"?"
        write(tmp_path / "root" / f"{shard}.{suffix}", members, "w:gz" if suffix == "tgz" else "w")
    index = interrupted_twice(lambda: tmp_path / "root", tmp_path)
    assert torch.equal(index.rows, pictures[:12].flatten(1)) and index.coverage == 12 / 16
    assert index.captions == [f"caption {at}" for at in range(12)]
    assert index.manifest.passed_over == {BESIDE: 12}


def test_a_shard_that_was_edited_is_not_resumed_over(tmp_path, pictures, png, monkeypatch):
    import amg.index.journal as journal

    monkeypatch.setattr("amg.index.plan.SHARD_IMAGES", 4)
    path = write(tmp_path / "x.tar", {f"{at}.bmp": png(pictures[at], "BMP") for at in range(12)})
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "_advance", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Index.build(path, path=tmp_path / "i", progress=False, batch_size=2)
    commit = journal.Journal.commit

    def stopping(self, *arguments):
        commit(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "commit", stopping)
        with pytest.raises(KeyboardInterrupt):
            Index.build(path, path=tmp_path / "i", progress=False, batch_size=2)
    write(path, {f"{at}.bmp": png(pictures[at + 1], "BMP") for at in range(12)})
    with pytest.raises(IndexBuildError, match="unfinished build with a different images:"):
        Index.build(path, path=tmp_path / "i", progress=False, batch_size=2)


def test_braces():
    assert expand_braces("a/{008..011}.tar") == ["a/008.tar", "a/009.tar", "a/010.tar", "a/011.tar"]
    assert expand_braces("{a,b}/{0..1}.tar") == ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]
    assert expand_braces("a{b.tar") == ["a{b.tar"] and expand_braces("{x}.tar") == ["{x}.tar"]


def test_a_brace_pattern_with_a_gap_is_refused(tmp_path, pictures, png, make):
    for at in (0, 2):
        write(tmp_path / f"{at}.tar", {"a.png": png(pictures[at])})
    with pytest.raises(IndexBuildError, match=r"does not exist: .*1\.tar \(and 1 more of the 4"):
        make(str(tmp_path / "{0..3}.tar"))
    named = tmp_path / "odd{0..1}"
    write(named / "0.tar", {"a.png": png(pictures[0])})
    assert make(str(named)).count == 1, "a folder that is called like a pattern is a folder"
