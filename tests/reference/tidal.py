"""tidal, omnikv and reuse: choices that later layers, steps or heads read again. They need every layer of a model."""

from functools import lru_cache
from trace import Layer

import numpy as np

from budgets import Budget, cached_target, step_units, top
from compare import Case, check_decode, same_choice, same_set
from quest import page_scores

EVERY_LAYER = ("all-layers",)


@lru_cache(maxsize=4)
def layer_of(trace, index):
    return Layer(trace, index)


def logits(layer, head, at):
    return layer.k[layer.kv_of(head), : at + 1] @ layer.q[head, at]


# ---- tidal


def tidal(select=(2, 13), k=256, budget=None, gqa="none"):
    def check(layer, dump, report):
        before = [s for s in select if s < layer.index]
        source = layer_of(layer.trace, max(before)) if before and layer.index not in select else None

        def judge(step, head, found):
            at = layer.prompt + step
            where = f"layer {layer.index} step {step} head {head}"
            if source is None:
                same_set(report, where, found, np.arange(at + 1))
                return
            count = k if budget is None else cached_target(budget, at + 1)
            if gqa == "union":
                first = head - head % layer.group
                chosen = [top(logits(source, h, at), count) for h in range(first, first + layer.group)]
                same_set(report, where, found, np.unique(np.concatenate(chosen)))
                return
            scores = logits(source, head, at)
            same_choice(report, where, found, top(scores, count), scores)

        check_decode(report, layer, dump, judge)

    return check


# ---- omnikv


def omnikv(filters=(2, 8, 18), keep=0.067, budget=None):
    def check(layer, dump, report):
        before = [f for f in filters if f < layer.index]
        dense = not before or layer.index in filters or layer.index - 1 in filters
        source = None if dense else layer_of(layer.trace, max(before))

        def judge(step, head, found):
            at, prompt = layer.prompt + step, layer.prompt
            where = f"layer {layer.index} step {step} head {head}"
            if dense:
                same_set(report, where, found, np.arange(at + 1))
                return
            scores = np.max([logits(source, h, at) for h in range(layer.heads)], axis=0)
            scores[prompt:] = np.inf
            count = int(keep * prompt + 1e-9)
            if budget is not None:
                count = max(0, cached_target(budget, at + 1) - (at + 1 - prompt))
            same_choice(report, where, found, top(scores, count + at + 1 - prompt), scores)

        check_decode(report, layer, dump, judge)

    return check


# ---- reuse, over quest

PAGE = 16


def quest_tokens(layer, head, at, budget):
    """Token scores (of their pages, the current page first) and the tokens that quest reads."""
    scores = page_scores(layer.k[layer.kv_of(head), : at + 1], layer.q[head, at][None], PAGE)[0]
    last = len(scores) - 1
    count = step_units(cached_target(budget, at + 1, PAGE), at + 1, PAGE, at + 1 - last * PAGE, 1)
    scores[last] = np.inf
    pages = top(scores, count + 1) if count is not None else np.arange(last + 1)
    tokens = np.concatenate([np.arange(u * PAGE, min((u + 1) * PAGE, at + 1)) for u in pages])
    return np.repeat(scores, PAGE)[: at + 1], tokens


def reuse(budget, steps=1, layers=1, heads=1):
    def check(layer, dump, report):
        source = layer_of(layer.trace, layer.index - layer.index % layers)

        def judge(step, head, found):
            at = layer.prompt + step
            chosen_at = at - step % steps
            scores, tokens = quest_tokens(source, head - head % heads, chosen_at, budget)
            later = np.arange(chosen_at + 1, at + 1)
            scores = np.concatenate([scores, np.full(len(later), np.inf)])
            where = f"layer {layer.index} step {step} head {head}"
            same_choice(report, where, found, np.concatenate([tokens, later]), scores)

        check_decode(report, layer, dump, judge)

    return check


def cases():
    tenth, fifth = Budget(density=0.1), Budget(density=0.2)

    def case(name, check, settings=(), budget=None):
        args = ["--select", name.split("/")[0], *(budget.args() if budget else [])]
        for setting in settings:
            args += ["--set", f"select.{setting}"]
        return Case(name, "decode", args, check, traces=EVERY_LAYER)

    base = ["base.name=quest", "base.density=0.2"]
    return [
        case("tidal/default", tidal()),
        case("tidal/k", tidal((1, 5, 20), 24), ["select_layers=[1,5,20]", "k=24"]),
        case("tidal/budget", tidal(budget=tenth), budget=tenth),
        case("tidal/union", tidal(k=32, gqa="union"), ["k=32", "gqa=union"]),
        case("omnikv/default", omnikv()),
        case("omnikv/filters", omnikv((0, 3), 0.2), ["filter_layers=[0,3]", "keep=0.2"]),
        case("omnikv/budget", omnikv(budget=fifth), budget=fifth),
        case("reuse/default", reuse(fifth), base),
        case("reuse/steps", reuse(fifth, steps=4), [*base, "steps=4"]),
        case("reuse/layers", reuse(fifth, layers=3), [*base, "layers=3"]),
        case("reuse/heads", reuse(fifth, heads=9), [*base, "heads=9"]),
        case("reuse/all", reuse(fifth, 3, 4, 2), [*base, "steps=3", "layers=4", "heads=2"]),
    ]
