"""What an answer rests on, as every API tells it: our own fields beside those of the API."""

from gateway.core.graph import Grounding


def grounding_fields(grounding: Grounding) -> dict[str, object]:
    """The fields `grounded` and `sources`."""
    sources = [
        {
            "document_id": source.document_id,
            "external_id": source.external_id or None,
            "chunk_id": source.chunk_id,
            "title": source.title,
            "score": source.score,
        }
        for source in grounding.sources
    ]
    return {"grounded": grounding.grounded, "sources": sources}
