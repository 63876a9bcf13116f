"""snapkv: tokens ranked by what the last queries of the prompt gave them, pooled over positions."""

import numpy as np

from budgets import Budget, cached_target, step_units, top
from compare import Case, check_decode, check_eviction, same_choice, same_scores, same_set

# kvpress takes the mean over the rows: the same order.
PRESETS = {
    "longbench": dict(window=32, kernel=7, pool="max", reduce="sum", recent=32, sinks=0, columns="prefix"),
    "kvpress": dict(window=64, kernel=5, pool="avg", reduce="sum", recent=64, sinks=0, columns="prefix"),
    "sparse_frontier": dict(window=256, kernel=21, pool="avg", reduce="sum", recent=128, sinks=4, columns="all"),
}


def pool(values, kernel, kind):
    """Stride 1, padding kernel // 2: of zeros, counted, for averages; of -inf for maxima."""
    pad = kernel // 2
    padded = np.pad(values, pad, constant_values=0 if kind == "avg" else -np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel)
    return windows.sum(axis=1) / kernel if kind == "avg" else windows.max(axis=1)


def snapkv_scores(layer, kv_head, cut, rule, gqa="mean"):
    """[rows, cut]: one row for the group, or one a query head (gqa = union). Window columns that are dropped: -inf."""
    window = min(rule["window"], cut)
    rows = []
    for head in range(kv_head * layer.group, (kv_head + 1) * layer.group):
        p, _ = layer.rows(head, cut - window, cut)
        rows.append({"sum": p.sum(axis=0), "mean": p.mean(axis=0), "max": p.max(axis=0)}[rule["reduce"]])
    rows = np.stack(rows)
    if gqa != "union":
        rows = {"mean": rows.mean, "max": rows.max, "sum": rows.sum}[gqa](axis=0)[None]
    out = np.full((len(rows), cut), -np.inf)
    used = cut - window if rule["columns"] == "prefix" else cut
    for row, values in enumerate(rows):
        out[row, :used] = pool(values[:used], rule["kernel"], rule["pool"])
    return out


def forced_tokens(cut, rule):
    return np.union1d(np.arange(min(rule["sinks"], cut)), np.arange(max(0, cut - rule["recent"]), cut)).astype(int)


def keep(scores, target, forced):
    """The forced tokens and the best others: `target` in all."""
    count = step_units(target, len(scores), 1, len(forced), len(forced))
    if count is None:
        return np.arange(len(scores))
    free = np.ones(len(scores), bool)
    free[forced] = False
    return np.union1d(top(scores, count, free), forced).astype(int)


def snapkv(budget, cut, rule, gqa="mean"):
    def check(layer, dump, report):
        tokens = layer.trace.cut(cut)
        forced = forced_tokens(tokens, rule)
        target = cached_target(budget, tokens)

        def judge(kv_head, found):
            scores = snapkv_scores(layer, kv_head, tokens, rule, gqa)
            where = f"layer {layer.index} KV head {kv_head}"
            choices = [keep(row, target, forced) for row in scores]
            if gqa == "union":
                same_set(report, where, found, np.unique(np.concatenate(choices)))
                return
            free = np.isfinite(scores[0])
            free[forced] = False
            same_scores(report, where, dump, kv_head, scores[0], free)
            ranked = scores[0].copy()
            ranked[forced] = np.inf
            same_choice(report, where, found, choices[0], ranked)

        check_eviction(report, layer, dump, tokens, judge)

    return check


def snapkv_then_quest(evict_budget, select_budget, page=16):
    """Eviction and selection together: quest's pages are pages of the compacted cache."""
    from quest import page_scores

    def check(layer, dump, report):
        cut = layer.prompt
        rule = PRESETS["longbench"]
        kept = [
            keep(snapkv_scores(layer, h, cut, rule)[0], cached_target(evict_budget, cut), forced_tokens(cut, rule))
            for h in range(layer.kv_heads)
        ]

        def judge(step, head, found):
            at, kv_head = cut + step, layer.kv_of(head)
            slots = np.concatenate([kept[kv_head], np.arange(cut, at + 1)])
            scores = page_scores(layer.k[kv_head, slots], layer.q[head, at][None], page)[0]
            last = len(scores) - 1
            here = len(slots) - last * page
            count = step_units(cached_target(select_budget, len(slots)), len(slots), page, here, 1)
            chosen = top(scores[:last], count)
            pages = [slots[u * page : (u + 1) * page] for u in (*chosen, last)]
            expected = np.concatenate(pages)
            by_token = np.full(at + 1, -np.inf)
            for page_index, score in enumerate(scores):
                by_token[slots[page_index * page : (page_index + 1) * page]] = score
            same_choice(report, f"layer {layer.index} step {step} head {head}", found, expected, by_token)

        check_decode(report, layer, dump, judge)

    return check


def cases():
    out = []
    tenth, quarter = Budget(density=0.1), Budget(density=0.25)

    def case(name, cut, budget, settings, check, **more):
        args = ["--evict", "snapkv", "--cells", "--scores", "--cut", cut, *budget.args()]
        for setting in settings:
            args += ["--set", setting]
        return Case(f"snapkv/{name}", "evict", args, check, **more)

    for preset, rule in PRESETS.items():
        settings = [] if preset == "longbench" else [f"evict.preset={preset}"]
        for cut in ("end", "before_question"):
            out.append(case(f"{preset}/{cut}", cut, tenth, settings, snapkv(tenth, cut, rule), extra=cut == "end"))
    longbench = PRESETS["longbench"]
    for gqa in ("max", "sum", "union"):
        out.append(
            case(
                gqa, "end", quarter, [f"evict.gqa={gqa}"], snapkv(quarter, "end", longbench, gqa), extra=gqa == "union"
            )
        )
    out += [
        case(
            "pool-avg-reduce-max",
            "700",
            tenth,
            ["evict.pool=avg", "evict.reduce=max", "evict.kernel=9"],
            snapkv(tenth, "700", {**longbench, "pool": "avg", "reduce": "max", "kernel": 9}),
            layers="one",
        ),
        case("tokens", "end", Budget(tokens=300), [], snapkv(Budget(tokens=300), "end", longbench), layers="one"),
        Case(
            "snapkv+quest",
            "decode",
            ["--evict", "snapkv", "--set", "evict.density=0.5", "--select", "quest", "--set", "select.dense_layers=[]"]
            + ["--set", "select.density=0.2"],
            snapkv_then_quest(Budget(density=0.5), Budget(density=0.2)),
        ),
    ]
    return out
