"""Pages that are not files of docs/pages: the notebooks as tutorials, and the changelog."""

import re
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
CHANGELOG = ROOT / "CHANGELOG.md"

_FORMULA = re.compile(r"(`[^`]*`)|\$\$(.+?)\$\$|\$([^$\n]+)\$", re.DOTALL)
_formulas: list[str] = []


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists the changelog last, where there is one."""
    if CHANGELOG.exists():
        config.nav = [*(config.nav or []), {"Changelog": "changelog.md"}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds `notebooks/NAME.ipynb` as `tutorials/NAME.md`, with the outputs stored in it."""
    pages = {"tutorials/index.md": (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")}
    if CHANGELOG.exists():
        pages["changelog.md"] = CHANGELOG.read_text(encoding="utf-8")
    exporter = MarkdownExporter()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = _FORMULA.sub(_placeholder, cell.source)
        names = {"output_files_dir": f"{path.stem}_files", "unique_key": path.stem}
        page, resources = exporter.from_notebook_node(notebook, names)
        pages[f"tutorials/{path.stem}.md"] = page
        for image, content in resources["outputs"].items():
            files.append(File.generated(config, f"tutorials/{image}", content=content))
    for name, text in pages.items():
        files.append(File.generated(config, name, content=_linked(text)))
    return files


def _placeholder(found: re.Match[str]) -> str:
    """What stands for a formula until Markdown is done, which would read its signs as its own."""
    code, block, inline = found.groups()
    if code:
        return code
    # MathML is what browsers draw without a script.
    _formulas.append(convert(block or inline, display="block" if block else "inline"))
    return f"FORMULA{len(_formulas) - 1}END"


def _linked(text: str) -> str:
    """A page of the repository with its links as the site has them."""
    # The badge would be loaded from elsewhere.
    text = re.sub(r"\[!\[([^]]*)\]\(https://colab[^)]*\)\]", r"[\1]", text)
    text = re.sub(r"\]\(([\w-]+)\.ipynb\)", r"](\1.md)", text)
    return re.sub(r"\]\((?:\./)?README\.md\)", "](index.md)", text)


def on_page_content(html: str, **_: object) -> str:
    """Puts formulas in their places."""
    return re.sub(r"FORMULA(\d+)END", lambda found: _formulas[int(found[1])], html)


def on_post_page(output: str, page: Page, **_: object) -> str:
    """Leaves out of the commands' flags what only their parser needs."""
    if page.file.src_uri != "reference/commands.md":
        return output
    annotated = r"<span[^>]*>Annotated</span>\[(.*?), <span[^>]*>Positional</span>\]"
    return re.sub(annotated, r"\1", output).replace("Attributes:", "Settings:")
