"""Run a benchmark: ``python benchmarks/run.py decode --quick``; ``--list`` names them all."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
SCHEMA: Final = 1


def _make_importable() -> None:
    """Let ``import benchmarks`` find this folder; neither it nor the root is on sys.path: ``kernels/`` shadows."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
    if "benchmarks" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        "benchmarks", HERE / "__init__.py", submodule_search_locations=[str(HERE)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import the benchmarks in {HERE}")
    package = importlib.util.module_from_spec(spec)
    sys.modules["benchmarks"] = package
    spec.loader.exec_module(package)


_make_importable()

from benchmarks import registry  # noqa: E402 - after the package can be found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 0 fine, 1 the numbers were refused, 2 bad use."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=__doc__)
    parser.add_argument("name", nargs="?", choices=sorted(registry.BENCHMARKS), help="which benchmark")
    parser.add_argument("--list", action="store_true", help="name the benchmarks and stop")
    parser.add_argument(
        "--json", type=_new_file, metavar="FILE", help="write the result with machine and versions there"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, in seconds: shows that it runs, measures nothing"
    )
    known, _ = parser.parse_known_args([word for word in words if word not in ("-h", "--help")])
    if known.list:
        for name, entry in registry.BENCHMARKS.items():
            print(f"{name:12} {entry.summary}")
        return 0
    if known.name is None:
        parser.parse_args(words)
        parser.error(f"name a benchmark: {', '.join(registry.BENCHMARKS)}")
    benchmark = registry.load(known.name)
    benchmark.add_options(parser)
    return _run(known.name, benchmark, parser.parse_args(words))


def _new_file(text: str) -> Path:
    """A path that can be written once the measurement is over."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {path.parent} must exist")
    return path


def _run(name: str, benchmark: registry.Benchmark, options: argparse.Namespace) -> int:
    from rich.console import Console

    from benchmarks import machine

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    found = machine.describe()
    console.print(machine.line(found))
    if found["load_average"] > machine.QUIET_LOAD and not options.quick:
        print(
            f"note: load average {found['load_average']:.1f}: other programs run, so this is no result", file=sys.stderr
        )
    started, clock = datetime.now(UTC), time.perf_counter()
    try:
        measured = benchmark.run(options)
    except registry.BenchmarkError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1
    result: dict[str, Any] = {
        "benchmark": name,
        "schema": SCHEMA,
        "quick": options.quick,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - clock, 1),
        "machine": found,
        **measured,
    }
    benchmark.show(result, console)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
