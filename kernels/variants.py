"""What the Triton kernels are compiled for ahead of time: types, shapes and options that launches give them."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch

from kvtier.kernels.column_sums.triton import column_sums_kernel
from kvtier.kernels.encoded_attention.formats import BitPlanes, BlockFormat, Fp8, Int8, KiviKeys, KiviValues, Kv4
from kvtier.kernels.encoded_attention.side import Side, cut_blocks
from kvtier.kernels.encoded_attention.triton import encoded_kernel
from kvtier.kernels.gather_attention.table import SPLITS, TILES, shape_of
from kvtier.kernels.gather_attention.triton import attend_kernel
from kvtier.kernels.lowrank_keys.triton import lowrank_keys_kernel
from kvtier.kernels.lowrank_keys.triton import tile as lowrank_tile
from kvtier.kernels.merge_partials.triton import merge_kernel
from kvtier.kernels.pack_pages.triton import pages_kernel
from kvtier.kernels.page_scores.triton import (
    box_scores_kernel,
    landmark_scores_kernel,
    plane_scores_kernel,
    plane_tile,
)
from kvtier.kernels.page_summaries.triton import page_bounds_kernel, page_landmarks_kernel, page_planes_kernel
from kvtier.kernels.prefix_attention.programs import Task
from kvtier.kernels.prefix_attention.programs import tile as prefix_tile
from kvtier.kernels.prefix_attention.triton import merge_requests_kernel, merge_rows, prefix_attention_kernel
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


def _encoded(
    dtype: str, k_format: BlockFormat, v_format: BlockFormat, *, rows: int = 4, positions: bool = False
) -> Variant:
    """Attention of ``rows`` folded queries over 32K keys in blocks on a chip of 132 multiprocessors."""
    k_side, v_side = Side.of(k_format), Side.of(v_format)
    if k_side is None or v_side is None:
        raise ValueError(f"the kernel does not serve {k_format} and {v_format}")
    tile = cut_blocks(k_side, v_side, heads=8, rows=rows, keys=32768, processors=132, splits=SPLITS).tile
    words = [_told(k_format), _told(v_format), dtype, f"{k_format.dim}x{v_format.dim}", f"{rows} rows"]
    scales = {torch.float16: "fp16", torch.float32: "fp32"}
    pointers = {"q_ptr": dtype, "k_ptr": "u8", "v_ptr": "u8", "frames_ptr": "i64", "out_ptr": "fp32", "lse_ptr": "fp32"}
    pointers |= {"k_scales_ptr": scales[k_format.scale_dtype], "v_scales_ptr": scales[v_format.scale_dtype]}
    pointers |= {"q_pos_ptr": "i64", "k_pos_ptr": "i64", "lengths_ptr": "i64"}
    constants = {
        "K": k_side,
        "V": v_side,
        "P": k_format.slots,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.keys,
        "POSITIONS": positions,
        "RAGGED": positions,
        "WINDOWED": positions,
        "CAPPED": positions,
        "EXACT": dtype == "bf16" and not k_side.by_channel,
        "UPCAST": False,
        "PRECISION": "tf32x3",
    }
    return Variant(
        " ".join(words) + " positions" * positions, encoded_kernel, pointers, constants, tile.warps, tile.stages
    )


def _told(layout: BlockFormat) -> str:
    return layout.name.replace(" ", "-") + (f"-{layout.bits}" if layout.has_minima else "")


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


def _lowrank_keys(dtype: str, rank: int, dim: int, turned: int) -> Variant:
    cut = lowrank_tile(rank=rank, dim=dim, element_bytes=_BYTES[dtype])
    pointers = dict.fromkeys(("u_ptr", "sv_ptr", "keys_ptr"), dtype) | dict.fromkeys(("cos_ptr", "sin_ptr"), "fp32")
    pointers |= dict.fromkeys(("positions_ptr", "pages_ptr"), "i64")
    constants = {
        "P": 8,
        "RANK": rank,
        "D": dim,
        "HALF": turned // 2,
        "BLOCK_N": cut.tokens,
        "BLOCK_R": cut.ranks,
        "BLOCK_C": cut.pairs,
        "UPCAST": False,
        "PRECISION": "tf32x3",
    }
    name = f"{dtype} rank {rank} to {dim}{f', {turned} turn' * (turned < dim)}"
    return Variant(name, lowrank_keys_kernel, pointers, constants, cut.warps, cut.stages)


def _merge(parts: int, dim: int) -> Variant:
    constants = {"D": dim, "BLOCK_D": padded(dim), "BLOCK_S": parts, "BLOCK_R": 2048 // padded(dim)}
    pointers = dict.fromkeys(("out_ptr", "lse_ptr", "merged_out_ptr", "merged_lse_ptr"), "fp32")
    return Variant(f"{parts} parts of {dim}", merge_kernel, pointers, constants, 4, 3)


def _box_scores(dtype: str) -> Variant:
    constants = {"G": 4, "D": 128, "BLOCK_D": 128, "BLOCK_N": 32, "REDUCTION": 1}
    pointers = dict.fromkeys(("q_ptr", "kmin_ptr", "kmax_ptr"), dtype) | {"scores_ptr": "fp32"}
    return Variant(f"box {dtype} 128", box_scores_kernel, pointers, constants, 4, 3)


def _landmark_scores(dtype: str) -> Variant:
    constants = {"G": 4, "D": 128, "BLOCK_D": 128, "BLOCK_N": 32, "REDUCTION": 1}
    pointers = dict.fromkeys(("q_ptr", "marks_ptr"), dtype) | {"scores_ptr": "fp32"}
    return Variant(f"landmark {dtype} 128", landmark_scores_kernel, pointers, constants, 4, 3)


def _plane_scores(dtype: str, slots: int) -> Variant:
    constants = {"G": 4, "D": 128, "P": slots, "PLANES": 2, "BLOCK_D": 128, "BLOCK_P": slots, "REDUCTION": 2}
    constants["BLOCK_N"], warps = plane_tile(128, slots)
    pointers = dict.fromkeys(("q_ptr", "kmin_ptr", "kmax_ptr"), dtype) | {"planes_ptr": "u8", "scores_ptr": "fp32"}
    return Variant(f"2 planes {dtype} {slots}x128", plane_scores_kernel, pointers, constants, warps, 3)


def _pages(word: str, *, pack: bool) -> Variant:
    constants = {"KEYS": 2048, "VALUES": 2048, "BLOCK": 4096, "PACK": pack}
    pointers = dict.fromkeys(("k_ptr", "v_ptr", "rows_ptr"), word) | {"frames_ptr": "i64"}
    return Variant(f"{'pack' if pack else 'unpack'} {word} 16x128", pages_kernel, pointers, constants, 4, 3)


def _page_bounds(dtype: str) -> Variant:
    constants = {"P": 16, "D": 128, "BLOCK_P": 16, "BLOCK_D": 128}
    pointers = dict.fromkeys(("k_ptr", "kmin_ptr", "kmax_ptr"), dtype)
    return Variant(f"bounds {dtype} 16x128", page_bounds_kernel, pointers, constants, 2, 3)


def _page_landmarks(dtype: str) -> Variant:
    constants = {"P": 16, "D": 128, "BLOCK_P": 16, "BLOCK_D": 128}
    pointers = dict.fromkeys(("k_ptr", "mean_ptr"), dtype)
    return Variant(f"landmarks {dtype} 16x128", page_landmarks_kernel, pointers, constants, 2, 3)


def _page_planes(dtype: str) -> Variant:
    constants = {"P": 16, "D": 128, "BITS": 4, "BLOCK_P": 16, "BLOCK_W": 16}
    pointers = dict.fromkeys(("k_ptr", "kmin_ptr", "kmax_ptr"), dtype) | {"planes_ptr": "u8"}
    return Variant(f"4 planes {dtype} 16x128", page_planes_kernel, pointers, constants, 2, 3)


def _prefix_attention(dtype: str, dims: tuple[int, int], *, rows: int, capped: bool = False) -> Variant:
    """Attention of ``rows`` folded queries that share a prefix in pages of 16 slots."""
    cut = prefix_tile(rows=rows, dim=max(dims), element_bytes=_BYTES[dtype])
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), dtype) | dict.fromkeys(("out_ptr", "lse_ptr"), "fp32")
    pointers |= dict.fromkeys(("prefix_ptr", "own_ptr"), "i64")
    pointers |= dict.fromkeys(("tasks_ptr", "order_ptr", "parts_ptr"), "i32")
    constants = {
        "P": 16,
        "DK": dims[0],
        "DV": dims[1],
        "BLOCK_DK": padded(dims[0]),
        "BLOCK_DV": padded(dims[1]),
        "BLOCK_M": cut.rows,
        "BLOCK_N": cut.keys,
        "FIELDS": len(Task._fields),
        "CAPPED": capped,
        "UPCAST": False,
        "PRECISION": "tf32x3",
    }
    name = f"{dtype} {dims[0]}x{dims[1]} {rows} rows{' softcap' * capped}"
    return Variant(name, prefix_attention_kernel, pointers, constants, cut.warps, cut.stages)


def _merge_requests(dim: int) -> Variant:
    constants = {"DV": dim, "BLOCK_DV": padded(dim), "BLOCK_R": merge_rows(dim)}
    pointers = dict.fromkeys(("out_ptr", "lse_ptr", "merged_out_ptr", "merged_lse_ptr"), "fp32")
    return Variant(f"merge of {dim}", merge_requests_kernel, pointers | {"parts_ptr": "i32"}, constants, 4, 3)


VARIANTS: Final[dict[str, tuple[Variant, ...]]] = {
    "column_sums": (_column_sums("bf16", 32, positions=False), _column_sums("fp32", 32, positions=True)),
    "encoded_attention": (
        _encoded("bf16", KiviKeys(slots=64, dim=128, group=64), KiviValues(slots=64, dim=128, group=64)),
        _encoded("fp16", KiviKeys(slots=128, dim=128, bits=2), KiviValues(slots=128, dim=128, bits=2)),
        _encoded("bf16", KiviKeys(slots=64, dim=128, group=64), Kv4(slots=64, dim=128), rows=4096, positions=True),
        _encoded("bf16", BitPlanes(slots=64, dim=128, planes=4), Kv4(slots=64, dim=128)),
        _encoded("bf16", Int8(slots=64, dim=256), Int8(slots=64, dim=256), positions=True),
        _encoded("fp32", Fp8(slots=16, dim=64), Fp8(slots=16, dim=64)),
    ),
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
    "lowrank_keys": (
        _lowrank_keys("bf16", 160, 128, 128),
        _lowrank_keys("fp16", 64, 64, 64),
        _lowrank_keys("fp32", 160, 128, 128),
        _lowrank_keys("bf16", 160, 128, 64),
        _lowrank_keys("bf16", 320, 256, 256),
        _lowrank_keys("fp32", 320, 256, 64),
    ),
    "merge_partials": (_merge(16, 128), _merge(128, 64)),
    "pack_pages": (_pages("i16", pack=True), _pages("i16", pack=False)),
    "page_scores": (
        _box_scores("bf16"),
        _box_scores("fp32"),
        _landmark_scores("bf16"),
        _plane_scores("bf16", 16),
        _plane_scores("fp32", 64),
    ),
    "page_summaries": (_page_bounds("bf16"), _page_bounds("fp32"), _page_landmarks("bf16"), _page_planes("bf16")),
    "prefix_attention": (
        _prefix_attention("bf16", (128, 128), rows=4),
        _prefix_attention("bf16", (128, 128), rows=32),
        _prefix_attention("bf16", (128, 128), rows=256),
        _prefix_attention("fp16", (64, 64), rows=256),
        _prefix_attention("fp32", (128, 128), rows=4),
        _prefix_attention("fp32", (64, 64), rows=256),
        _prefix_attention("bf16", (256, 256), rows=256, capped=True),
        _prefix_attention("bf16", (256, 256), rows=8, capped=True),
        _merge_requests(128),
    ),
}
"""Compiled by `kvtier.kernels.aot`, operator by operator."""
