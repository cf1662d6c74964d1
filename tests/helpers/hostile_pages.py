"""Texts that a careless page would run as code, and a parser that reads the page as a browser does."""

from html.parser import HTMLParser

HOSTILE = "<script>alert('x')</script>\"'><img src=x onerror=alert(1)>&{{ 7 * 7 }}{% raw %}"


def hostile(value):
    """The data with `HOSTILE` at the end of every text and token; keys and numbers stay."""
    if isinstance(value, str):
        return value if value in ("warning", "warnings") else value + HOSTILE
    if isinstance(value, list):
        return [hostile(item) for item in value]
    if isinstance(value, dict):
        return {key: hostile(item) for key, item in value.items()}
    return value


class Page(HTMLParser):
    """The tags, attributes and text of a page; raises on a tag that is not closed."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.text, self.open, self.hidden, self.shown = [], "", [], "", ""
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.text += " "
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data
            if "details" in self.open and "summary" not in self.open:
                self.hidden += f" {data}"
            else:
                self.shown += f" {data}"

    @property
    def words(self):
        return _words(self.text)

    @property
    def folded(self):
        """The words that a reader has to unfold, and the other ones."""
        return _words(self.hidden), _words(self.shown)


def _words(text):
    text = text.replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "none").replace("\xa0", " ")
    return " ".join(text.split())
