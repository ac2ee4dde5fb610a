"""The page of `nitsum simulate --report`: one file, no network. Plotly draws it: interactive, and whole in one file by its own means.

The same bytes for the same seed, as the JSON: no clock and no random ids.
"""

import platform
from importlib import metadata, resources
from importlib.util import find_spec
from typing import Any

from nitsum.errors import InvalidSpec
from nitsum.perf.profile import Profile
from nitsum.sim.arrivals import Traffic
from nitsum.sim.compare import Comparison
from nitsum.sim.workload import StreamSpec, TraceSource, Workload

NEEDED = ("plotly", "jinja2")


def check() -> None:
    """Before anything runs. Raises InvalidSpec with the remedy."""
    if absent := [name for name in NEEDED if find_spec(name) is None]:
        raise InvalidSpec("report", f"{', '.join(absent)} is missing: pip install 'nitsum[report]'")


def page(done: Comparison, document: dict[str, Any], workload: Workload, profile: Profile) -> str:
    """`document`: what `--json` writes."""
    import jinja2
    from plotly.offline import get_plotlyjs

    from nitsum_cli.report import figures, layouts

    pool, policies = done.setting.pool, document["policies"]
    judged = [t.name for t in pool.tiers if any(f["tiers"][t.name]["goodput_rps"] is not None for f in policies.values())]
    gpus = min(pool.budget_gpus, sum(len(n.gpus) for n in done.setting.nodes))
    pictures = {"layout": layouts.layout(done.results, gpus, [t.name for t in pool.tiers])}
    if judged:
        pictures["ladder"] = figures.ladder(policies, judged)
        pictures["attainment"] = figures.attainment(policies, judged)
        pictures["goodput"] = figures.goodput(pool, done.results, judged)
    env = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"percent": _percent, "number": _number}
    return env.from_string((resources.files(__name__) / "page.html.j2").read_text()).render(
        d=document,
        tiers=pool.tiers,
        streams=[_stream(s, document["scale"]) for s in workload.streams],
        start_s=workload.start_s,
        bin=figures.lasting(figures.bin_s(workload.duration_s)),
        duration=figures.lasting(workload.duration_s),
        pictures={name: figures.html(name, picture) for name, picture in pictures.items()},
        plotly=get_plotlyjs(),
        notes=_notes(document, done.traffic),
        source=" ".join(f"{v}" for v in profile.source.values()),
        versions=_versions(),
    )


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}".replace("%", " %")


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _stream(s: StreamSpec, scale: float) -> dict[str, str]:
    source = s.source
    if isinstance(source, TraceSource):
        what = f"{source.path} ({source.format})"
    else:
        cv = {1.0: "Poisson", 0.0: "constant"}.get(source.cv, f"gamma, CV {source.cv:g}")
        lengths = (f"{length.mean:g}" + (f" (CV {length.cv:g})" if length.cv else "") for length in (source.prompt, source.output))
        what = "synthetic: {} arrivals, {} prompt and {} output tokens".format(cv, *lengths)
    recorded = "as recorded" + ("" if scale == 1 else f" × {scale:g}")
    return {"tier": s.tier, "what": what, "rate": recorded if s.rate is None else f"{s.rate * scale:g}"}


def _notes(document: dict[str, Any], traffic: Traffic) -> list[str]:
    too_long = [f"{tier}: {n} request(s) beyond the model's context are left out (too long)" for tier, n in traffic.too_long.items()]
    by_policy = [f"{name}: {f['note']}" for name, f in document["policies"].items() if "note" in f]
    return [*document["notes"], *too_long, *by_policy]


def _versions() -> str:
    named = [f"{name} {metadata.version(name)}" for name in ("nitsum", "numpy", "plotly")]
    return ", ".join([named[0], f"Python {platform.python_version()}", *named[1:]])
