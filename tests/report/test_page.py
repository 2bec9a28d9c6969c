import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from amg.report import Table, write
from amg.report.page import render

VOID = {"meta", "link", "img", "input", "br"}


class Page(HTMLParser):
    """Checks that tags nest, and keeps tags, texts and script bodies."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text, self.scripts, self.ids = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if "id" in dict(attributes):
            self.ids.append(dict(attributes)["id"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        (self.scripts if self.open and self.open[-1] in ("script", "style") else self.text).append(text)

    def words(self):
        return re.sub(r"[ \n]+", " ", " ".join(self.text))

    def data(self):
        (text,) = [s for s in self.scripts if s.lstrip().startswith("{")]
        return json.loads(text)


def test_page_is_well_formed_and_its_pictures_have_texts(make):
    page = Page(render(make.report()))
    assert len(page.ids) == len(set(page.ids))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == (8 + 1) * 3
    assert all(image["alt"] for image in images)
    assert all(attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg")


def test_nothing_points_outside_the_file(make):
    text = render(make.report())
    page = Page(text)
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
            assert re.match(r"data:|#|$", attributes.get(name, "")), attributes
    assert not re.search(r"url\(\s*['\"]?(?!data:)|@import|\bimport\s*\(|fetch\(|XMLHttpRequest", text)
    assert "default-src 'none'" in text


def test_every_data_uri_is_a_png_and_every_picture_is_there_once(make):
    text = render(make.report())
    uris = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", text)
    assert len(uris) == len(set(uris)) == 8 * 3 + 4  # images and guided neighbours, four baseline neighbours
    for uri in uris:
        assert Image.open(io.BytesIO(base64.b64decode(uri, validate=True))).size == (32, 32)


def test_pictures_are_found_by_number(make):
    page = Page(render(make.report()))
    data, ids = page.data(), set(page.ids)
    numbers = [int(a["data-picture"]) for _, a in page.tags if "data-picture" in a]
    for sample in data["sections"][0]["samples"]:
        numbers += [panel[name] for panel in sample["panels"] for name in ("picture", "nearest")]
    assert numbers
    assert all((str(n) in data["pictures"]) != (f"picture-{n}" in ids) for n in numbers)


def test_numbers_shown_are_those_given(make):
    samples = [make.sample(n, value) for n, value in enumerate((0.9, 0.612, 0.2, 0.4999))]
    samples.append(make.sample(4, 0.7, guided=make.verdict(0.55, retries=3, blocked=True)))
    words = Page(render(make.report(make.section(samples)))).words()
    for value in ("0.900", "0.612", "0.200", "0.500", "0.550", "0.300"):
        assert f"cos {value}" in words
    assert "60\u00a0% 3 of 5; closest 0.900" in words
    assert "0\u00a0% 0 of 5; closest 0.300; 4 rewound; 1 resampled; 1 blocked" in words
    assert "With “off”, 60\u00a0% of the pictures are memorised training images; with main 0\u00a0%." in words
    assert "resampled ×3" in words
    assert "100–104" in words  # seeds
    assert "main.rewind.checkpoints 28, 40" in words
    assert "amg demo --seed 0" in words


def test_nl2_is_shown_as_a_distance_with_the_threshold_of_each_column(make):
    verdicts = make.verdict(-0.512, "nl2", -1.4), make.verdict(-1.655, "nl2", -1.6)
    sample = make.sample(0, 0.9)
    object.__setattr__(sample, "verdicts", dict(zip(make.columns, verdicts, strict=True)))
    words = Page(
        render(make.report(make.section([sample], metric="nl2", thresholds={"memorised": -1.4})))
    ).words()
    assert "nL2 0.512" in words and "nL2 1.655" in words
    assert "-0.512" not in words
    assert "closest 1.655; judged at nL2 < 1.6" in words


def test_table_and_notes_are_shown(make):
    table = Table(["guidance", "FID"], [["off", 71.25], ["main", 70.5]], ["FID: photos-embedder."])
    page = Page(render(make.report(make.section(table=table))))
    assert "off 71.25 main 70.50" in page.words()
    assert "FID: photos-embedder." in page.words()


def test_what_is_given_cannot_break_out(make):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'"
    sample = make.sample(0, 0.9, kind=evil, prompt=evil)
    given = make.section(
        [sample], title=evil, model=evil, description=evil, table=Table([evil], [[evil]], [evil])
    )
    text = render(
        make.report(given, title=evil, command=evil, configuration={evil: evil}, versions={evil: evil})
    )
    page = Page(text)
    assert sum(tag == "script" for tag, _ in page.tags) == 2
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert page.data()["sections"][0]["samples"][0]["title"] == evil
    assert "<script>alert" not in text


def test_a_section_without_samples_or_table_still_makes_a_page(make):
    assert "tables only" in Page(render(make.report(make.section([], table=None)))).words()


def test_a_sample_without_verdict_or_a_verdict_without_number_is_refused(make):
    with pytest.raises(ValueError, match=r"image and a verdict per column, 0 lacks \['strong'\]"):
        make.section([make.sample(0, 0.9)], columns=("off", "main", "strong"))
    with pytest.raises(ValueError):
        render(make.report(make.section([make.sample(0, float("nan"))])))


def test_write_makes_index_in_a_folder_and_leaves_nothing_else(make, tmp_path):
    path = write(make.report(), tmp_path / "deep" / "report")
    assert path == tmp_path / "deep" / "report" / "index.html"
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in path.parent.iterdir()] == ["index.html"]
    assert write(make.report(), tmp_path / "page.html") == tmp_path / "page.html"


def test_a_failed_report_leaves_the_old_one(make, tmp_path):
    path = write(make.report(), tmp_path)
    before = path.read_bytes()
    with pytest.raises(ValueError):
        write(make.report(make.section([make.sample(0, float("nan"))])), tmp_path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_two_hundred_samples_stay_under_eight_megabytes(make):
    samples = [make.sample(n, 0.9 if n % 2 else 0.2) for n in range(200)]
    many = {f"column {c}": c for c in range(4)}
    for n, sample in enumerate(samples):
        images = {name: make.image(10 * n + c, 32) for name, c in many.items()}
        object.__setattr__(sample, "images", images)
        verdicts = {name: make.verdict(0.3, trace=make.trace(0.3, c > 1)) for name, c in many.items()}
        object.__setattr__(sample, "verdicts", verdicts)
        object.__setattr__(sample, "nearest", {name: make.image(50_000 + n % 16) for name in many})
    section = make.section(samples, columns=tuple(many), judges={})
    assert len(render(make.report(section)).encode()) < 8e6
