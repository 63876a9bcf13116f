"""twilight over quest: the base's tokens cut by top-p of a softmax over 4-bit keys."""

import numpy as np

from budgets import Budget, cached_target, step_units
from compare import TIE, Case, check_decode
from quest import page_scores

PAGE = 16


def four_bit_keys(k):
    """Per token: min + scale * code. The codes are stored data, so the steps to them are those of fp32, halves to even
    (as torch rounds): in float64 a channel on the border of two codes would fall otherwise."""
    k = k.astype(np.float32)
    low = k.min(axis=-1, keepdims=True)
    scale = (k.max(axis=-1, keepdims=True) - low) / np.float32(15)
    codes = np.rint((k - low) / np.where(scale > 0, scale, np.float32(1)))
    return low.astype(np.float64) + scale.astype(np.float64) * codes


def minimal_set(p, top_p, limit=None):
    order = np.argsort(-p, kind="stable")
    count = int(np.searchsorted(np.cumsum(p[order]), top_p * p.sum() * (1 - 1e-12)) + 1)
    return np.sort(order[: min(count, len(p)) if limit is None else min(count, limit)])


def acceptable(found, base, p, top_p, limit=None):
    """A shortest prefix in descending order whose mass reaches top_p, up to ties in rank or mass."""
    chosen = np.isin(base, found)
    if not np.isin(found, base).all() or not chosen.any():
        return False
    inside, outside = p[chosen], p[~chosen]
    in_order = not len(outside) or outside.max() - inside.min() <= TIE * inside.min()
    mass, total = inside.sum(), p.sum()
    if limit is not None and len(inside) == limit:
        return in_order and mass - inside.min() < (top_p + TIE) * total
    return in_order and mass >= (top_p - TIE) * total and mass - inside.min() < (top_p + TIE) * total


def twilight(base_budget, top_p=0.85, budget=None, dense_layers=()):
    def check(layer, dump, report):
        keys = four_bit_keys(layer.k)

        def judge(step, head, found):
            at, h = layer.prompt + step, layer.kv_of(head)
            cached = at + 1
            where = f"layer {layer.index} step {step} head {head}"
            report.rows += 1
            if layer.index in dense_layers:
                report.expect(np.array_equal(found, np.arange(cached)), f"{where}: not dense")
                return
            q = layer.q[head, at]
            scores = page_scores(layer.k[h, :cached], q[None], PAGE)[0]
            last = len(scores) - 1
            count = step_units(cached_target(base_budget, cached), cached, PAGE, cached - last * PAGE, 1)
            limit = None if budget is None else cached_target(budget, cached)
            order = np.argsort(-scores[:last], kind="stable")
            bases = [order[:count]]
            if scores[order[count - 1]] - scores[order[count]] <= TIE * abs(scores[order[count]]):
                bases.append(np.append(order[: count - 1], order[count]))
            for pages in bases:
                base = np.concatenate(
                    [np.arange(u * PAGE, min((u + 1) * PAGE, cached)) for u in (*np.sort(pages), last)]
                )
                logits = keys[h, base] @ q * layer.scale
                p = np.exp(logits - logits.max())
                p /= p.sum()
                expected = base[minimal_set(p, top_p, limit)]
                if np.array_equal(found, expected):
                    report.elements += len(expected)
                    return
                if acceptable(found, base, p, top_p, limit):
                    differing = np.setxor1d(found, expected)
                    report.ties.append((where, len(differing), 0.0))
                    report.elements += len(expected)
                    return
            missing, extra = np.setdiff1d(expected, found), np.setdiff1d(found, expected)
            report.fail(
                f"{where}: {len(found)} tokens, expected {len(expected)}: missing {missing[:4]}, extra {extra[:4]}"
            )

        check_decode(report, layer, dump, judge)

    return check


def cases():
    def case(name, settings, check, budget=None, **more):
        args = ["--select", "twilight", *(budget.args() if budget else [])]
        for setting in ["base.name=quest", *settings]:
            args += ["--set", f"select.{setting}"]
        return Case(f"twilight/{name}", "decode", args, check, **more)

    quarter, sixteen = Budget(density=0.25), Budget(tokens=16)
    base = ["base.density=0.25", "dense_layers=[]"]
    return [
        case("default", base, twilight(quarter), extra=True),
        case("default-dense-layers", base[:1], twilight(quarter, dense_layers=(0, 1)), layers="all"),
        case("top_p", [*base, "top_p=0.5"], twilight(quarter, 0.5), layers="one"),
        case("budget", base, twilight(quarter, budget=sixteen), sixteen, layers="second"),
    ]
