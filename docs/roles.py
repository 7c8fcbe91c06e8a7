"""Docstrings name things as Sphinx does, ``:func:`name```; the API reference is Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Turns roles into links to members of the same class or module, else to the public name."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        self.rewrite(pkg, pkg)

    def rewrite(self, scope: griffe.Object, package: griffe.Module) -> None:
        """Rewrite the docstrings of ``scope`` and of all that it holds."""

        def link(role: re.Match[str]) -> str:
            name = role[1].removeprefix(f"{package.name}.")
            for place in (scope, scope.parent):
                member = place and place.members.get(name)
                if member and not member.is_alias:
                    return f"[`{name}`][{member.path}]"
            return f"[`{name}`][{package.name}.{name}]"

        if scope.docstring is not None:
            scope.docstring.value = ROLE.sub(link, scope.docstring.value)
        for member in scope.members.values():
            if isinstance(member, griffe.Object):
                self.rewrite(member, package)
