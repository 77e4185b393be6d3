"""Settings of the tiers: from a dict, a TOML file or the environment; an unknown key is an error."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from kvtier.errors import ConfigError
from kvtier.types import parse_bytes

__all__ = ["StoreConfig", "TierConfig", "load_config"]

Bytes = Annotated[int, BeforeValidator(parse_bytes)]

_ENV_PREFIX = "KVTIER_"


class TierConfig(BaseModel):
    """One tier below the device.

    Parameters
    ----------
    name : "host" | "nvme"
        Its place in the order of tiers.
    backend : str
        Name of a storage backend: ``"host"`` (memory) or ``"spill"`` (one preallocated file).
    capacity : int or str
        Bytes, or a size such as ``"8GiB"``.
    path : Path, optional
        Directory of the file, for backends on disk.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["host", "nvme"]
    backend: str
    capacity: Bytes
    path: Path | None = None

    @model_validator(mode="after")
    def _path_fits_backend(self) -> TierConfig:
        if self.backend == "host" and self.path is not None:
            raise ValueError("a tier in host memory takes no path")
        if self.backend == "spill" and self.path is None:
            raise ValueError("a spill tier needs path, the directory of its file")
        return self


class StoreConfig(BaseModel):
    """The tiers below the device, fastest first, and the size of pages.

    Parameters
    ----------
    tiers : tuple of TierConfig
        At most one of each name, ``host`` before ``nvme``.
    page_tokens, block_tokens : int
        Slots of a page, and tokens sealed together (a multiple of a page).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tiers: tuple[TierConfig, ...] = ()
    page_tokens: int = Field(default=16, ge=1)
    block_tokens: int = Field(default=64, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> StoreConfig:
        names = [tier.name for tier in self.tiers]
        if names not in ([], ["host"], ["nvme"], ["host", "nvme"]):
            raise ValueError(f"tiers must be host, nvme or host then nvme, got {', '.join(names)}")
        if self.block_tokens % self.page_tokens:
            raise ValueError(
                f"block_tokens must be a multiple of page_tokens ({self.page_tokens}), got {self.block_tokens}"
            )
        return self


def load_config(source: StoreConfig | Mapping[str, Any] | str | Path | None) -> StoreConfig:
    """Settings from a ready value, a dict, a path to TOML, or None for the default.

    The default is one host tier of half of the memory that is free now. Environment variables override top-level keys
    of a dict or a file: ``KVTIER_PAGE_TOKENS=32``.

    Raises
    ------
    ConfigError
        Naming the key, what it allows and what it got.
    """
    if isinstance(source, StoreConfig):
        return source
    if source is None:
        values: dict[str, Any] = {"tiers": [{"name": "host", "backend": "host", "capacity": _half_of_free_memory()}]}
    elif isinstance(source, Mapping):
        values = dict(source)
    elif isinstance(source, str | Path):
        values = _read_toml(Path(source))
    else:
        raise ConfigError(
            f"store must be a StoreConfig, a dict, a path to a TOML file or None, got {type(source).__name__}"
        )
    for key in ("page_tokens", "block_tokens"):
        if (text := os.environ.get(_ENV_PREFIX + key.upper())) is not None:
            values[key] = text
    try:
        return StoreConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(problem) for problem in error.errors())) from None


def _explain(problem: Any) -> str:
    where = ".".join(str(part) for part in problem["loc"]) or "configuration"
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key; allowed: {', '.join(_keys_at(problem['loc']))}"
    return f"{where}: {problem['msg']}, got {problem['input']!r}"


def _keys_at(location: tuple[Any, ...]) -> list[str]:
    model: type[BaseModel] = TierConfig if location and location[0] == "tiers" else StoreConfig
    return sorted(model.model_fields)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _half_of_free_memory() -> int:
    return max(1, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
