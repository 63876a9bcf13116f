"""magicpig: tokens sampled by SimHash collisions, logits corrected by the sampling probability."""

import numpy as np

from compare import Case, check_decode
from philox import layer_key, philox_normal


def signs(x, planes):
    """Bits of [n, d] on [tables, bits, d], and which of them are too close to the plane to call in fp32."""
    projected = np.einsum("nd,tbd->ntb", x, planes, optimize=True)
    size = np.linalg.norm(x, axis=1)[:, None, None] * np.linalg.norm(planes, axis=2)
    return projected > 0, np.abs(projected) < 1e-6 * size


def magicpig(bits=10, tables=150, sinks=4, recent=64, seed=0):
    def check(layer, dump, report):
        prompt = layer.prompt
        key = layer_key(seed, layer.index)
        row = (np.arange(tables)[:, None] * 16 + np.arange(bits))[:, :, None]
        planes = philox_normal(key, 0, row, np.arange(layer.dim)[None, None])
        middle = np.arange(sinks, prompt - recent)
        centred, bits_of, unsure, codes = {}, {}, {}, {}
        powers = 1 << np.arange(bits)
        for h in range(layer.kv_heads):
            centred[h] = layer.k[h, middle] - layer.k[h, middle].mean(axis=0)
            bits_of[h], unsure[h] = signs(centred[h], planes)
            codes[h] = (bits_of[h] @ powers).astype(np.uint16)
        if not report.expect("tokens.log_weight" in dump.tensors, "no tokens.log_weight"):
            return
        weights = dump.lists("tokens", "log_weight")

        def judge(step, head, found):
            at, h = prompt + step, layer.kv_of(head)
            where = f"layer {layer.index} step {step} head {head}"
            q = layer.q[head, at]
            q_bits, q_unsure = signs(q[None], planes)
            plain = (codes[h] == (q_bits[0] @ powers).astype(np.uint16)).sum(axis=1) >= 2
            exact = np.r_[0:sinks, prompt - recent : at + 1]
            expected = np.union1d(middle[plain], exact)
            report.rows += 1
            report.elements += len(expected)
            if not np.array_equal(found, expected):  # only where a bit is too close to its plane
                equal, either = q_bits == bits_of[h], q_unsure | unsure[h]
                sure = (equal & ~either).all(axis=2).sum(axis=1) >= 2
                possible = (equal | either).all(axis=2).sum(axis=1) >= 2
                fine = np.isin(np.union1d(middle[sure], exact), found).all()
                fine = fine and np.isin(found, np.union1d(middle[possible], exact)).all()
                differing = np.setxor1d(found, expected)
                if not report.expect(fine, f"{where}: differs in {len(differing)} tokens {differing[:4]}"):
                    return
                report.ties.append((where, len(differing), 0.0))
            cosine = centred[h] @ q / np.linalg.norm(centred[h], axis=1) / np.linalg.norm(q)
            p = (1 - np.arccos(np.clip(cosine, -1, 1)) / np.pi) ** bits
            w = 1 - (1 - p) ** tables - tables * p * (1 - p) ** (tables - 1)
            log_weight = np.zeros(at + 1)
            log_weight[middle] = -np.log(w + 1e-4)
            error = np.abs(weights[step * layer.heads + head] - log_weight[found])
            report.expect(error.max() <= 1e-4, f"{where}: log weight off by {error.max():.3g}")

        check_decode(report, layer, dump, judge)

    return check


def cases():
    def case(name, args, check, **more):
        return Case(f"magicpig/{name}", "decode", ["--select", "magicpig", *args], check, **more)

    everywhere = ["--set", "select.dense_layers=[]"]
    return [
        case("default", everywhere, magicpig(), layers="second", extra=True),
        case("seed", [*everywhere, "--seed", "3"], magicpig(seed=3), layers="one"),
        case(
            "small",
            [*everywhere, "--set", "select.bits=6", "--set", "select.tables=20", "--set", "select.sinks=8"]
            + ["--set", "select.recent=16"],
            magicpig(6, 20, 8, 16),
        ),
    ]
