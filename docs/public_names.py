"""The directive `public-names`: the docstrings of all public names of a topic.

`ppo_jax/__init__.pyi` lists the public names by topic, each under a comment. The argument of the
directive is the beginning of such a comment.
"""

import ast
import functools
import importlib
import inspect
import re
from pathlib import Path

from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective

import ppo_jax

STUB = Path(__file__).parents[1] / "ppo_jax/__init__.pyi"


@functools.cache
def topics() -> dict[str, list[tuple[str, str]]]:
    """Return the modules and names of each topic, by its comment."""
    parts = re.split(r"^# (.*)\n", STUB.read_text(), flags=re.MULTILINE)
    found = {}
    for topic, code in zip(parts[1::2], parts[2::2], strict=True):
        imports = [node for node in ast.parse(code).body if isinstance(node, ast.ImportFrom)]
        names = [(f"ppo_jax.{node.module}", x.name) for node in imports for x in node.names]
        if names:
            found[topic] = names
    return found


def describe(module: str, name: str) -> str:
    """Return the reStructuredText that documents a name that `module` defines."""
    if is_object(module, name):
        kind = "class" if inspect.isclass(getattr(ppo_jax, name)) else "function"
        return f".. auto{kind}:: ppo_jax.{name}\n"
    analyzer = ModuleAnalyzer.for_module(module)
    for node in ast.parse(analyzer.code).body:
        if isinstance(node, ast.ImportFrom) and name in {x.asname or x.name for x in node.names}:
            return describe(str(node.module), name)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            code = analyzer.code.splitlines()[node.lineno - 1 : node.end_lineno]
    docs = analyzer.find_attr_docs().get(("", name), [])
    lines = ["", *docs, "", ".. code-block:: python", "", *(f"   {line}" for line in code), ""]
    return f".. py:data:: {name}\n" + "\n   ".join(lines)


def is_object(module: str, name: str) -> bool:
    """Return whether a name is a class or function, and not a value or an alias of a type."""
    value = getattr(importlib.import_module(module), name)
    named = getattr(value, "__name__", None) == name
    return named and (inspect.isclass(value) or inspect.isroutine(value))


class PublicNames(SphinxDirective):
    """Document the names of a topic."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self):
        """Return the nodes of a table of the objects, and of the documentation of each name."""
        (names,) = [v for topic, v in topics().items() if topic.startswith(self.arguments[0])]
        table = "".join(f"   {name[1]}\n" for name in names if is_object(*name))
        text = f".. py:currentmodule:: ppo_jax\n\n.. autosummary::\n   :nosignatures:\n\n{table}\n"
        text += "\n".join(describe(*name) for name in names)
        return self.parse_text_to_nodes(f"```{{eval-rst}}\n{text}\n```\n")


SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Example|Examples|Note)s?:")


def prepare(lines: list[str]) -> list[str]:
    """Return the lines of a docstring in the form that Sphinx reads.

    Equations, which are the indented blocks before the first section, become literal blocks. Code
    in backticks that is no name becomes a literal, because a colon in it would end a field.
    """
    code = lambda match: match[0] if re.fullmatch(r"[\w.]+", match[1]) else f"`{match[0]}`"
    found: list[str] = []
    literal, described = False, False
    for line in re.sub(r"(?<!`)`([^`]+)`(?!`)", code, "\n".join(lines)).split("\n"):
        described = described or SECTION.match(line) is not None
        indented = line.startswith("  ") and not described
        if indented and not literal and found and not found[-1]:
            found += ["::", ""]
            literal = True
        literal = literal and (indented or not line)
        found.append(line if literal else re.sub(r"(?<!`)\|(\w)\|", r"\\|\1\\|", line))
    return found


def setup(app):
    """Register the directive."""

    def skip_fields(app, what, name, member, skip, options):
        """Leave out the fields of named tuples, which the docstring of the class describes."""
        return (inspect.getdoc(member) or "").startswith("Alias for field number") or skip

    def process(app, what, name, member, options, lines):
        lines[:] = prepare(lines)

    # Napoleon, with the priority 500, reads the sections afterwards.
    app.connect("autodoc-process-docstring", process, priority=400)
    app.connect("autodoc-skip-member", skip_fields)
    app.add_directive("public-names", PublicNames)
    return {"parallel_read_safe": True}
