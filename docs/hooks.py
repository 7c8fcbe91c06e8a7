"""The site's pages that lie elsewhere in the repository, and links between all of them.

Pages are written for the repository, where a link leads to a file. The site has no other files than pages and pictures.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
ELSEWHERE = {
    "index.md": "README.md",
    "benchmarks.md": "benchmarks/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""pages of the site by the files that they are made of"""

LINK = re.compile(r"(?<!`)\[([^\]\[]*)\]\((?!https?:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    folder = posixpath.dirname(ELSEWHERE.get(here, f"docs/{here}"))
    pages = {source: name for name, source in ELSEWHERE.items()}

    def relink(link: re.Match[str]) -> str:
        text, target, anchor = link.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        uri = pages.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(uri) is None:
            assert (ROOT / path).exists(), f"{here} links to {target}, which does not exist"
            return text  # a file of the repository that is no page
        return f"[{text}]({posixpath.relpath(uri, posixpath.dirname(here) or '.')}{anchor or ''})"

    return LINK.sub(relink, markdown)
