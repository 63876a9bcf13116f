"""knorm, keydiff, lagkv, cur: tokens ranked by keys and values alone."""

import numpy as np

from budgets import Budget
from eviction import TENTH, THIRD, case


def per_head(scores):
    """scores(keys, values) -> [tokens], as what eviction.case wants."""
    return lambda layer, tokens: [scores(layer.k[h, :tokens], layer.v[h, :tokens])[None] for h in range(layer.kv_heads)]


def knorm(k, v):
    return -np.sqrt((k**2).sum(axis=1))


def keydiff(k, v):
    unit = k / np.linalg.norm(k, axis=1, keepdims=True)
    anchor = unit.mean(axis=0)
    return -(unit @ anchor) / np.linalg.norm(anchor)


def lagkv(sinks=4, lag=128):
    """A channel that is constant in the next partition counts nothing."""

    def scores(k, v):
        tokens = len(k)
        out = np.ones(tokens)
        if tokens < sinks + 2 * lag:
            out[sinks:] = np.arange(max(tokens - sinks, 0)) / (tokens - sinks)
            return out
        for begin in range(sinks, tokens - 2 * lag + 1, lag):
            here, after = slice(begin, begin + lag), slice(begin + lag, begin + 2 * lag)
            weight = np.zeros(lag)
            for x in (k, v):
                low, high = x[after].min(axis=0), x[after].max(axis=0)
                width = high - low
                scaled = np.divide(x[here] - low, width, out=np.zeros((lag, x.shape[1])), where=width > 0)
                spread = scaled.std(axis=1, ddof=1)
                e = np.exp(spread - spread.max())
                weight += e / e.sum() / 2
            out[here] = np.argsort(np.argsort(weight)) / lag
        return out

    return per_head(scores)


def cur(window=16):
    def shares(x):
        squares = (x**2).sum(axis=1)
        sums = np.add.reduceat(squares, np.arange(0, len(squares), window))
        return squares / np.repeat(sums, window)[: len(squares)]

    def scores(k, v):
        product = shares(k) * shares(v)
        return product / product.sum()

    return per_head(scores)


def cases():
    norms, differences = per_head(knorm), per_head(keydiff)
    return [
        case("knorm", "default", TENTH, norms, dense_layers=(0, 1), extra=True),
        case("knorm", "kvpress", THIRD, norms, settings=["preset=kvpress"]),
        case("knorm", "before_question", TENTH, norms, "before_question", ["dense_layers=[]"]),
        case("knorm", "recent", THIRD, norms, settings=["dense_layers=[]", "recent=50"], recent=50, layers="one"),
        case("keydiff", "default", TENTH, differences, extra=True),
        case("keydiff", "before_question", THIRD, differences, "before_question"),
        case("keydiff", "tokens", Budget(tokens=300), differences, "1000", layers="one"),
        case("lagkv", "default", TENTH, lagkv(), sinks=4, extra=True),
        case("lagkv", "third", THIRD, lagkv(), "before_question", sinks=4),
        case("lagkv", "lag-64", THIRD, lagkv(16, 64), settings=["lag=64", "sinks=16"], sinks=16),
        case("lagkv", "lag-7", THIRD, lagkv(0, 7), "701", ["lag=7", "sinks=0"], layers="one"),
        case("lagkv", "two-partitions", THIRD, lagkv(), "260", sinks=4, layers="one"),
        case("lagkv", "short", THIRD, lagkv(), "259", sinks=4, layers="one"),
        case("lagkv", "one-token-left", Budget(tokens=5), lagkv(), "end", sinks=4, layers="one"),
        case("cur", "default", TENTH, cur(), sinks=4, extra=True),
        case("cur", "window", THIRD, cur(100), "before_question", ["window=100", "sinks=0"]),
        case("cur", "one-window", THIRD, cur(5000), "777", ["window=5000"], sinks=4, layers="one"),
    ]
