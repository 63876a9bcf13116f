#!/usr/bin/env python3
"""Runs scenarios/all_methods.toml: every strategy that `lacuna list` names must be ok on one of its two traces, fail on
none, and be skipped where the list below says and nowhere else.

    all_methods.py LACUNA SCENARIO

Needs the trace of all layers (LACUNA_TRACE_DIR); exits with 77 without it.
"""

import collections
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TWO_K, ALL_LAYERS = "smollm2-needles-2k.safetensors", "smollm2-needles-512-all-layers.safetensors"
# Strategy -> the trace on which it is skipped, and how the reason begins after its name.
SKIPPED = {
    "tidal": (TWO_K, "needs every layer"),
    "omnikv": (TWO_K, "needs every layer"),
    "reuse": (TWO_K, "needs every layer"),
    "layer_entropy": (TWO_K, "needs every layer"),
    "criticalkv": (ALL_LAYERS, "needs W_O"),
    "minference": (ALL_LAYERS, "refused: calibrated on this very trace"),
    "double_sparsity": (ALL_LAYERS, "refused: calibrated on this very trace"),
    "loki": (ALL_LAYERS, "refused: calibrated on this very trace"),
    "qfilter": (ALL_LAYERS, "refused: calibrated on this very trace"),
}
FLOOR = 60  # strategies that the library has at least
LIMIT = 600  # seconds on two cores


def names_of(cell):
    for role in ("select", "evict", "allocate"):
        table = cell.get(role)
        while table:
            yield table["name"]
            table = table.get("base")


def main():
    lacuna, scenario = sys.argv[1:]
    there = [Path(scenario).parent / "data", Path(os.environ.get("LACUNA_TRACE_DIR", "/nowhere"))]
    if not any((folder / ALL_LAYERS).exists() for folder in there):
        print(f"skipped: no {ALL_LAYERS}; set LACUNA_TRACE_DIR")
        return 77
    listed = json.loads(subprocess.run([lacuna, "list", "--json"], capture_output=True, check=True).stdout)
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        done = subprocess.run([lacuna, "run", scenario, "--quiet", "--json", path], capture_output=True, text=True)
        if done.returncode != 0:
            print(done.stderr[-4000:])
            if not path.exists():
                return 1
        study = json.loads(path.read_text())
    seconds = time.time() - start

    faults = []
    rows, skips = collections.defaultdict(set), collections.defaultdict(set)
    for row in study["rows"]:
        if not isinstance(row["cell"], int):  # the noise floor
            continue
        for name in names_of(study["cells"][row["cell"]]):
            rows[name].add((row["trace"], row["status"]))
        if row["status"] != "ok":
            faults.append(f"{study['cells'][row['cell']].get('label')}: {row['trace']} layer {row['layer']}: {row.get('error')}")
    for skip in study["skips"]:
        for name in names_of(study["cells"][skip["cell"]]):
            skips[name].add((skip.get("trace"), skip["reason"]))
    for entry in listed:
        name = entry["name"]
        traces = {trace for trace, status in rows[name] if status == "ok"}
        missing = {TWO_K, ALL_LAYERS} - traces
        expected = {SKIPPED[name][0]} if name in SKIPPED else set()
        if missing != expected:
            faults.append(f"{name}: no row on {sorted(missing)}, expected none on {sorted(expected)}")
        if name in SKIPPED:
            reasons = [reason for _, reason in skips[name] if SKIPPED[name][1] in reason]
            if not reasons:
                faults.append(f"{name}: skipped for {sorted(skips[name])}, expected '{SKIPPED[name][1]}'")
    if len(listed) < FLOOR:
        faults.append(f"{len(listed)} strategies, expected at least {FLOOR}")
    if seconds > LIMIT:
        faults.append(f"{seconds:.0f} s, expected at most {LIMIT}")
    print(f"{len(listed)} strategies, {len(study['cells'])} cells, {len(study['rows'])} rows, {seconds:.0f} s")
    for fault in sorted(set(faults)):
        print("FAIL", fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
