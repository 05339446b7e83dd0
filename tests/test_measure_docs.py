"""docs/measures.md says what docs/measures.json holds, and what docs/measures.py would measure again.
`python tests/test_measure_docs.py` writes the page's tables and commands anew."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from test_readme import CONSOLE, ROOT, prepared, run

import nanokv
from nanokv.errors import ModelNotFoundError
from nanokv.trace import Recorder

PAGE, NUMBERS = ROOT / "docs" / "measures.md", ROOT / "docs" / "measures.json"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_measures", ROOT / "docs" / "measures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


measures = script()


@pytest.fixture(scope="module")
def quick() -> dict[str, Any]:
    model = nanokv.load("induction")
    return measures.rounded(measures.everything(model, measures.QUICK, lambda line: None, n_draws=24))


@pytest.fixture(scope="module")
def smollm2() -> nanokv.Transformer:
    try:
        return nanokv.load("smollm2-135m")
    except ModelNotFoundError as missing:
        pytest.skip(str(missing))


def numbers() -> dict[str, Any]:
    return json.loads(NUMBERS.read_text())


def test_the_page_says_what_the_numbers_say() -> None:
    text = PAGE.read_text()
    assert measures.page(text, numbers()) == text
    assert set(measures.BLOCK.findall(text)) == set(measures.BLOCKS)


def test_every_command_of_the_page_prints_what_stands_there(tmp_path: Path) -> None:
    folder, blocks = prepared(tmp_path), CONSOLE.findall(PAGE.read_text())
    assert blocks
    for block in blocks:
        assert run(block, folder) == block


def test_a_quick_run_finds_that_cutting_agrees_with_itself_and_with_the_known_truth(quick: dict[str, Any]) -> None:
    for prompt in quick["prompts"]:
        for sample in measures.SAMPLES:
            for how in measures.HOWS:
                assert prompt["rank"][sample][how][how] == {"size": 1, "signed": 1, "right": 1}
        assert prompt["rank"]["random"]["value-zero"]["target"]["size"] < 0.9  # it misses one of the two edges
        for name in ("target", *measures.HOWS):
            assert prompt["ten"][name]["knockout"] == {"change": -30, "flips": True}
    for make in (make for name, make in measures.BLOCKS.items() if name != "swapped"):
        assert make(quick)


def test_the_samples_are_the_same_for_all_measures_and_hold_each_ones_strongest() -> None:
    draws, pool = np.random.default_rng(0), measures.that_can_matter((3, 2, 6, 6))
    layer, _, dst, src = np.nonzero(pool)
    assert (src < dst).all() and (dst[layer == 2] == 5).all() and pool.sum() == 2 * (2 * 15 + 5)
    score = draws.random(pool.shape)
    top = measures.strongest(score, pool, 4)
    assert [score[edge] for edge in top] == sorted(score[pool], reverse=True)[:4]
    controls = measures.beside(top, score, pool)
    assert len(controls) == 4 and not set(controls) & set(top) and all(pool[edge] for edge in controls)
    assert sorted((e[0], e[2]) for e in controls) == sorted((e[0], e[2]) for e in top)
    by_chance = measures.by_chance(draws, pool, 1000)
    assert len(set(by_chance)) == len(by_chance) == pool.sum()


def test_an_interval_over_prompts_holds_the_mean_and_narrows_with_more_of_them() -> None:
    few = np.random.default_rng(0).normal(0.5, 0.2, 10).tolist()
    middle, low, high = measures.mean([*few, None])
    assert middle == pytest.approx(np.mean(few)) and low < middle < high
    _, lower, higher = measures.mean(few * 10)
    assert higher - lower < (high - low) / 2


def test_the_induction_model_has_two_edges_which_rollout_adds_to_and_target_does_not_all_see(quick: dict[str, Any]) -> None:
    said = quick["two edges"]["said"]
    assert said["knockout"]["edges"] == said["value-zero"]["edges"] == [[0, 2, 1], [1, 5, 2]]
    assert said["target"]["edges"] == [[1, 5, 2]] and said["target"]["states"][1] == 0 and said["target"]["states"][2] == 30
    for name in ("rollout", "attention", "norm", "proximity"):
        assert said[name]["edges"] == [[0, 2, 1], [0, 5, 4], [1, 5, 2]] and said[name]["states"][4] > 0
    assert said["rollout"]["states"][4] == said["rollout"]["states"][2]
    assert numbers()["two edges"] == quick["two edges"]


def test_the_picture_swaps_with_the_names(smollm2: nanokv.Transformer) -> None:
    found, written = measures.swapped(smollm2), numbers()["swapped"]
    before, after = found["did"]
    assert [text[1:4:2] for text in found["tokens"]] == [[" Mary", " John"], [" John", " Mary"]]
    assert before[1] > 1 > -1 > before[3] and after[1] < -1 < 1 < after[3]  # who is named once; who is named twice
    assert before[9] > 1 and after[9] < -1  # the second mention of the other name
    assert sorted(np.argsort(np.abs(before))[-3:]) == sorted(np.argsort(np.abs(after))[-3:]) == [1, 3, 9]
    assert found["value"][0] > 5 and found["value"][1] < -5
    assert found["rank"] < -0.5 and found["turned"] > 0.65 * found["strong"]
    for key in ("did", "value"):
        np.testing.assert_allclose(found[key], written[key], atol=0.01)


def test_the_ten_reads_of_most_weight_are_of_the_first_token_on_every_prompt(smollm2: nanokv.Transformer) -> None:
    for prompt in measures.PROMPTS:
        recorder = Recorder(level="weights")
        smollm2.forward(smollm2.tokenizer.encode(prompt.text), observer=recorder)
        made = measures.flow(recorder.trace, measure="attention", sinks=())
        weights = measures.edge_table(made, made.edges["weight"])
        top = measures.strongest(weights, measures.that_can_matter(weights.shape), measures.TEN)
        assert {src for *_, src in top} == {0}


def test_one_prompt_measured_again_gives_the_numbers_of_the_page(
    smollm2: nanokv.Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = next(each for each in measures.PROMPTS if each.text == "The capital of France is")
    written = next(each for each in numbers()["prompts"] if each["text"] == prompt.text)
    monkeypatch.setattr(measures, "AT_RANDOM", 5)
    monkeypatch.setattr(measures, "beside", lambda edges, attention, pool: edges[:1])  # for speed: no controls
    found, *_ = measures.measured(smollm2, prompt, np.random.default_rng(measures.SEED))
    assert found["token"] == written["token"] and found["value"] == pytest.approx(written["value"], abs=1e-3)
    for name in measures.PREDICTED:
        ranks = [each["rank"]["strongest"]["value-zero"][name]["size"] for each in (found, written)]
        changes = [each["ten"][name]["value-zero"]["change"] for each in (found, written)]
        assert ranks[0] == pytest.approx(ranks[1], abs=0.05) and changes[0] == pytest.approx(changes[1], abs=0.01)


def test_what_the_page_says_of_the_numbers_is_so() -> None:
    found = numbers()
    rank = lambda name, *where: measures.mean(measures.ranks(found, name, *where))  # noqa: E731
    aside, others = measures.NO_SINKS, [name for name in measures.PREDICTED if name != "target"]
    for sample in measures.SAMPLES:
        assert all(rank("target", sample)[1] > rank(name, sample)[2] for name in others)  # the intervals are apart
        assert all(rank("target drawn", sample + aside)[0] > rank(f"{name} drawn", sample + aside)[0] for name in others)
    right = {sample: np.mean(measures.ranks(found, "target", sample, "value-zero", "right")) for sample in measures.SAMPLES}
    assert 0.65 < right["chosen"] < 0.75 and 0.55 < right["random"] < 0.65
    assert np.mean(measures.ranks(found, "knockout", "chosen", "value-zero", "right")) < 0.75
    assert rank("attention")[2] < 0 < 0.3 < rank("attention", "chosen" + aside)[0] < 0.7 < rank("attention", "random")[0]
    assert rank("rollout", "random")[0] < 0.2 and rank("rollout")[1] < 0 < rank("rollout")[2]
    assert rank("rollout", "chosen" + aside)[2] < 0
    for name in ("norm", "attention"):
        assert rank(name, "chosen" + aside)[1] > rank(f"{name} drawn", "chosen" + aside)[2]
        assert measures.flips(found, f"{name} drawn") > measures.flips(found, name)
    assert rank("proximity drawn", "chosen" + aside)[0] > rank("proximity", "chosen" + aside)[0]
    assert rank("knockout")[0] < 0.6 and rank("knockout", "chosen" + aside)[0] > 0.8
    by_knockout = {name: rank(name, "chosen", "knockout")[0] for name in (*measures.PREDICTED, "value-zero")}
    assert max(by_knockout.values()) < 0.6
    assert rank("attention", "random", "knockout")[0] == pytest.approx(rank("target", "random", "knockout")[0], abs=0.03)


def test_what_the_page_says_of_ten_edges_is_so() -> None:
    found, n = numbers(), len(numbers()["prompts"])
    flips = {name: measures.flips(found, name) for name in found["prompts"][0]["ten"]}
    change = {name: measures.mean(measures.ten(found, name)) for name in flips}
    assert change["target"][0] < 0.9 * change["value-zero"][0] and flips["target"] > 0.8 * n
    assert all(change["target"][0] < change[name][0] and flips["target"] > flips[name] for name in measures.PREDICTED[1:])
    assert flips["proximity drawn"] > flips["target drawn"] and flips["target drawn"] < flips["target"]
    assert flips["attention"] == 0 and abs(change["attention"][0]) < 0.05
    assert n / 4 < measures.flips(found, "attention", "knockout") < n / 2
    chance = [change for prompt in found["prompts"] for change in prompt["ten by chance"]["change"]]
    assert len(chance) >= 400 and abs(np.mean(chance)) < 0.05
    many = np.array(found["many draws"]["of all edges"]).reshape(-1, 12)
    assert many.min(axis=1).min() < -0.4 < -0.1 < many.min(axis=1).max()  # luck: the lowest of twelve
    assert abs(many.mean()) < 0.05


def test_what_the_page_says_of_sinks_and_of_kinds_is_so() -> None:
    found = numbers()
    parts = [prompt["from sinks"]["random"] for prompt in found["prompts"]]
    assert all(np.mean([part[how] for part in parts]) > np.mean([part["edges"] for part in parts]) for how in measures.HOWS)
    assert all(prompt["sinks"] == [0] for prompt in found["prompts"])
    for kind, better in (("recall", True), ("binding", False), ("indirect object", False)):
        some = {"prompts": [prompt for prompt in found["prompts"] if prompt["kind"] == kind]}
        rank = {name: measures.mean(measures.ranks(some, name, "chosen" + measures.NO_SINKS))[0] for name in measures.PREDICTED}
        for name in ("attention", "norm"):
            assert (rank[name] > rank["target"]) == better


def test_at_least_twenty_prompts_of_several_kinds_are_measured() -> None:
    prompts = numbers()["prompts"]
    assert len(prompts) >= 24 and len({prompt["kind"] for prompt in prompts}) >= 8
    assert [prompt["text"] for prompt in prompts] == [prompt.text for prompt in measures.PROMPTS]
    assert all(prompt["value"] > 0 for prompt in prompts)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        folder = prepared(Path(scratch))
        text = measures.page(PAGE.read_text(), numbers())
        PAGE.write_text(CONSOLE.sub(lambda match: f"```console\n{run(match[1], folder)}```", text))
