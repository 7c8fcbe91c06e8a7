"""The README with links that lead somewhere from a package index, too; all else is in pyproject.toml."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def absolute(link: re.Match[str]) -> str:
    picture, text, target = link.groups()
    return f"{picture}[{text}]({REPOSITORY}/{'raw' if picture else 'blob'}/main/{target})"


RELATIVE = re.compile(r"(!?)\[([^\]\[]*)\]\((?!https?:|#)([^)\s]+)\)")

setup(
    long_description=RELATIVE.sub(absolute, (ROOT / "README.md").read_text()),
    long_description_content_type="text/markdown",
)
