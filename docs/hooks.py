"""Links that leave docs/ lead to the repository: on the built site the other files do not lie beside the pages."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

logger = logging.getLogger("mkdocs.hooks")
_OUTSIDE = re.compile(r"(\]\()\.\./([^)#\s]+)")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Called by mkdocs with the text of a page. A file that does not exist is a warning; with --strict, an error."""

    def link(found: re.Match[str]) -> str:
        start, path = found.groups()
        if not (Path(config.config_file_path).parent / path).exists():
            logger.warning("%s links to %s, which does not exist", page.file.src_path, path)
        return f"{start}{config.repo_url}/blob/HEAD/{path}"

    return _OUTSIDE.sub(link, markdown)
