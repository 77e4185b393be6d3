"""A cache in a file, and back: its session, and the tokens, padding and positions that it was fed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kvtier.core.session import Session
from kvtier.errors import RecordFormatError, SessionStateError
from kvtier.integrations.hf.columns import Columns
from kvtier.integrations.hf.history import History
from kvtier.integrations.hf.state import CacheState

if TYPE_CHECKING:
    from kvtier.integrations.hf.cache import KVTierCache
    from kvtier.integrations.hf.pool import CachePool

__all__ = ["restore_cache", "save_cache"]


def save_cache(cache: KVTierCache, path: Path | str, model: str) -> int:
    """Write a cache that the model ``model`` filled; bytes of the file. Raises as `Session.save`."""
    state = cache.state
    state.check_ready()
    if state.filtered is not None:
        raise SessionStateError(
            "a prompt filter left tokens out of this cache, which a file does not tell; save without"
        )
    return _session_of(state).save(path, model=model, attached=_attached(state))


def restore_cache(pool: CachePool, path: Path | str, model: str) -> KVTierCache:
    """A cache as it was when it was saved. Raises as `Memory.restore`."""
    cache = pool.new_cache()
    try:
        attached = _session_of(cache.state).load(path, model=model)
        cache.state.history = _history(attached)
        cache.state.records_past = bool(attached["records_past"].any())
    except KeyError as error:
        cache.close()
        raise RecordFormatError(
            f"{path} holds a session and no cache of a patched model: {error} is missing; read it with Memory.restore"
        ) from error
    except BaseException:
        cache.close()
        raise
    return cache


def _session_of(state: CacheState) -> Session:
    if not isinstance(state.session, Session):
        raise SessionStateError("only sessions of kvtier's own memory can be saved")
    return state.session


def _attached(state: CacheState) -> dict[str, torch.Tensor]:
    history = state.history
    known = {} if history.ids is None else {"ids": history.ids}
    records = torch.tensor([state.records_past])
    return {"positions": history.positions, "real": history.real, "records_past": records, **known}


def _history(attached: dict[str, torch.Tensor]) -> History:
    history, real = History(), attached["real"]
    if real.numel():
        columns = Columns(attached["positions"], None if bool(real.all()) else real)
        history.extend(columns, attached.get("ids"))
    return history
