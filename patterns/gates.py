"""Train a gate per KV head: which heads can make do with sinks and a window without the answer changing?

DuoAttention (arXiv 2410.10819): the model is frozen, every KV head gets one gate in [0, 1], at first 1, between full
and streaming attention. The loss of a step is the mean squared difference between the final hidden states (after the
last norm) of the full and the gated model, over the tokens that predict the pass keys asked for at the end of the
text, plus `regularization` * mean |gate|. AdamW without weight decay; the learning rate rises from a tenth over the
first fifth of the steps and falls back to a tenth over the last fifth. A gate that ends near 1 is a retrieval head.

Changed from the original: a streaming head sees sinks and window at every length and never a chunk; any model that
goes through transformers' attention interface; the same seed gives the same map, also after an interruption.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from longrun.errors import ConfigError, InputError, quoted
from longrun.patterns.gate_texts import GateText, GateTexts
from longrun.patterns.gated_attention import ATTN_IMPLEMENTATION, Gates
from longrun.patterns.identify_checkpoint import Checkpoint
from longrun.patterns.identify_settings import IdentifyProgress, IdentifySettings, MethodResult, OnProgress

__all__ = ["ATTN_IMPLEMENTATION", "identify_gates"]

WARM_UP = DECAY = 0.2
LOWEST_RATE = 0.1
CHECKPOINT_BYTES = 2 * 2**30
"""Activations above this are computed again in the backward pass, layer by layer, rather than kept."""
CUBLAS_SETTING = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_VALUES = (":4096:8", ":16:8")
"""Those with which torch takes cuBLAS to repeat (aten/src/ATen/Context.cpp)."""


def identify_gates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text_ids: Tensor,
    settings: IdentifySettings,
    checkpoint: Checkpoint,
    on_progress: OnProgress,
) -> MethodResult:
    """Train the gates; arguments and contract as in patterns/identify.py.

    Returns:
        the gates, [num_layers][num_kv_heads], and of each step the loss and the share of answer tokens that the
        untouched model itself predicts: where that is low, the text asks more than the model can do.

    Raises:
        InputError: a context too short for one pass key, a damaged checkpoint, or a GPU process whose cuBLAS cannot be
            set to repeat any more.
        ConfigError: the model needs an operation that has no deterministic kernel.
    """
    texts = GateTexts(tokenizer, text_ids, settings)
    trainer = GateTrainer(model, settings)
    trainer.resume(checkpoint)
    with deterministic_algorithms(trainer.gates.device):
        for step in range(trainer.step, settings.steps):
            text = texts.text(step)
            loss = trainer.train(text)
            if checkpoint.due(step + 1):
                checkpoint.save(trainer.state(), {"step": step + 1})
            gates = trainer.gates
            on_progress(
                IdentifyProgress(
                    step + 1, settings.steps, loss, int((gates < 0.5).sum()), gates.numel(), len(text.token_ids)
                )
            )
    facts = {
        "losses": [float(f"{loss:.6g}") for loss in trainer.losses],
        "full_model_accuracy": [round(share, 4) for share in trainer.accuracies],
    }
    return MethodResult(trainer.gates.detach().cpu().tolist(), facts)


def learning_rate(step: int, settings: IdentifySettings) -> float:
    """The rate of a step (counted from 0)."""
    ramp_up = (step + 1) / (WARM_UP * settings.steps)
    ramp_down = (settings.steps - step) / (DECAY * settings.steps)
    return settings.learning_rate * (LOWEST_RATE + (1 - LOWEST_RATE) * min(1.0, ramp_up, ramp_down))


def gate_loss(
    model: PreTrainedModel, text: GateText, target: Tensor, gates: Tensor, settings: IdentifySettings
) -> Tensor:
    """Loss of one text, a float32 scalar; only `gates` ([num_layers, num_kv_heads], float32) get gradients.

    target: [num_labels, hidden_size], `label_states` of the model without gates.
    """
    length = len(text.token_ids)
    plan = Gates.over(gates, length, settings.sink_size, settings.recent_size, model.dtype)
    found = label_states(model, text, plan)
    return (found.float() - target.float()).square().mean() + settings.regularization * gates.abs().mean()


def label_states(model: PreTrainedModel, text: GateText, gates: Gates | None) -> Tensor:
    """Final hidden states, after the last norm, at the label positions: [num_labels, hidden_size]."""
    token_ids = text.token_ids.to(model.device)[None]
    out = model.base_model(input_ids=token_ids, use_cache=False, longrun_gates=gates)
    return out.last_hidden_state[0, text.label_positions.to(model.device)]


class GateTrainer:
    """Gates, their optimizer, and one training step.

    Attributes:
        gates: [num_layers, num_kv_heads], float32, in [0, 1], on the model's device.
        step: steps done.
        losses, accuracies: one each step.
    """

    def __init__(self, model: PreTrainedModel, settings: IdentifySettings) -> None:
        self._model, self._settings = model, settings
        allow_recomputed_layers(model)
        config = model.config
        self.gates = nn.Parameter(torch.ones(config.num_hidden_layers, config.num_key_value_heads, device=model.device))
        self._optimizer = torch.optim.AdamW([self.gates], lr=settings.learning_rate, weight_decay=0.0, foreach=False)
        self.step = 0
        self.losses: list[float] = []
        self.accuracies: list[float] = []

    def train(self, text: GateText) -> float:
        """One step; returns its loss."""
        with torch.no_grad():
            target = label_states(self._model, text, None)
            guessed = self._model.get_output_embeddings()(target).argmax(dim=-1)
            accuracy = (guessed == text.label_ids.to(guessed.device)).float().mean().item()
        with recomputed_layers(self._model, self._activation_bytes(len(text.token_ids)) > CHECKPOINT_BYTES):
            loss = gate_loss(self._model, text, target, self.gates, self._settings)
            loss.backward()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self._settings)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            self.gates.clamp_(0.0, 1.0)
        self.step += 1
        self.losses.append(loss.item())
        self.accuracies.append(accuracy)
        return self.losses[-1]

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on, and what is reported at the end."""
        moments = self._optimizer.state[self.gates]
        return {
            "gates": self.gates,
            **{name: moments[name] for name in ("step", "exp_avg", "exp_avg_sq")},
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "accuracies": torch.tensor(self.accuracies, dtype=torch.float64),
        }

    def resume(self, checkpoint: Checkpoint) -> None:
        """Restore what `checkpoint` holds, if anything."""
        found = checkpoint.load()
        if found is None:
            return
        tensors, facts = found
        with torch.no_grad():
            self.gates.copy_(tensors["gates"])
        self._optimizer.state[self.gates] = {
            "step": tensors["step"],
            "exp_avg": tensors["exp_avg"].to(self.gates.device),
            "exp_avg_sq": tensors["exp_avg_sq"].to(self.gates.device),
        }
        self.losses, self.accuracies = tensors["losses"].tolist(), tensors["accuracies"].tolist()
        self.step = facts["step"]

    def _activation_bytes(self, num_tokens: int) -> int:
        """About what autograd keeps of a pass: the inputs of every product, norm and activation."""
        config = self._model.config
        width = 12 * config.hidden_size + 4 * config.intermediate_size
        return num_tokens * config.num_hidden_layers * width * self._model.dtype.itemsize


def allow_recomputed_layers(model: PreTrainedModel) -> None:
    """Have `recomputed_layers` work on this model: gradient checkpointing of every layer, off in eval mode."""
    name = "activation_checkpointing_enable"  # since transformers 5.2x; the older name warns
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "preserve_rng_state": False})
    model.disable_input_require_grads()  # enabled for trainers of embeddings, adapters or prompts


@contextmanager
def recomputed_layers(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Within the block a layer keeps only its input for the backward pass; the result is the same to the bit."""
    if wanted:
        model.train()  # which switches it on; dropout of attention is ignored, and these families have no other
    try:
        yield
    finally:
        model.eval()


@contextmanager
def deterministic_algorithms(device: torch.device) -> Iterator[None]:
    """Within the block torch takes deterministic kernels and refuses what has none; afterwards all is as before, but
    for the environment variable that cuBLAS reads once a process.

    The mode has to be strict: asked to warn only, torch's FlashAttention takes the backward pass that adds its
    gradients in whatever order they come (aten/src/ATen/native/transformers/cuda/attention_backward.cu). Strictly it
    adds them into a buffer for each group of blocks and sums those in order, at about (number of multiprocessors /
    query heads) times the memory of the queries' gradient in float32.

    Args:
        device: where the block computes.

    Raises:
        InputError: on a GPU, where cuBLAS is set otherwise, or was used before it could be set.
        ConfigError: the block came to an operation that has no deterministic kernel.
    """
    if device.type == "cuda":
        set_cublas()
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        if device.type == "cuda":
            _try_cublas(device)
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise ConfigError(
            f"this model's training does not repeat to the bit ({' '.join(str(error).split())[:300]}): measure it with "
            f"--method reconstruction, or on a CPU"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


def set_cublas() -> None:
    """Ask for cuBLAS's repeatable workspaces, in this process's environment: read when cuBLAS is first used.

    Raises:
        InputError: the environment says another value.
    """
    value = os.environ.setdefault(CUBLAS_SETTING, CUBLAS_VALUES[0])
    if value not in CUBLAS_VALUES:
        raise InputError(
            f"{CUBLAS_SETTING} is {quoted(value)}, and gates repeat to the bit with {' or '.join(CUBLAS_VALUES)} only: "
            f"unset it"
        )


def _try_cublas(device: torch.device) -> None:
    """One product, which torch refuses where cuBLAS was first used without the setting."""
    ones = torch.ones(8, 8, device=device)
    try:
        torch.mm(ones, ones)
    except RuntimeError as error:
        if CUBLAS_SETTING not in str(error):
            raise
        raise InputError(
            f"cuBLAS was used in this process before {CUBLAS_SETTING} was set, so that gates would not repeat to the "
            f"bit: measure the map in a process of its own, or start this one with {CUBLAS_SETTING}={CUBLAS_VALUES[0]}"
        ) from error
