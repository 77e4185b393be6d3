"""``kvtier demo``: needles in a real long text, found under each policy, and the bytes and seconds that it took."""

from pathlib import Path
from typing import Annotated

import typer

from kvtier.cli.output import FINE, FOUND_WRONG, DebugFlag, JsonFlag, QuietFlag, Screen

__all__ = ["demo"]


def demo(
    document: Annotated[Path | None, typer.Option(help="UTF-8 text; by default the sources of Python itself.")] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a whole prompt.")] = 16384,
    needles: Annotated[int, typer.Option(min=1, help="Facts planted at spread depths, each asked for.")] = 8,
    policies: Annotated[str, typer.Option(help="Policies, separated by commas.")] = "full,snapkv,quest",
    device_bytes: Annotated[
        str | None, typer.Option(help="Device memory for the KV cache; by default a sixth of all of it.")
    ] = None,
    host_bytes: Annotated[
        str | None, typer.Option(help="Size of the host tier; by default room for everything.")
    ] = None,
    nvme: Annotated[Path | None, typer.Option(help="Directory of an NVMe tier.")] = None,
    keep: Annotated[int | None, typer.Option(help="Tokens kept per KV head; by default an eighth.")] = None,
    read: Annotated[int | None, typer.Option(help="Tokens read per step and KV head; by default a sixteenth.")] = None,
    seed: Annotated[int, typer.Option(help="Which facts, and where.")] = 0,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Find planted facts in a long text under each policy.

    Exit code 1 if a policy that promises exact attention gives other tokens than transformers, or misses a fact.
    """
    from kvtier.cli.demo_run import Settings, run_demo, split_policies
    from kvtier.cli.demo_table import to_dict, to_table
    from kvtier.cli.engine import quiet_transformers
    from kvtier.types import parse_bytes

    settings = Settings(
        document=document,
        context=context,
        needles=needles,
        policies=split_policies(policies),
        device=parse_bytes(device_bytes) if device_bytes is not None else None,
        host=parse_bytes(host_bytes) if host_bytes is not None else None,
        nvme=nvme,
        keep=keep,
        read=read,
        seed=seed,
    )
    with Screen(as_json=as_json, quiet=quiet, debug=debug) as screen, quiet_transformers(screen):
        result = run_demo(settings, screen)
        if screen.as_json:
            screen.emit(to_dict(result))
        else:
            screen.show(to_table(result))
        for complaint in result.complaints:
            screen.warn(complaint)
    raise typer.Exit(FOUND_WRONG if result.complaints else FINE)
