"""The assignments of a Python file as values: literals, arithmetic and earlier names are evaluated, no code is run."""

import ast
import operator
import reprlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from autotune.errors import ConfigError

Value = str | int | float | bool | None

LARGEST = 1e18
"""Largest number that is read; keeps `9**9**9` from being computed."""
_LONGEST = 1000
"""Characters of the longest string that is read; keeps `a = a + a` from doubling without end."""

_ARITHMETIC: dict[type[ast.operator | ast.unaryop], Callable[..., int | float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
    ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip
_CODE = "only `key = value` is read, code is not run; write the value as a literal"
_EXPRESSION = "only literals and arithmetic are read, code is not run; write the value itself"


@dataclass(frozen=True, kw_only=True)
class Statement:
    """An assignment, or a statement that assigns nothing that can be read."""

    line: int
    name: str = ""
    """The assigned name; empty for other statements."""
    value: Value = None
    problem: str = ""
    """Why the value is unknown, or why the file cannot be read without running it; empty if neither is so."""
    code: str = ""
    """A statement that cannot matter, shortened."""


class UnreadableError(Exception):
    """A value that is not read, with the reason."""


def read_assignments(text: str, where: str, known: Mapping[str, Value]) -> tuple[list[Statement], set[str]]:
    """Every statement of a file that matters, in order, and the names that its expressions use.

    known: values of predefined names (and of conditional expressions, as ast.unparse writes them).
    Raises ConfigError if `text` is not Python.
    """
    try:
        with warnings.catch_warnings():  # backslashes in Windows paths cause some
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except SyntaxError as error:
        raise ConfigError(f"{where}, line {error.lineno}: {error.msg}; write key = value lines") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{where} is not a nanoGPT config file: {error}; write key = value lines") from None
    scope = dict(known)
    statements: list[Statement] = []
    for statement in tree.body:
        for one in _read(statement, scope):
            if one.name:
                scope.pop(one.name, None)
                if not one.problem:
                    scope[one.name] = one.value
            statements.append(one)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return statements, names


def _read(statement: ast.stmt, scope: Mapping[str, Value]) -> Iterator[Statement]:
    line = statement.lineno
    match statement:
        case ast.Assign(targets=targets, value=value):
            for target in targets:
                yield from _assign(target, value, scope, line)
        case ast.AnnAssign(target=target, value=ast.expr() as value):
            yield from _assign(target, value, scope, line)
        case ast.AugAssign(target=ast.Name(id=name), op=op, value=value):
            yield from _assign(statement.target, ast.BinOp(ast.Name(name, ast.Load()), op, value), scope, line)
        case ast.Expr(value=ast.Constant()) | ast.Pass() | ast.AnnAssign(value=None):
            return  # a docstring, or nothing
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            bound = [alias.asname or alias.name.partition(".")[0] for alias in names]
            if "*" in bound or any(name in scope for name in bound):
                problem = f"the values of `{_code(statement)}` are not read; write them into this file"
                yield Statement(line=line, problem=problem)
            else:
                yield Statement(line=line, code=_code(statement))
        case ast.Expr(value=ast.Call(func=function)) if _name(function) in ("print", "seed", "manual_seed"):
            yield Statement(line=line, code=_code(statement))
        case ast.Assert():
            yield Statement(line=line, code=_code(statement))
        case _:
            yield Statement(line=line, problem=_CODE)


def _name(function: ast.expr) -> str:
    """`print` of `print`, `seed` of `random.seed`."""
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _code(statement: ast.stmt) -> str:
    try:
        code = " ".join(ast.unparse(statement).split())
    except RecursionError:
        code = type(statement).__name__
    return code if len(code) <= 60 else code[:57] + "..."


def _assign(target: ast.expr, value: ast.expr, scope: Mapping[str, Value], line: int) -> Iterator[Statement]:
    match target, value:
        case ast.Name(id=name), _:
            try:
                yield Statement(line=line, name=name, value=_evaluate(value, scope))
            except UnreadableError as error:
                yield Statement(line=line, name=name, problem=str(error))
            except RecursionError:
                yield Statement(line=line, name=name, problem="it is nested too deeply; write the value itself")
        case ast.Tuple(elts=targets), ast.Tuple(elts=values) if len(targets) == len(values):
            for one, its_value in zip(targets, values, strict=True):
                yield from _assign(one, its_value, scope, line)
        case _:
            yield Statement(line=line, problem=_CODE)


def _evaluate(node: ast.expr, scope: Mapping[str, Value]) -> Value:
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            return _bounded(value)
        case ast.Name(id=name) if name in scope:
            return scope[name]
        case ast.IfExp() if (text := ast.unparse(node)) in scope:
            return scope[text]
        case ast.JoinedStr(values=parts):
            return _bounded("".join(str(_evaluate(part, scope)) for part in parts))
        case ast.FormattedValue(value=value, conversion=-1, format_spec=None):
            return _evaluate(value, scope)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return _compute(op, [_evaluate(left, scope), _evaluate(right, scope)])
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _ARITHMETIC:
            return _compute(op, [_evaluate(operand, scope)])
    raise UnreadableError(_EXPRESSION)


def _compute(op: ast.operator | ast.unaryop, operands: list[Value]) -> Value:
    if isinstance(op, ast.Add) and all(isinstance(text, str) for text in operands):
        return _bounded("".join(map(str, operands)))
    numbers = [number for number in operands if isinstance(number, int | float)]
    if len(numbers) < len(operands) or not all(abs(number) <= LARGEST for number in numbers):
        raise UnreadableError(f"arithmetic is for numbers up to {LARGEST:.0e}; write the value itself")
    if isinstance(op, ast.Pow) and abs(numbers[1]) > 64:
        raise UnreadableError("an exponent above 64 is not read; write the value itself")
    try:
        result = _ARITHMETIC[type(op)](*numbers)
    except ArithmeticError as error:
        raise UnreadableError(f"{error}; write the value itself") from None
    if not isinstance(result, int | float):  # (-1) ** 0.5
        raise UnreadableError(f"{reprlib.repr(result)} is not a real number; write the value itself")
    return _bounded(result)


def _bounded(value: Value) -> Value:
    if isinstance(value, str):
        if len(value) > _LONGEST or not value.isprintable():
            raise UnreadableError(f"a text must be printable, of at most {_LONGEST} characters; write another")
    elif value is not None and not abs(value) <= LARGEST:
        raise UnreadableError(f"the value is beyond {LARGEST:.0e}; write a smaller one")
    return value
