"""Lloyd's k-means as the strategies run it: fixed start, ties to the lower cluster, an empty one keeps its centroid.
Centroids are stored data, hence rounded to fp32 after every round."""

import numpy as np


def stored(x):
    return x.astype(np.float32).astype(np.float64)


def evenly(points, clusters):
    return points[np.arange(clusters) * len(points) // clusters]


def nearest(points, centroids):
    """By Euclidean distance."""
    half = (centroids**2).sum(axis=1) / 2
    return np.concatenate(
        [np.argmin(half - points[a : a + 4096] @ centroids.T, axis=1) for a in range(0, len(points), 4096)]
    )


def means(points, labels, before):
    """Centroids [clusters, d] of the members, in fp32."""
    counts = np.bincount(labels, minlength=len(before))
    sums = np.zeros_like(before)
    np.add.at(sums, labels, points)
    out = before.copy()
    out[counts > 0] = stored(sums[counts > 0] / counts[counts > 0, None])
    return out


def normalised(centroids):
    return stored(centroids / np.linalg.norm(centroids, axis=1, keepdims=True))


def by_product(points, centroids):
    """By the largest inner product."""
    return np.concatenate([np.argmax(points[a : a + 4096] @ centroids.T, axis=1) for a in range(0, len(points), 4096)])
