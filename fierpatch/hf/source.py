"""What a module's forward hands to what it calls, read from its source."""

from __future__ import annotations

import ast
import copy
import inspect
import re
import textwrap
from functools import reduce
from typing import Any

from torch import nn


def passed(module: nn.Module, callee: str, place: int, keyword: str | None = None) -> ast.expr:
    """An argument of a call within ``forward``, in terms of the parameters and of ``self``.

    Local names are replaced by what was assigned to them, and a condition on attributes of the
    module is decided by those it has. Where neither can be followed, the name becomes `UNKNOWN`.

    Args:
        module: the one whose forward is read.
        callee: the function as it is written, such as ``self.self_attn``.
        place: the position of the argument.
        keyword: its name, if it may be given by that too.

    Raises:
        LookupError: the source is not there, or has no such call or argument.
    """
    try:
        source = textwrap.dedent(inspect.getsource(type(module).forward))
        [function] = ast.parse(source).body
    except (OSError, TypeError, SyntaxError) as error:  # written in a console, say
        raise LookupError(f"the source of {type(module).__name__} cannot be read") from error
    assert isinstance(function, ast.FunctionDef)
    call = _Reader(module).find(function.body, callee)
    if call is not None:
        named = [each.value for each in call.keywords if each.arg and each.arg == keyword]
        if named:
            return named[0]
        if len(call.args) > place:
            return call.args[place]
    raise LookupError(f"{type(module).__name__} does not call {callee} where it could be followed")


UNKNOWN = "unknown"


class _Reader(ast.NodeTransformer):
    """Follows assignments from statement to statement, and puts them into expressions."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._assigned: dict[str, ast.expr] = {}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return copy.deepcopy(self._assigned.get(node.id, node))

    def find(self, statements: list[ast.stmt], callee: str) -> ast.Call | None:
        """The first call of that name, its arguments in terms of the parameters."""
        for statement in statements:
            if isinstance(statement, ast.If):
                holds = self._decide(statement.test)
                if holds is not None:
                    call = self.find(statement.body if holds else statement.orelse, callee)
                    if call is not None:
                        return call
                    continue
            elif isinstance(statement, ast.Assign | ast.Expr | ast.Return):
                for node in ast.walk(statement):
                    if isinstance(node, ast.Call) and ast.unparse(node.func) == callee:
                        node.args = [self._expand(each) for each in node.args]
                        for each in node.keywords:
                            each.value = self._expand(each.value)
                        return node
            self._follow(statement)
        return None

    def _follow(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                self._assigned[name] = self._expand(value)
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=value) if all(
                isinstance(each, ast.Name) for each in names
            ):
                whole = self._expand(value)
                for number, each in enumerate(names):
                    assert isinstance(each, ast.Name)
                    self._assigned[each.id] = ast.Subscript(whole, ast.Constant(number))
            case _:  # which may change in place what it names
                for node in ast.walk(statement):
                    if isinstance(node, ast.Name) and node.id != "self":
                        self._assigned[node.id] = ast.Name(UNKNOWN)

    def _expand(self, expression: ast.expr) -> ast.expr:
        expanded: ast.expr = self.visit(copy.deepcopy(expression))
        return expanded

    def _decide(self, test: ast.expr) -> bool | None:
        """Whether a condition holds for this module, or None where it depends on more."""
        match test:
            case ast.BoolOp(op=op, values=values):
                decided = [self._decide(each) for each in values]
                if None in decided:
                    return None
                return all(decided) if isinstance(op, ast.And) else any(decided)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                holds = self._decide(operand)
                return None if holds is None else not holds
            case ast.Compare(left=left, ops=[ast.Is() | ast.IsNot() as op], comparators=[right]):
                if ast.unparse(right) == "None" and self._is_attribute(left):
                    return (self._attribute(left) is None) == isinstance(op, ast.Is)
            case ast.Attribute() if self._is_attribute(test):
                return bool(self._attribute(test))
        return None

    def _is_attribute(self, expression: ast.expr) -> bool:
        return re.fullmatch(r"self(\.\w+)+", ast.unparse(expression)) is not None

    def _attribute(self, expression: ast.expr) -> Any:
        names = ast.unparse(expression).split(".")[1:]
        return reduce(getattr, names, self._module)
