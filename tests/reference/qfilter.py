"""qfilter: keys along a filter. The filters are drawn, so that scores alone are judged; those that `lacuna calibrate`
makes are held against a singular value decomposition."""

import atexit
import shutil
import subprocess
import tempfile
from pathlib import Path
from trace import read_safetensors

import numpy as np

from compare import CLI, Case
from eviction import TENTH, THIRD, case

SAMPLES = 3000
LAYERS, KV_HEADS, DIM = (0, 9, 18, 27), 3, 64


def drawn(layer, kv_heads=KV_HEADS, dim=DIM):
    return np.random.default_rng(layer).normal(size=(kv_heads, dim)).astype(np.float32).astype(np.float64)


def drawn_file():
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    path = Path(folder) / "filters.toml"
    tables = []
    for layer in LAYERS:
        rows = [", ".join(repr(float(x)) for x in row) for row in drawn(layer)]
        tables.append(f"[layer.{layer}]\nfilter = [" + ", ".join(f"[{row}]" for row in rows) + "]\n")
    path.write_text("".join(tables))
    return path


def projections(layer, tokens):
    filters = drawn(layer.index)
    return [-(layer.k[h, :tokens] @ filters[h])[None] for h in range(layer.kv_heads)]


def head_filter(rows):
    """The first right-singular vector, pointing away from where most rows point."""
    u, _, vt = np.linalg.svd(rows, full_matrices=False)
    return -vt[0] if (u[:, 0] > 0).mean() > 0.5 else vt[0]


def calibrated(times):
    """The trace, given `times` times, shares out the sampled rows."""

    def check(layer, dump, report):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "filters.safetensors"
            traces = [str(layer.trace.path)] * times
            command = [CLI, "calibrate", "qfilter", "--out", str(out), "--trace", *traces]
            subprocess.run(command, check=True, capture_output=True)
            found = read_safetensors(out)[0][f"layers.{layer.index}.filter"]
        count = min(SAMPLES // times, layer.length)
        rows = np.tile(np.arange(count) * layer.length // count, times)
        own = np.stack([head_filter(layer.q[head, rows]) for head in range(layer.heads)])
        expected = own.reshape(layer.kv_heads, layer.group, layer.dim).mean(axis=1)
        report.rows += layer.kv_heads
        error = np.abs(found - expected).max()
        report.expect(found.shape == expected.shape and error <= 1e-5, f"filters off by {error:.3g}")

    return check


def cases():
    file = f"filters={drawn_file()}"
    drawn_args = ["--evict", "qfilter", *TENTH.args(), "--set", f"evict.{file}"]
    return [
        case("qfilter", "drawn", TENTH, projections, settings=[file]),
        case("qfilter", "before_question", THIRD, projections, "before_question", [file], layers="second"),
        *(
            Case(f"qfilter/calibrated-{times}", "evict", drawn_args, calibrated(times), "second")
            for times in (1, 2, 3)
        ),
        case("qfilter", "recent", THIRD, projections, "1000", [file, "recent=64"], recent=64, layers="one"),
    ]
