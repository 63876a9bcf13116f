"""pqcache: keys product-quantised by k-means at the end of the prompt; softmax over the candidates."""

from functools import lru_cache

import numpy as np

from budgets import Budget, cached_target, top
from compare import Case, check_decode, same_choice, same_set
from kmeans import evenly, means, nearest


@lru_cache(maxsize=16)
def quantised(layer, kv_head, subvectors, bits, sinks, iterations):
    """Every key after the sinks replaced by its centroids, [length, d] (the sinks are left alone)."""
    keys, width = layer.k[kv_head], layer.dim // subvectors
    out = keys.copy()
    for part in range(subvectors):
        points = keys[sinks:, part * width : (part + 1) * width]
        prompt = points[: layer.prompt - sinks]
        centroids = evenly(prompt, 1 << bits)
        for _ in range(iterations):
            centroids = means(prompt, nearest(prompt, centroids), centroids)
        out[sinks:, part * width : (part + 1) * width] = centroids[nearest(points, centroids)]
    return out


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def pqcache(budget, subvectors=2, bits=6, sinks=32, recent_fraction=0.5, iterations=10, gqa="sum"):
    reducers = {"sum": np.sum, "mean": np.mean, "max": np.max}

    def check(layer, dump, report):
        @lru_cache(maxsize=1)
        def group_mass(step, kv_head, end):
            keys = quantised(layer, kv_head, subvectors, bits, sinks, iterations)[sinks:end]
            q = layer.q[kv_head * layer.group : (kv_head + 1) * layer.group, layer.prompt + step]
            return softmax(q @ keys.T * layer.scale)

        def judge(step, head, found):
            cached = layer.prompt + step + 1
            where = f"layer {layer.index} step {step} head {head}"
            target = cached_target(budget, cached)
            if target >= cached:
                same_set(report, where, found, np.arange(cached))
                return
            recent = max(1, int(np.floor(recent_fraction * max(target - sinks, 0) + 1e-9)))
            end = cached - recent
            forced = np.r_[0:sinks, end:cached]
            mass = group_mass(step, layer.kv_of(head), end)
            scores = np.full(cached, np.inf)
            scores[sinks:end] = mass[head % layer.group] if gqa == "none" else reducers[gqa](mass, axis=0)
            free = np.ones(cached, bool)
            free[forced] = False
            expected = np.union1d(top(scores, max(target - sinks - recent, 0), free), forced)
            same_choice(report, where, found, expected, scores)

        check_decode(report, layer, dump, judge)

    return check


def cases():
    tenth = Budget(density=0.1)

    def case(name, settings, check, budget=tenth, **more):
        args = ["--select", "pqcache", *budget.args()]
        for setting in settings:
            args += ["--set", f"select.{setting}"]
        return Case(f"pqcache/{name}", "decode", args, check, **more)

    few, dense = Budget(tokens=40), Budget(tokens=100000)
    coarse = ["subvectors=4", "bits=3", "sinks=5", "recent_fraction=0.25", "iterations=3"]
    return [
        case("default", [], pqcache(tenth), extra=True),
        case("coarse", coarse, pqcache(tenth, 4, 3, 5, 0.25, 3)),
        case("no-window", ["recent_fraction=0"], pqcache(tenth, recent_fraction=0), layers="one"),
        case("all-window", ["recent_fraction=1"], pqcache(tenth, recent_fraction=1), layers="one"),
        case("few", [], pqcache(few), few, layers="one"),
        case("dense", [], pqcache(dense), dense, layers="one"),
        case("no-rounds", ["iterations=0"], pqcache(tenth, iterations=0), layers="one"),
        *(case(gqa, [f"gqa={gqa}"], pqcache(tenth, gqa=gqa), layers="one") for gqa in ("mean", "max", "none")),
    ]
