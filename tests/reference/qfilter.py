"""qfilter: keys along a filter. Here the filters are drawn, so that scores alone are judged; one more case holds the
filters that `lacuna calibrate` makes against a singular value decomposition."""

import atexit
import shutil
import subprocess
import tempfile
from pathlib import Path
from trace import read_safetensors

import numpy as np

from compare import CLI
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


def cases():
    file = f"filters={drawn_file()}"
    return [
        case("qfilter", "drawn", TENTH, projections, settings=[file]),
        case("qfilter", "before_question", THIRD, projections, "before_question", [file], layers="second"),
        case("qfilter", "recent", THIRD, projections, "1000", [file, "recent=64"], recent=64, layers="one"),
    ]
