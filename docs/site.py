"""Hooks of mkdocs (see mkdocs.yml): what the pages have on GitHub and a site has not.

- Entries of the navigation whose page is not there are left out. Some pages are written by programs.
- Links to files beside docs/ become plain names, as the site does not have those files.
- "{methods}" in a docstring becomes a link to the page that has them. At run time it becomes their list.
"""

import re
from pathlib import Path


def kept(entries, docs):
    """The navigation without the pages that are not there, and without sections that hold none."""
    for entry in entries:
        ((title, target),) = entry.items()
        if isinstance(target, list):
            target = list(kept(target, docs))
        if target and (isinstance(target, list) or (docs / target).exists()):
            yield {title: target}


def on_config(config):
    config.nav = list(kept(config.nav, Path(config.docs_dir)))
    return config


def on_page_markdown(markdown, **_):
    return re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\)", r"\1", markdown)


def on_page_content(html, **_):
    return html.replace("{methods}", 'see <a href="../methods/">the methods</a>, or <code>help()</code> of the class.')
