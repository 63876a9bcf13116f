"""dense, random, oracle_topk, streaming_llm."""

import numpy as np

from budgets import Budget, cached_target, step_units, tile_target, tile_units, top
from compare import (
    LSE_BOUND,
    OUT_BOUND,
    Case,
    Dump,
    Outputs,
    Prefill,
    check_decode,
    check_eviction,
    same_choice,
    same_set,
    units_in,
)
from ranking import check_decode_ranking, check_prefill_ranking, sum_units

# ---- dense


def dense_prefill(layer, dump, report):
    view = Prefill(report, layer, dump)
    if not view.good:
        return
    for head in range(layer.heads):
        for t in range(view.tiles):
            same_set(report, view.where(head, t), view.row(head, t), np.arange(view.tile(t)[1]))
    view.check_outputs()


def dense_decode(layer, dump, report):
    check_decode(
        report,
        layer,
        dump,
        lambda step, head, found: same_set(
            report, f"step {step} head {head}", found, np.arange(layer.prompt + step + 1)
        ),
    )


def dense_evict(cut):
    def check(layer, dump, report):
        tokens = layer.trace.cut(cut)
        check_eviction(
            report, layer, dump, tokens, lambda h, found: same_set(report, f"KV head {h}", found, np.arange(tokens))
        )

    return check


# ---- random: its invariants


def random_prefill(budget):
    def check(layer, dump, report):
        view = Prefill(report, layer, dump)
        if not view.good:
            return
        orders = []
        for head in range(layer.heads):
            for t in range(view.tiles):
                begin, end = view.tile(t)
                where = view.where(head, t)
                found = units_in(report, where, view.row(head, t), 64, end)
                forced = sorted({0, (end - 1) // 64})
                count = tile_units(budget, layer.prompt, begin, end, 64, forced)
                expected = len(forced) + count if count is not None else -(-end // 64)
                report.rows += 1
                report.expect(len(found) == expected, f"{where}: {len(found)} units, expected {expected}")
                report.expect(np.isin(forced, found).all(), f"{where}: a forced unit is missing")
                if count is not None:
                    orders.append(tuple(found))
        view.check_outputs()
        report.expect(len(set(orders)) > len(orders) // 2, "rows repeat each other's draw")
        args = ["--select", "random", "--cells", *budget.args()]
        same, other = (Dump(layer.trace, layer.index, "prefill", [*args, "--seed", s]) for s in ("7", "8"))
        report.expect(np.array_equal(dump["cells.indices"], same["cells.indices"]), "equal seeds, different choices")
        report.expect(
            not np.array_equal(dump["cells.indices"], other["cells.indices"]), "different seeds, equal choices"
        )

    return check


def random_decode(budget):
    def check(layer, dump, report):
        drawn = set()

        def judge(step, head, found):
            cached = layer.prompt + step + 1
            where = f"step {step} head {head}"
            units = units_in(report, where, found, 16, cached)
            last = (cached - 1) // 16
            count = step_units(cached_target(budget, cached), cached, 16, 16 + cached - last * 16, 2)
            report.rows += 1
            report.expect(len(units) == count + 2, f"{where}: {len(units)} pages, expected {count + 2}")
            report.expect(0 in units and last in units, f"{where}: a forced page is missing")
            drawn.add(tuple(units))

        check_decode(report, layer, dump, judge)
        report.expect(len(drawn) > layer.heads * 26, "steps or heads repeat each other's draw")

    return check


def random_evict(budget, cut):
    def check(layer, dump, report):
        tokens = layer.trace.cut(cut)
        drawn = set()

        def judge(kv_head, found):
            report.rows += 1
            target = cached_target(budget, tokens)
            report.expect(len(found) == target, f"KV head {kv_head}: {len(found)} kept, expected {target}")
            report.expect(0 in found and tokens - 1 in found, f"KV head {kv_head}: a forced token is missing")
            drawn.add(tuple(found))

        check_eviction(report, layer, dump, tokens, judge)
        report.expect(len(drawn) == layer.kv_heads, "KV heads repeat each other's draw")

    return check


# ---- oracle_topk


def oracle_prefill(budget, unit):
    def check(layer, dump, report):
        def scores(head, t, begin, end):
            return sum_units(layer.rows(head, begin, end)[0].sum(axis=0), unit)

        check_prefill_ranking(layer, dump, report, budget, unit, scores, q_tile=64)

    return check


def oracle_decode(budget, unit, gqa="none"):
    def check(layer, dump, report):
        def scores(step, kv_head):
            at = layer.prompt + step
            heads = range(kv_head * layer.group, (kv_head + 1) * layer.group)
            return np.stack([sum_units(layer.rows(h, at, at + 1)[0][0], unit) for h in heads])

        check_decode_ranking(layer, dump, report, budget, unit, scores, gqa=gqa)

    return check


def future_mass(layer, head, cut):
    """Probability that the queries after the cut give to every token before it."""
    total = np.zeros(cut)
    for a in range(cut, layer.length, 512):
        total += layer.rows(head, a, min(a + 512, layer.length))[0][:, :cut].sum(axis=0)
    return total


def oracle_evict(budget, cut):
    def check(layer, dump, report):
        tokens = layer.trace.cut(cut)

        def judge(kv_head, found):
            heads = range(kv_head * layer.group, (kv_head + 1) * layer.group)
            scores = np.mean([future_mass(layer, h, tokens) for h in heads], axis=0)
            same_choice(
                report,
                f"layer {layer.index} KV head {kv_head}",
                found,
                top(scores, cached_target(budget, tokens)),
                scores,
            )

        check_eviction(report, layer, dump, tokens, judge)

    return check


# ---- streaming_llm


def sinks_and_recent(target, length, sinks=4):
    """The first min(sinks, target) and the last target - sinks of `length` tokens."""
    if target >= length:
        return np.arange(length)
    first = min(sinks, target)
    return np.union1d(np.arange(first), np.arange(length - (target - first), length))


def streaming_prefill(budget):
    def check(layer, dump, report):
        view = Prefill(report, layer, dump)
        if not view.good:
            return
        outputs = Outputs(report, layer, dump, 0, layer.prompt)
        for t in range(view.tiles):
            begin, end = view.tile(t)
            target, _ = tile_target(budget, layer.prompt, begin, end, 1)
            mask = np.zeros((end - begin, end), bool)
            for i in range(begin, end):
                mask[i - begin, sinks_and_recent(target, i + 1)] = True
            expected = np.flatnonzero(mask.any(axis=0))
            for head in range(layer.heads):
                same_set(report, view.where(head, t), view.row(head, t), expected)
                outputs.check(head, begin, end, mask)

    return check


def streaming_decode(budget):
    def check(layer, dump, report):
        def judge(step, head, found):
            cached = layer.prompt + step + 1
            expected = sinks_and_recent(cached_target(budget, cached), cached)
            same_set(report, f"step {step} head {head}", found, expected)

        check_decode(report, layer, dump, judge)

    return check


def streaming_evict(budget, cut):
    def check(layer, dump, report):
        tokens = layer.trace.cut(cut)
        expected = sinks_and_recent(cached_target(budget, tokens), tokens)
        check_eviction(report, layer, dump, tokens, lambda h, found: same_set(report, f"KV head {h}", found, expected))

    return check


def rotate(x, angle_of, by):
    """Rows of x turned by `by` positions each (pairs of channels c, c + d / 2)."""
    half = x.shape[-1] // 2
    angle = np.asarray(by, dtype=np.float64)[..., None] * angle_of
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def to_bf16(x):
    """Rounded to the nearest bf16, ties to even."""
    bits = x.astype(np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float64)


def streaming_compacted(budget):
    """positions = compacted: kept keys, later keys and queries are rotated to their slots. The cache holds the rotated
    keys in its own type, bf16; the queries stay in fp32."""

    def check(layer, dump, report):
        cut = layer.prompt
        kept = sinks_and_recent(cached_target(budget, cut), cut)
        angle_of = layer.trace.rope["rope_theta"] ** (-np.arange(layer.dim // 2) * 2 / layer.dim)
        for h, found in enumerate(dump.lists("kept")):
            same_set(report, f"KV head {h}", found, kept)
        tokens = np.concatenate([kept, np.arange(cut, layer.length)])
        slots = np.arange(len(tokens))
        shifts = slots - tokens
        for head in range(layer.heads):
            h = layer.kv_of(head)
            keys = to_bf16(rotate(layer.k[h, tokens], angle_of, shifts))
            for at in range(cut, layer.length):
                seen = len(kept) + at - cut + 1
                q = rotate(layer.q[head, at], angle_of, seen - 1 - at)
                logits = keys[:seen] @ q * layer.scale
                top_logit = logits.max()
                p = np.exp(logits - top_logit)
                lse = top_logit + np.log(p.sum())
                p /= p.sum()
                v = layer.v[h, tokens[:seen]]
                size = p @ np.linalg.norm(v, axis=1)
                out_error = np.linalg.norm(dump["out"][head, at - cut] - p @ v) / size
                lse_error = abs(dump["lse"][head, at - cut] - lse)
                report.outputs += 1
                where = f"head {head} query {at}"
                report.expect(out_error <= OUT_BOUND, f"{where}: out off by {out_error:.3g}")
                report.expect(lse_error <= LSE_BOUND * max(1, abs(lse)), f"{where}: lse off by {lse_error:.3g}")

    return check


def cases():
    tenth, fifth = Budget(density=0.1), Budget(density=0.2)
    select, evict = ["--cells", "--select"], ["--evict"]
    out = [
        Case("dense/prefill", "prefill", [*select, "dense"], dense_prefill, "one", extra=True),
        Case("dense/decode", "decode", ["--select", "dense"], dense_decode, extra=True),
        Case(
            "random/prefill", "prefill", [*select, "random", *fifth.args(), "--seed", "7"], random_prefill(fifth), "one"
        ),
        Case("random/decode", "decode", ["--select", "random", *fifth.args()], random_decode(fifth), "one"),
        Case("streaming_llm/prefill", "prefill", [*select, "streaming_llm", *tenth.args()], streaming_prefill(tenth)),
        Case("streaming_llm/decode", "decode", ["--select", "streaming_llm", *tenth.args()], streaming_decode(tenth)),
    ]
    out.append(
        Case(
            "streaming_llm/compacted",
            "evict",
            [*evict, "streaming_llm", *tenth.args(), "--set", "evict.positions=compacted"],
            streaming_compacted(tenth),
            "second",
        )
    )
    for unit, length in (("token", 1), ("page", 16), ("block", 64)):
        args = ["oracle_topk", "--set", f"select.unit={unit}", *tenth.args()]
        layers = "one" if unit == "token" else "all"
        out.append(
            Case(f"oracle_topk/{unit}/prefill", "prefill", [*select, *args], oracle_prefill(tenth, length), layers)
        )
        out.append(
            Case(f"oracle_topk/{unit}/decode", "decode", ["--select", *args], oracle_decode(tenth, length), extra=True)
        )
    out.append(
        Case(
            "oracle_topk/tokens/prefill",
            "prefill",
            [*select, "oracle_topk", "--set", "select.unit=block", "--tokens", "512"],
            oracle_prefill(Budget(tokens=512), 64),
            "one",
            extra=True,
        )
    )
    proportional = Budget(density=0.2, proportional=True)
    out.append(
        Case(
            "oracle_topk/proportional/prefill",
            "prefill",
            [*select, "oracle_topk", "--set", "select.unit=block", "--set", "select.shape=proportional", *fifth.args()],
            oracle_prefill(proportional, 64),
            "one",
        )
    )
    for gqa in ("mean", "max", "union"):
        args = ["--select", "oracle_topk", "--set", f"select.gqa={gqa}", *tenth.args()]
        out.append(Case(f"oracle_topk/{gqa}/decode", "decode", args, oracle_decode(tenth, 1, gqa), "one"))
    for cut in ("end", "before_question"):
        at = ["--cut", cut]
        out.append(Case(f"dense/{cut}", "evict", [*evict, "dense", *at], dense_evict(cut), "one"))
        out.append(
            Case(f"random/{cut}", "evict", [*evict, "random", *at, *fifth.args()], random_evict(fifth, cut), "one")
        )
        out.append(
            Case(f"oracle_topk/{cut}", "evict", [*evict, "oracle_topk", *at, *tenth.args()], oracle_evict(tenth, cut))
        )
        out.append(
            Case(
                f"streaming_llm/{cut}",
                "evict",
                [*evict, "streaming_llm", *at, *tenth.args()],
                streaming_evict(tenth, cut),
                "one",
                extra=cut == "end",
            )
        )
    return out
