"""Every operator by itself, and a whole quest step: bytes read a second, as a share of what the memory gives."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.kernels import measure
from benchmarks.kernels.operators import OPERATORS
from benchmarks.kernels.settings import settings_of
from benchmarks.kernels.table import table
from benchmarks.options import contexts, words

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["add_options", "run", "show"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Device, contexts, dtypes and operators."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where; a GPU when there is one")
    parser.add_argument("--contexts", type=contexts(measure.LEAST_CONTEXT), help="keys, separated by commas")
    parser.add_argument("--dtypes", type=words("float32", "bfloat16", "float16"), help="of keys, values and queries")
    folders = dict.fromkeys(operator.folder for operator in OPERATORS.values())
    parser.add_argument("--operators", type=words(*folders, measure.SESSION), help="folders below kernels/, or quest")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every operator in every case."""
    settings = settings_of(options)
    torch.manual_seed(settings.seed)
    measure.check_all(settings)
    results = []
    for dtype in settings.dtypes:
        for context in settings.contexts:
            print(f"kernels: {context} keys, {dtype}", file=sys.stderr, flush=True)
            results.append({"context": context, "dtype": dtype, **measure.case(settings, context, dtype)})
    return {"settings": asdict(settings), "device": measure.device_name(settings), "results": results}


def show(result: Mapping[str, Any], console: Console) -> None:
    """One table, a section a case."""
    console.print(table(result))
