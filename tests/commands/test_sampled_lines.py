"""A line of `amg sample`'s verdicts that was changed is not believed: its picture is sampled again."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest

from amg.commands import sampled
from amg.commands.fingerprint import sealed, unsealed
from amg.verdict import Neighbour, Verdict

Image = pytest.importorskip("PIL.Image")
JOBS = [{"seed": seed, "prompt": f"cat {seed}", "class": None} for seed in range(4)]


def verdict(seed):
    return Verdict("cosine", 0.1, 0.5, Neighbour(seed, "a", None), False)


def keep(folder, seed):
    sampled.keep(folder, JOBS[seed], Image.new("RGB", (8, 8), (seed, 0, 0)), verdict(seed))


def edited(**changes):
    """An edit of a record by somebody who leaves its digest as it was."""

    def edit(line):
        record = json.loads(line)
        for name, value in changes.items():
            part = record["verdict"] if name in record["verdict"] else record
            part[name] = value
        return json.dumps(record).encode() + b"\n"

    return edit


def resealed(**changes):
    """The same with a digest that holds: what the digest cannot tell is found by itself."""
    return lambda line: sealed(
        {key: value for key, value in json.loads(edited(**changes)(line)).items() if key != "digest"}
    ).encode()


DAMAGES = {
    "memorized": edited(memorized=True),
    "similarity": edited(similarity=0.05),
    "nsfw": edited(nsfw=True),
    "prompt": edited(prompt="another"),
    "one byte": lambda line: line.replace(b"cosine", b"cosinE"),
    "a second value": lambda line: line.replace(b'"rewinds": 0', b'"rewinds": 0, "rewinds": 3'),
    "no digest": lambda line: line[: line.index(b', "digest"')] + b"}\n",
    "nested": lambda line: b"[" * 100_000 + b"\n",
    "nested and sealed": lambda line: sealed_bytes(b'{"seed": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "another's file": resealed(file="000000.png"),
    "a file elsewhere": resealed(file="../000001.png"),
    "another prompt": resealed(prompt="cat 0"),
    "another class": resealed(**{"class": 3}),
    "rewinds": resealed(rewinds=None),
    "rewinds as text": resealed(rewinds="x"),
    "neighbour": resealed(neighbour=3),
    "guard": resealed(guard=[]),
    "also": resealed(also=5),
    "verdict": lambda line: sealed({**unsealed(line), "verdict": "x"}).encode(),
    "no verdict": lambda line: sealed(
        {key: value for key, value in unsealed(line).items() if key != "verdict"}
    ).encode(),
    "nsfw of another type": resealed(nsfw=1),
    "seed": resealed(seed=[]),
}


def sealed_bytes(body):
    return body[:-1] + f', "digest": "{hashlib.sha256(body).hexdigest()}"}}\n'.encode()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_line_that_was_changed_is_sampled_again(tmp_path, damage):
    for seed in range(3):
        keep(tmp_path, seed)
    path = tmp_path / "verdicts.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    changed = DAMAGES[damage](whole[1])
    assert changed != whole[1] and changed.endswith(b"\n")
    path.write_bytes(whole[0] + changed + whole[2])
    assert list(sampled.take_up(tmp_path, JOBS)) == [0, 2]
    assert path.read_bytes() == whole[0] + whole[2] and not (tmp_path / "000001.png").exists()
    keep(tmp_path, 1)
    assert sampled.take_up(tmp_path, JOBS)[1] == (verdict(1), None)


def test_a_line_that_names_another_seed_s_picture_is_sampled_again(tmp_path):
    keep(tmp_path, 0)
    line = json.loads((tmp_path / "verdicts.jsonl").read_bytes())
    shutil.copy(tmp_path / "000000.png", tmp_path / "000001.png")
    with (tmp_path / "verdicts.jsonl").open("a") as file:
        file.write(json.dumps({**line, "seed": 1, "prompt": "cat 1"}) + "\n")
    assert list(sampled.take_up(tmp_path, JOBS)) == [0]
    assert not (tmp_path / "000001.png").exists()
