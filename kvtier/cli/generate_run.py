"""The generation of ``kvtier generate``: the model under a policy, timed, and its report as numbers and as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from kvtier.cli.explain_page import write_page
from kvtier.cli.explain_text import pieces_of
from kvtier.cli.generate_inputs import check_length
from kvtier.cli.stopwatch import Stopwatch
from kvtier.cli.tiers import peak_bytes
from kvtier.errors import InputError
from kvtier.types import format_bytes

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from rich.table import Table

    from kvtier.cli.generate_inputs import Loaded, Request
    from kvtier.cli.output import Screen
    from kvtier.integrations.hf.cache import KVTierCache
    from kvtier.integrations.hf.patch import PatchHandle

__all__ = ["answer", "show", "summary_table"]

_SAMPLED: Final[dict[str, Any]] = {"do_sample": True}
# None: greedy decoding has no use for what the model's own settings say about sampling.
_GREEDY: Final[dict[str, Any]] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def answer(request: Request, loaded: Loaded, screen: Screen, *, stream: bool) -> dict[str, Any]:
    """Generate under the policy.

    Returns
    -------
    dict
        The answer, tokens, seconds and the session's report, ready for JSON.
    """
    import torch

    torch.manual_seed(request.seed)
    with screen.progress() as bars, _patched(request, loaded) as handle:
        cache, ids = _begin(request, loaded, handle)
        task = bars.add_task(f"{loaded.ids.shape[1]} tokens in, tokens out", total=request.max_new_tokens)
        listener = _printer(loaded.tokenizer) if stream else None
        watch = Stopwatch(listener=listener, on_token=lambda: bars.advance(task))
        output = loaded.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=request.max_new_tokens,
            streamer=watch,
            **(_SAMPLED if request.sample else _GREEDY),
        )
        if handle.store is not None:
            handle.store.flush()
        report = handle.report().to_dict()
        explanation = handle.explain() if request.explain is not None else None
        saved = _save(handle, cache, output, request.save_session) if request.save_session is not None else 0
    new = output[0, ids.shape[1] :]
    said = loaded.tokenizer.decode(new, skip_special_tokens=True)
    if explanation is not None and request.explain is not None:
        write_page(request.explain, explanation, pieces_of(loaded.tokenizer, loaded.text, loaded.ids[0]), said)
    return {
        "answer": said,
        "policy": request.policy,
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(new),
        "bytes": peak_bytes(report),
        "tokens_saved": (report["prefix"] or {}).get("tokens_saved", 0),
        "session_bytes": saved,
        "prefill_s": watch.prefill_s,
        "decode_tokens_per_s": watch.decode_tokens_per_s,
        "explain": None if request.explain is None else str(request.explain),
        "report": report,
    }


def show(summary: dict[str, Any], screen: Screen, *, stream: bool) -> None:
    """The summary as JSON; or as the answer, unless it was streamed, and a table."""
    if screen.as_json:
        screen.emit(summary)
    else:
        screen.show(*([] if stream else [summary["answer"]]), "", summary_table(summary))


def _patched(request: Request, loaded: Loaded) -> PatchHandle:
    from kvtier.integrations.hf.patch import patch

    return patch(
        loaded.model,
        loaded.policy,
        keep=request.keep,
        read=request.read,
        device=request.device,
        store=request.store,
        tenant=request.tenant,
        explain=request.explain is not None,
    )


def _begin(request: Request, loaded: Loaded, handle: PatchHandle) -> tuple[KVTierCache, torch.Tensor]:
    """An empty cache and the prompt [1, T], or those of a saved session with the new turn behind it."""
    import torch

    if request.session is None:
        return handle.new_cache(), loaded.ids
    cache = handle.restore(request.session)
    if cache.input_ids is None or cache.input_ids.shape[0] != 1:
        raise InputError(f"{request.session} must hold one row of token ids; go on with it by handle.restore()")
    ids = torch.cat([cache.input_ids.to(loaded.ids.device), loaded.ids], dim=1)
    check_length(loaded.model.config, ids.shape[1], request.max_new_tokens)
    return cache, ids


def _save(handle: PatchHandle, cache: KVTierCache, output: torch.Tensor, path: Path) -> int:
    """Write the session with all of ``output`` [1, T]; the model has not seen the last token yet. Bytes of the file."""
    import torch

    with torch.inference_mode():
        handle.model(input_ids=output[:, cache.get_seq_length() :], past_key_values=cache)
    return handle.save(path, cache)


def _printer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def summary_table(summary: dict[str, Any]) -> Table:
    """Two columns: what was measured, and how much."""
    from rich.table import Table

    table = Table(title=f"{summary['policy']}: what it took", title_justify="left", show_header=False, show_edge=False)
    table.add_row("prompt", f"{summary['prompt_tokens']} tokens")
    table.add_row("answer", f"{summary['new_tokens']} tokens")
    if summary["session_bytes"]:
        table.add_row("session saved", format_bytes(summary["session_bytes"]))
    for tier, count in summary["bytes"].items():
        table.add_row(f"KV cache on {tier}, peak", format_bytes(count))
    if (prefix := summary["report"]["prefix"]) is not None:
        _add_prefix(table, prefix)
    table.add_row("prefill", f"{summary['prefill_s']:.2f} s")
    table.add_row("decode", f"{summary['decode_tokens_per_s']:.1f} tokens/s")
    return table


def _add_prefix(table: Table, prefix: dict[str, Any]) -> None:
    """What the store saved, and what it has for the next run."""
    table.add_row("prompt found in the store", f"{prefix['tokens_matched']} tokens")
    table.add_row("prefill saved", f"{prefix['tokens_saved']} tokens, loaded in {prefix['restore_seconds']:.2f} s")
    table.add_row("first token after", f"{prefix['first_token_s']:.2f} s")
    taken = f"{prefix['chunks_published']} chunks"
    missed = f", {prefix['chunks_refused']} refused" if prefix["chunks_refused"] else ""
    table.add_row("published for the next run", taken + missed)
    if prefix["reason"]:
        table.add_row("why not more", prefix["reason"])
