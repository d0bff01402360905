"""Reads a file of any kind, in the calling thread, and bounds what it gives."""

from retriever.backends.extraction.jsonl import read_jsonl
from retriever.backends.extraction.markup import read_document_html, read_markdown
from retriever.backends.extraction.pdf import read_pdf
from retriever.core.documents import clean_text, clean_title
from retriever.core.extraction import Extracted, Extraction, Kind, Limits, check_content, decode, refused


def read(kind: Kind, data: bytes, limits: Limits) -> Extraction:
    """Returns the cleaned documents of a file; raises INVALID_ARGUMENT with the reason. Blocks."""
    check_content(kind, data)
    try:
        found = _read(kind, data, limits)
    except RecursionError:
        raise refused("file: it is nested too deeply") from None
    documents = [
        Extracted(clean_text(d.text), clean_title(d.title), d.external_id, d.metadata, d.line) for d in found.documents
    ]
    if not any(document.text.strip() for document in documents):
        raise refused("file: it holds no text")
    num_chars = sum(len(document.text) for document in documents)
    if num_chars > limits.max_chars:
        raise refused(f"file: it holds {num_chars} characters of text, the limit is {limits.max_chars}")
    return Extraction(documents, found.num_skipped)


def _read(kind: Kind, data: bytes, limits: Limits) -> Extraction:
    if kind is Kind.PDF:
        return Extraction([read_pdf(data, limits)])
    text = decode(kind, data).replace("\r\n", "\n")
    if kind is Kind.JSONL:
        return read_jsonl(text, limits)
    if kind is Kind.MARKDOWN:
        return Extraction([read_markdown(text)])
    if kind is Kind.HTML:
        return Extraction([read_document_html(text)])
    return Extraction([Extracted(text)])
