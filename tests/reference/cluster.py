"""cluster: the prompt's middle keys clustered in segments; the tokens of the clusters with the largest softmax mass."""

from functools import lru_cache

import numpy as np

from budgets import Budget, cached_target, round_half_up, top
from compare import Case, check_decode, same_choice, same_set
from kmeans import by_product, evenly, means, normalised


@lru_cache(maxsize=16)
def clustered(layer, kv_head, segment, per_cluster, sinks, recent, iterations):
    """Of the middle tokens: labels [tokens], centroids [clusters, d]."""
    keys = layer.k[kv_head, sinks : max(sinks, layer.prompt - recent)]
    pieces = max(1, round_half_up(len(keys) / segment))
    labels, centroids, known = [], [], 0
    for a, b in ((g * len(keys) // pieces, (g + 1) * len(keys) // pieces) for g in range(pieces)):
        points = keys[a:b]
        mine = evenly(points, max(1, len(points) // per_cluster))
        for _ in range(iterations):
            mine = normalised(mine)
            of = by_product(points, mine)
            mine = means(points, of, mine)
        labels.append(of + known)
        centroids.append(mine)
        known += len(mine)
    return np.concatenate(labels), np.concatenate(centroids)


def cluster(
    budget=None,
    segment=8192,
    per_cluster=16,
    exact=0.018,
    top_p=0,
    sinks=4,
    recent=64,
    iterations=10,
    gqa="sum",
    estimated=0.232,
):
    reducers = {"sum": np.sum, "mean": np.mean, "max": np.max}

    def check(layer, dump, report):
        end = layer.prompt - recent

        @lru_cache(maxsize=1)
        def group_mass(step, kv_head):
            labels, centroids = clustered(layer, kv_head, segment, per_cluster, sinks, recent, iterations)
            heads = slice(kv_head * layer.group, (kv_head + 1) * layer.group)
            logits = layer.q[heads, layer.prompt + step] @ centroids.T * layer.scale
            logits[:, np.bincount(labels, minlength=len(centroids)) == 0] = -np.inf
            mass = np.exp(logits - logits.max(axis=1, keepdims=True))
            return mass / mass.sum(axis=1, keepdims=True)

        def row_mass(step, head):
            mass = group_mass(step, layer.kv_of(head))
            return mass[head % layer.group] if gqa == "none" else reducers[gqa](mass, axis=0)

        @lru_cache(maxsize=8)
        def mean_values(kv_head):
            labels, centroids = clustered(layer, kv_head, segment, per_cluster, sinks, recent, iterations)
            return means(layer.v[kv_head, sinks:end], labels, np.zeros_like(centroids))

        def extras(step, head, found):
            """Of the clusters that are not read wholly, the best."""
            if len(found) == layer.prompt + step + 1:
                return None
            kv_head = layer.kv_of(head)
            labels, centroids = clustered(layer, kv_head, segment, per_cluster, sinks, recent, iterations)
            inside = found[(found >= sinks) & (found < end)] - sinks
            sizes = np.bincount(labels, minlength=len(centroids))
            unread = sizes - np.bincount(labels[inside], minlength=len(centroids))
            count = int(np.floor(estimated * len(centroids) + 1e-9))
            best = top(np.where(unread > 0, row_mass(step, head), -np.inf), count)
            return centroids[best], mean_values(kv_head)[best], np.log(unread[best])

        def judge(step, head, found):
            cached = layer.prompt + step + 1
            where = f"layer {layer.index} step {step} head {head}"
            target = None if budget is None else cached_target(budget, cached)
            if target is not None and target >= cached:
                same_set(report, where, found, np.arange(cached))
                return
            kv_head = layer.kv_of(head)
            labels, centroids = clustered(layer, kv_head, segment, per_cluster, sinks, recent, iterations)
            mass = row_mass(step, head)
            scores = np.full(cached, np.inf)
            scores[sinks:end] = mass[labels]
            forced = np.r_[0:sinks, end:cached]
            if target is not None:
                free = np.ones(cached, bool)
                free[forced] = False
                chosen = top(scores, max(target - len(forced), 0), free)
            else:
                order = np.argsort(-mass, kind="stable")
                count = max(1, int(np.floor(exact * len(centroids) + 1e-9)))
                if top_p > 0:
                    count = int(np.searchsorted(np.cumsum(mass[order]), top_p * mass.sum())) + 1
                chosen = sinks + np.flatnonzero(np.isin(labels, order[:count]))
            same_choice(report, where, found, np.union1d(chosen, forced), scores)

        check_decode(report, layer, dump, judge, extras if estimated else None)

    return check


def cases():
    fifth = Budget(density=0.2)

    def case(name, settings, check, budget=None, **more):
        args = ["--select", "cluster", *(budget.args() if budget else [])]
        for setting in settings:
            args += ["--set", f"select.{setting}"]
        return Case(f"cluster/{name}", "decode", args, check, **more)

    few, dense = Budget(tokens=60), Budget(tokens=100000)
    small = ["segment=300", "per_cluster=7", "sinks=9", "recent=20", "iterations=3"]
    return [
        case("default", [], cluster(), extra=True),
        case("exact", ["estimate=false"], cluster(estimated=0), layers="one"),
        case("all-estimated", ["estimated=1"], cluster(estimated=1), layers="one"),
        case("small", [*small, "exact=0.2", "estimated=0.5"], cluster(None, 300, 7, 0.2, 0, 9, 20, 3, estimated=0.5)),
        case("top_p", ["top_p=0.6"], cluster(top_p=0.6), extra=True),
        case("budget", [], cluster(fifth), fifth, extra=True),
        case("exact-budget", ["estimate=false"], cluster(fifth, estimated=0), fifth, layers="one"),
        case("small-budget", small, cluster(fifth, 300, 7, 0.018, 0, 9, 20, 3), fifth, layers="one"),
        case("least", [], cluster(few), few, layers="one"),
        case("dense", [], cluster(dense), dense, layers="one"),
        *(
            case(gqa, [f"gqa={gqa}"], cluster(fifth, gqa=gqa), fifth, layers="one")
            for gqa in ("mean", "max", "none")
        ),
    ]
