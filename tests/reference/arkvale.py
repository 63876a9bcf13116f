"""arkvale: pages ranked by q.centre + |q|.spread, reduced over all query heads of the layer."""

from functools import lru_cache

import numpy as np

from budgets import Budget, cached_target, step_units, top
from compare import Case, check_decode, same_choice, same_scores, units_in


def page_digests(keys, page):
    """keys [cached, d] -> centre, spread [pages, d]; the last page may be partial."""
    pages = [keys[a : a + page] for a in range(0, len(keys), page)]
    centre = np.stack([(p.max(axis=0) + p.min(axis=0)) / 2 for p in pages])
    spread = np.stack([np.abs(p - c).mean(axis=0) for p, c in zip(pages, centre)])
    return centre, spread


def arkvale(budget, page=32, sink_pages=2, recent_pages=2, reduce=np.mean):
    def check(layer, dump, report):
        @lru_cache(maxsize=1)
        def scores_of(step):
            at = layer.prompt + step
            rows = []
            for h in range(layer.kv_heads):
                centre, spread = page_digests(layer.k[h, : at + 1], page)
                q = layer.q[h * layer.group : (h + 1) * layer.group, at]
                rows.append(q @ centre.T + np.abs(q) @ spread.T)
            return reduce(np.concatenate(rows), axis=0)

        def judge(step, head, found):
            cached = layer.prompt + step + 1
            where = f"layer {layer.index} step {step} head {head}"
            pages = -(-cached // page)
            forced = np.union1d(np.arange(min(sink_pages, pages)), np.arange(max(0, pages - recent_pages), pages))
            forced = forced.astype(int)
            forced_tokens = sum(min((u + 1) * page, cached) - u * page for u in forced)
            count = step_units(cached_target(budget, cached, page), cached, page, forced_tokens, len(forced))
            scores = scores_of(step)
            free = np.ones(pages, bool)
            free[forced] = False
            same_scores(report, where, dump, step * layer.kv_heads + layer.kv_of(head), scores, free)
            expected = np.union1d(top(scores, count, free), forced).astype(int)
            ranked = scores.copy()
            ranked[forced] = np.inf
            same_choice(report, where, units_in(report, where, found, page, cached), expected, ranked)

        check_decode(report, layer, dump, judge)

    return check


def cases():
    fifth = Budget(density=0.2)

    def case(name, settings, check, budget=fifth, **more):
        args = ["--select", "arkvale", "--cells", "--scores", *budget.args()]
        for setting in settings:
            args += ["--set", f"select.{setting}"]
        return Case(f"arkvale/{name}", "decode", args, check, **more)

    few = Budget(units=7)
    return [
        case("default", [], arkvale(fifth), extra=True),
        case("max", ["gqa=max"], arkvale(fifth, reduce=np.max), layers="one"),
        case("sum", ["gqa=sum"], arkvale(fifth, reduce=np.sum), layers="one"),
        case("16", ["page_size=16"], arkvale(fifth, 16)),
        case("none-forced", ["sink_pages=0", "recent_pages=0"], arkvale(fifth, 32, 0, 0), layers="one"),
        case("units", ["sink_pages=1", "recent_pages=3"], arkvale(few, 32, 1, 3), few, layers="one"),
    ]
