"""The embedder: tokenizer and text embeddings, batched across callers."""
