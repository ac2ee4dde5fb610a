"""The slow plane's question as a mixed-integer linear program, solved by HiGHS. Bounded by branch-and-bound nodes, never by the clock,
and on one thread, so that equal questions get equal answers on any machine.

Variables: n[c,k] groups (integer), f[k,t] flow of a tier through a kind, its pieces g[t,i],
d[c,p,tp] groups beyond those that run. maximise sum weight x worth x g - loss x d.
"""

import highspy
import numpy as np
from highspy._core import _Highs
from scipy.sparse import coo_matrix

from nitsum.planner.problem import PIECES, Answer, Counts, Problem

NODES_MAX = 64
GAP = 1e-3
"""Relative; demand is not known better than this."""


class _Rows:
    """Sparse rows of A x, with their bounds."""

    def __init__(self) -> None:
        self.data: list[float] = []
        self.row: list[int] = []
        self.column: list[int] = []
        self.low: list[float] = []
        self.high: list[float] = []

    def add(self, terms: list[tuple[int, float]], low: float, high: float) -> None:
        self.column += [column for column, _ in terms]
        self.data += [factor for _, factor in terms]
        self.row += [len(self.low)] * len(terms)
        self.low.append(low)
        self.high.append(high)


def _run(
    cost: np.ndarray,
    matrix: coo_matrix,
    rows: _Rows,
    lower: np.ndarray,
    upper: np.ndarray,
    integers: int,
    nodes_max: int,
    start: np.ndarray | None,
) -> tuple[np.ndarray | None, bool, float]:
    """Minimises. (solution or None, whether it is proven within GAP, the gap left)."""
    csc = matrix.tocsc()
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(cost), len(rows.low)
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = cost, lower, upper
    lp.row_lower_, lp.row_upper_ = np.array(rows.low), np.array(rows.high)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = csc.indptr, csc.indices, csc.data
    if integers:
        kinds = [highspy.HighsVarType.kInteger] * integers + [highspy.HighsVarType.kContinuous] * (len(cost) - integers)
        lp.integrality_ = kinds
    solver = _Highs()  # the wrapper's constructor prints a banner before it can be told to be silent
    for option, value in {
        "output_flag": False,
        "threads": 1,
        "mip_max_nodes": nodes_max,
        "mip_rel_gap": GAP,
        "mip_heuristic_effort": 0.0,  # the greedy answer is the heuristic
    }.items():
        solver.setOptionValue(option, value)
    solver.passModel(lp)
    if start is not None:
        found = highspy.HighsSolution()
        found.col_value = list(start)
        solver.setSolution(found)
    solver.run()
    status = solver.getModelStatus()
    solution = solver.getSolution()
    if not solution.value_valid:
        return None, False, float("inf")
    return np.array(solution.col_value), status == highspy.HighsModelStatus.kOptimal, float(solver.getInfo().mip_gap)


def solve(
    problem: Problem, nodes_max: int = NODES_MAX, fixed: Counts | None = None, by: str = "exact", start: Answer | None = None
) -> Answer | None:
    """None where HiGHS finds nothing within its bound, or fails; the caller falls back to greedy and says so.

    With `fixed` counts only the flows are sought: the best that these groups can do, a linear program. `start`: an answer to begin from.
    """
    n_at = {
        (c, k): i
        for i, (c, k) in enumerate(
            (c, k)
            for c, cls in enumerate(problem.classes)
            for k, kind in enumerate(problem.kinds)
            if kind.pool in cls.pools and cls.blocks.get(kind.tp_size, 0) > 0 and any(kind.rates)
        )
    }
    if not n_at:
        return None
    width = len(n_at)
    f_at: dict[tuple[int, int], int] = {}
    for k, kind in enumerate(problem.kinds):
        for t, w in enumerate(problem.wants):
            if w.pool == kind.pool and kind.rate(w.tier) > 0:
                f_at[k, t] = width
                width += 1
    g_at = {(t, piece): width + PIECES * t + piece for t in range(len(problem.wants)) for piece in range(PIECES)}
    width += len(g_at)
    d_keys = sorted({(c, problem.kinds[k].pool, problem.kinds[k].tp_size) for c, k in n_at}) if problem.runs else []
    d_at = {key: width + i for i, key in enumerate(d_keys)}
    width += len(d_at)

    gain = np.zeros(width)
    lower, upper = np.zeros(width), np.full(width, np.inf)
    if fixed is not None:
        for key, i in n_at.items():
            lower[i] = upper[i] = fixed.get(key, 0)
    for t, w in enumerate(problem.wants):
        for piece, (most, worth) in enumerate(w.pieces()):
            gain[g_at[t, piece]], upper[g_at[t, piece]] = worth, most
    for (_, pool, tp_size), i in d_at.items():
        gain[i] = -problem.new_loss(pool, tp_size)

    rows = _Rows()
    by_want: dict[int, list[int]] = {}
    by_kind: dict[int, list[tuple[int, float]]] = {}
    groups: dict[int, list[tuple[int, float]]] = {}
    for (k, t), i in f_at.items():
        by_want.setdefault(t, []).append(i)
        by_kind.setdefault(k, []).append((i, 1.0 / problem.kinds[k].rate(problem.wants[t].tier)))
    for (_, k), i in n_at.items():
        groups.setdefault(k, []).append((i, -1.0))
    for t in range(len(problem.wants)):
        terms = [(i, 1.0) for i in by_want.get(t, ())]
        rows.add(terms + [(g_at[t, piece], -1.0) for piece in range(PIECES)], 0.0, np.inf)
    for k in sorted(by_kind):
        rows.add(by_kind[k] + groups.get(k, []), -np.inf, 0.0)
    for pool, budget in problem.budgets.items():
        terms = [(i, float(problem.kinds[k].tp_size)) for (_, k), i in n_at.items() if problem.kinds[k].pool == pool]
        if terms:
            rows.add(terms, -np.inf, float(budget))
    for c, cls in enumerate(problem.classes):
        mine = [(k, i) for (of, k), i in n_at.items() if of == c]
        rows.add([(i, float(problem.kinds[k].tp_size)) for k, i in mine], -np.inf, float(cls.nodes * cls.gpus))
        for tp_size in {problem.kinds[k].tp_size for k, _ in mine}:
            terms = [(i, 1.0) for k, i in mine if problem.kinds[k].tp_size == tp_size]
            rows.add(terms, -np.inf, float(cls.nodes * cls.blocks[tp_size]))
    for (c, pool, tp_size), i in d_at.items():
        terms = [
            (j, 1.0) for (of, k), j in n_at.items() if of == c and (problem.kinds[k].pool, problem.kinds[k].tp_size) == (pool, tp_size)
        ]
        rows.add([*terms, (i, -1.0)], -np.inf, float(problem.runs.get((c, pool, tp_size), 0)))

    matrix = coo_matrix((rows.data, (rows.row, rows.column)), shape=(len(rows.low), width))
    begin = None
    if start is not None and fixed is None:
        low, high = lower.copy(), upper.copy()
        for key, i in n_at.items():
            low[i] = high[i] = start.counts.get(key, 0)
        begin, _, _ = _run(-gain, matrix, rows, low, high, 0, nodes_max, None)
    x, proven, gap = _run(-gain, matrix, rows, lower, upper, 0 if fixed is not None else len(n_at), nodes_max, begin)
    if x is None:
        return None
    counts: Counts = {key: n for key, i in n_at.items() if (n := round(float(x[i]))) > 0}
    if fixed is None and not problem.legal(counts):
        return None
    through = {(k, problem.wants[t].tier): float(x[i]) for (k, t), i in f_at.items() if x[i] > 1e-9}
    safe = {(w.pool, w.tier): sum(float(x[i]) for i in by_want.get(t, ())) for t, w in enumerate(problem.wants)}
    served = {(w.pool, w.tier): min(safe[w.pool, w.tier], w.rate) for w in problem.wants}
    note = "" if proven else f"the exact search ended at its bound of {nodes_max} nodes, gap {gap:.2%}"
    return Answer(counts if fixed is None else dict(fixed), float(gain @ x), served, safe, through, by, note)
