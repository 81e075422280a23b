"""Leads the relative links in Diffrax's docstrings, which are those of its own site, to
there, but for pages that this site has as well.
"""

import pathlib
import re

import griffe


_site = "https://docs.kidger.site/diffrax/"
# Where the docstrings are shown.
_folder = pathlib.Path(__file__).parent.parent / "api"
_link = re.compile(r"!?(\[[^\]]*\]\()(\.[^)#\s]*)(#[^)\s]*)?\)")


class UpstreamLinks(griffe.Extension):
    def on_object(self, *, obj, **kwargs):
        del self, kwargs
        if obj.docstring is not None:
            text = _link.sub(_absolute, obj.docstring.value)
            # Of an anchor alone, mkdocstrings takes it to be one within the docstring.
            text = text.replace("](#levy-areas)", "](./brownian.md#levy-areas)")
            obj.docstring.value = text


def _absolute(match: re.Match) -> str:
    label, path, anchor = match[1], match[2], match[3] or ""
    if (_folder / path).exists():
        return match[0]
    is_beside = path.startswith("./")
    path = re.sub(r"^(\.{1,2}/)+", "", path)
    path = re.sub(r"(\.md|\.ipynb|/)$", "/", path)
    # A figure would be loaded from there: it becomes a link.
    return f"{label}{_site}{'api/' if is_beside else ''}{path}{anchor})"
