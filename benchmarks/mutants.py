"""Count the random faults that the tests do not notice: ``python -m benchmarks.mutants --seed 1 --count 40``.

A mutant is the package with one small fault in planning, modes or evacuation: another comparison, operator, constant
or return value, or a dropped ``not``. Each is made in a temporary copy of the checkout, which its tests then import;
the working tree is only read. A mutant is killed when a test fails or the tests do not end before the deadline, and
survives when all pass. Exit code 1 when more than one in ten survive.

Some mutants change nothing that can be observed; read the list of survivors before a test is written for one.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: Files that get faults, each with the tests that should notice.
TARGETS: Sequence[tuple[str, Sequence[str]]] = (
    ("agentcluster/scheduler/planning/*.py", ("tests/unit/planning", "tests/unit/test_reports.py")),
    ("agentcluster/modes/*.py", ("tests/unit/modes", "tests/unit/planning/test_scaling.py")),
    ("agentcluster/scheduler/evacuation.py", ("tests/scheduler/test_evacuation.py",)),
)

#: Loaded by pytest in the copy: a failing example is found, and not made smaller.
PLUGIN = """
from hypothesis import HealthCheck, Phase, settings


def pytest_configure(config):
    phases = [Phase.explicit, Phase.generate]
    settings.register_profile("mutants", deadline=None, suppress_health_check=list(HealthCheck), phases=phases)
    settings.load_profile("mutants")
"""

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes
    ----------
    path
        File, below the root of the checkout.
    original
        Text of the file.
    node
        Expression or statement that has the fault.
    faulty
        The same with the fault.
    """

    path: str
    original: str
    node: ast.expr | ast.stmt
    faulty: ast.AST

    @property
    def line(self) -> int:
        """Line of the fault."""
        return self.node.lineno

    @property
    def before(self) -> str:
        """Text of the expression or statement."""
        start, end = self._span()
        return self.original.encode()[start:end].decode()

    @property
    def after(self) -> str:
        """Text of the expression or statement with the fault."""
        return ast.unparse(self.faulty)

    @property
    def source(self) -> str:
        """Text of the file with the fault."""
        start, end = self._span()
        text = f"({self.after})" if isinstance(self.node, ast.expr) else self.after
        source = self.original.encode()
        return (source[:start] + text.encode() + source[end:]).decode()

    def _span(self) -> tuple[int, int]:
        """Return where the node begins and ends; columns of a syntax tree are bytes."""
        node, lines = self.node, self.original.encode().splitlines(keepends=True)
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
        return start, sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {_short(self.before)}  ->  {_short(self.after)}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 90 else f"{text[:89]}…"


def mutants(path: str, source: str) -> Iterator[Mutant]:
    """Yield all faults of a file.

    Parameters
    ----------
    path
        Path of the file, for the report.
    source
        Its text.
    """
    for node in _mutable(ast.parse(source)):
        for faulty in _alternatives(node):
            yield Mutant(path, source, node, faulty)


def _mutable(tree: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """Yield expressions and statements, but for those that only a type checker or a reader reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.JoinedStr):  # without positions of its own before Python 3.12
            continue
        if isinstance(node, ast.arg) or _is_docstring(node) or _is_alias(node):
            continue
        if isinstance(node, ast.AnnAssign):
            if node.value is not None:
                yield node.value
                yield from _mutable(node.value)
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for part in (*node.args.defaults, *filter(None, node.args.kw_defaults), *node.body):
                yield from _mutable(ast.Module([part] if isinstance(part, ast.stmt) else [ast.Expr(part)], []))
            continue
        if isinstance(node, ast.Call) and _name(node.func) in ("dataclass", "TypeVar", "NewType", "field"):
            continue
        if isinstance(node, ast.expr | ast.stmt):
            yield node
        yield from _mutable(node)


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_alias(node: ast.AST) -> bool:
    """Return whether a statement names a type, such as ``Command = Start | Stop``."""
    match node:
        case ast.Assign(targets=[ast.Name(id=name)], value=ast.BinOp(op=ast.BitOr()) | ast.Subscript()):
            return name[:1].isupper() and not name.isupper()
        case ast.Assign(targets=[ast.Name(id="__slots__" | "__all__")]):
            return True
        case _:
            return False


def _alternatives(node: ast.expr | ast.stmt) -> Iterator[ast.AST]:
    """Yield what a node could be by mistake."""
    match node:
        case ast.Compare(ops=ops):
            for position, op in enumerate(ops):
                for other in COMPARISONS.get(type(op), ()):
                    yield _with(node, ops=[*ops[:position], other(), *ops[position + 1 :]])
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in OPERATORS:
            yield _with(node, op=OPERATORS[type(op)]())
        case ast.BoolOp(op=op):
            yield _with(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield _with(node, value=not value)
        case ast.Constant(value=int(value) | float(value)):
            yield _with(node, value=value + 1)
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            yield _with(node, value=ast.Constant(None))
        case ast.IfExp(body=body, orelse=orelse):
            yield _with(node, body=orelse, orelse=body)


def _with(node: ast.AST, **fields: object) -> ast.AST:
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def choose(root: Path, count: int, seed: int, only: str = "") -> list[tuple[Mutant, Sequence[str]]]:
    """Choose random mutants, each with the tests that should kill it.

    Parameters
    ----------
    root
        The checkout.
    count
        Number of mutants.
    seed
        Seed of the choice.
    only
        Text that the path of a file must have.

    Returns
    -------
    list of (Mutant, sequence of str)
        In the order of their files and lines; the same for the same checkout and seed.
    """
    found = []
    for pattern, tests in TARGETS:
        for file in sorted(root.glob(pattern)):
            path = str(file.relative_to(root))
            found += [(mutant, tests) for mutant in mutants(path, file.read_text()) if only in path]
    chosen = random.Random(seed).sample(range(len(found)), min(count, len(found)))
    return [found[index] for index in sorted(chosen)]


def copied(root: Path, to: Path) -> Path:
    """Copy what tests need of a checkout.

    Parameters
    ----------
    root
        The checkout.
    to
        An empty folder.

    Returns
    -------
    Path
        The copy.
    """
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", ".git", ".hypothesis", "*.egg-info", ".venv", "build")
    shutil.copytree(root, to / "copy", ignore=ignore, symlinks=True)
    (to / "mutant_settings.py").write_text(PLUGIN)
    return to / "copy"


def run(copy: Path, tests: Sequence[str], deadline: float) -> tuple[str, str]:
    """Run tests in a copy.

    Parameters
    ----------
    copy
        The copy.
    tests
        Paths below it.
    deadline
        Seconds after which the tests are ended.

    Returns
    -------
    str, str
        ``passed``, ``failed`` or ``late``, and the end of the output.
    """
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", "-p"]
    command += ["mutant_settings", "--no-header", *tests]
    path = os.pathsep.join([str(copy), str(copy.parent)])
    process = subprocess.Popen(
        command,
        cwd=copy,
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=deadline)
    except subprocess.TimeoutExpired:
        return "late", ""
    finally:
        with contextlib.suppress(ProcessLookupError):  # workers that a test started are in this session too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode not in (0, 1, 2):
        raise RuntimeError(f"pytest ended with {process.returncode}:\n{output[-2000:]}")
    return ("failed" if process.returncode else "passed"), output[-2000:]


def main() -> int:
    """Print each mutant's fate and the survivors, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="seed (default: a new one)")
    parser.add_argument("--count", type=int, default=40, help="number of mutants (default: %(default)s)")
    parser.add_argument("--only", default="", help="text that the path of a file must have")
    parser.add_argument("--deadline", type=float, default=300.0, help="seconds of one mutant (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="list the mutants and run nothing")
    options = parser.parse_args()
    chosen = choose(ROOT, options.count, options.seed, options.only)
    print(f"seed {options.seed}, {len(chosen)} mutants", flush=True)
    if options.list:
        print(*(mutant for mutant, _ in chosen), sep="\n")
        return 0
    survivors = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = copied(ROOT, Path(folder))
        for tests in {tests for _, tests in chosen}:
            fate, output = run(copy, tests, options.deadline)
            if fate != "passed":
                raise SystemExit(f"the tests {' '.join(tests)} {fate} without a mutant:\n{output}")
        for number, (mutant, tests) in enumerate(chosen, 1):
            began = time.perf_counter()
            original = (copy / mutant.path).read_text()
            (copy / mutant.path).write_text(mutant.source)
            fate, _ = run(copy, tests, options.deadline)
            (copy / mutant.path).write_text(original)
            seconds = time.perf_counter() - began
            print(f"{number:3} {'SURVIVED' if fate == 'passed' else fate:8} {seconds:4.0f} s  {mutant}", flush=True)
            survivors += [mutant] if fate == "passed" else []
    print(f"{len(survivors)} of {len(chosen)} survived, seed {options.seed}", *survivors, sep="\n")
    return int(len(survivors) > len(chosen) / 10)


if __name__ == "__main__":
    sys.exit(main())
