"""What kvikio can do here, as JSON: a script for a process of its own, since a broken driver hangs or kills it."""

import importlib
import json
import sys
import tempfile
from typing import Any

__all__ = ["main"]

_BYTES = (1 << 20) + 4096 + 1  # more than one task, and an end that is not aligned


def main(directory: str, *, cuda: bool = False) -> dict[str, object]:
    """Write and read a file through kvikio, from host memory and from a GPU if there is one, and report its mode.

    Raises
    ------
    Exception
        Whatever kvikio raises: the parent process reports the last line of the traceback.
    """
    import numpy as np

    kvikio: Any = importlib.import_module("kvikio")
    defaults: Any = importlib.import_module("kvikio.defaults")
    driver: Any = importlib.import_module("kvikio.cufile_driver")
    sent = np.arange(_BYTES, dtype=np.uint32).astype(np.uint8)
    received = np.zeros_like(sent)
    _round_trip(kvikio, directory, sent, received)
    if not np.array_equal(sent, received):
        raise OSError("kvikio returned other bytes than were written")
    if cuda:
        torch: Any = importlib.import_module("torch")
        on_device = torch.from_numpy(sent).cuda()
        back = torch.zeros_like(on_device)
        torch.cuda.synchronize()
        _round_trip(kvikio, directory, on_device, back)
        if not torch.equal(on_device, back):
            raise OSError("kvikio returned other bytes to the GPU than were written from it")
    mode = defaults.get("compat_mode")
    return {
        "version": str(kvikio.__version__),
        "compat_mode": getattr(mode, "name", str(mode)),
        "gds": bool(driver.get("is_gds_available")),
        "cuda": cuda,
    }


def _round_trip(kvikio: Any, directory: str, sent: object, received: object) -> None:
    """Write ``sent`` to a file of its own and read it into ``received``."""
    with tempfile.NamedTemporaryFile(prefix=".kvtier-probe-", dir=directory) as file:
        with kvikio.CuFile(file.name, "w") as out:
            out.write(sent)
        with kvikio.CuFile(file.name, "r") as back:
            back.read(received)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], cuda="cuda" in sys.argv[2:])) + "\n")
