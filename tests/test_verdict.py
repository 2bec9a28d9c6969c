"""A verdict that is read back is one: every field is there and of its type, or the error names it."""

from __future__ import annotations

import json

import pytest

from amg.verdict import GuardVerdict, Neighbour, TraceStep, Verdict

NEAR = Neighbour(3, "a", "a cat")
OTHER = Verdict("nl2", -1, 0, Neighbour(1, "b", None), False)  # whole numbers are numbers
STEPS = (
    TraceStep(0, 0.9, None, 0.5, None),
    TraceStep(1, 0.1, 0.3, 0.5, 7, ("rewind",), (1.0, float("-inf")), True),
)
VERDICT = Verdict(
    "cosine", 0.6, 0.5, NEAR, True, 1, 2, False, 40, STEPS, (OTHER,), GuardVerdict(0.9, 0.8, NEAR)
)


def described():
    return json.loads(json.dumps(VERDICT.as_dict()))


def test_a_verdict_comes_back_as_it_was():
    assert Verdict.from_dict(described()) == Verdict.from_dict(VERDICT.as_dict()) == VERDICT
    earlier = {name: value for name, value in described().items() if name != "guard"}
    assert Verdict.from_dict(earlier).guard is None


def test_a_verdict_is_one_line_to_read_and_its_repr_leaves_the_trace_out():
    said = str(VERDICT)
    assert said == "memorised: cosine 0.600 > 0.5 to 'a'; 1 rewind; 2 re-runs; 40 evaluations"
    pixels = Verdict("nl2", -1.712, -1.4, NEAR, False, guard=GuardVerdict(0.25, 0.8, NEAR), level="step")
    assert str(pixels) == "not memorised: nL2 1.712 >= 1.4, nearest 'a'; level step"
    copy = Verdict("nl2", -0.3, -1.4, NEAR, True, blocked=True)
    assert str(copy) == "memorised: nL2 0.300 < 1.4 to 'a'; blocked"
    long = Verdict("cosine", 0.6, 0.5, NEAR, True, trace=STEPS * 500, also=(OTHER,) * 50)
    assert len(repr(long)) < 500


WRONG = [
    (("rewinds",), None, "`verdict.rewinds` must be int, got None"),
    (("rewinds",), "x", "`verdict.rewinds` must be int, got 'x'"),
    (("retries",), 1.5, "`verdict.retries` must be int, got 1.5"),
    (("evaluations",), True, "`verdict.evaluations` must be int, got True"),
    (("similarity",), "0.6", "`verdict.similarity` must be float, got '0.6'"),
    (("similarity",), None, "`verdict.similarity` must be float, got None"),
    (("threshold",), False, "`verdict.threshold` must be float, got False"),
    (("memorized",), 0, "`verdict.memorized` must be bool, got 0"),
    (("metric",), 5, "`verdict.metric` must be str, got 5"),
    (("neighbour",), 3, "`verdict.neighbour` must be an object of the fields of Neighbour, got 3"),
    (("neighbour",), None, "`verdict.neighbour` must be an object"),
    (("neighbour", "row"), "3", "`verdict.neighbour.row` must be int"),
    (("neighbour", "caption"), 3, "`verdict.neighbour.caption` must be str"),
    (("neighbour", "more"), 3, "`verdict.neighbour` must have no field 'more'"),
    (("guard",), [], "`verdict.guard` must be an object"),
    (("guard",), False, "`verdict.guard` must be an object"),
    (("guard",), {}, "`verdict.guard` must have the field 'similarity'"),
    (("guard", "neighbour"), [], "`verdict.guard.neighbour` must be an object"),
    (("also",), 5, "`verdict.also` must be a list, got 5"),
    (("also",), {}, "`verdict.also` must be a list"),
    (("also", 0), 5, r"`verdict.also\[0\]` must be an object"),
    (("also", 0, "rewinds"), None, r"`verdict.also\[0\].rewinds` must be int"),
    (("trace",), None, "`verdict.trace` must be a list"),
    (("trace", 1), [], r"`verdict.trace\[1\]` must be an object"),
    (("trace", 1, "terms"), "rewind", r"`verdict.trace\[1\].terms` must be a list"),
    (("trace", 1, "terms"), [1], r"`verdict.trace\[1\].terms\[0\]` must be str"),
    (("trace", 1, "signals"), 0, r"`verdict.trace\[1\].signals` must be a list"),
    (("unknown",), 0, "`verdict` must have no field 'unknown'"),
]


@pytest.mark.parametrize(("path", "value", "message"), WRONG)
def test_a_field_of_another_type_is_named(path, value, message):
    values = described()
    inside = values
    for step in path[:-1]:
        inside = inside[step]
    inside[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        Verdict.from_dict(values)


@pytest.mark.parametrize("values", ["x", [], None, 3, [["metric", "cosine"]]])
def test_what_is_no_object_is_no_verdict(values):
    with pytest.raises(ValueError, match="`verdict` must be an object of the fields of Verdict, got"):
        Verdict.from_dict(values)


@pytest.mark.parametrize("name", ["metric", "similarity", "threshold", "neighbour", "memorized"])
def test_a_field_that_is_missing_is_named(name):
    values = {key: value for key, value in described().items() if key != name}
    with pytest.raises(ValueError, match=f"`verdict` must have the field '{name}'"):
        Verdict.from_dict(values)


def traced(steps, metric="cosine", similarity=0.2, threshold=0.5, **more):
    trace = [TraceStep(n, 0.5, 0.1, 0.4, 7, (), (1.0, 2.0, 3.0, 4.0)) for n in range(steps)]
    near = Neighbour(3, "a.png", "a cat")
    more = {"memorized": similarity > threshold, **more}
    return Verdict(metric, similarity, threshold, near, trace=tuple(trace), **more)


SAID = {
    "not memorised: cosine 0.200 <= 0.5, nearest 'a.png'; 60 evaluations": {"evaluations": 60},
    "memorised: cosine 0.700 > 0.5 to 'a.png'; blocked; 1 rewind; 2 re-runs": {
        "similarity": 0.7,
        "blocked": True,
        "rewinds": 1,
        "retries": 2,
    },
    "not memorised: nL2 1.620 >= 1.4, nearest 'a.png'": {
        "metric": "nl2",
        "similarity": -1.62,
        "threshold": -1.4,
    },
    "memorised: nL2 0.900 < 1.4 to 'a.png'": {"metric": "nl2", "similarity": -0.9, "threshold": -1.4},
    "memorised: guard 0.900 > 0.8 to 'a'; 3 rewinds": {
        "guard": GuardVerdict(0.9, 0.8, NEAR),
        "memorized": True,
        "rewinds": 3,
    },
}


@pytest.mark.parametrize("text", SAID)
def test_a_verdict_is_a_line_for_people(text):
    verdict = traced(50, **SAID[text])
    assert str(verdict) == text and f"{verdict}" == text
    if verdict.metric == "nl2":
        assert "-1" not in repr(verdict) and "-0" not in repr(verdict) and "-0" not in str(verdict.reason)


def test_what_a_line_quotes_does_not_act_on_the_terminal():
    near = Neighbour(0, "a\n\x1b[2Jb", None)
    assert "\n" not in str(Verdict("cosine", 0.9, 0.5, near, True))
    assert "\x1b" not in repr(Verdict("cosine", 0.9, 0.5, near, True))


@pytest.mark.parametrize("steps", [0, 50, 1000])
def test_a_verdicts_repr_is_short_and_says_how_long_its_trace_is(steps):
    verdict = traced(steps, rewinds=2, evaluations=100, also=(OTHER,))
    shown = repr(verdict)
    assert len(shown) < 250 and f"trace of {steps} steps" in shown and "rewinds=2" in shown
    assert repr([verdict] * 3).count("\n") == 0


def test_a_steps_free_signals_have_names():
    step = traced(1).trace[0]
    assert step.named == {
        "squared_gap": 1.0,
        "inner_product": 2.0,
        "squared_uncond": 3.0,
        "squared_move": 4.0,
    }
    assert "squared_gap=1, inner_product=2, squared_uncond=3, squared_move=4" in repr(step)
    three = TraceStep(0, 0.5, None, 0.4, None, (), (1.0, 2.0, 3.0))
    assert [*three.named] == ["squared_gap", "inner_product", "squared_uncond"]
    assert TraceStep(0, 0.5, None, 0.4, None).named == {}
