"""A hook for mkdocs.yml: adds the folders outside docs/ that the pages link to."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("deploy", "examples")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files of the folders unchanged."""
    for folder in FOLDERS:
        for path in sorted(path for path in (ROOT / folder).iterdir() if path.is_file()):
            files.append(File.generated(config, f"{folder}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites links to ../deploy/ and the like, which are right in a clone, to deploy/ on the site."""
    for folder in FOLDERS:
        markdown = markdown.replace(f"](../{folder}/", f"]({folder}/")
    return markdown
