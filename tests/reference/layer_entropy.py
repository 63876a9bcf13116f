"""layer_entropy over snapkv: layer budgets in proportion to the entropy of the layers' attention."""

from functools import lru_cache
from trace import Layer

import numpy as np

from allocators import all_scores
from budgets import Budget, cached_target, round_half_up
from compare import Case, check_eviction, same_choice
from snapkv import keep


@lru_cache(maxsize=1)
def entropies(trace):
    """Mean over heads and prompt queries, of every layer."""
    out = []
    for index in range(trace.num_layers):
        layer = Layer(trace, index)
        of_heads = []
        for head in range(layer.heads):
            p, _ = layer.rows(head, 0, layer.prompt)
            terms = p * np.log(p, out=np.zeros_like(p), where=p > 0)
            of_heads.append(-terms.sum(axis=1).mean())
        out.append(np.mean(of_heads))
    return np.array(out)


def layer_targets(weights, mean, cached):
    """mean * layers in proportion to the weights, none above `cached`."""
    out = np.zeros(len(weights))
    rest = np.ones(len(weights), bool)
    left = mean * len(weights)
    while rest.any():
        share = left * weights / weights[rest].sum()
        full = rest & (share >= cached)
        if not full.any():
            out[rest] = share[rest]
            break
        out[full] = cached
        rest &= ~full
        left -= cached * full.sum()
    return out


def layer_entropy(budget):
    def check(layer, dump, report):
        cut = layer.prompt
        scores, forced = all_scores(layer, cut)
        exact = layer_targets(entropies(layer.trace), cached_target(budget, cut), cut)[layer.index]
        report.expect(abs(exact % 1 - 0.5) > 1e-4, f"target {exact} is too near to a half")
        target = min(cut, round_half_up(exact))

        def judge(kv_head, found):
            expected = keep(scores[kv_head], target, forced)
            same_choice(report, f"layer {layer.index} KV head {kv_head}", found, expected, scores[kv_head])

        check_eviction(report, layer, dump, cut, judge)

    return check


def cases():
    out = []
    for name, budget in {"fifth": Budget(density=0.2), "capped": Budget(density=0.9)}.items():
        args = ["--evict", "snapkv", "--allocate", "layer_entropy", *budget.args()]
        out.append(
            Case(f"layer_entropy/{name}", "evict", args, layer_entropy(budget), traces=("all-layers",))
        )
    return out
