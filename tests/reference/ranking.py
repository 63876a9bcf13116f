"""What every ranking method shares: forced units, the best others, all cells of the chosen units, outputs."""

from functools import lru_cache

import numpy as np

from budgets import cached_target, step_units, tile_units, top
from compare import Prefill, check_decode, same_choice, same_scores, same_set, units_in


def check_prefill_ranking(
    layer, dump, report, budget, unit, scores_of, forced_of=lambda t: [], min_units=0, q_tile=None
):
    """Every row reads its forced units and its best others. scores_of(head, tile, begin, end) -> [units]."""
    view = Prefill(report, layer, dump)
    if not view.good:
        return
    if q_tile is not None:
        report.expect(view.q_tile == q_tile, f"q_tile {view.q_tile}, expected {q_tile}")
    for head in range(layer.heads):
        for t in range(view.tiles):
            begin, end = view.tile(t)
            found = units_in(report, view.where(head, t), view.row(head, t), unit, end)
            units = -(-end // unit)
            forced = np.array(sorted(set(forced_of(t))), dtype=int)
            count = tile_units(budget, layer.prompt, begin, end, unit, forced, min_units)
            if count is None:
                same_set(report, view.where(head, t), found, np.arange(units))
                continue
            scores = np.array(scores_of(head, t, begin, end), dtype=np.float64)
            free = np.ones(units, bool)
            free[forced] = False
            same_scores(report, view.where(head, t), dump, head * view.tiles + t, scores, free)
            expected = np.union1d(top(scores, count, free), forced).astype(int)
            ranked = scores.copy()
            ranked[forced] = np.inf
            same_choice(report, view.where(head, t), found, expected, ranked)
    view.check_outputs()


def check_decode_ranking(layer, dump, report, budget, unit, scores_of, current=0, gqa="none", dense=False):
    """scores_of(step, kv_head) -> [group, units], `current` pages are forced; union: every head of the group reads the
    union of the heads' choices."""
    reducers = {"mean": np.mean, "sum": np.sum, "max": np.max}
    scores_of = lru_cache(maxsize=1)(scores_of)  # the heads of a group come one after the other

    def judge(step, head, found):
        cached = layer.prompt + step + 1
        where = f"layer {layer.index} step {step} head {head}"
        units = -(-cached // unit)
        forced = np.arange(max(0, units - current), units)
        forced_tokens = cached - forced[0] * unit if len(forced) else 0
        count = step_units(cached_target(budget, cached, unit), cached, unit, forced_tokens, len(forced))
        chosen = units_in(report, where, found, unit, cached)
        if dense or count is None:
            same_set(report, where, chosen, np.arange(units))
            return
        scores = scores_of(step, layer.kv_of(head))
        free = np.ones(units, bool)
        free[forced] = False
        if gqa == "union":
            choices = [np.union1d(top(row, count, free), forced) for row in scores]
            same_set(report, where, chosen, np.unique(np.concatenate(choices)).astype(int))
            return
        row = scores[head % layer.group] if gqa == "none" else reducers[gqa](scores, axis=0)
        score_row = step * layer.heads + head if gqa == "none" else step * layer.kv_heads + layer.kv_of(head)
        same_scores(report, where, dump, score_row, row, free)
        expected = np.union1d(top(row, count, free), forced).astype(int)
        ranked = row.copy()
        ranked[forced] = np.inf
        same_choice(report, where, chosen, expected, ranked)

    check_decode(report, layer, dump, judge)


def sum_units(values, unit):
    """Sums of `unit` consecutive columns of the last axis, the last one partial."""
    return np.add.reduceat(values, np.arange(0, values.shape[-1], unit), axis=-1)
