"""Reads Markdown and HTML: the text without its markup, paragraphs set apart, and a title."""

import re

import lxml.etree
import lxml.html
from markdown_it import MarkdownIt
from markdown_it.token import Token

from retriever.core.extraction import Extracted, refused

_BLANK_LINES = re.compile(r"\n\s*\n\s*")
_SPACES = re.compile(r"[^\S\n]+")
_WHITE = re.compile(r"\s+")
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def read_markdown(text: str) -> Extracted:
    """Keeps text, headings, code and tables; the first heading is the title."""
    parser = MarkdownIt("commonmark", {"maxNesting": 50}).enable("table")
    blocks: list[str] = []
    title = ""
    tokens = parser.parse(_FRONT_MATTER.sub("", text))
    for index, token in enumerate(tokens):
        if token.type == "inline":
            block = _inline_text(token.children or [])
            heading = index > 0 and tokens[index - 1].type == "heading_open"
            if heading and not title:
                title = block
            in_row = index > 0 and tokens[index - 1].type in ("td_open", "th_open")
            if in_row and blocks and tokens[index - 2].type in ("td_close", "th_close"):
                blocks[-1] += " | " + block
            else:
                blocks.append(block)
        elif token.type in ("fence", "code_block"):
            blocks.append(token.content.rstrip("\n"))
        elif token.type == "html_block":
            blocks.append(_html_text(token.content))
    return Extracted(text="\n\n".join(block for block in blocks if block.strip()), title=title)


def _inline_text(children: list[Token]) -> str:
    parts: list[str] = []
    for child in children:
        if child.type in ("text", "code_inline"):
            parts.append(child.content)
        elif child.type in ("softbreak", "hardbreak"):
            parts.append("\n")
        elif child.type == "image":
            parts.append(_inline_text(child.children or []))
    return "".join(parts)


def _html_text(fragment: str) -> str:
    """Returns the text of a piece of HTML inside Markdown; nothing for a comment."""
    try:
        return read_html(fragment).text
    except lxml.etree.ParserError:
        return ""


_DROPPED = frozenset(
    {"script", "style", "noscript", "template", "head", "svg", "math", "iframe", "object", "canvas", "select", "nav"}
)
_BLOCKS = frozenset(
    {"address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details", "dialog", "div", "dl"}
    | {"dt", "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr"}
    | {"html", "legend", "li", "main", "ol", "p", "pre", "section", "summary", "table", "tbody", "tfoot", "thead"}
    | {"tr", "ul"}
)


def read_document_html(text: str) -> Extracted:
    """Reads a whole HTML file; raises INVALID_ARGUMENT where no parser can."""
    try:
        return read_html(text)
    except (lxml.etree.ParserError, lxml.etree.LxmlError, ValueError) as error:
        raise refused(f"file: the HTML could not be read: {error}") from error


def read_html(text: str) -> Extracted:
    """Keeps the text that a reader would see; the title comes from <title>, else from the first <h1>."""
    # Bytes, since lxml refuses a str with an encoding declaration; the parser is told what they are.
    root = lxml.html.document_fromstring(text.encode(), parser=lxml.html.HTMLParser(encoding="utf-8"))
    title = root.findtext(".//title") or ""
    if not title:
        heading = root.find(".//h1")
        title = "" if heading is None else str(heading.text_content())
    parts: list[str] = []
    dropped = 0  # depth inside an element whose text is not read
    preformatted = 0
    for event, element in lxml.etree.iterwalk(root, events=("start", "end", "comment", "pi")):
        tag = element.tag
        if not isinstance(tag, str):  # a comment or an instruction: only what follows it is text
            if not dropped:
                parts.append(_flowed(element.tail, preformatted))
            continue
        if event == "start":
            if tag in _DROPPED:
                dropped += 1
            preformatted += tag == "pre"
            if not dropped:
                parts.append("\n\n" if tag in _BLOCKS else "\n" if tag == "br" else " " if tag in ("td", "th") else "")
                parts.append(_flowed(element.text, preformatted))
        else:
            if tag in _DROPPED:
                dropped -= 1
            preformatted -= tag == "pre"
            if not dropped:
                parts.append("\n\n" if tag in _BLOCKS else "")
                parts.append(_flowed(element.tail, preformatted))
    joined = _SPACES.sub(" ", "".join(parts)) if "<pre" not in text else "".join(parts)
    blocks = (block.strip() for block in _BLANK_LINES.split(joined))
    return Extracted(text="\n\n".join(block for block in blocks if block), title=title)


def _flowed(text: str | None, preformatted: int) -> str:
    if not text:
        return ""
    return text if preformatted else _WHITE.sub(" ", text)
