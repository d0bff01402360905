from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetProfilesRequest(_message.Message):
    __slots__ = ("model", "limit")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    model: str
    limit: int
    def __init__(self, model: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class GetProfilesResponse(_message.Message):
    __slots__ = ("profiles", "sample_rate", "num_waiting", "lag_s", "num_dropped")
    PROFILES_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_RATE_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    LAG_S_FIELD_NUMBER: _ClassVar[int]
    NUM_DROPPED_FIELD_NUMBER: _ClassVar[int]
    profiles: _containers.RepeatedCompositeFieldContainer[Profile]
    sample_rate: float
    num_waiting: int
    lag_s: float
    num_dropped: int
    def __init__(self, profiles: _Optional[_Iterable[_Union[Profile, _Mapping]]] = ..., sample_rate: _Optional[float] = ..., num_waiting: _Optional[int] = ..., lag_s: _Optional[float] = ..., num_dropped: _Optional[int] = ...) -> None: ...

class Profile(_message.Message):
    __slots__ = ("model", "window_start_unix_s", "window_s", "num_records", "statistics_json")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WINDOW_START_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    WINDOW_S_FIELD_NUMBER: _ClassVar[int]
    NUM_RECORDS_FIELD_NUMBER: _ClassVar[int]
    STATISTICS_JSON_FIELD_NUMBER: _ClassVar[int]
    model: str
    window_start_unix_s: int
    window_s: int
    num_records: int
    statistics_json: str
    def __init__(self, model: _Optional[str] = ..., window_start_unix_s: _Optional[int] = ..., window_s: _Optional[int] = ..., num_records: _Optional[int] = ..., statistics_json: _Optional[str] = ...) -> None: ...
