"""Docstrings name things as Sphinx does, :func:`fastkd.kd_loss`: a link on the site, where the name has a page."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|mod|meth|attr):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Rewrites the roles of every docstring."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every object that griffe finds."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(
                r'<autoref identifier="\1" optional><code>\1</code></autoref>',
                obj.docstring.value,
            )
