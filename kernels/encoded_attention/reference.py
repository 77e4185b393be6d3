"""Attention over encoded blocks, decoded in one piece: the truth that the fast paths are compared with."""

from __future__ import annotations

import torch

from kvtier.kernels.encoded_attention.formats import BlockFormat
from kvtier.kernels.gather_attention import reference
from kvtier.kernels.gather_attention.extras import Extras
from kvtier.types import Partial, Visibility

__all__ = ["attend_encoded"]


def attend_encoded(
    q: torch.Tensor,
    k_arena: torch.Tensor,
    v_arena: torch.Tensor,
    frames: torch.Tensor,
    *,
    k_format: BlockFormat,
    v_format: BlockFormat,
    scale: float,
    softcap: float | None,
    visible: Visibility | None,
    lengths: torch.Tensor | None,
) -> Partial:
    """Decode every block of every head [B, Hk, N, P, D], lay the blocks end to end, and attend to the run."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if lengths is not None:
        first = torch.arange(frames.shape[2], device=frames.device) * k_format.slots
        frames = torch.where(first < lengths.unsqueeze(-1), frames, 0)
    k = k_format.decode(k_arena[frames], dtype=wide).flatten(2, 3)
    v = v_format.decode(v_arena[frames], dtype=wide).flatten(2, 3)
    return reference.attend_run(q, k, v, scale=scale, softcap=softcap, visible=visible, extras=Extras(lengths=lengths))
