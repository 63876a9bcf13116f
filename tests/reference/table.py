"""table over snapkv and oracle_topk: targets of KV heads from a file."""

import tomllib
from fractions import Fraction
from pathlib import Path

import numpy as np

from allocators import all_scores
from budgets import Budget, cached_target, top
from compare import Case, check_decode, check_eviction, same_choice
from snapkv import keep
from top_p import share_out

HERE = Path(__file__).parent
FILES = {kind: HERE / f"table_{kind}.toml" for kind in ("share", "tokens")}


def numbers(kind, layer):
    """As the plug-in gets them: fp32."""
    table = tomllib.loads(FILES[kind].read_text())["layer"][str(layer.index)]
    return [Fraction(float(np.float32(x))) for x in table[kind]]


def targets(kind, layer, cached, total, rows_of=1):
    """Tokens of every row; each KV head has `rows_of` of them."""
    weights = [w for w in numbers(kind, layer) for _ in range(rows_of)]
    if total is not None:
        return [cached] * len(weights) if total >= cached * len(weights) else share_out(
            total, weights, [cached] * len(weights)
        )
    if kind == "tokens":
        return [min(int(w), cached) for w in weights]
    kept = [min(w * cached, Fraction(cached)) for w in weights]
    whole = int(sum(kept) + Fraction(1, 2))
    out = [int(x) for x in kept]
    for r in sorted(range(len(kept)), key=lambda r: (int(kept[r]) - kept[r], r))[: whole - sum(out)]:
        out[r] += 1
    return [max(1, n) for n in out]


def evict(kind, budget):
    def check(layer, dump, report):
        cut = layer.prompt
        scores, forced = all_scores(layer, cut)
        total = None if budget is None else cached_target(budget, cut) * layer.kv_heads
        wanted = targets(kind, layer, cut, total)

        def judge(kv_head, found):
            expected = keep(scores[kv_head], wanted[kv_head], forced)
            same_choice(report, f"layer {layer.index} KV head {kv_head}", found, expected, scores[kv_head])

        check_eviction(report, layer, dump, cut, judge)

    return check


def decode(kind, budget):
    """Over oracle_topk: rows are query heads."""

    def check(layer, dump, report):
        def judge(step, head, found):
            at = layer.prompt + step
            total = None if budget is None else cached_target(budget, at + 1) * layer.heads
            wanted = targets(kind, layer, at + 1, total, layer.group)
            p = layer.rows(head, at, at + 1)[0][0]
            same_choice(report, f"layer {layer.index} step {step} head {head}", found, top(p, wanted[head]), p)

        check_decode(report, layer, dump, judge)

    return check


def cases():
    def case(name, phase, kind, budget, check, **more):
        scorer = ["--evict", "snapkv"] if phase == "evict" else ["--select", "oracle_topk"]
        args = [*scorer, "--allocate", "table", "--set", f"allocate.file={FILES[kind]}"]
        return Case(f"table/{name}", phase, [*args, *(budget.args() if budget else [])], check, **more)

    tenth, most = Budget(density=0.1), Budget(density=0.9)
    return [
        case("share", "evict", "share", None, evict("share", None)),
        case("tokens", "evict", "tokens", None, evict("tokens", None)),
        case("share-budget", "evict", "share", tenth, evict("share", tenth)),
        case("tokens-budget", "evict", "tokens", most, evict("tokens", most)),
        case("decode-share", "decode", "share", None, decode("share", None)),
        case("decode-budget", "decode", "tokens", tenth, decode("tokens", tenth), layers="one"),
    ]
