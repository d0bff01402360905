"""The sandbox that chat templates are rendered in, and the check that a template stays inside it.

A template is a program that came with a model. It is rendered with jinja2's immutable sandbox and with what
transformers offers to templates, so that a model's template means the same here; nothing else is in reach.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from chassis.errors import Code, PlatformError

if TYPE_CHECKING:
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEMPLATE_BYTES = 256 * 1024
_PROBE_TIMEOUT_S = 30.0  # of a busy machine; what a template may take is less: template_probe


def make_environment() -> "ImmutableSandboxedEnvironment":
    """Returns the one environment that templates are compiled in, here and in the service that serves them."""
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def check_template(source: str, special_tokens: dict[str, str]) -> None:
    """Reads a template for what reaches out, then renders a conversation in a process of its own, within limits.

    Takes a quarter of a second, some seconds where it is hopeless. Raises PlatformError(INVALID_ARGUMENT) for what will
    not be served.
    """
    if len(source.encode(errors="replace")) > MAX_TEMPLATE_BYTES:
        raise _refused(f"it is longer than {MAX_TEMPLATE_BYTES} bytes")
    if reasons := sorted(set(_reaches(source))):
        raise _refused(f"it reaches outside its sandbox: {', '.join(reasons[:5])}")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "modelstore.template_probe"],
            input=json.dumps({"source": source, "special_tokens": special_tokens}),
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise _refused(f"it did not render a short conversation within {_PROBE_TIMEOUT_S:.0f} s") from error
    if done.returncode < 0:
        raise _refused("rendering a short conversation took more time or memory than a template may use")
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise PlatformError(Code.INTERNAL, f"the probe of the chat template failed: {done.stderr.strip()[-500:]}")
    if why := json.loads(lines[-1])["refused"]:
        raise _refused(why)


def _reaches(source: str) -> Iterator[str]:
    """Yields what a template names that no template needs. What is named at run time, the sandbox itself refuses."""
    import jinja2
    from jinja2 import nodes

    try:
        tree = make_environment().parse(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise _refused(f"it is no template: {error}") from error
    for node in tree.find_all((nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport)):
        yield f"{{% {type(node).__name__.lower()} %}}"
    for attribute in tree.find_all(nodes.Getattr):
        if _is_internal(attribute.attr):
            yield attribute.attr
    for item in tree.find_all(nodes.Getitem):
        if isinstance(item.arg, nodes.Const) and isinstance(item.arg.value, str) and item.arg.value.startswith("__"):
            yield item.arg.value
    for filtered in tree.find_all(nodes.Filter):
        if filtered.name == "attr":
            yield from _reach_of_attr(filtered)


def _reach_of_attr(filtered: "nodes.Filter") -> Iterator[str]:
    from jinja2 import nodes

    for argument in filtered.args:
        if not isinstance(argument, nodes.Const):
            yield "attr() of a computed name"
        elif _is_internal(str(argument.value)):
            yield str(argument.value)


def _is_internal(name: str) -> bool:
    from jinja2 import sandbox

    unsafe = (
        sandbox.UNSAFE_FUNCTION_ATTRIBUTES
        | sandbox.UNSAFE_METHOD_ATTRIBUTES
        | sandbox.UNSAFE_GENERATOR_ATTRIBUTES
        | sandbox.UNSAFE_COROUTINE_ATTRIBUTES
        | sandbox.UNSAFE_ASYNC_GENERATOR_ATTRIBUTES
    )
    return name.startswith("_") or name in unsafe or name == "mro"


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML, which models never saw in training."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refused(why: str) -> PlatformError:
    message = f"the model's chat template is refused: {why}"
    return PlatformError(Code.INVALID_ARGUMENT, message, param="chat_template", reason="unsafe_template")
