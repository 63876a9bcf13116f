"""top_p: budgets of rows from how many units hold a share of their mass."""

from fractions import Fraction

import numpy as np

from budgets import Budget, cached_target, tile_target, top
from compare import Case, Prefill, check_decode, check_eviction, same_choice, units_in
from ranking import sum_units
from snapkv import PRESETS, forced_tokens, snapkv_scores

RULE = PRESETS["longbench"]


def own_count(scores, p):
    """Forced units (+inf) and the smallest descending prefix of the others that reaches p of their sum."""
    forced = int(np.isposinf(scores).sum())
    mass = np.sort(scores[np.isfinite(scores) & (scores > 0)])[::-1]
    if not len(mass):
        return max(forced, 1)
    return forced + int(np.argmax(np.cumsum(mass) >= p * mass.sum() * (1 - 1e-12))) + 1


def share_out(total, counts, most):
    """`total` units in proportion to the counts, at most most[r] each; the last ones by the largest remainders."""
    given = [None] * len(counts)
    while True:
        rest = [r for r, g in enumerate(given) if g is None]
        left, weight = total - sum(g for g in given if g is not None), sum(counts[r] for r in rest)
        full = [r for r in rest if Fraction(left * counts[r], weight) >= most[r]]
        for r in full:
            given[r] = most[r]
        if not full:
            break
    quota = {r: Fraction(left * counts[r], weight) for r in rest}
    for r in rest:
        given[r] = int(quota[r])
    spare = left - sum(given[r] for r in rest)
    for r in sorted(rest, key=lambda r: (int(quota[r]) - quota[r], r))[:spare]:
        given[r] += 1
    return given


def targets(rows, p, total, units):
    """Units of every row of a pool; `total` None: as many as they ask for."""
    counts = [own_count(row, p) for row in rows]
    if total is None:
        return [min(n, units) for n in counts]
    if total >= units * len(rows):
        return [units] * len(rows)
    return share_out(total, counts, [units] * len(rows))


def evict(p, budget, cut="end"):
    def check(layer, dump, report):
        tokens = layer.trace.cut(cut)
        scores = np.stack([snapkv_scores(layer, h, tokens, RULE)[0] for h in range(layer.kv_heads)])
        scores[:, forced_tokens(tokens, RULE)] = np.inf
        total = None if budget is None else cached_target(budget, tokens) * layer.kv_heads
        wanted = targets(scores, p, total, tokens)

        def judge(kv_head, found):
            row = scores[kv_head]
            same_choice(report, f"layer {layer.index} KV head {kv_head}", found, top(row, wanted[kv_head]), row)

        check_eviction(report, layer, dump, tokens, judge)

    return check


def decode(p, budget, unit):
    """Over oracle_topk, whose scores are the true mass."""

    def check(layer, dump, report):
        table = {}

        def pool(step):
            if step not in table:
                at = layer.prompt + step
                rows = [sum_units(layer.rows(h, at, at + 1)[0][0], unit) for h in range(layer.heads)]
                total = None
                if budget is not None:
                    total = cached_target(budget, at + 1, unit) * layer.heads // unit
                table[step] = rows, targets(rows, p, total, -(-(at + 1) // unit))
            return table[step]

        def judge(step, head, found):
            rows, wanted = pool(step)
            where = f"layer {layer.index} step {step} head {head}"
            chosen = units_in(report, where, found, unit, layer.prompt + step + 1)
            same_choice(report, where, chosen, top(rows[head], max(wanted[head], 1)), rows[head])

        check_decode(report, layer, dump, judge)

    return check


def prefill(p, budget, unit=64):
    def check(layer, dump, report):
        view = Prefill(report, layer, dump)
        if not view.good:
            return
        for t in range(view.tiles):
            begin, end = view.tile(t)
            rows = [sum_units(layer.rows(h, begin, end)[0].sum(axis=0), unit) for h in range(layer.heads)]
            total, units = None, -(-end // unit)
            if budget is not None:
                k, pairs = tile_target(budget, layer.prompt, begin, end, unit)
                total = units * layer.heads if k >= end else pairs * layer.heads // (unit * (end - begin))
            for head, count in enumerate(targets(rows, p, total, units)):
                found = units_in(report, view.where(head, t), view.row(head, t), unit, end)
                same_choice(report, view.where(head, t), found, top(rows[head], max(count, 1)), rows[head])
        view.check_outputs()

    return check


def cases():
    tenth, half, most = Budget(density=0.1), Budget(density=0.5), Budget(density=0.95)

    def case(name, phase, args, budget, check, p=None, **more):
        args = [*args, "--allocate", "top_p", *(budget.args() if budget else [])]
        if p is not None:
            args += ["--set", f"allocate.p={p}"]
        return Case(f"top_p/{name}", phase, args, check, **more)

    snapkv, page, block = ["--evict", "snapkv"], ["--select", "oracle_topk", "--set", "select.unit=page"], [
        "--cells", "--select", "oracle_topk", "--set", "select.unit=block",
    ]  # fmt: skip
    token = ["--select", "oracle_topk"]
    out = [
        case("evict/own", "evict", snapkv, None, evict(0.9, None), extra=True),
        case("evict/own-half", "evict", snapkv, None, evict(0.5, None), 0.5),
        case("evict/budget", "evict", snapkv, tenth, evict(0.9, tenth), extra=True),
        case("evict/small-p", "evict", snapkv, half, evict(0.2, half), 0.2),
        case("evict/capped", "evict", snapkv, most, evict(0.5, most), 0.5),
        case("decode/own", "decode", token, None, decode(0.9, None, 1), extra=True),
        case("decode/budget", "decode", token, tenth, decode(0.9, tenth, 1), layers="one"),
        case("decode/pages", "decode", page, tenth, decode(0.9, tenth, 16), extra=True),
        case("decode/pages-own", "decode", page, None, decode(0.8, None, 16), 0.8, layers="one"),
        case("prefill/own", "prefill", block, None, prefill(0.9, None), layers="second"),
        case("prefill/budget", "prefill", block, Budget(density=0.2), prefill(0.9, Budget(density=0.2))),
        case("prefill/capped", "prefill", block, Budget(density=0.8), prefill(0.6, Budget(density=0.8)), 0.6, layers="one"),
    ]
    return out
