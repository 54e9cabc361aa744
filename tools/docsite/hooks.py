"""Adds the pages of pages.py to the site."""

import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pages import ROOT, api_pages, config_keys_page, written_pages


def on_files(files: Files, *, config: MkDocsConfig) -> None:
    """Replace the pages of docs/ and add all others."""

    def add(name: str, content: str | bytes) -> None:
        old = files.get_file_from_path(name)
        if old is not None:
            files.remove(old)
        files.append(File.generated(config, name, content=content))

    for name, text, linked in written_pages():
        add(name, text)
        for path in linked:
            add(f"files/{path}", (ROOT / path).read_bytes())
    for name, text in api_pages():
        add(name, text)
    add("config_keys.md", config_keys_page())
    add("site.css", (ROOT / "tools/docsite/site.css").read_bytes())


def on_page_content(html: str, **_: object) -> str:
    """Show cross-references such as :func:`~torch.nn.functional.relu` as code; link pictures."""
    html = re.sub(r":(?:func|class|meth|mod|data|attr|exc):(?=<code>)", "", html)
    html = re.sub(r"<code>~[\w.]*?(\w+)</code>", r"<code>\1</code>", html)
    return re.sub(r'<img [^>]*src="([^"]+)"[^>]*>', r'<a href="\1">\g<0></a>', html)
