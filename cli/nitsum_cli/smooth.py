"""Step times that never fall as there is more work, as near as possible to those measured."""

import numpy as np
from scipy.optimize import isotonic_regression

SLOPE = 1e-4


def monotone(rows: list[list[float]], first_column: float = 1.0) -> tuple[tuple[tuple[float, ...], ...], float]:
    """(rows that grow along both axes, largest relative change). Least squares along each axis in turn, in relative terms.

    `first_column`: its weight. Kernel tables hold prefill with nothing cached apart from prefill behind a cached context, and the latter
    comes out up to 0.3 ms too fast at small chunks: one column then weighs as much as all the others.
    """
    given = np.array(rows, dtype=float)
    weights = np.array([first_column] + [1.0] * (given.shape[1] - 1))
    log = np.log(given)
    for _ in range(4):
        log = np.apply_along_axis(lambda v: isotonic_regression(v).x, 0, log)
        log = np.apply_along_axis(lambda v: isotonic_regression(v, weights=weights).x, 1, log)
    grown = np.exp(log)
    grown = np.where(np.isclose(grown, given, rtol=1e-9), given, grown)
    for i in range(len(grown)):  # a plateau gets a slope too small to matter: more work is never quite free
        for j in range(len(grown[i])):
            before = max(grown[i - 1][j] if i else 0.0, grown[i][j - 1] if j else 0.0)
            grown[i][j] = max(grown[i][j], before * (1 + SLOPE))
    return tuple(tuple(float(x) for x in r) for r in grown), float(np.max(np.abs(grown / given - 1)))
