"""A law: a sentence about every policy of a role, checked over drawn cases and told in the words of the domain."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeAlias, runtime_checkable

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException

from kvtier.core.policy import Policy

__all__ = [
    "CALM",
    "PHASES",
    "Described",
    "Law",
    "LawBroken",
    "PolicyLaws",
    "Source",
    "claimed",
    "law",
    "laws_of",
    "require",
    "unclaimed",
]

# The fixture is copied for every case, and suites are inherited by many classes.
CALM = (HealthCheck.function_scoped_fixture, HealthCheck.differing_executors, HealthCheck.too_slow)
# A broken law explains itself.
PHASES = tuple(phase for phase in Phase if phase is not Phase.explain)

Source: TypeAlias = st.SearchStrategy[Any] | Callable[[Any, Any], st.SearchStrategy[Any]]
"""What a law draws from: a strategy, or a function from the suite and the policy (which may set bounds) to one."""


class LawBroken(AssertionError):  # noqa: N818 - a broken law is a finding, not an error of the suite
    """A policy broke a law; the message has the law, what was found and the smallest case that shows it."""


@runtime_checkable
class Described(Protocol):
    """A case that says itself what it is."""

    def describe(self) -> str:
        """The case in the words of the domain, in a few lines at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """One law of a suite.

    Parameters
    ----------
    code : str
        Short name: S1, M1, ...
    title : str
        The law as a sentence.
    check : callable
        ``check(suite, policy, **drawn)``; raises ``LawBroken`` through `require`.
    sources : mapping of str to Source
        What ``check`` is given.
    """

    code: str
    title: str
    check: Callable[..., None]
    sources: Mapping[str, Source]

    def hold(self, suite: PolicyLaws, policy: Policy, data: st.DataObject) -> None:
        """Draw one case and check it.

        Raises
        ------
        LawBroken
        """
        # What a policy remembers would else reach from one case into the next, and the smallest would not be found.
        policy, drawn = copy.deepcopy(policy), {}
        for name, source in self.sources.items():
            strategy = source if isinstance(source, st.SearchStrategy) else source(suite, policy)
            drawn[name] = data.draw(strategy, label=name)
        try:
            self.check(suite, policy, **drawn)
        except (HypothesisException, pytest.skip.Exception):
            raise
        except LawBroken as found:
            raise LawBroken(self._tell(str(found), drawn)) from None
        except Exception as error:
            raise LawBroken(self._tell(f"the policy raised {type(error).__name__}: {error}", drawn)) from error

    def _tell(self, found: str, drawn: Mapping[str, object]) -> str:
        cases = [_describe(name, value) for name, value in drawn.items()]
        return "\n  ".join([f"{self.code}, {self.title}: {found}", *("for " + case for case in cases)])


def law(code: str, title: str, **sources: Source) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a law of a method ``(self, policy, **drawn)`` of a suite, and a test of the law.

    Parameters
    ----------
    code, title : str
        Short name, and the law as a sentence.
    **sources : Source
        What the method is given, by name.
    """

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        stated = Law(code=code, title=title, check=check, sources=sources)

        def test(self: PolicyLaws, policy: Policy, data: st.DataObject) -> None:
            stated.hold(self, policy, data)

        test.__name__, test.__qualname__, test.__module__ = check.__name__, check.__qualname__, check.__module__
        test.__doc__ = f"{code}: {title}."
        calm = settings(deadline=None, suppress_health_check=CALM, phases=PHASES)
        marked: Callable[..., None] = pytest.mark.law(code=code)(calm(given(data=st.data())(test)))
        marked.stated = stated  # type: ignore[attr-defined]
        return marked

    return decorate


class PolicyLaws:
    """What a suite of laws has: a policy to hold them to.

    Subclass the suite of your policy's role in a test file and override the fixture ``policy``.
    """

    @pytest.fixture
    def policy(self) -> Policy:
        """Make the policy under test."""
        pytest.fail("override the fixture 'policy': return the policy under test")


def laws_of(suite: type[PolicyLaws]) -> list[Law]:
    """The laws of a suite, by their code."""
    found = [stated for name in dir(suite) if isinstance(stated := getattr(getattr(suite, name), "stated", None), Law)]
    return sorted(found, key=lambda stated: (len(stated.code), stated.code))


def require(holds: bool, found: str) -> None:
    """Say what was found when a law does not hold.

    Raises
    ------
    LawBroken
    """
    if not holds:
        raise LawBroken(found)


def claimed(claim: bool, reason: str) -> None:
    """Skip a law about something that the policy does not claim."""
    if not claim:
        unclaimed(reason)


def unclaimed(reason: str) -> NoReturn:
    """Skip a law about something that the policy does not claim."""
    pytest.skip(reason)


def _describe(name: str, value: object) -> str:
    return value.describe() if isinstance(value, Described) else f"{name} = {value}"
