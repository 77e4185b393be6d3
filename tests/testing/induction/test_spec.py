"""The spec of the induction model: what it refuses, and where it puts what."""

import pytest

from kvtier.errors import ConfigError
from kvtier.testing.induction import InductionSpec
from kvtier.testing.induction.codes import assign_codes


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_layers": 1}, "num_layers of at least 2, got 1"),
        ({"num_query_heads": 3}, "multiple of num_kv_heads, got 3 and 2"),
        ({"head_dim": 63}, "head_dim must be even and at least 2, got 63"),
        ({"hot": 0}, "hot must be at least 1, got 0"),
        ({"match_gain": 0.0}, "match_gain must be positive and finite, got 0"),
        ({"rope_theta": float("inf")}, "rope_theta must be positive and finite, got inf"),
        ({"max_positions": 2}, "at least 4 RoPE pairs must turn"),
        ({"needle_dims": 3}, r"needle_dims must be at least hot \(4\), got 3"),
        ({"rope_theta": 1e6}, r"document_dims must be at least hot \(4\)"),
        ({"max_words": 40000}, "max_words must be at most 35960"),
    ],
)
def test_refuses_what_cannot_be_built(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InductionSpec(**wrong)  # type: ignore[arg-type]  # a dict of settings, one of them wrong on purpose


@pytest.mark.parametrize("layers", [2, 3, 4, 7])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_one_previous_token_head_before_one_match_head(layers: int, kv_heads: int) -> None:
    spec = InductionSpec(num_layers=layers, num_query_heads=kv_heads, num_kv_heads=kv_heads)
    roles = {(layer, head): spec.role(layer, head) for layer in range(layers) for head in range(kv_heads)}

    assert [place for place, role in roles.items() if role == "previous"] == [(0, 0)]
    assert [place for place, role in roles.items() if role == "match"] == [(layers // 2, kv_heads - 1)]
    assert layers // 2 > 0


def test_words_stand_in_pairs_that_hardly_turn() -> None:
    spec = InductionSpec()

    assert spec.fast_pairs == 8
    assert (spec.code_dims, spec.document_dims, spec.needle_dims) == (48, 32, 16)
    assert spec.inv_freq[spec.fast_pairs] * spec.max_positions < spec.slow_turn
    assert spec.inv_freq[spec.fast_pairs - 1] * spec.max_positions >= spec.slow_turn


def test_every_word_has_a_code_of_its_own_in_its_own_channel() -> None:
    spec = InductionSpec()
    flags = [index % 50 == 0 for index in range(30000)]
    codes = assign_codes(spec, flags)

    assert len(set(codes)) == len(codes)
    assert all(len(set(code)) == spec.hot for code in codes)
    document = {dim for code, needle in zip(codes, flags, strict=True) if not needle for dim in code}
    needles = {dim for code, needle in zip(codes, flags, strict=True) if needle for dim in code}
    assert document == set(range(spec.document_dims))
    assert needles == set(range(spec.document_dims, spec.code_dims))


def test_more_words_than_codes_are_refused() -> None:
    with pytest.raises(ConfigError, match="1821 needle words need as many codes, 4 hot dimensions give 1820"):
        assign_codes(InductionSpec(), [True] * 1821)
