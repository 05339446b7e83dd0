"""llama.cpp through llama-cpp-python, by its lowest functions: llama_decode, without the package's own generator around it.

Its defaults: a cache of half-precision numbers, flash attention where it thinks fit, weights mapped from the file.
"""

from __future__ import annotations

import ctypes
import re
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.peers.base import CHUNK, Model


class LlamaCppModel(Model):
    """A GGUF file in llama.cpp, with one sequence. A cache here is nothing; there is one, in the context.

    all_float32: with a float32 cache, and without flash attention, which on a CPU rounds keys and values to half precision.
    """

    def __init__(self, tokens: list[int], threads: int, path: str, all_float32: bool = False) -> None:
        super().__init__(tokens)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = -(-max(len(tokens), CHUNK) // 256) * 256
        params.n_batch = params.n_ubatch = CHUNK
        params.n_threads = params.n_threads_batch = threads
        if all_float32:
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def about(self) -> str:
        return "built for " + " ".join(re.findall(r"(\w+) = 1", llama_cpp.llama_print_system_info().decode()))

    def empty(self) -> None:
        llama_cpp.llama_memory_clear(self.memory, False)

    def append(self, cache: None, tokens: np.ndarray) -> int:
        self._decode(llama_cpp.llama_batch_get_one(_pointer(tokens), len(tokens)))  # asks for the last logits alone
        return int(self._logits_at(-1).argmax())

    def keep(self, cache: None) -> Any:
        kept = (ctypes.c_uint8 * llama_cpp.llama_state_seq_get_size(self.context, 0))()
        if llama_cpp.llama_state_seq_get_data(self.context, kept, len(kept), 0) != len(kept):
            raise RuntimeError("llama.cpp did not save its cache")
        return kept

    def restore(self, kept: Any) -> None:
        self.empty()
        if not llama_cpp.llama_state_seq_set_data(self.context, kept, len(kept), 0):
            raise RuntimeError("llama.cpp did not restore its cache")

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        self.empty()
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens.tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, True
        self._decode(batch)
        logits = np.stack([self._logits_at(i).copy() for i in range(len(tokens))])
        llama_cpp.llama_batch_free(batch)
        return logits

    def _decode(self, batch: Any) -> None:
        if status := llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {status}")

    def _logits_at(self, i: int) -> np.ndarray:
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, i), shape=(self.n_vocab,))


def _pointer(tokens: np.ndarray) -> Any:
    return tokens.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
