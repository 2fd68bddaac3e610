"""What the source distribution ships, and what it asks for."""

from __future__ import annotations

import ast
import pathlib
import re
import sys

import pytest
from simt.build import REPOSITORY

egg_info = pytest.importorskip("setuptools.command.egg_info")

CACHES = {"__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache"}


def test_it_has_the_tests_with_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """By MANIFEST.in: helpers and data of the tests, pages whose examples run, benchmarks."""
    monkeypatch.chdir(REPOSITORY)
    found = egg_info.FileList()
    for line in pathlib.Path("MANIFEST.in").read_text().splitlines():
        found.process_template_line(line)
    shipped = set(found.files)
    for folder in ("tests", "docs", "benchmarks", "csrc", "cmake"):
        for file in pathlib.Path(folder).rglob("*"):
            if file.is_file() and CACHES.isdisjoint(file.parts):
                assert str(file) in shipped
    assert {"CHANGELOG.md", "CMakeLists.txt", "CONTRIBUTING.md"} <= shipped


def test_it_has_no_caches(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    caches = [f"tests/{folder}/x.cpython-311.pyc" for folder in ("__pycache__", "simt/__pycache__")]
    caches += ["benchmarks/.pytest_cache/v/cache/lastfailed", "tests/x.so"]
    for name in (*caches, "tests/conftest.py"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    found = egg_info.FileList()
    for line in (REPOSITORY / "MANIFEST.in").read_text().splitlines():
        found.process_template_line(line)
    assert found.files == ["tests/conftest.py"]


def test_every_imported_package_is_a_dependency() -> None:
    """But for those that the demo asks for by name, and those for types alone."""
    imported = set()
    for file in (REPOSITORY / "adapter_ext").glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            imported |= {name.partition(".")[0] for name in names}
    wanted = imported - sys.stdlib_module_names - {"adapter_ext"}
    line = re.search(r"^dependencies = (.*)$", (REPOSITORY / "pyproject.toml").read_text(), re.M)
    assert line is not None
    required = {re.split(r"\W", entry)[0] for entry in ast.literal_eval(line[1])}
    assert {{"yaml": "PyYAML"}.get(name, name) for name in wanted} == required
