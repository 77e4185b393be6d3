"""What the Triton kernels are compiled for ahead of time: types, shapes and options that launches give them."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from kvtier.kernels.column_sums.triton import column_sums_kernel
from kvtier.kernels.gather_attention.table import TILES, shape_of
from kvtier.kernels.gather_attention.triton import attend_kernel
from kvtier.kernels.merge_partials.triton import merge_kernel
from kvtier.kernels.page_scores.triton import box_scores_kernel
from kvtier.kernels.page_summaries.triton import page_bounds_kernel
from kvtier.kernels.tiles import padded

__all__ = ["VARIANTS", "Variant"]

_BYTES: Final = {"bf16": 2, "fp16": 2, "fp32": 4}


class Variant(NamedTuple):
    """A kernel with types and constants that a launch may give it: what is compiled ahead of time.

    ``pointers`` says by parameter what it points to: ``{"q_ptr": "bf16"}``.
    """

    name: str
    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int


def _attend(
    dtype: str,
    dims: tuple[int, int],
    *,
    rows: int = 4,
    paged: bool = True,
    positions: bool = False,
    windowed: bool = False,
    capped: bool = False,
    biased: bool = False,
    ragged: bool = False,
    tree: bool = False,
    unified: bool = False,
) -> Variant:
    """Attention of ``rows`` folded queries over keys."""
    element_bytes = _BYTES[dtype]
    tile = TILES[shape_of(rows=rows, padded_dim=padded(max(dims)), element_bytes=element_bytes)]
    words = ["pages" if paged else "run", dtype, f"{dims[0]}x{dims[1]}", f"{rows} rows"]
    options = {"positions": positions, "window": windowed, "softcap": capped}
    options |= {"bias": biased, "ragged": ragged, "tree": tree, "unified": unified}
    words += [word for word, on in options.items() if on]
    pointers = dict.fromkeys(("frames_ptr", "q_pos_ptr", "k_pos_ptr", "lengths_ptr", "ancestors_ptr"), "i64")
    pointers |= dict.fromkeys(("bias_ptr", "out_ptr", "lse_ptr"), "fp32")
    constants = {
        "P": 16 if paged else 1,
        "DK": dims[0],
        "DV": dims[1],
        "BLOCK_DK": padded(dims[0]),
        "BLOCK_DV": padded(dims[1]),
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.keys,
        "PAGED": paged,
        "POSITIONS": positions,
        "SKIP": tile.skip,
        "WINDOWED": windowed,
        "CAPPED": capped,
        "BIASED": biased,
        "RAGGED": ragged,
        "TREE": tree,
        "UNIFIED": unified,
        "UPCAST": False,
        "PRECISION": "tf32x3",
    }
    pointers |= dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), dtype)
    return Variant(" ".join(words), attend_kernel, pointers, constants, tile.warps, tile.stages)


def _column_sums(dtype: str, rows: int, *, positions: bool) -> Variant:
    constants = {
        "D": 128,
        "BLOCK_D": 128,
        "BLOCK_M": rows,
        "BLOCK_N": 64,
        "POSITIONS": positions,
        "WINDOWED": False,
        "CAPPED": False,
        "UPCAST": False,
        "PRECISION": "tf32x3",
    }
    pointers = dict.fromkeys(("lse_ptr", "sums_ptr"), "fp32") | dict.fromkeys(("q_pos_ptr", "k_pos_ptr"), "i64")
    pointers |= dict.fromkeys(("q_ptr", "k_ptr"), dtype)
    return Variant(f"{dtype} {rows} rows{' positions' * positions}", column_sums_kernel, pointers, constants, 8, 2)


def _merge(parts: int, dim: int) -> Variant:
    constants = {"D": dim, "BLOCK_D": padded(dim), "BLOCK_S": parts, "BLOCK_R": 2048 // padded(dim)}
    pointers = dict.fromkeys(("out_ptr", "lse_ptr", "merged_out_ptr", "merged_lse_ptr"), "fp32")
    return Variant(f"{parts} parts of {dim}", merge_kernel, pointers, constants, 4, 3)


def _box_scores(dtype: str) -> Variant:
    constants = {"G": 4, "D": 128, "BLOCK_D": 128, "BLOCK_N": 32, "REDUCTION": 1}
    pointers = dict.fromkeys(("q_ptr", "kmin_ptr", "kmax_ptr"), dtype) | {"scores_ptr": "fp32"}
    return Variant(f"{dtype} 128", box_scores_kernel, pointers, constants, 4, 3)


def _page_bounds(dtype: str) -> Variant:
    constants = {"P": 16, "D": 128, "BLOCK_P": 16, "BLOCK_D": 128}
    return Variant(
        f"{dtype} 16x128", page_bounds_kernel, dict.fromkeys(("k_ptr", "kmin_ptr", "kmax_ptr"), dtype), constants, 2, 3
    )


VARIANTS: Final[dict[str, tuple[Variant, ...]]] = {
    "column_sums": (_column_sums("bf16", 32, positions=False), _column_sums("fp32", 32, positions=True)),
    "gather_attention": (
        _attend("bf16", (128, 128)),
        _attend("fp16", (64, 64)),
        _attend("fp32", (128, 128)),
        _attend("bf16", (256, 256), rows=8, positions=True, windowed=True, capped=True),
        _attend("bf16", (128, 128), paged=False),
        _attend("fp32", (96, 128), paged=False, positions=True),
        _attend("bf16", (128, 128), rows=4096, paged=False, positions=True),
        _attend("fp32", (128, 128), rows=4096, paged=False, positions=True, windowed=True),
        _attend("bf16", (96, 96), rows=512, positions=True),
        _attend("bf16", (128, 128), biased=True, ragged=True),
        _attend("fp32", (128, 128), biased=True, ragged=True, tree=True),
        _attend("bf16", (128, 128), rows=256, paged=False, positions=True, tree=True),
        _attend("bf16", (128, 128), unified=True),
    ),
    "merge_partials": (_merge(16, 128), _merge(128, 64)),
    "page_scores": (_box_scores("bf16"), _box_scores("fp32")),
    "page_summaries": (_page_bounds("bf16"), _page_bounds("fp32")),
}
"""Compiled by `kvtier.kernels.aot`, operator by operator."""
