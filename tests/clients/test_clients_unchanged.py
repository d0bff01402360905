"""Clients from outside, unchanged, against a running system: what each prints is checked, not only that it ends."""

import json
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MODEL = "smollm2-135m-instruct"
NUM_REQUESTS, NUM_TOKENS = 6, 16


def test_tritonclient_over_http_and_grpc(clients, tmp_path):
    script, grpc_addr = HERE / "ask_with_tritonclient.py", clients.env["PRESSROOM_GRPC_ADDR"]
    said = json.loads(clients.run("python", script, clients.origin.removeprefix("http://"), grpc_addr, cwd=tmp_path))
    for way in ("http", "grpc"):
        answer = said[way]
        assert answer["live"] and answer["ready"] and answer["model_ready"]
        assert (answer["shape"], answer["dtype"], answer["near_is_nearer"]) == ([3, 384], "float32", True)
        assert answer["text"]
        assert "does not exist" in answer["refusal"] and "no API key" in answer["without_key"]
    # Greedy: the pieces of the stream are the text that came in one.
    assert "".join(said["stream"]) == said["http"]["text"] == said["grpc"]["text"]
    assert len(said["stream"]) > 2
    assert said["metadata"] == [{"name": "embedding", "datatype": "FP32", "shape": [-1, -1]}]
    assert said["server"] == "pressroom"


def _accuracy(printed: str, task: str, metric: str) -> float:
    (row,) = re.findall(rf"^\|{task}\s*\|.*\|{metric}\s*\|↑\s*\|\s*([0-9.]+)\|", printed, re.MULTILINE)
    return float(row)


def _lm_eval(clients, tmp_path, *arguments: object) -> str:
    return clients.run(
        "lm_eval",
        "run",
        "--include_path",
        HERE / "lm_eval_task",
        *arguments,
        cwd=HERE / "lm_eval_task",
        HF_HOME=str(tmp_path),
    )


def test_lm_eval_over_completions(clients, tmp_path):
    """Log probabilities of echoed prompts, sent as token ids, and text; only a right order of both scores so high."""
    given = f"model={MODEL},base_url={clients.url}/completions,tokenizer={clients.model_dir},max_length=2048"
    tasks = "pressroom_capitals,pressroom_capitals_said"
    printed = _lm_eval(clients, tmp_path, "--tasks", tasks, "--model", "local-completions", "--model_args", given)
    assert _accuracy(printed, "pressroom_capitals", "acc") >= 0.8
    assert _accuracy(printed, "pressroom_capitals_said", "contains") >= 0.5


def test_lm_eval_over_chat(clients, tmp_path):
    given = f"model={MODEL},base_url={clients.url}/chat/completions,num_concurrent=2"
    printed = _lm_eval(
        clients,
        tmp_path,
        "--tasks",
        "pressroom_capitals_asked",
        "--apply_chat_template",
        "--model",
        "local-chat-completions",
        "--model_args",
        given,
    )
    assert _accuracy(printed, "pressroom_capitals_asked", "contains") >= 0.5


def test_guidellm(clients, tmp_path):
    out = tmp_path / "report.json"
    clients.run(
        "guidellm",
        "run",
        "--backend",
        f"kind=openai_http,target={clients.origin},model={MODEL},api_key={clients.env['PRESSROOM_API_KEY']}",
        "--profile",
        "kind=concurrent,streams=2",
        "--constraint",
        f"kind=max_requests,count={NUM_REQUESTS}",
        "--tokenizer",
        f"kind=huggingface_auto,model={clients.model_dir}",
        "--data",
        f"kind=synthetic_text,prompt_tokens=24,output_tokens={NUM_TOKENS}",
        "--output",
        f"kind=json,path={out}",
        "--disable-progress",
        cwd=tmp_path,
    )
    (benchmark,) = json.loads(out.read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    assert metrics["request_totals"] == {
        "successful": NUM_REQUESTS,
        "errored": 0,
        "incomplete": 0,
        "total": NUM_REQUESTS,
    }
    assert metrics["output_token_count"]["successful"]["mean"] == NUM_TOKENS
    assert metrics["time_to_first_token_ms"]["successful"]["mean"] > 0


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_aiperf(clients, tmp_path, endpoint):
    clients.run(
        "aiperf",
        "profile",
        *("--model", MODEL, "--tokenizer", clients.model_dir, "--url", clients.origin),
        *("--api-key", clients.env["PRESSROOM_API_KEY"], "--endpoint-type", endpoint, "--streaming"),
        *("--concurrency", 2, "--request-count", NUM_REQUESTS, "--isl", 24, "--osl", NUM_TOKENS),
        *("--extra-inputs", "ignore_eos:true", "--use-server-token-count", "--ui-type", "none"),
        *("--output-artifact-dir", tmp_path / "out"),
        cwd=tmp_path,
    )
    (report,) = (tmp_path / "out").rglob("profile_export_aiperf.json")
    told = json.loads(report.read_text())
    assert told["request_count"]["avg"] == told["completed_request_count"]["avg"] == NUM_REQUESTS
    assert told["request_error_rate"]["avg"] == 0
    assert told["usage_completion_tokens"]["avg"] == NUM_TOKENS
    assert told["time_to_first_token"]["avg"] > 0
