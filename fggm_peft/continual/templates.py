"""Jinja templates that make prompts and answers. They write only text and numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, wraps
from typing import Any

from jinja2 import Environment, StrictUndefined, Template, TemplateError, Undefined, nodes, pass_environment
from jinja2.filters import make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..training.rows import as_text

_ON_TEXT = {"string", "upper", "lower", "title", "capitalize", "trim", "replace", "center", "indent", "truncate"}
_ON_TEXT |= {"wordwrap", "striptags", "escape", "e", "forceescape", "urlize"}
"""Filters that make a text of any value."""


class _TextEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which nothing but text and numbers becomes text."""

    intercepted_binops = frozenset({"%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, str):
            arguments = right.values() if isinstance(right, dict) else right
            _check_all(arguments if isinstance(right, (tuple, dict)) else (right,))
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        function = super().wrap_str_format(value)
        return None if function is None else _on_arguments(function)

    def getattr(self, obj: Any, attribute: str) -> Any:  # a column may be called "items"
        is_key = isinstance(obj, Mapping) and attribute in obj
        return obj[attribute] if is_key else super().getattr(obj, attribute)


@lru_cache
def template(text: str) -> Template:
    """The template of a text; raises ``ValueError`` if it is none, or contains no column."""
    if "{{" not in text and "{%" not in text:
        raise ValueError(f"{text!r} is the same for every row; a template contains columns, such as {{{{ {text} }}}}")

    environment = _TextEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_checked)
    filters: dict[str, Any] = environment.filters
    filters |= {name: _on_text(filters[name]) for name in _ON_TEXT}
    filters |= {"format": _on_arguments(filters["format"]), "join": _join, "checked": _checked}
    try:
        tree = environment.parse(text)
        for concatenation in tree.find_all(nodes.Concat):
            concatenation.nodes = [
                nodes.Filter(node, "checked", [], [], None, None, lineno=node.lineno, environment=environment)
                for node in concatenation.nodes
            ]
        return environment.from_string(tree)
    except TemplateError as error:
        raise ValueError(f"not a Jinja template: {error}") from error


def _on_text(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, which checks its value: the first argument, or the second after what Jinja passes."""
    position = int(hasattr(function, "jinja_pass_arg"))

    @wraps(function)
    def checking(*args: Any, **named: Any) -> Any:
        _checked(args[position])
        return function(*args, **named)

    return checking


def _on_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which checks all arguments."""

    @wraps(function)
    def checking(*args: Any, **named: Any) -> Any:
        _check_all((*args, *named.values()))
        return function(*args, **named)

    return checking


@pass_environment
def _join(environment: Environment, value: Any, separator: str = "", attribute: str | int | None = None) -> str:
    getter = make_attrgetter(environment, attribute) if attribute is not None else _checked
    return separator.join(str(_checked(getter(entry))) for entry in value)


def _check_all(values: Iterable[Any]) -> None:
    for value in values:
        _checked(value)


def _checked(value: Any) -> Any:
    """The value, if it is text or a number."""
    if not isinstance(value, Undefined):  # Jinja reports a column that does not exist
        as_text(value, "a value")
    return value
