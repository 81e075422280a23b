"""Turns each notebook into a page while the site is built: `pde.ipynb` into `pde.md`,
its figures into files beside that. The notebook itself can be downloaded.
"""

import pathlib

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


def on_files(files, config):
    for notebook in [f for f in files if f.src_uri.endswith(".ipynb")]:
        for uri, content in _page(pathlib.Path(notebook.src_uri), notebook):
            files.append(File.generated(config, uri, content=content))
    return files


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
