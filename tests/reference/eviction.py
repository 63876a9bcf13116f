"""What every one-cut eviction by scores shares: forced tokens, the best others, outputs over what is left."""

import numpy as np

from budgets import Budget, cached_target
from compare import Case, check_eviction, same_choice, same_scores, same_set
from snapkv import forced_tokens, keep


def reduce_group(rows, gqa):
    """[group, cut] -> the rows that rank: one for the group, or one a query head (union)."""
    return rows if gqa == "union" else {"mean": rows.mean, "max": rows.max, "sum": rows.sum}[gqa](axis=0)[None]


def ranked(budget, cut, scores_of, sinks=0, recent=0, dense_layers=()):
    """scores_of(layer, tokens) -> per KV head [rows, tokens]; a head keeps the union of its rows' choices."""

    def check(layer, dump, report):
        tokens = layer.trace.cut(cut)
        forced = forced_tokens(tokens, {"sinks": sinks, "recent": recent})
        target = cached_target(budget, tokens)
        scores = None if layer.index in dense_layers else scores_of(layer, tokens)

        def judge(kv_head, found):
            where = f"layer {layer.index} KV head {kv_head}"
            if scores is None:
                same_set(report, where, found, np.arange(tokens))
                return
            rows = scores[kv_head]
            choices = [keep(row, target, forced) for row in rows]
            if len(rows) > 1:
                same_set(report, where, found, np.unique(np.concatenate(choices)))
                return
            free = np.ones(tokens, bool)
            free[forced] = False
            same_scores(report, where, dump, kv_head, rows[0], free)
            order = rows[0].copy()
            order[forced] = np.inf
            same_choice(report, where, found, choices[0], order)

        check_eviction(report, layer, dump, tokens, judge)

    return check


def case(strategy, name, budget, scores_of, cut="end", settings=(), sinks=0, recent=0, dense_layers=(), **more):
    """`lacuna dump --evict strategy` with these settings, held against scores_of(layer, tokens)."""
    args = ["--evict", strategy, "--cells", "--scores", "--cut", cut, *budget.args()]
    for setting in settings:
        args += ["--set", f"evict.{setting}"]
    check = ranked(budget, cut, scores_of, sinks, recent, dense_layers)
    return Case(f"{strategy}/{name}", "evict", args, check, **more)


TENTH, THIRD = Budget(density=0.1), Budget(density=0.3)
