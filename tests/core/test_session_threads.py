"""Several threads on sessions of one memory: calls take turns, results are those of one thread."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import torch

from kvtier.core.memory import Memory
from kvtier.testing.oracles import PlainSession
from kvtier.testing.steps import StepSource, open_memory

THREADS = 4


def talk(memory: Memory, seed: int, start: threading.Barrier) -> float:
    """Run a session of its own in step with the others; the largest error against dense attention."""
    source, plain, worst = StepSource(memory.layout, seed=seed), PlainSession(3), 0.0
    start.wait(timeout=30)
    with memory.session() as session:
        for tokens in [40, 1, 1, 25, 1, 9, 1, 1, 33, 1]:
            step = source.take(tokens)
            for got, expected in zip(step.run(session), step.run(plain), strict=True):
                worst = max(worst, float((got - expected).abs().max()))
            if tokens == 25:
                session.crop(7)
                plain.crop(7)
                source.position -= 7
    return worst


def test_threads_on_sessions_of_one_memory_get_what_one_thread_would() -> None:
    with closing(open_memory(policy_text="quest(dense_layers=1, read=4096)", device=400_000)) as memory:
        start = threading.Barrier(THREADS)
        with ThreadPoolExecutor(THREADS) as pool:
            errors = list(pool.map(lambda seed: talk(memory, seed, start), range(THREADS)))

        assert max(errors) < 1e-10
        assert memory.groups[0].store.table.live == 0
        assert memory.groups[0].ledger.in_use == 0
        assert memory.groups[0].ledger.peak <= 400_000


def test_a_budget_is_shared_by_all_sessions() -> None:
    with closing(open_memory(device=200_000)) as memory:
        sessions = [memory.session() for _ in range(3)]
        sources = [StepSource(seed=seed) for seed in range(3)]
        plains = [PlainSession(3) for _ in range(3)]
        for tokens in (60, 60, 60, 1, 1):
            for source, session, plain in zip(sources, sessions, plains, strict=True):
                step = source.take(tokens)
                for got, expected in zip(step.run(session), step.run(plain), strict=True):
                    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)

        assert memory.groups[0].ledger.peak <= 200_000
        assert sessions[0].report().bytes["host"].used > 0
        sessions[1].close()
        step = sources[0].take(1)
        for got, expected in zip(step.run(sessions[0]), step.run(plains[0]), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_one_session_may_be_called_by_several_threads_in_turn() -> None:
    with closing(open_memory(device=150_000)) as memory:
        source, session, plain = StepSource(), memory.session(), PlainSession(3)
        for tokens in (50, 1, 20, 1):
            step = source.take(tokens)
            with ThreadPoolExecutor(1) as pool:
                outputs = pool.submit(step.run, session).result(timeout=60)
            for got, expected in zip(outputs, step.run(plain), strict=True):
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_closing_from_another_thread_waits_for_the_call_that_runs() -> None:
    with closing(open_memory()) as memory:
        session = memory.session()
        source = StepSource()
        source.take(100).run(session)
        with memory.lock:
            closer = threading.Thread(target=session.close)
            closer.start()
            closer.join(timeout=0.05)
            assert closer.is_alive(), "close must wait for the lock"
            assert session.rows == 1
        closer.join(timeout=10)
        assert session.rows == 0
