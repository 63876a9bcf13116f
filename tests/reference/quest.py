"""quest: pages ranked by an upper bound of q.k from the page's element-wise minima and maxima."""

import numpy as np

from budgets import Budget
from compare import Case
from ranking import check_decode_ranking


def page_scores(keys, queries, page):
    """keys [cached, d], queries [group, d] -> [group, pages]; the last page may be partial."""
    starts = np.arange(0, len(keys), page)
    low, high = np.minimum.reduceat(keys, starts), np.maximum.reduceat(keys, starts)
    return np.maximum(queries[:, None] * low, queries[:, None] * high).sum(axis=2)


def quest(budget, page=16, gqa="none", recent=1, dense_layers=()):
    def check(layer, dump, report):
        def scores(step, kv_head):
            at = layer.prompt + step
            heads = slice(kv_head * layer.group, (kv_head + 1) * layer.group)
            return page_scores(layer.k[kv_head, : at + 1], layer.q[heads, at], page)

        check_decode_ranking(layer, dump, report, budget, page, scores, recent, gqa, dense=layer.index in dense_layers)

    return check


def cases():
    tenth = Budget(density=0.1)

    def case(name, settings, check, budget=tenth, **more):
        args = ["--select", "quest", "--cells", "--scores", *budget.args()]
        for setting in settings:
            args += ["--set", setting]
        return Case(f"quest/{name}", "decode", args, check, **more)

    everywhere = "select.dense_layers=[]"
    out = [
        case("16", [everywhere], quest(tenth), extra=True),
        case("32", [everywhere, "select.page_size=32"], quest(tenth, 32)),
        case("default-dense-layers", [], quest(tenth, dense_layers=(0, 1))),
        case("none-forced", [everywhere, "select.forced_recent_pages=0"], quest(tenth, recent=0), layers="one"),
        case("three-forced", [everywhere, "select.forced_recent_pages=3"], quest(tenth, recent=3), layers="one"),
        case("tokens", [everywhere], quest(Budget(tokens=100)), Budget(tokens=100), layers="one"),
        case("units", [everywhere], quest(Budget(units=9)), Budget(units=9), layers="one"),
    ]
    for gqa in ("sum", "mean", "max", "union"):
        out.append(case(gqa, [everywhere, f"select.gqa={gqa}"], quest(tenth, gqa=gqa), extra=gqa == "sum"))
    return out
