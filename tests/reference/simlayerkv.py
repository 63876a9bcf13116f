"""simlayerkv: a layer whose last query looks at sinks and a window only keeps nothing else."""

import numpy as np

from compare import Case, check_eviction, same_set

TIE = 1e-5


def simlayerkv(threshold, sinks=4, recent=1024, cut="end"):
    def check(layer, dump, report):
        tokens = layer.trace.cut(cut)
        row = np.mean([layer.rows(h, tokens - 1, tokens)[0][0] for h in range(layer.heads)], axis=0)
        seen = np.zeros(tokens, bool)
        seen[:sinks] = True
        seen[max(0, tokens - 1 - recent) :] = True
        seen[tokens - 1] = False
        held = row[seen].sum()
        report.expect(abs(held - threshold) > TIE, f"layer {layer.index}: mass {held} is too near to the threshold")
        expected = np.arange(tokens)
        if threshold < 1 and held > threshold and tokens > sinks + recent + 1:
            expected = np.union1d(np.arange(sinks), np.arange(tokens - recent + 1, tokens)).astype(int)

        def judge(kv_head, found):
            same_set(report, f"layer {layer.index} KV head {kv_head}", found, expected)

        check_eviction(report, layer, dump, tokens, judge)

    return check


def cases():
    def case(name, check, settings=(), cut="end", **more):
        args = ["--allocate", "simlayerkv"]
        if cut != "end":
            args += ["--evict", "snapkv", "--density", "0.5", "--cut", cut]
        for setting in settings:
            args += ["--set", f"allocate.{setting}"]
        return Case(f"simlayerkv/{name}", "evict", args, check, **more)

    out = [case("default", simlayerkv(1))]
    for preset, threshold in {"llama2": 0.65, "llama3": 0.9, "mistral": 0.8, "qwen": 0.85}.items():
        extra = preset == "llama2"
        out.append(case(preset, simlayerkv(threshold), [f"preset={preset}"], extra=extra))
    short = ["threshold=0.1", "sinks=0", "recent=100"]
    out += [
        case("recent", simlayerkv(0.1, 0, 100), short),
        case("half", simlayerkv(0.5, 4, 256), ["threshold=0.5", "recent=256"], extra=True),
        case(
            "before_question", simlayerkv(0.55, 4, 256, "before_question"), ["threshold=0.55", "recent=256"],
            "before_question",
        ),
        case("short", simlayerkv(0.1, cut="1029"), ["threshold=0.1"], "1029"),
        case("just-longer", simlayerkv(0.1, cut="1030"), ["threshold=0.1"], "1030"),
        case("own-only", simlayerkv(0.1, 4, 1), ["threshold=0.1", "recent=1"]),
    ]
    return out
