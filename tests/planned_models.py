"""Models that plans are made for: Llama 3 8B and a small one, as a config.json describes them."""

from longrun.config.model_config import ModelConfig
from longrun.plan.plan import choose_split
from longrun.plan.shapes import SHAPES

LLAMA_JSON = SHAPES["Llama-3-8B"]
SMALL_JSON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
}
LLAMA = ModelConfig.from_dict(LLAMA_JSON, "config.json")
SMALL = ModelConfig.from_dict(SMALL_JSON, "config.json")
CTX = 3_300_000


def assumed(config, budget, ratio):
    return choose_split(config, budget, None, ratio, assume=True)
