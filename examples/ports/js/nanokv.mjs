// A decoder-only transformer with a key/value cache, after tests/conformance/SPEC.md; labels such as A2 are its
// rules. JavaScript's numbers are float64, so every operation is rounded to float32 by f(), or by a Float32Array that takes it
// in, and fma is made as N3 says.
import { readFileSync, existsSync } from "node:fs";

const f = Math.fround;

export class Refused extends Error {
  constructor(kind, message) {
    super(message);
    this.kind = kind;
  }
}

// ---- N: numbers

const word = new DataView(new ArrayBuffer(8));

function roundedToOdd(s, lost) { // N3: s is inexact and its last bit is 0 -> its neighbour towards the lost part
  word.setFloat64(0, s);
  const bits = word.getBigInt64(0);
  if (bits & 1n) return s;
  const up = lost > 0 === s >= 0; // away from zero
  if (s === 0) return lost > 0 ? Number.MIN_VALUE : -Number.MIN_VALUE;
  word.setBigInt64(0, up ? bits + 1n : bits - 1n);
  return word.getFloat64(0);
}

export function fma(a, b, c) {
  const p = a * b, s = p + c, t = s - p;
  const lost = p - (s - t) + (c - t);
  return f(lost !== 0 && Number.isFinite(s) ? roundedToOdd(s, lost) : s);
}

const constants = (...xs) => xs.map(f); // N5

// ---- F: functions

const EXP = constants(0.00138140086, 0.00836900063, 0.0416684151, 0.166665182, 0.49999994, 1, 1);
const TANH = constants(-0.00589515036, 0.0207959637, -0.0537838265, 0.133319244, -0.333332986);
const ERF_SMALL = constants(8.31677244e-05, -0.000813001185, 0.00519990642, -0.0268589407, 0.112836875, -0.376126319,
  0.128379166);
const ERF_LARGE = constants(7.37456389e-07, 1.13113501e-05, -0.000378849683, 0.0039941012, -0.0247745123, 0.107858211,
  0.633663297, 1.12938178, -0.000150613705);
const [LOG2E, MAGIC, LN2, LN2_REST] = constants(1.44269504, 12582912, -0.693147182, 1.90465421e-9);
const [TANH_SWITCH, ERF_SWITCH] = constants(0.6, 0.92);
const [GELU_CUBIC, GELU_LINEAR, HALF_ROOT] = constants(0.0356774081, 0.797884561, 0.707106781);

const polynomial = (x, coefficients) => coefficients.reduce((p, c) => fma(p, x, c));
const signed = (y, x) => (x < 0 || Object.is(x, -0) ? -y : y); // y, which is not negative, with x's sign bit

export function exp(x) { // F1
  if (x < -105) x = -105;
  if (x > 89) x = 89;
  if (Number.isNaN(x)) return x;
  const n = f(fma(x, LOG2E, MAGIC) - MAGIC);
  const r = fma(n, LN2_REST, fma(n, LN2, x));
  const half = Math.floor(n / 2);
  return f(f(polynomial(r, EXP) * 2 ** half) * 2 ** (n - half));
}

export function tanh(x) { // F2
  const a = Math.abs(x), s = f(a * a);
  const y = a < TANH_SWITCH ? fma(f(polynomial(s, TANH) * s), a, a) : f(1 - f(2 / f(exp(f(a + a)) + 1)));
  return signed(y, x);
}

export function erf(x) { // F3
  const a = Math.abs(x) > 4 ? 4 : Math.abs(x), s = f(a * a);
  const y = a < ERF_SWITCH ? fma(polynomial(s, ERF_SMALL), a, a) : f(1 - exp(-polynomial(a, ERF_LARGE)));
  return signed(y, x);
}

const ACTIVATIONS = {
  silu: (x) => f(x / f(1 + exp(-x))), // F4
  gelu_tanh: (x) => f(f(0.5 * x) * f(1 + tanh(f(x * fma(GELU_CUBIC, f(x * x), GELU_LINEAR))))), // F5
  gelu: (x) => f(f(0.5 * x) * f(1 + erf(f(x * HALF_ROOT)))), // F6
  relu: (x) => (x > 0 || Number.isNaN(x) ? x : 0), // F7
};

export function activate(kind, up, gate) { // F8
  const act = ACTIVATIONS[kind];
  return up.map((u, i) => (gate ? f(act(gate[i]) * u) : act(u)));
}

// ---- S, L, M, R: sums, linear maps, norms, rotary positions

function addLanes(lanes) { // S1
  for (let half = 8; half >= 1; half /= 2) for (let i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

export function sum(x, first = 0) { // S2; a Float32Array rounds what is put into it
  const lanes = new Float32Array(16);
  x.forEach((value, i) => (lanes[(first + i) % 16] += value));
  return addLanes(lanes);
}

export function sumOfSquares(x) {
  const lanes = new Float32Array(16);
  x.forEach((value, i) => (lanes[i % 16] = fma(value, value, lanes[i % 16])));
  return addLanes(lanes);
}

export const maximum = (x) => x.reduce((top, value) => (value > top ? value : top), -Infinity); // S3

export function linear(x, w, b, nOut) { // L1: x [K], w [N, K], b [N] or null -> [N]
  const y = new Float32Array(nOut), K = x.length;
  for (let n = 0; n < nOut; n++) {
    let total = 0;
    for (let k = 0; k < K; k++) total = fma(x[k], w[n * K + k], total);
    y[n] = b ? total + b[n] : total;
  }
  return y;
}

const normScale = (x, eps) => f(1 / f(Math.sqrt(f(f(sumOfSquares(x) / x.length) + f(eps))))); // r of M1

export function rmsNorm(x, w, eps) { // M1
  const r = normScale(x, eps);
  return x.map((value, i) => f(value * r) * w[i]);
}

export function layerNorm(x, w, b, eps) { // M2
  const mean = f(sum(x) / x.length), c = x.map((value) => value - mean), r = normScale(c, eps);
  return c.map((value, i) => f(f(value * r) * w[i]) + b[i]);
}

const halved = (x) => { const up = 134217729 * x, high = up - (up - x); return [high, x - high]; }; // 26 bits and the rest

function lost(a, b, product) { // a·b - product, exactly: what float64's fma would give (Dekker 1971)
  const [a1, a2] = halved(a), [b1, b2] = halved(b);
  return a2 * b2 - (product - a1 * b1 - a2 * b1 - a1 * b2);
}

function frequency(base, i, hd) { // R1: the float64 nearest to base^(-2i/hd); pow is off by a unit at times
  const y = base ** ((-2 * i) / hd);
  let ys = hd, bases = 2 * i, p = 1, low = 0;
  while (ys + bases > 0) {
    const takeY = bases === 0 || (ys > 0 && p >= 1 === y <= 1), factor = takeY ? y : base;
    takeY ? ys-- : bases--;
    const t = p * factor, e = lost(p, factor, t) + low * factor;
    p = t + e;
    low = e - (p - t);
  }
  return y - (y * (p - 1 + low)) / hd;
}

export function ropeTable(rope, hd, position) { // R1: cos and sin, [P]
  const frequencies = Array.from({ length: hd / 2 }, (_, i) => frequency(rope.base, i, hd) / (rope.divisors?.[i] ?? 1));
  return [Math.cos, Math.sin].map((g) => Float32Array.from(frequencies, (frequency) => g(position * frequency)));
}

export const pair = (i, hd, pairs) => (pairs === "neighbours" ? [2 * i, 2 * i + 1] : [i, i + hd / 2]); // I4

export function rotate(x, cos, sin, hd, pairs) { // R2, in place: x [heads, hd]
  for (let at = 0; at < x.length; at += hd)
    for (let i = 0; i < hd / 2; i++) {
      const [a, b] = pair(i, hd, pairs).map((j) => at + j), x0 = x[a], x1 = x[b];
      x[a] = fma(x0, cos[i], -f(x1 * sin[i]));
      x[b] = fma(x0, sin[i], f(x1 * cos[i]));
    }
}

// ---- I, K: heads, slots, the cache

export const kvHead = (head, H, G) => Math.floor(head / (H / G)); // I1
export const firstSlot = (position, window) => (window ? Math.max(0, position + 1 - window) : 0); // I2

export class Cache {
  constructor({ n_layers, n_ctx, n_kv_heads, head_dim }) {
    Object.assign(this, { nCtx: n_ctx, G: n_kv_heads, hd: head_dim, length: 0 });
    this.layers = Array.from({ length: n_layers }, () => ({ k: [], v: [] })); // of each slot: [G, hd]
  }

  room(n) { // K5
    if (this.length + n > this.nCtx) throw new Refused("ContextFullError", `no room for ${n} positions after ${this.length}`);
  }

  write(layer, slot, k, v) { // K1
    const { k: keys, v: values } = this.layers[layer];
    if (slot !== keys.length) throw new Refused("CacheError", `slot ${slot} is not the next one, ${keys.length}`);
    keys.push(k);
    values.push(v);
  }

  read(layer, end) { // K2
    if (end > this.layers[layer].k.length) throw new Refused("UnwrittenSlotError", `slot ${end - 1} was not written`);
    return this.layers[layer];
  }

  commit(n) { // K3
    if (this.layers.some(({ k }) => k.length !== this.length + n)) throw new Refused("CacheError", "a layer lacks a slot");
    this.length += n;
  }
}

// ---- A: attention of one position. q [H, hd]; gives z [H, hd], and scores and weights, [slots read] of each head

export function attention(q, cache, layer, position, { H, scale, window }) {
  const { hd, G } = cache, first = firstSlot(position, window), { k, v } = cache.read(layer, position + 1);
  const z = new Float32Array(H * hd), scores = [], weights = [];
  for (let h = 0; h < H; h++) {
    const g = kvHead(h, H, G) * hd, n = position + 1 - first, row = new Float32Array(n), e = new Float32Array(n);
    for (let s = 0; s < n; s++) { // A2
      let dot = 0;
      for (let i = 0; i < hd; i++) dot = fma(q[h * hd + i], k[first + s][g + i], dot);
      row[s] = dot * f(scale);
    }
    const largest = maximum(row), top = largest === -Infinity ? 0 : largest; // A3
    for (let s = 0; s < n; s++) e[s] = exp(f(row[s] - top));
    const added = sum(e, first), total = added === 0 ? 1 : added; // NaN stays NaN
    for (let s = 0; s < n; s++) // A4
      for (let i = 0; i < hd; i++) z[h * hd + i] = fma(e[s], v[first + s][g + i], z[h * hd + i]);
    for (let i = 0; i < hd; i++) z[h * hd + i] /= total;
    scores.push(row);
    weights.push(e.map((x) => x / total)); // A5
  }
  return { z, scores, weights };
}

// ---- B: the forward pass of one position

export class Model {
  constructor(config, arrays) {
    Object.assign(this, { config, arrays });
  }

  array(name) {
    return this.arrays[name]?.data ?? null;
  }

  norm(x, name) {
    const { norm, norm_eps } = this.config;
    if (norm === "none") return x.slice();
    const w = this.array(name);
    return norm === "rms" ? rmsNorm(x, w, norm_eps) : layerNorm(x, w, this.array(`${name}_bias`), norm_eps);
  }

  block(l, position, x, cache, see) { // B2, B3: x [D] -> [D]; see(site, array) is told of every state
    const c = this.config, w = (name) => this.array(`blocks.${l}.${name}`);
    const { n_heads: H, n_kv_heads: G, head_dim: hd, d_model: D, d_ff: F } = c;
    see("resid_pre", x);
    let h = this.norm(x, `blocks.${l}.attn_norm`);
    see("ln1", h);
    let q = linear(h, w("wq"), w("bq"), H * hd), k = linear(h, w("wk"), w("bk"), G * hd);
    const v = linear(h, w("wv"), w("bv"), G * hd);
    if (c.qk_norm) [q, k] = [[q, "q_norm"], [k, "k_norm"]].map(([heads, name]) => normHeads(heads, w(name), c.norm_eps));
    const rope = c.sliding[l] && c.rope_local ? c.rope_local : c.rope;
    if (rope) for (const heads of [q, k]) rotate(heads, ...ropeTable(rope, hd, position), hd, c.rope_pairs);
    cache.write(l, position, k, v); // A1
    see("q", q), see("k", k), see("v", v);
    const found = attention(q, cache, l, position, { H, scale: c.attn_scale, window: c.sliding[l] ? c.window : null });
    see("scores", found.scores), see("pattern", found.weights), see("z", found.z);
    let out = linear(found.z, w("wo"), w("bo"), D);
    if (c.post_norms) out = this.norm(out, `blocks.${l}.post_attn_norm`);
    see("attn_out", out);
    x = x.map((value, i) => value + out[i]); // T1
    see("resid_mid", x);

    h = this.norm(x, `blocks.${l}.mlp_norm`);
    see("ln2", h);
    const gate = c.gated_mlp ? linear(h, w("w_gate"), w("b_gate"), F) : null, up = linear(h, w("w_up"), w("b_up"), F);
    if (gate) see("gate", gate);
    see("up", up);
    const units = activate(c.activation, up, gate);
    see("act", units);
    out = linear(units, w("w_down"), w("b_down"), D);
    if (c.post_norms) out = this.norm(out, `blocks.${l}.post_mlp_norm`);
    see("mlp_out", out);
    x = x.map((value, i) => value + out[i]);
    see("resid_post", x);
    return x;
  }

  check(tokens, cache) { // E1, K5: refused before anything changes
    const { vocab_size: V } = this.config, bad = tokens.find((token) => token < 0 || token >= V);
    if (tokens.length === 0) throw new Refused("EmptyPromptError", "there is no token");
    if (bad !== undefined) throw new Refused("TokenError", `token ${bad} is not in the vocabulary of ${V}`);
    cache.room(tokens.length);
  }

  forward(token, cache, see = () => {}) { // logits [V] of one more position; see(site, array, layer)
    const { d_model: D, vocab_size: V, embed_scale, n_layers } = this.config, position = cache.length; // K4
    let x = this.array("embed").slice(token * D, (token + 1) * D); // L3
    if (embed_scale !== 1) x = x.map((value) => value * f(embed_scale));
    const positions = this.array("pos_embed");
    if (positions) x = x.map((value, i) => value + positions[position * D + i]);
    for (let l = 0; l < n_layers; l++) x = this.block(l, position, x, cache, (site, array) => see(site, array, l));
    const logits = linear(this.norm(x, "final_norm"), this.array("head") ?? this.array("embed"), null, V); // B4
    cache.commit(1);
    see("logits", logits, n_layers);
    return logits;
  }
}

function normHeads(heads, w, eps) { // B2: each head by itself
  const out = new Float32Array(heads.length), hd = w.length;
  for (let at = 0; at < heads.length; at += hd) out.set(rmsNorm(heads.subarray(at, at + hd), w, eps), at);
  return out;
}

// ---- C: a model in the suite's plain form

const DEFAULTS = {
  norm: "rms", norm_eps: 1e-5, rope: null, rope_pairs: "halves", learned_positions: false, activation: "silu",
  gated_mlp: true, attn_scale: null, embed_scale: 1, window: null, sliding: [], rope_local: null, qkv_bias: false,
  out_bias: false, mlp_bias: false, qk_norm: false, post_norms: false, tied_head: true,
};

export function readSafetensors(bytes) { // C5
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength), start = 8 + Number(view.getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, start))), arrays = {};
  delete header.__metadata__;
  for (const [name, { shape, data_offsets: [begin, end] }] of Object.entries(header))
    arrays[name] = { shape, data: new Float32Array(new Uint8Array(bytes.subarray(start + begin, start + end)).buffer) };
  return arrays;
}

export function loadModel(folder) {
  if (!existsSync(`${folder}/weights.safetensors`)) return null; // not in the plain form
  const config = { ...DEFAULTS, ...JSON.parse(readFileSync(`${folder}/config.json`, "utf8")) };
  config.attn_scale ??= 1 / Math.sqrt(config.head_dim);
  return new Model(config, readSafetensors(readFileSync(`${folder}/weights.safetensors`)));
}

// ---- G: choosing a token

export class Pcg32 { // G1
  constructor(seed, stream = 0n) {
    this.state = 0n;
    this.increment = BigInt.asUintN(64, 2n * stream + 1n);
    this.next();
    this.state = BigInt.asUintN(64, this.state + seed);
    this.next();
  }

  next() {
    const old = this.state;
    this.state = BigInt.asUintN(64, old * 6364136223846793005n + this.increment);
    const bits = Number(BigInt.asUintN(32, ((old >> 18n) ^ old) >> 27n)), turn = Number(old >> 59n);
    return ((bits >>> turn) | (bits << (-turn & 31))) >>> 0;
  }
}

export const greedy = (logits) => logits.reduce((best, x, i) => (x > logits[best] ? i : best), 0); // G2

export function sample(logits, random, { temperature, top_k: topK, top_p: topP }) { // G3
  const order = [...logits.keys()].sort((a, b) => logits[b] - logits[a] || a - b).slice(0, topK ?? logits.length);
  let total = 0;
  let sums = order.map((id) => (total += Math.exp((logits[id] - logits[order[0]]) / temperature)));
  if (topP) sums = sums.slice(0, sums.findIndex((s) => s >= topP * total) + 1);
  const drawn = (random.next() / 2 ** 32) * sums.at(-1), at = sums.findIndex((s) => s > drawn);
  return order[at < 0 ? sums.length - 1 : at];
}
