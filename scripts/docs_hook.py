"""What mkdocs.yml needs beside its plugins: the folders outside docs/ that the pages link are a part of the site."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("deploy", "examples")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the folders' files as they are."""
    for folder in FOLDERS:
        for path in sorted(path for path in (ROOT / folder).iterdir() if path.is_file()):
            files.append(File.generated(config, f"{folder}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of docs/*.md to ../deploy/, as a clone has it, lead to the site's own deploy/; so for each folder."""
    for folder in FOLDERS:
        markdown = markdown.replace(f"](../{folder}/", f"]({folder}/")
    return markdown
