"""h2o: heavy hitters by accumulated attention, and recent tokens; evicts after the prompt and after every step."""

import numpy as np

from budgets import Budget, cached_target, top
from compare import Case, check_decode, check_eviction, same_choice


class Simulation:
    """The cache of one KV head: what every query after the cut reads, and what is left in the end."""

    def __init__(self, layer, kv_head, cut, budget, heavy_share=0.5):
        self.heads = range(kv_head * layer.group, (kv_head + 1) * layer.group)
        self.target = cached_target(budget, cut)
        self.heavy = int(np.floor(heavy_share * self.target + 1e-9))
        self.recent = self.target - self.heavy
        self.sums = np.zeros((layer.group, layer.length))
        for row, head in enumerate(self.heads):
            self.sums[row, :cut] = layer.window_mass(head, 0, cut)
        self.cache = np.arange(cut)
        self.evict()
        self.at_cut = self.cache, self.ranked
        self.reads = {}  # what the query at a position reads, and the scores that the last eviction ranked
        for at in range(cut, layer.length):
            self.cache = np.append(self.cache, at)
            self.reads[at] = self.cache, self.ranked
            for row, head in enumerate(self.heads):
                p = layer.rows(head, at, at + 1)[0][0, self.cache]
                self.sums[row, self.cache] += p / p.sum()
            self.evict()

    def evict(self):
        self.ranked = np.full(self.sums.shape[1], np.inf)
        if len(self.cache) <= self.target:
            return
        older = self.cache[: len(self.cache) - self.recent]
        self.ranked[older] = self.sums[:, older].mean(axis=0)
        best = older[top(self.ranked[older], self.heavy)]
        self.cache = np.concatenate([best, self.cache[len(self.cache) - self.recent :]])


def h2o(budget, cut, heavy=0.5):
    def check(layer, dump, report):
        tokens = layer.trace.cut(cut)
        runs = [Simulation(layer, h, tokens, budget, heavy) for h in range(layer.kv_heads)]

        def judge(kv_head, found):
            same_choice(report, f"layer {layer.index} KV head {kv_head}", found, *runs[kv_head].at_cut)

        def reads(kv_head, at):
            mask = np.zeros(at + 1, bool)
            mask[runs[kv_head].reads[at][0]] = True
            return mask

        check_eviction(report, layer, dump, tokens, judge, reads)

    return check


def h2o_decode(budget):
    """Step by step, from the tokens that the decode steps read."""

    def check(layer, dump, report):
        runs = [Simulation(layer, h, layer.prompt, budget) for h in range(layer.kv_heads)]

        def judge(step, head, found):
            run = runs[layer.kv_of(head)]
            where = f"layer {layer.index} step {step} head {head}"
            same_choice(report, where, found, *run.reads[layer.prompt + step])

        check_decode(report, layer, dump, judge)

    return check


def normalised(budget, cut):
    """kvpress' ObservedAttention: one cut, divided by the queries that could see the token, nothing forced."""

    def check(layer, dump, report):
        tokens = layer.trace.cut(cut)

        def judge(kv_head, found):
            heads = range(kv_head * layer.group, (kv_head + 1) * layer.group)
            sums = np.mean([layer.window_mass(h, 0, tokens) for h in heads], axis=0)
            scores = sums / (tokens - np.arange(tokens))
            expected = top(scores, cached_target(budget, tokens))
            same_choice(report, f"layer {layer.index} KV head {kv_head}", found, expected, scores)

        check_eviction(report, layer, dump, tokens, judge)

    return check


def cases():
    fifth = Budget(density=0.2)
    evict = ["--evict", "h2o", *fifth.args()]
    return [
        Case("h2o/end", "evict", [*evict, "--cut", "end"], h2o(fifth, "end"), extra=True),
        Case("h2o/before_question", "evict", [*evict, "--cut", "before_question"], h2o(fifth, "before_question")),
        Case("h2o/heavy", "evict", [*evict, "--cut", "end", "--set", "evict.heavy=0.8"], h2o(fifth, "end", 0.8), "one"),
        Case("h2o/decode", "decode", evict, h2o_decode(fifth)),
        Case(
            "h2o/normalise",
            "evict",
            [*evict, "--cut", "end", "--set", "evict.normalise=true"],
            normalised(fifth, "end"),
        ),
    ]
