"""Change a module in one place at a time, and say which changes no test notices.

    python tests/tools/mutate.py shim/aws/sigv4.py tests/aws/test_sigv4.py [--most 40] [--seed 1]

Each change is made in a copy of the checkout: a comparison turned round, a number one larger, a
condition that always or never holds, a statement left out. Not a part of CI: it takes a run of the
tests a change.
"""

from __future__ import annotations

import argparse
import ast
import copy
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
OPPOSITES = {
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}


def variants(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield (what is changed, the node that stands in for this one)."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OPPOSITES:
        changed = copy.deepcopy(node)
        changed.ops[0] = OPPOSITES[type(node.ops[0])]()
        yield "comparison turned round", changed
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        yield "number one larger", ast.Constant(node.value + 1)
    elif isinstance(node, ast.If | ast.While | ast.IfExp):
        for value in (True, False):
            if not (value and isinstance(node, ast.While)):
                changed = copy.deepcopy(node)
                changed.test = ast.Constant(value)
                yield f"condition is {value}", changed
    elif isinstance(node, ast.Expr | ast.Raise | ast.AugAssign):
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            yield "statement left out", ast.Pass()


class Replace(ast.NodeTransformer):
    def __init__(self, target: ast.AST, changed: ast.AST) -> None:
        self.target, self.changed = target, changed

    def visit(self, node: ast.AST) -> ast.AST:
        return self.changed if node is self.target else self.generic_visit(node)


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield (line, what is changed, the changed source)."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for what, changed in variants(node):
            fresh = ast.parse(source)
            target = next(
                other
                for other, one in zip(ast.walk(fresh), ast.walk(tree), strict=True)
                if one is node
            )
            text = ast.unparse(ast.fix_missing_locations(Replace(target, changed).visit(fresh)))
            yield getattr(node, "lineno", 0), what, text


def is_noticed(checkout: Path, tests: list[str], seconds: float) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=checkout, capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return True
    return done.returncode != 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module")
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--most", type=int, default=40, help="how many changes are tried")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=120, help="for one run of the tests")
    arguments = parser.parse_args()
    source = (ROOT / arguments.module).read_text()
    found = list(mutants(source))
    random.Random(arguments.seed).shuffle(found)
    survived = 0
    with tempfile.TemporaryDirectory(prefix="mutate-") as directory:
        checkout = Path(directory, "checkout")
        leave_out = shutil.ignore_patterns(".git", ".venv", "__pycache__", "dist", ".hypothesis")
        shutil.copytree(ROOT, checkout, ignore=leave_out, symlinks=True)
        if is_noticed(checkout, arguments.tests, arguments.seconds):
            sys.exit("the tests fail, or take too long, without any change")
        for line, what, text in found[: arguments.most]:
            (checkout / arguments.module).write_text(text)
            if not is_noticed(checkout, arguments.tests, arguments.seconds):
                survived += 1
                print(f"{arguments.module}:{line}: {what}: {source.splitlines()[line - 1].strip()}")
    tried = min(len(found), arguments.most)
    print(f"{tried} of {len(found)} changes tried, {survived} not noticed")


if __name__ == "__main__":
    main()
