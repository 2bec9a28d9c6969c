from amg.report import Table, table_text


def test_columns_are_aligned_and_numbers_stand_to_the_right():
    table = Table(
        ["guidance", "FID", "Top1"], [["off", 106.41, 0.93], ["released", 99.0, None]], ["FID: named."]
    )
    assert table_text(table).split("\n") == [
        "guidance    FID   Top1",
        "────────  ─────  ─────",
        "off       106.4  0.930",
        "released   99.0      –",
        "FID: named.",
    ]


def test_wide_characters_and_control_characters_do_not_shift_columns():
    text = table_text(Table(["名前", "n"], [["a\nb\x1b[31m", 1], ["写真", 22]]))
    assert "\x1b" not in text
    assert text.split("\n") == ["名前       n", "────────  ──", "a b [31m   1", "写真      22"]
