"""The two streams of a verb: what a program reads stays apart from what a person reads."""

import io
import json
import logging
import sys

import pytest
from rich.table import Table

from kvtier.cli.output import Screen


class Terminal(io.StringIO):
    """A stream that says that a person looks at it."""

    def isatty(self) -> bool:
        return True


def test_json_keeps_what_others_print_off_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(as_json=True) as screen:
        sys.stdout.write("chatter of a library\n")
        screen.emit({"a": [1, 2]})
    sys.stdout.write("later\n")

    out, err = capsys.readouterr()
    value, rest = out[: -len("later\n")], out[-len("later\n") :]
    assert json.loads(value) == {"a": [1, 2]}
    assert rest == "later\n"
    assert err == "chatter of a library\n"


def test_stdout_comes_back_after_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout
    with pytest.raises(ValueError, match="boom"), Screen(as_json=True):
        raise ValueError("boom")

    assert sys.stdout is before
    assert capsys.readouterr().out == ""


def test_not_a_number_is_never_written_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="JSON"), Screen(as_json=True) as screen:
        screen.emit({"seconds": float("nan")})

    assert capsys.readouterr().out == ""


def test_text_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("one")
    table.add_row("[red]cell[/red] :smile:")
    text = "[bold]" + "word " * 60

    with Screen() as screen:
        screen.show(text, table)

    out = capsys.readouterr().out
    assert out.startswith(text + "\n")
    assert "[red]cell[/red] :smile:" in out


def test_quiet_hides_notes_but_not_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, True):
        with Screen(quiet=quiet) as screen:
            screen.note("on the way")
            screen.warn("broken")

    assert capsys.readouterr() == ("", "on the way\nwrong: broken\nwrong: broken\n")


@pytest.mark.parametrize(
    ("terminal", "quiet", "as_json", "drawn"),
    [(True, False, False, True), (True, True, False, False), (True, False, True, False), (False, False, False, False)],
)
def test_bars_are_drawn_only_for_a_person(
    terminal: bool, quiet: bool, as_json: bool, drawn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")

    with Screen(quiet=quiet, as_json=as_json) as screen, screen.progress() as bars:
        bars.advance(bars.add_task("prefill", total=2))
        bars.refresh()

    assert ("prefill" in stream.getvalue()) is drawn


def test_debug_logs_to_stderr_and_stops_after(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("kvtier.somewhere")
    with Screen(debug=True):
        log.debug("chose %s", "the CPU")
    log.debug("silent again")

    out, err = capsys.readouterr()
    assert out == ""
    assert "kvtier.somewhere DEBUG chose the CPU" in err
    assert "silent again" not in err
