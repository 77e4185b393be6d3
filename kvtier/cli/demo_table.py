"""The result of ``kvtier demo``: as JSON for programs, as a table for people."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvtier.cli.demo_row import PER_QUESTION, STOCK, Row
from kvtier.types import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

    from kvtier.cli.demo_run import DemoResult

__all__ = ["to_dict", "to_table"]

_TIERS: Final = {"device": "device", "host": "host", "nvme": "NVMe"}
_CAPTION: Final = (
    "device, host, NVMe: the most KV bytes each tier held, measured\n"
    "prefill: the text through the model, once and then forked, or for each question\n"
    "1st token: mean time from a question to the first token of its answer\n"
    "same: generated tokens that are those of transformers with its own cache"
)


def to_dict(result: DemoResult) -> dict[str, Any]:
    """Plain values; rows by the name of their policy, the stock cache beside them."""
    stock, *rows = result.rows
    return {
        "context_tokens": result.scene.document.context,
        "needles": len(result.scene.document.needles),
        "policies": {row.name: _row_dict(row, result) for row in rows},
        "stock": _row_dict(stock, result),
        "kv_bytes": result.scene.kv_bytes,
        "device_bytes": result.device_bytes,
        "model": "induction model, weights set by hand",
        "document": result.scene.source,
        "machine": _machine(),
        "wrong": result.complaints,
    }


def _row_dict(row: Row, result: DemoResult) -> dict[str, Any]:
    return {
        "found": row.found,
        "recall": row.found / len(result.scene.document.needles),
        "agreement": row.agreement,
        "bytes": dict(row.bytes),
        "prefill_s": row.prefill_s,
        "first_token_s": row.first_token_s,
        "decode_tokens_per_s": row.decode_tokens_per_s,
        "prefill": row.prefill,
        "lossless": row.lossless,
    }


def to_table(result: DemoResult) -> Table:
    """One row a cache; the title says what ran on what. Fits in 80 columns."""
    from rich import box
    from rich.table import Table

    scene = result.scene
    title = (
        f"{len(scene.document.needles)} needles in {scene.document.context} tokens of {scene.source}\n"
        f"induction model (a small Llama set by hand, not trained), fp32\n"
        f"on {_machine()}\n"
        f"whole KV cache {format_bytes(scene.kv_bytes)}, device budget {format_bytes(result.device_bytes)}"
    )
    table = Table(
        title=title, caption=_CAPTION, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    tiers = [tier for tier in _TIERS if tier != "nvme" or any(row.bytes[tier] for row in result.rows)]
    table.add_column("policy", no_wrap=True)
    for column in ("found", *(_TIERS[tier] for tier in tiers), "prefill", "1st token", "tok/s", "same"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in result.rows:
        table.add_row(*_cells(row, tiers, len(scene.document.needles)))
        if row.name == STOCK:
            table.add_section()
    return table


def _cells(row: Row, tiers: list[str], needles: int) -> list[str]:
    again = row.prefill == PER_QUESTION
    return [
        row.name,
        f"{row.found}/{needles}",
        *(format_bytes(row.bytes[tier]) if row.bytes[tier] else "-" for tier in tiers),
        f"{needles} x {row.prefill_s:.1f} s" if again else f"{row.prefill_s:.1f} s once",
        f"{row.first_token_s:.2f} s",
        f"{row.decode_tokens_per_s:.1f}",
        f"{row.agreement:.0%}",
    ]


def _machine() -> str:
    """The processor and the torch that ran, in a few words."""
    import torch

    return f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _processor() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
