"""A report as one HTML page: no script, no font, nothing that is loaded from elsewhere.

The drift report and the benchmark are such pages. The browser is told to load nothing (Content-Security-Policy), and
the style sheets of `assets` follow its light or dark setting and its width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources


def html_page(title: str, body: str, footer: str, *, styles: Sequence[str]) -> str:
    """The page.

    Args:
        title: HTML, escaped; also the heading.
        body: HTML below the heading.
        footer: HTML below that.
        styles: names of style sheets in `assets`.
    """
    css = "".join(
        (resources.files("zreward") / "assets" / name).read_text(encoding="utf-8") for name in styles
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{title}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{title}</h1>\n{body}\n</main>\n<footer>{footer}</footer>\n</body>\n</html>\n"
    )


def section(title: str, text: str, body: str) -> str:
    """A heading, a paragraph and what follows."""
    return f"<section>\n<h2>{title}</h2>\n<p>{text}</p>\n{body}\n</section>"


def table(head: str | Sequence[str], rows: Iterable[str], kind: str = "") -> str:
    """A table that scrolls by itself where it is too wide, with the keyboard too."""
    if not isinstance(head, str):
        head = (
            "<tr>"
            + "".join(f'<th scope="col">{name}</th>' if name else "<td></td>" for name in head)
            + "</tr>"
        )
    content = f'<table class="{kind}"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="scroll" role="region" aria-label="table" tabindex="0">{content}</div>'


def row(cells: Sequence[str], kind: str = "") -> str:
    """A row of escaped text, whose first cell is its heading."""
    first, *others = (escape(cell) for cell in cells)
    values = "".join(f"<td>{cell}</td>" for cell in others)
    return f'<tr{f" class={kind!r}" if kind else ""}><th scope="row">{first}</th>{values}</tr>'


def figure(chart: str, caption: str) -> str:
    """A chart with its caption, both HTML."""
    return f"<figure>{chart}<figcaption>{caption}</figcaption></figure>"


def facts(found: Iterable[tuple[str, str]]) -> str:
    """Names with their figures, in boxes; both HTML."""
    return "<dl class=facts>" + "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in found) + "</dl>"
