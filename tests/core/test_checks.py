"""What a session accepts is checked before anything changes; each message says what was required and what was got."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvtier.core.checks import check_ascending, check_keys, check_positions, check_queries, layer_of, spans_of
from kvtier.errors import InputError
from kvtier.testing.session_machine import small_layout

LAYER = small_layout().layers[0]


def keys(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("layer", [-1, 3])
def test_layers_are_those_of_the_model(layer: int) -> None:
    with pytest.raises(InputError, match=f"layer must be 0 to 2, got {layer}"):
        layer_of(small_layout(), layer)
    assert layer_of(small_layout(window=5), 1).window == 5


@pytest.mark.parametrize("rows", [0, 3])
def test_keys_and_values_that_fit_pass(rows: int) -> None:
    check_keys(LAYER, 0, rows, keys(3, 2, 5, 6), keys(3, 2, 5, 4))


@pytest.mark.parametrize(
    ("rows", "key_shape", "value_shape"),
    [
        (2, (3, 2, 5, 6), (3, 2, 5, 4)),
        (3, (3, 4, 5, 6), (3, 4, 5, 4)),
        (3, (3, 2, 5, 7), (3, 2, 5, 4)),
        (3, (3, 2, 5, 6), (3, 2, 5, 5)),
        (3, (3, 2, 5, 6), (3, 2, 6, 4)),
        (3, (3, 2, 0, 6), (3, 2, 0, 4)),
        (0, (0, 2, 5, 6), (0, 2, 5, 4)),
        (3, (2, 5, 6), (2, 5, 4)),
    ],
    ids=["rows", "heads", "key dim", "value dim", "tokens", "no token", "no row", "no batch"],
)
def test_other_shapes_are_refused(rows: int, key_shape: tuple[int, ...], value_shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"layer 1 needs keys \[.* and values \[.* with at least one token") as error:
        check_keys(LAYER, 1, rows, keys(*key_shape), keys(*value_shape))

    assert str(error.value).endswith(f"got {list(key_shape)} and {list(value_shape)}")


def test_another_type_is_refused_and_never_cast() -> None:
    with pytest.raises(InputError, match=r"needs keys and values of torch\.float64, got .* and torch\.float32"):
        check_keys(LAYER, 0, 1, keys(1, 2, 5, 6), keys(1, 2, 5, 4, dtype=torch.float32))


@pytest.mark.parametrize(
    "shape", [(2, 4, 5, 6), (3, 2, 5, 6), (3, 4, 5, 7), (4, 5, 6)], ids=["rows", "heads", "dim", "no batch"]
)
def test_queries_are_those_of_the_rows_appended(shape: tuple[int, ...]) -> None:
    check_queries(LAYER, 0, 3, keys(3, 4, 5, 6))
    with pytest.raises(InputError, match=r"layer 0 needs queries \[3, 4, ., 6\], for the 3 rows .*, got \["):
        check_queries(LAYER, 0, 3, keys(*shape))


def test_positions_are_one_a_token_for_each_row_or_for_all() -> None:
    for rows in (1, 3):
        for dtype in (torch.int64, torch.int32):
            check_positions(torch.zeros(rows, 5, dtype=dtype), 3, 5)
    for wrong in (torch.zeros(2, 5), torch.zeros(3, 4), torch.zeros(5), torch.zeros(1, 3, 5)):
        with pytest.raises(InputError, match=r"positions must be integers \[3 or 1, 5\], got torch\.int64 \["):
            check_positions(wrong.long(), 3, 5)
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(InputError, match=f"got {dtype}"):
            check_positions(torch.zeros(3, 5, dtype=dtype), 3, 5)


def test_without_spans_every_column_is_real() -> None:
    assert spans_of(None, 2, 5) == [slice(0, 5), slice(0, 5)]


@pytest.mark.parametrize(
    "spans",
    [
        [slice(0, 5)],
        [slice(0, 5)] * 3,
        [slice(0, 6), slice(0, 5)],
        [slice(-1, 5), slice(0, 5)],
        [slice(4, 3), slice(0, 5)],
        [slice(None, 3), slice(0, 5)],
        [slice(0, 5, 2), slice(0, 5)],
    ],
    ids=["too few", "too many", "beyond the end", "before the start", "backwards", "open", "with a step"],
)
def test_spans_are_one_a_row_and_inside(spans: list[slice]) -> None:
    with pytest.raises(InputError, match=r"spans must be 2 slices within columns 0 to 5, .*, got \[slice"):
        spans_of(spans, 2, 5)


def test_a_span_may_be_empty() -> None:
    spans = [slice(3, 3), slice(0, 5)]
    assert spans_of(spans, 2, 5) is spans


@pytest.mark.parametrize("last", [None, 3])
def test_ascending_positions_pass_with_gaps_too(last: int | None) -> None:
    check_ascending(np.array([4, 5, 90]), last)
    check_ascending(np.array([], dtype=np.int64), last)


@pytest.mark.parametrize(
    ("positions", "last"),
    [([9, 8], None), ([7, 7], 2), ([6, 9], 6), ([5], 6)],
    ids=["descending", "repeated", "repeats the last", "before the last"],
)
def test_other_positions_are_refused(positions: list[int], last: int | None) -> None:
    with pytest.raises(InputError, match=rf"must ascend .*, got \[{positions[0]}.*\]\.\.\. after {last}"):
        check_ascending(np.array(positions), last)
