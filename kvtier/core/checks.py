"""What a session accepts: shapes, positions and padding, all checked before anything changes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kvtier.core.policy import IntArray
from kvtier.errors import InputError
from kvtier.types import DTYPE_BYTES, KVLayout, LayerLayout

__all__ = ["check_ascending", "check_keys", "check_positions", "check_queries", "layer_of", "spans_of"]

_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_BYTES}


def layer_of(layout: KVLayout, layer: int) -> LayerLayout:
    """The layout of a layer.

    Raises
    ------
    InputError
        When the model has no such layer.
    """
    if not 0 <= layer < len(layout.layers):
        raise InputError(f"layer must be 0 to {len(layout.layers) - 1}, got {layer}")
    return layout.layers[layer]


def check_keys(shape: LayerLayout, layer: int, rows: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Keys and values of ``rows`` rows as the layout says; any number of rows when it is 0.

    Raises
    ------
    InputError
        For another shape or type.
    """
    given = keys.shape
    rows = rows or given[0]
    tokens = (given[2] if len(given) == 4 else 1) or 1
    need_keys = (rows, shape.num_kv_heads, tokens, shape.key_dim)
    need_values = (*need_keys[:3], shape.value_dim)
    if given != need_keys or values.shape != need_values or not rows:
        raise InputError(
            f"layer {layer} needs keys {list(need_keys)} and values {list(need_values)} with at least one token, "
            f"got {list(given)} and {list(values.shape)}"
        )
    dtype = _DTYPES[shape.dtype]
    if keys.dtype != dtype or values.dtype != dtype:
        raise InputError(f"layer {layer} needs keys and values of {dtype}, got {keys.dtype} and {values.dtype}")


def check_queries(shape: LayerLayout, layer: int, rows: int, query: torch.Tensor) -> None:
    """Queries of ``rows`` rows as the layout says.

    Raises
    ------
    InputError
        For another shape.
    """
    given = query.shape
    need = (rows, shape.num_query_heads, given[2] if len(given) == 4 else 1, shape.key_dim)
    if given != need or not rows:
        raise InputError(
            f"layer {layer} needs queries {list(need)}, for the {rows} rows that were appended, got {list(given)}"
        )


def check_positions(positions: torch.Tensor, rows: int, tokens: int) -> None:
    """One position a token, for each row or for all.

    Raises
    ------
    InputError
        For another shape, or positions that are no integers.
    """
    whole = not (positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool)
    if positions.dim() != 2 or positions.shape[0] not in (1, rows) or positions.shape[1] != tokens or not whole:
        raise InputError(
            f"positions must be integers [{rows} or 1, {tokens}], got {positions.dtype} {list(positions.shape)}"
        )


def spans_of(spans: Sequence[slice] | None, rows: int, tokens: int) -> Sequence[slice]:
    """The real tokens of each row; all of them without ``spans``.

    Raises
    ------
    InputError
        When there is not one span a row, or one leaves the columns.
    """
    if spans is None:
        return [slice(0, tokens)] * rows
    if len(spans) != rows or not all(_inside(span, tokens) for span in spans):
        raise InputError(
            f"spans must be {rows} slices within columns 0 to {tokens}, one a row and without a step, got {list(spans)}"
        )
    return spans


def check_ascending(positions: IntArray, last: int | None) -> None:
    """Positions [n] of new tokens ascend, and come after ``last``.

    Raises
    ------
    InputError
    """
    if not positions.size:
        return
    if (positions.size > 1 and (np.diff(positions) <= 0).any()) or (last is not None and int(positions[0]) <= last):
        raise InputError(
            f"positions must ascend within a sequence, got {positions[:4].tolist()}... after {last}; "
            "packed sequences and repeated positions are not served"
        )


def _inside(span: slice, tokens: int) -> bool:
    whole = isinstance(span.start, int) and isinstance(span.stop, int) and span.step in (None, 1)
    return whole and 0 <= span.start <= span.stop <= tokens
