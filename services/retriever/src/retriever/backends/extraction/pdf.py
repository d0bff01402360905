"""Reads PDF with pypdf. It may loop or eat memory on hostile files: run it only in the child process (child.py)."""

import io
import logging

import pypdf
import pypdf.errors

from retriever.core.extraction import Extracted, Limits, refused


def read_pdf(data: bytes, limits: Limits) -> Extracted:
    """Returns the text of all pages; raises INVALID_ARGUMENT for encrypted, broken, scanned and oversize files."""
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        # Many files are encrypted with an empty password, which forbids printing and not reading.
        if reader.is_encrypted and not reader.decrypt(""):
            raise refused("file: the PDF is encrypted and needs a password")
        num_pages = len(reader.pages)
        if num_pages > limits.max_pages:
            raise refused(f"file: the PDF has {num_pages} pages, the limit is {limits.max_pages}")
        title = str(reader.metadata.title or "") if reader.metadata is not None else ""
        pages = _pages(reader, limits)
    except pypdf.errors.DependencyError as error:
        raise refused("file: the PDF is encrypted in a way that cannot be read here") from error
    except (pypdf.errors.PyPdfError, RecursionError, ArithmeticError, LookupError, ValueError, TypeError) as error:
        raise refused(f"file: the PDF is broken: {_reason(error)}") from error
    except (AttributeError, AssertionError, NotImplementedError, OSError) as error:
        raise refused(f"file: the PDF is broken: {_reason(error)}") from error
    if not any(page.strip() for page in pages):
        raise refused(f"file: the PDF has no text on its {num_pages} pages (scanned images are not read)")
    return Extracted(text="\n\n".join(pages), title=title)


def _pages(reader: pypdf.PdfReader, limits: Limits) -> list[str]:
    pages: list[str] = []
    num_chars = 0
    for page in reader.pages:
        pages.append(page.extract_text())
        num_chars += len(pages[-1])
        if num_chars > limits.max_chars:
            raise refused(f"file: the PDF has more than {limits.max_chars} characters of text")
    return pages


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
