"""Prompts that are put in the background."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from kvtier.core.store import open_store
from kvtier.errors import InputError
from kvtier.testing.stored_prompts import HOST_TIER, chunks_of, space


def test_what_is_published_is_there_after_a_flush(store_config: dict[str, Any]) -> None:
    tokens = list(range(24))
    with open_store(store_config) as store:
        one = space(store)
        futures = [
            one.publish(tokens, chunks_of(tokens)[:1]),
            one.publish(tokens, chunks_of(tokens)[1:], first_chunk=1),
        ]
        store.flush()
        assert [future.result(0) for future in futures] == [(1, 0, 0, "", 0), (2, 0, 0, "", 0)]
        assert (one.match(tokens).tokens, store.stats().queued_bytes) == (24, 0)
        with pytest.raises(InputError):
            one.publish(tokens, chunks_of(tokens), first_chunk=1)
        last = one.publish([7] * 8, chunks_of([7] * 8))
    assert last.result(0).stored == 1, "close waits for what was published"


def test_a_full_queue_refuses_the_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = list(range(40))
    entered, go_on = threading.Event(), threading.Event()
    with open_store({"tiers": [HOST_TIER], "publish_bytes": 3 * 3 * 2 * 10 * 8 * 4}) as store:
        one = space(store)
        put = store.records.put

        def slow(records: Any) -> Any:
            entered.set()
            go_on.wait(60)
            return put(records)

        monkeypatch.setattr(store.records, "put", slow)
        first = one.publish(tokens, chunks_of(tokens)[:2])
        assert entered.wait(60)
        second = one.publish(tokens, chunks_of(tokens))
        third = one.publish(tokens, chunks_of(tokens))
        assert third.done()
        assert third.result() == (0, 0, 5, "more than 5.6 KiB would wait to be stored", 0)
        go_on.set()

        assert first.result(60).stored == 2
        assert second.result(60) == (0, 1, 4, "more than 5.6 KiB would wait to be stored", 0)
        assert store.stats().dropped_chunks == 9
    assert one.publish(tokens, chunks_of(tokens)).result(0).reason == "the store is closed"
