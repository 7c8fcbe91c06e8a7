"""DecoderLM alone: windows, padding, cache, generation. Its agreement with transformers is in test_hf.py."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from natten_layers.modules.generation import Recorded, sample
from natten_layers.modules.llm import DecoderLM, DecoderLMConfig

BASE = DecoderLMConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    windows=(5, None, 3),
    max_positions=4096,
)
VARIANTS = {
    "mixed": BASE,
    "registers and sinks": dataclasses.replace(BASE, num_registers=2, sink="learned", qk_norm=True),
    "zero attention": dataclasses.replace(BASE, sink="zero", windows=(1, 4, 2)),
    "gemma": dataclasses.replace(
        BASE,
        zero_centered_norm=True,
        post_norms=True,
        qk_norm=True,
        activation="gelu_tanh",
        embedding_scale=24**0.5,
        tie_embeddings=True,
        attention_scale=0.2,
        windowed_rope={"rope_type": "default", "rope_theta": 100.0},
    ),
}


def make(config: DecoderLMConfig, dtype: torch.dtype = torch.float64) -> DecoderLM:
    """A model in which all parameters are random and large enough to affect the output."""
    torch.manual_seed(0)
    model = DecoderLM(config, dtype=dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=VARIANTS.values(), ids=list(VARIANTS))
def model(request: pytest.FixtureRequest) -> DecoderLM:
    return make(request.param)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_a_window_bounds_what_a_token_depends_on() -> None:
    # Two layers with windows of 3 and 2 see 2 + 1 tokens back.
    model = make(dataclasses.replace(BASE, num_layers=2, windows=(3, 2), num_registers=1))
    ids = tokens(1, 12)
    changed = ids.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 61
    differs = (model(ids) != model(changed)).any(-1)[0]
    assert differs.tolist() == [4 <= i <= 7 for i in range(12)]


def test_registers_and_sinks_take_part() -> None:
    model = make(VARIANTS["registers and sinks"])
    before = model(tokens(1, 6))
    for name in ("registers", "sinks"):
        other = copy.deepcopy(model)
        with torch.no_grad():
            getattr(other.model.layers[0].self_attn, name).add_(1.0)
        assert not torch.allclose(other(tokens(1, 6)), before)


@pytest.mark.parametrize(
    "mask", [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 1, 1, 1, 1, 0]]
)
def test_padding_changes_nothing(model: DecoderLM, mask: list[int]) -> None:
    ids, text = tokens(2, 9), torch.tensor(mask, dtype=torch.bool)
    attention_mask = torch.stack((text, torch.ones_like(text)))
    got = model(ids, attention_mask=attention_mask)
    close(got[0, text], model(ids[:1, text])[0])
    close(got[1], model(ids[1:])[0])


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[20], [7, 7, 6], [1] * 20, [2, 13, 1, 1, 3]])
def test_cached_equals_uncached(model: DecoderLM, chunks: list[int]) -> None:
    ids = tokens(2, 20)
    cache = model.make_cache(2)
    got = torch.cat([model(part, cache=cache) for part in ids.split(chunks, 1)], 1)
    close(got, model(ids))


def test_a_cache_counts_the_tokens_of_each_text() -> None:
    """Padding of one text is not added to the tokens of another."""
    config = DecoderLMConfig(
        vocab_size=31, hidden_size=24, intermediate_size=20, num_layers=1, num_heads=2, max_positions=8
    )
    torch.manual_seed(0)
    lm = DecoderLM(config).eval()
    ids, cache = torch.randint(0, 31, (2, 5)), lm.make_cache(2)
    first, second = torch.tensor([[1] * 5, [0] * 5]), torch.tensor([[0] * 5, [1] * 5])
    with torch.no_grad():
        lm(ids, attention_mask=first, cache=cache)
        logits = lm(ids, attention_mask=second, cache=cache)
        torch.testing.assert_close(logits[1], lm(ids)[1])
        with pytest.raises(ValueError, match="a text of 10 tokens"):
            lm(ids, attention_mask=first, cache=cache)


@torch.no_grad()
def test_cached_padding_equals_the_text_alone(model: DecoderLM) -> None:
    """Padding on both sides of both chunks, then tokens one at a time; rows have different lengths."""
    first, second = tokens(2, 8), tokens(2, 7, seed=1)
    first_mask = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0]])
    second_mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 0, 0]])
    cache = model.make_cache(2)
    parts = [
        model(first, attention_mask=first_mask, cache=cache),
        model(second, attention_mask=second_mask, cache=cache),
    ]
    last = tokens(2, 3, seed=2)
    parts += [model(last[:, i : i + 1], cache=cache) for i in range(3)]
    mask = torch.cat((first_mask, second_mask, torch.ones(2, 3, dtype=torch.int64)), 1).bool()
    ids, got = torch.cat((first, second, last), 1), torch.cat(parts, 1)
    for b in range(2):
        close(got[b, mask[b]], model(ids[b : b + 1, mask[b]])[0])
    assert cache.lengths.tolist() == mask.sum(1).tolist()


@torch.no_grad()
def test_a_row_or_a_call_may_be_all_padding(model: DecoderLM) -> None:
    cache, ids = model.make_cache(2), tokens(2, 4)
    model(ids, attention_mask=torch.zeros(2, 4), cache=cache)
    model(ids, attention_mask=torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]]), cache=cache)
    got = model(ids, cache=cache)
    close(got[0], model(ids[:1])[0])
    close(got[1], model(torch.cat((ids[1:], ids[1:]), 1))[0, 4:])


@torch.no_grad()
def test_long_text_in_constant_memory() -> None:
    config = dataclasses.replace(
        BASE, num_layers=2, windows=(16, 9), num_registers=2, hidden_size=16, max_positions=65536
    )
    model = make(config, torch.float32)
    ids = tokens(1, 4096)
    cache = model.make_cache(1)
    sizes, got = [], []
    for part in ids.split(256, 1):
        got.append(model(part, cache=cache))
        sizes.append(cache.nbytes())
    assert len(set(sizes)) == 1
    # window + 1 slots of keys, values (2 heads of 8 in fp32) and a position
    assert sizes[0] == (17 + 10) * (2 * 2 * 8 * 4 + 8)
    torch.testing.assert_close(torch.cat(got, 1), model(ids), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_full_layers_grow_or_reserve() -> None:
    model = make(BASE)
    grown, reserved = model.make_cache(1), model.make_cache(1, max_length=40)
    for part in tokens(1, 40).split(1, 1):
        model(part, cache=grown)
        model(part, cache=reserved)
    assert reserved.layers[1].keys.shape[1] == 41
    assert grown.layers[1].keys.shape[1] <= 81
    assert [grown.layers[i].keys.shape[1] for i in (0, 2)] == [6, 4]


@torch.no_grad()
def test_a_cache_has_no_more_slots_than_the_model_has_positions() -> None:
    model = make(dataclasses.replace(BASE, max_positions=40))
    cache = model.make_cache(1, max_length=10**30)
    model(tokens(1, 3), cache=cache)
    assert cache.layers[1].keys.shape[1] == 41
    model(tokens(1, 37), cache=cache)
    assert cache.layers[1].keys.shape[1] == 41


@torch.no_grad()
@pytest.mark.parametrize("expected", [41, 10**30])
def test_a_text_of_more_tokens_than_positions_is_refused_when_it_is_expected(expected: int) -> None:
    """Not when it has grown so long: RoPE that it stretches would have had its frequencies from the beginning."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16}
    model = make(dataclasses.replace(BASE, max_positions=40, rope=rope))
    cache = model.make_cache(1)
    cache.expect(expected)
    with pytest.raises(ValueError, match=f"a text of {expected} tokens is longer than the model's max_positions=40"):
        model(tokens(1, 3), cache=cache)
    cache.expect(40)  # nothing was read
    model(tokens(1, 3), cache=cache)


def test_gradients_reach_every_parameter(model: DecoderLM) -> None:
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[0, :2] = 0
    model(tokens(2, 7), attention_mask=mask)[mask.bool()].square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@torch.no_grad()
def test_greedy_generation_is_argmax_of_forward(model: DecoderLM) -> None:
    ids = tokens(2, 9)
    expected = ids
    for _ in range(12):
        expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), 1)
    assert torch.equal(model.generate(ids, 12), expected)
    assert torch.equal(model.generate(ids, 12, prefill_chunk=4), expected)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("chunk", [3, 100])
def test_padded_prompts_generate_as_alone(model: DecoderLM, left: bool, chunk: int) -> None:
    ids = tokens(2, 10)
    mask = torch.ones_like(ids)
    mask[0, slice(0, 6) if left else slice(4, 10)] = 0
    got = model.generate(ids, 8, attention_mask=mask, prefill_chunk=chunk)
    assert torch.equal(got[:, :10], ids)
    assert torch.equal(got[0, 10:], model.generate(ids[:1, mask[0].bool()], 8)[0, 4:])
    assert torch.equal(got[1, 10:], model.generate(ids[1:], 8)[0, 10:])


def test_generation_stops_pads_and_streams() -> None:
    model = make(dataclasses.replace(BASE, pad_token_id=60))
    plain = model.generate(tokens(2, 5), 20)
    stop = int(plain[0, 7])
    seen: list[Tensor] = []
    got = model.generate(tokens(2, 5), 20, stop_tokens=[stop], callback=seen.append)
    assert torch.equal(torch.stack(seen, 1), got[:, 5:])
    for row, full in zip(got[:, 5:].tolist(), plain[:, 5:].tolist(), strict=True):
        end = full.index(stop) + 1 if stop in full else len(full)
        assert row == (full[:end] + [60] * len(full))[: len(row)]
    for stops in (int(plain[0, 5]), [int(plain[0, 5])]):
        assert model.generate(tokens(1, 5), 20, stop_tokens=stops).shape == (1, 6)


def test_sampling_is_seeded() -> None:
    model = make(BASE, torch.float32)
    draws = [model.generate(tokens(2, 4), 16, temperature=3.0, generator=seed) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(model.generate(tokens(2, 4), 16, temperature=3.0, generator=generator), draws[0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_ends_where_the_model_gives_nan(temperature: float) -> None:
    """Not with the index that argmax finds for NaN."""
    model = make(BASE, torch.float32)
    torch.nn.init.constant_(next(model.parameters()), math.nan)
    with pytest.raises(RuntimeError, match="logits after the prompt are not finite"):
        model.generate(tokens(1, 4), 2, temperature=temperature)


def test_sample_follows_the_distribution() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().expand(20000, 4)

    def frequencies(**options: float) -> Tensor:
        drawn = sample(logits, generator=torch.Generator().manual_seed(0), **options)  # pyright: ignore
        return drawn.bincount(minlength=4) / 20000

    def check(got: Tensor, expected: list[float]) -> None:
        assert (got - torch.tensor(expected)).abs().max() < 0.015  # four standard deviations
        assert ((got == 0) == (torch.tensor(expected) == 0)).all()

    check(frequencies(), [0.1, 0.4, 0.2, 0.3])
    check(frequencies(top_k=2), [0, 4 / 7, 0, 3 / 7])
    check(frequencies(top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9])
    for top_p in (0.01, 5e-324):  # the last one is zero in fp32
        check(frequencies(top_p=top_p), [0, 1, 0, 0])
    check(frequencies(temperature=0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30])
    for temperature in (0, 1e-3, 1e-45, 5e-324):  # the last one is zero in fp32
        check(frequencies(temperature=temperature), [0, 1, 0, 0])


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": "1"},
        {"top_k": 1.5},
        {"temperature": math.inf},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
    ],
)
def test_sample_refuses(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        sample(torch.zeros(1, 3), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"top_k": 0},
        {"top_p": 1.5},
        {"generator": 1.5},
        {"generator": "x"},
        {"generator": True},
        {"generator": 2**70},
        {"stop_tokens": [1.5]},
        {"stop_tokens": 1.0},
        {"stop_tokens": "a"},
        {"stop_tokens": -1},
        {"callback": 3},
    ],
    ids=str,
)
def test_generation_refuses_before_it_reads(options: dict[str, Any]) -> None:
    model = make(BASE)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the prompt was read"))
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must be "):
        model.generate(tokens(1, 4), 2, **options)


def test_generation_takes_numbers_of_numpy_and_tensors() -> None:
    model, ids = make(BASE), tokens(2, 4)
    found = model.generate(ids, 5, temperature=1.0, generator=np.int64(3), stop_tokens=torch.tensor([60]))  # type: ignore[arg-type]
    assert torch.equal(found, model.generate(ids, 5, temperature=1.0, generator=3, stop_tokens=60))


def test_generation_needs_a_padding_token_of_the_vocabulary() -> None:
    model = make(dataclasses.replace(BASE, pad_token_id=61, eos_token_id=0))
    assert model.generate(tokens(1, 4), 2).shape[0] == 1
    assert model.generate(tokens(2, 4), 2, stop_tokens=[]).shape == (2, 6)
    with pytest.raises(ValueError, match="pad_token_id=61, which is no token of vocab_size=61"):
        model.generate(tokens(2, 4), 2)


def test_deepcopy_pickle_and_state_dict() -> None:
    model = make(VARIANTS["registers and sinks"])
    ids = tokens(1, 5)
    other = make(dataclasses.replace(model.config))
    other.load_state_dict(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
        assert torch.equal(twin(ids), model(ids))


def test_a_mask_compiles_into_one_graph_and_exports() -> None:
    config = DecoderLMConfig(
        vocab_size=31, hidden_size=24, intermediate_size=20, num_layers=2, num_heads=2, windows=(3, None)
    )
    torch.manual_seed(0)
    lm = DecoderLM(config).eval()
    ids, mask = torch.randint(0, 31, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    expected = lm(ids, attention_mask=mask)
    compiled = torch.compile(lm, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, attention_mask=mask), expected)
    for keywords, wanted in (({"attention_mask": mask}, expected), ({}, lm(ids))):
        exported = torch.export.export(lm, (ids,), keywords).module()
        torch.testing.assert_close(exported(ids, **keywords), wanted)


def test_compiles_without_a_graph_break() -> None:
    model = make(VARIANTS["registers and sinks"])
    compiled, ids = torch.compile(model, backend="eager", fullgraph=True), tokens(2, 6)
    close(compiled(ids), model(ids))


def test_tied_models_hold_one_matrix() -> None:
    tied = make(dataclasses.replace(BASE, tie_embeddings=True))
    assert "lm_head.weight" not in tied.state_dict()


@pytest.mark.gpu
def test_on_a_gpu(model: DecoderLM) -> None:
    """With fused attention, logits, gradients and cached generation agree with the CPU's."""
    model, ids = model.float(), tokens(2, 40)
    twin = copy.deepcopy(model).cuda()
    logits, expected = twin(ids.cuda()), model(ids)
    assert (logits.cpu() - expected).norm() < 1e-4 * expected.norm()
    for result in (logits, expected):
        result.square().mean().backward()
    for (name, theirs), ours in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert theirs.grad is not None
        assert ours.grad is not None
        assert (ours.grad.cpu() - theirs.grad).norm() < 1e-3 * theirs.grad.norm(), name
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    got = twin.generate(ids.cuda(), 20, attention_mask=mask.cuda(), prefill_chunk=16)
    assert torch.equal(got.cpu(), model.generate(ids, 20, attention_mask=mask))


def test_bad_input() -> None:
    model = make(dataclasses.replace(BASE, max_positions=8))
    with pytest.raises(ValueError, match=r"text of 9 tokens.*max_positions=8"):
        model(tokens(1, 9))
    with pytest.raises(ValueError, match=r"text of 9 tokens.*max_positions=8"):
        model.generate(tokens(1, 5), 4)
    with pytest.raises(ValueError, match="max_new_tokens must be an int of at least 1, got 0"):
        model.generate(tokens(1, 5), 0)
    with pytest.raises(ValueError, match="cuda_graph must be True or False, got 'no'"):
        model.generate(tokens(1, 5), 2, cuda_graph="no")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="row without any text"):
        model.generate(tokens(2, 3), 2, attention_mask=torch.tensor([[0, 0, 0], [1, 1, 1]]))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 3\)"):
        model(tokens(2, 3), attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="input_ids has shape"):
        model(tokens(3))
    with pytest.raises(ValueError, match=r"torch.float32"):
        model(torch.zeros(1, 3))
    for index in (
        5,
        torch.tensor([1]),
        torch.tensor(1),
        torch.tensor([1, 0], dtype=torch.int32),
        torch.ones(2, 3).long(),
    ):
        with pytest.raises(ValueError, match=r"logits_at must be a tensor \[2\], int64"):
            model(tokens(2, 3), logits_at=index)
    for batch, length, word in ((-1, None, "batch_size"), (1, 0, "max_length"), (1, -1, "max_length")):
        with pytest.raises(ValueError, match=f"{word} must be an int of at least"):
            model.make_cache(batch, max_length=length)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"cache is for 2 texts.*input_ids has 3"):
            model(tokens(3, 2), cache=model.make_cache(2))
        cache = model.make_cache(1)
        model(tokens(1, 8), cache=cache)
        with pytest.raises(ValueError, match="text of 9 tokens"):
            model(tokens(1, 1), cache=cache)
    with pytest.raises(ValueError, match="no_grad"):
        model(tokens(1, 2), cache=model.make_cache(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers must be an int of at least 1, got 0"),
        ({"hidden_size": 24.0}, "hidden_size"),
        ({"num_kv_heads": 3}, "got 4 and 3"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"hidden_size": 33, "head_dim": None}, "hidden_size 33 is not divisible by num_heads 4; give head_dim"),
        ({"windows": (3, 3)}, "windows has 2 entries for num_layers=3"),
        ({"windows": (3, 0, None)}, r"windows\[1\] must be an int of at least 1 or null, got 0"),
        ({"activation": "relu"}, "activation"),
        ({"sink": "on"}, "sink"),
        ({"num_registers": -1}, "num_registers"),
    ],
)
def test_bad_config(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **change)


def test_whole_buffers_give_the_same(model: DecoderLM) -> None:
    """Returning the empty slots too changes nothing, since they have position -1 and no token sees them."""
    ids = torch.randint(model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        caches = [model.make_cache(2, max_length=20) for _ in range(2)]
        for layer in caches[1].layers:
            layer.whole = True
        for start, stop in ((0, 4), (4, 5), (5, 6), (6, 9)):
            part, whole = (model(ids[:, start:stop], cache=cache) for cache in caches)
            close(whole, part)


@pytest.mark.gpu
def test_generation_on_a_gpu_is_recorded(model: DecoderLM) -> None:
    """The recorded step agrees with a pass over whole texts, beyond the windows and for prompts of two lengths."""
    model = copy.deepcopy(model).cuda()
    ids = torch.randint(model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(3)).cuda()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    tokens, unrecorded = (
        model.generate(ids, 40, attention_mask=mask, stop_tokens=[], cuda_graph=chosen) for chosen in (True, False)
    )
    assert torch.equal(tokens, unrecorded)
    expected = ids
    for _ in range(40):
        text = torch.cat((mask, mask.new_ones(2, expected.shape[1] - 9)), 1)
        with torch.no_grad():
            expected = torch.cat((expected, model(expected, attention_mask=text)[:, -1:].argmax(-1)), 1)
    assert torch.equal(tokens, expected)


def test_a_model_that_cannot_be_recorded_says_so(model: DecoderLM, monkeypatch: pytest.MonkeyPatch) -> None:
    class Capture:
        def __init__(self, graph: object, **_: object) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    step = Recorded(model, model.make_cache(2, max_length=9))
    token = tokens(2)
    with torch.no_grad():
        step(token)
        with pytest.raises(RuntimeError, match=r"pass cuda_graph=False: operation not permitted"):
            step(token)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope": {"rope_type": "default"}}, "rope_theta"),
        ({"rope": None}, "rope must be an object"),
        ({"rope": {"rope_type": "default", "rope_theta": 0}}, "rope_theta"),
        ({"windows": 5}, "windows"),
        ({"num_registers": 1.5}, "num_registers"),
        ({"norm_eps": -1.0}, "norm_eps"),
    ],
)
def test_options_of_other_types_are_errors(change: dict[str, Any], message: str) -> None:
    sizes: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 20, "num_layers": 1, "num_heads": 2}
    with pytest.raises(ValueError, match=message):
        DecoderLMConfig(vocab_size=31, **sizes, **change)


@pytest.mark.parametrize("pad_token", [None, -1])
def test_without_a_padding_token_the_stop_token_is_repeated(pad_token: int | None) -> None:
    """Old LLaMA configs write -1 for no padding token."""
    model = make(dataclasses.replace(BASE, pad_token_id=pad_token))
    ids = tokens(2, 5)
    plain = model.generate(ids, 8, stop_tokens=[])
    ends, goes_on = plain[:, 5:].tolist()
    stop = next(token for token in ends if token not in goes_on)
    end = ends.index(stop) + 1
    assert end < 8  # the first text must end before the last step
    got = model.generate(ids, 8, stop_tokens=[stop])[:, 5:].tolist()
    assert got == [ends[:end] + [stop] * (8 - end), goes_on]


STRETCHED = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16},
    "longrope": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
                 "factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip


@pytest.mark.parametrize("rope", STRETCHED.values(), ids=list(STRETCHED))
def test_no_texts_at_all_have_no_frequencies_to_stretch(rope: dict[str, Any]) -> None:
    model, none = make(dataclasses.replace(BASE, rope=rope)), tokens(0, 7)
    assert model.generate(none, 3).shape == (0, 10)
    with torch.no_grad():
        assert model(none, attention_mask=torch.ones(0, 7), cache=model.make_cache(0)).shape == (0, 7, 61)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_cache_whose_first_tokens_are_padding(softcap: float | None) -> None:
    model, ids = make(dataclasses.replace(BASE, attention_softcap=softcap)), tokens(2, 9)
    with torch.no_grad():
        cache = model.make_cache(2)
        model(ids[:, :4], attention_mask=torch.zeros(2, 4), cache=cache)
        found = [model(part, cache=cache) for part in ids.split((4, 1, 4), 1)]
        torch.testing.assert_close(torch.cat(found, 1), model(ids))
