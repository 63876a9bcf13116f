"""expected_attention and cap: tokens ranked against the queries that are expected after the prompt."""

import numpy as np

from budgets import Budget
from eviction import TENTH, THIRD, case, reduce_group
from rope import mean_rotation, unrotated


def per_query_head(layer, tokens, sinks, future, gqa, scores, finish=lambda h, rows: rows):
    """scores(queries before RoPE, kv_head, rotation) -> [tokens - sinks]; the sinks: -inf."""
    queries = unrotated(layer, layer.q, tokens)[:, sinks:]
    rotation = mean_rotation(layer, tokens, future)
    out = []
    for h in range(layer.kv_heads):
        rows = np.stack([scores(queries[h * layer.group + g], h, rotation) for g in range(layer.group)])
        rows = finish(h, reduce_group(rows, gqa))
        out.append(np.concatenate([np.full((len(rows), sinks), -np.inf), rows], axis=1))
    return out


def expected_attention(sinks=4, future=512, covariance=True, value_norm=True, epsilon=0.0, gqa="mean"):
    def scores(layer, tokens):
        def probabilities(queries, h, rotation):
            keys = layer.k[h, sinks:tokens]
            logits = keys @ (rotation @ queries.mean(axis=0)) / np.sqrt(layer.dim)
            if covariance:
                spread = rotation @ np.cov(queries.T, bias=True) @ rotation.T
                logits += np.einsum("nd,de,ne->n", keys, spread, keys, optimize=True) / (2 * layer.dim)
            e = np.exp(logits - logits.max())
            return e / e.sum()

        def weigh(h, p):
            return (p + epsilon) * np.linalg.norm(layer.v[h, sinks:tokens], axis=1) if value_norm else p

        return per_query_head(layer, tokens, sinks, future, gqa, probabilities, weigh)

    return scores


def cap(sinks=4, future=512, sharpness=5.0, gqa="mean"):
    def scores(layer, tokens):
        def leverage(queries, h, rotation):
            k, v = layer.k[h, sinks:tokens], layer.v[h, sinks:tokens]
            q = rotation @ queries.mean(axis=0)
            cosine = k @ q / (np.linalg.norm(k, axis=1) * np.linalg.norm(q))
            u = np.exp(sharpness * (cosine - cosine.max()))
            a = np.eye(layer.dim) + (v * (u + 1e-6)[:, None]).T @ v
            return u * np.einsum("nd,nd->n", v, np.linalg.solve(a, v.T).T)

        return per_query_head(layer, tokens, sinks, future, gqa, leverage)

    return scores


def cases():
    def expected(name, budget, cut="end", settings=(), rule=None, **more):
        scores = expected_attention(**(rule or {}))
        return case("expected_attention", name, budget, scores, cut, settings, **{"sinks": 4, **more})

    def capped(name, budget, cut="end", settings=(), rule=None, **more):
        return case("cap", name, budget, cap(**(rule or {})), cut, settings, **{"sinks": 4, **more})

    few = Budget(tokens=90)
    short, no_sinks = {"sinks": 30, "future": 7}, {"sinks": 0, "future": 9}
    return [
        expected("default", TENTH, extra=True),
        expected("before_question", THIRD, "before_question"),
        expected("mean-only", TENTH, settings=["covariance=false"], rule={"covariance": False}),
        expected("no-norm", TENTH, settings=["value_norm=false"], rule={"value_norm": False}, layers="one"),
        expected("epsilon", TENTH, settings=["epsilon=0.01"], rule={"epsilon": 0.01}, layers="one"),
        expected("short", few, "500", ["sinks=30", "future=7"], short, sinks=30, layers="one"),
        expected("max", TENTH, settings=["gqa=max"], rule={"gqa": "max"}, layers="second"),
        expected("union", TENTH, settings=["gqa=union"], rule={"gqa": "union"}, layers="second"),
        capped("default", TENTH, extra=True),
        capped("before_question", THIRD, "before_question"),
        capped("flat", TENTH, settings=["sharpness=0"], rule={"sharpness": 0.0}, layers="one"),
        capped("short", few, "500", ["sinks=0", "future=9"], no_sinks, sinks=0, layers="one"),
        capped("max", TENTH, settings=["gqa=max"], rule={"gqa": "max"}, layers="second"),
        capped("union", TENTH, settings=["gqa=union"], rule={"gqa": "union"}, layers="second"),
    ]
