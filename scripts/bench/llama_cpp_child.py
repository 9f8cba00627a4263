"""llama.cpp on a GGUF file, driven over stdin by bench_llama_cpp.py; runs in an environment with llama-cpp-python.

    python llama_cpp_child.py FILE THREADS CONTEXT

Every line of stdin is `[[token ids], new tokens]`; the answer is `{"prefill": seconds, "decode": seconds a token}`. The
first line of stdout is `{"version": .., "system": ..}`. Its cache is float16, its greedy choice numpy's.
"""

import ctypes
import json
import sys
import time

import llama_cpp
import numpy as np

_BATCH = 1024


def main() -> None:
    file, threads, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

    @llama_cpp.llama_log_callback
    def quiet(*_) -> None:
        pass

    llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch = context, _BATCH
    settings.n_threads = settings.n_threads_batch = threads
    runner = llama_cpp.llama_init_from_model(model, settings)
    if not runner:
        raise SystemExit(f"llama.cpp cannot use {file} with {context} tokens")
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def run(ids: list[int]) -> int:
        """The likeliest token after `ids`."""
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        if llama_cpp.llama_decode(runner, llama_cpp.llama_batch_get_one(tokens, len(ids))):
            raise SystemExit("llama.cpp failed at a batch")
        return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(runner, -1), (vocab_size,)).argmax())

    system = llama_cpp.llama_print_system_info().decode().strip()
    print(json.dumps({"version": llama_cpp.__version__, "system": system}), flush=True)
    for line in sys.stdin:
        ids, new_tokens = json.loads(line)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(runner), True)
        start = time.perf_counter()
        for first in range(0, len(ids), _BATCH):
            token = run(ids[first : first + _BATCH])
        prefill = time.perf_counter() - start
        token = run([token])
        start = time.perf_counter()
        for _ in range(new_tokens):
            token = run([token])
        decode = (time.perf_counter() - start) / new_tokens
        print(json.dumps({"prefill": prefill, "decode": decode}), flush=True)


if __name__ == "__main__":
    main()
