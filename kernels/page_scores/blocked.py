"""Scores of pages by matrix products with the summaries as left operand, a cache-sized block of pages at a time."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch

from kvtier.kernels.heads import accumulation_dtype, fold_heads, fold_queries
from kvtier.types import GroupReduce

__all__ = ["box_scores", "centroid_scores", "landmark_scores", "plane_scores"]

CACHE_BYTES: Final = 4 * 2**20
DEVICE_BYTES: Final = 256 * 2**20
_COPIES: Final = sum(1 << 9 * i for i in range(8)) - (1 << 64)
_ONES: Final = 0x0101010101010101


def box_scores(q: torch.Tensor, kmin: torch.Tensor, kmax: torch.Tensor, group_reduce: GroupReduce) -> torch.Tensor:
    """Bounds stream from memory once; only 16-bit ones are copied, to fp32, block by block."""
    low, high = fold_heads(kmin), fold_heads(kmax)
    if low is None or high is None:
        rows = [box_scores(q[b : b + 1], kmin[b : b + 1], kmax[b : b + 1], group_reduce) for b in range(q.shape[0])]
        return torch.cat(rows)
    folded = _Queries.of(q, kmin.shape[1], accumulation_dtype(q, kmin, kmax))
    # relu(q) . kmax - relu(-q) . kmin, and -relu(-q) = min(q, 0).
    above, below = folded.flat.clamp_min(0).mT, folded.flat.clamp_max(0).mT
    scores = folded.flat.new_empty(low.shape[:2])
    for part in folded.blocks(kmin.shape[2], kmin.shape[3]):
        bounds = torch.bmm(high[:, part].to(above.dtype), above).baddbmm_(low[:, part].to(above.dtype), below)
        scores[:, part] = folded.reduced(bounds, group_reduce)
    return scores.view(kmin.shape[:3])


def plane_scores(
    q: torch.Tensor, planes: torch.Tensor, kmin: torch.Tensor, kmax: torch.Tensor, group_reduce: GroupReduce
) -> torch.Tensor:
    """``q . k_hat`` as one product for all slots of a block, and what is the same for all slots of a page once."""
    low, high, bits = fold_heads(kmin), fold_heads(kmax), fold_heads(planes)
    if low is None or high is None or bits is None:
        rows = [slice(b, b + 1) for b in range(q.shape[0])]
        return torch.cat([plane_scores(q[b], planes[b], kmin[b], kmax[b], group_reduce) for b in rows])
    folded = _Queries.of(q, kmin.shape[1], accumulation_dtype(q, kmin, kmax))
    queries, sizes = folded.flat.mT, folded.flat.abs().mT
    _, _, pages, count, slots, _ = planes.shape
    scores = folded.flat.new_empty(low.shape[:2])
    for part in folded.blocks(pages, slots * kmin.shape[3]):
        base = low[:, part].to(queries.dtype)
        span = high[:, part].to(queries.dtype) - base
        half = span * 0.5 ** (count + 1)
        bounds = torch.bmm(base + half, queries).baddbmm_(half, sizes)
        if count:
            offsets = _offsets(bits[:, part], span).flatten(1, 2)
            bounds += torch.bmm(offsets, queries).unflatten(1, (-1, slots)).amax(2)
        scores[:, part] = folded.reduced(bounds, group_reduce)
    return scores.view(kmin.shape[:3])


def landmark_scores(q: torch.Tensor, landmarks: torch.Tensor, group_reduce: GroupReduce) -> torch.Tensor:
    """One product, landmarks streamed from memory once."""
    folded_landmarks = fold_heads(landmarks)
    if folded_landmarks is None:
        rows = [landmark_scores(q[b : b + 1], landmarks[b : b + 1], group_reduce) for b in range(q.shape[0])]
        return torch.cat(rows)
    folded = _Queries.of(q, landmarks.shape[1], accumulation_dtype(q, landmarks))
    queries = folded.flat.mT
    scores = folded.flat.new_empty(folded_landmarks.shape[:2])
    for part in folded.blocks(landmarks.shape[2], landmarks.shape[3]):
        products = torch.bmm(folded_landmarks[:, part].to(queries.dtype), queries)
        scores[:, part] = folded.reduced(products, group_reduce)
    return scores.view(landmarks.shape[:3])


def centroid_scores(
    q: torch.Tensor, centroids: torch.Tensor, clusters: torch.Tensor, group_reduce: GroupReduce
) -> torch.Tensor:
    """Centroids are scored once, and their scores handed to the slots."""
    return best_of_clusters(landmark_scores(q, centroids, group_reduce), clusters)


def best_of_clusters(scores: torch.Tensor, clusters: torch.Tensor) -> torch.Tensor:
    """Of the clusters [B, Hk, N, P] of a page the best score, [B, Hk, N], from scores [B, Hk, C]."""
    return scores.gather(2, clusters.flatten(2)).view(clusters.shape).amax(-1)


class _Queries(NamedTuple):
    """Queries of folded heads, [H, R, Dk]: R rows are those of a ``group`` of heads with ``each`` its Tq queries."""

    flat: torch.Tensor
    group: int
    each: int

    @classmethod
    def of(cls, q: torch.Tensor, kv_heads: int, dtype: torch.dtype) -> _Queries:
        return cls(fold_queries(q, kv_heads, dtype).flatten(1, 2), q.shape[1] // kv_heads, q.shape[2])

    def blocks(self, pages: int, page_numbers: int) -> list[slice]:
        """Ranges of pages whose summaries, of so many numbers each, and products stay in the cache."""
        heads, rows, _ = self.flat.shape
        budget = CACHE_BYTES if self.flat.device.type == "cpu" else DEVICE_BYTES
        block = max(16, budget // (heads * (page_numbers + rows) * self.flat.element_size()))
        return [slice(at, at + block) for at in range(0, pages, block)]

    def reduced(self, scores: torch.Tensor, group_reduce: GroupReduce) -> torch.Tensor:
        """Scores [H, n, R] to [H, n]: the group to one, and of the queries the greatest."""
        scores = scores.unflatten(2, (self.group, self.each))
        if group_reduce == "max":
            return scores.amax((2, 3))
        return (scores.mean(2) if group_reduce == "mean" else scores.sum(2)).amax(-1)


def _offsets(planes: torch.Tensor, span: torch.Tensor) -> torch.Tensor:
    """Where cells begin above kmin [H, n, P, Dk], from planes [H, n, b, P, W] and spans [H, n, Dk]."""
    first, *others = (_spread(plane) for plane in planes.unbind(2))
    for bits in others:
        # Eight codes lie in a word; none overflows its byte, for there are at most 8 planes.
        first.bitwise_left_shift_(1).bitwise_or_(bits)
    offsets = first.view(torch.uint8)[..., : span.shape[-1]].to(span.dtype)
    return offsets.mul_((span * 0.5 ** planes.shape[2]).unsqueeze(-2))


def _spread(plane: torch.Tensor) -> torch.Tensor:
    """The 8 bits of every byte, the highest first, as the 8 bytes of a little-endian word."""
    # Copies of the byte 9 bits apart: bit 7 - i of copy i comes to lie 7 bits above byte i.
    return plane.to(torch.int64).mul_(_COPIES).bitwise_right_shift_(7).bitwise_and_(_ONES)
