"""finch: tokens ranked by the question's attention, rows weighted by their position."""

import numpy as np

from budgets import Budget, cached_target
from compare import Case, same_choice
from eviction import TENTH, THIRD, case, reduce_group
from snapkv import keep


def question_begin(layer, tokens):
    """Before the question is known, as many last tokens stand in for it; it ends the prompt in these traces."""
    question = layer.trace.question
    return question if question < tokens else tokens - (layer.prompt - question)


def finch(gqa="mean"):
    def scores(layer, tokens):
        begin = question_begin(layer, tokens)
        at = np.arange(begin, tokens)
        out = []
        for h in range(layer.kv_heads):
            rows = []
            for head in range(h * layer.group, (h + 1) * layer.group):
                p, _ = layer.rows(head, begin, tokens)
                rows.append((p * at[:, None]).mean(axis=0))
            rows = reduce_group(np.stack(rows), gqa)
            rows[:, begin:] = np.inf
            out.append(rows)
        return out

    return scores


def compacted(budget):
    """Sets only: how outputs follow re-rotated keys is streaming_llm/compacted's."""

    def check(layer, dump, report):
        tokens = layer.prompt
        forced = np.arange(layer.trace.question, tokens)
        for h, found in enumerate(dump.lists("kept")):
            row = finch()(layer, tokens)[h][0]
            expected = keep(row, cached_target(budget, tokens), forced)
            same_choice(report, f"layer {layer.index} KV head {h}", found, expected, row)

    return check


def cases():
    forced = {"recent": 29}  # the question is the end of the prompt
    return [
        case("finch", "default", TENTH, finch(), traces=("needles",), **forced),
        case("finch", "variables", TENTH, finch(), recent=26, traces=("variables",)),
        case("finch", "union", THIRD, finch("union"), settings=["gqa=union"], layers="second", **forced),
        case("finch", "max", THIRD, finch("max"), settings=["gqa=max"], layers="second", **forced),
        case("finch", "inside-the-question", TENTH, finch(), "1980", recent=13, layers="one"),
        case("finch", "before_question", TENTH, finch(), "before_question", **forced),
        case("finch", "tokens", Budget(tokens=40), finch(), layers="one", **forced),
        Case(
            "finch/kvpress",
            "evict",
            ["--evict", "finch", *TENTH.args(), "--set", "evict.preset=kvpress"],
            compacted(TENTH),
            "one",
        ),
    ]
