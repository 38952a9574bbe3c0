"""The documentation against the code: what it names is there, and what is there is named."""

from __future__ import annotations

import ast
import importlib
import re
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings

from taskmesh.contracts import Contract
from taskmesh.metrics import catalogue
from taskmesh.metrics.instruments import Instrument

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [
    page
    for pattern in ("*.md", "docs/**/*.md", "services/*/README.md", "deploy/*/README.md", "shared/README.md")
    for page in sorted(ROOT.glob(pattern))
]
SOURCES = [
    path
    for folder in ("shared/src", "services/gateway/src", "services/billing-worker/src", "services/email-worker/src")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
VARIABLE = re.compile(r"TASKMESH_[A-Z][A-Z_]*[A-Z]")
instruments = {each.name: each for each in vars(catalogue).values() if isinstance(each, Instrument)}
SETTINGS_MODULES = ("taskmesh.settings", "gateway.settings", "billing_worker.settings", "email_worker.settings")


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page):
    """Files that a page links to exist, and so do the headings that it names in them."""
    broken = []
    for target in LINK.findall(CODE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (heading and heading not in set(headings(file))):
            broken.append(target)

    assert not broken


def test_the_readme_says_where_things_happen():
    """Each row of "Where does X happen?" links files that define every name it tells to look for."""
    section = (ROOT / "README.md").read_text().partition("## Where does X happen?")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]

    assert len(rows) > 20
    for row in rows:
        _, _, files, names, _ = row.split("|")
        defined = set().union(*(definitions(ROOT / path) for path in LINK.findall(files)))
        looked_for = set(re.findall(r"`([^`]+)`", names))
        assert looked_for, row
        assert looked_for <= defined, f"{row}: {looked_for - defined}"


def test_every_setting_is_documented_with_its_default():
    """docs/configuration.md has a row for each field of each settings class, with its default."""
    rows = set(re.findall(r"^\| `(TASKMESH_\w+)` \| (\S+) \|", (DOCS / "configuration.md").read_text(), re.MULTILINE))

    missing = {(variable, default) for _, variable, default in settings()} - rows

    assert not missing


def test_every_settings_class_is_documented():
    """docs/configuration.md names each settings class that has fields of its own."""
    page = (DOCS / "configuration.md").read_text()

    assert not {f"`{name}`" for name, _, _ in settings() if f"`{name}`" not in page}


def test_no_variable_is_documented_that_nobody_reads():
    """Every variable in docs/configuration.md is a setting, or is named by the client, the launcher or the tests."""
    others = {
        variable
        for folder in ("shared/src/taskmesh", "deploy/local/src")
        for path in (ROOT / folder).rglob("*.py")
        for variable in VARIABLE.findall(path.read_text())
    }
    others |= {f"TASKMESH_{service}_DATABASE_URL" for service in ("GATEWAY", "BILLING", "EMAIL")}

    documented = set(VARIABLE.findall((DOCS / "configuration.md").read_text()))

    assert not documented - others - {variable for _, variable, _ in settings()}


def test_every_log_message_is_documented():
    """docs/telemetry.md names each message that a service logs; a new one needs a line there."""
    page = (DOCS / "telemetry.md").read_text()

    assert not [message for message in logged() if f"`{message}`" not in page]


def test_every_span_is_documented():
    """docs/telemetry.md names each span that is begun by hand, whatever the varying part of its name."""
    documented = {
        re.sub(r"<[^>]+>", "*", name) for name in re.findall(r"`([^`]+)`", (DOCS / "telemetry.md").read_text())
    }

    assert not set(spans()) - documented


def test_every_metric_is_documented():
    """docs/telemetry.md has a row for each instrument of the catalogue, with its kind, unit and attributes."""
    section = (DOCS / "telemetry.md").read_text().partition("## Metrics")[2].partition("\n## ")[0]
    rows = {line.split("|")[1].strip(" `"): line.split("|") for line in section.splitlines() if line.startswith("| `")}

    for name, instrument in instruments.items():
        _, _, kind, unit, attributes, *_ = rows[name]
        assert (kind.strip(), unit.strip(" `")) == (instrument.kind, instrument.unit), name
        assert set(re.findall(r"`([^`]+)`", attributes)) == {each.name for each in instrument.attributes}, name


def test_the_worker_of_the_readme_is_a_service():
    """The example is under 60 lines, and announces its one type."""
    [source] = [block for block in python_blocks(ROOT / "README.md") if "WorkerApp(" in block]
    module = types.ModuleType("greetings")

    exec(compile(source, "greetings.py", "exec"), module.__dict__)

    assert len(source.splitlines()) < 60
    manifest = module.app.manifest()
    assert [each.type for each in manifest.types] == ["greetings.person.greet"]


def test_the_client_of_the_readme_submits_a_valid_invoice():
    """The contract that the example builds is one, up to where it needs a gateway."""
    [source] = [block for block in python_blocks(ROOT / "README.md") if "Taskmesh.from_env()" in block]
    before_the_gateway = source.partition("with Taskmesh")[0]
    module = types.ModuleType("first")

    exec(compile(before_the_gateway, "first.py", "exec"), module.__dict__)

    assert isinstance(module.invoice, Contract)
    ast.parse(source)


def headings(page: Path) -> Iterator[str]:
    """The anchors that GitHub makes of a page's headings."""
    if page.suffix == ".md":
        for title in re.findall(r"^#+ (.+)$", CODE.sub("", page.read_text()), re.MULTILINE):
            yield re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def definitions(path: Path) -> set[str]:
    """The names that a module defines: functions, classes, constants, and methods as `Class.method`."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found.add(name)
            case ast.ClassDef(name=name, body=body):
                found.add(name)
                methods = (each for each in body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))
                found.update(f"{name}.{method.name}" for method in methods)
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                found.add(name)
    return found


def settings() -> Iterator[tuple[str, str, str]]:
    """Class, variable and default, as the page writes it, of every setting, where it is declared."""
    for module_name in SETTINGS_MODULES:
        module = importlib.import_module(module_name)
        for cls in vars(module).values():
            if not (isinstance(cls, type) and issubclass(cls, BaseSettings)) or cls.__module__ != module_name:
                continue
            for field in cls.__annotations__:
                if field not in cls.model_fields:
                    continue
                info = cls.model_fields[field]
                default = "-" if info.is_required() else "none" if info.default is None else f"`{info.default}`"
                yield cls.__name__, f"TASKMESH_{field.upper()}", default


def logged() -> Iterator[str]:
    """Every constant message that is logged, both of those that are chosen between."""
    levels = {"debug", "info", "warning", "error", "exception", "critical"}
    for call in calls():
        match call:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="logger"), attr=level), args=[message, *_]) if (
                level in levels
            ):
                yield from constants(message)


def constants(node: ast.expr) -> Iterator[str]:
    """The texts that an expression can be, as far as they are written out."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.IfExp(body=body, orelse=orelse):
            yield from constants(body)
            yield from constants(orelse)


def spans() -> Iterator[str]:
    """The names of spans, with `*` for what varies."""
    for call in calls():
        match call:
            case ast.Call(func=ast.Attribute(attr="start_span" | "start_as_current_span"), args=[name, *_]):
                match name:
                    case ast.Constant(value=str(text)):
                        yield text
                    case ast.JoinedStr(values=parts):
                        yield "".join(part.value if isinstance(part, ast.Constant) else "*" for part in parts)


def calls() -> Iterator[ast.Call]:
    """Every call in the code of library and services."""
    for path in SOURCES:
        yield from (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))


def python_blocks(page: Path) -> list[str]:
    """The Python examples of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
