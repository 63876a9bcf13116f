"""RoPE (pairs of channels c and c + d / 2), its inverse, and its mean over positions."""

import numpy as np

from baselines import rotate


def angles(layer):
    """Angle of every pair per position; the trace names one base, or one by kind of layer."""
    rope = layer.trace.rope
    return rope.get("full_attention", rope)["rope_theta"] ** (-np.arange(layer.dim // 2) * 2 / layer.dim)


def unrotated(layer, rows, tokens):
    """The first `tokens` of rows [heads, length, d] as they were before RoPE."""
    return rotate(rows[:, :tokens], angles(layer), -np.arange(tokens))


def mean_rotation(layer, begin, count):
    """[d, d]: the mean of the rotations of positions [begin, begin + count)."""
    turn = np.arange(begin, begin + count)[:, None] * angles(layer)
    cos, sin = np.diag(np.cos(turn).mean(axis=0)), np.diag(np.sin(turn).mean(axis=0))
    return np.block([[cos, -sin], [sin, cos]])
