"""Which frames of a person are kept (Sec. 3.4): over-cluster them by pose, then the best of clusters far apart."""

from collections.abc import Sequence

import numpy as np

_ROLL_WEIGHT = 0.3  # roll is undone by alignment; what it leaves is small
_OVER = 3  # clusters for each face that is wanted
_LEAST_QUALITY = 0.5  # of the median: blurred frames of an otherwise sharp person


def clusters_by_pose(poses: np.ndarray, quality: np.ndarray, count: int) -> list[np.ndarray]:
    """Indices of faces in clusters of like pose, each the best first; the clusters' order spreads over the poses.

    poses (N, 3) degrees; quality (N,). There are up to 3 * count clusters: k centres, the next always farthest from
    those before (Gonzalez 1985), from the best face on; each face belongs to the nearest. Any first k clusters of the
    result are about as far apart as k can be.
    """
    points = np.asarray(poses, np.float64) * [1, 1, _ROLL_WEIGHT]
    sharp = np.flatnonzero(quality >= _LEAST_QUALITY * np.median(quality))
    centres = spread(points[sharp], int(quality[sharp].argmax()), _OVER * count)
    nearest = np.linalg.norm(points[sharp, None] - points[sharp][centres], axis=2).argmin(1)
    members = [sharp[nearest == number] for number in range(len(centres))]
    clusters = [group[np.argsort(-quality[group], kind="stable")] for group in members if len(group)]
    # The best of a cluster need not be its centre: order by the faces that will be taken.
    best = points[[group[0] for group in clusters]]
    return [clusters[i] for i in spread(best, 0, len(clusters))]


def spread(points: np.ndarray, first: int, count: int) -> list[int]:
    """Indices of up to `count` different points (N, D), the next always the farthest from those before."""
    chosen = [first]
    distance = np.linalg.norm(points - points[first], axis=1)
    while len(chosen) < count and distance.max() > 0:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(points - points[chosen[-1]], axis=1))
    return chosen


def yaw_range(poses: Sequence) -> float:
    """Largest yaw less the smallest, degrees."""
    yaw = np.asarray(poses, np.float64).reshape(-1, 3)[:, 0]
    return float(np.ptp(yaw)) if len(yaw) else 0.0
