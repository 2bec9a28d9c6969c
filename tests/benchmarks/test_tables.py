"""Every table of README.md and docs/ is what its CSV makes it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tables():
    """benchmarks/tables.py, with its folder importable meanwhile."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("tables")
    sys.path.remove(str(ROOT / "benchmarks"))


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_section_is_what_its_csv_makes_it(tables, page):
    text = page.read_text(encoding="utf-8")
    assert tables.filled(text) == text, f"{page.name} is out of date: make tables"


def test_every_page_is_looked_at_and_every_marker_has_a_generator(tables):
    assert tables.pages() == PAGES
    used = {name for page in PAGES for name in tables.BEGIN.findall(page.read_text(encoding="utf-8"))}
    assert (
        {"figures", "sampler figures", "demo photos-ddpm", "demo photos-sd"} <= used <= set(tables.SECTIONS)
    )


def test_a_changed_figure_shows(tables):
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    line = next(line for line in page.splitlines() if line.startswith("| top1_cosine"))
    assert tables.filled(page.replace(line, line.replace("|", "| 9", 1), 1)) == page


def test_sections_are_replaced_and_the_rest_is_kept(tables):
    one, two = (
        ("<!-- one: begin -->\n", "<!-- one: end -->"),
        ("<!-- two x: begin -->\n", "<!-- two x: end -->"),
    )
    page = "a\n{one[0]}{first}{one[1]}\nb\n{two[0]}{second}{two[1]}\n"
    old = page.format(one=one, two=two, first="old\n\nmore\n", second="")
    new = page.format(one=one, two=two, first="| new |\n", second="2\n")
    sections = {"one": lambda: "| new |\n", "two x": lambda: "2"}
    assert tables.filled(old, sections) == new
    assert tables.filled(new, sections) == new


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- other: begin -->\n<!-- other: end -->\n", "no table is made for this marker"),
        ("<!-- one: begin -->\n", "must have an end marker"),
    ],
)
def test_markers_without_a_generator_or_an_end_are_refused(tables, text, message):
    with pytest.raises(ValueError, match=message):
        tables.filled(text, {"one": lambda: ""})


def test_the_demos_rows_are_rounded_as_on_its_page(tables, tmp_path, monkeypatch):
    heads = "model,guidance,memorised %,FID,evaluations/image,s/image,images\n"
    rows = "m,off,34.375,305.4981,52.5,0.15678,64\nm,main,0,97.25,106.921,0.3,64\nn,off,1,2,3,4,64\n"
    (tmp_path / "demo.csv").write_text(heads + rows)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.demo("m").splitlines() == [
        "| guidance | memorised % | FID | evaluations | s/image |",
        "|---|---|---|---|---|",
        "| off | 34.38 | 305.5 | 52.5 | 0.16 |",
        "| main | 0.00 | 97.2 | 106.9 | 0.30 |",
    ]


def test_what_the_demo_writes_is_what_its_table_shows(tables, tmp_path, monkeypatch):
    pytest.importorskip("skimage")
    from amg.commands.demo import COLUMN_NAMES, _write_figures
    from amg.report import Section, Table

    def section(model, guidances):
        rows = [[name, *(n + 0.123456 for n in range(len(COLUMN_NAMES) - 1))] for name in guidances]
        table = Table(COLUMN_NAMES, rows)
        return Section(model, model, "", "nl2", {"memorised": -1.4}, guidances, [], table)

    sections = [section("m", ["off", "main"]), section("n", ["off"])]
    _write_figures(tmp_path / "demo.csv", sections[:1], {"images": 4})
    _write_figures(tmp_path / "demo.csv", sections, {"images": 4, "steps": 30, "first seed": 0})
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    head, _, *rows = tables.demo("m").splitlines()
    assert head.count("|") == len(COLUMN_NAMES) + 1 and len(rows) == 2
    assert [cell.strip() for cell in rows[1].split("|")[1:4]] == ["main", "0.123", "1.123"]
    assert len(tables.demo("n").splitlines()) == 3
    lines = (tmp_path / "demo.csv").read_text().splitlines()
    assert len(lines) == 4 and ",images,steps,first seed,date,amg,commit,torch," in lines[0]


def test_without_figures_a_section_says_so(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.demo("m") == tables.audit() == tables.by("detection", "gone.csv")() == tables.charts.NOTHING
