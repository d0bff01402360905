"""What the retriever is told by its environment, with the prefix RETRIEVER_."""

from pydantic import Field, model_validator

from chassis.settings import ServiceSettings, settings_config


class RetrieverSettings(ServiceSettings):
    """Settings of the retriever."""

    model_config = settings_config("RETRIEVER_")

    milvus_uri: str = Field("http://127.0.0.1:19530", description="URI of Milvus, or of Milvus Lite's server.")
    milvus_timeout_s: float = Field(10.0, gt=0, le=120, description="Seconds that one call of Milvus may take.")
    embedder_addr: str = Field(pattern=r"^\S+:\d+$", description="host:port of the embedder's gRPC server.")
    gateway_addr: str = Field(pattern=r"^\S+:\d+$", description="host:port of the gateway's gRPC server.")
    encoder: str = Field("all-minilm-l6-v2", min_length=1, description="Id of the encoder that the index is made with.")
    embed_query_timeout_s: float = Field(10.0, gt=0, le=60, description="Seconds that embedding a query may take.")
    embed_batch_timeout_s: float = Field(60.0, gt=0, le=600, description="Seconds that embedding a batch may take.")

    chunk_tokens: int = Field(400, ge=16, le=8192, description="Tokens in a chunk; the encoder's own limit caps it.")
    overlap_tokens: int = Field(20, ge=0, le=4096, description="Tokens that a chunk repeats of the one before it.")
    ingest_concurrency: int = Field(1, ge=1, le=8, description="Ingest jobs that run at once.")
    # Small: a query waits in the embedder behind the batch that is being computed, and long chunks gain little by more.
    ingest_batch_chunks: int = Field(8, ge=1, le=512, description="Chunks that are embedded and written at once.")
    ingest_patience_s: float = Field(
        30.0, ge=0, le=300, description="Seconds that one attempt waits for a service that is away."
    )
    max_file_bytes: int = Field(64 * 1024**2, ge=1024, le=2**30, description="Bytes of the largest file to ingest.")
    max_text_chars: int = Field(32 * 1024**2, ge=1024, description="Characters of text that one file may hold.")
    max_pdf_pages: int = Field(5000, ge=1, description="Pages that one PDF may have.")
    max_documents: int = Field(200_000, ge=1, description="Documents that one JSONL file may hold.")
    extract_timeout_s: float = Field(120.0, gt=0, le=3600, description="Seconds that reading one file may take.")
    extract_memory_bytes: int = Field(
        1536 * 1024**2, ge=256 * 1024**2, description="Address space of the process that reads one file, in bytes."
    )

    @model_validator(mode="after")
    def _overlap_fits(self) -> "RetrieverSettings":
        if self.overlap_tokens >= self.chunk_tokens:
            raise ValueError("overlap_tokens must be less than chunk_tokens")
        return self
