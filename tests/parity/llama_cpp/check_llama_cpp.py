"""Run llama.cpp's own library on a GGUF model and an adapter: the logits of all positions.

    python -m tests.parity.llama_cpp.check_llama_cpp MODEL ADAPTER|- OUT.npy

Needs `libllama.so` of llama-cpp-python 0.3.36's sources, compiled for the CPU, in the directory
that LLAMA_LIBRARY names, and that package's `llama_cpp` on PYTHONPATH:

    cmake -B build -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=OFF -DLLAMA_BUILD_COMMON=OFF \
        llama_cpp_python-0.3.36/vendor/llama.cpp && cmake --build build --target llama
    LLAMA_CPP_LIB_PATH=build/bin PYTHONPATH=llama_cpp_python-0.3.36:. python -m tests...
"""

import ctypes
import sys

import llama_cpp
import numpy as np

from tests.parity.llama_cpp.tiny_model import IDS, VOCABULARY


def logits(model_path, adapter_path=None, strength=1.0):
    """Return the logits `[tokens, vocabulary]` of `IDS`, float32."""
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        str(model_path).encode(), llama_cpp.llama_model_default_params()
    )
    assert model, f"llama.cpp does not load {model_path}"
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 64, 1, 1
    params.type_k = params.type_v = 0  # float32
    params.flash_attn_type = 0
    context = llama_cpp.llama_init_from_model(model, params)
    if adapter_path is not None:
        adapter = llama_cpp.llama_adapter_lora_init(model, str(adapter_path).encode())
        if not adapter:
            raise ValueError("llama.cpp refuses the adapter")
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        scales = (ctypes.c_float * 1)(strength)
        llama_cpp.llama_set_adapters_lora(context, adapters, 1, scales)
    batch = llama_cpp.llama_batch_init(len(IDS), 0, 1)
    batch.n_tokens = len(IDS)
    for i, token in enumerate(IDS):
        batch.token[i], batch.pos[i] = token, i
        batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, True
    assert llama_cpp.llama_decode(context, batch) == 0
    found = llama_cpp.llama_get_logits(context)
    return np.ctypeslib.as_array(found, shape=(len(IDS), VOCABULARY)).copy()


if __name__ == "__main__":
    model, adapter, out = sys.argv[1:]
    np.save(out, logits(model, None if adapter == "-" else adapter))
