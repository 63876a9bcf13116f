"""oracle_topp: the smallest set of units that holds a share of the true mass."""

import numpy as np

from budgets import Budget
from compare import Case, Prefill, check_decode, same_choice, units_in
from ranking import check_prefill_ranking, sum_units

SLACK = 1e-5  # of the mass, in fp32 sums


def same_smallest(report, where, found, scores, p):
    """`found` are the best units, and no fewer would hold p of the mass."""
    order = np.argsort(-scores, kind="stable")
    held = np.cumsum(scores[order]) / scores.sum()
    count = len(found)
    enough = count > 0 and held[count - 1] >= p - SLACK
    if report.expect(enough, f"{where}: {count} units hold {held[count - 1] if count else 0:.6f}, wanted {p}"):
        report.expect(count == 1 or held[count - 2] < p + SLACK, f"{where}: fewer than {count} units would do")
        same_choice(report, where, found, np.sort(order[:count]), scores)


def prefill(p, unit, q_tile=64):
    def check(layer, dump, report):
        view = Prefill(report, layer, dump)
        if not view.good:
            return
        report.expect(view.q_tile == q_tile, f"q_tile {view.q_tile}, expected {q_tile}")
        for head in range(layer.heads):
            for t in range(view.tiles):
                begin, end = view.tile(t)
                scores = sum_units(layer.rows(head, begin, end)[0].mean(axis=0), unit)
                found = units_in(report, view.where(head, t), view.row(head, t), unit, end)
                same_smallest(report, view.where(head, t), found, scores, p)
        view.check_outputs()

    return check


def decode(p, unit, gqa="none"):
    reducers = {"mean": np.mean, "sum": np.sum, "max": np.max}

    def check(layer, dump, report):
        def judge(step, head, found):
            at = layer.prompt + step
            first = layer.kv_of(head) * layer.group
            rows = np.stack([sum_units(layer.rows(h, at, at + 1)[0][0], unit) for h in range(first, first + layer.group)])
            scores = rows[head - first] if gqa == "none" else reducers[gqa](rows, axis=0)
            where = f"layer {layer.index} step {step} head {head}"
            same_smallest(report, where, units_in(report, where, found, unit, at + 1), scores, p)

        check_decode(report, layer, dump, judge)

    return check


def ranked(budget, unit):
    def check(layer, dump, report):
        def scores(head, t, begin, end):
            return sum_units(layer.rows(head, begin, end)[0].mean(axis=0), unit)

        check_prefill_ranking(layer, dump, report, budget, unit, scores, q_tile=64)

    return check


def cases():
    def case(phase, name, settings, check, budget=(), **more):
        args = ["--cells", "--select", "oracle_topp", *budget]
        for setting in settings:
            args += ["--set", f"select.{setting}"]
        return Case(f"oracle_topp/{name}/{phase}", phase, args, check, **more)

    fifth = Budget(density=0.2)
    out = [
        case("prefill", "default", [], prefill(0.95, 1), extra=True),
        case("decode", "default", [], decode(0.95, 1), extra=True),
        case("prefill", "page", ["unit=page", "p=0.8"], prefill(0.8, 16), layers="one"),
        case("decode", "page", ["unit=page", "p=0.8"], decode(0.8, 16)),
        case("prefill", "block", ["unit=block", "p=0.9", "q_tile=32"], prefill(0.9, 64, 32), layers="one"),
        case("decode", "block", ["unit=block", "p=0.5"], decode(0.5, 64), layers="one"),
        case("decode", "all", ["p=1"], decode(1.0, 1), layers="one"),
        case("prefill", "budget", ["unit=block"], ranked(fifth, 64), fifth.args(), layers="one"),
    ]
    for gqa in ("mean", "max", "sum"):
        out.append(case("decode", gqa, [f"gqa={gqa}"], decode(0.95, 1, gqa), layers="one"))
    return out
