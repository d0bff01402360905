"""Batches through the running system: the official client, and a gateway that is killed in the middle."""

import json

from testkit import eventually_sync

CHAT = "smollm2-135m-instruct"
NUM_LINES = 24


def _lines() -> bytes:
    lines = [
        {
            "custom_id": f"line-{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": CHAT,
                "messages": [{"role": "user", "content": f"Count from {number}."}],
                "max_tokens": 24,
                "ignore_eos": True,
            },
        }
        for number in range(NUM_LINES)
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def test_a_gateway_that_is_killed_in_the_middle_answers_every_line_once(system, patiently):
    system.wait_all_ready()
    client = system.client()
    file = client.files.create(file=("lines.jsonl", _lines()), purpose="batch")
    made = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")

    def counts():
        return patiently(lambda: client.batches.retrieve(made.id)).request_counts

    eventually_sync(lambda: counts().completed >= 3, 120, interval_s=0.1)
    old = system.kill9("gateway")
    system.wait_ready("gateway", other_than=old)
    done = counts().completed
    assert 3 <= done < NUM_LINES, "the kill was to come in the middle"

    batch = eventually_sync(
        lambda: (one := patiently(lambda: client.batches.retrieve(made.id))).status == "completed" and one,
        240,
        interval_s=0.5,
    )
    output = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert [line["custom_id"] for line in output] == [f"line-{number}" for number in range(NUM_LINES)]
    assert {line["response"]["status_code"] for line in output} == {200}
    assert {line["response"]["body"]["usage"]["completion_tokens"] for line in output} == {24}
    assert batch.error_file_id is None
    assert batch.request_counts.model_dump() == {"total": NUM_LINES, "completed": NUM_LINES, "failed": 0}
