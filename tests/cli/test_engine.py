"""transformers under a verb: quiet while it runs, as before afterwards."""

import logging
import sys
from collections.abc import Iterator

import pytest
from transformers.utils import logging as its_logging

from kvtier.cli.engine import quiet_transformers, transformers_module
from kvtier.cli.output import Screen
from kvtier.errors import MissingDependencyError


@pytest.fixture
def talkative() -> Iterator[None]:
    """A transformers that says everything."""
    verbosity = its_logging.get_verbosity()
    its_logging.set_verbosity_info()
    its_logging.enable_progress_bar()
    yield
    its_logging.set_verbosity(verbosity)


@pytest.mark.usefixtures("talkative")
@pytest.mark.parametrize(("debug", "verbosity"), [(True, logging.INFO), (False, logging.ERROR)])
def test_quiet_while_it_runs(debug: bool, verbosity: int) -> None:
    with quiet_transformers(Screen(quiet=True, debug=debug)):
        assert not its_logging.is_progress_bar_enabled()
        assert its_logging.get_verbosity() == verbosity

    assert its_logging.is_progress_bar_enabled()
    assert its_logging.get_verbosity() == logging.INFO


@pytest.mark.usefixtures("talkative")
def test_as_before_after_an_error() -> None:
    with pytest.raises(ValueError, match="boom"), quiet_transformers(Screen(quiet=True)):
        raise ValueError("boom")

    assert its_logging.is_progress_bar_enabled()
    assert its_logging.get_verbosity() == logging.INFO


def test_missing_transformers_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)

    with pytest.raises(MissingDependencyError, match=r"pip install 'kvtier\[hf\]'"):
        transformers_module()
