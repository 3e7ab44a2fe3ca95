"""Chat templates that try to get out, to loop, or to fill memory, in every stage that renders one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ESCAPES = {
    "class": "{{ ''.__class__.__mro__ }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class-by-filter": "{{ (''|attr('__class__')).mro() }}",
    "globals": "{{ raise_exception.__globals__['__builtins__'] }}",
    "globals-of-a-macro": "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}{{ m.x.y }}",
    "format-string": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('touch ../outside.txt').read() }}",
    "lipsum": "{{ lipsum.__globals__['os'].system('touch ../outside.txt') }}",
    "joiner": "{{ joiner.__init__.__globals__.os }}",
    "import": "{% import '../outside.txt' as x %}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '../outside.txt' %}",
    "builtins": "{{ open('/etc/passwd').read() }}",
    "self": "{{ self._TemplateReference__context.environment.loader.x() }}",
    "change-a-list": "{% set x = messages.append(1) %}",
    "generator-frame": "{{ (messages|map('upper')).gi_frame.f_globals }}{{ none.x }}",
}
LOOPS = {
    "range": "{% for i in range(10**12) %}x{% endfor %}",
    "nested-loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "tree-recursion": "{% macro f(n) %}{{ f(n-1) * 2 if n }}{{ f(n-1) if n }}{% endmacro %}{{ f(90) }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "long-text": "{{ 'x' * 10**12 }}",
    "large-text": "{{ 'x' * (10 ** 9) }}",
    "text-above-the-limit": "{{ 'x' * 20000000 }}",
    "padding": "{{ 'x'|center(10**11) }}",
    "format-width": "{{ '%99999999999d' % 1 }}",
    "list-in-itself": "{% set a = ['x'] %}" + "{% set a = [a, a] %}" * 60 + "{{ a }}",
    "doubling": "{% set s = 'x' * 1000 %}" + "{% set s = s ~ s %}" * 40 + "{{ s }}",
    "json": "{% set a = ['x'] %}" + "{% set a = [a, a] %}" * 60 + "{{ a|tojson }}",
    "deep-source": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "many-blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "unclosed": "{% for",
}


def write(template: str):
    def damage(directory: Path) -> None:
        record = directory / "prompting.json"
        if record.exists():
            record.write_text(json.dumps(json.loads(record.read_text()) | {"chat_template": template}))
        else:
            (directory / "chat_template.jinja").write_text(template)

    return damage


@pytest.mark.parametrize("template", ESCAPES.values(), ids=ESCAPES.keys())
def test_no_way_out(hostile, template):
    assert "chat template" in hostile("fetch", "base", write(template))


@pytest.mark.parametrize("template", LOOPS.values(), ids=LOOPS.keys())
def test_no_end(hostile, template):
    assert "chat template" in hostile("fetch", "base", write(template))


@pytest.mark.parametrize(
    ("stage", "role"), [("prepare", "base"), ("convert", "merged"), ("infer", "gguf")], ids=lambda x: x
)
@pytest.mark.parametrize("name", ["nested-loops", "list-in-itself"])
def test_no_end_in_any_stage(hostile, stage, role, name):
    assert "takes more than" in hostile(stage, role, write(LOOPS[name]))


FORGED = {
    "list": [],
    "nothing": {},
    "another-key": {"chat_template": "x", "bos_token": "", "eos_token": "", "add_bos": False, "run": "id"},
    "template-is-a-list": {"chat_template": ["x"], "bos_token": "", "eos_token": "", "add_bos": False},
    "bos-is-a-number": {"chat_template": "x", "bos_token": 5, "eos_token": "", "add_bos": False},
    "truth-is-a-text": {"chat_template": "x", "bos_token": "", "eos_token": "", "add_bos": "no"},
}


@pytest.mark.parametrize("record", FORGED.values(), ids=FORGED.keys())
def test_a_forged_prompting_record(hostile, record):
    line = hostile("infer", "gguf", lambda d: (d / "prompting.json").write_text(json.dumps(record)))
    assert "prompting.json" in line


def test_a_template_larger_than_any(hostile):
    assert "1 MiB" in hostile("fetch", "base", write("x" * (2 << 20)))


def test_a_template_that_is_no_text(hostile):
    line = hostile("fetch", "base", lambda d: (d / "chat_template.jinja").write_bytes(b"\xff\xfe\x00"))
    assert "chat_template.jinja" in line
