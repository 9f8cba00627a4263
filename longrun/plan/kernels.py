"""Which models and budgets the GPU's kernels over quantized pages serve."""

from __future__ import annotations

from longrun.config.model_config import ModelConfig
from longrun.errors import ConfigError
from longrun.plan.budget import Budget
from longrun.quant.kv_format import GPU_HEAD_DIMS, GPU_MAX_GROUP, GPU_PAGE_SIZE


def check_kernel_shapes(config: ModelConfig, budget: Budget) -> None:
    """The GPU's kernels serve this model with the budget's KV format; only quantized ones have limits.

    Raises:
        ConfigError: they do not.
    """
    if not budget.quantizes_pages:
        return
    kernel, remedy = f"{budget.kv_format} kernel on a GPU", "use kv_format bf16 or device cpu"
    if config.head_dim not in GPU_HEAD_DIMS:
        served = " or ".join(map(str, GPU_HEAD_DIMS))
        raise ConfigError(f"the model's head_dim {config.head_dim} has no {kernel}, which serves {served}: {remedy}")
    if config.group_size > GPU_MAX_GROUP:
        raise ConfigError(
            f"the model's {config.group_size} query heads a KV head have no {kernel}, which serves at "
            f"most {GPU_MAX_GROUP}: {remedy}"
        )
    if budget.page_size != GPU_PAGE_SIZE:
        raise ConfigError(
            f"page_size {budget.page_size} of {budget.source} has no {kernel}, which serves {GPU_PAGE_SIZE}: "
            f"set page_size = {GPU_PAGE_SIZE} in its [kv] section, or {remedy}"
        )
