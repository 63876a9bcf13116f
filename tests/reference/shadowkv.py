"""shadowkv: chunks ranked by their mean keys; outlier chunks, the prompt's end and generated tokens first."""

from functools import lru_cache

import numpy as np

from budgets import Budget
from compare import Case
from ranking import check_decode_ranking


@lru_cache(maxsize=16)
def prompt_chunks(layer, kv_head, chunk, outlier_chunks, local_chunks):
    """Of the ranked chunks: landmarks [chunks, d], least cosines [chunks], which are outliers."""
    chunks = max(0, layer.prompt // chunk - local_chunks)
    keys = layer.k[kv_head, : chunks * chunk].reshape(chunks, chunk, layer.dim)
    landmarks = keys.mean(axis=1)
    norms = np.linalg.norm(keys, axis=2) * np.linalg.norm(landmarks, axis=1)[:, None]
    cosines = ((keys * landmarks[:, None]).sum(axis=2) / norms).min(axis=1)
    outliers = np.zeros(chunks, bool)
    outliers[np.argsort(cosines, kind="stable")[:outlier_chunks]] = True
    return landmarks, cosines, outliers


def shadowkv(budget, chunk=8, outlier_chunks=48, local_chunks=4, gqa="max"):
    def check(layer, dump, report):
        def scores(step, kv_head):
            at = layer.prompt + step
            landmarks, cosines, outliers = prompt_chunks(layer, kv_head, chunk, outlier_chunks, local_chunks)
            out = np.full((layer.group, -(-(at + 1) // chunk)), np.inf)
            q = layer.q[kv_head * layer.group : (kv_head + 1) * layer.group, at]
            logits = q @ landmarks.T * layer.scale
            logits[:, outliers] = -np.inf
            mass = np.exp(logits - logits.max(axis=1, keepdims=True)) if (~outliers).any() else logits
            mass /= mass.sum(axis=1, keepdims=True)
            out[:, : len(cosines)] = np.where(outliers, 3 - cosines, mass)
            return out

        check_decode_ranking(layer, dump, report, budget, chunk, scores, current=1, gqa=gqa)

    return check


def cases():
    fifth = Budget(density=0.2)

    def case(name, settings, check, budget=fifth, **more):
        args = ["--select", "shadowkv", "--cells", *budget.args()]
        for setting in settings:
            args += ["--set", f"select.{setting}"]
        return Case(f"shadowkv/{name}", "decode", args, check, **more)

    few, more = ["outlier_chunks=6"], Budget(density=0.4)
    return [
        case("default", [], shadowkv(more), more),
        case("few-outliers", few, shadowkv(fifth, outlier_chunks=6), extra=True),
        case("only-outliers", ["outlier_chunks=100"], shadowkv(fifth, outlier_chunks=100), layers="one"),
        case("no-outliers", ["outlier_chunks=0"], shadowkv(fifth, outlier_chunks=0), layers="one"),
        case("16", [*few, "chunk=16", "local_chunks=0"], shadowkv(fifth, 16, 6, 0), layers="second"),
        *(
            case(gqa, [*few, f"gqa={gqa}"], shadowkv(fifth, outlier_chunks=6, gqa=gqa), layers="one")
            for gqa in ("mean", "sum", "none", "union")
        ),
    ]
