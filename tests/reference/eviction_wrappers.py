"""What wraps an eviction: chunkkv, key_rotation, criticalkv, block, chunk, decoding, merge, cam; thinkk's channels."""

import copy

import numpy as np

from baselines import streaming_compacted, to_bf16
from budgets import Budget, cached_target, top
from compare import (
    LSE_BOUND,
    OUT_BOUND,
    Case,
    Outputs,
    check_decode,
    check_eviction,
    same_choice,
    same_scores,
    same_set,
)
from h2o import Simulation
from philox import layer_key, philox
from snapkv import PRESETS, pool

BASES = {"snapkv": PRESETS["longbench"], "snapkv-kvpress": PRESETS["kvpress"]}
BASE_ARGS = {
    "snapkv": ["base.name=snapkv"],
    "snapkv-kvpress": ["base.name=snapkv", "base.preset=kvpress"],
}


def base_scores(layer, kv_head, tokens, now, rule):
    """snapkv's scores of the tokens at these positions when only they are cached and queries end before `now`; forced
    ones: inf."""
    window = min(rule["window"], now)
    rows = []
    for head in range(kv_head * layer.group, (kv_head + 1) * layer.group):
        mass = np.zeros(len(tokens))
        for at in range(now - window, now):
            seen = tokens <= at
            p = layer.rows(head, at, at + 1)[0][0, tokens[seen]]
            mass[seen] += p / p.sum()
        rows.append(mass)
    mass = np.mean(rows, axis=0)
    out = np.full(len(tokens), -np.inf)
    before = int(np.sum(tokens < now - window))
    out[:before] = pool(mass[:before], rule["kernel"], rule["pool"])
    out[len(tokens) - min(rule["recent"], len(tokens)) :] = np.inf
    return out


def scores_at_cut(layer, kv_head, cut, base):
    return base_scores(layer, kv_head, np.arange(cut), cut, BASES[base])


def where(layer, kv_head):
    return f"layer {layer.index} KV head {kv_head}"


# ---- chunkkv


def chunkkv(budget, cut, chunk=20, base="snapkv"):
    def check(layer, dump, report):
        tokens = layer.trace.cut(cut)
        scores = np.sum([scores_at_cut(layer, h, tokens, base) for h in range(layer.kv_heads)], axis=0)
        target = cached_target(budget, tokens)
        if tokens < chunk:
            chosen, of_token = top(scores, target), scores
        else:
            chunks = [np.arange(u, min(u + chunk, tokens)) for u in range(0, tokens, chunk)]
            means = np.array([scores[c].max() if np.isinf(scores[c]).any() else scores[c].mean() for c in chunks])
            best = top(means, max(1, len(chunks) * target // tokens))
            chosen = np.concatenate([chunks[u] for u in best])
            of_token = np.repeat(means, [len(c) for c in chunks])
        check_eviction(
            report, layer, dump, tokens, lambda h, found: same_choice(report, where(layer, h), found, chosen, of_token)
        )

    return check


# ---- criticalkv


def criticalkv(budget, cut, first_stage=0.5, epsilon=1e-4, base="snapkv"):
    def check(layer, dump, report):
        tokens = layer.trace.cut(cut)
        target = cached_target(budget, tokens)
        w = layer.trace.tensors[f"layers.{layer.index}.wo"].astype(np.float64)
        raw = [scores_at_cut(layer, h, tokens, base) for h in range(layer.kv_heads)]
        most = max(s[np.isfinite(s)].max() for s in raw)

        def judge(kv_head, found):
            s = raw[kv_head]
            first = top(s, int(first_stage * target + 1e-9))
            heads = range(kv_head * layer.group, (kv_head + 1) * layer.group)
            nu = np.mean(
                [
                    np.abs(layer.v[kv_head, :tokens] @ w[:, g * layer.dim : (g + 1) * layer.dim].T).sum(axis=1)
                    for g in heads
                ],
                axis=0,
            )
            scores = (np.where(np.isinf(s), most + 1, s) + epsilon) * nu
            free = np.ones(tokens, bool)
            free[first] = False
            same_scores(report, where(layer, kv_head), dump, kv_head, scores, free)
            expected = np.union1d(first, top(scores, target - len(first), free)).astype(int)
            tie = scores.copy()
            tie[first] = s[first]  # a tie at the end of either stage
            same_choice(report, where(layer, kv_head), found, expected, tie)

        check_eviction(report, layer, dump, tokens, judge)

    return check


# ---- block, chunk


def block(budget, cut, size=128, base="snapkv"):
    def check(layer, dump, report):
        tokens = layer.trace.cut(cut)
        n = max(1, cached_target(budget, tokens))

        def judge(kv_head, found):
            kept, of_token = np.arange(min(n, tokens)), np.full(tokens, np.inf)
            for begin in range(n, tokens, size):
                end = min(begin + size, tokens)
                held = np.concatenate([kept, np.arange(begin, end)])
                scores = base_scores(layer, kv_head, held, end, BASES[base])
                kept = held[top(scores, n)]
                of_token = np.full(tokens, -np.inf)
                of_token[held] = scores
            same_choice(report, where(layer, kv_head), found, kept, of_token)

        check_eviction(report, layer, dump, tokens, judge)

    return check


def chunked(budget, cut, size=1024, base="snapkv"):
    def check(layer, dump, report):
        tokens = layer.trace.cut(cut)
        target = cached_target(budget, tokens)

        def judge(kv_head, found):
            for begin in range(0, tokens, size):
                own = np.arange(begin, min(begin + size, tokens))
                scores = base_scores(layer, kv_head, own, own[-1] + 1, BASES[base])
                best = own[top(scores, max(1, len(own) * target // tokens))]
                of_token = np.full(tokens, -np.inf)
                of_token[own] = scores
                part = found[(found >= begin) & (found < begin + size)]
                same_choice(report, f"{where(layer, kv_head)} chunk from {begin}", part, best, of_token)

        check_eviction(report, layer, dump, tokens, judge)

    return check


# ---- key_rotation, decoding


def same_kept(budget, cut, base="snapkv"):
    """The base's choice; what becomes of its keys is streaming_compacted's affair."""

    def check(layer, dump, report):
        tokens = layer.trace.cut(cut)
        for h, found in enumerate(dump.lists("kept")):
            scores = scores_at_cut(layer, h, tokens, base)
            same_choice(report, where(layer, h), found, top(scores, cached_target(budget, tokens)), scores)

    return check


def decoding(interval, target, phase, base="snapkv"):
    def check(layer, dump, report):
        cut = layer.prompt
        reads = []
        for h in range(layer.kv_heads):
            cache, ranked, seen = np.arange(cut), np.full(layer.length, np.inf), {}
            for at in range(cut, layer.length):
                cache = np.append(cache, at)
                seen[at] = cache, ranked
                if (at - cut + 1) % interval == 0 and len(cache) > target:
                    scores = base_scores(layer, h, cache, at + 1, BASES[base])
                    ranked = np.full(layer.length, np.inf)
                    ranked[cache] = scores
                    cache = cache[top(scores, target)]
            reads.append(seen)

        def judge(step, head, found):
            expected, scores = reads[layer.kv_of(head)][cut + step]
            same_choice(report, f"layer {layer.index} step {step} head {head}", found, expected, scores)

        def mask(kv_head, at):
            out = np.zeros(at + 1, bool)
            out[reads[kv_head][at][0]] = True
            return out

        if phase == "decode":
            check_decode(report, layer, dump, judge)
        else:
            all_stay = lambda h, found: same_set(report, where(layer, h), found, np.arange(cut))
            check_eviction(report, layer, dump, cut, all_stay, mask)

    return check


# ---- merge, cam


def check_values(report, layer, dump, first, values_of, reads):
    """Outputs over reads(kv_head, position) of the values values_of(kv_head, position) [length, dim]."""
    seen = copy.copy(layer)
    seen.v, seen.v_norms = layer.v.copy(), layer.v_norms.copy()
    outputs = Outputs(report, seen, dump, first, layer.length - first)
    for head in range(layer.heads):
        h, held = layer.kv_of(head), None
        for at in range(first, layer.length):
            values = values_of(h, at)
            if values is not held:
                held = values
                seen.v[h] = values
                seen.v_norms[h] = np.linalg.norm(values, axis=1)
            outputs.check(head, at, at + 1, reads(h, at)[None])


def kept_and_later(kept, cut):
    def reads(kv_head, at):
        mask = np.zeros(at + 1, bool)
        mask[kept[kv_head]] = True
        mask[cut:] = True
        return mask

    return reads


def merged_values(k, v, kept, threshold, fraction):
    gone = np.setdiff1d(np.arange(len(k)), kept)
    unit = k / np.linalg.norm(k, axis=1, keepdims=True)
    likeness = unit[gone] @ unit[kept].T
    target, best = likeness.argmax(axis=1), likeness.max(axis=1)
    takes_part = (best >= threshold) & (best >= np.quantile(best, 1 - fraction) - 1e-12)
    norms = np.linalg.norm(v, axis=1)
    weight = np.maximum(best.astype(np.float32).astype(np.float64), 0)
    weight *= norms[gone] / (norms[gone] + norms[kept[target]] + 1e-6) * takes_part
    total, out = np.ones(len(kept)), v[kept].copy()
    np.add.at(total, target, weight)
    np.add.at(out, target, weight[:, None] * v[gone])
    changed = v.copy()
    changed[kept] = to_bf16(out / total[:, None])
    return changed


def merge(budget, cut, threshold=0.0, fraction=1.0, base="snapkv"):
    def check(layer, dump, report):
        tokens = layer.trace.cut(cut)
        kept = dump.lists("kept")
        same_kept(budget, cut, base)(layer, dump, report)
        values = []
        for h in range(layer.kv_heads):
            v = layer.v[h].copy()
            v[:tokens] = merged_values(layer.k[h, :tokens], v[:tokens], kept[h], threshold, fraction)
            values.append(v)
        check_values(report, layer, dump, tokens, lambda h, at: values[h], kept_and_later(kept, tokens))

    return check


def uniform(seed, layer, step, row, counter):
    """24 bits in [0, 1)."""
    _, high = philox(layer_key(seed, layer), step, row, counter)
    return (high >> np.uint64(8)).astype(np.float64) * 2.0**-24


def cam_values(v, cached, kept, attention, draws, targets):
    """`v` with the evicted tokens of `cached` merged into those of `kept` that follow; attention, draws by position."""
    out = v.copy()
    total = v.astype(np.float64).copy()
    touched = np.zeros(len(v), bool)
    for gone in np.setdiff1d(cached, kept):
        after = kept[np.searchsorted(kept, gone) :][:targets]
        if len(after) and attention[gone] > 0 and draws[gone] * attention[after].mean() < attention[gone]:
            total[after] += v[gone] * float(np.float32(1) / np.float32(len(after)))
            touched[after] = True
    out[touched] = to_bf16(total[touched])
    return out


def mean_attention(layer, kv_head, at, cached):
    """Of the query at `at` over the cached tokens, mean over the group, by position."""
    out = np.zeros(layer.length)
    for head in range(kv_head * layer.group, (kv_head + 1) * layer.group):
        p = layer.rows(head, at, at + 1)[0][0, cached]
        out[cached] += p / p.sum() / layer.group
    return out


def cam(budget, cut, targets=32, seed=0, base="snapkv"):
    def check(layer, dump, report):
        tokens = layer.trace.cut(cut)
        kept = dump.lists("kept")
        same_kept(budget, cut, base)(layer, dump, report)
        cached = np.arange(tokens)
        values = []
        for h in range(layer.kv_heads):
            draws = uniform(seed, layer.index, 0, h, np.arange(layer.length))
            attention = mean_attention(layer, h, tokens - 1, cached)
            values.append(cam_values(layer.v[h], cached, kept[h], attention, draws, targets))
        check_values(report, layer, dump, tokens, lambda h, at: values[h], kept_and_later(kept, tokens))

    return check


def cam_h2o(budget, targets=32):
    """Over a base that evicts at every step: each token that leaves draws once."""

    def check(layer, dump, report):
        cut = layer.prompt
        runs = [Simulation(layer, h, cut, budget) for h in range(layer.kv_heads)]
        values = []
        for h, run in enumerate(runs):
            same_choice(report, where(layer, h), dump.lists("kept")[h], *run.at_cut)
            v, of_query, cached = layer.v[h].copy(), {}, np.arange(cut)
            for at in range(cut - 1, layer.length - 1):
                if at >= cut:
                    cached = run.reads[at][0]
                kept = run.reads[at + 1][0][:-1]
                draws = uniform(0, layer.index, at - cut + 1, h, np.arange(layer.length))
                v = cam_values(v, cached, kept, mean_attention(layer, h, at, cached), draws, targets)
                of_query[at + 1] = v
            values.append(of_query)

        def reads(kv_head, at):
            mask = np.zeros(at + 1, bool)
            mask[runs[kv_head].reads[at][0]] = True
            return mask

        check_values(report, layer, dump, cut, lambda h, at: values[h][at], reads)

    return check


# ---- thinkk


def dropped_channels(layer, kv_head, cut, ratio, window, gqa):
    """[dim] boolean."""
    heads = range(kv_head * layer.group, (kv_head + 1) * layer.group)
    queries = np.array([(layer.q[h, max(0, cut - window) : cut] ** 2).mean(axis=0) for h in heads])
    keys = (layer.k[kv_head, :cut] ** 2).mean(axis=0)
    rows = queries if gqa == "union" else {"mean": np.mean, "max": np.max}[gqa](queries, axis=0)[None]
    out = np.ones(layer.dim, bool)
    for row in rows:
        lowest = np.argsort(row * keys, kind="stable")[: int(ratio * layer.dim + 1e-9)]
        out &= np.isin(np.arange(layer.dim), lowest)
    return out


def thinkk(cut, ratio=0.4, window=32, recent=32, gqa="mean"):
    def check(layer, dump, report):
        tokens = layer.trace.cut(cut)
        for h, found in enumerate(dump.lists("kept")):
            same_set(report, where(layer, h), found, np.arange(tokens))
        worst = np.zeros(2)
        for head in range(layer.heads):
            h = layer.kv_of(head)
            k = layer.k[h].copy()
            k[: max(0, tokens - recent), dropped_channels(layer, h, tokens, ratio, window, gqa)] = 0
            for at in range(tokens, layer.length):
                logits = k[: at + 1] @ layer.q[head, at] * layer.scale
                p = np.exp(logits - logits.max())
                lse = logits.max() + np.log(p.sum())
                p /= p.sum()
                out = p @ layer.v[h, : at + 1]
                found = dump["out"][head, at - tokens]
                size = p @ layer.v_norms[h, : at + 1]
                worst = np.maximum(
                    worst,
                    [
                        np.linalg.norm(found - out) / (OUT_BOUND * size),
                        abs(dump["lse"][head, at - tokens] - lse) / (LSE_BOUND * max(1, abs(lse))),
                    ],
                )
                report.outputs += 1
        report.expect((worst <= 1).all(), f"out, lse off by {worst} times the bounds")
        report.expect(np.abs(dump["mass_kept"] - 1).max() <= 1e-4, "mass_kept is not that of all tokens")

    return check


def cases():
    tenth, fifth, quarter = Budget(density=0.1), Budget(density=0.2), Budget(density=0.25)
    out = []

    def add(name, check, budget=None, cut="end", settings=(), phase="evict", **more):
        args = ["--evict", name.split("/")[0], *(budget.args() if budget else [])]
        if phase == "evict":
            args += ["--cells", "--scores", "--cut", cut]
        for setting in settings:
            args += ["--set", f"evict.{setting}"]
        out.append(Case(name, phase, args, check, **more))

    def wrap(name, rule, *arguments, budget=tenth, cut="end", settings=(), base="snapkv", **more):
        add(name, rule(budget, cut, *arguments, base=base), budget, cut, [*BASE_ARGS[base], *settings], **more)

    question = dict(budget=quarter, cut="before_question")
    kvpress = dict(**question, base="snapkv-kvpress")
    early = dict(budget=quarter, cut="700", layers="one")
    few = dict(cut="700", layers="one")
    wrap("chunkkv/default", chunkkv, extra=True)
    wrap("chunkkv/kvpress-base", chunkkv, **kvpress)
    wrap("chunkkv/chunk-7", chunkkv, 7, settings=["chunk=7"], cut="701", layers="one")
    wrap("chunkkv/no-full-chunk", chunkkv, 800, settings=["chunk=800"], budget=Budget(tokens=9), **few)
    add("key_rotation/streaming_llm", streaming_compacted(tenth), tenth)
    wrap("key_rotation/snapkv", same_kept)
    wrap("criticalkv/default", criticalkv)
    wrap("criticalkv/kvpress-base", criticalkv, **kvpress)
    wrap("criticalkv/one-stage", criticalkv, 0.0, 0.5, settings=["first_stage=0.0", "epsilon=0.5"], **early)
    wrap("criticalkv/base-alone", criticalkv, 1.0, settings=["first_stage=1.0"], **early)
    wrap("block/default", block)
    wrap("block/kvpress-base", block, layers="one", **kvpress)
    wrap("block/block-50", block, 50, settings=["block=50"], budget=Budget(tokens=333), **few)
    wrap("chunk/default", chunked, extra=True)
    wrap("chunk/chunk-100", chunked, 100, settings=["chunk=100"], layers="one", **question)
    wrap("chunk/kvpress-base", chunked, 300, settings=["chunk=300"], layers="one", **kvpress)
    every = ["base.name=snapkv", "interval=20", "target=300"]
    add("decoding/decode", decoding(20, 300, "decode"), settings=every, phase="decode", layers="one")
    add("decoding/evict", decoding(20, 300, "evict"), settings=every, layers="one")
    wrap("merge/default", merge)
    wrap("merge/threshold", merge, 0.6, settings=["threshold=0.6"], layers="one", **question)
    wrap("merge/fraction", merge, 0.0, 0.3, settings=["fraction=0.3"], **early)
    wrap("cam/default", cam)
    wrap("cam/targets", cam, 5, settings=["targets=5"], **early)
    add("cam/h2o", cam_h2o(fifth), fifth, layers="one")
    add("thinkk/default", thinkk("end"), extra=True)
    add("thinkk/original", thinkk("before_question", gqa="union"), None, "before_question", ["preset=original"])
    add("thinkk/kvpress", thinkk("end", recent=0), settings=["preset=kvpress"], layers="one")
    half = ["ratio=0.5", "window=100", "gqa=max"]
    add("thinkk/half", thinkk("700", 0.5, 100, gqa="max"), None, "700", half, layers="one")
    return out
