"""Settings of Sphinx for the documentation site: `sphinx-build -W docs runs/docs`."""

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import ppo_jax  # noqa: E402  (found by the line above)

project = "ppo_jax"
author = "The ppo_jax authors"
copyright = author
version = release = ppo_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "public_names",
]
html_theme = "furo"
html_title = f"ppo_jax {version}"
templates_path: list[str] = []

myst_heading_anchors = 3
autodoc_default_options = {"members": True}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
default_role = "py:obj"

REPOSITORY = "https://github.com/ppo-jax/ppo-jax/blob/main/"
# Files outside of this folder that are pages of the site, because a page includes them.
INCLUDED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "experiments/ablations.md": "ablations.md",
    "experiments/benchmarks/README.md": "benchmarks.md",
    "experiments/scaling.md": "scaling.md",
    "ppo_jax/models/io/families/README.md": "adding_a_family.md",
}


def site_links(text: str, folder: str) -> str:
    """Return the Markdown of a file in `folder` of the repository with links for the site.

    Links to files of the repository lead to the page that has them, or else to the repository.
    """

    def replace(match: re.Match[str]) -> str:
        opening, target, anchor = match[1], match[2], match[3] or ""
        path = os.path.normpath(os.path.join(folder, target))
        if opening.startswith("!"):
            return f"{opening}({os.path.relpath(path, 'docs')})"
        if path.startswith("docs/") or path in INCLUDED:
            return f"]({INCLUDED.get(path, path.removeprefix('docs/'))}{anchor})"
        return f"]({REPOSITORY}{path}{anchor})"

    return re.sub(r"(!\[[^\]]*\]|\])\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)", replace, text)


def setup(app):
    """Rewrite the links of pages and of the files that they include."""

    def source_read(app, page, source):
        folder = os.path.dirname(f"docs/{page}")
        if folder == "docs":
            source[0] = site_links(source[0], folder)

    def include_read(app, path, page, source):
        source[0] = site_links(source[0], os.path.dirname(os.path.normpath(f"docs/{path}")))

    app.connect("source-read", source_read)
    app.connect("include-read", include_read)
