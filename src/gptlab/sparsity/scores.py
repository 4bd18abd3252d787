"""Scores of the weights of a matrix, in float32. Weights with the smallest scores are pruned."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Variant = Literal["bitter0", "bitter1", "bitter3", "bitter7"]
EPS = 1e-8


def magnitude(w: Tensor) -> Tensor:
    """|w| (Zhu and Gupta 2017, arXiv 1710.01878)."""
    return w.float().abs()


def state(variant: Variant, w: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """AdamWPrune's scores, as published, from Adam's moments m (`exp_avg`) and v (`exp_avg_sq`).

    bitter0: |w m| |w| / (sqrt(v) + eps). bitter1: |w|, bit-equal to `magnitude`. bitter3: |w| sqrt(|m| + eps).
    bitter7: |w| (v + eps)^(1/4). eps = 1e-8.
    """
    w, m, v = w.float(), m.float(), v.float()
    if variant == "bitter0":
        return (w * m).abs() * w.abs() / (v.sqrt() + EPS)
    if variant == "bitter3":
        return w.abs() * (m.abs() + EPS).sqrt()
    if variant == "bitter7":
        return w.abs() * (v + EPS).pow(0.25)
    return magnitude(w)


def distance(w: Tensor, start: Tensor) -> Tensor:
    """w (w - start): how far a weight has moved away from 0; negative if it moved towards 0."""
    w = w.float()
    return w * (w - start)


def accumulate_movement(score: Tensor, w: Tensor, grad: Tensor, finite: Tensor) -> None:
    """Movement (Sanh et al. 2020, arXiv 2005.07683, section 3): score -= grad w, in place, if finite () is true.

    w is the dense weight. The paper's learning rate of the scores scales all of them alike, so it is left out.
    """
    score.sub_(torch.where(finite, grad.float() * w.float(), 0.0))
