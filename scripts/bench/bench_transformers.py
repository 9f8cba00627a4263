"""The peer on any device: transformers' own model with SDPA attention, a DynamicCache and the same weights in bf16."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longrun.model.adapter_merge import load_merged
from scripts.bench.bench_common import or_out_of_memory, spread, synchronize

CHUNK = 16384


class TransformersPeer:
    """`AutoModelForCausalLM` in bf16 on a GPU, in float32 on a CPU; greedy, logits of the last position only.

    Out of memory is a finding, not an error: `decode` and `prefill` then return a row with `error`, and so does every
    later call where already the model did not fit.
    """

    def __init__(self, model_dir: Path, device: torch.device, chunk: int = CHUNK, yarn: float | None = None) -> None:
        self.device, self.chunk, self.yarn = device, chunk, yarn
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        name = str(self.dtype).removeprefix("torch.")
        self.runner = f"transformers {name}, SDPA, full attention"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.failed = or_out_of_memory({}, lambda: self._load(model_dir), device).get("error")

    def _load(self, model_dir: Path) -> dict[str, Any]:
        self.model = load_merged(model_dir, None, self.yarn, dtype=self.dtype, attn_implementation="sdpa")
        self.model.to(self.device)
        return {}

    def decode(self, length: int, new_tokens: int, warm: int, seed: int, synthetic: bool) -> dict[str, Any]:
        """Milliseconds a token after `length` tokens, which are read in chunks or are random cache content."""
        row = {"runner": self.runner, "length": length, "synthetic": synthetic}
        return self._guarded(row, lambda: self._decode(length, new_tokens, warm, seed, synthetic))

    def prefill(self, token_ids: torch.Tensor) -> dict[str, Any]:
        """Seconds of reading `token_ids` (int64 [n] on the CPU) in chunks."""
        row = {"runner": self.runner, "length": len(token_ids), "chunk_size": self.chunk}
        return self._guarded(row, lambda: self._prefill(token_ids))

    def _guarded(self, row: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if self.failed:
            return {**row, "error": self.failed}
        row = or_out_of_memory(row, work, self.device)
        if self.device.type == "cuda":
            row["torch_peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
            torch.cuda.reset_peak_memory_stats()
        return row

    @torch.inference_mode()
    def _decode(self, length: int, new_tokens: int, warm: int, seed: int, synthetic: bool) -> dict[str, Any]:
        config, generator = self.model.config, torch.Generator().manual_seed(seed)
        if synthetic:
            cache, token = self._random_cache(length, seed), torch.tensor([[1]], device=self.device)
        else:
            token_ids = torch.randint(0, config.vocab_size, (length,), generator=generator)
            cache, token, _ = self._read(token_ids)
        return self._time_tokens(cache, token, length, new_tokens, warm)

    def _time_tokens(self, cache: Any, token: torch.Tensor, length: int, new_tokens: int, warm: int) -> dict[str, Any]:
        """Milliseconds of each of `new_tokens`, after `warm` others, which follow `token` and a cache of `length`."""
        config, times = self.model.config, []
        for _ in range(warm + new_tokens):
            synchronize(self.device)
            start = time.perf_counter()
            token = self._step(token, cache)
            token.item()
            times.append(1e3 * (time.perf_counter() - start))
        heads, layers = config.num_key_value_heads, config.num_hidden_layers
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv_bytes = 2 * layers * heads * head_dim * length * self.dtype.itemsize
        return {"ms": spread(times[warm:]), "ms_tokens": times[warm:], "kv_bytes": kv_bytes}

    def _prefill(self, token_ids: torch.Tensor) -> dict[str, Any]:
        return self._timed_read(token_ids, 2048)[0]

    @torch.inference_mode()
    def _timed_read(self, token_ids: torch.Tensor, warm_tokens: int) -> tuple[dict[str, Any], Any, torch.Tensor]:
        """Seconds of reading, after `warm_tokens` off the clock; the cache; the token that follows."""
        self._read(token_ids[:warm_tokens])
        synchronize(self.device)
        start = time.perf_counter()
        cache, token, chunks = self._read(token_ids)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens_per_s": len(token_ids) / seconds, "chunk_seconds": chunks}, cache, token

    def _read(self, token_ids: torch.Tensor) -> tuple[Any, torch.Tensor, list[float]]:
        """The cache after `token_ids`, the token that follows [1, 1], seconds of every chunk."""
        from transformers import DynamicCache

        cache, chunks, token = DynamicCache(config=self.model.config), [], torch.zeros(1, 1, dtype=torch.int64)
        for chunk in token_ids.split(self.chunk):
            start = time.perf_counter()
            token = self._step(chunk[None].to(self.device), cache)
            synchronize(self.device)
            chunks.append(time.perf_counter() - start)
        return cache, token, chunks

    def _step(self, token_ids: torch.Tensor, cache: Any) -> torch.Tensor:
        logits = self.model(token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1:].argmax(-1)

    def _random_cache(self, length: int, seed: int) -> Any:
        from transformers import DynamicCache

        config, cache = self.model.config, DynamicCache(config=self.model.config)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        generator = torch.Generator(self.device).manual_seed(seed)
        shape = (1, config.num_key_value_heads, length, head_dim)
        for layer_idx in range(config.num_hidden_layers):
            k, v = (
                torch.randn(shape, dtype=self.dtype, device=self.device, generator=generator).mul_(0.5) for _ in "kv"
            )
            cache.update(k, v, layer_idx)
        return cache
