"""non_causal: full attention inside chunks of the prompt, column sums times the value's norm, averaged over three."""

import numpy as np

from budgets import Budget
from eviction import TENTH, THIRD, case, reduce_group
from snapkv import pool


def standardise(heads):
    """One mean and one (unbiased) deviation over all heads and tokens."""
    values = np.concatenate([rows.ravel() for rows in heads])
    return [(rows - values.mean()) / values.std(ddof=1) for rows in heads]


def chunk_attention(layer, begin, end, chunk, gqa="mean"):
    """Per KV head [rows, end - begin], not standardised."""
    out = []
    for h in range(layer.kv_heads):
        rows = np.zeros((layer.group, end - begin))
        for g in range(layer.group):
            for a in range(begin, end, chunk):
                b = min(a + chunk, end)
                logits = layer.q[h * layer.group + g, a:b] @ layer.k[h, a:b].T
                p = np.exp(logits - logits.max(axis=1, keepdims=True))
                rows[g, a - begin : b - begin] = (p / p.sum(axis=1, keepdims=True)).sum(axis=0)
        rows = reduce_group(rows, gqa) * np.linalg.norm(layer.v[h, begin:end], axis=1)
        out.append(np.stack([pool(row, 3, "avg") for row in rows]))
    return out


def non_causal(chunk=256, gqa="mean"):
    return lambda layer, tokens: standardise(chunk_attention(layer, 0, tokens, chunk, gqa))


def cases():
    return [
        case("non_causal", "default", TENTH, non_causal(), extra=True),
        case("non_causal", "before_question", THIRD, non_causal(), "before_question"),
        case("non_causal", "chunk", THIRD, non_causal(100), settings=["chunk=100"], layers="one"),
        case("non_causal", "one-chunk", THIRD, non_causal(4000), "700", ["chunk=4000"], layers="one"),
        case("non_causal", "max", TENTH, non_causal(gqa="max"), settings=["gqa=max"], layers="second"),
        case("non_causal", "union", TENTH, non_causal(gqa="union"), settings=["gqa=union"], layers="second"),
        case("non_causal", "tokens", Budget(tokens=100), non_causal(), "513", layers="one"),
    ]
