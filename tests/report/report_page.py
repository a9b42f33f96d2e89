"""Reading a report as a browser's parser does, for the tests."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """The tags, the text of each section, and the attributes of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text_of: dict[str, list[str]] = {"": []}
        self.open_tags: list[str] = []
        self._section = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the tag, and the section that it opens."""
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in {"meta", "img", "br"}:
            self.open_tags.append(tag)
        if tag == "section":
            self._section = attributes["id"] or ""
            self.text_of[self._section] = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag that closes itself (SVG)."""
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        """Check that tags close in the order in which they opened."""
        assert self.open_tags.pop() == tag, f"</{tag}> closes something else"
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        """Note text of the section, style sheets aside."""
        if self.open_tags and self.open_tags[-1] not in {"style", "script"} and data.strip():
            self.text_of[self._section].append(" ".join(data.split()))

    def text(self, section: str = "") -> str:
        """The text of a section (`""` = header, tiles and footer), with single spaces."""
        return " ".join(self.text_of[section])

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every `tag`."""
        return [attributes for name, attributes in self.tags if name == tag]
