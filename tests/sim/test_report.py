"""The report page: the same bytes for a seed, true to the JSON, whole without a network; opened by a browser, and looked at by it."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from nitsum.errors import InvalidSpec
from nitsum.pool import Pool, Tier
from nitsum.sim.metrics import goodput_over_time
from nitsum.sim.result import Ending, LayoutAt, Outcome, RunResult
from nitsum_cli import report
from nitsum_cli.main import app
from nitsum_cli.report import figures, layouts

from . import chromium

EXAMPLES = Path(__file__).parents[2] / "examples/simulate"
PICTURES = ("ladder", "attainment", "goodput", "layout")
POLICIES = ("plain-tp1", "static-tp2", "nitsum")


@dataclass(frozen=True)
class Written:
    page: Path
    html: str
    figures: dict[str, dict[str, object]]


def simulate(folder: Path, name: str, rate: float | None = None) -> Path:
    """The example, shorter; with another rate where one is given."""
    workload = yaml.safe_load((EXAMPLES / "workload.yaml").read_text()) | {"duration": "10s"}
    if rate is not None:
        workload["streams"] = [s | {"rate": rate} for s in workload["streams"]]
    (folder / "workload.yaml").write_text(yaml.safe_dump(workload))
    page = folder / f"{name}.html"
    args = ["simulate", "--workload", str(folder / "workload.yaml"), "--pool", str(EXAMPLES / "pool.yaml"), "--fleet", "1x8:h100_sxm"]
    args += ["--policy", ",".join(POLICIES), "--json", str(page.with_suffix(".json")), "--report", str(page)]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    return page


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    page = simulate(tmp_path_factory.mktemp("report"), "report")
    return Written(page, page.read_text(), json.loads(page.with_suffix(".json").read_text()))


def test_says_what_the_figures_rest_on(written: Written) -> None:
    body = written.html[written.html.rindex("</head>") :]
    notes = body[body.index('id="notes"') :]
    profile = written.figures["profile"]
    for said in (profile["name"], ">modelled<", "Seed 1", "aiconfigurator", "nitsum 0.", "numpy ", "plotly "):
        assert str(said) in notes, said
    assert body.count('<span class="origin">modelled</span>') == 1


def test_its_tables_are_the_json(written: Written) -> None:
    body = written.html[written.html.rindex("</head>") :]
    policies, tiers = (body[body.index(f'id="{i}"') :].partition("</table>")[0] for i in ("policies", "tiers"))
    for name, f in written.figures["policies"].items():
        assert f'<td class="name">{name}</td><td>{f["goodput_rps"]:,.2f}</td>' in policies  # type: ignore[index]
        for tier in f["tiers"].values():  # type: ignore[index]
            assert f"<td>{tier['offered_rps']:,.2f}</td>" in tiers
            assert f">{tier['ttft_ms']['p99']:,.1f}</td>" in tiers


def test_the_same_seed_gives_the_same_bytes(written: Written, tmp_path: Path) -> None:
    assert simulate(tmp_path, "again").read_text() == written.html


def test_where_nothing_is_offered_it_says_so(tmp_path: Path) -> None:
    html = simulate(tmp_path, "nothing", rate=0).read_text()
    body = html[html.rindex("</head>") :]
    assert "Nothing was offered to a tier with an SLO" in body
    assert "The ladder" not in body
    assert 'id="layout"' in body


def test_what_cannot_be_written_is_said_before_anything_runs(tmp_path: Path) -> None:
    args = ["simulate", "--workload", str(EXAMPLES / "workload.yaml"), "--pool", str(EXAMPLES / "pool.yaml"), "--fleet", "1x8:h100_sxm"]
    result = CliRunner().invoke(app, [*args, "--report", str(tmp_path / "nowhere/out.html")])
    assert (result.exit_code, "report: there is no folder" in result.output) == (2, True), result.output


def test_many_changes_of_layout_become_means_that_keep_every_gpu_second(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = tuple(LayoutAt(i * 0.37, ((1, ("chat",), i % 8), (2, ("batch",), 8 - i % 8))) for i in range(50))
    end = 20.0
    starts, exact = layouts.steps(changes, end)
    assert len(starts) == 50
    monkeypatch.setattr(layouts, "STEPS_MAX", 9)
    few, means = layouts.steps(changes, end)
    assert len(few) == 9
    for kind, values in exact.items():
        ends = [*starts[1:], end]
        spent = sum(v * (b - a) for v, a, b in zip(values, starts, ends, strict=True))
        assert sum(means[kind]) * end / 9 == pytest.approx(spent)


def test_time_is_cut_into_equal_parts_whatever_the_duration() -> None:
    pool = Pool("default/p", "u", "m", (Tier("chat", ttft_ms=500.0),), 8)
    for duration in (0.5, *(d / 10 for d in range(10, 9000, 7))):
        last = Outcome("chat", duration * 0.9999999, Ending.FINISHED, 1.0, 1.0)
        run = RunResult("nitsum", duration, (last,), (), 0, 0, 0, duration)
        cells = goodput_over_time(pool, run, figures.bin_s(duration))["chat"]
        assert len(cells) == min(max(int(duration), 1), figures.BINS_MAX)
        assert cells[-1][1] > 0, duration


def test_without_its_libraries_it_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "NEEDED", ("plotly", "no_such_library"))
    with pytest.raises(InvalidSpec, match=r"no_such_library is missing: pip install 'nitsum\[report\]'"):
        report.check()


@pytest.mark.skipif(chromium.path() is None, reason=chromium.REMEDY)
def test_a_browser_draws_it_without_error_or_network(written: Written, tmp_path: Path) -> None:
    opened = chromium.open_page(written.page, tmp_path, PICTURES)
    assert opened.console == []
    assert opened.fetched == []
    dom = opened.dom
    traces = {p: [c for c in dom.classes[p] if c.startswith("trace ")] for p in PICTURES}
    assert len(traces["ladder"]) == 3 + 1  # a bar for each tier, and the texts
    assert len(traces["attainment"]) == 3
    assert len(traces["goodput"]) == (1 + 3) * (1 + len(POLICIES))  # everything together and each tier; offered and each policy
    assert len(traces["layout"]) >= len(POLICIES)
    for picture in PICTURES:
        assert set(POLICIES) <= set(dom.texts[picture]), picture
    assert {"chat", "agents", "batch"} <= set(dom.texts["ladder"])
    assert {"requests/s", "time of arrival (s)"} <= set(dom.texts["goodput"])
    assert {"GPUs", "time (s)", "TP 2 · chat, agents, batch"} <= set(dom.texts["layout"])
    assert dom.buttons == {"Download plot as a PNG", "Zoom", "Pan", "Reset axes"}  # none that sends anything anywhere
    assert written.page.with_suffix(".png").stat().st_size > 50_000


@pytest.mark.skipif(chromium.path() is None, reason=chromium.REMEDY)
def test_what_looks_at_pages_sees_errors_and_fetches(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<div id=a class=b><p class='trace x'>t</p></div><img src='http://a.invalid/i.png'><script>nothing.here()</script>")
    opened = chromium.open_page(page, tmp_path, ("a",))
    assert opened.fetched == ["http://a.invalid/i.png"]
    assert any("nothing is not defined" in line for line in opened.console)
    assert opened.dom.classes["a"][0] == "trace x"
