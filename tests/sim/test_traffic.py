"""From files to requests: what is wrong is named and counted, rates hold, time is never compressed."""

import json
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum.errors import InvalidSpec
from nitsum.sim import arrivals, workload
from nitsum.sim.traces import Trace, azure, make, mooncake, servegen

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_azure_reads_crlf_and_seven_decimals() -> None:
    t = azure.parse([HEADER, "2023-11-16 23:59:59.5000000,374,44\r\n", "2023-11-17 00:00:01.2500000,396,109\r\n"], "a.csv")
    assert t.at.tolist() == [0.0, 1.75]
    assert (t.prompt.tolist(), t.output.tolist()) == ([374, 396], [44, 109])


def test_azure_counts_all_that_is_wrong() -> None:
    rows = ["2023-11-16 00:00:02.0,5,6\n", "2023-11-16 00:00:01.0,-5,6\n", "2023-11-16 00:00:03.0,,6\n", "2023-11-16 00:00:02.5,-1,x\n"]
    with pytest.raises(InvalidSpec) as e:
        azure.parse([HEADER, *rows], "a.csv")
    text = str(e.value)
    assert text.startswith("a.csv: line 3")
    assert "2 row(s) with a negative ContextTokens (first: line 3)" in text
    assert "2 row(s) with an unsorted TIMESTAMP (first: line 3)" in text
    assert "1 row(s) with no ContextTokens (first: line 4)" in text
    assert "1 row(s) with a GeneratedTokens that is not a whole number (first: line 5)" in text


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "a.csv: holds no requests"),
        ([HEADER], "a.csv: holds no requests"),
        (["TIMESTAMP,ContextTokens\n"], "a.csv: line 1: no column GeneratedTokens; the columns are"),
        ([HEADER, "yesterday,1,1\n"], "line 2: 1 row(s) with a TIMESTAMP that is not like"),
        ([HEADER, "2023-11-16 00:00:02.0,5\n"], "line 2: 1 row(s) with 2 instead of 3 columns"),
    ],
)
def test_azure_names_file_line_and_legal_values(lines: list[str], said: str) -> None:
    with pytest.raises(InvalidSpec, match=said.replace("(", r"\(").replace(")", r"\)")):
        azure.parse(lines, "a.csv")


def row(**fields: object) -> str:
    return json.dumps({"timestamp": 0, "input_length": 10, "output_length": 5, "hash_ids": [1]} | fields) + "\n"


def test_mooncake_spreads_its_ticks_and_says_so() -> None:
    lines = [row(timestamp=3000 * (i // 10), input_length=i + 1) for i in range(100)]
    t = mooncake.parse(lines, "m.jsonl", rng())
    assert len(set(t.at.tolist())) == 100
    assert (np.diff(t.at) >= 0).all()
    assert np.histogram(t.at, np.arange(0, 33, 3))[0].tolist() == pytest.approx([10] * 10, abs=3)
    assert "ticks of 3 s" in t.notes[0]
    assert mooncake.parse(lines, "m.jsonl", rng()).at.tolist() == t.at.tolist()
    assert mooncake.parse([row(timestamp=i * 7) for i in range(9)], "m.jsonl", rng()).notes == ()


def test_mooncake_counts_all_that_is_wrong() -> None:
    bad = [row(timestamp=9000), row(timestamp=3000, output_length=-2), row(timestamp=9000, input_length=None)]
    with pytest.raises(InvalidSpec, match=r"m: line 2: .*negative output_length \(first: line 2\).*unsorted timestamp.*no input_length"):
        mooncake.parse(bad, "m", rng())
    with pytest.raises(InvalidSpec, match=r"m: line 2: 1 row\(s\) with text that is not JSON \(first: line 2\)"):
        mooncake.parse([row(), "{\n"], "m", rng())
    with pytest.raises(InvalidSpec, match=r"unsorted timestamp \(first: line 3\)"):
        mooncake.parse([row(timestamp=9000), row(timestamp=None), row(timestamp=3000)], "m", rng())


def test_a_line_of_json_that_is_no_object_hides_no_other() -> None:
    for parse in (lambda lines: mooncake.parse(lines, "m", rng()), lambda lines: servegen.parse(lines, "m")):
        with pytest.raises(InvalidSpec) as e:
            parse(["[1]\n", "{\n", "\n", "1" * 5000 + "\n", "[" * 100_000 + "\n", "{}\n", "null\n"])
        text = str(e.value)
        assert text.startswith("m: line 1: 2 row(s) with JSON that is not an object (first: line 1); ")
        assert "3 row(s) with text that is not JSON (first: line 2)" in text
        assert "row(s) with no " in text
        assert "(first: line 6)" in text


def client(windows: list[str], **change: object) -> str:
    dataset = {"0": {"input_tokens": "{10: 0.5, 30: 0.5}", "output_tokens": "{7: 1.0}"}}
    return json.dumps({"client": 1, "trace_columns": servegen.COLUMNS, "trace": windows, "dataset": dataset} | change) + "\n"


def test_servegen_keeps_rates_lengths_and_silence() -> None:
    p = servegen.parse([client(["0,2,1.5,Gamma,0.44,1.1", "600,0,0,,0,0", "1200,4,3,Weibull,0.4,0.1"])], "s")
    assert p.mean_rate(0, 1800) == pytest.approx(2.0)
    counts = np.zeros(3)
    for seed in range(60):
        at, prompt, output = p.draw(0, 1800, 1.0, rng(seed))
        assert (np.diff(at) >= 0).all()
        assert set(prompt.tolist()) <= {10, 30}
        assert set(output.tolist()) <= {7}
        counts += np.histogram(at, [0, 600, 1200, 1800])[0]
    assert counts / 60 == pytest.approx([1200, 0, 2400], rel=0.05)
    at, _, _ = p.draw(900, 1800, 3.0, rng())  # it begins again at its end
    assert np.histogram(at, [0, 300, 900, 1500, 1800])[0] == pytest.approx([0, 7200, 3600, 0], rel=0.2)


GOOD = "0,2,1,Gamma,1,1"


def dataset(prompt: object, output: object = "{1: 1}", key: str = "0") -> dict[str, object]:
    return {key: {"input_tokens": prompt, "output_tokens": output}}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (client(["0,2,1,Pareto,1,1"]), "1 window(s) with a pattern that is not one of Gamma, Weibull (first: line 1, trace[0])"),
        (client(["0,-2,1,Gamma,1,1"]), "1 window(s) with a negative rate_rps (first: line 1, trace[0])"),
        (client(["-1,2,1,Gamma,1,1"]), "a negative window_start_s"),
        (client(["inf,2,1,Gamma,1,1"]), "a window_start_s that is not a number"),
        (client(["0,,1,Gamma,1,1"]), "no rate_rps"),
        (client(["0,nan,1,Gamma,1,1"]), "a rate_rps that is not a number"),
        (client(["0,2,1,Gamma,0,1"]), "an arg1 (the shape) of 0"),
        (client(["0,2,1,Gamma,,1"]), "no arg1"),
        (client(["600,2,1,Gamma,1,1", GOOD]), "1 window(s) with an unsorted window_start_s (first: line 1, trace[1])"),
        (client(["0,2"]), "1 window(s) with 2 instead of 6 columns"),
        (client([GOOD], trace_columns=["start"]), "1 row(s) with other trace_columns (first: line 1)"),
        (client([]), "no trace (a list)"),
        (client([GOOD], dataset={}), "no dataset (a dict)"),
        (
            client([GOOD], dataset=dataset("__import__('os')")),
            "1 distribution(s) with text that is not a Python dict of length: probability (first: line 1, dataset.0.input_tokens)",
        ),
        (client([GOOD], dataset=dataset("{1e999: 1}")), "lengths that are negative or not whole"),
        (client([GOOD], dataset=dataset("{1.5: 1}")), "lengths that are negative or not whole"),
        (client([GOOD], dataset=dataset("{1: 1}", {"5": -1, "6": 2})), "probabilities that are negative or not numbers"),
        (client([GOOD], dataset=dataset("{1: 0}")), "no probability above 0"),
        (client([GOOD], dataset=dataset("{1: 1}", key="noon")), "a name that is not its first second"),
        (client([GOOD], dataset={"0": [1]}), "no input_tokens and output_tokens"),
        (client([GOOD], dataset=dataset("{}", "{}")), "no lengths in dataset, though the client has requests"),
    ],
)
def test_servegen_names_line_and_field(line: str, said: str) -> None:
    with pytest.raises(InvalidSpec) as e:
        servegen.parse([line], "s")
    assert str(e.value).startswith("s: line 1: ")
    assert said in str(e.value)
    assert str(e.value).count("(s) with") == 1, "one thing is wrong"
    assert "rising starts and numbers of at least 0" in str(e.value)


def test_servegen_counts_all_that_is_wrong() -> None:
    bad = client([GOOD, "600,-2,1,Gamma,1,1", "1200,-1,1,Gamma,1,1"], dataset=dataset("{-1: 1}", "nothing"))
    with pytest.raises(InvalidSpec) as e:
        servegen.parse([client([GOOD]), client(["0,x,1,Gamma,1,1"]), bad, bad, client(["600,2,1,Gamma,1,1", GOOD])], "s")
    text = str(e.value)
    assert text.startswith("s: line 2: 1 window(s) with a rate_rps that is not a number (first: line 2, trace[0]); ")
    assert "4 window(s) with a negative rate_rps (first: line 3, trace[1])" in text
    assert "2 distribution(s) with lengths that are negative or not whole (first: line 3, dataset.0.input_tokens)" in text
    assert "2 distribution(s) with text that is not a Python dict of length: probability (first: line 3, dataset.0.output_tokens)" in text
    assert "1 window(s) with an unsorted window_start_s (first: line 5, trace[1])" in text


def recorded(n: int = 2000) -> Trace:
    """Bursty: ten at once each ten gaps."""
    at = [float(i // 10) * 10 for i in range(n)]
    return make("t", at, list(range(1, n + 1)), [1] * n)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.1, 6), st.integers(0, 50), st.floats(0, 3000))
def test_rates_hold_and_time_is_never_compressed(factor: float, seed: int, start: float) -> None:
    trace = recorded()
    at, _, _ = arrivals.at_rate(trace, start, 1000, trace.rate * factor, 1.0, rng(seed))
    expected = trace.rate * factor * 1000
    assert abs(len(at) - expected) <= 6 * expected**0.5 + 20 * (1 + factor), "six deviations of a thinning, and bursts at the edges"
    assert (np.diff(at) >= 0).all()
    assert at.min() >= 0
    assert at.max() < 1000
    once, _, _ = arrivals.window(trace, start, 1000)
    if expected < len(once):  # thinned: each arrival is one that was recorded
        assert set(at.tolist()) <= set(once.tolist())
    else:  # rotations lie over the recording itself
        assert set(once.tolist()) <= set(at.tolist())


def spec(**change: object) -> dict[str, object]:
    stream = {"tier": "a", "synthetic": {"arrivals": {"gamma": {"cv": 2}}, "prompt": 1000, "output": {"mean": 300, "cv": 1}}, "rate": 5}
    return {"duration": "10m", "streams": [stream | change]}


def no_files(path: str) -> Iterable[str]:
    raise AssertionError(path)


def test_synthetic_rates_lengths_and_seed() -> None:
    w = workload.parse(spec(rate=20))
    t = arrivals.build(w, no_files, 3, 2.0)
    assert len(t.requests) == pytest.approx(40 * 600, rel=0.05)
    assert np.mean([r.output for r in t.requests]) == pytest.approx(300, rel=0.05)
    assert arrivals.build(w, no_files, 3, 2.0) == t
    assert arrivals.build(w, no_files, 4, 2.0) != t
    clock = arrivals.build(workload.parse(spec(synthetic={"arrivals": "constant", "prompt": 5, "output": 6})), no_files, 1)
    assert {round(b.arrived - a.arrived, 6) for a, b in zip(clock.requests, clock.requests[1:], strict=False)} == {0.2}


def test_too_many_requests_are_refused_before_they_are_made() -> None:
    rows = [f"2023-11-16 00:00:{i:02}.0,5,6\n" for i in range(60)]
    traced = {"duration": "1h", "streams": [{"tier": "a", "trace": {"format": "azure", "path": "a.csv"}}]}
    for raw, scale in ((spec(), 1e6), (traced, 1e6)):
        with pytest.raises(InvalidSpec, match=r"streams\[0\].rate: more than"):
            arrivals.build(workload.parse(raw), lambda path: [HEADER, *rows], 1, scale)


def test_what_exceeds_the_context_is_left_out_and_counted() -> None:
    t = arrivals.build(workload.parse(spec()), no_files, 1, 1.0, context_length=1200)
    assert t.too_long["a"] > 0
    assert all(r.prompt + r.output <= 1200 and r.prompt + r.max_new <= 1200 for r in t.requests)


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        ([], "workload"),
        ({"streams": []}, "duration"),
        ({"duration": 30, "streams": [1]}, "duration"),
        ({"duration": "30m", "streams": []}, "streams"),
        ({"duration": "30m", "strems": []}, "strems"),
        (spec(tier="x"), "streams[0].tier"),
        (spec(rate=-1), "streams[0].rate"),
        (spec(rate=None), "streams[0].rate"),
        (spec(trace={}), "streams[0]"),
        (spec(synthetic={"arrivals": "weekly", "prompt": 1, "output": 1}), "streams[0].synthetic.arrivals"),
        (spec(synthetic={"arrivals": {"gamma": {"cv": 0}}, "prompt": 1, "output": 1}), "streams[0].synthetic.arrivals.gamma.cv"),
        (spec(synthetic={"arrivals": "poisson", "prompt": 0, "output": 1}), "streams[0].synthetic.prompt"),
        (spec(synthetic={"arrivals": "poisson", "prompt": {"cv": 1}, "output": 1}), "streams[0].synthetic.prompt.mean"),
        (spec(synthetic={"arrivals": "poisson", "prompt": 1}), "streams[0].synthetic.output"),
        ({"duration": "1m", "streams": [{"tier": "a", "trace": {"format": "csv", "path": "x"}}]}, "streams[0].trace.format"),
        ({"duration": "1m", "streams": [{"tier": "a", "trace": {"format": "azure"}}]}, "streams[0].trace.path"),
    ],
)
def test_bad_workloads_name_the_field(raw: object, path: str) -> None:
    with pytest.raises(InvalidSpec) as e:
        workload.parse(raw, ("a",))
    assert e.value.path == path
