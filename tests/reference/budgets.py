"""How a budget becomes a count of units: density, tokens or units, by phase."""

import math
from dataclasses import dataclass

import numpy as np


def round_half_up(x):
    return math.floor(x + 0.5)


@dataclass(frozen=True)
class Budget:
    density: float = None
    tokens: int = None
    units: int = None
    proportional: bool = False

    def args(self):
        for key in ("density", "tokens", "units"):
            if getattr(self, key) is not None:
                return [f"--{key}", str(getattr(self, key))]
        return []


def constant_tokens(density, prompt):
    """The largest K with sum of min(K, q + 1) <= density * sum of (q + 1)."""
    visible = np.arange(1, prompt + 1)
    limit = density * visible.sum()
    best = 0
    for k in range(prompt + 1):
        if np.minimum(k, visible).sum() > limit:
            break
        best = k
    return best


_constant = {}


def tile_target(budget, prompt, begin, end, unit):
    """Target of the prefill tile of queries [begin, end): tokens K_t and pairs P_t."""
    if budget.units is not None:
        k = budget.units * unit
    elif budget.tokens is not None:
        k = budget.tokens
    elif budget.proportional:
        k = round_half_up(budget.density * end)
    else:
        key = (budget.density, prompt)
        if key not in _constant:
            _constant[key] = constant_tokens(*key)
        k = _constant[key]
    return k, int(np.minimum(k, np.arange(begin + 1, end + 1)).sum())


def cached_target(budget, cached, unit=1):
    """Target tokens of a decode step over `cached` tokens, or of an eviction from them."""
    if budget.units is not None:
        return budget.units * unit
    return budget.tokens if budget.tokens is not None else round_half_up(budget.density * cached)


def causal_pairs(first, last, begin, end):
    """(query, key) pairs of the keys [first, last) and the queries [begin, end)."""
    return int(sum(max(0, min(last, i + 1) - first) for i in range(begin, end)))


def tile_units(budget, prompt, begin, end, unit, forced, min_units=0):
    """Ranked units beside the `forced` ones (ids) of a prefill tile; None: everything that is visible."""
    k, pairs = tile_target(budget, prompt, begin, end, unit)
    if k >= end:
        return None
    if budget.units is not None:
        ranked = budget.units - len(forced)
    else:
        inside = sum(causal_pairs(u * unit, (u + 1) * unit, begin, end) for u in forced)
        ranked = (pairs - inside) // (unit * (end - begin))
    return max(ranked, max(1, min_units) - len(forced), 0)


def step_units(target, cached, unit, forced_tokens, forced_units, min_units=0):
    """Ranked units of a row with one query (decode) or of an eviction; None: everything."""
    if target >= cached:
        return None
    return max((target - forced_tokens) // unit, max(1, min_units) - forced_units, 0)


def top(scores, count, candidates=None):
    """The `count` largest, ties to the lower index, -inf never: ascending indices."""
    scores = np.asarray(scores, dtype=np.float64)
    order = np.argsort(-scores, kind="stable")
    if candidates is not None:
        order = order[np.asarray(candidates)[order]]
    order = order[scores[order] > -np.inf]
    return np.sort(order[:count])
