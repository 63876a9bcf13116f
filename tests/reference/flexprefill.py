"""flexprefill: columns and diagonals that cover a share of the last queries' mass, or pairs of blocks."""

from itertools import product

import numpy as np

from compare import TIE, Case, Prefill, same_set, units_in
from vertical_slash import cells_of, column_and_diagonal_mass, lower_minference

SLACK = 1e-6  # of the mass, in fp32 sums


def covering(mass, gamma):
    """How many of the largest reach gamma, the crossing one included; all answers within rounding."""
    sums = np.cumsum(np.sort(mass)[::-1])
    return sorted({int((sums <= g).sum()) + 1 for g in (gamma, gamma - SLACK, gamma + SLACK)})


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def block_means(x, block):
    return np.stack([x[a : a + block].mean(axis=0) for a in range(0, len(x), block)])


def best(mass, count):
    """The `count` best of a mass whose entry 0 comes first."""
    ranked = mass.copy()
    ranked[0] = np.inf
    return np.argsort(-ranked, kind="stable")[:count]


class BlockHead:
    """Masks [blocks, blocks] that one head may read."""

    def __init__(self, layer, head, block, gamma, tau, min_tokens, last_q):
        n, d = layer.prompt, layer.dim
        blocks = -(-n // block)
        columns, diagonals = (m / min(last_q, n) for m in column_and_diagonal_mass(layer, head, last_q))
        per_block = np.array([columns[a : a + block].sum() for a in range(0, n, block)])
        far_first = diagonals[::-1]
        bands = np.array([far_first[a : a + block].sum() for a in range(0, n, block)])[::-1]
        q, k = layer.q[head, :n], layer.k[layer.kv_of(head), :n]
        keys = block_means(k, block)
        estimate = softmax(keys @ q[n - min(last_q, n) :].mean(axis=0) / np.sqrt(d))
        with np.errstate(divide="ignore", invalid="ignore"):
            p, t = estimate.astype(np.float32).astype(float), per_block.astype(np.float32).astype(float)
            m = (p + t) / 2
            self.distance = np.sqrt(0.5 * (p * np.log(p / m)).sum() + 0.5 * (t * np.log(t / m)).sum())
        self.aware = bool(self.distance < tau)
        least = max(1, -(-min_tokens // 128))
        counts = []
        for mass in (columns, diagonals):
            own = {0} if self.aware else {c // 128 + 1 for c in covering(mass, gamma)}
            counts.append(sorted({min(max(c, least), blocks) for c in own}))
        rows = np.arange(blocks)
        causal = rows[:, None] >= rows
        pairs = [np.zeros((blocks, blocks), bool)]
        if self.aware:
            logits = np.where(causal, block_means(q, block) @ keys.T / np.sqrt(d), -np.inf)
            pairs = self.best_pairs(softmax(logits), gamma * blocks)
        self.masks = []
        for v, s, extra in product(*counts, pairs):
            mask = extra.copy()
            mask[:, best(per_block, v)] = True
            mask |= np.isin(rows[:, None] - rows, best(bands, s))
            self.masks.append(mask & causal)

    @staticmethod
    def best_pairs(p, limit):
        order = np.argsort(-p, axis=None, kind="stable")
        sums = np.cumsum(p.ravel()[order])
        out = []
        for count in sorted({int((sums <= limit * x).sum()) for x in (1, 1 - SLACK, 1 + SLACK)}):
            taken = np.zeros(p.size, bool)
            taken[order[:count]] = True
            out.append(taken.reshape(p.shape))
        return out


def by_block(block=128, gamma=0.9, tau=0.1, min_tokens=1024, last_q=128):
    def check(layer, dump, report):
        view = Prefill(report, layer, dump)
        if not view.good:
            return
        report.expect(view.q_tile == block, f"q_tile {view.q_tile}, expected {block}")
        dense = layer.prompt <= max(2 * block, -(-min_tokens // block) * block)
        for head in range(layer.heads):
            of = None if dense else BlockHead(layer, head, block, gamma, tau, min_tokens, last_q)
            found = np.zeros((view.tiles, view.tiles), bool)
            for t in range(view.tiles):
                found[t, units_in(report, view.where(head, t), view.row(head, t), block, view.tile(t)[1])] = True
            masks = [np.tri(view.tiles, dtype=bool)] if dense else of.masks
            expected = next((m for m in masks if np.array_equal(m, found)), masks[0])
            for t in range(view.tiles):
                same_set(report, view.where(head, t), np.flatnonzero(found[t]), np.flatnonzero(expected[t]))
        view.check_outputs()

    return check


def forced_order(mass, forced):
    ranked = mass.copy()
    ranked[:forced] = np.inf
    return np.argsort(-ranked, kind="stable")


def listed(mass, gamma, least, forced):
    """Lists that the best elements may be, within rounding and ties."""
    order = forced_order(mass, forced)
    out = []
    for count in covering(mass, gamma):
        count = min(max(count, least), len(mass))
        out.append(order[:count])
        if count < len(mass) and 0 <= mass[order[count - 1]] - mass[order[count]] <= TIE * mass[order[count - 1]]:
            out.append(np.append(order[: count - 1], order[count]))
    return out


def by_token(gamma=0.65, min_tokens=512, last_q=512):
    def check(layer, dump, report):
        view = Prefill(report, layer, dump)
        if not view.good:
            return
        report.expect(view.q_tile == 64 and view.block == 64, f"tile {view.q_tile}, piece {view.block}")
        n = layer.prompt
        for head in range(layer.heads):
            columns, diagonals = (m / min(last_q, n) for m in column_and_diagonal_mass(layer, head, last_q))
            choices = product(listed(columns, gamma, min_tokens, 4), listed(diagonals, gamma, min_tokens, 64))
            wrong = []
            for chosen, offsets in choices:
                wrong.append(differing_tile(view, head, chosen.tolist(), offsets.tolist()))
                if wrong[-1] is None:
                    break
            report.rows += view.tiles
            report.elements += sum(len(view.row(head, t)) for t in range(view.tiles))
            report.expect(wrong[-1] is None, f"layer {layer.index} head {head}: tile {wrong[0]} differs")
        view.check_outputs()

    return check


def differing_tile(view, head, columns, offsets):
    for t in range(view.tiles):
        begin, end = view.tile(t)
        pieces, gathered = lower_minference(columns, offsets, begin, view.layer.prompt)
        row = head * view.tiles + t
        same = np.array_equal(cells_of(pieces, gathered, end), view.row(head, t))
        same &= sorted(gathered) == view.columns[row].tolist()
        if not (same and sorted(p for p in pieces if p < end) == view.pieces[row].tolist()):
            return t
    return None


def cases():
    def case(name, settings, check, **more):
        args = ["--cells", "--select", "flexprefill"]
        for setting in settings:
            args += ["--set", f"select.{setting}"]
        return Case(f"flexprefill/{name}", "prefill", args, check, **more)

    sf = "preset=sparse_frontier"
    return [
        case("default", [], by_block(), extra=True),
        case("gamma", ["gamma=0.7", "min_tokens=256"], by_block(gamma=0.7, min_tokens=256)),
        case("none-aware", ["tau=0", "min_tokens=128"], by_block(tau=0, min_tokens=128)),
        case("all-aware", ["tau=1", "min_tokens=128"], by_block(tau=1, min_tokens=128), extra=True),
        case("aware-gamma", ["tau=0.45", "gamma=0.8", "min_tokens=0"], by_block(tau=0.45, gamma=0.8, min_tokens=0)),
        case("some-aware", ["tau=0.14", "min_tokens=128"], by_block(tau=0.14, min_tokens=128)),
        case(
            "block-64",
            ["block=64", "last_q=64", "min_tokens=300", "tau=0.3"],
            by_block(64, tau=0.3, min_tokens=300, last_q=64),
            layers="one",
        ),
        case("dense", ["min_tokens=1990"], by_block(min_tokens=1990), layers="one"),
        case("sparse_frontier", [sf], by_token(), extra=True),
        case("sparse_frontier-class", [sf, "gamma=0.9", "min_tokens=256"], by_token(0.9, 256)),
        case("sparse_frontier-forced", [sf, "gamma=0.2", "min_tokens=70"], by_token(0.2, 70)),
        case(
            "sparse_frontier-small",
            [sf, "gamma=0.3", "min_tokens=2", "last_q=64"],
            by_token(0.3, 2, 64),
            layers="one",
        ),
    ]
