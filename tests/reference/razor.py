"""razor: retrieval heads keep everything, the others sinks, a window and the mean of what they drop."""

from trace import Layer

import numpy as np

from allocators import DUO_CLASSES, DUO_FULL
from calibrated import KV_HEADS, LAYERS, calibrated, made
from compare import Case, Outputs, check_ragged, same_set


def rounded(x, dtype):
    """As the cache holds it; bf16: to nearest even."""
    x = x.astype(np.float32)
    if dtype != "bf16":
        return x.astype(np.float16 if dtype == "f16" else np.float32).astype(np.float64)
    bits = x.view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


class Rewritten(Outputs):
    """Outputs of a layer whose keys were changed: dense probabilities are those of the trace, so mass is not asked."""

    def _bound(self, what, *rest):
        if what != "mass_kept":
            super()._bound(what, *rest)


def razor(sinks=4, capacity=256, full=DUO_FULL, dtype="bf16"):
    def check(layer, dump, report):
        cut = layer.prompt
        changed = Layer(layer.trace, layer.index)
        if not check_ragged(report, dump, "kept", layer.kv_heads, layer.length):
            return
        kept = dump.lists("kept")
        for kv_head in range(layer.kv_heads):
            expected = np.arange(cut)
            if kv_head not in full.get(layer.index, []) and cut > capacity:
                newest = cut - (capacity - sinks)  # its slot holds the mean
                expected = np.r_[0:sinks, newest:cut]
                for x in (changed.k, changed.v):
                    x[kv_head, newest] = rounded(x[kv_head, sinks : newest + 1].mean(axis=0), dtype)
            same_set(report, f"layer {layer.index} KV head {kv_head}", kept[kv_head], expected)
        changed.v_norms = np.linalg.norm(changed.v, axis=2)
        outputs = Rewritten(report, changed, dump, cut, layer.length - cut)
        for head in range(layer.heads):
            for at in range(cut, layer.length):
                mask = np.zeros(at + 1, bool)
                mask[kept[layer.kv_of(head)]] = True
                mask[cut:] = True
                outputs.check(head, at, at + 1, mask[None])

    return check


SCORES, SCORE_ARRAYS = made("razor", {name: lambda random: random.random(KV_HEADS) for name in ("echo", "induction")})


def retrieval_heads(shares):
    """{layer: heads}: of every score its share of all heads, halves to even."""
    full = {layer: [] for layer in LAYERS}
    for name, share in shares.items():
        heads = [(-SCORE_ARRAYS[f"layers.{layer}.{name}"][h], layer, h) for layer in LAYERS for h in range(KV_HEADS)]
        for _, layer, h in sorted(heads)[: round(share * len(heads))]:
            full[layer].append(h)
    return full


def calibrate(period):
    def check(layer, dump, report):
        razor()(layer, dump, report)
        found = calibrated("razor", layer, report, f"period={period}")
        sums = {"echo": np.zeros(layer.heads), "induction": np.zeros(layer.heads)}
        pairs = 0
        for at in range(1 + period, layer.length):
            copies = np.arange(at - period, 0, -period)
            pairs += len(copies)
            for head in range(layer.heads):
                p = layer.rows(head, at, at + 1)[0][0]
                sums["echo"][head] += p[copies].sum()
                sums["induction"][head] += p[copies + 1].sum()
        for name, of_heads in sums.items():
            expected = (of_heads / pairs).reshape(layer.kv_heads, -1).max(axis=1)
            error = np.abs(found[name] - expected).max() / expected.max()
            report.expect(error < 1e-5, f"{name}: off by {error:.2g}")

    return check


def cases():
    def case(name, check, settings=(), **more):
        args = ["--allocate", "razor"]
        for setting in settings:
            args += ["--set", f"allocate.{setting}"]
        return Case(f"razor/{name}", "evict", args, check, **more)

    classes = f"classes={DUO_CLASSES}"
    return [
        case("classes", razor(), [classes]),
        case("none", razor(full={}), layers="one"),
        case("capacity", razor(0, 64), [classes, "sinks=0", "capacity=64"]),
        case(
            "scores", razor(full=retrieval_heads({"echo": 0.25, "induction": 0.14})), [f"scores={SCORES}", "echo=0.25"]
        ),
        case("calibrate", calibrate(400), [classes], layers="one"),
        case("mean-only", razor(5, 6), [classes, "sinks=5", "capacity=6"], layers="one"),
    ]
