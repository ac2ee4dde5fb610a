"""The slow plane's question as a mixed-integer linear program, solved by HiGHS. Bounded by branch-and-bound nodes, never by the clock,
and on one thread, so that equal questions get equal answers on any machine.

Variables: n[c,k] groups (integer), f[k,t] flow of a tier through a kind, its pieces g[t,i],
d[c,p,shape] groups beyond those that run. maximise sum weight x worth x g - loss x d.
"""

from dataclasses import replace

import highspy
import numpy as np
from highspy._core import _Highs
from scipy.sparse import coo_matrix

from nitsum.planner.answer import Answer
from nitsum.planner.problem import PIECES, Counts, Problem
from nitsum.planner.split import Shape

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
    model: "Model",
    lower: np.ndarray,
    upper: np.ndarray,
    integers: int,
    nodes_max: int,
    start: np.ndarray | None,
) -> tuple[np.ndarray | None, bool, float]:
    """Minimises. (solution or None, whether it is proven within GAP, the gap left)."""
    rows, csc = model.rows, model.matrix
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


class Model:
    """Columns and rows of a problem. They do not depend on what a flip costs, so one serves several questions about the same groups."""

    def __init__(self, problem: Problem) -> None:
        kinds, wants = problem.kinds, problem.wants
        able = [
            (c, k)
            for c, cls in enumerate(problem.classes)
            for k, kind in enumerate(kinds)
            if cls.takes(kind) and any(kind.by_tier.values())
        ]
        self.n_at = {key: i for i, key in enumerate(able)}
        width = len(self.n_at)
        self.f_at: dict[tuple[int, int], int] = {}
        self.by_want: list[list[int]] = [[] for _ in wants]
        by_kind: dict[int, list[tuple[int, float]]] = {}
        for k, kind in enumerate(kinds):
            for t, w in enumerate(wants):
                if w.pool == kind.pool and (rate := kind.rate(w.tier)) > 0:
                    self.f_at[k, t] = width
                    self.by_want[t].append(width)
                    by_kind.setdefault(k, []).append((width, 1.0 / rate))
                    width += 1
        self.g_at = {(t, piece): width + PIECES * t + piece for t in range(len(wants)) for piece in range(PIECES)}
        width += len(self.g_at)
        shapes: dict[tuple[int, str, Shape], list[int]] = {}
        groups: dict[int, list[tuple[int, float]]] = {}
        for (c, k), i in self.n_at.items():
            shapes.setdefault((c, kinds[k].pool, kinds[k].shape), []).append(i)
            groups.setdefault(k, []).append((i, -1.0))
        self.d_at = {key: width + i for i, key in enumerate(sorted(shapes) if problem.runs else [])}
        width += len(self.d_at)
        self.width = width

        rows = _Rows()
        for t in range(len(wants)):
            rows.add([(i, 1.0) for i in self.by_want[t]] + [(self.g_at[t, piece], -1.0) for piece in range(PIECES)], 0.0, np.inf)
        for k, flows in by_kind.items():
            rows.add(flows + groups.get(k, []), -np.inf, 0.0)
        for pool, budget in problem.budgets.items():
            terms = [(i, float(shape[0])) for (_, of, shape), columns in shapes.items() if of == pool for i in columns]
            if terms:
                rows.add(terms, -np.inf, float(budget))
        for c, cls in enumerate(problem.classes):
            mine = {key: columns for key, columns in shapes.items() if key[0] == c}
            rows.add(
                [(i, float(shape[0])) for (_, _, shape), columns in mine.items() for i in columns], -np.inf, float(cls.nodes * cls.gpus)
            )
            for size in sorted({shape[0] for _, _, shape in mine}):
                terms = [(i, 1.0) for (_, _, shape), columns in mine.items() if shape[0] == size for i in columns]
                rows.add(terms, -np.inf, float(cls.nodes * cls.blocks[size]))
        for key, i in self.d_at.items():
            rows.add([*((j, 1.0) for j in shapes[key]), (i, -1.0)], -np.inf, float(problem.runs.get(key, 0)))
        self.rows = rows
        self.matrix = coo_matrix((rows.data, (rows.row, rows.column)), shape=(len(rows.low), width)).tocsc()

    def started(self, problem: Problem, answer: Answer) -> np.ndarray:
        """An answer as a column each."""
        x = np.zeros(self.width)
        index = {(w.pool, w.tier): t for t, w in enumerate(problem.wants)}
        for key, n in answer.counts.items():
            if (at := self.n_at.get(key)) is not None:
                x[at] = n
                kind = problem.kinds[key[1]]
                if (new := self.d_at.get((key[0], kind.pool, kind.shape))) is not None:
                    x[new] += n
        for key3, at in self.d_at.items():
            x[at] = max(x[at] - problem.runs.get(key3, 0), 0)
        for (k, tier), flow in answer.flows.items():
            if (at := self.f_at.get((k, index[problem.kinds[k].pool, tier]))) is not None:
                x[at] = flow
        for t, w in enumerate(problem.wants):
            left = float(x[self.by_want[t]].sum())
            for piece, (most, _) in enumerate(w.pieces()):
                x[self.g_at[t, piece]] = got = min(left, most)
                left -= got
        return x


def solve(
    problem: Problem,
    nodes_max: int = NODES_MAX,
    fixed: Counts | None = None,
    by: str = "exact",
    start: Answer | None = None,
    model: Model | None = None,
) -> Answer | None:
    """None where HiGHS finds nothing within its bound, or fails; the caller falls back to greedy and says so.

    With `fixed` counts only the flows are sought: the best that these groups can do, a linear program. `start`: an answer to begin from.
    `model`: of this problem, where there is one already.
    """
    model = model or Model(problem)
    n_at = model.n_at
    if not n_at:
        return None
    gain = np.zeros(model.width)
    lower, upper = np.zeros(model.width), np.full(model.width, np.inf)
    if fixed is not None:
        for key, i in n_at.items():
            lower[i] = upper[i] = fixed.get(key, 0)
    for t, w in enumerate(problem.wants):
        for piece, (most, worth) in enumerate(w.pieces()):
            gain[model.g_at[t, piece]], upper[model.g_at[t, piece]] = worth, most
    for (_, pool, shape), i in model.d_at.items():
        gain[i] = -problem.new_loss(pool, shape)
    begin = model.started(problem, start) if start is not None and fixed is None else None
    if start is not None and begin is not None:
        found, _, _ = _run(-gain, model, lower, upper, 0, nodes_max, None)
        if found is not None and gain @ found - gain @ begin <= GAP * abs(gain @ begin):
            return replace(start, by=by, note="")  # parts of groups would not earn more than the gap
    x, proven, gap = _run(-gain, model, lower, upper, 0 if fixed is not None else len(n_at), nodes_max, begin)
    if x is None:
        return None
    counts: Counts = {key: n for key, i in n_at.items() if (n := round(float(x[i]))) > 0}
    if fixed is None and not problem.legal(counts):
        return None
    through = {(k, problem.wants[t].tier): float(x[i]) for (k, t), i in model.f_at.items() if x[i] > 1e-9}
    safe = {(w.pool, w.tier): float(x[model.by_want[t]].sum()) for t, w in enumerate(problem.wants)}
    served = {(w.pool, w.tier): min(safe[w.pool, w.tier], w.rate) for w in problem.wants}
    note = "" if proven else f"the exact search ended at its bound of {nodes_max} nodes, gap {gap:.2%}"
    return Answer(counts if fixed is None else dict(fixed), float(gain @ x), served, safe, through, by, note)
