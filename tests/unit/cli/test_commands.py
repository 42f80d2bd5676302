"""Parts of the operator's command that need no cluster."""

from __future__ import annotations

from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from agentcluster.cli.commands import _after
from agentcluster.cli.main import main


@given(st.lists(st.sampled_from("abc"), max_size=8), st.lists(st.sampled_from("abc"), max_size=4), st.integers(1, 8))
def test_only_lines_that_are_new(before: list[str], more: list[str], kept: int) -> None:
    """Of a log that keeps the last so many lines. Equal lines may hide some; none is shown that is not there."""
    now = [*before, *more][-kept:]
    fresh = list(_after(before[-kept:], now))
    assert now[len(now) - len(fresh) :] == fresh
    assert len(fresh) <= len(more)


def test_completion() -> None:
    def completed(words: str, position: int) -> list[str]:
        environ = {"_AGENTCLUSTER_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(position)}
        output = CliRunner().invoke(main, prog_name="agentcluster", env=environ).output
        return [line.partition(",")[2] for line in output.splitlines()]

    assert completed("agentcluster re", 1) == ["reprovision"]
    assert "--drain-timeout" in completed("agentcluster reprovision --drain", 2)
    assert completed("agentcluster reprovision auto-", 2) == ["auto-cpu", "auto-gpu"]
