"""``kvtier generate``: a question about a document, or one more in a saved session, with the user's own model."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kvtier.cli.output import DebugFlag, JsonFlag, QuietFlag, Screen

__all__ = ["generate"]


class _DType(StrEnum):
    """Of the weights; ``auto`` is that of the files."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def generate(
    model: Annotated[Path, typer.Option(help="Local directory of a transformers model; nothing is downloaded.")],
    question: Annotated[str, typer.Option(help="The question; it follows the document.")],
    document: Annotated[Path | None, typer.Option(help="UTF-8 text file that the question is about.")] = None,
    session: Annotated[Path | None, typer.Option(help="Saved session to go on with, in place of a document.")] = None,
    save_session: Annotated[Path | None, typer.Option(help="File for the session as it is after the answer.")] = None,
    policy: Annotated[str, typer.Option(help="A name or composition: 'snapkv | quest'.")] = "full",
    keep: Annotated[int | None, typer.Option(help="Tokens kept per KV head.")] = None,
    read: Annotated[int | None, typer.Option(help="Tokens read per step and KV head.")] = None,
    device: Annotated[str | None, typer.Option(help="Most device memory, as 1GiB.")] = None,
    host: Annotated[str | None, typer.Option(help="Size of the host tier, as 8GiB.")] = None,
    nvme: Annotated[Path | None, typer.Option(help="Directory of the NVMe tier.")] = None,
    nvme_capacity: Annotated[str | None, typer.Option(help="Size of the NVMe tier, as 64GiB.")] = None,
    store: Annotated[Path | None, typer.Option(help="Directory that keeps prompts for the next run.")] = None,
    store_bytes: Annotated[str | None, typer.Option(help="Size of that directory at most; 8GiB by default.")] = None,
    tenant: Annotated[str, typer.Option(help="Whose prompts these are; others do not find them.")] = "default",
    dtype: Annotated[_DType, typer.Option(help="Type of weights and KV cache.")] = _DType.AUTO,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 256,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer while it is made.")] = False,
    sample: Annotated[bool, typer.Option("--sample", help="Sample, by the model's settings.")] = False,
    chat_template: Annotated[bool, typer.Option(help="Use the tokenizer's chat template if it has one.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of --sample.")] = 0,
    explain: Annotated[Path | None, typer.Option(help="Page to write: the document, what was kept and read.")] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Ask your own model about a long document, under a policy."""
    from kvtier.cli.engine import quiet_transformers
    from kvtier.cli.generate_inputs import Request, check_request, prepare
    from kvtier.cli.generate_run import answer, show
    from kvtier.cli.tiers import store_of
    from kvtier.types import parse_bytes

    request = Request(
        model=model,
        document=document,
        question=question,
        policy=policy,
        keep=keep,
        read=read,
        device=parse_bytes(device) if device is not None else None,
        store=store_of(host, nvme, nvme_capacity, prefixes=store, prefix_bytes=store_bytes),
        tenant=tenant,
        dtype=dtype.value,
        max_new_tokens=max_new_tokens,
        sample=sample,
        chat_template=chat_template,
        seed=seed,
        explain=explain,
        session=session,
        save_session=save_session,
    )
    text = check_request(request)
    with Screen(as_json=as_json, quiet=quiet, debug=debug) as screen, quiet_transformers(screen):
        loaded = prepare(request, text, screen)
        show(answer(request, loaded, screen, stream=stream), screen, stream=stream)
