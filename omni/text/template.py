"""The chat template of a published language model: its own Jinja text, rendered in a sandbox.

The environment is that of transformers (utils/chat_template_utils.py), so that equal messages give equal text. The
template comes with the model's files and is not trusted: it reads only messages, the model's special tokens and named
variables; its size, its result and its strings are bounded. Python names, files and attributes are out of its reach.
conversation.py makes ids of the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property, wraps
from typing import Any

MAX_TEMPLATE = 1 << 20  # characters
MAX_RENDERED = 1 << 26  # characters, of the result and of any string that the template makes on the way
GROWING = ("center", "format", "indent", "join", "replace", "tojson", "wordwrap")  # filters that may make long strings

Message = Mapping[str, str]


class ChatTemplate:
    """A template with what it may read beside messages.

    special: the model's special tokens by name, such as bos_token. variables: other names that it reads, such as
    enable_thinking. now: the time for templates that write a date; today's, unless replaced.
    """

    def __init__(
        self,
        source: str,
        special: Mapping[str, str] | None = None,
        variables: Mapping[str, Any] | None = None,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        if len(source) > MAX_TEMPLATE:
            raise ValueError(f"the chat template has {len(source):,} characters, more than {MAX_TEMPLATE:,}")
        self.source, self.now = source, now
        self.special, self.variables = dict(special or {}), dict(variables or {})

    def render(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        """The text of messages with the keys role and content. With `generation_prompt` it ends where the assistant's
        reply begins. ValueError where the template refuses them, or writes too much."""
        import jinja2

        names: dict[str, Any] = {**self.special, "tools": None, "documents": None, **self.variables}
        names |= {"messages": [dict(message) for message in messages], "add_generation_prompt": generation_prompt}
        parts: list[str] = []
        size = 0
        try:
            for part in self._compiled.generate(**names):
                parts.append(part)
                size += len(part)
                if size > MAX_RENDERED:
                    raise ValueError(f"the chat template writes more than {MAX_RENDERED:,} characters")
        except jinja2.TemplateError as error:
            raise ValueError(_refusal(str(error), messages)) from None
        except (TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError) as error:
            raise ValueError(f"this model's chat template fails for these messages: {error!r:.200}") from None
        return "".join(parts)

    @cached_property
    def literals(self) -> str:
        """What the template itself contains: its text and its string constants, NUL between two of them."""
        import jinja2.nodes

        tree = self._environment.parse(self.source)
        found = {node.data for node in tree.find_all(jinja2.nodes.TemplateData)}
        found |= {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
        return "\0".join(sorted(found))

    @cached_property
    def lead(self) -> str:
        """What the template writes between the generation prompt and the text of a reply, such as a space."""
        sign = chr(0xF0000)
        asked = {"role": "user", "content": "?"}
        try:
            prompt = self.render([asked], True)
            whole = self.render([asked, {"role": "assistant", "content": sign}])
        except ValueError:
            return ""
        at = whole.find(sign)
        return whole[len(prompt) : at] if at >= 0 and whole.startswith(prompt) else ""

    @cached_property
    def _compiled(self) -> Any:
        import jinja2

        try:
            return self._environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is no valid Jinja: {error}; restore the model's files") from None

    @cached_property
    def _environment(self) -> Any:
        """A sandbox set up as in transformers; `now` is read at each call."""
        environment = _sandbox_class()(
            trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        for name in GROWING:
            environment.filters[name] = _bounded_filter(name, environment.filters[name])
        environment.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: self.now().strftime(form),
            "dict": _Dict(),
            "namespace": _namespace_class(),
        }
        return environment


def _refusal(reason: str, messages: Sequence[Message]) -> str:
    """The error for messages that a template refuses, in one line."""
    text = f"this model's chat template refuses the conversation: {' '.join(reason.split())[:200]}"
    if any(message["role"] == "system" for message in messages):
        text += "; if it takes no system turn, write that text into the first turn of the user"
    return text


def _sandbox_class() -> type:
    """jinja2's immutable sandbox, whose operators, methods and filters make no strings or lists beyond MAX_RENDERED."""
    from jinja2.compiler import CodeGenerator
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generator(CodeGenerator):
        def visit_Concat(self, node: Any, frame: Any) -> None:  # noqa: N802 (jinja2's name), of the operator ~
            self.write("environment.concatenated((")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write("))")

    class Sandbox(ImmutableSandboxedEnvironment):
        code_generator_class = Generator
        intercepted_binops = frozenset(("+", "*", "**", "%"))

        def concatenated(self, parts: Sequence[Any]) -> str:
            texts = [str(part) for part in parts]
            if sum(map(len, texts)) > MAX_RENDERED:
                raise SecurityError("a result of '~' is too large")
            return "".join(texts)

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (as in jinja2)
            method = getattr(__obj, "__wrapped__", __obj)
            if isinstance(owner := getattr(method, "__self__", None), str):
                _check_growth(method.__name__, owner, (*args, *kwargs.values()))
            return super().call(__context, __obj, *args, **kwargs)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if _size(operator, left, right) > MAX_RENDERED:
                raise SecurityError(f"a result of {operator!r} is too large")
            return super().call_binop(context, operator, left, right)

    return Sandbox


def _size(operator: str, left: Any, right: Any) -> int:
    """An upper bound of the size of a result of numbers, strings and lists."""
    sizes = [len(side) for side in (left, right) if hasattr(side, "__len__")]
    if operator == "+":
        return sum(sizes)
    if operator == "*":
        return sizes[0] * max(side for side in (left, right) if isinstance(side, int)) if len(sizes) == 1 else 0
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * abs(right)
    if operator == "%" and isinstance(left, str):  # a format may ask for any width
        return MAX_RENDERED + 1 if any(char.isdigit() or char == "*" for char in left) else sum(sizes)
    return 0


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of jinja2 whose result is checked before it is made."""
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        value, *others = args[skipped:]
        value = list(value) if name == "join" else value
        _check_growth(name, value, (*others, *kwargs.values()), is_filter=True)
        return function(*args[:skipped], value, *others, **kwargs)

    return checked


def _check_growth(name: str, value: Any, args: Sequence[Any], is_filter: bool = False) -> None:
    """SecurityError for a method of a string, or a filter, whose result may be beyond MAX_RENDERED."""
    from jinja2.exceptions import SecurityError

    text = str(value)
    texts = [arg for arg in args if isinstance(arg, str)]
    size = max((abs(arg) for arg in args if isinstance(arg, int)), default=0)
    if name == "replace" and len(texts) > 1:
        size = len(text) + text.count(texts[0]) * len(texts[1])
    elif name == "join":
        parts = value if is_filter else args[0] if args and isinstance(args[0], list | tuple) else ()
        between = sum(map(len, texts)) if is_filter else len(text)
        size = sum(len(str(part)) + between for part in parts)
    elif name in ("indent", "expandtabs", "tojson"):
        places = len(text) if name == "tojson" else text.count("\n") + text.count("\t") + 1
        size = len(text) + places * max(size, *map(len, texts), 0)
    elif name in ("format", "format_map") and any(len(digits) > 4 for digits in re.findall(r"\d+", text)):
        size = MAX_RENDERED + 1
    if size > MAX_RENDERED:
        raise SecurityError(f"a result of {name!r} is too large")


def _generation_tag() -> type:
    """The tag {% generation %} of transformers, which marks the assistant's words; it writes its body."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class GenerationTag(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Callable[[], str]) -> str:
            return caller()

    return GenerationTag


def _namespace_class() -> type:
    """jinja2's namespace, without names that begin with an underscore."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    def check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace takes no name with an underscore in front, such as {name!r:.80}")

    class CheckedNamespace(Namespace):
        def __init__(*args: Any, **names: Any) -> None:  # `self` may be a name of the template
            self, *given = args
            values = dict(*given, **names)
            for name in values:
                check(name)
            Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            super().__setitem__(name, value)

    return CheckedNamespace


class _Dict:
    """`dict` for templates, without the attributes of the class."""

    def __call__(self, *args: Any, **names: Any) -> dict[Any, Any]:
        return dict(*args, **names)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without the HTML escapes of jinja2's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
