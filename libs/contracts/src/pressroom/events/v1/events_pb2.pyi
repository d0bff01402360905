from pressroom.common.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RequestCompleted(_message.Message):
    __slots__ = ("request_id", "trace_id", "tenant", "key_id", "model", "route", "usage", "finish_reason", "http_status", "stream", "started_unix_ms", "duration_s", "ttft_s", "grounded", "prompt_text", "completion_text", "error_code", "tpot_s")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TRACE_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    HTTP_STATUS_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    STARTED_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    GROUNDED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TEXT_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TEXT_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    TPOT_S_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    trace_id: str
    tenant: str
    key_id: str
    model: str
    route: str
    usage: _common_pb2.Usage
    finish_reason: str
    http_status: int
    stream: bool
    started_unix_ms: int
    duration_s: float
    ttft_s: float
    grounded: bool
    prompt_text: str
    completion_text: str
    error_code: str
    tpot_s: float
    def __init__(self, request_id: _Optional[str] = ..., trace_id: _Optional[str] = ..., tenant: _Optional[str] = ..., key_id: _Optional[str] = ..., model: _Optional[str] = ..., route: _Optional[str] = ..., usage: _Optional[_Union[_common_pb2.Usage, _Mapping]] = ..., finish_reason: _Optional[str] = ..., http_status: _Optional[int] = ..., stream: _Optional[bool] = ..., started_unix_ms: _Optional[int] = ..., duration_s: _Optional[float] = ..., ttft_s: _Optional[float] = ..., grounded: _Optional[bool] = ..., prompt_text: _Optional[str] = ..., completion_text: _Optional[str] = ..., error_code: _Optional[str] = ..., tpot_s: _Optional[float] = ...) -> None: ...

class GuardFlagged(_message.Message):
    __slots__ = ("request_id", "tenant", "guard", "reason")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    GUARD_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    tenant: str
    guard: str
    reason: str
    def __init__(self, request_id: _Optional[str] = ..., tenant: _Optional[str] = ..., guard: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class DocumentIndexed(_message.Message):
    __slots__ = ("document_id", "tenant", "collection", "external_id", "num_chunks", "content_sha256", "job_id")
    DOCUMENT_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    EXTERNAL_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    CONTENT_SHA256_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    document_id: str
    tenant: str
    collection: str
    external_id: str
    num_chunks: int
    content_sha256: str
    job_id: str
    def __init__(self, document_id: _Optional[str] = ..., tenant: _Optional[str] = ..., collection: _Optional[str] = ..., external_id: _Optional[str] = ..., num_chunks: _Optional[int] = ..., content_sha256: _Optional[str] = ..., job_id: _Optional[str] = ...) -> None: ...

class DriftDetected(_message.Message):
    __slots__ = ("model", "column", "statistic", "value", "threshold")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    COLUMN_FIELD_NUMBER: _ClassVar[int]
    STATISTIC_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    model: str
    column: str
    statistic: str
    value: float
    threshold: float
    def __init__(self, model: _Optional[str] = ..., column: _Optional[str] = ..., statistic: _Optional[str] = ..., value: _Optional[float] = ..., threshold: _Optional[float] = ...) -> None: ...

class ModelPublished(_message.Message):
    __slots__ = ("id", "base", "path", "manifest_sha256", "job_id")
    ID_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_SHA256_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    id: str
    base: str
    path: str
    manifest_sha256: str
    job_id: str
    def __init__(self, id: _Optional[str] = ..., base: _Optional[str] = ..., path: _Optional[str] = ..., manifest_sha256: _Optional[str] = ..., job_id: _Optional[str] = ...) -> None: ...

class ModelPromoted(_message.Message):
    __slots__ = ("alias", "id", "previous_id", "evaluation_job_id")
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_ID_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_JOB_ID_FIELD_NUMBER: _ClassVar[int]
    alias: str
    id: str
    previous_id: str
    evaluation_job_id: str
    def __init__(self, alias: _Optional[str] = ..., id: _Optional[str] = ..., previous_id: _Optional[str] = ..., evaluation_job_id: _Optional[str] = ...) -> None: ...

class ModelRolledBack(_message.Message):
    __slots__ = ("alias", "id", "from_id", "reason")
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    FROM_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    alias: str
    id: str
    from_id: str
    reason: str
    def __init__(self, alias: _Optional[str] = ..., id: _Optional[str] = ..., from_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class IngestJob(_message.Message):
    __slots__ = ("job_id", "tenant", "document_id", "file_id", "content_type", "title", "external_id", "collection", "metadata_json", "filename", "size_bytes", "file_sha256")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_ID_FIELD_NUMBER: _ClassVar[int]
    FILE_ID_FIELD_NUMBER: _ClassVar[int]
    CONTENT_TYPE_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    EXTERNAL_ID_FIELD_NUMBER: _ClassVar[int]
    COLLECTION_FIELD_NUMBER: _ClassVar[int]
    METADATA_JSON_FIELD_NUMBER: _ClassVar[int]
    FILENAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    FILE_SHA256_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    tenant: str
    document_id: str
    file_id: str
    content_type: str
    title: str
    external_id: str
    collection: str
    metadata_json: str
    filename: str
    size_bytes: int
    file_sha256: str
    def __init__(self, job_id: _Optional[str] = ..., tenant: _Optional[str] = ..., document_id: _Optional[str] = ..., file_id: _Optional[str] = ..., content_type: _Optional[str] = ..., title: _Optional[str] = ..., external_id: _Optional[str] = ..., collection: _Optional[str] = ..., metadata_json: _Optional[str] = ..., filename: _Optional[str] = ..., size_bytes: _Optional[int] = ..., file_sha256: _Optional[str] = ...) -> None: ...

class BatchJob(_message.Message):
    __slots__ = ("job_id", "tenant", "file_id", "endpoint")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    FILE_ID_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    tenant: str
    file_id: str
    endpoint: str
    def __init__(self, job_id: _Optional[str] = ..., tenant: _Optional[str] = ..., file_id: _Optional[str] = ..., endpoint: _Optional[str] = ...) -> None: ...

class TrainJob(_message.Message):
    __slots__ = ("job_id", "tenant", "model", "training_file_id", "suffix", "hyperparameters_json", "training_file_sha256", "seed")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FILE_ID_FIELD_NUMBER: _ClassVar[int]
    SUFFIX_FIELD_NUMBER: _ClassVar[int]
    HYPERPARAMETERS_JSON_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FILE_SHA256_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    tenant: str
    model: str
    training_file_id: str
    suffix: str
    hyperparameters_json: str
    training_file_sha256: str
    seed: int
    def __init__(self, job_id: _Optional[str] = ..., tenant: _Optional[str] = ..., model: _Optional[str] = ..., training_file_id: _Optional[str] = ..., suffix: _Optional[str] = ..., hyperparameters_json: _Optional[str] = ..., training_file_sha256: _Optional[str] = ..., seed: _Optional[int] = ...) -> None: ...

class EvaluateJob(_message.Message):
    __slots__ = ("job_id", "tenant", "model", "task", "task_file_id", "task_file_sha256")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    TASK_FILE_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_FILE_SHA256_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    tenant: str
    model: str
    task: str
    task_file_id: str
    task_file_sha256: str
    def __init__(self, job_id: _Optional[str] = ..., tenant: _Optional[str] = ..., model: _Optional[str] = ..., task: _Optional[str] = ..., task_file_id: _Optional[str] = ..., task_file_sha256: _Optional[str] = ...) -> None: ...

class JobProgress(_message.Message):
    __slots__ = ("job_id", "status", "done", "total", "error", "result_json", "sequence", "at_unix_ms")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    RESULT_JSON_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    AT_UNIX_MS_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    status: _common_pb2.JobStatus
    done: int
    total: int
    error: str
    result_json: str
    sequence: int
    at_unix_ms: int
    def __init__(self, job_id: _Optional[str] = ..., status: _Optional[_Union[_common_pb2.JobStatus, str]] = ..., done: _Optional[int] = ..., total: _Optional[int] = ..., error: _Optional[str] = ..., result_json: _Optional[str] = ..., sequence: _Optional[int] = ..., at_unix_ms: _Optional[int] = ...) -> None: ...

class KeysRevoked(_message.Message):
    __slots__ = ("key_ids", "tenants")
    KEY_IDS_FIELD_NUMBER: _ClassVar[int]
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    key_ids: _containers.RepeatedScalarFieldContainer[str]
    tenants: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, key_ids: _Optional[_Iterable[str]] = ..., tenants: _Optional[_Iterable[str]] = ...) -> None: ...

class RequestCancel(_message.Message):
    __slots__ = ("id", "reason")
    ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    id: str
    reason: str
    def __init__(self, id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...
