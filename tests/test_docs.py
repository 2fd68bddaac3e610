"""Runs the examples in the documentation: what it shows is what happens."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

from adapter_ext.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
OWN_COMMAND = "python -m adapter_ext "


def run_commands(example: Example) -> None:
    """Runs those commands of a ``bash`` block that are our own and quick."""
    for line in example.parsed.splitlines():
        if line.startswith((f"{OWN_COMMAND}inspect", f"{OWN_COMMAND}convert")):
            status = main(shlex.split(line.removeprefix(OWN_COMMAND)))
            assert status == 0, line


PAGES = (
    "README.md",
    "docs/guide.md",
    "docs/any_model.md",
    "docs/compile.md",
    "docs/coming_from_nemo.md",
    "docs/training.md",
)


@pytest.mark.parametrize("page", PAGES)
def test_examples(page, tmp_path, monkeypatch, capsys):
    """All ``python`` blocks of a page, one after the other, in one namespace and a new folder.

    An ``output`` block is what the block before it printed.
    """
    monkeypatch.chdir(tmp_path)

    def compare(example: Example) -> None:
        assert capsys.readouterr().out == example.parsed, f"{page}, line {example.line}"

    document = Document.parse(
        str(ROOT / page),
        PythonCodeBlockParser(),
        CodeBlockParser("bash", run_commands),
        CodeBlockParser("output", compare),
    )
    # In the page's order, and not in that of the parsers.
    examples = list(document.examples())
    assert any(example.region.lexemes.get("arguments") == "python" for example in examples)
    for example in examples:
        if example.region.lexemes["arguments"] != "output":
            capsys.readouterr()
        example.evaluate()
