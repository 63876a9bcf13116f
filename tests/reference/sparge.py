"""sparge: key tiles ranked by mean query . mean centred key, tiles that their means do not stand for left whole."""

import numpy as np

from budgets import Budget, tile_target
from compare import TIE, Case, Prefill, same_set, units_in


def means(x, tile):
    return np.stack([x[a : a + tile].mean(axis=0) for a in range(0, len(x), tile)])


def similar(x, tile, theta):
    """Whether each tile's mean cosine exceeds theta; a partial one's is NaN in the original."""
    out = []
    for a in range(0, len(x), tile):
        rows = x[a : a + tile]
        with np.errstate(invalid="ignore", divide="ignore"):
            unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
            out.append(len(rows) == tile and (unit @ unit.T).mean() > theta)
    return np.array(out)


class Head:
    def __init__(self, layer, head, tiles, theta):
        n = layer.prompt
        q, k = layer.q[head, :n], layer.k[layer.kv_of(head), :n]
        k = k - k.mean(axis=0)
        self.similar_q, self.similar_k = similar(q, tiles[0], theta), similar(k, tiles[1], theta)
        self.logits = means(q, tiles[0]) @ means(k, tiles[1]).T / np.sqrt(layer.dim)

    def row(self, t, visible):
        """p of the visible key tiles; 0 for dissimilar ones."""
        kept = self.similar_k[:visible]
        if not kept.any():
            return np.zeros(visible)
        logits = np.where(kept, self.logits[t, :visible], -np.inf)
        p = np.exp(logits - logits.max())
        return p / p.sum()


def own_choices(p, kept, top, cdf, tiles):
    """The best similar tiles by count or by sum; more than one choice where a tie or rounding leaves it open."""
    order = [u for u in np.argsort(-p, kind="stable") if kept[u]]
    if cdf is None:
        return [sorted(order[: max(1, int(top * tiles))])]
    sums = np.cumsum(p[order])
    counts = {max(1, int((sums <= limit).sum())) for limit in (cdf, cdf - 1e-6, cdf + 1e-6)}
    return [sorted(order[:count]) for count in counts]


def sparge(tiles=(128, 64), theta=-0.1, top=0.5, cdf=None, budget=None):
    def check(layer, dump, report):
        view = Prefill(report, layer, dump)
        if not view.good:
            return
        shape = (view.q_tile, view.block)
        report.expect(shape == tuple(tiles), f"tiles {shape}, expected {tiles}")
        for head in range(layer.heads):
            of = Head(layer, head, tiles, theta)
            for t in range(view.tiles):
                begin, end = view.tile(t)
                where = view.where(head, t)
                found = units_in(report, where, view.row(head, t), tiles[1], end)
                visible = -(-end // tiles[1])
                p, kept = of.row(t, visible), of.similar_k[:visible]
                if budget is not None:
                    k, pairs = tile_target(budget, layer.prompt, begin, end, tiles[1])
                    count = visible if k >= end else max(1, pairs // (tiles[1] * (end - begin)))
                    order = np.argsort(-np.where(kept, p, np.inf), kind="stable")
                    choices = [np.sort(order[:count])]
                elif not of.similar_q[t]:
                    choices = [np.arange(visible)]
                else:
                    own = own_choices(p, kept, top, cdf, len(of.similar_k)) if kept.any() else [[]]
                    choices = [np.union1d(np.flatnonzero(~kept), c).astype(int) for c in own]
                matching = [c for c in choices if np.array_equal(c, found)]
                if not matching and len(found) == len(choices[0]):
                    swapped = p[np.setxor1d(found, choices[0])]
                    if kept[np.setxor1d(found, choices[0])].all() and np.ptp(swapped) <= TIE * swapped.max():
                        report.ties.append((where, len(swapped) // 2, float(np.ptp(swapped))))
                        matching = [found]
                same_set(report, where, found, matching[0] if matching else choices[0])
        view.check_outputs()

    return check


def cases():
    def case(name, settings, check, budget=None, **more):
        args = ["--cells", "--select", "sparge", *(budget.args() if budget else [])]
        for setting in settings:
            args += ["--set", f"select.{setting}"]
        return Case(f"sparge/{name}", "prefill", args, check, **more)

    fifth = Budget(density=0.2)
    return [
        case("default", [], sparge(), extra=True),
        case("cdf", ["preset=cdf"], sparge(theta=0.6, cdf=0.98), extra=True),
        case("cdf-half", ["cdf=0.5", "theta=0.2"], sparge(theta=0.2, cdf=0.5)),
        case("cdf-least", ["cdf=0.0001", "theta=-1"], sparge(theta=-1, cdf=0.0001), layers="one"),
        case("top", ["top=0.1"], sparge(top=0.1)),
        case("top-0", ["top=0"], sparge(top=0), layers="one"),
        case("hopper", ["tiles=[64,128]", "theta=0.3"], sparge((64, 128), theta=0.3)),
        case("all-dissimilar", ["theta=1"], sparge(theta=1), layers="one"),
        case("density", ["theta=0.2"], sparge(theta=0.2, budget=fifth), fifth),
        case("density-similar", [], sparge(budget=fifth), fifth, layers="one"),
    ]
