"""What every KV head loses where it sees only the sinks and its newest tokens, from one forward pass.

The model reads a text in one chunk under full attention. For a sample of its queries each head's output is computed
again as it would be at every reach. The loss of a head at a reach is the squared length of the difference after the
head's share of the output projection, over that of the residual stream that it is added to: the mean over the sample.
A small change of the logits is linear in that difference and KL quadratic, so losses of heads add up.

How much a layer's differences matter to the logits is another question: in Qwen2.5-Coder-1.5B the first layer's are as
large as what they are added to, and cost next to nothing. `layer_costs` measures it, in one forward pass a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from longrun.attention.interface import Step
from longrun.attention.whole_text import WholeTextAttention
from longrun.model.decoder import Decoder
from longrun.model.rope import RotaryTable
from longrun.units import ALL_TOKENS

TILE_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}
_TILE_ROWS = 128  # the fewer, the shorter the stretch of keys that they see within a reach


class ReachMeasure(WholeTextAttention):
    """Full attention, noting losses on the way.

    Args:
        decoder: of all heads in the order of the model.
        rows: int64 [n], ascending positions of the sampled queries.
        reaches: tokens, ascending.
        sink_size: tokens that every head sees.

    Attributes:
        losses: float32 [num_layers, num_kv_heads, len(reaches), n], of each sampled query.
    """

    def __init__(self, decoder: Decoder, rows: Tensor, reaches: Sequence[int], sink_size: int) -> None:
        config = decoder.config
        super().__init__(config.num_qo_heads // config.num_kv_heads, config.head_dim**-0.5, sink_size)
        self._decoder, self._rows, self._finite = decoder, rows.to(decoder.device), tuple(reaches)
        self.losses = torch.zeros(config.num_layers, config.num_kv_heads, len(self._finite), len(rows))
        self._residual = torch.empty(0)

    def on_layer(self, layer_idx: int, hidden: Tensor) -> None:
        """The residual stream [T, hidden_size] that a layer reads."""
        self._residual = hidden[self._rows].float().square().sum(-1)

    def run(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """See `Attention.run`; the step holds the whole text."""
        weight = self._decoder.layers[layer_idx].out.dense()
        for head in range(k.shape[1]):
            heads = slice(head * self.group, (head + 1) * self.group)
            columns = weight[:, heads.start * q.shape[2] : heads.stop * q.shape[2]].float()
            gram = columns.T @ columns
            keys, values = k[:, head].float(), v[:, head].float()
            size = max(1, min(_TILE_ROWS, TILE_BYTES[q.device.type] // (8 * self.group * len(keys))))
            for begin in range(0, len(self._rows), size):
                part = slice(begin, begin + size)
                rows = self._rows[part]
                found = self._lost(q[rows, heads].float(), keys, values, rows)
                lost = torch.einsum("rnd,de,rne->rn", found, gram, found) / self._residual[part]
                self.losses[layer_idx, head, :, part] = lost.cpu()
        return super().run(layer_idx, q, k, v, step)

    def _lost(self, q: Tensor, keys: Tensor, values: Tensor, rows: Tensor) -> Tensor:
        """[len(reaches), n, group * head_dim]: full output minus that of each reach, for q [n, group, head_dim].

        Rows ascend, so that keys between the sinks and the first row's reach concern none of them.
        """
        first, stop = int(rows[0]), int(rows[-1]) + 1
        keys, values, seen = keys[:stop], values[:stop], torch.arange(stop, device=q.device)
        scores = (q.flatten(0, 1) @ keys.T).mul_(self.softmax_scale).view(len(rows), -1, stop)
        scores.masked_fill_((seen > rows[:, None])[:, None], float("-inf"))
        full = torch.softmax(scores, dim=-1) @ values
        lost = []
        for reach in reversed(self._finite):  # each hides more
            begin = first - reach + 1 - (stop - len(seen))  # in what is left
            if begin > self.sink_size:
                scores, values, seen = (
                    torch.cat((x.narrow(dim, 0, self.sink_size), x.narrow(dim, begin, len(seen) - begin)), dim)
                    for x, dim in ((scores, -1), (values, 0), (seen, 0))
                )
            hidden = (seen >= self.sink_size) & (seen <= rows[:, None] - reach)
            scores.masked_fill_(hidden[:, None], float("-inf"))
            lost.append((full - torch.softmax(scores, dim=-1) @ values).flatten(1))
        return torch.stack(lost[::-1])


@torch.inference_mode()
def measure_reaches(
    decoder: Decoder, rotary: RotaryTable, token_ids: Tensor, rows: Tensor, reaches: Sequence[int], sink_size: int
) -> Tensor:
    """Losses of every head at every reach, of sampled queries.

    Args:
        decoder: heads in the order of the model, as under full attention.
        rotary: on the decoder's device.
        token_ids: int64 [T], the text.
        rows: int64 [n], ascending positions of the sampled queries.
        reaches: tokens, ascending.

    Returns:
        float32 [num_layers, num_kv_heads, len(reaches), n] in host memory.
    """
    assert all(list(order) == sorted(order) for order in decoder.permutation)
    measure = ReachMeasure(decoder, rows, reaches, sink_size)
    step = Step(0, len(token_ids), *rotary.cos_sin(0, len(token_ids), len(token_ids)))
    decoder.forward(token_ids.to(decoder.device), step, measure, on_layer=measure.on_layer)
    return measure.losses


@torch.inference_mode()
def layer_costs(
    decoder: Decoder, rotary: RotaryTable, token_ids: Tensor, rows: Sequence[Tensor], reach: int, sink_size: int,
    window_attention: Callable[..., None] | None = None,
) -> Iterator[list[float]]:  # fmt: skip
    """What it costs that all heads of one layer see no further than `reach`, layer by layer: each is cut in a forward
    pass of its own, which begins at that layer with what full attention has made of the text until there.

    Args:
        token_ids, rotary: as `measure_reaches`.
        rows: int64 [n] each: kinds of positions.
        window_attention: see `WholeTextAttention`.

    Yields:
        For each layer, the mean KL(full attention || so) of the next token's distribution in nats, by kind of row.
    """
    config = decoder.config
    shape, scale = (config.num_layers, config.num_kv_heads), config.head_dim**-0.5
    step = Step(0, len(token_ids), *rotary.cos_sin(0, len(token_ids), len(token_ids)))
    ids, every = token_ids.to(decoder.device), torch.cat(tuple(rows)).to(decoder.device)

    def attending(tokens: int) -> WholeTextAttention:
        reaches, group = ((tokens,) * shape[1],) * shape[0], config.num_qo_heads // shape[1]
        return WholeTextAttention(group, scale, sink_size, reaches, window_attention)

    def log_probs(hidden: Tensor) -> Iterator[Tensor]:
        for part in decoder.finished(hidden[every]).split(64):
            yield torch.log_softmax(decoder.logits(part), dim=-1)

    full, cut = attending(ALL_TOKENS), attending(reach)
    reference = list(log_probs(decoder.run_layers(range(shape[0]), decoder.embed(ids), step, full)))
    before = decoder.embed(ids)
    for layer in range(shape[0]):
        hidden = decoder.run_layers([layer], before.clone(), step, cut)
        hidden = decoder.run_layers(range(layer + 1, shape[0]), hidden, step, full)
        pairs = zip(reference, log_probs(hidden), strict=True)
        kl = torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in pairs]).double().cpu()
        yield [part.mean().item() for part in kl.split([len(kind) for kind in rows])]
        before = decoder.run_layers([layer], before, step, full)
