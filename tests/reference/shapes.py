"""a_shape, tri_shape, dilated: sets that depend on positions alone."""

import numpy as np

from compare import Case, Outputs, Prefill, same_set
from vertical_slash import cells_of, lower_minference


def window_mask(begin, end, sinks, window, dense_from):
    queries, keys = np.arange(begin, end)[:, None], np.arange(end)
    return (keys <= queries) & ((keys < sinks) | (queries - keys < window) | (queries >= dense_from))


def exact(sinks, window, last_dense=0, sparse_from_layer=0):
    def check(layer, dump, report):
        view = Prefill(report, layer, dump)
        if not view.good:
            return
        n = layer.prompt
        border = n - last_dense if last_dense else n
        if layer.index >= sparse_from_layer:
            tile = 64
            while border > 0 and border % tile and last_dense:
                tile //= 2
            report.expect(view.q_tile == tile, f"q_tile {view.q_tile}, expected {tile}")
        outputs = Outputs(report, layer, dump, 0, n)
        for t in range(view.tiles):
            begin, end = view.tile(t)
            dense_from = border if layer.index >= sparse_from_layer else 0
            mask = window_mask(begin, end, sinks, window, dense_from)
            expected = np.flatnonzero(mask.any(axis=0))
            for head in range(layer.heads):
                same_set(report, view.where(head, t), view.row(head, t), expected)
                if n <= 2100 or t % 16 == 0 or end > border:
                    outputs.check(head, begin, end, mask)

    return check


def dilated(columns, span, stride):
    def check(layer, dump, report):
        view = Prefill(report, layer, dump)
        if not view.good:
            return
        report.expect(view.q_tile == 64 and view.block == 64, f"tile {view.q_tile}, piece {view.block}")
        offsets = list(range(1, span, stride))
        for t in range(view.tiles):
            begin, end = view.tile(t)
            pieces, gathered = lower_minference(range(min(columns, end)), offsets, begin, layer.prompt)
            for head in range(layer.heads):
                same_set(report, view.where(head, t), view.row(head, t), cells_of(pieces, gathered, end))
                row = head * view.tiles + t
                same_set(report, f"{view.where(head, t)} pieces", view.pieces[row], [p for p in pieces if p < end])
                same_set(report, f"{view.where(head, t)} columns", view.columns[row], sorted(gathered))
        view.check_outputs()

    return check


def cases():
    def case(strategy, name, settings, check, **more):
        args = ["--cells", "--select", strategy]
        for setting in settings:
            args += ["--set", f"select.{setting}"]
        return Case(f"{strategy}/{name}", "prefill", args, check, **more)

    def tri(name, last_dense, **more):
        settings = ["sinks=20", "window=300", f"last_dense={last_dense}"]
        return case("tri_shape", name, settings, exact(20, 300, last_dense), **more)

    return [
        case("a_shape", "default", [], exact(128, 3968), layers="one", extra=True),
        case("a_shape", "sizes", ["sinks=20", "window=300"], exact(20, 300), extra=True),
        case("a_shape", "no-sinks", ["sinks=0", "window=1"], exact(0, 1), layers="one"),
        case("a_shape", "minference_search", ["preset=minference_search"], exact(100, 800), layers="one"),
        case("a_shape", "union", ["sinks=20", "window=300", "gqa=union"], exact(20, 300), layers="one"),
        case("tri_shape", "default", [], exact(128, 3968, 100), layers="one"),
        tri("100", 100, extra=True),
        tri("76", 76, layers="one"),
        tri("1", 1, layers="one"),
        tri("0", 0, layers="one"),
        tri("5000", 5000, layers="one"),
        case("tri_shape", "triangle_mix", ["preset=triangle_mix"], exact(8, 512, 128, sparse_from_layer=16)),
        case("dilated", "default", [], dilated(1024, 8192, 2), layers="one", extra=True),
        case("dilated", "sizes", ["columns=100", "span=500"], dilated(100, 500, 2), extra=True),
        case("dilated", "stride-1", ["columns=30", "span=320", "stride=1"], dilated(30, 320, 1), layers="one"),
        case("dilated", "stride-150", ["columns=30", "span=1000", "stride=150"], dilated(30, 1000, 150), layers="one"),
        case("dilated", "no-columns", ["columns=0", "span=2"], dilated(0, 2, 2), layers="one"),
        case("dilated", "union", ["columns=100", "span=500", "gqa=union"], dilated(100, 500, 2), layers="one"),
    ]
