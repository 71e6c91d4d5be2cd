"""Hooks of mkdocs: the README is the first page, and the config's page lists its fields."""

from __future__ import annotations

import os
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)")


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Complete the generated pages, and replace links to files outside of ``docs``."""
    name = page.file.src_uri
    if name == "index.md":
        markdown = LINK.sub(_from_docs, (ROOT / "README.md").read_text("utf-8"))
    if name == "config.md":
        markdown = markdown.replace("<!-- fields -->", config_fields())
    return LINK.sub(_inside, markdown)


def _from_docs(link: re.Match[str]) -> str:
    """A link of the README, seen from ``docs``."""
    text, target = link.groups()
    return f"[{text}]({target.removeprefix('docs/') if target.startswith('docs/') else f'../{target}'})"


def _inside(link: re.Match[str]) -> str:
    """The link, to the repository if the file is outside of ``docs``. Without its address, only the text remains."""
    text, target = link.groups()
    if not target.startswith("../"):
        return link[0]
    server, repository = os.environ.get("GITHUB_SERVER_URL"), os.environ.get("GITHUB_REPOSITORY")
    return f"[{text}]({server}/{repository}/blob/main/{target[3:]})" if repository else text


def config_fields() -> str:
    """A section for each field of ``FGGMConfig``, with its default and help."""
    from fggm_peft import FGGMConfig

    sections = []
    for field in fields(FGGMConfig):
        if text := field.init and field.metadata.get("help"):
            default = field.default if field.default is not MISSING else None
            sections.append(f"### `{field.name}` {{ #{field.name} }}\n\nDefault: `{default!r}`\n\n{text}")
    return "\n\n".join(sections)
