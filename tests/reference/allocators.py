"""uniform, ada, pyramid and duo, over snapkv's scores."""

import tomllib
from pathlib import Path

import numpy as np

from budgets import Budget, cached_target, top
from compare import Case, Prefill, check_decode, check_eviction, same_choice, same_set
from snapkv import PRESETS, forced_tokens, keep, snapkv_scores

RULE = PRESETS["longbench"]


def all_scores(layer, cut):
    """[kv_heads, cut] with the forced tokens at +inf, and the forced tokens."""
    forced = forced_tokens(cut, RULE)
    scores = np.stack([snapkv_scores(layer, h, cut, RULE)[0] for h in range(layer.kv_heads)])
    scores[:, forced] = np.inf
    return scores, forced


# ---- ada


def flat_top(scores, count):
    """Head and position of the layer's best, ties to the lower head, then to the lower position."""
    return top(scores.ravel(), count)


def ada_guarantee(scores, forced, target, floor, outside):
    """Flat indices: every head's best floor * n, then the layer's best."""
    heads, cut = scores.shape
    if outside:
        scores = scores.copy()
        scores[:, forced] = -np.inf
        target -= len(forced)
    safe = int(np.floor(floor * target + 1e-9))
    chosen = np.zeros(scores.shape, bool)
    for h in range(heads):
        chosen[h, top(scores[h], safe)] = True
    rest = np.where(chosen, -np.inf, scores)
    chosen.ravel()[flat_top(rest, heads * (target - safe))] = True
    if outside:
        chosen[:, forced] = True
    return np.flatnonzero(chosen)


def ada_blend(scores, forced, target, floor, outside):
    """[kv_heads] tokens of each head."""
    heads, cut = scores.shape
    if outside:
        scores = scores.copy()
        scores[:, forced] = -np.inf
        target -= len(forced)
    counts = np.bincount(flat_top(scores, heads * target) // cut, minlength=heads)
    exact = counts * (1 - floor) + np.floor(floor * target + 1e-9)
    # Decimal fractions such as .2 carry an error far below any real difference from a half.
    rounded = np.rint(np.round(exact, 9)).astype(int)
    while rounded.sum() > heads * target:  # what rounding added goes back where it gained most, from the last head on
        gain = np.round(rounded - exact, 9)
        rounded[np.flatnonzero(gain == gain.max())[-1]] -= 1
    return rounded + (len(forced) if outside else 0)


def ada(budget, mode="guarantee", floor=0.2, outside=False, cut="end"):
    def check(layer, dump, report):
        tokens = layer.trace.cut(cut)
        scores, forced = all_scores(layer, tokens)
        target = cached_target(budget, tokens)
        found_all = {}

        def judge(kv_head, found):
            found_all[kv_head] = found
            if mode == "blend":
                count = ada_blend(scores, forced, target, floor, outside)[kv_head]
                where = f"layer {layer.index} KV head {kv_head}"
                same_choice(report, where, found, top(scores[kv_head], count), scores[kv_head])
            elif kv_head == layer.kv_heads - 1:
                flat = np.concatenate([h * tokens + found_all[h] for h in range(layer.kv_heads)])
                expected = ada_guarantee(scores, forced, target, floor, outside)
                same_choice(report, f"layer {layer.index}, all KV heads", flat, expected, scores.ravel())

        check_eviction(report, layer, dump, tokens, judge)

    return check


# ---- pyramid


def pyramid_integer(target, window, cut, layers, layer, beta=20):
    b = target - window
    if cut < target or cut < 2 * b:
        return target
    low = b // beta
    high = 2 * b - low
    if high >= cut - window:
        high = cut - window
        low = 2 * b - high
    return high - layer * ((high - low) // (layers - 1)) + window


def pyramid_kvpress(target, window, cut, layers, layer, beta=20):
    low = target / beta
    high = 2 * target - low
    if high >= cut - window:
        high = cut - window
        low = 2 * target - high
    if not cut >= high >= low >= window:
        return target
    return round(high - layer * (high - low) / (layers - 1))


def by_layer(budget, cut, rule):
    """snapkv with this layer's target; rule(target, window, cut, layers, layer)."""

    def check(layer, dump, report):
        tokens = layer.trace.cut(cut)
        scores, forced = all_scores(layer, tokens)
        target = rule(cached_target(budget, tokens), len(forced), tokens, layer.trace.num_layers, layer.index)

        def judge(kv_head, found):
            expected = keep(scores[kv_head], target, forced)
            same_choice(report, f"layer {layer.index} KV head {kv_head}", found, expected, scores[kv_head])

        check_eviction(report, layer, dump, tokens, judge)

    return check


# ---- duo

DUO_CLASSES = Path(__file__).parent / "duo_classes.toml"
DUO_FULL = {int(layer): table["full"] for layer, table in tomllib.loads(DUO_CLASSES.read_text())["layer"].items()}


def duo_tokens(layer, kv_head, length, sinks=128, recent=256):
    if kv_head in DUO_FULL.get(layer.index, []) or sinks + recent >= length:
        return np.arange(length)
    return np.r_[0:sinks, length - recent : length]


def duo_decode(layer, dump, report):
    def judge(step, head, found):
        expected = duo_tokens(layer, layer.kv_of(head), layer.prompt + step + 1)
        same_set(report, f"layer {layer.index} step {step} head {head}", found, expected)

    check_decode(report, layer, dump, judge)


def duo_evict(layer, dump, report):
    def judge(kv_head, found):
        same_set(report, f"layer {layer.index} KV head {kv_head}", found, duo_tokens(layer, kv_head, layer.prompt))

    check_eviction(report, layer, dump, layer.prompt, judge)


def duo_prefill(layer, dump, report):
    view = Prefill(report, layer, dump)
    if not view.good:
        return
    for head in range(layer.heads):
        for t in range(view.tiles):
            begin, end = view.tile(t)
            reads = [duo_tokens(layer, layer.kv_of(head), i + 1) for i in range(begin, end)]
            same_set(report, view.where(head, t), view.row(head, t), np.unique(np.concatenate(reads)))
    view.check_outputs()


def cases():
    tenth, half = Budget(density=0.1), Budget(density=0.5)

    def case(name, allocate, budget, settings, check, cut="end", **more):
        args = ["--evict", "snapkv", "--allocate", allocate, "--cut", cut, *budget.args()]
        for setting in settings:
            args += ["--set", setting]
        return Case(name, "evict", args, check, **more)

    out = [case("uniform", "uniform", tenth, [], by_layer(tenth, "end", lambda target, *_: target), layers="one")]
    for mode in ("guarantee", "blend"):
        for place in ("compete", "outside"):
            settings = [f"allocate.floor_mode={mode}", f"allocate.forced={place}"]
            check = ada(tenth, mode, outside=place == "outside")
            out.append(case(f"ada/{mode}-{place}", "ada", tenth, settings, check, extra=place == "compete"))
    out += [
        case("ada/default", "ada", half, [], ada(half), layers="one"),
        case("ada/floor", "ada", tenth, ["allocate.floor=0.5"], ada(tenth, floor=0.5), layers="one"),
        case("ada/no-floor", "ada", tenth, ["allocate.floor=0"], ada(tenth, floor=0), layers="one"),
        case(
            "ada/before_question",
            "ada",
            tenth,
            ["allocate.floor_mode=blend", "allocate.floor=0.5"],
            ada(tenth, "blend", 0.5, cut="before_question"),
            "before_question",
        ),
    ]
    kvpress = ["allocate.rule=kvpress"]
    clamped, third = Budget(density=0.529), Budget(density=0.3)
    out += [
        case("pyramid/integer", "pyramid", tenth, [], by_layer(tenth, "end", pyramid_integer)),
        case("pyramid/half", "pyramid", half, [], by_layer(half, "end", pyramid_integer)),
        case(
            "pyramid/uniform", "pyramid", Budget(density=0.7), [], by_layer(Budget(density=0.7), "end", pyramid_integer)
        ),
        case("pyramid/clamped", "pyramid", clamped, [], by_layer(clamped, "1000", pyramid_integer), "1000"),
        case("pyramid/kvpress", "pyramid", half, kvpress, by_layer(half, "end", pyramid_kvpress)),
        case("pyramid/kvpress-fallback", "pyramid", tenth, kvpress, by_layer(tenth, "end", pyramid_kvpress)),
        case(
            "pyramid/kvpress-clamped",
            "pyramid",
            Budget(density=0.7),
            kvpress,
            by_layer(Budget(density=0.7), "end", pyramid_kvpress),
        ),
        case(
            "pyramid/30-layers", "pyramid", third, [], by_layer(third, "end", pyramid_integer), traces=("all-layers",)
        ),
    ]
    settings = ["--set", f"allocate.classes={DUO_CLASSES}"]
    out += [
        Case(
            "duo/prefill", "prefill", ["--cells", "--select", "block_topk", "--allocate", "duo", *settings], duo_prefill
        ),
        Case(
            "duo/decode",
            "decode",
            ["--select", "quest", "--set", "select.dense_layers=[]", "--allocate", "duo", *settings],
            duo_decode,
        ),
        Case("duo/evict", "evict", ["--allocate", "duo", *settings], duo_evict),
    ]
    return out
