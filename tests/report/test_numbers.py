import pytest

from amg.report import Table
from amg.report.numbers import numeric_columns, share_text, table_cells
from amg.verdict import similarity_text, threshold_text


def test_similarity_and_threshold_in_the_units_people_know():
    assert similarity_text("nl2", -1.3996) == "1.400"
    assert similarity_text("nl2", -0.0) == "0.000"
    assert similarity_text("cosine", 0.51249) == "0.512"
    assert threshold_text("nl2", -1.4) == "nL2 < 1.4"
    assert threshold_text("cosine", 0.5) == "cosine > 0.5"


@pytest.mark.parametrize(
    ("count", "total", "text"),
    [
        (0, 96, "0"),
        (96, 96, "100"),
        (45, 96, "47"),
        (1, 96, "1.0"),
        (1, 1000, "0.1"),
        (999, 1000, "99.9"),
        (3, 30, "10"),
    ],
)
def test_few_is_never_written_as_none_nor_most_as_all(count, total, text):
    assert share_text(count, total) == text + "\u00a0%"


def test_share_of_nothing_is_a_dash():
    assert share_text(0, 0) == "–"


def test_cells_share_the_decimals_of_their_column():
    table = Table(
        ["n", "FID", "share", "ok"],
        [["a", 106.41, 0.4479, True], ["b", 9.1, None, False], ["c", 3, 1.0, "48 %"]],
    )
    assert table_cells(table) == [
        ["a", "106.4", "0.448", "yes"],
        ["b", "9.1", "–", "no"],
        ["c", "3", "1.000", "48 %"],
    ]
    assert numeric_columns(table) == [False, True, True, False]


def test_ragged_rows_are_refused():
    with pytest.raises(ValueError, match=r"`rows` must have 2 cells each, got 1 in row 1"):
        Table(["a", "b"], [["1", "2"], ["1"]])
