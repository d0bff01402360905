"""The retriever: documents in, chunks and vectors kept, hits out."""
