"""block_topk and xattention: blocks of keys for tiles of queries."""

import numpy as np

from budgets import Budget
from compare import TIE, Case, Prefill, same_set, units_in
from ranking import check_prefill_ranking


def pooled(x, block):
    """Means of `block` consecutive rows; a partial last block is padded with zeros."""
    sums = np.add.reduceat(x, np.arange(0, len(x), block), axis=0)
    return sums / block


def block_topk(budget, block=64, sinks=0, local=0, min_units=0):
    def check(layer, dump, report):
        blocks = -(-layer.prompt // block)
        table = {}

        def scores(head, t, begin, end):
            if head not in table:
                q = pooled(layer.q[head, : layer.prompt], block)
                table[head] = q @ pooled(layer.k[layer.kv_of(head), : layer.prompt], block).T
            return table[head][t, : t + 1]

        def forced(t):
            return [*range(min(sinks, t + 1)), *range(max(0, t + 1 - local), t + 1)]

        check_prefill_ranking(layer, dump, report, budget, block, scores, forced, min_units, q_tile=block)
        report.expect(blocks > 0, "no blocks")

    return check


def antidiagonal_mass(layer, head, stride, block):
    """[tiles, blocks]: sums of the group rows' softmax, over the groups of a (tile, block) pair."""
    n, d = layer.prompt, layer.dim
    groups = -(-n // stride)
    tokens = groups * stride
    q, k = np.zeros((tokens, d)), np.zeros((tokens, d))
    q[:n], k[:n] = layer.q[head, :n], layer.k[layer.kv_of(head), :n]
    logits = np.zeros((groups, groups))
    for s in range(stride):
        logits += q[stride - 1 - s :: stride] @ k[s::stride].T
    logits /= np.sqrt(d) * stride
    logits[np.triu_indices(groups, 1)] = -np.inf
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    at = np.arange(0, groups, block // stride)
    return np.add.reduceat(np.add.reduceat(p, at, axis=0), at, axis=1)


def xattention(budget, stride=16, block=128):
    def check(layer, dump, report):
        table = {}

        def scores(head, t, begin, end):
            if head not in table:
                table[head] = antidiagonal_mass(layer, head, stride, block)
            return table[head][t, : t + 1]

        check_prefill_ranking(layer, dump, report, budget, block, scores, lambda t: [0, t], q_tile=block)

    return check


def xattention_threshold(threshold=0.9, stride=16, block=128):
    def check(layer, dump, report):
        view = Prefill(report, layer, dump)
        if not view.good:
            return
        for head in range(layer.heads):
            mass = antidiagonal_mass(layer, head, stride, block)
            for t in range(view.tiles):
                row = mass[t, : t + 1]
                where = view.where(head, t)
                found = units_in(report, where, view.row(head, t), block, view.tile(t)[1])
                chosen = sorted({0, t})
                others = [u for u in np.argsort(-row, kind="stable") if u not in chosen]
                before = row[chosen].sum()
                near = False
                for u in others:
                    near = near or abs(before - threshold * row.sum()) <= TIE * row.sum()
                    if before >= threshold * row.sum():
                        break
                    chosen.append(u)
                    before += row[u]
                expected = np.sort(chosen)
                if near and len(found) != len(expected) and abs(len(found) - len(expected)) == 1:
                    report.ties.append((where, 1, 0.0))
                    continue
                same_set(report, where, found, expected)
        view.check_outputs()

    return check


def cases():
    select = ["--cells", "--select"]
    fifth = Budget(density=0.2)
    sf = ["--set", "select.preset=sparse_frontier"]
    return [
        Case(
            "block_topk/density",
            "prefill",
            ["--scores", *select, "block_topk", *fifth.args()],
            block_topk(fifth),
            extra=True,
        ),
        Case("block_topk/default", "prefill", [*select, "block_topk"], block_topk(Budget(units=100)), "one"),
        Case(
            "block_topk/top",
            "prefill",
            [*select, "block_topk", "--set", "select.top=6"],
            block_topk(Budget(units=6)),
            "one",
        ),
        Case(
            "block_topk/units", "prefill", [*select, "block_topk", "--units", "6"], block_topk(Budget(units=6)), "one"
        ),
        Case(
            "block_topk/sparse_frontier",
            "prefill",
            [*select, "block_topk", *sf, *fifth.args()],
            block_topk(fifth, 16, sinks=1, local=2, min_units=3),
        ),
        Case(
            "block_topk/sparse_frontier-top",
            "prefill",
            [*select, "block_topk", *sf, "--set", "select.top=24"],
            block_topk(Budget(units=24), 16, sinks=1, local=2, min_units=3),
            "one",
        ),
        Case(
            "xattention/density",
            "prefill",
            [*select, "xattention", *Budget(density=0.3).args()],
            xattention(Budget(density=0.3)),
            extra=True,
        ),
        Case("xattention/threshold", "prefill", [*select, "xattention"], xattention_threshold(), extra=True),
        Case(
            "xattention/stride-8",
            "prefill",
            [*select, "xattention", "--set", "select.stride=8"],
            xattention_threshold(stride=8),
        ),
        Case(
            "xattention/stride-4",
            "prefill",
            [*select, "xattention", "--set", "select.stride=4", "--set", "select.threshold=0.8"],
            xattention_threshold(0.8, stride=4),
            "one",
        ),
    ]
