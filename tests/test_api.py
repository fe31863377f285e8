"""The public API: complete, documented, in small functions and files, and quick to import."""

import ast
import enum
import inspect
import io
import re
import subprocess
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import ppo_jax

ROOT = Path(ppo_jax.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
EXPORTED = {name: inspect.unwrap(getattr(ppo_jax, name)) for name in ppo_jax.__all__}
FUNCTIONS = {name: x for name, x in EXPORTED.items() if inspect.isfunction(x)}
CLASSES = {
    name: x
    for name, x in EXPORTED.items()
    if inspect.isclass(x) and x.__module__.startswith("ppo_jax.")
}
HEAVY = {"transformers", "orbax", "torch", "tensorboardX", "tyro", "tokenizers", "wandb"}
MOST_LINES, MOST_BODY_LINES, MOST_UNFORMATTED = 300, 45, 8


# --- what is exported ---


def test_import_is_light_and_every_name_can_be_imported():
    code = "import sys, ppo_jax; ppo_jax.learn, ppo_jax.language_model, ppo_jax.make_mesh; "
    code += f"print(sorted({HEAVY} & set(sys.modules))); "
    code += "assert set(ppo_jax.__all__) <= set(dir(ppo_jax))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_all_is_complete():
    assert len(ppo_jax.__all__) == len(set(ppo_jax.__all__)) > 100
    public = {
        name
        for name, x in vars(ppo_jax).items()
        if not name.startswith("_") and str(getattr(x, "__module__", "")).startswith("ppo_jax.")
    }
    assert public <= set(ppo_jax.__all__), public - set(ppo_jax.__all__)


def names_in(annotation: ast.expr | None, ours: set[str]) -> Iterator[str]:
    """Yield the names of the package in an annotation: of `data.Prompts | None`, `Prompts`."""
    modules = set()
    for node in ast.walk(annotation or ast.Constant(None)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            modules.add(node.value)
            if node.value.id in ours:
                yield node.attr
        elif isinstance(node, ast.Name) and node not in modules and node.id in ours:
            yield node.id
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"[\w.\[\], |]+", node.value)
        ):
            yield from names_in(ast.parse(node.value, mode="eval").body, ours)


def annotations_of(function: ast.FunctionDef) -> Iterator[ast.expr | None]:
    """Yield the annotations of the parameters and of the result of a function."""
    arguments = function.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        yield argument.annotation
    yield function.returns


def is_public(method: str) -> bool:
    """Return whether users call a method of this name."""
    return not method.startswith("_") or method in ("__init__", "__call__")


def public_annotations(x: Any) -> Iterator[ast.expr | None]:
    """Yield the annotations of a function, or of the fields and public methods of a class."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(x))).body[0]
    if isinstance(definition, ast.FunctionDef):
        yield from annotations_of(definition)
    elif isinstance(definition, ast.ClassDef):
        for node in definition.body:
            if isinstance(node, ast.AnnAssign) and not ast.unparse(node.target).startswith("_"):
                yield node.annotation
            if isinstance(node, ast.FunctionDef) and is_public(node.name):
                yield from annotations_of(node)


def package_names(module: Any) -> set[str]:
    """Return the names that a module defines or imports from the package."""
    tree = ast.parse(inspect.getsource(module))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ppo_jax"):
            names |= {alias.asname or alias.name for alias in node.names}
    for statement in tree.body:
        if isinstance(statement, ast.ClassDef):
            names.add(statement.name)
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if not isinstance(getattr(module, name, None), TypeVar)}


def test_every_type_in_a_public_signature_is_exported():
    missing: dict[str, set[str]] = {}
    for name, x in (FUNCTIONS | CLASSES).items():
        module = sys.modules[x.__module__]
        ours = package_names(module)
        for annotation in public_annotations(x):
            for used in names_in(annotation, ours):
                if used not in ppo_jax.__all__:
                    missing.setdefault(used, set()).add(name)
    assert not missing, "\n" + "\n".join(f"{name}: {x}" for name, x in missing.items())


# --- what is documented ---

SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example|Source)s?:{1,2}$")
CODE = re.compile(r">>> |\A\n {2,}\S")  # a doctest, or the indented code of `Example::`
SHAPE = re.compile(r"`[^`]*\[[^`]*\]`")
# Functions of arrays that check nothing, since any shapes have a meaning.
NEVER_RAISE = {"no_critic", "place_rows"}
DTYPE = re.compile(r"\b(float32|float|int32|int|integer|bool|uint32|key|numeric|dtype)\b")


def sections_of(x: Any) -> dict[str, str]:
    """Return the sections of a docstring by their names; the text before them is called ''."""
    sections, current = {"": ""}, ""
    for line in (inspect.getdoc(x) or "").splitlines():
        if match := SECTION.match(line):
            current = match[1]
            sections[current] = ""
        else:
            sections[current] += line + "\n"
    return sections


def entries_of(section: str) -> dict[str, str]:
    """Return the entries `name: text` of a section; `a, b: text` makes one entry for each name."""
    entries: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        if match := re.match(r"  (\*{0,2}\w+(?:, \w+)*): (.*)", line):
            names = [name.lstrip("*") for name in match[1].split(", ")]
            entries |= dict.fromkeys(names, match[2])
        else:
            for name in names:
                entries[name] += " " + line.strip()
    return entries


def statements_of(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes below a node, except those of functions that are defined there."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.Lambda):
            yield child
            yield from statements_of(child)


def can_raise(definition: ast.FunctionDef) -> bool:
    """Return whether a function itself raises or asserts something."""
    nodes = list(statements_of(definition))
    calls = [ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)]
    raises = any(isinstance(node, ast.Raise | ast.Assert) for node in nodes)
    return raises or any("chex.assert" in call or "check_" in call for call in calls)


def problems_of_function(function: Any) -> Iterator[str]:
    """Yield what the docstring of a function lacks."""
    sections, signature = sections_of(function), inspect.signature(function)
    definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(definition, ast.FunctionDef)
    arguments = definition.args
    annotations = {
        argument.arg: ast.unparse(argument.annotation) if argument.annotation else ""
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    }
    if not re.match(r"[A-Z`].*[.:]$", sections[""].split("\n")[0]):
        yield "a summary of one sentence on the first line"
    entries = entries_of(sections.get("Args", ""))
    if set(entries) != set(signature.parameters):
        yield f"Args for {set(signature.parameters) ^ set(entries)}"
    arrays = {
        name
        for name, text in annotations.items()
        if re.search(r"\b(Array|ndarray)\b", text) and "Callable" not in text
    }
    for name in sorted(arrays & set(entries)):
        if not SHAPE.search(entries[name]) or not DTYPE.search(entries[name]):
            yield f"shape and dtype of {name}"
    returns = ast.unparse(definition.returns or ast.Constant(None))
    if returns != "None" and not {"Returns", "Yields"} & set(sections):
        yield "Returns"
    keys = {name for name in arrays if "key" in entries.get(name, "")}
    checks = arrays - keys and function.__name__ not in NEVER_RAISE
    if "Raises" not in sections and (checks or can_raise(definition)):
        yield "Raises"
    if not CODE.search(sections.get("Example", "")):
        yield "Example"


def problems_of_class(cls: type) -> Iterator[str]:
    """Yield what the docstring of a class lacks."""
    sections = sections_of(cls) if cls.__doc__ else {"": ""}
    if not re.match(r"[A-Z`].*\.$", sections[""].split("\n")[0]):
        yield "a summary of one sentence on the first line"
    if issubclass(cls, enum.Enum | Exception) or getattr(cls, "_is_protocol", False):
        return
    fields = {name for name in getattr(cls, "__annotations__", {}) if not name.startswith("_")}
    entries = entries_of(sections.get("Attributes", "") + sections.get("Args", ""))
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    described = {  # a string below a field, which the command line shows as its help
        ast.unparse(field.target)
        for field, text in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
    if fields - set(entries) - described:
        yield f"Attributes for {fields - set(entries) - described}"
    if not entries and not described:
        yield "Attributes or Args"
    if not CODE.search(sections.get("Example", "")):
        yield "Example"


def test_docstrings_of_exported_functions():
    problems = {name: list(problems_of_function(x)) for name, x in FUNCTIONS.items()}
    problems = {name: found for name, found in problems.items() if found}
    assert not problems, "\n" + "\n".join(f"{name}: {x}" for name, x in problems.items())


def test_docstrings_of_exported_classes():
    problems = {name: list(problems_of_class(x)) for name, x in CLASSES.items()}
    problems = {name: found for name, found in problems.items() if found}
    assert not problems, "\n" + "\n".join(f"{name}: {x}" for name, x in problems.items())


# --- how long it is ---


def test_functions_and_files_are_short():
    long = []
    for file in FILES:
        text = file.read_text()
        if text.count("\n") > MOST_LINES:
            long.append(f"{file.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[ast.get_docstring(node) is not None :]
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                if lines > MOST_BODY_LINES:
                    long.append(f"{file.relative_to(ROOT)}: {node.name} has {lines} lines")
    assert not long, "\n" + "\n".join(long)


def test_only_tables_of_constants_are_laid_out_by_hand():
    count = 0
    for file in FILES:
        text = file.read_text()
        tree = ast.parse(text)
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT and re.search(r"fmt: ?(skip|off)", token.string):
                line, count = token.start[0], count + 1
                (statement,) = [x for x in tree.body if x.lineno - 1 <= line <= (x.end_lineno or 0)]
                assert isinstance(statement, ast.Assign | ast.AnnAssign), f"{file}:{line}"
    assert count <= MOST_UNFORMATTED
