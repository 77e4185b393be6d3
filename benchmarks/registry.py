"""The benchmarks by name, and what a benchmark module provides."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["BENCHMARKS", "Benchmark", "BenchmarkError", "Entry", "load"]


class BenchmarkError(RuntimeError):
    """A benchmark refuses to give numbers, because they would compare what computes different things."""


class Benchmark(Protocol):
    """A benchmark module: its own options, one run to plain values, and the tables of such values."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the options that only this benchmark has."""

    def run(self, options: argparse.Namespace) -> dict[str, Any]:
        """Measure; ``settings`` and ``results``, plain values ready for JSON.

        Raises
        ------
        BenchmarkError
            When the numbers would mean nothing.
        """

    def show(self, result: Mapping[str, Any], console: Console) -> None:
        """Print what ``run`` returned, for a person."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a benchmark lives, imported when it is run, and one line about it."""

    module: str
    summary: str


BENCHMARKS: Final[Mapping[str, Entry]] = {
    "bandwidth": Entry("benchmarks.bandwidth", "how fast memory is read and copied, and the way between host and GPU"),
    "choices": Entry("benchmarks.choices", "which way of attending is the quickest for which shape"),
    "claims": Entry("benchmarks.claims", "published claims about policies beside ours, on a constructed model"),
    "decode": Entry(
        "benchmarks.decode", "one decode step: attention, whole model and session overhead, beside stock transformers"
    ),
    "engines": Entry("benchmarks.engines", "the POSIX I/O engine by number of threads, beside fio"),
    "kernels": Entry("benchmarks.kernels", "every operator by itself, as a share of what the memory gives"),
    "policies": Entry(
        "benchmarks.policies", "what stays of a prompt: time, bytes and agreement of each method, beside kvpress"
    ),
    "prefix": Entry("benchmarks.prefix", "the first token of a prompt that a store knows, beside one that is computed"),
    "store": Entry("benchmarks.store", "the record store: speed, integrity and scale, beside fio and other stores"),
}


def load(name: str) -> Benchmark:
    """The module of a benchmark."""
    return cast("Benchmark", importlib.import_module(BENCHMARKS[name].module))
