"""Asks a running system with tritonclient as it comes, over HTTP and gRPC. Runs in .venv-clients, not in ours.

usage: ask_with_tritonclient.py HTTP_ADDR GRPC_ADDR (the key in PRESSROOM_API_KEY); prints one JSON object.
"""

import json
import os
import queue
import sys

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

GENERATOR, ENCODER = "smollm2-135m-instruct", "all-minilm-l6-v2"


def key() -> dict[str, str]:
    """The headers, anew for each call: the HTTP client writes into those that it is given."""
    return {"authorization": f"Bearer {os.environ['PRESSROOM_API_KEY']}"}


def ask(client, library) -> dict[str, object]:
    """What both clients can do, whatever they speak."""
    texts = np.array(["A cat.", "A kitten.", "Tax law."], dtype=object)
    text = library.InferInput("text", [3], "BYTES")
    text.set_data_from_numpy(texts)
    vectors = client.infer(ENCODER, [text], headers=key()).as_numpy("embedding")
    prompt = library.InferInput("text_input", [1], "BYTES")
    prompt.set_data_from_numpy(np.array(["The capital of France is"], dtype=object))
    wanted = [library.InferRequestedOutput("text_output")]
    asked = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answer = client.infer(GENERATOR, [prompt], outputs=wanted, request_id="mine", headers=key(), parameters=asked)
    try:
        client.infer("nobody", [prompt], headers=key())
        refusal = ""
    except InferenceServerException as error:
        refusal = error.message()
    try:
        client.infer(ENCODER, [text])
        without_key = ""
    except InferenceServerException as error:
        without_key = error.message()
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready(GENERATOR, headers=key()),
        "shape": list(vectors.shape),
        "dtype": str(vectors.dtype),
        "near_is_nearer": bool(near > far),
        "text": answer.as_numpy("text_output")[0].decode(),
        "refusal": refusal,
        "without_key": without_key,
    }


def stream(client) -> list[str]:
    """The pieces of a text, over gRPC's stream."""
    answers: queue.Queue = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)), headers=key())
    prompt = tritonclient.grpc.InferInput("text_input", [1], "BYTES")
    prompt.set_data_from_numpy(np.array(["The capital of France is"], dtype=object))
    asked = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "stream": True}
    client.async_stream_infer(GENERATOR, [prompt], parameters=asked, enable_empty_final_response=True)
    pieces = []
    while True:
        result, error = answers.get(timeout=60)
        if error is not None:
            raise error
        final = result.get_response().parameters.get("triton_final_response")
        if final is not None and final.bool_param:
            break
        pieces.append(result.as_numpy("text_output")[0].decode())
    client.stop_stream()
    return pieces


def main() -> None:
    """Asks over both and prints what came."""
    http = tritonclient.http.InferenceServerClient(sys.argv[1])
    grpc = tritonclient.grpc.InferenceServerClient(sys.argv[2])
    said = {
        "http": ask(http, tritonclient.http),
        "grpc": ask(grpc, tritonclient.grpc),
        "stream": stream(grpc),
        "metadata": http.get_model_metadata(ENCODER, headers=key())["outputs"],
        "grpc_metadata": grpc.get_model_metadata(ENCODER, headers=key(), as_json=True)["outputs"],
        "server": http.get_server_metadata()["name"],
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main()
