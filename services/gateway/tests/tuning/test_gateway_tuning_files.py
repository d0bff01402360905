"""/v1/files: OpenAI's client, tenancy, limits, and a file that is in use."""

import hashlib
import os

import httpx
import openai
import pytest

from chassis.errors import Code, PlatformError
from gateway.backends import directory_files
from gateway.core.uploads import Purpose

HEX = "0" * 32


def refused(response, status, param=None):
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}, response.text
    assert (response.status_code, error["param"]) == (status, param), response.text
    return error


async def test_official_client_uploads_lists_reads_and_deletes(client, world):
    content = b"\x00\xff" * 20_000
    made = await client.files.create(file=("ünïcode name.bin", content), purpose="user_data")
    assert (made.object, made.bytes, made.filename) == ("file", 40_000, "ünïcode name.bin")
    assert (made.purpose, made.status) == ("user_data", "processed") and made.id.startswith("file-")
    assert await client.files.retrieve(made.id) == made
    assert [one.id async for one in client.files.list()] == [made.id]
    assert (await client.files.content(made.id)).content == content
    deleted = await client.files.delete(made.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (made.id, True, "file")
    assert list(world.directory.iterdir()) == []
    assert [one.id async for one in client.files.list()] == []


@pytest.mark.parametrize("purpose", sorted(set(Purpose) - {Purpose.BATCH_OUTPUT}))
async def test_every_purpose_of_openai_is_taken(world, purpose):
    file_id = await world.upload(b"x", purpose.value)
    assert (await world.http().get(f"/files/{file_id}")).json()["purpose"] == purpose.value


async def test_list_is_read_page_by_page_in_both_orders(client, world):
    ids = [await world.upload(b"x", "evals" if i % 2 else "batch") for i in range(5)]
    assert [one.id async for one in client.files.list(limit=2)] == ids[::-1]
    assert [one.id async for one in client.files.list(limit=2, order="asc")] == ids
    assert [one.id async for one in client.files.list(purpose="evals", order="asc")] == ids[1::2]
    page = (await world.http().get("/files", params={"limit": 2, "order": "asc"})).json()
    assert (page["object"], page["has_more"], page["first_id"], page["last_id"]) == ("list", True, ids[0], ids[1])
    assert (await world.http().get("/files", params={"after": "file-unknown"})).json()["data"] == []


async def test_another_tenants_file_is_not_found(world):
    file_id = await world.upload()
    other = world.http("other")
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        assert (
            refused(await other.request(method, f"/files/{file_id}{path}"), 404, "file_id")["code"] == "file_not_found"
        )
    assert (await other.get("/files")).json()["data"] == []
    assert (await other.get("/files", params={"after": file_id})).json()["data"] == []
    assert await world.kept.file("other", file_id) is None
    assert (await world.http().get(f"/files/{file_id}")).status_code == 200


@pytest.mark.parametrize("file_id", ["file-" + HEX, "file_" + HEX, "..%2f..%2fgateway.db", "x", "file-"])
async def test_unknown_file_is_not_found(world, file_id):
    assert (await world.http().get(f"/files/{file_id}")).status_code == 404
    assert (await world.http().delete(f"/files/{file_id}")).status_code == 404


@pytest.mark.parametrize(
    ("file", "data", "status", "param"),
    [
        (("a.jsonl", b""), {"purpose": "fine-tune"}, 400, "file"),
        (("a.jsonl", b"x"), {}, 400, "purpose"),
        (("a.jsonl", b"x"), {"purpose": "world-domination"}, 400, "purpose"),
        (("a.jsonl", b"x"), {"purpose": "fine-tune-results"}, 400, "purpose"),
        (("a.jsonl", b"x"), {"purpose": ["evals", "batch"]}, 400, "purpose"),
        (("a.jsonl", b"x"), {"purpose": "batch", "expires_after[seconds]": "3600"}, 400, "expires_after"),
        (("a.jsonl", b"x" * 200_000), {"purpose": "batch"}, 413, "file"),
    ],
)
async def test_bad_upload_is_refused_and_leaves_nothing(world, file, data, status, param):
    refused(await world.http().post("/files", files={"file": file}, data=data), status, param)
    assert list(world.directory.iterdir()) == [] and await world.kept.file_ids() == set()


async def test_form_without_a_file_is_refused(world):
    body = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n'
    headers = {"content-type": "multipart/form-data; boundary=b"}
    refused(await world.http().post("/files", content=body, headers=headers), 400, "file")
    refused(await world.http().post("/files", json={"purpose": "batch"}), 415, "content-type")


@pytest.mark.parametrize("query", ["limit=0", "limit=10001", "limit=x", "order=up", "after=" + "x" * 101])
async def test_bad_query_names_its_parameter(world, query):
    refused(await world.http().get(f"/files?{query}"), 400, query.split("=")[0])


async def test_name_of_a_file_reaches_neither_paths_nor_headers(world):
    response = await world.http().post(
        "/files", files={"file": ('../../e"v\\il\t.txt', b"x")}, data={"purpose": "user_data"}
    )
    assert response.status_code == 200
    content = await world.http().get(f"/files/{response.json()['id']}/content")
    assert content.headers["content-disposition"].startswith("attachment; filename*=UTF-8''..%2F..%2Fe")
    assert content.headers["content-type"] == "application/octet-stream"
    assert len(list(world.directory.iterdir())) == 1


async def test_tenant_keeps_a_bounded_number_of_bytes(world):
    ids = [await world.upload(b"x" * 90_000, "batch") for _ in range(2)]
    full = await world.http().post("/files", files={"file": ("a", b"x" * 90_000)}, data={"purpose": "batch"})
    assert refused(full, 409, "file")["code"] == "storage_limit_exceeded"
    assert len(list(world.directory.iterdir())) == 2
    await world.upload(b"x" * 90_000, "batch", tenant="other")
    await world.http().delete(f"/files/{ids[0]}")
    await world.upload(b"x" * 90_000, "batch")


async def test_file_of_an_unfinished_job_stays_until_the_job_has_ended(world):
    file_id = await world.upload()
    jobs = [await world.order(training_file=file_id) for _ in range(2)]
    for job in jobs:
        assert refused(await world.http().delete(f"/files/{file_id}"), 409, "file_id")["code"] == "file_in_use"
        await world.report(job["id"], "RUNNING")
        await world.report(job["id"], "FAILED", 2, error="no")
    # The jobs' end frees nothing that its tenant has not deleted.
    assert (await world.http().get(f"/files/{file_id}/content")).status_code == 200
    assert (await world.http().delete(f"/files/{file_id}")).json()["deleted"] is True
    assert list(world.directory.iterdir()) == []
    assert (await world.http().get(f"/fine_tuning/jobs/{jobs[0]['id']}")).json()["training_file"] == file_id


async def test_file_can_go_once_its_job_was_cancelled_before_a_worker_had_it(world):
    job = await world.order()
    await world.http().post(f"/jobs/{job['id']}/cancel")
    assert (await world.http().delete(f"/files/{job['training_file']}")).status_code == 200


async def test_damaged_file_never_looks_whole(client, world, monkeypatch):
    file_id = await world.upload(b"x" * 50_000)
    (path,) = world.directory.iterdir()
    path.write_bytes(b"x" * 49_999 + b"y")
    with pytest.raises(openai.InternalServerError, match="is damaged"):  # one piece: it is seen before the headers
        await client.files.content(file_id)
    monkeypatch.setattr(directory_files, "_PIECE_BYTES", 20_000)
    with pytest.raises((openai.APIConnectionError, httpx.RemoteProtocolError)):  # several: it ends short of its length
        await client.files.content(file_id)


async def test_file_that_is_gone_from_the_disk_is_an_error_with_a_status(world):
    file_id = await world.upload()
    (path,) = world.directory.iterdir()
    path.unlink()
    assert (await world.http().get(f"/files/{file_id}/content")).status_code == 500


async def test_sweep_knows_the_uploads(world):
    await world.upload()
    (path,) = world.directory.iterdir()
    orphan = world.directory / ("file_" + HEX)
    orphan.write_bytes(b"x")
    for old in (path, orphan):
        os.utime(old, (1, 1))
    assert await world.files.sweep(await world.kept.file_ids()) == 1
    assert [one.name for one in world.directory.iterdir()] == [path.name]


async def test_row_names_the_bytes_by_their_checksum(world):
    file_id = await world.upload(b"some bytes")
    row = await world.kept.file("acme", file_id)
    assert row.sha256 == hashlib.sha256(b"some bytes").hexdigest() and not row.is_withdrawn
    assert b"".join([piece async for piece in world.files.read(row)]) == b"some bytes"


async def test_upload_whose_row_cannot_be_written_is_no_file(world, monkeypatch):
    async def full(upload):
        raise PlatformError(Code.UNAVAILABLE, "disk full")

    monkeypatch.setattr(world.kept, "add", full)
    answer = await world.http().post("/files", files={"file": ("a", b"x")}, data={"purpose": "batch"})
    assert answer.status_code == 503 and "retry-after" in answer.headers
    assert (await world.http().get("/files")).json()["data"] == []


async def test_files_of_results_are_made_by_us_alone(world):
    response = await world.http().post(
        "/files", files={"file": ("a.jsonl", b"x")}, data={"purpose": Purpose.BATCH_OUTPUT.value}
    )
    assert (response.status_code, response.json()["error"]["param"]) == (400, "purpose")
