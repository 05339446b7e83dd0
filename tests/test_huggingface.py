"""A run of Hugging Face transformers becomes a trace, and docs/names.md says truly what is called what.

The outputs come from tests/checkpoints, so that torch is not needed; where it is installed, models are run, too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_reference import FAMILIES, FOLDER, expected

import nanokv
from nanokv.errors import MissingExtraError, TraceError
from nanokv.trace import Recorder, Trace, huggingface, names
from nanokv.trace.explain import diff, show, why
from nanokv.trace.recompute import Operands

ROOT = Path(__file__).parent.parent
Array = np.ndarray
NEEDED = "needs pip install -e '.[huggingface]', and transformers 5, whose spelling the checkpoints' config.json has"


def transformers() -> Any:
    """transformers, or the test is skipped."""
    pytest.importorskip("torch", reason=NEEDED)
    return pytest.importorskip("transformers", minversion="5.0", reason=NEEDED)


def outputs(family: str, **without: None) -> SimpleNamespace:
    """What transformers returned for the checkpoint's prompt, with its axis of the batch."""
    want = expected(family)
    pairs = zip(want["keys"], want["values"], strict=True)
    layers = [SimpleNamespace(keys=k.transpose(1, 0, 2)[None], values=v.transpose(1, 0, 2)[None]) for k, v in pairs]
    given: dict[str, Any] = {
        "attentions": tuple(want["attentions"][:, None]),
        "hidden_states": tuple(want["hidden_states"][:, None]),
        "logits": want["logits"][None],
        "cache": SimpleNamespace(layers=layers),
    }
    return SimpleNamespace(**given | without)


def config(family: str) -> SimpleNamespace:
    """The sizes as a transformers config has them."""
    c = nanokv.load(FOLDER / family, ops="numpy").config
    common = {"vocab_size": c.vocab_size, "_name_or_path": f"tiny/{family}"}
    if family == "gpt2":
        return SimpleNamespace(n_layer=c.n_layers, n_head=c.n_heads, n_embd=c.d_model, n_inner=c.d_ff, n_positions=c.n_ctx,
                               layer_norm_epsilon=1e-5, **common)  # fmt: skip
    types = ["sliding_attention" if slides else "full_attention" for slides in c.sliding]
    return SimpleNamespace(
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim,
        hidden_size=c.d_model, intermediate_size=c.d_ff, max_position_embeddings=c.n_ctx, rms_norm_eps=c.norm_eps,
        layer_types=types, sliding_window=c.window, **common,
    )  # fmt: skip


def our_trace(family: str) -> tuple[nanokv.Transformer, Trace]:
    model, recorder = nanokv.load(FOLDER / family, ops="numpy"), Recorder(level="states")
    model.forward(expected(family)["tokens"], observer=recorder)
    return model, recorder.trace


@pytest.mark.parametrize("family", FAMILIES)
def test_with_nanokvs_model_every_number_is_there_and_right(family: str) -> None:
    model, ours = our_trace(family)
    theirs = huggingface.from_outputs(outputs(family), expected(family)["tokens"], like=model)
    found = diff(theirs, ours, tolerance=1e-4)
    assert found.equal, list(found.lines())
    assert found.sites.keys() >= {"q", "k", "scores", "pattern", "z", "attn_out", "mlp_out", "resid_post", "logits"}
    assert (
        np.abs(theirs[f"step0.layer{model.config.n_layers - 1}.resid_post"] - expected(family)["resid_post_last"]).max() < 1e-4
    )
    assert {broken.law for broken in theirs.check()} <= {"residual"}
    mid, added, post = (np.stack([theirs.state(site, layer) for layer in range(model.config.n_layers)])
                        for site in ("resid_mid", "mlp_out", "resid_post"))  # fmt: skip
    odd = mid + added != post  # where no float32 adds up to the third; all others do, to the bit
    assert odd.mean() < 0.03 and (np.abs(mid + added - post) <= np.spacing(np.maximum(np.abs(mid), np.abs(added)))).all()
    for measure in ("attention", "norm"):
        a, b = (trace.flow(model, measure=measure) for trace in (theirs, ours))
        assert a.prediction.text == b.prediction.text
        assert np.abs(a.influence.sum() - b.influence.sum()) < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_model_what_is_not_known_is_nan_and_attention_can_be_drawn(family: str, tmp_path: Path) -> None:
    trace = huggingface.from_outputs(outputs(family), expected(family)["tokens"], config=config(family))
    ours = our_trace(family)[1]
    assert trace.level == "states" and trace.model_name == f"tiny/{family}"
    for name in ("layer1.pos5", "layer1.pos5.k", "layer0.pos6.pattern", "layer1.pos9.z", "pos7.logits"):
        assert np.abs(trace[name] - ours[name]).max() < 1e-4
    for name in ("layer1.pos5.attn_out", "layer1.pos5.scores", f"layer{trace.config.n_layers}.pos5"):
        assert np.isnan(trace[name]).any()
    assert trace.flow(measure="attention", heads="merged").dot().startswith("digraph")
    assert any("reads" in line for line in show(trace))
    assert any("such as weights" in line for line in why(trace, "layer1.pos5.pattern[0,2]"))
    trace.save(tmp_path / "hf.nkv")
    assert np.array_equal(Trace.load(tmp_path / "hf.nkv").pattern(1), trace.pattern(1))


def test_attentions_alone_make_a_trace_of_level_weights() -> None:
    given = outputs("llama", hidden_states=None, cache=None, logits=None)
    trace = huggingface.from_outputs(given, expected("llama")["tokens"], config=config("llama"))
    assert trace.level == "weights" and np.isnan(trace.writes["k_norm"]).all()
    assert np.allclose(trace.pattern(1), expected("llama")["attentions"][1])
    assert trace.flow(measure="attention").dot().startswith("digraph")


def test_the_cache_may_be_of_any_version() -> None:
    want, tokens = expected("llama"), expected("llama")["tokens"]
    k, v = (list(want[name].transpose(0, 2, 1, 3)[:, None]) for name in ("keys", "values"))
    for cache in (SimpleNamespace(key_cache=k, value_cache=v), tuple(zip(k, v, strict=True))):
        given = outputs("llama", cache=None)
        given.past_key_values = cache
        trace = huggingface.from_outputs(given, tokens[None], config=config("llama"))
        assert np.array_equal(trace.keys(2), want["keys"][2]) and np.array_equal(trace.values(0), want["values"][0])


def test_what_generate_returns_is_a_trace_of_its_calls() -> None:
    """The same prompt, as if its last two tokens had been written one by one."""
    want = expected("llama")
    n = len(want["tokens"])
    cuts = [(0, n - 2), (n - 2, n - 1), (n - 1, n)]
    given = outputs("llama")
    given.attentions = tuple(tuple(want["attentions"][:, None, :, a:b, :b]) for a, b in cuts)
    given.hidden_states = tuple(tuple(want["hidden_states"][:, None, a:b]) for a, b in cuts)
    given.logits = tuple(want["logits"][None, b - 1] for _, b in cuts)
    given.sequences = np.append(want["tokens"], 5)[None]
    model, ours = our_trace("llama")
    trace = huggingface.from_outputs(given, want["tokens"][: n - 2], like=model)
    assert diff(trace, ours, tolerance=1e-4).equal
    assert trace.tokens["sampled"].tolist() == [False] * (n - 2) + [True] * 2
    assert trace.tokens["step"].tolist() == [0] * (n - 2) + [1, 2]
    assert trace.tokens["role"][-1] == "model"


def test_the_tokens_texts_keep_their_spaces() -> None:
    class Tokenizer:
        """Drops a space at the beginning, as that of Llama 2 does."""

        def decode(self, ids: list[int]) -> str:
            return "".join([" a", " b", "c"][i % 3] for i in ids).removeprefix(" ")

    trace = huggingface.from_outputs(
        outputs("llama"), expected("llama")["tokens"], config=config("llama"), tokenizer=Tokenizer()
    )
    assert trace.tokens["text"].tolist() == [[" a", " b", "c"][i % 3] for i in expected("llama")["tokens"]]


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is installed")
def test_without_torch_recording_names_the_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"nanokv\[huggingface\]"):
        huggingface.record(None, [1, 2])


def test_bad_outputs_are_clear_errors() -> None:
    tokens = expected("llama")["tokens"]
    with pytest.raises(TraceError, match="output_attentions=True"):
        huggingface.from_outputs(outputs("llama", attentions=None), tokens, config=config("llama"))
    with pytest.raises(TraceError, match="give config="):
        huggingface.from_outputs(outputs("llama"), tokens)
    with pytest.raises(TraceError, match=r"attentions have the shape \[3, 6, 13, 13\]; for this model and 5 tokens"):
        huggingface.from_outputs(outputs("llama"), tokens[:5], config=config("llama"))
    with pytest.raises(TraceError, match="attentions have the shape"):
        huggingface.from_outputs(outputs("llama"), tokens, config=config("qwen2"))
    with pytest.raises(TraceError, match="ids of one sequence"):
        huggingface.from_outputs(outputs("llama"), np.zeros((2, 13), int), config=config("llama"))
    short = outputs("gemma3")
    for layer in short.cache.layers:
        layer.keys, layer.values = layer.keys[:, :, -4:], layer.values[:, :, -4:]
    with pytest.raises(TraceError, match="dropped what left a sliding window"):
        huggingface.from_outputs(short, expected("gemma3")["tokens"], config=config("gemma3"))


def test_the_page_of_names_is_what_the_code_says() -> None:
    assert (ROOT / "docs" / "names.md").read_text() == names.INTRODUCTION + names.table()
    assert "**The last of `hidden_states` is after the final norm.**" in names.INTRODUCTION


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_returns_is_called_as_the_page_says(family: str) -> None:
    """Each name of that column is looked up in the outputs as it stands, and compared with the trace's number."""
    model, trace = our_trace(family)
    given, L, operands = vars(outputs(family)), model.config.n_layers, Operands(trace, model)
    compared = 0
    for name in names.NAMES:
        for l in range(L - 1 if name.but else L) if name.output else ():
            for p in range(trace.length):
                theirs = eval(name.output, {**given, "l": l, "p": p, "L": L})
                theirs = theirs[..., : p + 1] if name.site == "pattern" else theirs
                ours = operands.get(name.site, None if "layers" in name.site or name.site in ("ln_final", "logits") else l, p)
                assert ours.shape == theirs.shape and np.abs(ours - theirs).max() < 1e-4, (name, l, p)
                compared += 1
    assert compared > 5 * trace.length


def seen_of_modules(family: str, tokens: Array) -> dict[str, list[Array]]:
    """What goes into and comes out of every module that the page names, by site, layer by layer."""
    model = transformers().AutoModelForCausalLM.from_pretrained(FOLDER / family, attn_implementation="eager").eval()
    modules = {name.removeprefix("model."): module for name, module in model.base_model.named_modules()}
    seen: dict[str, list[Array]] = {}

    def keep(way: str, into: list[Array]) -> Any:
        def hook(module: Any, given: Any, named: Any, output: Any) -> None:
            first = (given[0] if given else named["hidden_states"]) if way == "in" else output
            into.append((first[0] if isinstance(first, tuple) else first).detach().numpy()[0])

        return hook

    for name, text in named_modules(family):
        path, _, way = text.partition(" ")
        for layer in range(model.config.num_hidden_layers if "{}" in path else 1):
            into = seen.setdefault(name.site, [])
            modules[path.format(layer)].register_forward_hook(keep(way, into), with_kwargs=True)
    import torch

    with torch.no_grad():
        model(torch.tensor(tokens)[None].long(), use_cache=False)
    return seen


def named_modules(family: str) -> Iterator[tuple[names.Name, str]]:
    for name in names.NAMES:
        text = name.gpt2 if family == "gpt2" else (name.gemma or name.llama) if family.startswith("gemma") else name.llama
        if text:
            yield name, text


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_are_called_as_the_page_says(family: str) -> None:
    seen = seen_of_modules(family, expected(family)["tokens"])
    model, trace = our_trace(family)
    operands = Operands(trace, model)
    for site, layers in seen.items():
        for l, theirs in enumerate(layers):
            layer = None if site == "ln_final" else l
            ours = np.stack([operands.get(site, layer, p).reshape(-1) for p in range(trace.length)])
            assert np.abs(ours - theirs).max() < 1e-4, (site, l)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_transformers_is_recorded_as_it_runs(family: str) -> None:
    theirs = transformers().AutoModelForCausalLM.from_pretrained(FOLDER / family).eval()
    ours, tokens, recorder = nanokv.load(FOLDER / family, ops="numpy"), expected(family)["tokens"], Recorder(level="states")
    before = theirs.config._attn_implementation
    trace = huggingface.record(theirs, tokens, max_new_tokens=3, like=ours)
    hooks = [hook for module in theirs.modules() for hook in module._forward_hooks.values()]
    assert theirs.config._attn_implementation == before and not any("nanokv" in hook.__module__ for hook in hooks)
    cache = ours.new_cache()
    ours.forward(tokens, cache, observer=recorder)
    list(nanokv.generate(ours, cache=cache, max_new_tokens=3, observer=recorder))
    found = diff(trace, recorder.trace, tolerance=1e-4)
    assert found.equal, list(found.lines())
    assert trace.check() == []
    alone = huggingface.record(theirs, tokens)
    assert np.array_equal(alone["step0.layer1.attn_out"], trace["step0.layer1.attn_out"])
    if not family.startswith("gemma3"):
        a, b = (
            alone.flow(huggingface.weights(theirs, alone), measure="norm"),
            trace.flow(ours, measure="norm", at=len(tokens) - 1),
        )
        assert np.abs(a.edges["weight"] - b.edges["weight"]).max() < 1e-4
