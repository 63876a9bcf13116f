"""minference: a pattern for each head from a table, and the search that makes the table."""

import subprocess
import tempfile
import tomllib
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np

from blocks import pooled
from budgets import top
from compare import CLI, TIE, Case, Prefill, same_choice, same_set, units_in
from vertical_slash import cells_of, column_and_diagonal_mass, head_pairs, lower_minference, ranking

TABLE = Path(__file__).with_name("minference_table.toml")
DEFAULT = (0, 1000, 6096)
SLASH, SHAPE, BLOCKS = 0, 1, 2


def with_ties(order, mass, count):
    """The best `count`, and the same with the next one instead of the last where they tie."""
    out = [order[:count]]
    if 0 < count < len(order) and mass[order[count - 1]] - mass[order[count]] <= TIE * mass[order[count - 1]]:
        out.append(np.append(order[: count - 1], order[count]))
    return out


def check_slash(view, layer, head, v, s, report):
    column, diagonal = column_and_diagonal_mass(layer, head, 64)
    n = layer.prompt
    wrong = []
    for columns, offsets in product(
        with_ties(ranking(column, 30), column, min(n, max(30, v))),
        with_ties(ranking(diagonal, 100), diagonal, min(n, max(50, s))),
    ):
        wrong.append(None)
        for t in range(view.tiles):
            begin, end = view.tile(t)
            pieces, gathered = lower_minference(columns.tolist(), offsets.tolist(), begin, n)
            row = head * view.tiles + t
            same = np.array_equal(cells_of(pieces, gathered, end), view.row(head, t))
            same &= sorted(gathered) == view.columns[row].tolist()
            if not (same and sorted(p for p in pieces if p < end) == view.pieces[row].tolist()):
                wrong[-1] = t
                break
        if wrong[-1] is None:
            break
    report.rows += view.tiles
    report.elements += sum(len(view.row(head, t)) for t in range(view.tiles))
    report.expect(wrong[-1] is None, f"layer {layer.index} head {head}: tile {wrong[0]} differs")


def check_shape(view, layer, head, sinks, window, report):
    for t in range(view.tiles):
        begin, end = view.tile(t)
        row = head * view.tiles + t
        keys = np.arange(end)
        expected = keys[(keys < sinks) | (keys > begin - window)]
        same_set(report, view.where(head, t), view.row(head, t), expected)
        found = (view.sinks[row], view.window[row], len(view.pieces[row]), len(view.columns[row]))
        report.expect(found == (sinks, window, 0, 0), f"{view.where(head, t)}: sinks, window, lists {found}")


def check_blocks(view, layer, head, count, report):
    n = layer.prompt
    scores = pooled(layer.q[head, :n], 64) @ pooled(layer.k[layer.kv_of(head), :n], 64).T
    for t in range(view.tiles):
        found = units_in(report, view.where(head, t), view.row(head, t), 64, view.tile(t)[1])
        row = scores[t, : t + 1]
        same_choice(report, view.where(head, t), found, top(row, min(count, t + 1)), row)


def by_table(path=None):
    table = tomllib.loads(path.read_text())["layer"] if path else {}

    def check(layer, dump, report):
        view = Prefill(report, layer, dump)
        if not view.good:
            return
        report.expect(view.q_tile == 64 and view.block == 64, f"tile {view.q_tile}, piece {view.block}")
        rows = table.get(str(layer.index), {}).get("pattern", [DEFAULT] * layer.heads)
        for head in range(layer.heads):
            kind, first, second = rows[head] if rows[head][0] >= 0 else DEFAULT
            if kind == SLASH:
                check_slash(view, layer, head, first, second, report)
            elif kind == SHAPE:
                check_shape(view, layer, head, first, second, report)
            else:
                check_blocks(view, layer, head, first, report)
        view.check_outputs()

    return check


# ---- the search


@lru_cache
def calibrated(path, settings):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "table.toml"
        command = [CLI, "calibrate", "minference", "--trace", str(path), "--out", str(out)]
        for setting in settings:
            command += ["--set", setting]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr.strip()}")
        return tomllib.loads(out.read_text())["layer"]


class SearchedHead:
    """One head of a whole trace: prompt and continuation."""

    def __init__(self, layer, head):
        self.n = layer.length
        self.q, self.k = layer.q[head], layer.k[layer.kv_of(head)]
        self.rows = np.arange(min(2500, self.n // 2), self.n, 16)
        keys = np.arange(self.n)
        logits = np.where(keys <= self.rows[:, None], self.q[self.rows] @ self.k.T * layer.scale, -np.inf)
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        self.p = p / p.sum(axis=1, keepdims=True)
        last = layer.rows(head, self.n - 64, self.n)[0]
        self.column, self.diagonal = last.sum(axis=0), np.zeros(self.n)
        for i, row in enumerate(last):
            self.diagonal[: self.n - 63 + i] += row[self.n - 64 + i :: -1]

    def offsets(self):
        return self.rows[:, None] - np.arange(self.n)

    def kept(self, mask):
        return (self.p * mask).sum(axis=1).mean()

    def shape(self, sinks, window):
        return self.kept((np.arange(self.n) < sinks) | (self.offsets() < window))

    def blocks(self, size, count):
        scores = pooled(self.q, size) @ pooled(self.k, size).T
        mask = np.zeros((len(self.rows), self.n), bool)
        for r, i in enumerate(self.rows):
            for b in top(scores[i // size, : i // size + 1], count):
                mask[r, b * size : (b + 1) * size] = True
        return self.kept(mask)

    def token_slash(self, v, s):
        columns = np.isin(np.arange(self.n), ranking(self.column, 30)[:v])
        return self.kept(columns | np.isin(self.offsets(), ranking(self.diagonal, 30)[:s]))

    def lowered_slash(self, v, s):
        columns, offsets = ranking(self.column, 30)[:v].tolist(), ranking(self.diagonal, 100)[:s].tolist()
        mask = np.zeros((len(self.rows), self.n), bool)
        tiles = {}
        for r, i in enumerate(self.rows):
            begin = i // 64 * 64
            if begin not in tiles:
                tiles[begin] = cells_of(*lower_minference(columns, offsets, begin, self.n), min(begin + 64, self.n))
            mask[r, tiles[begin]] = True
        return self.kept(mask)

    def lowered_pairs(self, v, s):
        return head_pairs(lower_minference, ranking(self.column, 30)[:v], ranking(self.diagonal, 100)[:s], self.n)


def largest(n, limit, pairs):
    """Bisection over a candidate's size."""
    low, high = 1, 2 * n
    while low < high:
        middle = (low + high + 1) // 2
        if pairs(middle) <= limit:
            low = middle
        else:
            high = middle - 1
    return low


def best_stored(tried, stored, found, report, where):
    """The stored form of the best candidate, or of one that keeps as much."""
    masses = np.array([mass for mass, _ in tried])
    good = [stored(pattern) for mass, pattern in tried if mass >= masses.max() * (1 - TIE)]
    report.rows += 1
    report.elements += 1
    report.expect(list(found) in [list(g) for g in good], f"{where}: {found}, expected {good}, masses {masses.round(5)}")


def search_original(layer, dump, report):
    table = calibrated(layer.trace.path, ("select.search=original",))[str(layer.index)]["pattern"]
    for head in range(layer.heads):
        of = SearchedHead(layer, head)
        tried = [(of.shape(100, 801), (SLASH, 100, 800))]
        for v, s in ((30, 800), (100, 750), (500, 700), (3500, 100)):
            tried.append((of.token_slash(v, s), (SLASH, v, s)))
        tried.append((of.blocks(32, -(-of.n // 32) // 8), DEFAULT))
        best_stored(tried, lambda p: p, table[head], report, f"layer {layer.index} head {head}")


def search_mass(density, heads):
    def check(layer, dump, report):
        settings = ("select.search=mass", f"select.search_density={density}")
        table = calibrated(layer.trace.path, settings)[str(layer.index)]["pattern"]
        n = layer.length
        limit = density * n * (n + 1) / 2
        for head in heads:
            of = SearchedHead(layer, head)
            visible = np.arange(1, n + 1)

            def split(size, a, b):
                first = int(np.floor(size * a / (a + b) + 0.5))
                return first, size - first

            size = largest(n, limit, lambda k: np.minimum(k, visible).sum())
            first, second = split(size, 100, 800)
            tried = [(of.shape(first, max(1, second)), (SHAPE, first, max(1, second)))]
            for ratio in ((30, 800), (100, 750), (500, 700), (3500, 100), (1000, 6096)):

                def pair(size, ratio=ratio):
                    v, s = split(size, *ratio)
                    return max(30, v), max(50, s)

                v, s = pair(largest(n, limit, lambda k, pair=pair: of.lowered_pairs(*pair(k))))
                tried.append((of.lowered_slash(v, s), (SLASH, v, s)))
            rows = np.minimum(64, n - 64 * np.arange(-(-n // 64)))
            count = largest(n, limit, lambda k: (np.minimum(k, np.arange(len(rows)) + 1) * 64 * rows).sum())
            tried.append((of.blocks(64, count), (BLOCKS, count, 0)))
            best_stored(tried, lambda p: p, table[head], report, f"layer {layer.index} head {head}")

    return check


def cases():
    def case(name, settings, check, **more):
        args = ["--cells", "--select", "minference"]
        for setting in settings:
            args += ["--set", f"select.{setting}"]
        return Case(f"minference/{name}", "prefill", args, check, **more)

    shipped = ("smollm2-needles-2k",)
    return [
        case("default", [], by_table(), extra=True),
        case("table", [f"table={TABLE}"], by_table(TABLE), traces=shipped),
        case("search-original", [], search_original, layers="one", extra=True),
        case("search-mass", [], search_mass(0.2, (0, 8))),
        case("search-mass-tenth", [], search_mass(0.1, (2, 7)), layers="one"),
    ]
