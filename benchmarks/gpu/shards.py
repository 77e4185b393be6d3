"""Run tests in several processes, because kernels compile for most of it: ``python shards.py PATH OPTIONS...``."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

MOST: Final = 16


def collect(path: str, options: Sequence[str]) -> list[str]:
    """The names of the tests that pytest would run.

    Raises
    ------
    SystemExit
        With pytest's own words when it finds none.
    """
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *options, path]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return [line for line in done.stdout.splitlines() if "::" in line]


def run(tests: Sequence[str], options: Sequence[str], shards: int) -> int:
    """Share the tests out, print what each process said, and return the greatest exit code."""
    with ExitStack() as stack:
        running = []
        for shard in (tests[first::shards] for first in range(min(shards, len(tests)))):
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            command = [sys.executable, "-m", "pytest", "-q", *options, *shard]
            running.append((stack.enter_context(subprocess.Popen(command, stdout=log, stderr=log)), log))
        codes = []
        for process, log in running:
            codes.append(process.wait())
            log.seek(0)
            print(log.read())
    print(f"{len(tests)} tests in {len(codes)} processes: exit codes {codes}")
    return max(codes)


def main(arguments: Sequence[str]) -> int:
    """0 when all passed."""
    path, *options = arguments
    return run(collect(path, options), options, max(1, min(MOST, len(os.sched_getaffinity(0)))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
