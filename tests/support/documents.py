"""Code in the documentation: the blocks of a page, and a conversation with a Python prompt and a shell.

``python -m tests.support.documents PAGE OPTIONS`` holds the conversation of a page, in the order in which the page has
it: ``pycon`` and ``python`` blocks at one prompt, ``console`` blocks in a shell beside it. It prints what was answered
otherwise than the page says. It needs the standard library only: the prompt that it stands for is not the tests' own
process.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import os
import re
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

#: Seconds that an answer which comes about by itself, such as what another terminal has changed, gets to be the page's.
PATIENCE = 20.0

#: What only looks, and may be asked again.
LOOKS = ("cluster.nodes", "cluster.adaptive_log()")

_DIRECTIVE = re.compile(r"( *)\.\. code-block:: *(\S*)")


@dataclass(frozen=True)
class Block:
    """A literal block of a page.

    Attributes
    ----------
    page
        The page's path below the checkout.
    line
        Line of the page where it begins, from 1.
    language
        As the page says; ``""`` for a block that follows ``::``.
    text
        What is in it, without its indentation.
    """

    page: str
    line: int
    language: str
    text: str

    @property
    def first(self) -> str:
        """What it is called by: its first line."""
        return self.text.partition("\n")[0]


def blocks(page: str, text: str | None = None) -> list[Block]:
    """Return the literal blocks of a page in reStructuredText, in order."""
    text = (ROOT / page).read_text() if text is None else text
    return list(_blocks(page, text.splitlines()))


def _blocks(page: str, lines: Sequence[str]) -> Iterator[Block]:
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        directive = _DIRECTIVE.fullmatch(line.rstrip())
        if directive is None and (not line.rstrip().endswith("::") or line.lstrip().startswith(".. ")):
            continue
        indent = len(line) - len(line.lstrip())
        end = number
        while end < len(lines) and (not lines[end].strip() or len(lines[end]) - len(lines[end].lstrip()) > indent):
            end += 1
        body = lines[number:end]
        while directive is not None and body and body[0].lstrip().startswith(":"):  # the directive's options
            del body[0]
        start = next((n for n, each in enumerate(body) if each.strip()), None)
        if start is None:
            continue
        content = textwrap.dedent("\n".join(body[start:])).rstrip()
        yield Block(page, end - len(body) + start + 1, directive[2] if directive else "", content)
        number = end


#: What differs from run to run, and what stands for it: the clock, sizes and times, numbers of workers, and numbers of
#: keys, as a result may be in memory for a moment longer than its name.
_VARIES = (
    (re.compile(r"\d\d:\d\d:\d\d"), "CLOCK"),
    (re.compile(r"\b\d+\.\d+(?: [KMGT]iB\b)?"), "0.0"),
    (re.compile(r"\bnp\.(True|False)_"), r"\1"),
    (re.compile(r"\b(local|second|node-\d)-\d+\b"), r"\1-N"),
    (re.compile(r"\b\d+ keys?\b"), "N keys"),
    (re.compile(r"\b\d+(?= +0\.0 *(?: 0\.0 s|$))", re.MULTILINE), "N"),
)


def shape(text: str) -> list[str]:
    """Return the lines of an output without what differs from run to run; columns are as wide as they may be."""
    for pattern, put in _VARIES:
        text = pattern.sub(put, text)
    return [" ".join(line.split()) for line in text.strip().splitlines()]


def steps(text: str) -> list[str]:
    """Return the shape of ``adaptive_log()``: what was decided in two steps is as good as in one."""
    found = [re.sub(r"\d+", "N", line).replace("0.0 us", "0.0 ms").replace("0.0 s", "0.0 ms") for line in shape(text)]
    return [line for n, line in enumerate(found) if not n or line != found[n - 1]]


@dataclass
class Conversation:
    """A Python prompt and a shell, and what they answered otherwise than was expected."""

    names: dict[str, Any]
    replaced: Mapping[str, str]
    wrong: list[str]

    def hold(self, block: Block) -> None:
        """Say what the block says, and compare the answers."""
        if block.language == "pycon":
            for example in doctest.DocTestParser().get_examples(self._put(block.text)):
                self._ask(block, example)
        elif block.language == "python":
            with contextlib.redirect_stdout(sys.stderr):  # the page does not show what it prints
                exec(compile(self._put(block.text), f"{block.page}:{block.line}", "exec"), self.names)
        else:
            for command, said in commands(self._put(block.text)):
                self._shell(block, command, said)

    def _put(self, text: str) -> str:
        for old, new in self.replaced.items():
            text = text.replace(old, new)
        return text

    def _ask(self, block: Block, example: doctest.Example) -> None:
        source, deadline = example.source.strip(), time.monotonic() + PATIENCE
        form = steps if "adaptive_log" in source else shape
        # At a prompt an error is an answer like any other; its traceback is not compared.
        want = [" ".join(shape(example.exc_msg))] if example.exc_msg else form(example.want)
        while (got := self._answer(source, form)) != want and source in LOOKS and time.monotonic() < deadline:
            time.sleep(0.1)
        self._compare(block, source, want, got)

    def _answer(self, source: str, form: Any) -> list[str]:
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                exec(compile(f"{source}\n", "<prompt>", "single"), self.names)
        except Exception as error:
            traceback.print_exc()
            name = f"{type(error).__module__}.{type(error).__qualname__}"
            return [" ".join(shape(f"{name}: {error}"))]
        return list(form(said.getvalue()))

    def _shell(self, block: Block, command: str, said: str) -> None:
        call = ["bash", "-o", "pipefail", "-c", command]
        done = subprocess.run(call, stdout=subprocess.PIPE, text=True, timeout=30)
        if done.returncode:
            self.wrong.append(f"{block.page}:{block.line}: {command} ended with {done.returncode}")
        # A recipe does not show what its commands print.
        self._compare(block, command, *((shape(said), shape(done.stdout)) if said else ("", "")))

    def _compare(self, block: Block, source: str, want: Sequence[str], got: Sequence[str]) -> None:
        print(f"{block.page}:{block.line} {source}", *got, sep="\n    ", file=sys.stderr, flush=True)
        if list(want) != list(got):
            self.wrong.append(f"{block.page}:{block.line}: {source}\n  the page has {want}\n  it said      {got}")


def commands(text: str) -> list[tuple[str, str]]:
    """Return the commands of a shell's block, each with what it printed."""
    found = []
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, said = part.partition("\n")
        found.append((command, said))
    return found


def main(page: str, options: str) -> int:
    """Hold the conversation of a page.

    Parameters
    ----------
    page
        The page's path below the checkout.
    options
        JSON: ``skip``, first lines of blocks that are left out; ``replaced``, text -> what is put in its place;
        ``before``, code that the prompt is given before.
    """
    told = json.loads(options)
    talk = Conversation({"__name__": "__main__"}, told["replaced"], [])
    exec(told["before"], talk.names)
    for block in blocks(page):
        if block.first not in told["skip"]:
            talk.hold(block)
    print("\n".join(talk.wrong))
    return 1 if talk.wrong else 0


if __name__ == "__main__":
    if hasattr(os, "sched_setaffinity"):  # the pages' machine has two cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    sys.exit(main(*sys.argv[1:]))
