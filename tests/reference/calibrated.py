"""loki and double_sparsity: tokens ranked in a few calibrated directions or channels; and what calibrate writes."""

import atexit
import json
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from trace import read_safetensors

import numpy as np

from budgets import Budget, cached_target, step_units, top
from compare import CLI, Case, check_decode, same_choice, same_scores

LAYERS, HEADS, KV_HEADS, DIM = (0, 9, 18, 27), 9, 3, 64  # of the shipped trace
FOLDER = Path(tempfile.mkdtemp(prefix="lacuna-calibration-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)


def write_safetensors(path, tensors):
    header, data = {"__metadata__": {"format": "lacuna-calibration", "version": "1"}}, b""
    for name, array in tensors.items():
        raw = array.astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def made(name, arrays):
    """A file of seeded arrays, by name: make(generator) for every layer; its path and the arrays as fp32 holds them."""
    random = np.random.default_rng(7)
    tensors = {
        f"layers.{layer}.{array}": make(random).astype(np.float32) for layer in LAYERS for array, make in arrays.items()
    }
    path = FOLDER / f"{name}.safetensors"
    write_safetensors(path, tensors)
    return path, {key: value.astype(np.float64) for key, value in tensors.items()}


def rotations(random):
    return np.stack([np.linalg.qr(random.normal(size=(DIM, DIM)))[0] for _ in range(KV_HEADS)])


LOKI, LOKI_ARRAYS = made("loki", {"post": rotations, "pre": rotations})
CHANNELS, CHANNEL_ARRAYS = made(
    "double_sparsity",
    {
        "qk": lambda random: np.abs(random.normal(size=(HEADS, DIM))),
        "q": lambda random: np.abs(random.normal(size=(HEADS, DIM))),
        "k": lambda random: np.abs(random.normal(size=(KV_HEADS, DIM))),
    },
)


def check_tokens(layer, dump, report, budget, scores_of, dense):
    def judge(step, head, found):
        cached = layer.prompt + step + 1
        where = f"layer {layer.index} step {step} head {head}"
        count = step_units(cached_target(budget, cached), cached, 1, 0, 0)
        scores = scores_of(head, cached)
        if dense or count is None:
            same_choice(report, where, found, np.arange(cached), scores)
            return
        same_scores(report, where, dump, step * layer.heads + head, scores, np.ones(cached, bool))
        same_choice(report, where, found, top(scores, count), scores)

    check_decode(report, layer, dump, judge)


def loki(budget, rank=32, rope="post"):
    def check(layer, dump, report):
        basis = LOKI_ARRAYS[f"layers.{layer.index}.{rope}"][:, :rank]
        keys = np.einsum("hrd,htd->htr", basis, layer.k)

        def scores(head, cached):
            kv_head = layer.kv_of(head)
            return keys[kv_head, :cached] @ (basis[kv_head] @ layer.q[head, cached - 1])

        check_tokens(layer, dump, report, budget, scores, False)

    return check


def labels(k, bits):
    """Codes are stored data: fp32 steps, halves to even (see twilight)."""
    k = k.astype(np.float32)
    low = k.min(axis=-1, keepdims=True)
    scale = np.maximum(k.max(axis=-1, keepdims=True) - low, np.float32(1e-9)) / np.float32(2**bits - 1)
    codes = np.minimum(np.rint((k - low) / scale), 2**bits - 1)
    return low.astype(np.float64) + scale.astype(np.float64) * codes


def double_sparsity(budget, channels=DIM // 4, kind="qk", bits=4, dense_layers=()):
    def check(layer, dump, report):
        means = CHANNEL_ARRAYS[f"layers.{layer.index}.{kind}"]
        table = {}

        def scores(head, cached):
            if head not in table:
                row = means[layer.kv_of(head) if kind == "k" else head]
                chosen = np.argsort(-row, kind="stable")[:channels]
                table[head] = chosen, labels(layer.k[layer.kv_of(head)][:, chosen], bits)
            chosen, keys = table[head]
            return keys[:cached] @ layer.q[head, cached - 1, chosen]

        check_tokens(layer, dump, report, budget, scores, layer.index in dense_layers)

    return check


# ---- calibrate


def calibrated(name, layer, report, *settings):
    """The arrays that `lacuna calibrate` writes for the layer's trace."""
    path = FOLDER / f"{name}-{layer.trace.path.stem}.safetensors"
    if not path.exists():
        command = [CLI, "calibrate", name, "--trace", str(layer.trace.path), "--out", str(path)]
        for setting in settings:
            command += ["--set", setting]
        done = subprocess.run(command, capture_output=True, text=True)
        if not report.expect(done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"):
            return {}
    tensors, _ = read_safetensors(path)
    prefix = f"layers.{layer.index}."
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def unrotated(x, rope):
    """Rotate-half RoPE undone."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * float(rope["rope_theta"]) ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) + b * np.sin(angle), b * np.cos(angle) - a * np.sin(angle)], axis=-1)


def loki_calibrate(layer, dump, report):
    loki(Budget(density=0.1))(layer, dump, report)
    found = calibrated("loki", layer, report)
    for name, keys in {"post": layer.k, "pre": unrotated(layer.k, layer.trace.rope)}.items():
        for head in range(layer.kv_heads):
            basis = found[name][head].astype(np.float64)
            covariance = np.cov(keys[head].T)
            values = np.linalg.eigvalsh(covariance)[::-1]
            turned = basis @ covariance @ basis.T
            error = np.abs(turned - np.diag(values)).max() / values[0]
            report.expect(error < 1e-5, f"{name} head {head}: not the principal components, {error:.2g}")
            error = np.abs(basis @ basis.T - np.eye(layer.dim)).max()
            report.expect(error < 1e-5, f"{name} head {head}: not orthonormal, {error:.2g}")


def double_sparsity_calibrate(layer, dump, report):
    double_sparsity(Budget(density=0.1), dense_layers=(0, 1))(layer, dump, report)
    found = calibrated("double_sparsity", layer, report)
    repeated = np.repeat(layer.k, layer.group, axis=0)
    expected = {
        "qk": np.abs(layer.q * repeated).mean(axis=1),
        "q": np.abs(unrotated(layer.q, layer.trace.rope)).mean(axis=1),
        "k": np.abs(unrotated(layer.k, layer.trace.rope)).mean(axis=1),
    }
    for name, means in expected.items():
        error = np.abs(found[name] - means).max() / means.max()
        report.expect(error < 1e-5, f"{name}: off by {error:.2g}")


def cases():
    tenth = Budget(density=0.1)

    def case(name, check, settings=(), budget=tenth, **more):
        strategy = name.split("/")[0]
        file = f"select.basis={LOKI}" if strategy == "loki" else f"select.calibration={CHANNELS}"
        args = ["--select", strategy, "--scores", *budget.args(), "--set", file]
        for setting in settings:
            args += ["--set", f"select.{setting}"]
        return Case(name, "decode", args, check, **more)

    everywhere = "dense_layers=[]"
    return [
        case("loki/default", loki(tenth)),
        case("loki/pre", loki(tenth, rope="pre"), ["rope=pre"], layers="one"),
        case("loki/rank-5", loki(tenth, 5), ["rank=5"], layers="one"),
        case("loki/whole", loki(Budget(tokens=90), 64), ["rank=1000"], Budget(tokens=90), layers="one"),
        case("loki/calibrate", loki_calibrate, layers="second"),
        case("double_sparsity/default", double_sparsity(tenth, dense_layers=(0, 1))),
        case("double_sparsity/q", double_sparsity(tenth, kind="q"), ["preset=evaluation", everywhere]),
        case("double_sparsity/k", double_sparsity(tenth, kind="k"), ["list=k", everywhere], layers="one"),
        case(
            "double_sparsity/channels", double_sparsity(tenth, 9, bits=2), ["channels=9", "label_bits=2", everywhere],
            layers="one",
        ),
        case("double_sparsity/calibrate", double_sparsity_calibrate, layers="second"),
    ]
