"""TCA: centres and weighted means of the clusters, with the program's first centre."""

from __future__ import annotations

from golden_case import Case

from vlprune.kernels.k_center import cluster_sums, k_center

TOLERANCE = 1e-5


def check(case: Case) -> str:
    """Items are the second dimension there."""
    points = case["in.tokens"].transpose(0, 1)
    clusters = k_center(points, case.hyper["num_centers"], case["in.first_center"])
    error = float((cluster_sums(points, clusters) - case["out.merged"].transpose(0, 1)).abs().max())
    return "" if error <= TOLERANCE else f"out.merged differs by {error:.2e}"
