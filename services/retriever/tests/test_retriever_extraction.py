"""Files of every kind, and files that are not what they claim."""

import io
import json
from collections.abc import AsyncIterator

import pypdf
import pytest
from retriever_fakes import make_pdf

from chassis.errors import Code, PlatformError
from retriever.backends.extraction.readers import read
from retriever.backends.extraction.runner import BoundedExtractor
from retriever.core.extraction import Extracted, Kind, Limits, kind_of

LIMITS = Limits(max_chars=200_000, max_pages=20, max_documents=50)
PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"


def one(kind: Kind, data: bytes | str) -> Extracted:
    (document,) = read(kind, data.encode() if isinstance(data, str) else data, LIMITS).documents
    return document


def why(kind: Kind, data: bytes | str) -> str:
    with pytest.raises(PlatformError) as raised:
        read(kind, data.encode() if isinstance(data, str) else data, LIMITS)
    assert raised.value.code is Code.INVALID_ARGUMENT and not raised.value.retryable
    return raised.value.message


def test_text_keeps_its_lines_and_loses_the_byte_order_mark() -> None:
    assert one(Kind.TEXT, "\ufeffÜber\r\nuns\r\n").text == "Über\nuns\n"


def test_markdown_keeps_headings_code_tables_and_links_without_their_marks() -> None:
    document = one(
        Kind.MARKDOWN,
        "---\nlayout: x\n---\n# The *Title*\n\nA [link](http://x) and **bold** `code`.\n\n- item one\n- item two\n\n"
        "```python\nprint(1)\n```\n\n| a | b |\n|---|---|\n| c | d |\n\n<b>raw</b>\n\n<!-- hidden -->\n\n## Second\n",
    )
    assert document.title == "The Title"
    assert document.text.split("\n\n") == [
        "The Title",
        "A link and bold code.",
        "item one",
        "item two",
        "print(1)",
        "a | b",
        "c | d",
        "raw",
        "Second",
    ]


def test_html_shows_what_a_reader_sees() -> None:
    document = one(
        Kind.HTML,
        "<!doctype html><html><head><title> The\n title </title><style>p{}</style></head><body>"
        "<script>alert(1)</script><h1>Head</h1><p>One <b>bold</b>word &amp; more<br>line</p><!-- no -->tail"
        "<ul><li>a</li><li>b</li></ul><table><tr><td>x</td><td>y</td></tr></table><pre>  keep\n   me</pre>"
        "</body></html>",
    )
    assert document.title == "The title"
    assert document.text.split("\n\n")[0:2] == ["Head", "One boldword & more\nline"]
    assert "alert" not in document.text and "no" not in document.text.split() and "p{}" not in document.text
    assert "tail" in document.text and "x y" in document.text and "keep\n   me" in document.text


@pytest.mark.parametrize("page", ["<p>" * 20_000 + "deep", "<title>x", "just words", "<p>a<p>b</div></p>"])
def test_broken_html_is_read_or_refused_and_never_crashes(page: str) -> None:
    try:
        read(Kind.HTML, page.encode(), LIMITS)
    except PlatformError as error:
        assert error.code is Code.INVALID_ARGUMENT


def test_pdf_gives_its_pages_and_title() -> None:
    document = one(Kind.PDF, make_pdf("First page", "Second page"))
    assert document.text.split("\n\n") == ["First page", "Second page"]


def test_pdf_that_cannot_be_read_says_why() -> None:
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(make_pdf("secret")))
    writer.encrypt("password", algorithm="RC4-128")
    encrypted = io.BytesIO()
    writer.write(encrypted)
    assert "encrypted" in why(Kind.PDF, encrypted.getvalue())
    assert "broken" in why(Kind.PDF, b"%PDF-1.7\nnothing that follows is a PDF")
    assert "21 pages" in why(Kind.PDF, make_pdf(*["x"] * 21))
    blank = io.BytesIO()
    writer = pypdf.PdfWriter()
    writer.add_blank_page(100, 100)
    writer.write(blank)
    assert "no text" in why(Kind.PDF, blank.getvalue())


@pytest.mark.parametrize(
    ("kind", "data", "part"),
    [
        (Kind.TEXT, PNG, "PNG"),
        (Kind.MARKDOWN, b"PK\x03\x04zip", "zip"),
        (Kind.TEXT, make_pdf("x"), "a PDF"),
        (Kind.PDF, b"plain text", "no %PDF header"),
        (Kind.HTML, b"\x7fELF\x02\x01", "program"),
        (Kind.TEXT, b"line one\nline \xff two", "line 2 is not UTF-8"),
        (Kind.TEXT, "utf16".encode("utf-16"), "UTF-16"),
        (Kind.TEXT, b"a\nb\x00c", "line 2 holds a NUL"),
        (Kind.TEXT, bytes(range(1, 9)) * 20, "control characters"),
        (Kind.TEXT, b"", "empty"),
        (Kind.TEXT, b" \n\t ", "empty"),
        (Kind.MARKDOWN, b"<!-- only a comment -->", "no text"),
        (Kind.HTML, b"<html><script>x</script></html>", "no text"),
        (Kind.TEXT, b"x" * 200_001, "200001 characters"),
    ],
)
def test_a_file_that_is_not_what_it_claims_is_refused_with_the_reason(kind: Kind, data: bytes, part: str) -> None:
    assert part in why(kind, data)


def test_jsonl_makes_a_document_of_each_line_with_text() -> None:
    lines = [
        {"_id": "a", "title": "T", "text": "body"},
        {"_id": 7, "text": "no title", "metadata": {"year": 1958}},
        {"_id": "b", "title": "", "text": ""},
        {"text": "T in text", "title": "T in"},
    ]
    found = read(Kind.JSONL, ("\n".join(json.dumps(line) for line in lines) + "\n\n").encode(), LIMITS)
    assert [(d.external_id, d.title, d.text, d.line) for d in found.documents] == [
        ("a", "T", "T\n\nbody", 1),
        ("7", "", "no title", 2),
        ("", "T in", "T in text", 4),
    ]
    assert found.documents[1].metadata == {"year": 1958}
    assert found.num_skipped == 1


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{broken", "it is not JSON"),
        ("[1]", "must be a JSON object"),
        ('{"_id": "x"}', "text is missing"),
        ('{"text": 5}', "text must be a string"),
        ('{"text": null}', "text must be a string"),
        ('{"_id": ["x"], "text": "y"}', "_id must be a string"),
        ('{"title": 1, "text": "y"}', "title must be a string"),
        ('{"text": "\\ud800"}', "surrogate"),
        ('{"_id": "one", "text": "again"}', "was used in line 1"),
        ('{"text": "y", "metadata": []}', ""),
        ('{"text": "y", "metadata": [1]}', "metadata must be an object"),
        ('{"text": "y", "metadata": {"x": NaN}}', "number that JSON cannot carry"),
        ('{"_id": "' + "x" * 600 + '", "text": "y"}', "_id has 600 characters"),
        ("[" * 100_000, "it is not JSON"),
    ],
)
def test_a_bad_line_is_named(line: str, part: str) -> None:
    data = '{"_id": "one", "text": "fine"}\n\n' + line
    if not part:
        assert len(read(Kind.JSONL, data.encode(), LIMITS).documents) == 2
    else:
        assert why(Kind.JSONL, data).startswith("line 3: ") and part in why(Kind.JSONL, data)


def test_jsonl_of_too_many_or_no_documents_is_refused() -> None:
    assert "more than 50" in why(Kind.JSONL, '{"text": "x"}\n' * 51)
    assert "no line has any text" in why(Kind.JSONL, '{"text": " "}\n')


def test_only_known_media_types_are_taken() -> None:
    assert kind_of("Text/HTML; charset=utf-8") is Kind.HTML
    with pytest.raises(PlatformError) as raised:
        kind_of("image/png")
    assert raised.value.param == "content_type"


class TestBoundedExtractor:
    @pytest.fixture
    async def extractor(self) -> AsyncIterator[BoundedExtractor]:
        extractor = BoundedExtractor(LIMITS, timeout_s=20, max_memory_bytes=512 * 1024**2)
        yield extractor
        await extractor.close()

    async def test_pdf_and_large_files_go_through_the_child(self, extractor: BoundedExtractor) -> None:
        assert (await extractor.extract(Kind.PDF, make_pdf("In the child"))).documents[0].text == "In the child"
        large = json.dumps({"_id": "1", "text": "x" * 70_000, "metadata": {"a": [1]}}).encode()
        (document,) = (await extractor.extract(Kind.JSONL, large)).documents
        assert (document.external_id, len(document.text), document.metadata) == ("1", 70_000, {"a": [1]})
        assert (await extractor.extract(Kind.TEXT, b"small")).documents[0].text == "small"

    async def test_a_refusal_in_the_child_comes_back_with_its_reason(self, extractor: BoundedExtractor) -> None:
        with pytest.raises(PlatformError, match="no %PDF header") as raised:
            await extractor.extract(Kind.PDF, b"text")
        assert (raised.value.code, raised.value.param) == (Code.INVALID_ARGUMENT, "file")

    async def test_a_file_that_takes_too_long_is_refused_and_its_process_is_gone(self) -> None:
        extractor = BoundedExtractor(LIMITS, timeout_s=0.05, max_memory_bytes=512 * 1024**2)
        with pytest.raises(PlatformError, match="took longer") as raised:
            await extractor.extract(Kind.PDF, make_pdf("x"))
        assert not raised.value.retryable
        await extractor.close()

    async def test_a_file_that_takes_too_much_memory_is_refused(self) -> None:
        extractor = BoundedExtractor(Limits(10**9, 20, 10**9), timeout_s=30, max_memory_bytes=256 * 1024**2)
        with pytest.raises(PlatformError, match="memory") as raised:
            await extractor.extract(Kind.JSONL, b'{"text": "xxxxxxxx"}\n' * 2_000_000)
        assert raised.value.code is Code.INVALID_ARGUMENT
        await extractor.close()
