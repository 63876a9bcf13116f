"""vertical_slash: columns and diagonals scored by the last queries, lowered to 64-wide pieces and single columns."""

import numpy as np

from budgets import Budget
from compare import TIE, Case, Prefill

TILE = 64


def column_and_diagonal_mass(layer, head, last_q):
    n = layer.prompt
    first = n - min(last_q, n)
    p, _ = layer.rows(head, first, n)
    diagonals = np.zeros(n)
    for i in range(first, n):
        diagonals[: i + 1] += p[i - first, i::-1]  # offset q - k = 0, 1, ...
    return p.sum(axis=0), diagonals


def ranking(mass, forced):
    """Best first; the first `forced` lead; ties to the lower index."""
    key = mass.copy()
    key[:forced] = np.inf
    return np.argsort(-key, kind="stable")


def lower_minference(columns, offsets, begin, prompt):
    """Pieces that the offsets cover for the queries [begin, begin + 64), far to near, and the columns outside."""
    end = begin + TILE
    ranges = []
    for o in sorted(offsets, reverse=True):
        if o >= end:
            continue
        t = max(end - o, TILE)
        if not ranges or t > ranges[-1][1] + TILE:
            ranges.append([t - TILE, t])
        elif t > ranges[-1][1]:
            ranges[-1][1] += TILE
    pieces = [start for a, b in ranges for start in range(a, b, TILE)]
    covered = _cover(pieces, end + TILE)
    last = ranges[-1][1] if ranges else 0
    return pieces, [c for c in columns if c < min(last, end) and not covered[c]]


def lower_aligned(columns, offsets, begin, prompt):
    end = min(begin + TILE, prompt)
    pieces = set()
    for o in offsets:
        for block in range(max(0, begin - o) // TILE, (end - 1 - o) // TILE + 1):
            pieces.add(block * TILE)
    covered = _cover(sorted(pieces), end + TILE)
    return sorted(pieces), [c for c in columns if c < end and not covered[c]]


def _cover(pieces, size):
    covered = np.zeros(size, bool)
    for start in pieces:
        covered[start : start + TILE] = True
    return covered


def cells_of(pieces, columns, end):
    cells = _cover(pieces, end + 2 * TILE)[:end]
    cells[[c for c in columns if c < end]] = True
    return np.flatnonzero(cells)


def head_pairs(lower, columns, offsets, prompt):
    """(query, key) pairs that all tiles read together."""
    columns, offsets = columns.tolist(), sorted(offsets.tolist(), reverse=True)
    total = 0
    for begin in range(0, prompt, TILE):
        end = min(begin + TILE, prompt)
        cells = cells_of(*lower(columns, offsets, begin, prompt), end)
        total += int((end - np.maximum(cells, begin)).sum())
    return total


def largest_n(lower, columns, offsets, forced_columns, forced_diagonals, prompt, limit):
    """The largest n whose lowered pairs stay within the limit: bisection, then a look beyond for the greedy lowering is
    not quite monotone."""

    def fits(n):
        v, s = max(forced_columns, n), max(forced_diagonals, n)
        return head_pairs(lower, columns[:v], offsets[:s], prompt) <= limit

    low, high = 0, prompt
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return max(n for n in range(low, min(low + 40, prompt) + 1) if n == low or fits(n))


def vertical_slash(density=None, pair=None, last_q=64, forced=(30, 100), lower=lower_minference):
    def check(layer, dump, report):
        view = Prefill(report, layer, dump)
        if not view.good:
            return
        report.expect(view.q_tile == TILE and view.block == TILE, f"tile {view.q_tile}, piece {view.block}")
        n = layer.prompt
        for head in range(layer.heads):
            column_mass, diagonal_mass = column_and_diagonal_mass(layer, head, last_q)
            columns, offsets = ranking(column_mass, forced[0]), ranking(diagonal_mass, forced[1])
            if pair is None:
                limit = density * n * (n + 1) / 2
                size = largest_n(lower, columns, offsets, *forced, n, limit)
                v, s = max(forced[0], size), max(forced[1], size)
            else:
                v, s = pair
            tried = []
            for change in [(0, 0), (1, 0), (0, 1), (1, 1)]:
                ranked = []
                for order, mass, count, swap in (
                    (columns, column_mass, v, change[0]),
                    (offsets, diagonal_mass, s, change[1]),
                ):
                    order = order.copy()
                    if swap:
                        if count >= n or mass[order[count - 1]] - mass[order[count]] > TIE * mass[order[count - 1]]:
                            break
                        order[[count - 1, count]] = order[[count, count - 1]]
                    ranked.append(order[:count])
                if len(ranked) < 2:
                    continue
                tried.append(_differences(view, head, lower, *ranked))
                if not tried[-1]:
                    break
            report.rows += view.tiles
            report.elements += sum(len(view.row(head, t)) for t in range(view.tiles))
            if tried[-1]:
                report.fail(f"layer {layer.index} head {head} (v {v}, s {s}): {len(tried[0])} tiles: {tried[0][0]}")
            elif len(tried) > 1:
                report.ties.append((f"layer {layer.index} head {head}", 1, 0.0))
        view.check_outputs()

    return check


def _differences(view, head, lower, columns, offsets):
    out = []
    for t in range(view.tiles):
        begin, end = view.tile(t)
        pieces, gathered = lower(columns, offsets, begin, view.layer.prompt)
        expected, found = cells_of(pieces, gathered, end), view.row(head, t)
        pieces = sorted(p for p in pieces if p < end)
        row = head * view.tiles + t
        if not np.array_equal(expected, found):
            missing, extra = np.setdiff1d(expected, found), np.setdiff1d(found, expected)
            out.append(f"tile {t}: missing {len(missing)} {missing[:4]}, extra {len(extra)} {extra[:4]}")
        elif pieces != view.pieces[row].tolist() or sorted(gathered) != view.columns[row].tolist():
            out.append(f"tile {t}: the same cells from other pieces or columns")
    return out


def cases():
    select = ["--cells", "--select", "vertical_slash"]

    def case(name, args, check, **more):
        return Case(f"vertical_slash/{name}", "prefill", [*select, *args], check, **more)

    def explicit(v, s):
        return ["--set", f"select.columns={v}", "--set", f"select.diagonals={s}"]

    fifth, half = Budget(density=0.2).args(), Budget(density=0.5).args()
    sf = ["--set", "select.preset=sparse_frontier"]
    aligned = ["--set", "select.lowering=aligned"]
    return [
        case("density", fifth, vertical_slash(0.2), extra=True),
        case("density-half", half, vertical_slash(0.5), layers="one"),
        case("30-800", explicit(30, 800), vertical_slash(pair=(30, 800))),
        case("500-700", explicit(500, 700), vertical_slash(pair=(500, 700)), layers="one"),
        case("300-120", explicit(300, 120), vertical_slash(pair=(300, 120)), extra=True),
        case("sparse_frontier", [*sf, *fifth], vertical_slash(0.2, last_q=256, forced=(4, 64))),
        case(
            "sparse_frontier-pair",
            [*sf, *explicit(200, 90)],
            vertical_slash(pair=(200, 90), last_q=256, forced=(4, 64)),
            layers="one",
        ),
        case("aligned", [*aligned, *fifth], vertical_slash(0.2, lower=lower_aligned), layers="one"),
        case("aligned-pair", [*aligned, *explicit(100, 150)], vertical_slash(pair=(100, 150), lower=lower_aligned)),
    ]
