"""Prefix reuse: the first token of a prompt that is computed, computed and published, or loaded from a store."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from benchmarks.registry import BenchmarkError
from benchmarks.timing import Competitor, Limits, contest

if TYPE_CHECKING:
    from rich.console import Console

    from kvtier.core.report import PrefixReport
    from kvtier.core.store import Store

__all__ = ["add_options", "run", "show"]

_STOCK: Final = "no store"
_QUICK: Final = {"contexts": (320,), "layers": 2, "hidden": 128, "rounds": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured: contexts in tokens, the size of a Llama, and how often."""

    contexts: tuple[int, ...] = (2048, 8192)
    layers: int = 8
    hidden: int = 1024
    rounds: int = 5
    dtype: str = "float32"
    folder: str | None = None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Contexts, model size, rounds, and where the store on disk lies."""
    parser.add_argument("--contexts", type=_numbers, help="tokens of the prompts, separated by commas")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--hidden", type=int, help="hidden size, a multiple of 64; a quarter of the heads are KV heads")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--folder", help="where the store on disk is made (default: the temporary directory)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every context."""
    given = {name: value for name in asdict(Settings()) if (value := getattr(options, name, None)) is not None}
    settings = Settings(**{**(_QUICK if options.quick else {}), **given})
    model = _model(settings)
    results = []
    for context in settings.contexts:
        print(f"prefix: {context} tokens", file=sys.stderr, flush=True)
        results.append(_measure(settings, model, context))
    return {"settings": asdict(settings), "results": results}


def show(result: Mapping[str, Any], console: Console) -> None:
    """One table."""
    from rich.table import Table

    table = Table(title="First token of a prompt", title_justify="left")
    for column in ("context", "what", "median s", "p10..p90 s", "tokens saved", "KV MiB", "restored at GB/s", "faster"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for case in result["results"]:
        for row in case["rows"]:
            table.add_row(
                str(case["context"]),
                row["name"],
                f"{row['median_s']:.3f}",
                f"{row['p10_s']:.3f}..{row['p90_s']:.3f}",
                str(row["tokens_saved"]),
                f"{case['kv_bytes'] / 2**20:.0f}",
                f"{row['restore_gb_per_s']:.2f}" if row["restore_gb_per_s"] else "",
                f"{row['faster']:.2f}x",
            )
        table.add_section()
    console.print(table)


def _measure(settings: Settings, model: Any, context: int) -> dict[str, Any]:
    """The competitors on one prompt, interleaved."""
    import kvtier

    prompt = torch.randint(3, 1000, (1, context), generator=torch.Generator().manual_seed(context))
    reports: dict[str, PrefixReport] = {}
    said: dict[str, list[int]] = {}
    kv_bytes = kvtier.KVLayout.of(model).token_bytes * context

    def first_token(name: str, store: Store | None) -> None:
        with kvtier.patch(model, "full", store=store) as handle:
            tokens = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=1, use_cache=True
            )
            said[name] = tokens[0, -1:].tolist()
            if store is not None:
                reports[name] = handle.report().prefix  # type: ignore[attr-defined]

    with _stores(settings, 2 * kv_bytes + (64 << 20)) as stores:

        def prepared(name: str, store: Store | None, *, empty: bool) -> Callable[[int], Callable[[], object]]:
            def prepare(_: int) -> Callable[[], object]:
                if store is not None:
                    store.flush()
                if store is not None and empty:
                    store.clear()
                elif store is not None and not store.stats().records:
                    first_token(name, store)
                    store.flush()
                return lambda: first_token(name, store)

            return prepare

        competitors = [Competitor(_STOCK, prepared(_STOCK, None, empty=False))]
        for kind, (cold, warm) in stores.items():
            for what, store, empty in ((f"{kind}: published", cold, True), (f"{kind}: loaded", warm, False)):
                competitors.append(Competitor(what, prepared(what, store, empty=empty)))
        limits = Limits(seconds=0.0, least=max(2, settings.rounds), most=max(2, settings.rounds), warm_up=1)
        timings = contest(competitors, limits=limits, between=lambda: None)
    if len({tuple(tokens) for tokens in said.values()}) != 1:
        raise BenchmarkError(f"the first tokens differ: {said}")
    rows = []
    for name, timing in timings.items():
        report = reports.get(name)
        seconds = report.restore_seconds if report is not None and report.tokens_saved else None
        rows.append(
            {
                "name": name,
                **asdict(timing),
                "tokens_saved": 0 if report is None else report.tokens_saved,
                "restore_gb_per_s": None if seconds is None else kv_bytes / seconds / 1e9,
                "faster": timings[_STOCK].median_s / timing.median_s,
            }
        )
    return {"context": context, "kv_bytes": kv_bytes, "rows": rows}


@contextmanager
def _stores(settings: Settings, capacity: int) -> Iterator[dict[str, tuple[Store, Store]]]:
    """Two stores of each kind: one that is emptied before each round, and one that keeps what it has."""
    import kvtier

    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory(dir=settings.folder)))
        tiers: dict[str, dict[str, Any]] = {
            "host": {"name": "host", "backend": "host", "capacity": 2 * capacity},
            "segment": {"name": "nvme", "backend": "segment", "capacity": 4 * capacity},
        }
        stores = {}
        for kind, tier in tiers.items():
            paths = [{"path": str(folder / f"{kind}-{use}")} if kind == "segment" else {} for use in ("cold", "warm")]
            cold, warm = (opened.enter_context(kvtier.open_store({"tiers": [tier | path]})) for path in paths)
            stores[kind] = cold, warm
        yield stores


def _model(settings: Settings) -> Any:
    """A random Llama of this size in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = settings.hidden // 64
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=settings.hidden,
        intermediate_size=3 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=max(settings.contexts) + 16,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(getattr(torch, settings.dtype)).eval()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))
