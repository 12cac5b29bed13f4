"""Templates of dialogues are programs of others: what they may do is bounded."""

import json
import signal
import time
from types import SimpleNamespace

import pytest

from gt_jax.data import chat_templates
from gt_jax.data.base import SpecialIds
from gt_jax.errors import InputError

pytest.importorskip("jinja2", reason="templates need it")
DIALOGUE = [{"role": "user", "content": "hi"}]


def render(template, **options):
    tokenizer = SimpleNamespace(chat_template=template, special=SpecialIds())
    return chat_templates.render_chat(tokenizer, DIALOGUE, **options)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "long"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}aaa{% endfor %}{% endfor %}", ""),
        ("{{ 'a' * 10 ** 9 }}", "makes a text of more than 8388608"),
        ("{% set n = namespace(a='aa') %}{% for i in range(50) %}{% set n.a = n.a ~ n.a %}"
         "{% endfor %}", "makes a text of more than 8388608"),
        ("{{ 9 ** 9 ** 9 }}", "raises numbers above 1000"),
        ("{{ 'a'.ljust(10 ** 9) }}", "pads a text"),
        ("{{ 'a' | center(10 ** 9) }}", "pads a text"),
        ("{{ '%0999999999d' % 3 }}", "pads a text"),
        ("{{ '{:>999999999}'.format(3) }}", "pads a text"),
        ("{{ ''.__class__.__mro__ }}", "refuses this dialogue (access to attribute"),
        ("{{ range(10 ** 9) }}", "Range too big"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ messages.append(1) }}", "refuses this dialogue"),
        ("a" * (2**20 + 1), "has 1048577 characters"),
        ("{{ raise_exception('no tools') }}", "(no tools)"),
        (None, "has no template of dialogues"),
        # What Python does in one call, without a line to stop at.
        ("{{ ([['a']] * 2000000) | sum(start=[]) | length }}", "takes longer than 0.2 seconds"),
        ("{{ ('a' * 8000000) | replace('a', 'b' * 300) | length }}", "1024 MiB of memory"),
        ("{{ (['a' * 8000000] * 300) | join | length }}", "1024 MiB of memory"),
        ("{{ ''.join(['a' * 8000000] * 300) | length }}", "1024 MiB of memory"),
        ("{% set n = namespace(a=[1] * 100000) %}{% for i in range(13) %}"
         "{% set n.a = n.a + n.a %}{% endfor %}", "takes "),
    ],
)  # fmt: skip
def test_template_that_does_too_much_is_an_error(template, message, monkeypatch):
    monkeypatch.setattr(chat_templates, "SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(InputError) as caught:
        render(template)
    assert message in str(caught.value) and len(str(caught.value)) < 300
    assert time.monotonic() - began < 60


def test_a_dialogue_after_one_that_ended_the_process_is_rendered(monkeypatch):
    monkeypatch.setattr(chat_templates, "SECONDS", 0.1)
    with pytest.raises(InputError, match="takes longer than 0"):
        render("{{ ([['a']] * 2000000) | sum(start=[]) | length }}")
    monkeypatch.setattr(chat_templates, "SECONDS", 5)
    assert render("{{ messages[0].content }}") == "hi"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signal_to_all_processes_of_a_server_leaves_its_dialogues_whole(name):
    render("{{ messages[0].content }}")
    child = chat_templates._process
    child.send_signal(getattr(signal, name))
    assert render("{{ messages[0].content }}") == "hi"
    assert chat_templates._process is child


def test_process_of_templates_ends_with_the_one_that_asks():
    render("{{ messages[0].content }}")
    child = chat_templates._process
    child.stdin.close()  # as the system does when a process ends, however it ends
    assert child.wait(60) == 0
    assert render("{{ messages[0].content }}") == "hi"


def test_what_templates_usually_do_works():
    template = (
        "{%- set n = namespace(count=0) -%}"
        "{% for m in messages %}{% generation %}{{ m['content'] | trim }}{% endgeneration %}"
        "{% set n.count = n.count + 1 %}{% continue %}{% endfor %}"
        "{{ '%02d' % n.count }}{{ 10 % 3 }}{{ 'at 100% of {}'.format(3) }}{{ '-' * 3 }}"
        "{{ messages | tojson(indent=1) | length }}{% if not add_generation_prompt %}.{% endif %}"
    )
    length = len(json.dumps(DIALOGUE, indent=1))
    assert render(template, add_generation_prompt=False) == f"hi011at 100% of 3---{length}."
