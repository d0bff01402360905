import grpc
import pytest

from chassis import errors
from chassis.errors import Code, PlatformError


@pytest.mark.parametrize("code", list(Code))
def test_every_code_maps_to_a_grpc_status_an_http_status_and_a_type(code: Code) -> None:
    assert errors.grpc_status(code) in grpc.StatusCode.__members__
    assert 400 <= errors.http_status(code) <= 599
    assert errors.openai_type(code).endswith("_error")


@pytest.mark.parametrize("status", [s.name for s in grpc.StatusCode if s is not grpc.StatusCode.OK])
def test_every_grpc_status_maps_to_a_code(status: str) -> None:
    code = errors.code_from_grpc(status)
    assert code is Code.INTERNAL or errors.grpc_status(code) == status or status in ("ABORTED", "UNKNOWN")


def test_dumped_error_loads_with_every_field() -> None:
    error = PlatformError(Code.RATE_LIMITED, "slow down", param="rpm", reason="rate_limit_exceeded", retry_after_s=2.5)
    loaded = errors.load("slow down", errors.dump(error))
    assert vars(loaded) == vars(error)


@pytest.mark.parametrize("junk", [b"", b"[]", b'{"code": "NO_SUCH"}', b'{"message": "x"}', b"\xff"])
def test_junk_details_raise_value_or_key_error(junk: bytes) -> None:
    with pytest.raises((ValueError, KeyError)):
        errors.load("x", junk)
