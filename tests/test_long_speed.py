"""What makes training on long texts affordable: positions that jump without a mask, what is computed again, kernels."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.training import long_recompute
from scripts.training.long_attention import Attention
from scripts.training.long_lora import LoraModel
from scripts.training.long_positions import stretched
from scripts.training.long_ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
SETTINGS = {"r": 4, "lora_alpha": 8, "rope_theta": 5000.0, "max_position_embeddings": 1_000_000}
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
LAYERS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=160, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, initializer_range=0.2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(made)
    return made


def lora_model(folder: Path, dtype: torch.dtype = torch.float32) -> LoraModel:
    made = LoraModel(folder, SETTINGS, dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for layer in made.layers.values():
        layer.lora_B.data = 0.1 * torch.randn(layer.lora_B.shape, generator=generator)
    return made


def rotated(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """RoPE of x [batch, heads, T, d], with angles in float64."""
    half = x.shape[-1] // 2
    angles = positions[:, None, :, None].double() * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1).to(x.dtype)


def reference_logits(lora: LoraModel, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The decoder by hand: explicit positions, an explicit causal mask, float32."""
    model, config = lora.model.model, lora.model.config
    hidden, (batch, count) = model.embed_tokens(ids), ids.shape
    mask = torch.full((count, count), -torch.inf).triu(1)
    for layer in model.layers:
        x, own = layer.input_layernorm(hidden), layer.self_attn
        q, k, v = (
            linear(x).view(batch, count, -1, 16).transpose(1, 2) for linear in (own.q_proj, own.k_proj, own.v_proj)
        )
        q, k = (rotated(one, positions, config.rope_parameters["rope_theta"]) for one in (q, k))
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        scores = q @ k.transpose(2, 3) / 4 + mask
        out = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, count, -1)
        hidden = hidden + own.o_proj(out)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return lora.model.lm_head(model.norm(hidden))


def test_logits_at_positions_that_jump(folder, monkeypatch):
    lora = lora_model(folder)
    ids = torch.randint(300, (2, 60), generator=torch.Generator().manual_seed(2))
    rows = [stretched(random.Random(seed), 60, [11, 25, 40, 52], 3000) for seed in (3, 4)]
    positions = torch.stack([torch.from_numpy(row) for row in rows])
    assert ((positions.diff() > 1).sum(dim=1) >= 1).all()
    seen = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, **options):
        seen.append((options.get("attn_mask"), options.get("is_causal")))
        return plain(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    with torch.no_grad():
        straight = lora.model(ids).logits
        with lora.at_positions(positions):
            got = lora.model(ids).logits
        want = reference_logits(lora, ids, positions)
        assert torch.equal(lora.model(ids).logits, straight)  # and afterwards it is as before
    assert seen == [(None, True)] * 3 * LAYERS
    assert (got - want).abs().max() < 1e-3
    assert (got - straight).abs().max() > 0.05
    with (
        pytest.raises(ValueError, match=r"positions are \(2, 60\), and the batch is \(2, 50\)"),
        lora.at_positions(positions),
    ):
        lora.model(ids[:, :50])


def test_far_positions_change_nothing_but_rounding(folder):
    """RoPE is relative: a text that begins at 900,000 reads as at 0."""
    lora = lora_model(folder)
    ids = torch.randint(300, (1, 40), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        near = lora.model(ids).logits
        with lora.at_positions(torch.arange(900_000, 900_040)[None]):
            far = lora.model(ids).logits
    assert 0 < (far - near).abs().max() < 0.05 * near.abs().max()


class Calls(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function] += 1
        return function(*args, **(kwargs or {}))


def backward(lora: LoraModel, again: bool) -> tuple[Counter, list[torch.Tensor]]:
    """Operations of a forward and a backward pass, and the gradients."""
    long_recompute.recompute(lora.model, again)
    ids = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(6))
    with Calls() as calls:
        lora.model(input_ids=ids, use_cache=False).logits.logsumexp(dim=-1).sum().backward()
    gradients = [parameter.grad.clone() for parameter in lora.parameters()]
    for parameter in lora.parameters():
        parameter.grad = None
    return calls.counts, gradients


def test_attention_is_not_computed_again(folder):
    lora = lora_model(folder)
    lora.model.train()
    long_recompute.enable(lora.model)
    kept, expected = backward(lora, again=False)
    selective, gradients = backward(lora, again=True)
    lora.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    everything, _ = backward(lora, again=True)
    assert (kept[FLASH], selective[FLASH], everything[FLASH]) == (LAYERS, LAYERS, 2 * LAYERS)
    assert selective[torch.ops.aten.silu.default] == 2 * kept[torch.ops.aten.silu.default] > 0  # the rest is
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def saved_bytes(lora: LoraModel, again: bool, count: int) -> int:
    """Bytes that a forward pass keeps for its backward pass, each storage once, without parameters."""
    long_recompute.recompute(lora.model, again)
    storages: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in lora.model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = lora.model.model(input_ids=torch.zeros(1, count, dtype=torch.long), use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(storages.values())


def test_the_estimate_of_what_is_kept(folder):
    lora = lora_model(folder, torch.bfloat16)
    lora.model.train()
    short, long = (saved_bytes(lora, False, count) for count in (500, 1500))
    estimate = long_recompute.activation_bytes(lora.model.config, 4, element=2)
    assert (long - short) / 1000 == pytest.approx(estimate, rel=0.1)


def test_memory_of_a_gpu_decides_what_is_computed_again(monkeypatch):
    config = transformers.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        head_dim=64,
    )  # fmt: skip
    per_token = long_recompute.activation_bytes(config, 32, 2)
    assert 650_000 < per_token < 720_000
    for memory, least, most in ((150_000_000_000, 131_072, 262_143), (80_000_000_000, 65_536, 131_071)):
        properties = type("Properties", (), {"total_memory": memory})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, properties=properties: properties)
        assert least <= long_recompute.most_kept_tokens(torch.device("cuda", 0), per_token) <= most
    assert long_recompute.most_kept_tokens(torch.device("cpu"), per_token) == 0


def measured(flash: float, cudnn: float, error: float = 0.0):
    """Seconds and results of two kernels, `error` of the results apart."""
    results = torch.tensor([3.0, 4.0])
    found = {"flash": (flash, [results, results]), "cudnn": (cudnn, [results, results * (1 + error)])}
    return found.__getitem__


@pytest.mark.parametrize(
    ("cudnn", "error", "kernel"), [(0.5, 0.0, "cudnn"), (0.5, 0.01, "cudnn"), (2.0, 0.0, "flash"), (0.5, 0.1, "flash")]
)
def test_auto_keeps_the_faster_kernel_whose_results_are_right(cudnn, error, kernel):
    attention = Attention("auto", ALONE, torch.bfloat16)
    measure = measured(1.0, cudnn, error)
    assert attention.choose(None, 1, 4096, measure) is None and attention.kernel == "flash"
    entry = attention.choose(None, 1, 65536, measure)
    assert entry.pop("difference") == pytest.approx(error, abs=1e-5)
    assert entry == {
        "event": "attention", "length": 65536, "flash_ms": 1000.0, "cudnn_ms": 1000 * cudnn, "kernel": kernel,
    }  # fmt: skip
    assert attention.kernel == kernel
    assert attention.choose(None, 1, 131072, measure) is None  # once a run


def test_results_that_are_not_finite_are_refused():
    attention = Attention("auto", ALONE, torch.bfloat16)
    entry = attention.choose(None, 1, 65536, measured(1.0, 0.5, math.nan))
    assert entry["kernel"] == "flash" and math.isnan(entry["difference"])


def test_a_kernel_that_is_not_to_be_had_is_logged():
    def measure(kernel: str):
        if kernel == "cudnn":
            raise RuntimeError("No available kernel. Aborting execution.")
        return 1.0, [torch.ones(2)]

    attention = Attention("auto", ALONE, torch.bfloat16)
    entry = attention.choose(None, 1, 65536, measure)
    assert entry["kernel"] == attention.kernel == "flash" and "No available kernel" in entry["cudnn_error"]
    for wanted in ("flash", "cudnn"):
        asked = Attention(wanted, ALONE, torch.bfloat16)
        assert asked.choose(None, 1, 65536, measure) is None and asked.kernel == wanted


def test_a_measurement_gives_the_attention_that_layers_run(folder):
    """On a CPU both names run PyTorch's own choice: the results of two runs are the same ones."""
    config = transformers.AutoConfig.from_pretrained(folder)
    attention = Attention("auto", ALONE, torch.bfloat16)
    seconds, results = attention._run("flash", config, 2, 48)
    assert seconds > 0 and [tuple(one.shape) for one in results] == [(2, 4, 48, 16)] * 2 + [(2, 2, 48, 16)] * 2
    assert all(torch.equal(a, b) for a, b in zip(results, attention._run("cudnn", config, 2, 48)[1], strict=True))
    assert attention.kernel == "flash"
