"""The random numbers that strategies draw: Philox4x32-10 addressed by (row, counter), keyed by seed and layer."""

import numpy as np

MASK = np.uint64(0xFFFFFFFF)


def layer_key(seed, layer):
    """The key of a layer: splitmix64."""
    mask = (1 << 64) - 1
    z = (seed * 1000003 + layer + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def philox(key, step, row, counter):
    """The low and the high word; row and counter are arrays, `step` is the decode step + 1 (0: none)."""
    row, counter = np.broadcast_arrays(np.asarray(row, np.uint64), np.asarray(counter, np.uint64))
    shift = np.uint64(32)
    c0, c1 = counter & MASK, counter >> shift
    c2, c3 = row & MASK, (row >> shift) ^ np.uint64(step)
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ np.uint64(k0), p1 & MASK, (p0 >> shift) ^ c3 ^ np.uint64(k1), p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1


def philox_normal(key, step, row, counter):
    """Standard normal numbers by Box-Muller."""
    low, high = philox(key, step, row, counter)
    u = (low.astype(np.float64) + 1) * 2.0**-32
    return np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * high.astype(np.float64) * 2.0**-32)
