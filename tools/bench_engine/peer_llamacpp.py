"""llama.cpp's own HTTP server out of xllamacpp's wheel. Runs in .venv-peers-llamacpp, without our packages.

usage: peer_llamacpp.py GGUF PORT THREADS SLOTS TOKENS_PER_SLOT      ends on SIGTERM
"""

import signal
import sys

import xllamacpp


def main():
    path, port, num_threads, num_slots, slot_tokens = sys.argv[1], *map(int, sys.argv[2:6])
    params = xllamacpp.CommonParams()
    params.model.path, params.hostnames, params.port = path, ["127.0.0.1"], port
    params.n_parallel, params.n_ctx = num_slots, num_slots * slot_tokens
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = num_threads
    params.ui = False
    server = xllamacpp.Server(params)
    print(f"{server.listening_address} {xllamacpp.get_system_info()}", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()
