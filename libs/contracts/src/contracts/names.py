"""Names that cross a process border: HTTP headers, model ids and defaults that more than one service needs."""

HEADER_REQUEST_ID = "x-request-id"
HEADER_TRACE_ID = "x-trace-id"
METADATA_REQUEST_ID = "x-request-id"
METADATA_TENANT = "x-tenant"

MODEL_CHAT = "smollm2-135m-instruct"
MODEL_ENCODER = "all-minilm-l6-v2"
GRAPH_RAG = "rag"
DEFAULT_COLLECTION = "default"
DEFAULT_TENANT = "default"
