#!/usr/bin/env python3
"""Recomputes every strategy's choice in float64 and holds `lacuna dump` against it.

    run.py [--only NAME] [--phase prefill|decode|evict] [--trace FILE ...] [--ties]

Environment: LACUNA_CLI is the program (build/cpu/bin/lacuna); LACUNA_TRACE_DIR holds further traces, on which a subset
of the cases runs. Exit 1: a difference that is no tie. --only takes a case or the beginning of its name.
"""

import argparse
import importlib
import os
import sys
import time
from pathlib import Path
from trace import Layer, Trace

from compare import CLI, ROOT, Dump, Report, check_metadata

HERE = Path(__file__).resolve().parent
SHIPPED = ROOT / "scenarios/data/smollm2-needles-2k.safetensors"
SHOWN = 6  # failures and ties printed a case


def families():
    """Every module of this folder that has cases()."""
    modules = [importlib.import_module(p.stem) for p in sorted(HERE.glob("*.py")) if p.stem != Path(__file__).stem]
    return [m for m in modules if hasattr(m, "cases")]


def runs_on(case, trace, layer, shipped):
    if case.traces:
        return any(part in trace.path.name for part in case.traces)
    if not shipped:
        return case.extra and layer == trace.layers[-1]
    return case.layers == "all" or layer == trace.layers[-1 if case.layers == "one" else 1]


def run_case(case, trace, layer, show_ties):
    report = Report(f"{case.name} {trace.path.stem} layer {layer.index}")
    start = time.time()
    try:
        dump = Dump(trace, layer.index, case.phase, case.args)
        check_metadata(report, layer, dump, case)
        case.check(layer, dump, report)
    except (RuntimeError, KeyError, OSError) as error:
        report.fail(f"{type(error).__name__}: {error}")
    if not report.failures and report.rows == 0:
        report.fail("nothing was compared")
    state = "FAIL" if report.failures else "ok"
    moved = sum(count for _, count, _ in report.ties)
    print(
        f"{state:4} {report.name}: {report.rows} rows, {report.elements} chosen, {moved} apart in ties, "
        f"{report.outputs} outputs, {time.time() - start:.1f} s",
        flush=True,
    )
    for text in report.failures[:SHOWN]:
        print(f"       {text}")
    if len(report.failures) > SHOWN:
        print(f"       ... {len(report.failures)} differences")
    for where, count, gap in report.ties if show_ties else report.ties[:SHOWN]:
        print(f"       tie: {where}: {count} swapped, scores {gap:.2g} apart")
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a case or the beginning of its name")
    parser.add_argument("--phase", choices=("prefill", "decode", "evict"))
    parser.add_argument("--trace", action="append", type=Path, help="instead of the shipped one and LACUNA_TRACE_DIR")
    parser.add_argument("--ties", action="store_true", help="list every tie")
    options = parser.parse_args()
    if not Path(CLI).exists():
        sys.exit(f"{CLI}: no such program; build it or set LACUNA_CLI")
    cases = [c for family in families() for c in family.cases()]
    cases = [c for c in cases if c.name.startswith(options.only) and options.phase in (None, c.phase)]
    if not cases:
        sys.exit(f"no case begins with '{options.only}'")

    paths = options.trace or [SHIPPED]
    if not options.trace and "LACUNA_TRACE_DIR" in os.environ:
        found = sorted(Path(os.environ["LACUNA_TRACE_DIR"]).glob("*.safetensors"))
        paths += [p for p in found if p.name != SHIPPED.name]
    reports = []
    for path in paths:
        trace = Trace(path)
        for index in trace.layers:
            layer = None
            for case in cases:
                if runs_on(case, trace, index, path.name == SHIPPED.name):
                    layer = layer or Layer(trace, index)
                    reports.append(run_case(case, trace, layer, options.ties))
    failed = [r for r in reports if r.failures]
    chosen, ties = sum(r.elements for r in reports), sum(count for r in reports for _, count, _ in r.ties)
    print(
        f"{len(reports)} comparisons, {len(failed)} failed; {sum(r.rows for r in reports)} rows, {chosen} chosen, "
        f"{ties} apart in ties ({ties / max(chosen, 1):.2g}), {sum(r.outputs for r in reports)} outputs"
    )
    return 1 if failed or not reports else 0


if __name__ == "__main__":
    sys.exit(main())
