"""lserve: pages ranked by the best bound of their sub-pages, with the query of the last length that reselects."""

import numpy as np

from allocators import DUO_CLASSES, DUO_FULL
from budgets import Budget, cached_target, top
from compare import Case, check_decode, same_choice, same_set, units_in
from quest import page_scores


def lserve(budget, page=64, sub_pages=4, reselect=4, classes=False, sinks=128, recent=256):
    def check(layer, dump, report):
        def judge(step, head, found):
            cached, h = layer.prompt + step + 1, layer.kv_of(head)
            where = f"layer {layer.index} step {step} head {head}"
            if classes and h not in DUO_FULL.get(layer.index, []):
                window = np.arange(max(0, cached - recent), cached)
                same_set(report, where, found, np.union1d(np.arange(min(sinks, cached)), window))
                return
            target = cached_target(budget, cached, page)
            if target >= cached:
                same_set(report, where, found, np.arange(cached))
                return
            selected = max(cached - cached % reselect, layer.prompt + 1)
            subs = page_scores(layer.k[h, :selected], layer.q[head, selected - 1][None], page // sub_pages)[0]
            scores = np.maximum.reduceat(subs, np.arange(0, len(subs), sub_pages))
            last = (cached - 1) // page
            scores = np.append(scores[:last], np.inf)
            count = max((target - (cached - last * page)) // page, 2)
            expected = np.append(top(scores[:last], count), last)
            same_choice(report, where, units_in(report, where, found, page, cached), expected, scores)

        check_decode(report, layer, dump, judge)

    return check


def cases():
    quarter = Budget(density=0.25)

    def case(name, settings, check, budget=quarter, **more):
        args = ["--select", "lserve", "--cells", *budget.args()]
        for setting in settings:
            args += ["--set", f"select.{setting}"]
        return Case(f"lserve/{name}", "decode", args, check, **more)

    table = f"classes={DUO_CLASSES}"
    tokens, dense = Budget(tokens=100), Budget(tokens=100000)
    return [
        case("default", [], lserve(quarter), extra=True),
        case("every-token", ["reselect=1"], lserve(quarter, reselect=1), layers="one"),
        case("seldom", ["reselect=32"], lserve(quarter, reselect=32)),
        case("small", ["page_size=32", "sub_pages=2", "reselect=8"], lserve(quarter, 32, 2, 8), extra=True),
        case("one-part", ["sub_pages=1"], lserve(quarter, sub_pages=1), layers="one"),
        case("least", [], lserve(tokens), tokens, layers="one"),
        case("dense", [table], lserve(dense, classes=True), dense, layers="one"),
        case("classes", [table], lserve(quarter, classes=True)),
        case("streaming", [table, "sinks=10", "recent=50"], lserve(quarter, 64, 4, 4, True, 10, 50), layers="one"),
    ]
