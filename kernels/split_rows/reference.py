"""Rows of pages into keys and values, one page at a time: the truth that the fast paths are compared with."""

from __future__ import annotations

import torch

from kvtier.kernels.split_rows.blocked import CopyHeads

__all__ = ["plan"]


def plan(rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, page_tokens: int) -> CopyHeads:
    """How to copy heads of rows [bytes] to keys [L, Hk, C, Dk] and values [L, Hk, C, Dv]."""
    _, heads, tokens, key_dim = keys.shape
    pages = tokens // page_tokens
    split = page_tokens * key_dim * keys.element_size()
    by_page = rows.view(keys.shape[0] * heads * pages, -1)

    def copy(first: int, stop: int) -> None:
        for number in range(first * pages, stop * pages):
            head, page = divmod(number, pages)
            place = (*divmod(head, heads), slice(page * page_tokens, (page + 1) * page_tokens))
            for tensor, part in ((keys, by_page[number, :split]), (values, by_page[number, split:])):
                tensor.detach()[place] = part.clone().view(tensor.dtype).view(page_tokens, -1).to(tensor.device)

    return copy
