"""Pages as tests read them: elements that nest, their attributes, and the text that a person sees."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "rect", "line", "path", "circle", "polygon", "wbr", "br", "hr", "input", "col"}


class Reader(HTMLParser):
    """Checks that elements nest, and collects their attributes and the text outside of <style>."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def read(page: str) -> Reader:
    """A page that is whole: every element is closed."""
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader
