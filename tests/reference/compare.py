"""Runs `lacuna dump` and holds what it wrote against a recomputation: indices, outputs, format."""

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from trace import read_safetensors

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
CLI = os.environ.get("LACUNA_CLI", str(ROOT / "build/cpu/bin/lacuna"))
TIE = 1e-4  # scores closer than this, relatively, may be ranked either way


@dataclass
class Case:
    """One call of `lacuna dump`, and the function that judges its result: check(layer, dump, report)."""

    name: str
    phase: str
    args: list
    check: object
    layers: str = "all"  # all | one (the last captured) | second
    extra: bool = False  # also on the traces of LACUNA_TRACE_DIR
    traces: tuple = ()  # only on traces whose file name holds one of these


@dataclass
class Report:
    name: str
    rows: int = 0
    elements: int = 0
    ties: list = field(default_factory=list)
    failures: list = field(default_factory=list)
    outputs: int = 0

    def fail(self, text):
        self.failures.append(text)

    def expect(self, condition, text):
        if not condition:
            self.fail(text)
        return bool(condition)


class Dump:
    """What `lacuna dump` wrote for one layer."""

    def __init__(self, trace, layer, phase, args):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "dump.safetensors"
            command = [CLI, "dump", "--trace", str(trace.path), "--layer", str(layer), "--phase", phase, *args]
            done = subprocess.run([*command, "--out", str(path)], capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr.strip()}")
            self.tensors, self.meta = read_safetensors(path)

    def __getitem__(self, name):
        return self.tensors[name]

    def number(self, key):
        return int(self.meta.get(key, "0"))

    def lists(self, name, values="indices"):
        """The ragged rows `name`.indptr / `name`.indices as a list of arrays."""
        indptr, flat = self[f"{name}.indptr"], self[f"{name}.{values}"]
        return [flat[a:b] for a, b in zip(indptr[:-1], indptr[1:])]


def check_metadata(report, layer, dump, case):
    """The facts that a reader of the file needs, and the settings that were asked for."""
    phase_queries = {"prefill": layer.prompt, "decode": layer.length - layer.prompt}
    first_query = {"prefill": 0, "decode": layer.prompt}.get(case.phase, dump.number("cut"))
    expected = {
        "first_query": str(first_query),
        "format": "lacuna-dump",
        "version": "1",
        "phase": case.phase,
        "layer": str(layer.index),
        "num_qo_heads": str(layer.heads),
        "num_kv_heads": str(layer.kv_heads),
        "head_dim": str(layer.dim),
    }
    if case.phase in phase_queries:
        expected["queries"] = str(phase_queries[case.phase])
    for key, value in expected.items():
        report.expect(dump.meta.get(key) == value, f"metadata {key} = {dump.meta.get(key)}, expected {value}")
    for key in ("q_tile", "kv_block", "exact_sinks", "exact_window", "strategy_ids", "engine_id", "trace_id"):
        report.expect(key in dump.meta, f"no metadata {key}")
    settings = json.loads(dump.meta.get("parameters", "{}"))
    for role in ("select", "evict", "allocate"):
        if f"--{role}" in case.args:
            name = case.args[case.args.index(f"--{role}") + 1]
            found = settings.get(role, {}).get("name")
            report.expect(found == name, f"metadata parameters: {role} is {found}, expected {name}")


def check_ragged(report, dump, name, rows, limit, values="indices"):
    """The format's promises: int64 indptr over `rows`, int32 indices, ascending, unique, in [0, limit)."""
    if not report.expect(f"{name}.indptr" in dump.tensors, f"no tensor {name}.indptr"):
        return False
    indptr, flat = dump[f"{name}.indptr"], dump[f"{name}.{values}"]
    good = report.expect(indptr.dtype == np.int64 and flat.dtype == np.int32, f"{name}: {indptr.dtype}, {flat.dtype}")
    good &= report.expect(len(indptr) == rows + 1, f"{name}.indptr has {len(indptr)} entries, expected {rows + 1}")
    good &= report.expect(
        indptr[0] == 0 and indptr[-1] == len(flat) and (np.diff(indptr) >= 0).all(),
        f"{name}.indptr is not a prefix sum",
    )
    if good and len(flat):
        steps = np.diff(flat)
        inner = np.ones(len(steps), bool)
        borders = indptr[1:-1]
        inner[borders[(borders > 0) & (borders < len(flat))] - 1] = False
        good &= report.expect((steps[inner] > 0).all(), f"{name}: indices of a row not ascending or repeated")
        good &= report.expect(flat.min() >= 0 and flat.max() < limit, f"{name}: an index outside [0, {limit})")
    return good


def same_choice(report, where, found, expected, scores):
    """Equal index by index, or apart only in elements whose scores tie."""
    report.rows += 1
    report.elements += len(expected)
    if np.array_equal(found, expected):
        return True
    missing, extra = np.setdiff1d(expected, found), np.setdiff1d(found, expected)
    if len(missing) != len(extra):
        report.fail(
            f"{where}: {len(found)} chosen, expected {len(expected)} (missing {_head(missing)}, extra {_head(extra)})"
        )
        return False
    swapped = scores[np.concatenate([missing, extra])]
    high, low = swapped.max(), swapped.min()
    # A forced element (inf) ties with nothing.
    if not (np.isfinite(swapped).all() and high - low <= TIE * max(abs(high), abs(low))):
        report.fail(f"{where}: missing {_head(missing)}, extra {_head(extra)}, scores from {low:.9g} to {high:.9g}")
        return False
    report.ties.append((where, len(missing), float(abs(high - low) / max(abs(high), abs(low), 1e-300))))
    return True


def same_set(report, where, found, expected):
    report.rows += 1
    report.elements += len(expected)
    if np.array_equal(found, expected):
        return True
    missing, extra = np.setdiff1d(expected, found), np.setdiff1d(found, expected)
    report.fail(f"{where}: missing {len(missing)} {_head(missing)}, extra {len(extra)} {_head(extra)}")
    return False


def same_scores(report, where, dump, row, expected, free):
    """`scores` of a dump, where it has them: the candidates' (`free`), relative to the row's largest."""
    if "scores" not in dump.tensors:
        return
    found = dump["scores"][row]
    beyond = found[len(expected) :]
    report.expect(np.isneginf(beyond).all(), f"{where}: scores beyond the last unit")
    error = np.abs(found[: len(expected)][free] - expected[free])
    if len(error):
        bound = 1e-5 * np.abs(expected[free]).max()
        report.expect(error.max() <= bound, f"{where}: score off by {error.max():.3g}, bound {bound:.3g}")


def units_in(report, where, cells, unit, visible):
    """The units that a row's cells are made of; every one must be whole up to the last visible token."""
    units = np.unique(cells // unit)
    whole = np.concatenate([np.arange(u * unit, min((u + 1) * unit, visible)) for u in units]) if len(units) else units
    report.expect(np.array_equal(whole, cells), f"{where}: the cells are not whole units of {unit}")
    return units


def _head(values):
    return values[:4].tolist() + (["..."] if len(values) > 4 else [])


# ---- outputs

OUT_BOUND = 2e-5  # of sum p |v|
LSE_BOUND = 4e-6  # of max(1, |lse|)


class Outputs:
    """`out`, `lse` and `mass_kept` of a dump against float64, query by query. `first` is the position of query 0."""

    def __init__(self, report, layer, dump, first, queries):
        self.report, self.layer, self.first = report, layer, first
        self.out, self.lse, self.mass = dump["out"], dump["lse"], dump["mass_kept"]
        shape = (layer.heads, queries)
        self.good = report.expect(
            self.lse.shape == shape and self.mass.shape == shape and self.out.shape == shape + (layer.dim,),
            f"out {self.out.shape}, lse {self.lse.shape}, mass_kept {self.mass.shape}, expected {shape}",
        )
        self.good &= report.expect(
            all(x.dtype == np.float32 for x in (self.out, self.lse, self.mass)), "out, lse, mass_kept are not f32"
        )
        self.worst = {"out": 0.0, "lse": 0.0, "mass_kept": 0.0}

    def check(self, head, begin, end, mask, log_weight=None, extras=None):
        """Queries at positions [begin, end); mask [n, end]: the cells that each reads. extras: keys, values and log
        weights of tokens that are attended to besides."""
        if not self.good:
            return
        p, dense_lse = self.layer.rows(head, begin, end)
        at = slice(begin - self.first, end - self.first)
        read = p * mask
        mass = read.sum(axis=1)
        weighted = read if log_weight is None else read * np.exp(log_weight)
        total = weighted.sum(axis=1)
        h = self.layer.kv_of(head)
        v, v_norms = self.layer.v[h, :end], self.layer.v_norms[h, :end]
        if extras is not None:
            keys, values, log_weights = extras
            logits = self.layer.q[head, begin:end] @ keys.T * self.layer.scale
            weighted = np.hstack([weighted, np.exp(logits + log_weights - dense_lse[:, None])])
            total = weighted.sum(axis=1)
            v, v_norms = np.vstack([v, values]), np.append(v_norms, np.linalg.norm(values, axis=1))
        some = total > 0
        self.report.outputs += len(mass)
        self._bound("mass_kept", head, begin, np.abs(self.mass[head, at] - mass), 1e-4 * mass + 1e-6)
        self.report.expect(
            np.isneginf(self.lse[head, at][~some]).all(), f"head {head}, queries from {begin}: lse of an empty row"
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            lse = dense_lse + np.log(total)
            out = weighted @ v / total[:, None]
            size = weighted @ v_norms / total
            self._bound(
                "lse", head, begin, np.abs(self.lse[head, at] - lse)[some], LSE_BOUND * np.maximum(1, np.abs(lse[some]))
            )
            self._bound(
                "out", head, begin, np.linalg.norm(self.out[head, at] - out, axis=1)[some], OUT_BOUND * size[some]
            )

    def _bound(self, what, head, begin, error, bound):
        if not len(error):
            return
        ratio = np.where(np.isfinite(error), error / np.maximum(bound, 1e-300), np.inf)
        worst = float(ratio.max())
        self.worst[what] = max(self.worst[what], worst)
        self.report.expect(
            worst <= 1, f"head {head}, query {begin + int(ratio.argmax())}: {what} off by {worst:.3g} times the bound"
        )


# ---- phases


class Prefill:
    """A prefill dump: the cells of every (query head, tile), checked against its pieces, columns and exact parts."""

    def __init__(self, report, layer, dump):
        self.report, self.layer, self.dump = report, layer, dump
        prompt = layer.prompt
        self.q_tile = dump.number("q_tile")
        report.expect(self.q_tile > 0, f"q_tile {dump.meta.get('q_tile')}")
        self.tiles = -(-prompt // self.q_tile)
        rows = layer.heads * self.tiles
        self.good = check_ragged(report, dump, "cells", rows, prompt)
        self.good &= check_ragged(report, dump, "pieces", rows, prompt, "starts")
        self.good &= check_ragged(report, dump, "columns", rows, prompt)
        if not self.good:
            return
        self.cells, self.columns = dump.lists("cells"), dump.lists("columns")
        self.pieces = dump.lists("pieces", "starts")
        self.block = dump.number("kv_block")
        # Metadata where all rows are alike, tensors where they differ.
        self.sinks, self.window = (
            dump.tensors.get(name, np.full(rows, dump.number(name))) for name in ("exact_sinks", "exact_window")
        )
        for row in range(rows):
            self._check_union(row)

    def tile(self, t):
        return t * self.q_tile, min((t + 1) * self.q_tile, self.layer.prompt)

    def row(self, head, t):
        return self.cells[head * self.tiles + t]

    def where(self, head, t):
        return f"layer {self.layer.index} head {head} tile {t}"

    def _listed(self, row, end):
        listed = np.zeros(end, bool)
        for start in self.pieces[row]:
            listed[start : start + self.block] = True
        columns = self.columns[row]
        twice = listed[columns[columns < end]]
        self.report.expect(not twice.any(), f"row {row}: a column repeats a token of a piece")
        listed[columns[columns < end]] = True
        listed[: self.sinks[row]] = True
        return listed

    def _check_union(self, row):
        begin, end = self.tile(row % self.tiles)
        union = self._listed(row, end)
        if self.window[row]:
            union[max(0, begin - self.window[row] + 1) :] = True
        self.report.expect(
            np.array_equal(np.flatnonzero(union), self.cells[row]),
            f"{self.where(row // self.tiles, row % self.tiles)}: cells are not the union of the row's parts",
        )

    def check_outputs(self):
        """Outputs of every query against the cells that the dump names."""
        outputs = Outputs(self.report, self.layer, self.dump, 0, self.layer.prompt)
        # Long prompts: every eighth tile, the first and the last.
        stride = 1 if self.layer.length <= 2100 else 8 * max(1, 64 // self.q_tile)
        tiles = sorted({*range(0, self.tiles, stride), self.tiles - 1})
        for head in range(self.layer.heads):
            for t in tiles:
                begin, end = self.tile(t)
                keys, queries = np.arange(end), np.arange(begin, end)[:, None]
                mask = np.zeros(end, bool)
                mask[self.row(head, t)] = True
                mask = mask & (keys <= queries)
                row = head * self.tiles + t
                if self.window[row]:
                    mask &= self._listed(row, end) | (queries - keys < self.window[row])
                outputs.check(head, begin, end, mask)


def check_decode(report, layer, dump, judge, extras=None):
    """judge(step, head, found): of every row; then the outputs against the tokens that the dump names, and against
    extras(step, head, found), keys, values and log weights of what is attended to besides."""
    steps = layer.length - layer.prompt
    rows = steps * layer.heads
    if not check_ragged(report, dump, "tokens", rows, layer.length):
        return
    tokens = dump.lists("tokens")
    if "cells.indptr" in dump.tensors and check_ragged(report, dump, "cells", rows, layer.length):
        for row, cells in enumerate(dump.lists("cells")):
            report.expect(np.array_equal(cells, tokens[row]), f"row {row}: cells differ from tokens")
    log_weights = dump.lists("tokens", "log_weight") if "tokens.log_weight" in dump.tensors else None
    outputs = Outputs(report, layer, dump, layer.prompt, steps)
    for step in range(steps):
        at = layer.prompt + step
        for head in range(layer.heads):
            found = tokens[step * layer.heads + head]
            judge(step, head, found)
            mask = np.zeros((1, at + 1), bool)
            mask[0, found[found <= at]] = True
            log_weight = None
            if log_weights is not None:
                log_weight = np.zeros((1, at + 1))
                log_weight[0, found] = log_weights[step * layer.heads + head]
            beside = extras(step, head, found) if extras else None
            outputs.check(head, at, at + 1, mask, log_weight, beside)


def check_eviction(report, layer, dump, cut, judge, reads=None):
    """judge(kv_head, found); outputs of every query after the cut over the kept and the later tokens, or over
    reads(kv_head, position) -> boolean mask [position + 1]."""
    if not check_ragged(report, dump, "kept", layer.kv_heads, layer.length):
        return
    kept = dump.lists("kept")
    if "cells.indptr" in dump.tensors and check_ragged(report, dump, "cells", layer.kv_heads, layer.length):
        for kv_head, cells in enumerate(dump.lists("cells")):
            report.expect(np.array_equal(cells, kept[kv_head]), f"KV head {kv_head}: cells differ from kept")
    for kv_head in range(layer.kv_heads):
        judge(kv_head, kept[kv_head])
    outputs = Outputs(report, layer, dump, cut, layer.length - cut)
    for head in range(layer.heads):
        kv_head = layer.kv_of(head)
        for at in range(cut, layer.length):
            if reads is None:
                mask = np.zeros(at + 1, bool)
                mask[kept[kv_head]] = True
                mask[cut:] = True
            else:
                mask = reads(kv_head, at)
            outputs.check(head, at, at + 1, mask[None])
