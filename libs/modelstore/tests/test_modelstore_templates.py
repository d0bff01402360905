"""Templates that come with a model: which are served, and what those that are not have tried."""

import pytest

from chassis.errors import Code, PlatformError
from modelstore.chat_sandbox import check_template

ECHO = "{{ messages[-1].content }}"


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}{{ eos_token }}{% endfor %}",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + ECHO,
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% if ns.n > 2 %}{% break %}"
        "{% endif %}{% endfor %}{{ strftime_now('%Y') }}{{ messages | tojson }}",
    ],
    ids=["usual", "without a system's turn", "with all that transformers offers"],
)
def test_usual_templates_pass(source: str) -> None:
    check_template(source, {"eos_token": "</s>"})


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ ''.__class__ }}" + ECHO, "__class__"),
        ("{{ ''['__class__'] }}" + ECHO, "__class__"),
        ("{{ '' | attr('__class__') }}" + ECHO, "__class__"),
        ("{{ '' | attr('__cl' ~ 'ass__') }}" + ECHO, "computed name"),
        ("{{ ''['__cl' ~ 'ass__'] }}" + ECHO, "__class__"),
        ("{{ '{0.__class__}'.format(1) }}" + ECHO, "__class__"),
        ("{% if false %}{{ raise_exception.__globals__ }}{% endif %}" + ECHO, "__globals__"),
        ("{{ messages.append(1) }}" + ECHO, "append"),
        ("{% include 'passwd' %}" + ECHO, "include"),
        ("{% for i in range(10 ** 9) %}{% endfor %}" + ECHO, "Range too big"),
        ("{{ 'a' * 10 ** 10 }}" + ECHO, "memory"),
        ("{{ 'a' * 10 ** 5 }}" + ECHO, "characters"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "no template"),
        ("{% for %}", "no template"),
        ("{{ unknown.thing }}", "does not render"),
        ("Say hello.", "without the question"),
    ],
)
def test_what_reaches_out_or_cannot_be_rendered_is_refused(source: str, why: str) -> None:
    with pytest.raises(PlatformError) as caught:
        check_template(source, {})
    assert caught.value.code is Code.INVALID_ARGUMENT and why in caught.value.message


def test_a_template_that_never_ends_is_ended() -> None:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(PlatformError, match="more time or memory"):
        check_template(loop + ECHO, {})
