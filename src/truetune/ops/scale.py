"""The scale of a low-rank update; apart from the arithmetic, because a merge by files alone imports no torch."""

from __future__ import annotations

import math


def scale(alpha: float, rank: int, *, rank_stabilised: bool) -> float:
    """s = alpha / r, or alpha / sqrt(r) when rank-stabilised (Kalajdzievski 2023, arXiv:2312.03732)."""
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)
