import pytest

from amg.report.pictures import PictureStore
from amg.report.traces import TERMS, TraceStore, facts, panel_data
from amg.verdict import GuardVerdict, Neighbour, TraceStep


def test_panel_holds_the_trace_it_was_given(make):
    sample, section, traces = make.sample(1, 0.9), make.section(), TraceStore()
    for column in make.columns:
        trace = sample.verdicts[column].trace
        panel = panel_data(sample, column, section, PictureStore(), traces)
        steps, times, thresholds = traces.schedules[panel["schedule"]]
        assert steps == [entry.step for entry in trace]
        assert times == [entry.t for entry in trace]
        assert thresholds == pytest.approx([entry.threshold for entry in trace], abs=5e-5)
        for entry, value, bits in zip(trace, panel["values"], panel["terms"], strict=True):
            assert value == (None if entry.similarity is None else pytest.approx(entry.similarity, abs=5e-5))
            assert {term for n, term in enumerate(TERMS) if bits >> n & 1} == set(entry.terms)


def test_equal_schedules_are_kept_once(make):
    traces = TraceStore()
    assert traces.add(make.trace(0.9)) == traces.add(make.trace(0.2)) == 0
    assert traces.add(make.trace(0.9, rewind=True)) == 1


def test_an_unknown_term_is_refused(make):
    verdict = make.verdict(0.3, trace=(TraceStep(0, 980.0, 0.1, 0.3, 1, ("sharpening",)),))
    sample = make.sample(1, 0.9, guided=verdict)
    with pytest.raises(ValueError, match="sharpening"):
        panel_data(sample, "main", make.section(), PictureStore(), TraceStore())


def test_facts_say_everything_the_verdict_says(make):
    other = make.verdict(-1.712, metric="nl2", threshold=-1.4, neighbour=Neighbour(3, "x", None))
    guard = GuardVerdict(0.912, 0.8, Neighbour(5, "y", None))
    told = {"rewinds": 2, "retries": 1, "evaluations": 210, "also": (other,), "blocked": True}
    verdict = make.verdict(0.61, guard=guard, **told)
    found = dict(facts(make.sample(1, 0.9, guided=verdict), "main", make.section()))
    assert found["verdict"] == "withheld: a blank image was delivered"
    assert found["memorised if"] == "cosine > 0.5"
    assert found["nearest"] == "“a cat”, photos/cat.png, row 7"
    assert (found["rewinds"], found["re-runs"], found["evaluations"]) == ("2", "1", "210")
    assert found["guard"] == "0.912, memorised if > 0.8, row 5"
    assert found["also nL2"] == "1.712, memorised if nL2 < 1.4, row 3"
    assert found["luminance correlation"] == "0.410, copy if > 0.9"
