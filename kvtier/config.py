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

__all__ = ["Durability", "StoreConfig", "TenantConfig", "TierConfig", "load_config"]

Durability = Literal["durable", "relaxed"]

Bytes = Annotated[int, BeforeValidator(parse_bytes)]

_ENV_PREFIX = "KVTIER_"
_FROM_ENVIRONMENT = ("page_tokens", "block_tokens", "chunk_tokens", "durability")
_ON_DISK = {"segment": "segments", "files": "records", "spill": "file"}


class TierConfig(BaseModel):
    """One tier below the device.

    Parameters
    ----------
    name : "host" | "nvme"
        Its place in the order of tiers.
    backend : str
        ``"host"`` (memory), ``"segment"`` (a log of segment files), ``"files"`` (a file per record, for shared file
        systems), ``"spill"`` (one file that only live sessions use), or the name of an installed storage backend.
    capacity : int or str
        Bytes, or a size such as ``"8GiB"``.
    path : Path, optional
        Directory, for backends on disk.
    segment_bytes : int or str, optional
        Bytes of a segment file; by default a gibibyte, and never more than an eighth of the capacity.
    sessions : int or str, optional
        Bytes of a ``"host"`` tier that live sessions take once a model is patched over the store; by default half.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["host", "nvme"]
    backend: str
    capacity: Bytes
    path: Path | None = None
    segment_bytes: Bytes | None = None
    sessions: Bytes | None = None

    @model_validator(mode="after")
    def _fits_backend(self) -> TierConfig:
        if self.backend == "host" and self.path is not None:
            raise ValueError("a tier in host memory takes no path")
        if self.backend in _ON_DISK and self.path is None:
            raise ValueError(f"a {self.backend} tier needs path, the directory of its {_ON_DISK[self.backend]}")
        if self.segment_bytes is not None and self.backend != "segment":
            raise ValueError(f"segment_bytes is for the segment backend, got backend {self.backend}")
        if self.sessions is not None and self.backend != "host":
            raise ValueError(f"sessions is for the host backend, got backend {self.backend}")
        if self.sessions is not None and self.sessions >= self.capacity:
            raise ValueError(f"sessions must be less than capacity ({self.capacity}), got {self.sessions}")
        return self


class TenantConfig(BaseModel):
    """Whose data a store holds, beyond the tenant's name.

    Parameters
    ----------
    salt : str, optional
        Secret that keys everything of the tenant; by default a digest of its name. With another salt nothing that was
        stored is found again.
    quota : int or str, optional
        Most bytes of the tenant in each tier.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    salt: str | None = Field(default=None, min_length=1, repr=False)
    quota: Bytes | None = None


class StoreConfig(BaseModel):
    """The tiers below the device, fastest first, and what they promise.

    Parameters
    ----------
    tiers : tuple of TierConfig
        At most one of each name, ``host`` before ``nvme``.
    page_tokens, block_tokens : int
        Slots of a page, and tokens sealed together (a multiple of a page).
    chunk_tokens : int, optional
        Tokens under one key of a prefix (a multiple of a block); by default what the layout says.
    durability : "durable" | "relaxed"
        Whether a put returns only when its bytes survive a power loss.
    tenants : dict of str to TenantConfig
        Salts and quotas; a tenant that is not named has neither.
    read_only : bool
        Serve what is stored and change nothing on disk.
    publish_bytes : int or str
        Most bytes that wait to be put in the background.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tiers: tuple[TierConfig, ...] = ()
    page_tokens: int = Field(default=16, ge=1)
    block_tokens: int = Field(default=64, ge=1)
    chunk_tokens: int | None = Field(default=None, ge=1)
    durability: Durability = "durable"
    tenants: dict[str, TenantConfig] = Field(default_factory=dict)
    read_only: bool = False
    publish_bytes: Bytes = 1 << 30

    @model_validator(mode="after")
    def _ordered(self) -> StoreConfig:
        names = [tier.name for tier in self.tiers]
        if names not in ([], ["host"], ["nvme"], ["host", "nvme"]):
            raise ValueError(f"tiers must be host, nvme or host then nvme, got {', '.join(names)}")
        for big, small in (("block_tokens", "page_tokens"), ("chunk_tokens", "block_tokens")):
            size, unit = getattr(self, big), getattr(self, small)
            if size is not None and size % unit:
                raise ValueError(f"{big} must be a multiple of {small} ({unit}), got {size}")
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
    for key in _FROM_ENVIRONMENT:
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
    inner: dict[Any, type[BaseModel]] = {"tiers": TierConfig, "tenants": TenantConfig}
    return sorted(inner.get(location[0] if len(location) > 1 else None, StoreConfig).model_fields)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _half_of_free_memory() -> int:
    return max(1, os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
