"""Training in NumPy: forward and backward by hand, for the standard and the feedback transformer, and Adam.

The models are nanokv's own: RMS norm, learned positions, an MLP of silu without a gate, no biases, a head of its own.
`library_model` hands trained parameters to `nanokv.Transformer` or `FeedbackTransformer`, which compute the same logits.
Here everything is batched: B sequences, else the letters of `nanokv.config`. A matrix is [outputs, inputs]. Every
function `..._back` is the transpose of the one before it: it takes the gradient of a result and returns those of what
went in, and adds those of parameters to `grads`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanokv import BlockWeights, Config, Transformer, Weights
from nanokv.feedback import FeedbackTransformer

Array = np.ndarray
Params = dict[str, Array]
EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """What is trained: a stack of blocks, read as a standard or as a feedback model."""

    n_layers: int
    n_ctx: int
    n_tokens: int
    d_model: int = 32
    n_heads: int = 2
    d_ff: int = 64
    feedback: bool = False
    myopic: bool = False  # no gradient flows from a position's loss into the states of earlier ones (Wu et al. 2024)


def parameters(shape: Shape, seed: int, dtype: type = np.float32) -> Params:
    """Normal random matrices of scale 1/sqrt(inputs), norms of 1, layer weights of 0."""
    random, d, f = np.random.default_rng(seed), shape.d_model, shape.d_ff
    shapes = {"embed": (shape.n_tokens, d), "pos_embed": (shape.n_ctx, d), "head": (shape.n_tokens, d)}
    for layer in range(shape.n_layers):
        shapes |= {f"{layer}.{name}": (d, d) for name in ("wq", "wk", "wv", "wo")}
        shapes |= {f"{layer}.w_up": (f, d), f"{layer}.w_down": (d, f)}
    params = {name: random.standard_normal(size).astype(dtype) / dtype(size[1] ** 0.5) for name, size in shapes.items()}
    for name in ["final_norm"] + [f"{layer}.{norm}" for layer in range(shape.n_layers) for norm in ("attn_norm", "mlp_norm")]:
        params[name] = np.ones(d, dtype)
    if shape.feedback:
        params["layer_weights"] = np.zeros(shape.n_layers + 1, dtype)
    return params


def linear_back(name: str, x: Array, dy: Array, params: Params, grads: Params) -> Array:
    """y = x W^T: dW += dy^T x, dx = dy W."""
    grads[name] += dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    return dy @ params[name]


def norm(x: Array, w: Array) -> tuple[Array, Array]:
    """RMS norm of the last axis, and the factor 1 / sqrt(mean(x^2) + eps) that the way back needs."""
    scale = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS)
    return x * scale * w, scale


def norm_back(name: str, x: Array, scale: Array, dy: Array, params: Params, grads: Params) -> Array:
    """dx = scale (g - x scale^2 mean(x g)), with g = dy w; dw += sum of dy x scale."""
    grads[name] += (dy * x * scale).reshape(-1, x.shape[-1]).sum(axis=0)
    g = dy * params[name]
    return scale * (g - x * scale * scale * (x * g).mean(axis=-1, keepdims=True))


def softmax(scores: Array) -> Array:
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def split(x: Array, n_heads: int) -> Array:
    """[B, T, D] -> [B, H, T, hd]."""
    return x.reshape(*x.shape[:2], n_heads, -1).swapaxes(1, 2)


def merged(x: Array) -> Array:
    """[B, H, T, hd] -> [B, T, D]."""
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


def read(x: Array, k: Array, v: Array, mask: Array | None, p: str, shape: Shape, params: Params) -> tuple[Array, Any]:
    """x + attention(norm(x)) over given keys and values [B, H, S, hd]; and what the way back needs."""
    h, scale = norm(x, params[p + "attn_norm"])
    q = split(h @ params[p + "wq"].T, shape.n_heads)
    scores = q @ k.swapaxes(2, 3) * (q.shape[-1] ** -0.5)
    weights = softmax(scores if mask is None else np.where(mask, scores, -np.inf))
    z = merged(weights @ v)
    return x + z @ params[p + "wo"].T, (x, scale, h, q, k, v, weights, z)


def read_back(dy: Array, kept: Any, p: str, shape: Shape, params: Params, grads: Params) -> tuple[Array, Array, Array, Array]:
    """dx but for what comes through h, dh, dk, dv."""
    _, _, h, q, k, v, weights, z = kept
    dz = split(linear_back(p + "wo", z, dy, params, grads), shape.n_heads)
    dweights = dz @ v.swapaxes(2, 3)
    dscores = weights * (dweights - (dweights * weights).sum(axis=-1, keepdims=True)) * (q.shape[-1] ** -0.5)
    dh = linear_back(p + "wq", h, merged(dscores @ k), params, grads)
    if shape.myopic:  # k and v of a position learn from its own reading alone; wk and wv, below, from all
        own = np.einsum("bhtt->bht", dscores)[..., None] * q, np.einsum("bhtt->bht", weights)[..., None] * dz
        for name, all_, own_ in zip(("wk", "wv"), (dscores.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ dz), own, strict=True):
            grads[p + name] += merged(all_ - own_).reshape(-1, h.shape[-1]).T @ h.reshape(-1, h.shape[-1])
        return dy, dh, *own
    return dy, dh, dscores.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ dz


def mlp(x: Array, p: str, params: Params) -> tuple[Array, Any]:
    """x + w_down silu(w_up norm(x))."""
    h, scale = norm(x, params[p + "mlp_norm"])
    up = h @ params[p + "w_up"].T
    gate = 1 / (1 + np.exp(-up))
    return x + (up * gate) @ params[p + "w_down"].T, (x, scale, h, up, gate)


def mlp_back(dy: Array, kept: Any, p: str, params: Params, grads: Params) -> Array:
    x, scale, h, up, gate = kept
    da = linear_back(p + "w_down", up * gate, dy, params, grads)
    dup = da * gate * (1 + up * (1 - gate))
    return dy + norm_back(p + "mlp_norm", x, scale, linear_back(p + "w_up", h, dup, params, grads), params, grads)


def standard(params: Params, tokens: Array, shape: Shape) -> tuple[Array, Callable[[Array, Params], Array]]:
    """The states that leave the last layer, [B, T, D], and the way back: d states, grads -> d embedding."""
    t = tokens.shape[1]
    x, mask, tape = params["embed"][tokens] + params["pos_embed"][:t], np.tri(t, dtype=bool), []
    for layer in range(shape.n_layers):
        p = f"{layer}."
        h, _ = norm(x, params[p + "attn_norm"])
        k, v = split(h @ params[p + "wk"].T, shape.n_heads), split(h @ params[p + "wv"].T, shape.n_heads)
        x, kept = read(x, k, v, mask, p, shape, params)
        x, kept_mlp = mlp(x, p, params)
        tape.append((kept, kept_mlp))

    def back(dx: Array, grads: Params) -> Array:
        for layer in reversed(range(shape.n_layers)):
            p, (kept, kept_mlp) = f"{layer}.", tape[layer]
            dx = mlp_back(dx, kept_mlp, p, params, grads)
            dx, dh, dk, dv = read_back(dx, kept, p, shape, params, grads)
            for name, d in (("wk", dk), ("wv", dv)):
                dh = dh + linear_back(p + name, kept[2], merged(d), params, grads)
            dx = dx + norm_back(p + "attn_norm", kept[0], kept[1], dh, params, grads)
        return dx

    return x, back


def fed_back(params: Params, tokens: Array, shape: Shape) -> tuple[Array, Callable[[Array, Params], Array]]:
    """The same for the feedback model: position by position, and back through time."""
    (b, t), n, shares = tokens.shape, shape.n_layers, softmax(params["layer_weights"])
    size, heads = (b, shape.n_heads, t, shape.d_model // shape.n_heads), shape.n_heads
    keys, values = (np.zeros((n, *size), params["embed"].dtype) for _ in range(2))
    embedded, tops, tape = params["embed"][tokens] + params["pos_embed"][:t], [], []
    for i in range(t):
        x, kept = embedded[:, i : i + 1], []
        depths = [x]
        for layer in range(n):
            p, kept_read = f"{layer}.", None
            if i > 0:
                x, kept_read = read(x, keys[layer, :, :, :i], values[layer, :, :, :i], None, p, shape, params)
            x, kept_mlp = mlp(x, p, params)
            kept.append((kept_read, kept_mlp))
            depths.append(x)
        memory = np.einsum("l,lbtd->btd", shares, np.stack(depths))
        written = [norm(memory, params[f"{layer}.attn_norm"]) for layer in range(n)]
        for layer, (h, _) in enumerate(written):
            keys[layer, :, :, i : i + 1] = split(h @ params[f"{layer}.wk"].T, heads)
            values[layer, :, :, i : i + 1] = split(h @ params[f"{layer}.wv"].T, heads)
        tops.append(x)
        tape.append((depths, memory, written, kept))

    def back(dx: Array, grads: Params) -> Array:
        dkeys, dvalues, dembedded = np.zeros_like(keys), np.zeros_like(values), np.zeros_like(embedded)
        dshares = np.zeros_like(shares)
        for i in reversed(range(t)):
            depths, memory, written, kept = tape[i]
            dmemory = np.zeros_like(memory)  # all that read it came later, so its gradient is complete
            for layer, (h, scale) in enumerate(written):
                p = f"{layer}."
                dh = linear_back(p + "wk", h, merged(dkeys[layer, :, :, i : i + 1]), params, grads)
                dh = dh + linear_back(p + "wv", h, merged(dvalues[layer, :, :, i : i + 1]), params, grads)
                dmemory += norm_back(p + "attn_norm", memory, scale, dh, params, grads)
            dshares += np.array([(dmemory * depth).sum() for depth in depths])
            d = dx[:, i : i + 1] + shares[n] * dmemory
            for layer in reversed(range(n)):
                p, (kept_read, kept_mlp) = f"{layer}.", kept[layer]
                d = mlp_back(d, kept_mlp, p, params, grads)
                if kept_read is not None:
                    d, dh, dk, dv = read_back(d, kept_read, p, shape, params, grads)
                    dkeys[layer, :, :, :i] += dk
                    dvalues[layer, :, :, :i] += dv
                    d = d + norm_back(p + "attn_norm", kept_read[0], kept_read[1], dh, params, grads)
                d = d + shares[layer] * dmemory
            dembedded[:, i : i + 1] = d
        grads["layer_weights"] += shares * (dshares - (dshares * shares).sum())
        return dembedded

    return np.concatenate(tops, axis=1), back


def loss(params: Params, tokens: Array, targets: Array, shape: Shape, grads: Params | None = None) -> tuple[float, Array]:
    """Mean cross-entropy where targets is not -1, and where the model's first choice is right, bool [B, T]."""
    x, back = (fed_back if shape.feedback else standard)(params, tokens, shape)
    h, scale = norm(x, params["final_norm"])
    p, counted = softmax(h @ params["head"].T), targets >= 0
    chosen = np.take_along_axis(p, np.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    if grads is not None:
        d = p.copy()
        np.put_along_axis(d, np.maximum(targets, 0)[..., None], (chosen - 1)[..., None], axis=-1)
        d *= (counted / counted.sum())[..., None].astype(d.dtype)
        dx = back(norm_back("final_norm", x, scale, linear_back("head", h, d, params, grads), params, grads), grads)
        np.add.at(grads["embed"], tokens, dx)
        grads["pos_embed"][: tokens.shape[1]] += dx.sum(axis=0)
    tiny = np.finfo(p.dtype).tiny
    return float(-np.log(np.maximum(chosen[counted], tiny)).mean()), (p.argmax(axis=-1) == targets) & counted


def train(shape: Shape, batches: Iterator[tuple[Array, Array]], steps: int, seed: int, rate: float = 3e-3) -> tuple[Params,
    list[float]]:
    """Adam (Kingma & Ba 2015) with a warm-up, a cosine decay, and gradients cut to length 1; the parameters and losses."""
    params, losses = parameters(shape, seed), []
    first, second = ({name: np.zeros_like(x) for name, x in params.items()} for _ in range(2))
    for step in range(1, steps + 1):
        grads = {name: np.zeros_like(x) for name, x in params.items()}
        losses.append(loss(params, *next(batches), shape, grads)[0])
        length = np.sqrt(sum(float((g * g).sum()) for g in grads.values()))
        now = rate * min(1, step / 50) * (0.5 + 0.5 * np.cos(np.pi * step / steps)) + 1e-5
        for name, g in grads.items():
            g = g / max(1.0, length)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.98 * second[name] + 0.02 * g * g
            ratio = (first[name] / (1 - 0.9**step)) / (np.sqrt(second[name] / (1 - 0.98**step)) + 1e-8)
            params[name] = (params[name] - now * ratio).astype(g.dtype)
    return params, losses


def library_model(params: Params, shape: Shape, ops: str = "numpy") -> Transformer:
    """The trained parameters as a model of the library."""
    config = Config(
        n_layers=shape.n_layers, n_heads=shape.n_heads, n_kv_heads=shape.n_heads, head_dim=shape.d_model // shape.n_heads,
        d_model=shape.d_model, d_ff=shape.d_ff, vocab_size=shape.n_tokens, n_ctx=shape.n_ctx, norm_eps=EPS,
        learned_positions=True, activation="silu", gated_mlp=False, tied_head=False,
    )  # fmt: skip
    names = ("wq", "wk", "wv", "wo", "w_up", "w_down", "attn_norm", "mlp_norm")
    blocks = tuple(BlockWeights(**{name: params[f"{layer}.{name}"] for name in names}) for layer in range(shape.n_layers))
    rest = {name: params[name] for name in ("embed", "pos_embed", "head", "final_norm")}
    weights = Weights(blocks=blocks, **rest)
    if shape.feedback:
        return FeedbackTransformer(config, weights, layer_weights=params["layer_weights"], ops=ops)
    return Transformer(config, weights, ops=ops)


def gradient_error(shape: Shape, seed: int = 0, step: float = 1e-5) -> float:
    """The largest difference of the gradient from central finite differences, in float64; relative where they exceed 0.01."""
    random = np.random.default_rng(seed)
    params = {name: x + 0.1 * random.standard_normal(x.shape) for name, x in parameters(shape, seed, np.float64).items()}
    tokens, targets = random.integers(0, shape.n_tokens, (3, shape.n_ctx)), random.integers(-1, shape.n_tokens,
              (3, shape.n_ctx))
    grads = {name: np.zeros_like(x) for name, x in params.items()}
    loss(params, tokens, targets, shape, grads)
    worst = 0.0
    for name, x in params.items():
        for at in [tuple(random.integers(0, n) for n in x.shape) for _ in range(12)]:
            kept = x[at]
            ends = []
            for x[at] in (kept + step, kept - step):
                ends.append(loss(params, tokens, targets, shape)[0])
            x[at] = kept
            slope = (ends[0] - ends[1]) / (2 * step)
            worst = max(worst, float(abs(slope - grads[name][at])) / max(0.01, abs(slope)))
    return worst


def myopic_error(shape: Shape, seed: int = 0, step: float = 1e-5) -> float:
    """How far the myopic gradient of a position's own embedding (pos_embed) is from finite differences of its own loss alone.

    What is added to a position's embedding moves the losses of later ones too, but those must not count.
    """
    random = np.random.default_rng(seed)
    params = {name: x + 0.1 * random.standard_normal(x.shape) for name, x in parameters(shape, seed, np.float64).items()}
    tokens, targets = (random.integers(0, shape.n_tokens, (3, shape.n_ctx)) for _ in range(2))
    grads = {name: np.zeros_like(x) for name, x in params.items()}
    loss(params, tokens, targets, shape, grads)
    worst, x = 0.0, params["pos_embed"]
    for pos in range(shape.n_ctx):
        own = np.full_like(targets, -1)
        own[:, pos] = targets[:, pos]
        for feature in range(0, shape.d_model, 3):
            kept, ends = x[pos, feature], []
            for x[pos, feature] in (kept + step, kept - step):
                ends.append(loss(params, tokens, own, shape)[0])
            x[pos, feature] = kept
            slope = (ends[0] - ends[1]) / (2 * step) / shape.n_ctx  # the loss of one position is 1 / n_ctx of the mean
            worst = max(worst, abs(slope - float(grads["pos_embed"][pos, feature])) / max(0.01, abs(slope)))
    return worst
