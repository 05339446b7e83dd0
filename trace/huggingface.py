"""A trace made from a run of Hugging Face transformers, so that it can be shown, compared and drawn like one of nanokv's own.

    trace = huggingface.record(model, tokenizer("The capital of France is")["input_ids"], tokenizer=tokenizer)
    outputs = model(ids, output_attentions=True, output_hidden_states=True, use_cache=True)
    trace = huggingface.from_outputs(outputs, ids, config=model.config)

`record` runs the model with hooks and has every state. Outputs alone lack some: what a layer's attention and MLP added, and
the last layer's own output, for the last of `hidden_states` is AFTER the final norm. Where nanokv can load the model, too,
give that (`like=nanokv.load(folder)`), and what is missing is computed from what is there; else it is NaN. (What an MLP added
is then the difference of two states. For a few numbers no float32 adds up to the bits, and `check` names these under the
law `residual`.) docs/names.md has the names side by side. Nothing here imports torch, but for `record` and `weights`, which
are given a model that does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from nanokv.config import Config
from nanokv.errors import MissingExtraError, TraceError
from nanokv.trace.assemble import Call, Source, assemble
from nanokv.trace.store import Trace

if TYPE_CHECKING:
    from nanokv.transformer import Transformer

Array = np.ndarray
States = dict[str, list[Array]]  # of each site, layer by layer, [T, D]
CACHE = ("cache", "past_key_values")  # what transformers calls it, from 5.24 on and before


def record(
    model: Any, tokens: Any, *, tokenizer: Any = None, max_new_tokens: int = 0, like: Transformer | None = None
) -> Trace:
    """Run a causal language model of transformers over token ids, and write on greedily; the trace of it, at level `states`.

    model: an AutoModelForCausalLM; it is left as it was. tokenizer: transformers', for the tokens' texts. like: the same model
    in nanokv, for queries and scores, which transformers does not hand out; else they are NaN. TraceError for a model whose
    layers cannot be told.
    """
    try:
        import torch  # type: ignore[import-not-found]
        from transformers import DynamicCache  # type: ignore[import-not-found]
    except ImportError as error:
        raise MissingExtraError("running a model of transformers needs pip install 'nanokv[huggingface]'") from error

    ids, cache = _ids(tokens), DynamicCache()  # without a config it keeps what leaves a sliding window
    calls: list[Call] = []
    new = ids
    keyword = next(name for name in CACHE if name in signature(model.forward).parameters)
    with torch.no_grad(), _eager(model), _hooked(model) as states:
        for i in range(1 + max_new_tokens):
            given = torch.as_tensor(new, device=model.device)[None]
            outputs = model(given, **{keyword: cache}, use_cache=True, output_attentions=True)
            attentions = [_array(each)[0] for each in outputs.attentions]
            logits = _array(outputs.logits)[0]  # [T, V]
            start = 0 if i == 0 else len(ids) + i - 1
            calls.append(Call(new, start, attentions, states(), logits, sampled=i > 0))
            new = np.array([np.argmax(logits[-1])], np.int32)
    return _trace(calls, cache, model.config, tokenizer, like)


def from_outputs(
    outputs: Any, tokens: Any, *, config: Any = None, tokenizer: Any = None, like: Transformer | None = None
) -> Trace:
    """The trace of a call from what it returned: `attentions`, its cache, `hidden_states` and `logits`.

    Also of what `model.generate(..., return_dict_in_generate=True)` returned; then `tokens` are the prompt's. The level is
    `states` if hidden states and the cache are there, else `weights`. config: transformers', or give `like`: see `record`.
    TraceError if there are no attentions, or their shapes do not fit.
    """
    if config is None and like is None:
        raise TraceError("give config=model.config, or like=nanokv.load(folder), for the sizes of the model")
    if getattr(outputs, "attentions", None) is None:
        raise TraceError("the outputs hold no attentions: call the model with output_attentions=True, loaded with "
                         'attn_implementation="eager", for other implementations never form them')  # fmt: skip
    calls = list(_calls(outputs, _ids(tokens)))
    cache = next((found for name in CACHE if (found := getattr(outputs, name, None)) is not None), None)
    return _trace(calls, cache, config, tokenizer, like)


def _trace(calls: Sequence[Call], cache: Any, config: Any, tokenizer: Any, like: Transformer | None) -> Trace:
    name = getattr(config, "_name_or_path", "") or ("" if like is None else like.name)
    ids = np.concatenate([call.tokens for call in calls]).tolist()
    if tokenizer is not None:
        texts = [_text(tokenizer, token) for token in ids]
    else:
        known = None if like is None else like.tokenizer
        texts = [str(token) if known is None else known.piece(token) for token in ids]
    sizes = config_of(config) if like is None else like.config
    return assemble(calls, Source(sizes, _cache(cache), texts, like, name))


def _text(tokenizer: Any, token: int) -> str:
    """What a token adds to a text: decoded alone, some tokenizers drop the space before it."""
    once, twice = tokenizer.decode([token]), tokenizer.decode([token, token])
    return str(twice[len(once) :] if twice.startswith(once) else once)


def config_of(config: Any) -> Config:
    """The sizes of a transformers config, by whatever names it has them. What else a Config says is only roughly so."""

    def size(*names: str, otherwise: Any = None) -> Any:
        return next((value for name in names if (value := getattr(config, name, None)) is not None), otherwise)

    d_model, n_heads = size("hidden_size", "n_embd"), size("num_attention_heads", "n_head")
    n_layers, window = size("num_hidden_layers", "n_layer"), size("sliding_window")
    types = size("layer_types", otherwise=[])
    sliding = tuple(kind == "sliding_attention" for kind in types) if window else ()
    return Config(
        n_layers=n_layers, n_heads=n_heads, n_kv_heads=size("num_key_value_heads", otherwise=n_heads),
        head_dim=size("head_dim", otherwise=d_model // n_heads), d_model=d_model,
        d_ff=size("intermediate_size", "n_inner", "ffn_dim", otherwise=4 * d_model), vocab_size=config.vocab_size,
        n_ctx=size("max_position_embeddings", "n_positions", otherwise=1 << 20), window=window if any(sliding) else None,
        sliding=sliding, norm="rms" if size("rms_norm_eps") else "layer",
        norm_eps=size("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", otherwise=1e-5),
    )  # fmt: skip


def weights(model: Any, trace: Trace) -> Any:
    """What measure `norm` asks of a model, for one that nanokv cannot load: trace.flow(weights(model, trace), measure="norm").

    TraceError for a layer whose output matrix is not found, or that has a norm after its attention.
    """
    blocks = []
    for layer in _layers(model):
        attention = _child(layer, ATTENTION)
        project = _child(attention, ("o_proj", "out_proj", "c_proj", "dense"))
        if hasattr(layer, "post_feedforward_layernorm"):
            raise TraceError("this model has a norm after its attention; measure 'norm' needs it loaded with nanokv")
        matrix = _array(project.weight)
        matrix = matrix.T if type(project).__name__ == "Conv1D" else matrix  # GPT-2 keeps [inputs, outputs]
        bias = None if project.bias is None else _array(project.bias)
        blocks.append(SimpleNamespace(wo=matrix, bo=bias, post_attn_norm=None))
    return SimpleNamespace(config=trace.config, weights=SimpleNamespace(blocks=blocks), tokenizer=None)


# What transformers gives


def _array(x: Any) -> Array:
    """A torch tensor, or what NumPy takes, as float32."""
    return np.asarray(x.detach().float().cpu().numpy() if hasattr(x, "detach") else x, np.float32)


def _ids(tokens: Any) -> Array:
    ids = np.asarray(tokens.detach().cpu().numpy() if hasattr(tokens, "detach") else tokens)
    ids = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids
    if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise TraceError(f"tokens must be the ids of one sequence, [T] or [1, T]; these have shape {list(ids.shape)}")
    return ids.astype(np.int32)


def _cache(cache: Any) -> list[tuple[Array, Array]] | None:
    """Keys and values layer by layer, [S, G, hd] each, of whatever kind of cache transformers 4 or 5 hands out."""
    if cache is None:
        return None
    if hasattr(cache, "layers"):
        pairs = [(layer.keys, layer.values) for layer in cache.layers]
    elif hasattr(cache, "key_cache"):
        pairs = list(zip(cache.key_cache, cache.value_cache, strict=True))
    else:
        pairs = [(each[0], each[1]) for each in cache]
    return [(_array(k)[0].transpose(1, 0, 2), _array(v)[0].transpose(1, 0, 2)) for k, v in pairs]


def _calls(outputs: Any, tokens: Array) -> Iterator[Call]:
    """The calls behind some outputs: one, or those of generate()."""
    hidden, logits = getattr(outputs, "hidden_states", None), getattr(outputs, "logits", None)
    if not isinstance(outputs.attentions[0], tuple | list):
        last = None if logits is None else _array(logits)[0]  # [T, V]
        yield Call(tokens, 0, [_array(each)[0] for each in outputs.attentions], _states(hidden), last)
        return
    start = 0
    written = _ids(outputs.sequences)
    for i, attentions in enumerate(outputs.attentions):
        n = _array(attentions[0]).shape[2]
        last = None if logits is None else _array(logits[i])  # [1, V]
        states = _states(None if hidden is None else hidden[i])
        yield Call(written[start : start + n], start, [_array(each)[0] for each in attentions], states, last, sampled=i > 0)
        start += n


def _states(hidden: Any) -> States:
    """resid_pre of each layer, and resid_post of all but the last: the last hidden state is after the final norm."""
    if hidden is None:
        return {}
    arrays = [_array(each)[0] for each in hidden]
    return {"resid_pre": arrays[:-1], "resid_post": [*arrays[1:-1], np.full_like(arrays[-1], np.nan)]}


# Hooks

ATTENTION, MLP = ("self_attn", "attn", "attention"), ("mlp", "feed_forward", "block_sparse_moe")


def _layers(model: Any) -> Any:
    n = config_of(model.config).n_layers
    for module in model.base_model.modules():
        if type(module).__name__ == "ModuleList" and len(module) == n:
            return module
    raise TraceError(f"{type(model).__name__} has no list of {n} layers")


def _child(module: Any, names: Sequence[str]) -> Any:
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise TraceError(f"{type(module).__name__} has none of {', '.join(names)}: this kind of model is not known here")


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    """The model with attention that hands out its weights."""
    before = model.config._attn_implementation
    if before != "eager":
        if not hasattr(model, "set_attn_implementation"):  # older versions of transformers
            raise TraceError('the model hands out no attention weights: load it with attn_implementation="eager"')
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if before != "eager":
            model.set_attn_implementation(before)


@contextmanager
def _hooked(model: Any) -> Iterator[Any]:
    """A function that gives the states of the call before it, by site."""
    seen: dict[str, list[Any]] = {}
    handles = []

    def keep(site: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            seen.setdefault(site, []).append(output[0] if isinstance(output, tuple) else output)

        return hook

    def enter(module: Any, inputs: Any, named: Mapping[str, Any]) -> None:
        seen.setdefault("resid_pre", []).append(inputs[0] if inputs else named["hidden_states"])

    def take() -> States:
        states = {site: [_array(x)[0] for x in kept] for site, kept in seen.items()}
        seen.clear()
        return states

    try:
        for layer in _layers(model):
            normed = hasattr(layer, "post_feedforward_layernorm")  # Gemma, OLMo 2: a norm after each half of a block
            attention = layer.post_attention_layernorm if normed else _child(layer, ATTENTION)
            mlp = layer.post_feedforward_layernorm if normed else _child(layer, MLP)
            handles += [
                layer.register_forward_pre_hook(enter, with_kwargs=True),
                attention.register_forward_hook(keep("attn_out")),
                mlp.register_forward_hook(keep("mlp_out")),
                layer.register_forward_hook(keep("resid_post")),
            ]
        yield take
    finally:
        for handle in handles:
            handle.remove()
