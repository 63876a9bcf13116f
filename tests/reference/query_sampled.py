"""query_sampled: tokens ranked by the attention of every n-th query, and a window before each query."""

import numpy as np

from budgets import Budget, tile_target, top
from compare import Case, Prefill, same_choice, same_set


def sampled_columns(layer, head, stride):
    n = layer.prompt
    sample = np.arange(n - 1, -1, -stride)
    logits = layer.q[head, sample] @ layer.k[layer.kv_of(head), :n].T * layer.scale
    logits[np.arange(n) > sample[:, None]] = -np.inf
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (p / p.sum(axis=1, keepdims=True)).mean(axis=0)


def query_sampled(budget, stride=16, recent=64, gqa="none"):
    reducers = {"mean": np.mean, "sum": np.sum, "max": np.max}

    def check(layer, dump, report):
        view = Prefill(report, layer, dump)
        if not view.good:
            return
        columns = np.stack([sampled_columns(layer, h, stride) for h in range(layer.heads)])
        groups = [slice(h * layer.group, (h + 1) * layer.group) for h in range(layer.kv_heads)]
        for head in range(layer.heads):
            group = columns[groups[layer.kv_of(head)]]
            for t in range(view.tiles):
                begin, end = view.tile(t)
                where, found = view.where(head, t), view.row(head, t)
                k, pairs = tile_target(budget, layer.prompt, begin, end, 1)
                if k >= end:
                    same_set(report, where, found, np.arange(end))
                    continue
                forced = np.minimum(recent, np.arange(begin + 1, end + 1)).sum() if recent else 0
                count = k - recent if budget.units else max((pairs - forced) // (end - begin), 0 if recent else 1)
                window = np.arange(max(0, begin - recent + 1) if recent else end, end)
                candidates = np.arange(end) < (begin - recent + 1 if recent else end)
                if gqa == "union":
                    chosen = [top(row[:end], count, candidates) for row in group]
                    same_set(report, where, found, np.union1d(np.concatenate(chosen), window).astype(int))
                    continue
                row = columns[head, :end] if gqa == "none" else reducers[gqa](group[:, :end], axis=0)
                ranked = np.where(candidates, row, np.inf)
                expected = np.union1d(top(row, count, candidates), window).astype(int)
                same_choice(report, where, found, expected, ranked)
        view.check_outputs()

    return check


def cases():
    def case(name, settings, check, budget, **more):
        args = ["--cells", "--select", "query_sampled", *budget.args()]
        for setting in settings:
            args += ["--set", f"select.{setting}"]
        return Case(f"query_sampled/{name}", "prefill", args, check, **more)

    fifth, tokens = Budget(density=0.2), Budget(tokens=300)
    out = [
        case("density", [], query_sampled(fifth), fifth, extra=True),
        case("tokens", [], query_sampled(tokens), tokens, layers="one"),
        case("stride-1", ["stride=1"], query_sampled(fifth, 1), fifth, layers="one"),
        case("stride-64", ["stride=64", "recent=10"], query_sampled(fifth, 64, 10), fifth, layers="one"),
        case("one-query", ["stride=100000"], query_sampled(fifth, 100000), fifth, layers="one"),
        case("no-window", ["recent=0"], query_sampled(fifth, recent=0), fifth, layers="one"),
    ]
    for gqa in ("mean", "max", "sum", "union"):
        out.append(case(gqa, [f"gqa={gqa}"], query_sampled(fifth, gqa=gqa), fifth, layers="one"))
    return out
