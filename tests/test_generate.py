"""Decoding: which token is chosen, and what the cache holds afterwards."""

from __future__ import annotations

import numpy as np
import pytest
from models import CONFIGS, model, tokens

from nanokv.errors import ContextFullError, EmptyPromptError, NanokvError, TokenError
from nanokv.generate import PCG32, generate, greedy, sample

# The first numbers of the generator's reference demo, pcg32_srandom(42, 54).
PCG32_DEMO = [0xA15C02B7, 0x7B47F409, 0xBA1D3330, 0x83D2F293, 0xBFA4784B, 0xCBED606E]


def test_the_random_generator_is_pcg32() -> None:
    random = PCG32(42, 54)
    assert [random.next() for _ in range(6)] == PCG32_DEMO


def test_seed_zero_is_a_seed_like_any_other() -> None:
    random = PCG32(0)
    assert len({random.next() for _ in range(100)}) == 100


def test_of_equal_logits_the_lowest_id_is_the_greedy_one() -> None:
    assert greedy(np.array([1.0, 3.0, 3.0, 2.0], np.float32)) == 1


def test_sampling_follows_the_probabilities() -> None:
    logits, random = np.log(np.array([0.5, 0.3, 0.2], np.float32)), PCG32(1)
    drawn = np.bincount([sample(logits, random) for _ in range(6000)], minlength=3) / 6000
    assert np.abs(drawn - [0.5, 0.3, 0.2]).max() < 0.02


def test_temperature_sharpens() -> None:
    logits, random = np.array([1.0, 2.0, 0.0], np.float32), PCG32(1)
    assert {sample(logits, random, temperature=0.01) for _ in range(100)} == {1}


def test_top_k_keeps_the_k_likeliest_and_of_equal_ones_the_lower_id() -> None:
    logits, random = np.array([0.0, 2.0, 1.0, 1.0], np.float32), PCG32(1)
    assert {sample(logits, random, top_k=2) for _ in range(300)} == {1, 2}
    assert {sample(logits, random, top_k=99) for _ in range(300)} == {0, 1, 2, 3}


def test_top_p_keeps_the_fewest_tokens_that_reach_p() -> None:
    """A public sampler compared the cumulative probability before it had sorted."""
    logits, random = np.log(np.array([0.1, 0.25, 0.5, 0.15], np.float64)), PCG32(1)
    assert {sample(logits, random, top_p=0.5) for _ in range(300)} == {2}
    assert {sample(logits, random, top_p=0.6) for _ in range(300)} == {1, 2}
    assert {sample(logits, random, top_p=0.75) for _ in range(300)} == {1, 2}
    assert {sample(logits, random, top_p=1.0) for _ in range(900)} == {0, 1, 2, 3}


def test_the_same_seed_gives_the_same_tokens_and_another_gives_others() -> None:
    small = model(CONFIGS["llama"])
    first, again, other = (list(generate(small, [1, 2], max_new_tokens=20, temperature=1.0, seed=s)) for s in (5, 5, 6))
    assert first == again != other


def test_each_token_is_in_the_cache_before_it_is_yielded_so_that_generation_can_go_on() -> None:
    small = model(CONFIGS["llama"])
    whole = list(generate(small, [1, 2, 3], max_new_tokens=12))
    cache = small.new_cache()
    first = []
    for token in generate(small, [1, 2, 3], cache=cache, max_new_tokens=5):
        first.append(token)
        assert cache.tokens[-1] == token
    rest = list(generate(small, cache=cache, max_new_tokens=7))
    assert first + rest == whole and cache.tokens.tolist() == [1, 2, 3, *whole]


def test_tokens_that_go_on_from_the_cache_are_processed_first() -> None:
    small = model(CONFIGS["llama"])
    cache = small.new_cache()
    small.forward([1, 2], cache)
    assert list(generate(small, [1, 2, 3], cache=cache, max_new_tokens=4)) == list(generate(small, [1, 2, 3], max_new_tokens=4))


def test_tokens_that_do_not_begin_with_the_cache_are_an_error() -> None:
    small = model(CONFIGS["llama"])
    cache = small.new_cache()
    small.forward([1, 2], cache)
    for wrong in ([2, 2, 3], [1]):
        with pytest.raises(TokenError, match="the cache holds 2 tokens"):
            generate(small, wrong, cache=cache)
    assert cache.length == 2


def test_a_stop_id_ends_the_text_and_is_not_yielded() -> None:
    small = model(CONFIGS["llama"])
    whole = list(generate(small, [1, 2, 3], max_new_tokens=12))
    stop = whole[4]
    assert list(generate(small, [1, 2, 3], max_new_tokens=12, stop={stop})) == whole[: whole.index(stop)]


def test_nothing_to_go_on_from_is_an_error_at_once() -> None:
    small = model(CONFIGS["llama"])
    for empty in (None, []):
        with pytest.raises(EmptyPromptError):
            generate(small, empty)


def test_a_full_context_is_an_error_and_what_was_written_stays() -> None:
    small = model(CONFIGS["llama"])
    cache = small.new_cache()
    ids = tokens(CONFIGS["llama"], 198)
    written = []
    with pytest.raises(ContextFullError):
        written.extend(generate(small, ids, cache=cache, max_new_tokens=9))
    assert len(written) == 2 and cache.tokens.tolist() == [*ids, *written]


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.5}, {"seed": -1},
            {"max_new_tokens": -1}], ids=str)  # fmt: skip
def test_a_bad_setting_is_an_error_at_once(bad: dict[str, float]) -> None:
    with pytest.raises(NanokvError, match=next(iter(bad))):
        generate(model(CONFIGS["llama"]), [1], **bad)
