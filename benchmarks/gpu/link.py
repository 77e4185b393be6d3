"""Make this checkout importable from a folder by links, where it is not installed: ``python link.py FOLDER``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
METADATA: Final = "Metadata-Version: 2.1\nName: kvtier\nVersion: {version}\n"
ENTRY_POINTS: Final = "[pytest11]\nkvtier = kvtier.testing.plugin\n"


def link(folder: Path) -> str:
    """Links and metadata in ``folder``, which must be on the path; says what was done."""
    found = importlib.util.find_spec("kvtier")
    if found is not None and found.origin is not None:
        origin = Path(found.origin).resolve()
        if origin == ROOT / "kvtier" / "__init__.py":
            return "kvtier is installed from this checkout"
    (folder / "kvtier").symlink_to(ROOT / "kvtier", target_is_directory=True)
    version = _version()
    metadata = folder / f"kvtier-{version}.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(METADATA.format(version=version), encoding="utf-8")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS, encoding="utf-8")
    return f"kvtier {version} is linked to this checkout"


def _version() -> str:
    """The version, without importing what may be missing."""
    for line in (ROOT / "kvtier" / "__init__.py").read_text(encoding="utf-8").splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise ValueError("kvtier/__init__.py names no __version__")


if __name__ == "__main__":
    print(link(Path(sys.argv[1])))
