"""Chat templates compiled as transformers compiles them: Jinja in a sandbox, for they come with a checkpoint.

What a template may call, and the guards around it, are those of transformers'
`utils/chat_template_utils.py`, so that a template writes the same text here as there.
"""

import json
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# Around what stands in {% generation %}. Unicode keeps these characters from any text that is exchanged.
GENERATION_START, GENERATION_END = "\ufdd0", "\ufdd1"


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}: what the assistant says, put between the two marks."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an attribute of the instance)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return GENERATION_START + caller() + GENERATION_END


class _Dict:
    """The `dict` of templates, without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """The `namespace` of templates; names with an underscore would reach into the interpreter."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # "self" may be one of the names
        self, given = args[0], dict(*args[1:], **kwargs)
        Namespace.__init__(self, {})
        for name, value in given.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a chat template cannot set {name!r} on a namespace")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Jinja's own writes HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


@lru_cache(maxsize=8)
def compile_template(source: str) -> jinja2.Template:
    """A chat template ready to render; `{% generation %}` leaves its marks in the text.

    Raises:
        ValueError: `source` is not Jinja.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise ValueError(f"the chat template is not valid Jinja: {error}") from error
