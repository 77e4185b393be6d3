"""What kvikio can do here, as JSON: a script that ``kvtier doctor`` runs in a process of its own."""

import importlib
import json
import sys
import tempfile
from typing import Any

__all__ = ["main"]


def main(directory: str) -> dict[str, str]:
    """Write and read one page through kvikio, and report its mode.

    Raises
    ------
    Exception
        Whatever kvikio raises: the parent process reports the last line of the traceback.
    """
    import numpy as np

    kvikio: Any = importlib.import_module("kvikio")
    defaults: Any = importlib.import_module("kvikio.defaults")
    driver: Any = importlib.import_module("kvikio.cufile_driver")
    sent = np.arange(4096, dtype=np.uint8)
    received = np.zeros_like(sent)
    with tempfile.NamedTemporaryFile(prefix=".kvtier-doctor-", dir=directory) as file:
        with kvikio.CuFile(file.name, "w") as out:
            out.write(sent)
        with kvikio.CuFile(file.name, "r") as back:
            back.read(received)
    if not np.array_equal(sent, received):
        raise OSError("kvikio returned other bytes than were written")
    available = bool(driver.get("is_gds_available"))
    return {
        "version": str(kvikio.__version__),
        "compat_mode": getattr(defaults.get("compat_mode"), "name", "unknown"),
        "gds": "available" if available else "not available",
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
