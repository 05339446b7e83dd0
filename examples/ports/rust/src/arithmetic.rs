//! Rules I and N to F: whole numbers, sums, linear maps, norms, rotary positions and functions, bit for bit.
//! `mul_add` is fma (N2); Rust contracts and reassociates nothing (N1).

#![allow(clippy::excessive_precision, clippy::approx_constant)] // the constants of rules F, digit for digit

use crate::model::{Activation, Pairs, Rope};

/// An array, row by row (I5).
#[derive(Clone, Debug)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub data: Vec<f32>,
}

/// I5: where an element stands.
pub fn offset(shape: &[usize], index: &[usize]) -> usize {
    shape.iter().zip(index).fold(0, |at, (n, i)| at * n + i)
}

/// I1: the key/value head that query head h reads.
pub fn kv_head(h: usize, n_heads: usize, n_kv_heads: usize) -> usize {
    h / (n_heads / n_kv_heads)
}

/// I2: the first slot that position p reads; the last is p itself.
pub fn first_read(p: usize, window: Option<usize>) -> usize {
    window.map_or(0, |window| (p + 1).saturating_sub(window))
}

/// I3: the pairs (dst, src) of a call.
pub fn reads(start: usize, t: usize, window: Option<usize>) -> Vec<(usize, usize)> {
    (start..start + t).flat_map(|p| (first_read(p, window)..=p).map(move |src| (p, src))).collect()
}

/// I4: the two features of pair i.
pub fn pair(i: usize, head_dim: usize, pairs: Pairs) -> (usize, usize) {
    match pairs {
        Pairs::Halves => (i, i + head_dim / 2),
        Pairs::Neighbours => (2 * i, 2 * i + 1),
    }
}

/// S1, S2: sixteen lanes, folded in halves; x[0] belongs to the lane of slot `first`.
fn lanes(x: &[f32], first: usize, add: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lane = [0.0; 16];
    for (i, &x) in x.iter().enumerate() {
        let sum = &mut lane[(first + i) % 16];
        *sum = add(x, *sum);
    }
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lane[i] += lane[i + half];
        }
    }
    lane[0]
}

pub fn sum(x: &[f32], first: usize) -> f32 {
    lanes(x, first, |x, sum| sum + x)
}

pub fn sum_of_squares(x: &[f32], first: usize) -> f32 {
    lanes(x, first, |x, sum| x.mul_add(x, sum))
}

/// S3: a NaN is passed over.
pub fn maximum(x: &[f32]) -> f32 {
    x.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a })
}

/// L1 and A2: products added by fma in order, from +0.
pub fn dot(x: &[f32], w: &[f32]) -> f32 {
    x.iter().zip(w).fold(0.0, |sum, (x, w)| x.mul_add(*w, sum))
}

/// L1: y [T, N] of x [T, K] and w [N, K]; the bias comes last.
pub fn linear(t: usize, x: &[f32], w: &Tensor, b: Option<&Tensor>) -> Vec<f32> {
    let (n_out, n_in) = (w.shape[0], w.shape[1]);
    let mut y = vec![0.0; t * n_out];
    for n in 0..n_out {
        let row = &w.data[n * n_in..][..n_in];
        for i in 0..t {
            let sum = dot(&x[i * n_in..][..n_in], row);
            y[i * n_out + n] = b.map_or(sum, |b| sum + b.data[n]);
        }
    }
    y
}

/// r of M1 and M2: one over the root of the mean square.
fn scale_of(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum_of_squares(x, 0) / x.len() as f32 + eps).sqrt()
}

/// M1, row by row.
pub fn rms_norm(x: &[f32], w: &[f32], eps: f32) -> Vec<f32> {
    let mut y = vec![];
    for x in x.chunks(w.len()) {
        let r = scale_of(x, eps);
        y.extend(x.iter().zip(w).map(|(x, w)| x * r * w));
    }
    y
}

/// M2, row by row.
pub fn layer_norm(x: &[f32], w: &[f32], b: &[f32], eps: f32) -> Vec<f32> {
    let mut y = vec![];
    for x in x.chunks(w.len()) {
        let mean = sum(x, 0) / x.len() as f32;
        let c: Vec<f32> = x.iter().map(|x| x - mean).collect();
        let r = scale_of(&c, eps);
        y.extend((0..c.len()).map(|i| c[i] * r * w[i] + b[i]));
    }
    y
}

/// R1: the float64 nearest to base^(−2i/hd). `powf` is off by a unit at times, so one step of Newton's corrects it: what
/// y^hd·base^2i lacks to 1 is found with twice the digits, as p + low, the factors in an order that keeps p near 1.
fn frequency(base: f64, i: usize, head_dim: usize) -> f64 {
    let y = base.powf(-((2 * i) as f64) / head_dim as f64);
    let (mut ys, mut bases) = (head_dim, 2 * i);
    let (mut p, mut low) = (1.0_f64, 0.0_f64);
    while ys + bases > 0 {
        let take_y = bases == 0 || ys > 0 && (p >= 1.0) == (y <= 1.0);
        let factor = if take_y { y } else { base };
        *(if take_y { &mut ys } else { &mut bases }) -= 1;
        let product = p * factor;
        let lost = p.mul_add(factor, -product) + low * factor;
        p = product + lost;
        low = lost - (p - product);
    }
    y - y * ((p - 1.0) + low) / head_dim as f64
}

/// R1: the frequencies of all pairs.
pub fn frequencies(rope: &Rope, head_dim: usize) -> Vec<f64> {
    let divisor = |i: usize| rope.divisors.as_ref().map_or(1.0, |d| d[i]);
    (0..head_dim / 2).map(|i| frequency(rope.base, i, head_dim) / divisor(i)).collect()
}

/// R1: cos and sin [T, P] of the positions from `start` on.
pub fn rope_table(rope: &Rope, head_dim: usize, start: usize, t: usize) -> (Vec<f32>, Vec<f32>) {
    let frequencies = frequencies(rope, head_dim);
    let angles = (start..start + t).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
    angles.map(|angle| (angle.cos() as f32, angle.sin() as f32)).unzip()
}

/// R2: turns the pairs of every head of x [T, heads, hd].
pub fn rope(x: &mut [f32], head_dim: usize, cos: &[f32], sin: &[f32], pairs: Pairs) {
    let n_pairs = head_dim / 2;
    let heads = x.len() * n_pairs / (cos.len() * head_dim);
    for (n, head) in x.chunks_mut(head_dim).enumerate() {
        let row = n / heads * n_pairs;
        for i in 0..n_pairs {
            let (a, b) = pair(i, head_dim, pairs);
            let (x0, x1, cos, sin) = (head[a], head[b], cos[row + i], sin[row + i]);
            head[a] = x0.mul_add(cos, -(x1 * sin));
            head[b] = x0.mul_add(sin, x1 * cos);
        }
    }
}

/// p = the first coefficient, then p = fma(p, x, c) for each that follows.
fn horner(x: f32, coefficients: &[f32]) -> f32 {
    coefficients[1..].iter().fold(coefficients[0], |p, &c| p.mul_add(x, c))
}

fn two_to_the(n: i32) -> f32 {
    f32::from_bits(((n + 127) as u32) << 23)
}

/// F1
pub fn exp(x: f32) -> f32 {
    let x = if x < -105.0 { -105.0 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    let t = x.mul_add(1.44269504, 12582912.0);
    let n = t - 12582912.0;
    let r = n.mul_add(1.90465421e-9, n.mul_add(-0.693147182, x));
    let p = horner(r, &[0.00138140086, 0.00836900063, 0.0416684151, 0.166665182, 0.49999994, 1.0, 1.0]);
    let n = n as i32;
    p * two_to_the(n >> 1) * two_to_the(n - (n >> 1))
}

/// F2
pub fn tanh(x: f32) -> f32 {
    let a = x.abs();
    let s = a * a;
    let p = horner(s, &[-0.00589515036, 0.0207959637, -0.0537838265, 0.133319244, -0.333332986]);
    let y = if a < 0.6 { (p * s).mul_add(a, a) } else { 1.0 - 2.0 / (exp(a + a) + 1.0) };
    y.copysign(x)
}

/// F3
pub fn erf(x: f32) -> f32 {
    const SMALL: [f32; 7] =
        [8.31677244e-5, -0.000813001185, 0.00519990642, -0.0268589407, 0.112836875, -0.376126319, 0.128379166];
    const LARGE: [f32; 9] = [
        7.37456389e-7,
        1.13113501e-5,
        -0.000378849683,
        0.0039941012,
        -0.0247745123,
        0.107858211,
        0.633663297,
        1.12938178,
        -0.000150613705,
    ];
    let a = if x.abs() > 4.0 { 4.0 } else { x.abs() };
    let y = if a < 0.92 { horner(a * a, &SMALL).mul_add(a, a) } else { 1.0 - exp(-horner(a, &LARGE)) };
    y.copysign(x)
}

/// F4 to F7
pub fn act(kind: Activation, x: f32) -> f32 {
    match kind {
        Activation::Silu => x / (1.0 + exp(-x)),
        Activation::GeluTanh => (0.5 * x) * (1.0 + tanh(x * (x * x).mul_add(0.0356774081, 0.797884561))),
        Activation::Gelu => (0.5 * x) * (1.0 + erf(x * 0.707106781)),
        Activation::Relu if x > 0.0 || x.is_nan() => x,
        Activation::Relu => 0.0,
    }
}

/// F8: act(gate)·up; without a gate act(up).
pub fn activate(kind: Activation, up: &[f32], gate: Option<&[f32]>) -> Vec<f32> {
    match gate {
        Some(gate) => gate.iter().zip(up).map(|(gate, up)| act(kind, *gate) * up).collect(),
        None => up.iter().map(|up| act(kind, *up)).collect(),
    }
}
