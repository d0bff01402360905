"""OpenVINO GenAI's continuous batching in process on a GGUF. Runs in .venv-peers-openvino, without our packages.

usage: peer_openvino.py GGUF       reads one JSON line a run from stdin, writes one JSON line for each to stdout

The method is that of the issue's own script: 1 GiB of cache, split prefill, no prefix cache, prompts tokenized before
the clock starts.
"""

import json
import os
import sys
import time

import openvino_genai


def run(pipeline, ids, max_tokens, num_streams, first_id):
    """Keeps num_streams requests under way; returns seconds in all and the times and tokens of each answer."""
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = max_tokens, True, False
    pending, live, answers = list(reversed(ids)), {}, []
    began_s = time.perf_counter()
    while pending or live:
        while pending and len(live) < num_streams:
            tensor = pending.pop()
            answer = {"began_s": time.perf_counter(), "stamps": [], "tokens": 0, "prompt_tokens": tensor.shape[1]}
            answers.append(answer)
            live[first_id] = pipeline.add_request(first_id, tensor, config), answer
            first_id += 1
        pipeline.step()
        now_s = time.perf_counter()
        for key, (handle, answer) in list(live.items()):
            if handle.can_read():
                answer["tokens"] += sum(len(output.generated_ids) for output in handle.read().values())
                answer["stamps"].append(now_s)
            if handle.get_status() != openvino_genai.GenerationStatus.RUNNING and not handle.can_read():
                del live[key]
    return time.perf_counter() - began_s, answers


def main():
    # The library prints to stdout; what we print goes to where stdout was.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_seqs = 1, 64
    scheduler.enable_prefix_caching, scheduler.dynamic_split_fuse = False, True
    pipeline = openvino_genai.ContinuousBatchingPipeline(sys.argv[1], scheduler, "CPU")
    tokenizer = pipeline.get_tokenizer()
    print(json.dumps({"version": openvino_genai.__version__}), file=out, flush=True)
    first_id = 0
    for line in sys.stdin:
        order = json.loads(line)
        chats = ([{"role": "user", "content": prompt}] for prompt in order["prompts"])
        texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        ids = [tokenizer.encode(text, add_special_tokens=False).input_ids for text in texts]
        wall_s, answers = run(pipeline, ids, order["max_tokens"], order["num_streams"], first_id)
        first_id += len(ids)
        print(json.dumps({"wall_s": wall_s, "answers": answers}), file=out, flush=True)


if __name__ == "__main__":
    main()
