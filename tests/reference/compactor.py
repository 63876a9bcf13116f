"""leverage and compactor: leverage of the keys before RoPE, alone and beside attention inside chunks."""

import numpy as np

from budgets import Budget, cached_target
from eviction import TENTH, THIRD, case
from non_causal import chunk_attention, standardise
from philox import layer_key, philox_normal
from rope import unrotated


def leverage(layer, begin, end, sketch=0, seed=0):
    """Per KV head [1, end - begin], not standardised."""
    keys = unrotated(layer, layer.k, end)[:, begin:]
    out = []
    for h, x in enumerate(keys):
        x = x - x.mean(axis=0)
        if sketch:
            at = np.arange(layer.dim * sketch).reshape(layer.dim, sketch)
            x = x @ philox_normal(layer_key(seed, layer.index), 0, np.array(h), at) / np.sqrt(sketch)
        gram = x.T @ x + 0.01 * np.eye(x.shape[1])
        out.append(np.einsum("nd,nd->n", x, np.linalg.solve(gram, x.T).T)[None])
    return out


def standardised_leverage(sketch=0, seed=0):
    return lambda layer, tokens: standardise(leverage(layer, 0, tokens, sketch, seed))


def compactor(budget, beta=None, head=8, tail=4, gqa="mean"):
    def scores(layer, tokens):
        weight = beta
        if weight is None:
            weight = 1 - cached_target(budget, tokens) / tokens
        begin, end = head, tokens - tail
        first = standardise(leverage(layer, begin, end))
        second = standardise(chunk_attention(layer, begin, end, 256, gqa))
        out = []
        for a, b in zip(first, second):
            row = np.full((len(b), tokens), -np.inf)
            row[:, begin:end] = weight * a + b
            out.append(row)
        return out

    return scores


def cases():
    few = Budget(tokens=200)
    ends = {"sinks": 8, "recent": 4}

    def blend(name, budget, cut="end", settings=(), rule=None, **more):
        return case("compactor", name, budget, compactor(budget, **(rule or {})), cut, settings, **{**ends, **more})

    return [
        case("leverage", "default", TENTH, standardised_leverage(), extra=True),
        case("leverage", "before_question", THIRD, standardised_leverage(), "before_question"),
        case("leverage", "kvpress", TENTH, standardised_leverage(48), settings=["preset=kvpress"]),
        case("leverage", "wide", TENTH, standardised_leverage(100), "700", ["sketch=100"], layers="one"),
        case("leverage", "few", Budget(tokens=20), standardised_leverage(), "60", layers="one"),
        blend("default", TENTH, extra=True),
        blend("before_question", THIRD, "before_question"),
        blend("beta", few, "1000", ["beta=0.5"], {"beta": 0.5}),
        blend(
            "ends", few, "900", ["head=20", "tail=0"], {"head": 20, "tail": 0}, sinks=20, recent=0, layers="one"
        ),
        blend("union", TENTH, "end", ["gqa=union"], {"gqa": "union"}, layers="second"),
    ]
