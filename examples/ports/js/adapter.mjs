// The port behind the conformance suite's door: a JSON request a line in, a JSON answer a line out, as
// tests/conformance/README.md has it.
import { createInterface } from "node:readline";
import * as port from "./nanokv.mjs";

class Skip extends Error {}

const numbers = (given) => given && Float32Array.from(given.f32, Number);
const plain = (x) => (Object.is(x, -0) ? "-0" : Number.isFinite(x) ? x : String(x)); // what JSON lacks goes as text
const flat = (rows) => rows.flatMap((row) => [...row]);

function rowsOf(given, width) { // an array as its last dimension's rows
  const x = numbers(given);
  return Array.from({ length: x.length / width }, (_, t) => x.subarray(t * width, (t + 1) * width));
}

const models = new Map();

function modelOf(path) {
  if (!models.has(path)) models.set(path, port.loadModel(path));
  const model = models.get(path);
  if (!model) throw new Skip("models in the suite's plain form alone");
  return model;
}

// What was seen of each position, by site and layer, and what an id names of it (B5).
class Seen {
  constructor() {
    this.rows = new Map();
  }

  at(position) {
    return (site, array, layer) => this.rows.set(`${position}.${layer}.${site}`, array);
  }

  get(name, starts) {
    const match = /^step(\d+)\.(?:layer(\d+)\.)?(?:head(\d+)\.)?(\w+)$/.exec(name);
    if (!match || Number(match[1]) + 1 >= starts.length) return undefined;
    const [step, layer, head, site] = [Number(match[1]), match[2] ?? this.layers, match[3], match[4]], out = [];
    for (let p = starts[step]; p < starts[step + 1]; p++) {
      const row = this.rows.get(`${p}.${layer}.${site}`);
      if (!row) return undefined;
      if (head === undefined) out.push(...row);
      else {
        const read = row[head], first = p + 1 - read.length, rest = site === "scores" ? -Infinity : 0;
        for (let s = 0; s < starts[step + 1]; s++) out.push(s < first || s > p ? rest : read[s - first]);
      }
    }
    return out;
  }
}

function named(want, get) {
  return Object.fromEntries(want.map((name) => [name, get(name)]).filter(([, value]) => value !== undefined));
}

const operations = {
  kv_head: ({ n_heads: H, n_kv_heads: G }) => ({ kv_head: Array.from({ length: H }, (_, h) => port.kvHead(h, H, G)) }),
  reads({ start, n, window }) {
    const dst = [], src = [];
    for (let p = start; p < start + n; p++) for (let s = port.firstSlot(p, window); s <= p; s++) dst.push(p), src.push(s);
    return { dst, src };
  },
  rope_pairs({ head_dim: hd, pairs }) {
    return { pairs: Array.from({ length: hd / 2 }, (_, i) => port.pair(i, hd, pairs)).flat() };
  },
  offset: ({ shape, index }) => ({ offset: [shape.reduce((at, n, i) => at * n + index[i], 0)] }),
  number({ function: name, first, ...arrays }) {
    const { x, a, b, c } = Object.fromEntries(Object.entries(arrays).map(([key, value]) => [key, numbers(value)]));
    if (name === "fma") return { y: [...a].map((value, i) => port.fma(value, b[i], c[i])) };
    if (name === "sum") return { y: [port.sum(x, first)] };
    if (name === "sum_of_squares") return { y: [port.sumOfSquares(x)] };
    return name === "maximum" ? { y: [port.maximum(x)] } : { y: [...x].map(port[name]) };
  },
  linear({ x, w: matrix, b: bias }) {
    const [w, b] = [numbers(matrix), numbers(bias)];
    return { y: flat(rowsOf(x, x.shape[1]).map((row) => port.linear(row, w, b, matrix.shape[0]))) };
  },
  rms_norm: ({ x, w, eps }) => ({ y: flat(rowsOf(x, w.shape[0]).map((row) => port.rmsNorm(row, numbers(w), eps))) }),
  layer_norm({ x, w: weight, b: bias, eps }) {
    const [w, b] = [numbers(weight), numbers(bias)];
    return { y: flat(rowsOf(x, w.length).map((row) => port.layerNorm(row, w, b, eps))) };
  },
  rope_table({ base, head_dim, start, n, divisors }) {
    const tables = Array.from({ length: n }, (_, t) => port.ropeTable({ base, divisors }, head_dim, start + t));
    return { cos: flat(tables.map(([cos]) => cos)), sin: flat(tables.map(([, sin]) => sin)) };
  },
  rope({ x, cos, sin, pairs }) {
    const hd = x.shape[2], rows = rowsOf(x, x.shape[1] * hd), [c, s] = [cos, sin].map((table) => rowsOf(table, hd / 2));
    rows.forEach((row, t) => port.rotate(row, c[t], s[t], hd, pairs));
    return { y: flat(rows) };
  },
  activate: ({ kind, up, gate }) => ({ y: [...port.activate(kind, numbers(up), numbers(gate))] }),
  attention({ q, k, v, scale, window, cuts }) {
    if (cuts) throw new Skip("no edges can be cut");
    const [T, H, hd] = q.shape, [S, G] = k.shape;
    const cache = new port.Cache({ n_layers: 1, n_ctx: S, n_kv_heads: G, head_dim: hd });
    const [keys, values] = [k, v].map((array) => rowsOf(array, G * hd));
    keys.forEach((key, slot) => cache.write(0, slot, key, values[slot]));
    const found = rowsOf(q, H * hd).map((row, t) => port.attention(row, cache, 0, S - T + t, { H, scale, window }));
    const byHead = (name) => Array.from({ length: H }, (_, h) => found.map((each) => [...each[name][h]])).flat(2);
    return { scores: byHead("scores"), pattern: byHead("weights"), z: flat(found.map(({ z }) => z)) };
  },
  cache({ n_layers, n_ctx, actions }) {
    const cache = new port.Cache({ n_layers, n_ctx, n_kv_heads: 1, head_dim: 1 });
    for (const [n, ...uses] of actions) {
      cache.room(n);
      for (const [what, layer, first, count] of uses)
        if (what === "read") cache.read(layer, first + count);
        else for (let slot = first; slot < first + count; slot++) cache.write(layer, slot, [0], [0]);
      cache.commit(n);
    }
    return { length: [cache.length] };
  },
  block({ model: path, layer, calls, x }, want) {
    const model = modelOf(path), cache = new port.Cache(model.config), seen = new Seen(), starts = [0];
    for (const n of calls) starts.push(starts.at(-1) + n);
    rowsOf(x, x.shape[1]).forEach((row, p) =>
      model.block(layer, p, row, cache, (site, array) => seen.at(p)(site, array, layer)),
    );
    return named(want, (name) => seen.get(name, starts));
  },
  run({ model: path, calls, cuts }, want) {
    if (cuts) throw new Skip("no edges can be cut");
    const model = modelOf(path), cache = new port.Cache(model.config), seen = new Seen(), starts = [0], errors = [];
    seen.layers = model.config.n_layers;
    for (const tokens of calls) {
      try {
        model.check(tokens, cache);
      } catch (refused) {
        if (!(refused instanceof port.Refused)) throw refused;
        errors.push(refused.kind);
        continue;
      }
      errors.push("");
      for (const token of tokens) model.forward(token, cache, seen.at(cache.length));
      starts.push(cache.length);
    }
    return named(want, (name) => ({ errors, length: [cache.length] })[name] ?? seen.get(name, starts));
  },
  pcg32({ seed, stream, n }) {
    const random = new port.Pcg32(BigInt(seed), BigInt(stream));
    return { words: Array.from({ length: n }, () => random.next()) };
  },
  greedy: ({ logits }) => ({ token: [port.greedy(numbers(logits))] }),
  sample({ logits, seed, n, ...how }) {
    const random = new port.Pcg32(BigInt(seed)), x = numbers(logits);
    return { tokens: Array.from({ length: n }, () => port.sample(x, random, how)) };
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const { id, op, inputs, want } = JSON.parse(line);
  let answer;
  try {
    if (!operations[op]) throw new Skip(`this port has no ${op}`);
    const outputs = operations[op](inputs, want);
    for (const name of Object.keys(outputs)) outputs[name] = outputs[name].map((x) => (typeof x === "number" ? plain(x) : x));
    answer = { id, outputs };
  } catch (error) {
    if (error instanceof Skip) answer = { id, skip: error.message };
    else if (error instanceof port.Refused) answer = { id, error: error.kind, message: error.message };
    else throw error;
  }
  console.log(JSON.stringify(answer));
}
