"""What the layers of a step share: rows, their positions on the host, and when a step may be used again."""

from __future__ import annotations

import pytest
import torch

from kvtier.core.compose import policy
from kvtier.core.memory import Memory
from kvtier.core.step import Step
from kvtier.errors import InputError
from kvtier.testing.session_machine import small_layout
from kvtier.types import Budgets


def test_rows_hold_their_real_tokens_and_rows_without_any_are_left_out() -> None:
    positions = torch.tensor([[0, 0, 7, 8], [3, 4, 5, 6], [0, 0, 0, 0]])
    step = Step(positions, [slice(2, 4), slice(0, 4), slice(4, 4)], 3, 4)

    assert [(row.number, row.first, row.tokens, row.host.tolist()) for row in step.rows] == [
        (0, 7, 2, [[7, 8]]),
        (1, 3, 4, [[3, 4, 5, 6]]),
    ]
    assert [row.positions.tolist() for row in step.rows] == [[[7, 8]], [[3, 4, 5, 6]]]
    keys = torch.arange(3 * 2 * 4 * 5.0).view(3, 2, 4, 5)
    assert torch.equal(step.rows[0].of(keys), keys[:1, :, 2:])
    assert torch.equal(step.rows[1].of(keys), keys[1:2])


def test_rows_may_share_one_row_of_positions() -> None:
    step = Step(torch.tensor([[5, 6]]), None, 2, 2)

    assert [row.host.tolist() for row in step.rows] == [[[5, 6]]] * 2
    assert not any(row.whole for row in step.rows)


@pytest.mark.parametrize(("span", "whole"), [(None, True), (slice(0, 3), True), (slice(1, 3), False)], ids=str)
def test_a_row_is_whole_when_it_is_alone_and_has_no_padding(span: slice | None, whole: bool) -> None:
    (row,) = Step(torch.tensor([[5, 6, 7]]), None if span is None else [span], 1, 3).rows
    keys = torch.zeros(1, 2, 3, 4)

    assert row.whole == whole
    assert (row.of(keys) is keys) == whole


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="positions must be integers"):
        Step(torch.tensor([[5.0]]), None, 1, 1)
    with pytest.raises(InputError, match="spans must be 1 slices"):
        Step(torch.tensor([[5]]), [slice(0, 2)], 1, 1)


def test_positions_counted_up_in_place_are_read_anew() -> None:
    layout = small_layout()
    memory = Memory(layout, policy("full"), Budgets())
    positions = torch.tensor([[0]])
    with memory.session() as session:
        for step in range(70):
            for layer, shape in enumerate(layout.layers):
                size = (1, shape.num_kv_heads, 1)
                keys = torch.zeros(*size, shape.key_dim, dtype=torch.float64)
                values = torch.zeros(*size, shape.value_dim, dtype=torch.float64)
                session.append(layer, keys, values, positions)
            assert {sequence.last_position for sequence in session._batch.sequences} == {2 * step}
            positions += 2
        sequence = session._batch.rows[0][0]
        assert sequence.positions.view.tolist() == [list(range(0, 140, 2))]
    memory.close()
