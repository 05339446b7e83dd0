"""How each site's numbers come about: for every site a function that tells the arithmetic of one number of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nanokv.trace import arithmetic
from nanokv.trace.arithmetic import F, fma
from nanokv.trace.ids import Id, reads
from nanokv.trace.recompute import Operands
from nanokv.trace.telling import SHORT, Telling

Array = np.ndarray
Teller = Callable[[Telling, Operands, Id], F]


def largest(x: Array, w: Array) -> int:
    """The term of x . w that counts most."""
    return int(np.argmax(np.nan_to_num(np.abs(x * w)))) if len(x) else 0


def _stream(told: Telling, o: Operands, at: Id) -> F:
    """resid_pre, resid_mid, resid_post: the embedding and all that was added to it."""
    assert at.layer is not None
    (i,), pos = at.index, at.pos or 0
    told.stage("the embedding and what each layer added to it", "T1")
    x = o.get("resid_pre", 0, pos)[i]
    if o.model is not None:
        x = _embedding(told, o, pos, i)
    else:
        told.say(x, "{}", x, note=f"layer0.pos{pos}[{i}]: the embedding; give the model to see its parts")
    n_added = 2 * at.layer + {"resid_pre": 0, "resid_mid": 1, "resid_post": 2}[at.site]
    for added in range(n_added):
        name = f"layer{added // 2}.pos{pos}.{('attn_out', 'mlp_out')[added % 2]}[{i}]"
        part = o.get(("attn_out", "mlp_out")[added % 2], added // 2, pos)[i]
        x = told.say(x + part, "{} + {}", x, part, note=f"+ {name}")
        told.further.append(name)
    return x


def _embedding(told: Telling, o: Operands, pos: int, i: int) -> F:
    assert o.model is not None
    token = int(o.trace._step_of(pos).arrays["token_id"][pos - o.trace._step_of(pos).start])
    entry = o.matrix("embed")[token, i]
    x = told.say(entry, "{}", entry, note=f"embed[{token},{i}]")
    if o.config.embed_scale != 1:
        scale = F(o.config.embed_scale)
        x = told.say(x * scale, "{} * {}", x, scale, note="times the embedding scale")
    if o.config.learned_positions:
        place = o.matrix("pos_embed")[pos, i]
        x = told.say(x + place, "{} + {}", x, place, note=f"+ pos_embed[{pos},{i}]")
    return x


def _norm_of(x_site: str, weight: str) -> Teller:
    def told_norm(told: Telling, o: Operands, at: Id) -> F:
        layer = o.config.n_layers - 1 if at.layer is None else at.layer
        x, name = o.get(x_site, layer, at.pos or 0), str(Id(x_site, layer, at.pos))
        told.further.append(f"{name}[{at.index[0]}]")
        w, b = o.weight(weight, at.layer), o.weight(f"{weight}_bias", at.layer)
        return told.norm(o.config.norm, x, at.index[0], w, b, o.config.norm_eps, name)

    return told_norm


def _final_scale(told: Telling, o: Operands, at: Id) -> F:
    last = o.config.n_layers
    x, name = o.get("resid_post", last - 1, at.pos or 0), f"layer{last}.pos{at.pos}"
    if o.config.norm == "none":
        told.stage("this model has no norm", "M1")
        return told.say(F(1), "1.0")
    if o.config.norm == "layer":
        x, name = told.centred(x, name), "c"
    return told.scale(x, o.config.norm_eps, name)


def _projected(name: str) -> Teller:
    """q, k or v: a linear map of the normed state, a norm over the head's features where the model has one, and RoPE."""

    def told_head(told: Telling, o: Operands, at: Id) -> F:
        layer, pos, (head, i) = at.layer or 0, at.pos or 0, at.index
        turned = None if name == "v" else o.cosines(layer, pos)
        if turned is None:
            return _before_rope(told, o, at, name, head, i)
        pair, first, second = arithmetic.pair_of(i, o.config.head_dim, o.config.rope_pairs)
        x0, x1 = (_before_rope(told, o, at, name, head, j) for j in (first, second))
        cos, sin = turned[0][pair], turned[1][pair]
        told.stage(f"features {first} and {second} turned by the angle of position {pos}", "R2")
        if i == first:
            return told.say(fma(x0, cos, -(x1 * sin)), "fma({}, {}, -({} * {}))", x0, cos, x1, sin, note="x0, cos, x1, sin")
        return told.say(fma(x0, sin, x1 * cos), "fma({}, {}, {} * {})", x0, sin, x1, cos, note="x0, sin, x1, cos")

    return told_head


def _before_rope(told: Telling, o: Operands, at: Id, name: str, head: int, i: int) -> F:
    layer, pos = at.layer or 0, at.pos or 0
    x_site, owner = ("ln1", layer) if name == "q" else (o.kv_input(), o.kv_layer(layer))
    h, n = o.get(x_site, layer, pos), head * o.config.head_dim + i
    where = largest(h, o.matrix(f"w{name}", owner)[n])
    told.further.append(f"layer{layer}.pos{pos}.{x_site}[{where}]")
    x = told.linear(o, h, n, f"w{name}", f"b{name}", owner, lambda k: f"{x_site}[{k}]")
    if name == "v" or not o.config.qk_norm:
        return x
    row = o.get(f"{name}_linear", layer, pos)[head]
    return told.norm("rms", row, i, o.weight(f"{name}_norm", owner), None, o.config.norm_eps, f"{name} before its norm")


def _memory(told: Telling, o: Operands, at: Id) -> F:
    """A feedback model's memory: the embedding and what left each layer, by shares."""
    (i,), pos = at.index, at.pos or 0
    told.stage("each depth times its share, from the embedding up", "T3")
    depths = [f"layer{depth}.pos{pos}[{i}]" for depth in range(o.config.n_layers + 1)]
    shares = o.shares
    total = F(0)
    for depth, name in enumerate(depths):
        site, layer = ("resid_pre", 0) if depth == 0 else ("resid_post", depth - 1)
        x, share = o.get(site, layer, pos)[i], shares[depth]
        if depth == 0:
            total = told.say(share * x, "{} * {}", share, x, note=f"share 0, {name}")
        else:
            total = told.say(total + share * x, "{} + {} * {}", total, share, x, note=f"+ share {depth}, {name}")
    told.further += depths
    return total


def _ln_memory(told: Telling, o: Operands, at: Id) -> F:
    layer, (i,) = o.kv_layer(at.layer or 0), at.index
    told.further.append(f"pos{at.pos}.memory[{i}]")
    w, b = o.weight("attn_norm", layer), o.weight("attn_norm_bias", layer)
    return told.norm(o.config.norm, o.get("memory", None, at.pos or 0), i, w, b, o.config.norm_eps, f"pos{at.pos}.memory")


def _score(told: Telling, o: Operands, at: Id) -> F:
    layer, pos, (head, src) = at.layer or 0, at.pos or 0, at.index
    first, stop = reads(o.trace._step_of(pos), layer, pos)
    if not first <= src < stop:
        return _unread(told, at, first, stop, F(-np.inf))
    kv_layer, kv_head = _read_from(o, at)
    q, k, scale = o.get("q", layer, pos)[head], o.get("k", kv_layer, src)[kv_head], F(o.config.attn_scale)
    told.stage(f"the score of slot {src}: q . k over {len(q)} features, fma after fma, then times the scale", "A2")
    total = told.chain(q, k, lambda i: f"q[{head},{i}] k[{kv_head},{i}]")
    i = largest(q, k)
    told.further += [f"layer{layer}.pos{pos}.q[{head},{i}]", f"layer{kv_layer}.pos{src}.k[{kv_head},{i}]"]
    score = told.say(total * scale, "{} * {}", total, scale, note="times the scale")
    if np.isneginf(o.get("scores", layer, pos)[head, src]) and not np.isneginf(score):
        return told.say(F(-np.inf), "-inf", note="this edge was cut")
    return score


def _read_from(o: Operands, at: Id) -> tuple[int, int]:
    """The layer of the cache, and the key/value head there, that a head read."""
    arrays = o.trace._step_of(at.pos or 0).arrays
    return int(arrays["read_layer"][at.layer]), int(arrays["read_kv_head"][at.layer, at.index[0]])


def _unread(told: Telling, at: Id, first: int, stop: int, value: F) -> F:
    told.stage(
        f"the mask: position {at.pos} reads slots {first} to {stop - 1} here, and others are never multiplied or added", "A6"
    )
    return told.say(value, "{}", value, note="stands for a slot that is not read")


def _softmax(told: Telling, o: Operands, at: Id, keep: int | None) -> tuple[Array, F, int]:
    """Tells e of every slot that a head reads, and their sum; returns both, and the first slot."""
    layer, pos, head = at.layer or 0, at.pos or 0, at.index[0]
    first, stop = reads(o.trace._step_of(pos), layer, pos)
    row = o.get("scores", layer, pos)[head, first:stop]
    top, e, total = arithmetic.softmax(row, first)
    told.stage("the largest score", "A3")
    best = first + int(np.argmax(row == top)) if (row == top).any() else None
    if best is None:
        told.say(top, "{}", top, note="no score is above -inf")
    elif len(row) <= SHORT:
        told.say(top, f"max({', '.join('{}' for _ in row)})", *row, note=f"scores[{head},{best}]")
    else:
        told.say(top, "{}", top, note=f"scores[{head},{best}], the largest of {len(row)}")
    told.stage("e = exp(score - the largest) of every slot", "A3")
    for i, score in enumerate(row):
        told.say(e[i], "exp({} - {})", score, top, note=f"e[{first + i}]", kept=first + i == keep)
    told.stage("the sum of e in sixteen lanes, slot s in lane s mod 16", "S2")
    told.lanes(e, lambda i: f"e[{first + i}]", first)
    if not e.any():
        told.say(total, "1.0", note="in place of a sum of 0")
    return e, total, first


def _pattern(told: Telling, o: Operands, at: Id) -> F:
    layer, pos, src = at.layer or 0, at.pos or 0, at.index[1]
    first, stop = reads(o.trace._step_of(pos), layer, pos)
    if not first <= src < stop:
        return _unread(told, at, first, stop, F(0))
    _score(told, o, at)
    e, total, _ = _softmax(told, o, at, src)
    told.stage("the weight", "A5")
    return told.say(e[src - first] / total, "{} / {}", e[src - first], total, note=f"e[{src}] over the sum")


def _z(told: Telling, o: Operands, at: Id) -> F:
    layer, pos, (head, i) = at.layer or 0, at.pos or 0, at.index
    kv_layer, kv_head = _read_from(o, at)
    e, total, first = _softmax(told, o, at, None)
    scores = o.get("scores", layer, pos)[head, first : first + len(e)]
    told.stage(f"e times value over {len(e)} slots, fma after fma, then over the sum", "A4")
    found = F(0)
    for j, score in enumerate(scores):
        if not np.isneginf(score):
            v, note = (
                o.get("v", kv_layer, first + j)[kv_head, i],
                f"e[{first + j}], layer{kv_layer}.pos{first + j}.v[{kv_head},{i}]",
            )
            found = told.say(fma(e[j], v, found), "fma({}, {}, {})", e[j], v, found, note=note)
    if len(e):
        best = first + int(np.argmax(e))
        told.further += [f"layer{layer}.pos{pos}.pattern[{head},{best}]", f"layer{kv_layer}.pos{best}.v[{kv_head},{i}]"]
    return told.say(found / total, "{} / {}", found, total, note="over the sum of e")


def _sublayer(linear: str, x_site: str, matrix: str, bias: str, post_norm: str) -> Teller:
    """attn_out or mlp_out: a linear map, and a norm after it where the model has one."""

    def told_sublayer(told: Telling, o: Operands, at: Id) -> F:
        layer, pos, i = at.layer or 0, at.pos or 0, at.index[0]
        x = o.get(x_site, layer, pos)

        def name(k: int) -> str:
            return f"{x_site}[{','.join(map(str, np.unravel_index(k, x.shape)))}]"

        k = largest(x.reshape(-1), o.matrix(matrix, layer)[i])
        told.further.append(f"layer{layer}.pos{pos}.{name(k)}")
        value = told.linear(o, x.reshape(-1), i, matrix, bias, layer, name)
        if not o.config.post_norms or o.config.norm == "none":
            return value
        return told.norm(o.config.norm, o.get(linear, layer, pos), i, o.weight(post_norm, layer), None, o.config.norm_eps,
                         f"{at.site} before its norm")  # fmt: skip

    return told_sublayer


def _of_normed(x_site: str, matrix: str, bias: str) -> Teller:
    """gate, up, logits: a linear map of a normed state."""

    def told_linear(told: Telling, o: Operands, at: Id) -> F:
        x, n = o.get(x_site, at.layer, at.pos or 0), at.index[0]
        k = largest(x, o.matrix(matrix, at.layer)[n])
        told.further.append(f"{Id(x_site, at.layer, at.pos)}[{k}]")
        return told.linear(o, x, n, matrix, bias, at.layer, lambda k: f"{x_site}[{k}]")

    return told_linear


ACTIVATIONS = {
    "silu": "{x} / (1.0 + exp(-{x}))",
    "gelu_tanh": "(0.5 * {x}) * (1.0 + tanh({x} * fma(0.0356774081, {x} * {x}, 0.797884561)))",
    "gelu": "(0.5 * {x}) * (1.0 + erf({x} * 0.707106781))",
    "relu": "relu({x})",
}

RULES = {"silu": "F4", "gelu_tanh": "F5", "gelu": "F6", "relu": "F7"}


def _act(told: Telling, o: Operands, at: Id) -> F:
    layer, pos, i, kind = at.layer or 0, at.pos or 0, at.index[0], o.config.activation
    gated = o.config.gated_mlp
    x, up = o.get("gate" if gated else "up", layer, pos)[i], o.get("up", layer, pos)[i]
    told.stage(f"the unit: {kind} of its {'gate, times its input' if gated else 'input'}", "F8" if gated else RULES[kind])
    value, expression = arithmetic.activate(kind, x), ACTIVATIONS[kind].format(x=f"({x!s})" if x < 0 else str(x))
    told.further += [f"layer{layer}.pos{pos}.{site}[{i}]" for site in (("gate", "up") if gated else ("up",))]
    if not gated:
        return told.say(F(value), expression, note=f"x is up[{i}]")
    return told.say(F(value * up), f"({expression}) * {{}}", up, note=f"gate[{i}], in the end up[{i}]")


TELLERS: dict[str, Teller] = {
    "resid_pre": _stream,
    "resid_mid": _stream,
    "resid_post": _stream,
    "ln1": _norm_of("resid_pre", "attn_norm"),
    "q": _projected("q"),
    "k": _projected("k"),
    "v": _projected("v"),
    "scores": _score,
    "pattern": _pattern,
    "z": _z,
    "attn_out": _sublayer("attn_linear", "z", "wo", "bo", "post_attn_norm"),
    "ln2": _norm_of("resid_mid", "mlp_norm"),
    "gate": _of_normed("ln2", "w_gate", "b_gate"),
    "up": _of_normed("ln2", "w_up", "b_up"),
    "act": _act,
    "mlp_out": _sublayer("mlp_linear", "act", "w_down", "b_down", "post_mlp_norm"),
    "memory": _memory,
    "ln_memory": _ln_memory,
    "final_scale": _final_scale,
    "ln_final": _norm_of("resid_post", "final_norm"),
    "logits": _of_normed("ln_final", "head", ""),
}

WITHOUT_A_MODEL = ("resid_pre", "resid_mid", "resid_post", "final_scale", "scores", "pattern", "z")  # need no weights
