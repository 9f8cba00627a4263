"""The whole path on tiny checkpoints: runtime, session, dual cache, against transformers and against itself."""

import signal
import threading

import pytest
import torch
from tiny_models import FAMILIES, ROPES, tiny_model
from transformers import DynamicCache

import longrun
from longrun.errors import ContextFullError, InputError, PlanError
from longrun.patterns.head_map import HeadMap

T = 200  # tokens; beyond every tiny model's trained window


def rms_ratio(actual, expected):
    assert torch.isfinite(actual).all()
    return ((actual - expected).double().pow(2).mean() / expected.double().pow(2).mean()).sqrt().item()


def token_ids(n=T, seed=1):
    return torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(seed))


def mixed_map(layers=3, heads=3, sink=16, recent=48):
    scores = [[(7 * layer + 5 * head) % 10 / 10 for head in range(heads)] for layer in range(layers)]
    return HeadMap.from_scores(scores, sink_size=sink, recent_size=recent)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder and transformers model of a family and RoPE type, made once."""
    made = {}

    def get(family, rope="default"):
        if (family, rope) not in made:
            model = tiny_model(family, rope)
            folder = tmp_path_factory.mktemp(f"{family}-{rope}")
            model.save_pretrained(folder)
            made[family, rope] = folder, model
        return made[family, rope]

    return get


def load(folder, **options):
    return longrun.load(folder, **{"kv_format": "fp32", "device": "cpu", "ctx": T + 60, **options})


CASES = [(family, "default") for family in FAMILIES] + [("llama", rope) for rope in ROPES if rope != "default"]


@pytest.mark.parametrize(("family", "rope"), CASES)
@pytest.mark.parametrize("chunk_size", [1000, 37])
def test_logits_equal_transformers(saved, family, rope, chunk_size):
    """Prefill in one piece and in odd chunks, then token by token, through fp32 pages on both pools."""
    folder, _ = saved(family, rope)
    model = tiny_model(family, rope)  # a fresh one: transformers' dynamic RoPE remembers the longest call
    ids, cut = token_ids(), 150
    with torch.inference_mode():
        cache = DynamicCache()
        first = model(ids[None, :cut], past_key_values=cache).logits[0]
        singles = [model(ids[None, i : i + 1], past_key_values=cache).logits[0, 0] for i in range(cut, T)]
    runtime = load(folder, chunk_size=chunk_size, device_share=0.5)
    session = runtime.new_session()
    assert rms_ratio(session.prefill(ids[:cut]), first[-1]) < 1e-4
    mine = torch.stack([session.prefill([token]) for token in ids[cut:].tolist()])
    assert rms_ratio(mine, torch.stack(singles)) < 1e-4
    session.cache.check()
    if rope != "dynamic":  # whose frequencies depend on how many tokens a call brings, as in transformers
        whole = runtime.new_session()
        whole.prefill(ids[:1])
        with torch.inference_mode():
            expected = model(ids[None]).logits[0]
        assert rms_ratio(whole.score(ids[1:]), expected[:-1]) < 1e-4


class RoundingCache(DynamicCache):
    """transformers' cache with keys and values rounded to bf16 before attention sees them."""

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(key_states.bfloat16().float(), value_states.bfloat16().float(), *args, **kwargs)


def test_bf16_pages_equal_transformers_with_a_bf16_cache(saved):
    folder, model = saved("llama")
    ids = token_ids()
    with torch.inference_mode():
        expected = model(ids[None], past_key_values=RoundingCache()).logits[0]
    for chunk_size in (1000, 37):
        session = load(folder, kv_format="bf16", chunk_size=chunk_size, device_share=0.5).new_session()
        session.prefill(ids[:100])
        # bf16 rounding near ties may fall either way in two implementations, and moves a logit by about 1e-4
        assert rms_ratio(session.score(ids[100:]), expected[99:-1]) < 5e-4


@pytest.mark.parametrize("kv", ["fp32", "bf16"])
def test_chunk_size_does_not_matter(saved, kv):
    folder, _ = saved("qwen3")
    rows = []
    for chunk_size in (1, 7, 64, 1000):
        session = load(folder, kv_format=kv, chunk_size=chunk_size, head_map=mixed_map()).new_session()
        session.prefill(token_ids()[:140])
        rows.append(session.score(token_ids()[140:]))
    for other in rows[:-1]:
        assert rms_ratio(other, rows[-1]) < (2e-5 if kv == "fp32" else 2e-3)


@pytest.mark.parametrize("kv", ["int4", "k5v3"])
def test_quantized_chunks_differ_by_the_quantization_only(saved, kv):
    folder, _ = saved("llama")
    exact = load(folder, kv_format="fp32").new_session()
    exact.prefill(token_ids()[:140])
    expected = exact.score(token_ids()[140:])
    for chunk_size in (1, 7, 64, 1000):
        session = load(folder, kv_format=kv, chunk_size=chunk_size).new_session()
        session.prefill(token_ids()[:140])
        assert 1e-4 < rms_ratio(session.score(token_ids()[140:]), expected) < 0.2


@pytest.mark.parametrize("weights", ["bf16", "int8", "nf4", "int4"])
def test_weight_formats_run_and_stay_near(saved, weights):
    folder, _ = saved("llama")
    reference = load(folder).new_session().prefill(token_ids())
    runtime = load(folder, weight_format=weights)
    assert (
        rms_ratio(runtime.new_session().prefill(token_ids()), reference)
        < {"bf16": 0.1, "int8": 0.1, "nf4": 0.6, "int4": 0.6}[weights]
    )


@pytest.mark.parametrize("kv", ["int4", "k5v3"])
def test_plain_torch_gives_the_same_as_the_compiled_kernels(saved, kv):
    folder, _ = saved("llama")
    outs = []
    for compiled in (True, False):
        runtime = load(folder, kv_format=kv, compiled_kernels=compiled, head_map=mixed_map(), device_share=0.5)
        session = runtime.new_session()
        session.prefill(token_ids())
        outs.append((list(session.generate(20, eos=False)), session.logits))
    assert outs[0][0] == outs[1][0]
    assert rms_ratio(outs[0][1], outs[1][1]) < 1e-3


def test_compiled_kernels_are_used_where_they_can_be(saved, monkeypatch, tmp_path):
    folder, _ = saved("llama")
    assert load(folder).parts.cpu_kernels is not None
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("LONGRUN_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    runtime = load(folder, kv_format="int4")
    assert any("no C++ compiler" in notice for notice in runtime.notices)
    assert rms_ratio(runtime.new_session().prefill(token_ids()), load(folder).new_session().prefill(token_ids())) < 0.2


def test_greedy_continuation_is_that_of_transformers(saved):
    folder, model = saved("llama")
    ids = token_ids(60)
    with torch.inference_mode():
        expected = model.generate(ids[None], max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    session = load(folder).new_session()
    session.prefill(ids)
    assert list(session.generate(30, eos=False)) == expected[0, 60:].tolist()
    assert session.token_ids == expected[0].tolist()
    assert session.seq_len == session.num_tokens - 1  # the last token was sampled and waits


def test_eos_is_yielded_and_ends(saved):
    folder, _ = saved("llama")
    runtime = load(folder)
    session = runtime.new_session()
    session.prefill(token_ids(60))
    tokens = list(session.generate(20, eos=False))
    runtime.eos_token_ids = frozenset([tokens[4]])
    session = runtime.new_session()
    session.prefill(token_ids(60))
    got = list(session.generate(20))
    assert got == tokens[: tokens.index(tokens[4]) + 1]


def test_text_is_encoded_and_streamed(planted):
    runtime = longrun.load(planted.path, ctx=1000)
    first = runtime.new_session()
    ids = runtime.encode("The magic number of amber is: 1 2 3. What is the magic number of amber? It is:")
    assert ids == runtime.tokenizer(runtime.tokenizer.decode(ids))["input_ids"] and runtime.encode("</s>") != [2]
    first.prefill(ids)
    mark = first.mark()
    whole = "".join(runtime.stream(first, max_new_tokens=12))
    assert first.token_ids[len(ids) :] and runtime.tokenizer.decode(first.token_ids[len(ids) :]).startswith(whole[:3])
    first.rewind(mark)
    assert "".join(runtime.stream(first, 12, stop=[whole[2:4]])) == whole[:2]
    first.rewind(mark)
    assert "".join(runtime.stream(first, 12, temperature=50.0, min_p=1.0)) == whole, "only the likeliest token is left"
    with pytest.raises(InputError, match="stop string is empty"):
        runtime.stream(first, stop=[""])
    for stop in ([5], [None], 5, None):
        with pytest.raises(InputError, match=r"stop.*is no (text|list of texts)"):
            runtime.stream(first, stop=stop)
    for session in (None, "first", longrun.load(planted.path, ctx=1000).new_session()):
        with pytest.raises(InputError, match="is no session of this runtime"):
            runtime.stream(session)
    with pytest.raises(InputError, match="text is not UTF-8"):
        runtime.encode("a\ud800b")
    with pytest.raises(InputError, match="text 5 is not a str"):
        runtime.encode(5)
    runtime.tokenizer = None
    with pytest.raises(InputError, match="has no tokenizer"):
        runtime.stream(first)


def test_two_sessions_draw_differently_unless_they_are_told_a_seed(saved):
    folder, _ = saved("llama")
    runtime = load(folder)
    drawn = []
    for seed in (None, None, 3, 3):
        session = runtime.new_session()
        session.prefill(token_ids(8))
        drawn.append(list(session.generate(16, temperature=100.0, seed=seed, eos=False)))
    assert drawn[0] != drawn[1] and drawn[2] == drawn[3] != drawn[0]


def test_sampling_goes_on_where_it_stood(saved):
    folder, _ = saved("llama")
    session = load(folder).new_session()
    session.prefill(token_ids(50))
    mark = session.mark()
    whole = list(session.generate(20, temperature=1.0, seed=5, eos=False))
    session.rewind(mark)
    first = list(session.generate(8, temperature=1.0, seed=5, eos=False))
    assert first + list(session.generate(12, temperature=1.0, eos=False)) == whole
    session.rewind(mark)
    assert list(session.generate(20, temperature=1.0, seed=6, eos=False)) != whole


@pytest.mark.parametrize("kv", ["int4", "fp32"])
@pytest.mark.parametrize("device_share", [1.0, 0.3])
def test_rewind_is_as_if_nothing_had_come(saved, kv, device_share):
    folder, _ = saved("llama")
    runtime = load(folder, kv_format=kv, head_map=mixed_map(), device_share=device_share, ctx=600)
    session = runtime.new_session()
    session.prefill(token_ids(130))
    mark = session.mark()
    first = list(session.generate(20, eos=False))
    session.rewind(mark)
    session.prefill(token_ids(400, seed=9))  # runs past pages, ring and spill
    session.rewind(mark)
    session.cache.check()
    assert session.token_ids == token_ids(130).tolist()
    assert list(session.generate(20, eos=False)) == first


def test_full_context_ends_clearly_and_intact(saved):
    folder, _ = saved("llama")
    session = load(folder, ctx=80, kv_format="int4").new_session()
    session.prefill(token_ids(70))
    tokens = []
    with pytest.raises(ContextFullError, match="capacity of 80"):
        tokens.extend(iter(session.generate(50, eos=False)))
    assert session.seq_len == 80
    session.cache.check()
    with pytest.raises(ContextFullError, match="70 more tokens"):
        load(folder, ctx=60).new_session().prefill(token_ids(70))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda s: s.prefill([]), "no tokens"),
        (lambda s: s.prefill([1, 97]), "97 is outside"),
        (lambda s: s.prefill([-1]), "-1 is outside"),
        (lambda s: s.generate(5), "nothing to continue"),
        (lambda s: s.score([1]), "nothing precedes"),
        (lambda s: (s.prefill([1]), s.generate(0)), "max_new_tokens 0"),
        (lambda s: (s.prefill([1]), s.generate(1, top_p=7.0)), "top_p"),
    ],
)
def test_bad_calls(saved, call, match):
    session = load(saved("llama")[0]).new_session()
    with pytest.raises(InputError, match=match):
        call(session)


def test_bad_loads(saved):
    folder, _ = saved("llama")
    for options, match in (
        ({"device": "tpu"}, "tpu"),
        ({"device_share": 1.5}, "1.5"),
        ({"ctx": "3.3X"}, "3.3X"),
        ({"retrieval_ratio": 0.5}, "needs a head map"),
    ):
        with pytest.raises(InputError, match=match):
            load(folder, **options)


def test_a_context_beyond_the_machine_is_refused_before_loading(saved, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": 10**6})())
    with pytest.raises(PlanError, match=r"1\.00 MB are free"):
        load(saved("llama")[0])


def test_sessions_share_the_budget(saved):
    folder, _ = saved("llama")
    budget = longrun.Budget.parse('[memory]\ngpu = "560 MB"', "small")
    runtime = load(folder, budget=budget, ctx=None)
    first = runtime.new_session(50_000)
    with pytest.raises(PlanError, match="short"):
        runtime.new_session(50_000)
    del first
    assert runtime.new_session(50_000).capacity == 50_000


def test_beyond_the_trained_window_is_told(saved):
    runtime = load(saved("llama")[0])
    assert any(str(T + 60) in notice and "64" in notice for notice in runtime.notices)


def test_sigint_waits_for_the_chunk(saved):
    """A signal during prefill: the chunk is finished, KeyboardInterrupt comes out, and the session can be continued."""
    folder, _ = saved("llama")
    session = load(folder, chunk_size=20).new_session()
    ids = token_ids()

    def interrupt(done, total):
        if done == 60:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        session.prefill(ids, progress=interrupt)
    assert session.seq_len == 60
    assert session.token_ids == ids[:60].tolist()
    session.cache.check()
    logits = session.prefill(ids[60:])
    assert rms_ratio(logits, load(folder).new_session().prefill(ids)) < 1e-5


def test_works_outside_the_main_thread(saved):
    folder, _ = saved("llama")
    out = []
    worker = threading.Thread(target=lambda: out.append(load(folder).new_session().prefill(token_ids())))
    worker.start()
    worker.join()
    assert torch.equal(out[0], load(folder).new_session().prefill(token_ids()))


def test_a_step_that_broke_off_is_not_trusted(saved, monkeypatch):
    from longrun.errors import SessionError

    session = load(saved("llama")[0], kv_format="int4").new_session()
    session.prefill(token_ids(100))
    mark = session.mark()
    expected = session.prefill(token_ids(30, seed=4)).clone()
    session.rewind(mark)
    append = session.cache.append

    def broken(layer_idx, *rest):
        if layer_idx == 1:
            raise RuntimeError("out of memory")
        append(layer_idx, *rest)

    monkeypatch.setattr(session.cache, "append", broken)
    with pytest.raises(PlanError, match="memory ran out in the middle of a step"):
        session.prefill(token_ids(30, seed=4))
    monkeypatch.undo()
    with pytest.raises(SessionError, match="middle of a step"):
        session.prefill(token_ids(30, seed=4))
    session.rewind(mark)  # a whole state again
    assert torch.equal(session.prefill(token_ids(30, seed=4)), expected)


def test_how_much_of_the_cache_is_filled(saved):
    """By hand: what keys and values of the tokens in the cache take; all of it was allocated at the start."""
    runtime = load(saved("llama")[0], kv_format="fp32", ctx=500)
    session = runtime.new_session()
    spec = session.plan.cache
    assert spec.filled_bytes(session.seq_len) == 0
    session.prefill(token_ids(T))
    config = runtime.config
    exact = config.num_layers * config.num_kv_heads * 2 * config.head_dim * 4
    assert spec.filled_bytes(session.seq_len) == T * exact < session.cache_bytes
    assert T * exact < spec.filled_bytes(500) <= spec.total_bytes
