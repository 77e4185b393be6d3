"""Rows of pages into keys and values by strided copies, any devices and strides; numpy where it sees all of it.

A view of numpy's costs a tenth of one of torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

__all__ = ["CopyHeads", "plan"]

CopyHeads: TypeAlias = Callable[[int, int], None]
"""Copies heads from the first up to the second, counted through the layers."""


def plan(rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, page_tokens: int) -> CopyHeads:
    """How to copy heads of rows [bytes] to keys [L, Hk, C, Dk] and values [L, Hk, C, Dv]."""
    layers, heads, tokens, _ = keys.shape
    split = page_tokens * keys.shape[3] * keys.element_size()
    by_page = rows.view(layers, heads, tokens // page_tokens, -1)
    sides = [(by_page[..., :split], keys), (by_page[..., split:], values)]
    copies = [
        (_on_host if rows.is_cpu and to.is_cpu and to.stride(3) == 1 else _anywhere)(of, to, page_tokens)
        for of, to in sides
    ]

    def copy(first: int, stop: int) -> None:
        while first < stop:
            layer, head = divmod(first, heads)
            whole = (stop - first) // heads if head == 0 else 0
            last = first + whole * heads if whole else min(stop, (layer + 1) * heads)
            place = slice(layer, layer + (whole or 1)), slice(head, heads if whole else head + last - first)
            for one in copies:
                one(place)
            first = last

    return copy


def _on_host(pages: torch.Tensor, tensor: torch.Tensor, page_tokens: int) -> Callable[[tuple[slice, slice]], None]:
    into = _bytes_by_page(tensor.detach(), page_tokens).numpy()
    of = pages.numpy().reshape(into.shape)

    def copy(place: tuple[slice, slice]) -> None:
        into[place] = of[place]

    return copy


def _anywhere(pages: torch.Tensor, tensor: torch.Tensor, page_tokens: int) -> Callable[[tuple[slice, slice]], None]:
    def copy(place: tuple[slice, slice]) -> None:
        into, of = tensor.detach()[place], pages[place]
        if into.stride(3) == 1:
            into = _bytes_by_page(into, page_tokens)
            into.copy_(of.reshape(into.shape))
        else:
            straight = torch.empty(into.shape, dtype=into.dtype)
            by_page = _bytes_by_page(straight, page_tokens)
            by_page.copy_(of.reshape(by_page.shape))
            into.copy_(straight)

    return copy


def _bytes_by_page(tensor: torch.Tensor, page_tokens: int) -> torch.Tensor:
    """[L, Hk, C, D] as bytes [L, Hk, N, P, bytes of D], a view."""
    layers, heads, tokens, dim = tensor.shape
    shape = (layers, heads, tokens // page_tokens, page_tokens, dim * tensor.element_size())
    return tensor.view(torch.uint8).view(shape)
