"""What an audit draws: prompt files, guidances, seeds."""

from __future__ import annotations

import json

import pytest

from amg.commands.audit.plan import Prompt, make_guidances, make_jobs, read_prompts


def test_prompts_of_jsonl_and_text(tmp_path):
    path = tmp_path / "prompts.jsonl"
    record = {"caption": "Ann Graham Lotz", "index": 0, "url": "https://a.example/1.jpg", "hash": "x"}
    path.write_text(json.dumps(record) + "\n\n" + '{"caption": "b", "kind": "ordinary"}\na plain line \n')
    assert read_prompts(path) == (
        Prompt("Ann Graham Lotz", "prompt", 0, "https://a.example/1.jpg"),
        Prompt("b", "ordinary"),
        Prompt("a plain line"),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('a\n{"caption": 3}', "prompts.txt:2 must have a `caption`"),
        ('{"caption": null}', "prompts.txt:1 must have a `caption`"),
        ("{broken", "prompts.txt:1 is not JSON"),
        ('{"caption": ' + "[" * 100_000, "prompts.txt:1 is not JSON"),
        ("\n\n", "at least one prompt"),
    ],
)
def test_bad_prompts_are_named_with_their_line(tmp_path, text, message):
    path = tmp_path / "prompts.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


def test_seeds_count_through_all_prompts():
    jobs = make_jobs([Prompt("a"), Prompt("b")], 3, 100)
    assert [(job.number, job.prompt.caption, job.prompt_number, job.seed) for job in jobs] == [
        (0, "a", 0, 100),
        (1, "a", 0, 101),
        (2, "a", 0, 102),
        (3, "b", 1, 103),
        (4, "b", 1, 104),
        (5, "b", 1, 105),
    ]


def test_guidances_by_name_and_from_files(tmp_path):
    path = tmp_path / "gentle.json"
    path.write_text(json.dumps({"preset_name": "strong", "c3": 0.25, "rewind_at": [0.3, 0.6]}))
    names = [guidance.name for guidance in make_guidances((), (), "nl2", 2.0)]
    assert names == ["off", "main", "strong"]
    released, gentle = make_guidances(["released"], [path], "cosine", 4.0)
    assert released.config.on_memorized == "flag" and released.config.guidance_scale == 4.0
    assert (gentle.name, gentle.config.preset_name, gentle.config.c3) == ("gentle", "strong", 0.25)
    assert gentle.config.rewind_at == (0.3, 0.6) and gentle.config.threshold == 0.4


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("mine.json", '{"c4": 1}', "'c4', which is no field"),
        ("mine.json", "[1]", "must hold one object"),
        ("mine.json", '{"on_memorized": "raise"}', "must not be 'raise'"),
        ("mine.json", "{", "must be a JSON file"),
        ("mine.json", "[" * 100_000, r"must be a JSON file, got .*mine.json \(maximum recursion"),
        ("report.json", "{}", "must not be named report.json"),
        ("main.json", "{}", "got 'main' twice"),
    ],
)
def test_bad_guidances(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        make_guidances(["main"], [path], "cosine", 7.5)
    with pytest.raises(ValueError, match="`--guidance` must be one of"):
        make_guidances(["mild"], [], "cosine", 7.5)
