"""What a plan says of itself: shapes, goodput, outlook by tier."""

from collections import Counter
from collections.abc import Iterable

from nitsum.layout import ORDER, Role, sort_of
from nitsum.planner.answer import Answer
from nitsum.planner.place import Key, Placed
from nitsum.planner.problem import Counts, Kind, Problem
from nitsum.planner.question import PoolQuestion
from nitsum.planner.rating import good
from nitsum.planner.serve import Serving
from nitsum.planner.types import Snapshot, TierOutlook


def describe(groups: Iterable[tuple[Role, int]]) -> str:
    """Roles and TP degrees as people say them."""
    many = Counter(groups)
    return " + ".join(f"{many[g]}x{sort_of(g[1], g[0])}" for g in sorted(many, key=lambda g: (ORDER.index(g[0]), g[1]))) or "nothing"


def parts(keys: Iterable[Key]) -> list[tuple[Role, int]]:
    """Role and TP of groups, those of split blocks each."""
    return [part for _, _, uuids, split in keys for part in ([(Role.MIXED, len(uuids))] if split is None else split.parts())]


def told(placed: Iterable[Placed]) -> str:
    return describe(parts(p.key for p in placed))


def profile(q: PoolQuestion, snapshot: Snapshot) -> str:
    times = snapshot.step_times[q.pool.name]
    text = f"profile {getattr(times, 'name', '?')} ({times.origin})"
    if q.left_out:
        least, without = min(q.tps), times.kv_capacity_tokens(min(q.tps), q.tps)
        beside = times.kv_capacity_tokens(least, (*q.left_out, *q.tps))
        text += f"; TP {', '.join(map(str, q.left_out))} not kept resident: beside it TP {least} has {beside} tokens of KV, not {without}"
    return text


def crowded(q: PoolQuestion, snapshot: Snapshot) -> str:
    """Why a pool that may have GPUs gets none."""
    gpus = {g.uuid for n in q.nodes for g in n.node.gpus}
    others = [(g.pool, gpus & set(g.gpu_uuids)) for n in snapshot.nodes for g in n.layout.groups if g.pool != q.pool.name]
    holders = ", ".join(sorted({pool for pool, held in others if held}))
    if holders and gpus <= {u for _, held in others for u in held}:
        return f"all GPUs that match are in use by pools {holders}"
    least = min(q.tps)
    also = f"; others are in use by pools {holders}" if holders else ""
    return f"TP {least} needs {least} GPUs of one node, and so many cannot be had{also}"


def shape(asked: Problem, counts: Counts, pool: str) -> str:
    mine: dict[str, int] = {}
    for (_, k), n in sorted(counts.items()):
        if asked.kinds[k].pool == pool:
            mine[asked.kinds[k].label] = mine.get(asked.kinds[k].label, 0) + n
    return ", ".join(f"{n} x {label}" for label, n in mine.items()) or "nothing"


def goodput(q: PoolQuestion, asked: Problem, answer: Answer) -> float:
    """requests/s expected to meet their targets, of those expected to come: headroom is left out."""
    return sum(good(asked, answer, {(q.pool.name, t.name): q.expected[t.name] for t in q.slo_tiers}).values())


def _held(serving: Serving, tier: str) -> float:
    """requests/s of a tier at which its share is met, by the groups that it flows through."""
    total = 0.0
    for (_, k), n in serving.answer.counts.items():
        kind = serving.asked.kinds[k]
        if serving.answer.flows.get((k, tier), 0.0) > 0:
            total += n * kind.held if kind.held is not None else serving.answer.flows[k, tier]
    return total


def outlook(q: PoolQuestion, kinds: tuple[Kind, ...], serving: Serving) -> tuple[TierOutlook, ...]:
    """`binding` of a tier that no TP can serve alone says so: no number of GPUs would help."""
    found = []
    answer = serving.answer
    for t in q.slo_tiers:
        key = q.pool.name, t.name
        rate = q.demand[t.name].rate
        served, safe = answer.served.get(key, 0.0), answer.safe.get(key, 0.0)
        alone = [k for k in kinds if k.pool == q.pool.name and k.tiers == (t.name,)]
        used = [serving.asked.kinds[k] for (k, tier), flow in sorted(answer.flows.items()) if tier == t.name and flow > 0]
        if used:
            binding = used[0].binding[used[0].tiers.index(t.name)] + (
                f" at TP {used[0].tp_size}" if used[0].split is None else f" in {used[0].split}"
            )
        elif any(k.rate(t.name) > 0 and k.full for k in alone):
            binding = "GPUs: no group is left for it"
        else:
            binding = ""
        if not any(k.rate(t.name) > 0 and k.full for k in alone):
            binding = " or ".join(sorted({k.binding[0] for k in alone})) + " at every TP"
        partly = any(k.held is not None for k in used)  # more is served than meets its targets
        held = (min(served, _held(serving, t.name)) if partly else served) >= t.target * rate - 1e-9
        found.append(TierOutlook(t.name, rate, safe, held, binding))
    return tuple(found)
