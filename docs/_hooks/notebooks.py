"""Turns each notebook into a page while the site is built: `pde.ipynb` into `pde.md`,
its figures into files beside that. The notebook itself can be downloaded, without the
links that lead somewhere only from within the site.
"""

import json
import pathlib
import posixpath
import re
from urllib.parse import urljoin

from jinja2 import DictLoader
from mkdocs.structure.files import File
from nbconvert import MarkdownExporter


_template = """
{%- extends 'markdown/index.md.j2' -%}
{%- macro output_text(text) -%}
``` { .text .output .no-copy }
{{ text.rstrip() }}
```
{%- endmacro -%}
{% block stream %}
{{ output_text(output.text) }}
{% endblock stream %}
{% block data_text scoped %}
{{ output_text(output.data['text/plain']) }}
{% endblock data_text %}
{% block data_png %}
![{{ cell.metadata.alt }}]({{ output.metadata.filenames['image/png'] }})
{% endblock data_png %}
"""


# To an entry of the API, which `autorefs` resolves; and to another page.
_reference = re.compile(r"\[(`[^`]+`)\]\[[\w.]*\]")
_link = re.compile(r"\[([^\]]+)\]\(([\w./-]*\.md)?(#[\w-]+)?\)")


def on_files(files, config):
    for notebook in [f for f in files if f.src_uri.endswith(".ipynb")]:
        uri = notebook.src_uri
        assert notebook.abs_src_path is not None
        text = pathlib.Path(notebook.abs_src_path).read_text()
        for page, content in _page(pathlib.Path(uri), notebook):
            files.append(File.generated(config, page, content=content))
        files.remove(notebook)
        text = _to_download(text, uri, config.site_url)
        files.append(File.generated(config, uri, content=text))
    return files


def _to_download(text: str, uri: str, site_url: str | None) -> str:
    """The notebook with links into the site if it is known where that is, and else with
    what they say in their place."""

    def link(match):
        label, path, anchor = match.groups(default="")
        if site_url is None:
            return label
        path = posixpath.join(posixpath.dirname(uri), path) if path else uri
        page = posixpath.splitext(posixpath.normpath(path))[0] + "/"
        return f"[{label}]({urljoin(site_url, page)}{anchor})"

    notebook = json.loads(text)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            source = _reference.sub(r"\1", "".join(cell["source"]))
            cell["source"] = _link.sub(link, source).splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def _page(uri: pathlib.Path, notebook: File):
    exporter = MarkdownExporter(
        extra_loaders=[DictLoader({"page.md.j2": _template})],
        template_file="page.md.j2",
    )
    resources = {"unique_key": uri.stem, "output_files_dir": ""}
    assert notebook.abs_src_path is not None
    text, resources = exporter.from_filename(notebook.abs_src_path, resources)
    title, rest = text.strip().split("\n", 1)
    download = f"[Download this notebook]({uri.name}){{ .download download }}"
    yield str(uri.with_suffix(".md")), f"{title}\n\n{download}\n\n{rest}"
    for name, content in resources["outputs"].items():
        yield str(uri.with_name(pathlib.Path(name).name)), content
