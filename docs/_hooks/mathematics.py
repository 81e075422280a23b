"""Turns the LaTeX of the pages into MathML while the site is built, and adds a font for
it. So mathematics needs no script, no server, and no font of the reader's own.

`pymdownx.arithmatex` has found the LaTeX, and marked it up in one of two ways.
"""

import html
import importlib.resources
import re

from latex2mathml.converter import convert
from mkdocs.structure.files import File


# With the punctuation around it, from which browsers would otherwise break the line.
_inline = re.compile(
    r'([(\[]?)<span class="arithmatex">\\\((.*?)\\\)</span>([^\s<]*)', re.DOTALL
)
_block = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def on_files(files, config):
    # The one package that holds this font. Its licence, which has to go along with it,
    # is `docs/fonts/OFL.txt`.
    font = importlib.resources.files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf"
    content = font.read_bytes()
    files.append(File.generated(config, "fonts/STIXTwoMath.ttf", content=content))
    return files


def on_page_content(content, **kwargs):
    del kwargs
    content = _inline.sub(
        lambda m: f'<span class="nowrap">{m[1]}{_mathml(m[2], "inline")}{m[3]}</span>',
        content,
    )
    content = _block.sub(
        lambda m: f'<div class="equation">{_mathml(m[1], "block")}</div>', content
    )
    if 'class="arithmatex"' in content:
        raise ValueError("There is LaTeX that was not recognised.")
    return content


def _mathml(latex: str, display: str) -> str:
    mathml = convert(html.unescape(latex).strip(), display=display)
    # Bars, which it takes for binary operators, go around something, with no space; and
    # there is a space after the name of a function.
    mathml = mathml.replace(
        '<mo stretchy="false">&#x0007C;', '<mo stretchy="false" lspace="0" rspace="0">|'
    )
    return re.sub("<mi>[a-z]{2,}</mi>", r'\g<0><mspace width="0.17em"/>', mathml)
