"""Every example finds what it says, in a quick run, and fails if the model is broken in the way that its claim is about."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from html import escape
from pathlib import Path
from types import ModuleType
from typing import Any

import lab
import make
import numpy as np
import pytest
import training
from test_readme import code_lines

from nanokv import KVCache, Transformer, transformer
from nanokv.cache import Ranges, Slots
from nanokv.edits import Cut, Edits, Replace
from nanokv.errors import ModelNotFoundError
from nanokv.feedback import FeedbackTransformer

FOLDER = Path(__file__).parent.parent / "examples"
NAMES = sorted(path.stem for path in FOLDER.glob("[0-9][0-9]_*.py"))
BY_HAND = ("03", "06", "10", "17", "18")  # what needs no SmolLM2 when run quickly


@pytest.fixture(autouse=True)
def the_real_model_or_none(request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params.get("name", "") if hasattr(request.node, "callspec") else ""
    if name and name[:2] not in BY_HAND:
        try:
            lab.smollm2()
        except ModelNotFoundError as missing:
            pytest.skip(str(missing))


def example(name: str) -> ModuleType:
    return make.modules()[next(each for each in NAMES if each.startswith(name))]


def quick(name: str, folder: Path) -> dict[str, Any]:
    module = example(name)
    return lab.run_example(module, Path(str(module.__file__)).stem, folder, quick=True)


@pytest.mark.parametrize("name", NAMES)
def test_it_finds_what_it_says(name: str, tmp_path: Path) -> None:
    found = quick(name, tmp_path)
    assert found["tables"] and found["checks"] and found["pictures"]
    assert any(any(map(str.isdigit, found["verdict"][side])) for side in ("anew", "builds"))
    for picture in found["pictures"]:
        assert (tmp_path / picture["file"]).read_text().lstrip().startswith(("<svg", "<?xml"))
    json.dumps(found)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_short_and_says_what_it_is_about(name: str) -> None:
    module, path = example(name), FOLDER / f"{name}.py"
    assert code_lines(path) < 100
    assert module.THREAD and module.ADDS and "\n\n" in module.__doc__
    assert all(key in make.PAPERS for key in module.PAPERS)


def test_the_page_is_made_of_the_results_that_lie_beside_it() -> None:
    found = make.results()
    assert list(found) == NAMES and not any(each["quick"] for each in found.values())
    assert make.README.read_text() == make.readme()
    assert (make.RESULTS / "verdict.svg").read_text() == make.verdict_of(found)
    for each in found.values():
        assert all((make.RESULTS / picture["file"]).is_file() for picture in each["pictures"])
        assert each["seconds"]["processor"] < 5 * 60
    assert sum(each["seconds"]["processor"] for each in found.values()) < 40 * 60


def test_one_picture_has_every_sentence_of_the_argument_and_what_speaks_for_each_side() -> None:
    found = make.results()
    words = " ".join(re.findall(r">([^<>]+)</text>", make.verdict_of(found)))
    for said, numbers in make.ARGUMENT:
        assert escape(f"“{said}”") in words and all(f" {number} " in words for number in numbers.split())
    for each in found.values():
        for side in ("anew", "builds"):
            assert escape(each["verdict"][side]) in words
    tried = {number for _, numbers in make.ARGUMENT for number in numbers.split()}
    assert tried == {name[:2] for name in NAMES}


def test_one_command_measures_all_and_draws_that_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run here with one example, beside what is known of the others."""
    for path in make.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    page = make.README.read_text()
    monkeypatch.setattr("sys.argv", ["make.py", "--quick", "--only", "06", "--out", str(tmp_path)])
    make.main()
    drawn = (tmp_path / "verdict.svg").read_text()
    assert make.results(tmp_path)["06_pyramid"]["quick"] and "Quick runs" in drawn and "no further (3 of" in drawn
    assert make.README.read_text() == page


# Broken models. Each says what it does and which check must notice.

Break = Callable[[pytest.MonkeyPatch], None]


def lets_the_future_in(patch: pytest.MonkeyPatch) -> None:
    read = KVCache.read

    def wide(self: KVCache, layer: int, start: int, n: int, *rest: Any) -> Slots:
        slots = read(self, layer, start, n, *rest)
        return Slots(layer, start, slots.kv_head, Ranges(slots.first, np.full_like(slots.stop, start + n)))

    patch.setattr(KVCache, "read", wide)


def forgets_the_past(patch: pytest.MonkeyPatch) -> None:
    """A position reads itself and the one before it."""
    read = KVCache.read

    def narrow(self: KVCache, layer: int, start: int, n: int, *rest: Any) -> Slots:
        slots = read(self, layer, start, n, *rest)
        return Slots(layer, start, slots.kv_head, Ranges(np.maximum(slots.first, slots.stop - 2), slots.stop))

    patch.setattr(KVCache, "read", narrow)


def thinks_nothing_of_its_context(patch: pytest.MonkeyPatch) -> None:
    """A model that starts anew: of a call only the last position reads others, which hold no more than their own word."""
    given = transformer.sorted_edits

    def isolating(edits: Any, config: Any, start: int, n: int) -> Edits:
        pairs = [(dst, src) for dst in range(start, start + n - 1) for src in range(1, dst)]
        own = [Cut(layer, *pair) for layer in range(config.n_layers) for pair in pairs]
        return given(list(dict.fromkeys([*edits, *own])), config, start, n)

    patch.setattr(transformer, "sorted_edits", isolating)


def reads_itself_alone(patch: pytest.MonkeyPatch) -> None:
    """A state is a function of the token and of its position's number."""
    read = KVCache.read

    def alone(self: KVCache, layer: int, start: int, n: int, *rest: Any) -> Slots:
        slots = read(self, layer, start, n, *rest)
        return Slots(layer, start, slots.kv_head, Ranges((slots.stop - 1).astype(np.int32), slots.stop))

    patch.setattr(KVCache, "read", alone)


def rewrites_an_old_slot(patch: pytest.MonkeyPatch) -> None:
    """After each call the value of position 0 in layer 0 is another one, for good."""
    commit, held = KVCache.commit, []

    def rewriting(self: KVCache, *arguments: Any) -> None:
        commit(self, *arguments)
        held.append(self.holding(0, [Replace(0, 0, v=self.values(0)[0] + 1)]))
        held[-1].__enter__()

    patch.setattr(KVCache, "commit", rewriting)


def caches_something_else(patch: pytest.MonkeyPatch) -> None:
    """A value in the cache is one unit in the last place away from the projection."""
    write = KVCache.write
    nine = np.float32(9)
    patch.setattr(KVCache, "write", lambda self, layer, start, k, v: write(self, layer, start, k, np.nextafter(v, nine)))


def reads_one_layer_higher(patch: pytest.MonkeyPatch) -> None:
    """What calls itself a standard model reads what earlier positions had come to at the top."""
    forward = Transformer.forward

    def higher(self: Transformer, *arguments: Any, **options: Any) -> Any:
        if isinstance(self, FeedbackTransformer):
            return forward(self, *arguments, **options)
        fed = FeedbackTransformer.of(self, top=True)
        return fed.forward(*arguments, **options)

    patch.setattr(Transformer, "forward", higher)


def remembers_all_depths_alike(patch: pytest.MonkeyPatch) -> None:
    """The memory is the mean of embedding and top, where the top alone is meant."""
    of = FeedbackTransformer.of
    patch.setattr(FeedbackTransformer, "of", lambda model, **options: of(model))


def adds_in_an_order_that_depends_on_the_rows(patch: pytest.MonkeyPatch) -> None:
    made = lab.random_model()
    blas = Transformer(made.config, made.weights.map(np.asarray), ops="numpy")
    patch.setattr(example("03"), "random_model", lambda: blas)


def does_not_cut(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(transformer, "sorted_edits", lambda *arguments: Edits())


def does_not_replace(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KVCache, "holding", lambda *arguments: nullcontext())


def saves_rounded_numbers(patch: pytest.MonkeyPatch) -> None:
    values = KVCache.values
    save = KVCache.save

    def rounding(self: KVCache, path: Path, model: Transformer) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(KVCache, "values", lambda cache, layer: values(cache, layer).astype(np.float16).astype(np.float32))
            save(self, path, model)

    patch.setattr(KVCache, "save", rounding)


def has_a_state_beyond_the_words(patch: pytest.MonkeyPatch) -> None:
    """The logits depend on how many calls there were."""
    forward = Transformer.forward

    def counting(self: Transformer, tokens: Any, cache: KVCache | None = None, **options: Any) -> Any:
        cache = self.new_cache() if cache is None else cache
        logits = forward(self, tokens, cache, **options) + np.float32(cache.steps)
        cache.last_logits = logits[-1]
        return logits

    patch.setattr(Transformer, "forward", counting)


def goes_back_wrongly(patch: pytest.MonkeyPatch) -> None:
    """The way back through a norm forgets that its scale depends on x."""

    def wrong(name: str, x: np.ndarray, scale: np.ndarray, dy: np.ndarray, params: Any, grads: Any) -> np.ndarray:
        grads[name] += (dy * x * scale).reshape(-1, x.shape[-1]).sum(axis=0)
        return scale * dy * params[name]

    patch.setattr(training, "norm_back", wrong)


def sends_the_gradient_back_after_all(patch: pytest.MonkeyPatch) -> None:
    back = training.read_back

    def seeing(dy: Any, kept: Any, p: str, shape: training.Shape, *rest: Any) -> Any:
        return back(dy, kept, p, replace(shape, myopic=False), *rest)

    patch.setattr(training, "read_back", seeing)


def rounds_the_cache_to_signs(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(example("12"), "rounded", lambda x, bits: np.sign(x).astype(np.float32))


BROKEN: tuple[tuple[str, Break, str], ...] = (
    ("01", caches_something_else, "a projection of its block's input, bit for bit"),
    ("02", lets_the_future_in, "outside the cone no bit of any state changes"),
    ("02", reads_one_layer_higher, "outside the cone no bit of any state changes"),
    ("03", adds_in_an_order_that_depends_on_the_rows, "no bit depends on the split"),
    ("04", rewrites_an_old_slot, "no cached entry ever changes"),
    ("05", lets_the_future_in, "one chunk and single steps leave the same cache"),
    ("06", reads_one_layer_higher, "known if and only if t <= l"),
    ("06", remembers_all_depths_alike, "feedback, 1 layer: known at every t"),
    ("07", does_not_cut, "with everything cut the prediction is another one"),
    ("08", forgets_the_past, "exactly two change the prediction"),
    ("08", does_not_cut, "exactly two change the prediction"),
    ("09", thinks_nothing_of_its_context, "taking the earlier positions' context away changes the prediction"),
    ("10", saves_rounded_numbers, "another process goes on from the file"),
    ("11", has_a_state_beyond_the_words, "without the cache, from the tokens alone"),
    ("12", rounds_the_cache_to_signs, "eight are enough"),
    ("13", rewrites_an_old_slot, "no entry of the old value changed"),
    ("14", reads_itself_alone, "in their order, they have more in common"),
    ("15", reads_itself_alone, "read better from inner states than from the word alone"),
    ("16", does_not_replace, "the value of an entry is what is said"),
    ("17", goes_back_wrongly, "gradients agree with finite differences"),
    ("18", sends_the_gradient_back_after_all, "that of its own loss alone"),
)


@pytest.mark.parametrize(("name", "broken", "noticed"), BROKEN, ids=[f"{name}-{broken.__name__}" for name, broken, _ in BROKEN])
def test_it_fails_if_the_model(name: str, broken: Break, noticed: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        broken(patch)
        with pytest.raises(lab.Refuted) as refuted:
            quick(name, tmp_path)
    assert noticed in str(refuted.value)
