"""A front's error texts as clients may see them: the field and what is wrong with it, nothing of our machines, code or private fields."""

import ast
import re

MESSAGE_CHARS_MAX = 2000
PARAM_CHARS_MAX = 200
INTERNAL = re.compile(
    r"""File\ "|Traceback|custom_params|nitsum_|errors\.pydantic\.dev|input_value=|'input':|validation\ errors?\b|\.py\b
    |(?<![\w.])/(?!v1/)(?:[\w.@+-]+/){2,}|\b(?:\d{1,3}\.){3}\d{1,3}:\d+""",
    re.VERBOSE,
)
RETRY = re.compile(r" ?\[retry after \d+ ms\]")
_FASTAPI = re.compile(r"'loc': (\(.{0,1000}?\)), 'msg': (?:'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\")")
_PYDANTIC = re.compile(r"validation errors? for [^\n]*\n([^\n]{1,1000})\n\s+(.*?) \[type=", re.DOTALL)
_CLASS = re.compile(r" or instance of \w+")
_DOT = re.compile(r"\.(?![^\[]*\])")
_KINDS = re.compile(r"[A-Z]\w*|.*[\[(-].*|str|int|float|bool")
"""Steps of a path that are names of types, not of fields."""


def public(status: int, text: str) -> tuple[str, str | None]:
    """The message, and the field that it is about where a validation error names one."""
    if (found := _FASTAPI.search(text[:65_536])) is not None:
        return _said(status, _steps(found[1]), found[2] or found[3] or "")
    if (found := _PYDANTIC.search(text[:65_536])) is not None:
        return _said(status, _DOT.split(found[1]), found[2])
    if INTERNAL.search(text[:65_536]):
        wait = RETRY.search(text)
        short = text.split(" (", 1)[0].split("\n", 1)[0]  # the router's own sentence, without what its nodes say
        told = short if status in (429, 503) and not INTERNAL.search(short) else _plain(status)
        return f"{told}{wait[0]}" if wait and wait[0] not in told else told, None
    text = text.replace(".This model supports", ". This model supports")
    return text[:MESSAGE_CHARS_MAX], None


def _steps(location: str) -> list[str]:
    """Of the text of a tuple; `body` says nothing."""
    try:
        return [str(step) for step in ast.literal_eval(location) if step != "body"]
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return []


def _said(status: int, steps: list[str], message: str) -> tuple[str, str | None]:
    param = ""
    for step in steps:
        if step.isdigit():
            param += f"[{step}]"
        elif not _KINDS.fullmatch(step):
            param += f".{step}" if param else step
    param = param[:PARAM_CHARS_MAX]
    message = _CLASS.sub("", message)
    if INTERNAL.search(param) or INTERNAL.search(message):
        return _plain(status), None
    return (f"{param}: {message}" if param else message)[:MESSAGE_CHARS_MAX] or _plain(status), param or None


def _plain(status: int) -> str:
    if status == 503:
        return "the pool cannot serve this request now"
    return "the request is not valid: a field has the wrong type or value" if status < 500 else "the server failed on this request"
