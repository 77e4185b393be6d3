"""``python -m kvtier.cli``: the command line without the installed script."""

import sys

from kvtier.cli.main import run

if __name__ == "__main__":
    sys.exit(run())
