"""vattention: sinks, window and top-k exactly, the rest drawn until the bound on the denominator holds."""

from statistics import NormalDist

import numpy as np

from budgets import top
from compare import TIE, Case, check_decode, same_set
from philox import layer_key, philox


def draws(key, step, row, counters, size):
    _, high = philox(key, step + 1, np.full(len(counters), row), counters)
    return (high * np.uint64(size) >> np.uint64(32)).astype(int)


def vattention(epsilon=0.1, delta=0.1, top_fraction=0.05, sample_rate=0.05, sinks=128, recent=128, seed=0):
    def check(layer, dump, report):
        key = layer_key(seed, layer.index)
        weights = dump.lists("tokens", "log_weight")

        def judge(step, head, found):
            cached = layer.prompt + step + 1
            where = f"layer {layer.index} step {step} head {head}"
            size = cached - sinks - recent
            if size < 2:
                same_set(report, where, found, np.arange(cached))
                return
            logits = layer.k[layer.kv_of(head), :cached] @ layer.q[head, cached - 1] * layer.scale
            e = np.exp(logits - logits.max())
            middle = logits[sinks : sinks + size]
            best = sinks + top(middle, int(np.floor(top_fraction * cached + 1e-9)))
            exact = np.r_[0:sinks, best, cached - recent : cached].astype(int)
            base = max(2, int(np.floor(sample_rate * size + 1e-9)))
            sample = e[sinks + draws(key, step, head, 2 * np.arange(base), size)]
            total = e[exact].sum() + size / base * sample.sum()
            bound = (NormalDist().inv_cdf(1 - delta) * sample.std(ddof=1) * size / (epsilon * total)) ** 2
            report.rows += 1
            for near in (1, 1 - 1e-5, 1 + 1e-5):  # fp32 logits may move the count across a whole number
                count = int(min(max(np.floor(bound * near), base), size))
                drawn = sinks + draws(key, step, head, 2 * np.arange(count) + 1, size)
                expected = np.union1d(exact, drawn)
                if near == 1:
                    report.elements += len(expected)
                if len(found) == len(expected):
                    break
            differing = np.setxor1d(found, expected)
            border = middle[best - sinks].min() if len(best) else np.inf
            tied = np.abs(logits[differing] - border) <= TIE * abs(border)
            text = f"{where}: {len(found)} tokens, expected {len(expected)}; {differing[:4]}"
            if not report.expect(tied.all(), text):
                return
            if len(differing) or near != 1:
                report.ties.append((where, max(1, len(differing)), 0.0))
            expected_weight = np.where(np.isin(found, exact), 0, np.log(size / count))
            error = np.abs(weights[step * layer.heads + head] - expected_weight)[~np.isin(found, differing)]
            report.expect(error.max() <= 1e-6, f"{where}: log weight off by {error.max():.3g}")

        check_decode(report, layer, dump, judge)

    return check


def cases():
    def case(name, settings, check, seed=(), **more):
        args = ["--select", "vattention", *seed]
        for setting in settings:
            args += ["--set", f"select.{setting}"]
        return Case(f"vattention/{name}", "decode", args, check, **more)

    loose = ["epsilon=0.25", "delta=0.25", "top_fraction=0.02", "sample_rate=0.01", "sinks=4", "recent=16"]
    return [
        case("default", [], vattention(), extra=True),
        case("loose", loose, vattention(0.25, 0.25, 0.02, 0.01, 4, 16), extra=True),
        case("tight", ["epsilon=0.01"], vattention(0.01), layers="one"),
        case("no-top", ["top_fraction=0"], vattention(top_fraction=0), layers="one"),
        case("seed", [], vattention(seed=3), ["--seed", "3"], layers="one"),
        case("dense", ["sinks=2000"], vattention(sinks=2000), layers="one"),
    ]
