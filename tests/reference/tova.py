"""tova: the last query's attention, averaged over the layer's query heads; one set for the layer, cut at every step."""

import numpy as np

from budgets import Budget, cached_target, top
from compare import Case, check_decode, check_eviction, same_choice


class Simulation:
    """The cache that all KV heads of a layer share: what every query after the cut reads."""

    def __init__(self, layer, cut, budget, force_current=False, reduce="mean"):
        self.layer, self.force_current, self.reduce = layer, force_current, reduce
        self.target = cached_target(budget, cut)
        self.cache = np.arange(cut)
        self.ranked = np.full(layer.length, np.inf)
        self.evict(cut - 1)
        self.at_cut = self.cache, self.ranked
        self.reads = {}  # what the query at a position reads, and the scores that the last eviction ranked
        for at in range(cut, layer.length):
            self.cache = np.append(self.cache, at)
            self.reads[at] = self.cache, self.ranked
            self.evict(at)

    def evict(self, at):
        if len(self.cache) <= self.target:
            return
        rows = [self.layer.rows(head, at, at + 1)[0][0, self.cache] for head in range(self.layer.heads)]
        rows = np.stack([p / p.sum() for p in rows])
        scores = rows.max(axis=0) if self.reduce == "max" else rows.mean(axis=0)
        self.ranked = np.full(self.layer.length, np.inf)
        self.ranked[self.cache] = scores
        if self.force_current:
            scores[-1] = self.ranked[at] = np.inf
        self.cache = self.cache[top(scores, self.target)]


def tova(budget, cut, **rule):
    def check(layer, dump, report):
        tokens = layer.trace.cut(cut)
        run = Simulation(layer, tokens, budget, **rule)

        def judge(kv_head, found):
            same_choice(report, f"layer {layer.index} KV head {kv_head}", found, *run.at_cut)

        def reads(kv_head, at):
            mask = np.zeros(at + 1, bool)
            mask[run.reads[at][0]] = True
            return mask

        check_eviction(report, layer, dump, tokens, judge, reads)

    return check


def tova_decode(budget):
    """Step by step, from the tokens that the decode steps read."""

    def check(layer, dump, report):
        run = Simulation(layer, layer.prompt, budget)

        def judge(step, head, found):
            same_choice(report, f"layer {layer.index} step {step} head {head}", found, *run.reads[layer.prompt + step])

        check_decode(report, layer, dump, judge)

    return check


def cases():
    fifth, few = Budget(density=0.2), Budget(tokens=40)
    evict = ["--evict", "tova"]

    def case(name, budget, cut, settings=(), layers="all", extra=False, **rule):
        args = [*evict, *budget.args(), "--cut", cut]
        for setting in settings:
            args += ["--set", f"evict.{setting}"]
        return Case(f"tova/{name}", "evict", args, tova(budget, cut, **rule), layers, extra)

    return [
        case("end", fifth, "end", extra=True),
        case("before_question", fifth, "before_question"),
        case("few", few, "end"),
        case("kvpress", few, "end", ["preset=kvpress"], force_current=True),
        case("max", few, "end", ["gqa=max"], layers="one", reduce="max"),
        Case("tova/decode", "decode", [*evict, *fifth.args()], tova_decode(fifth)),
    ]
