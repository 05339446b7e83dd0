//! Rules A: attention over what the cache holds.

use crate::arithmetic::{dot, exp, first_read, kv_head, maximum, sum};

/// Scores and weights [H, R] in the order of I3, and z [T, H, hd].
pub struct Attention {
    pub scores: Vec<Vec<f32>>,
    pub pattern: Vec<Vec<f32>>,
    pub z: Vec<f32>,
}

/// The heads of a layer.
pub struct Heads {
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub head_dim: usize,
    pub scale: f32,
    pub window: Option<usize>,
}

impl Heads {
    /// q [T, H, hd] are the positions from `start` on; k and v are the cache's [S, G, hd]. D1: `is_cut(head, dst, src)`.
    pub fn attention(
        &self,
        q: &[f32],
        k: &[f32],
        v: &[f32],
        start: usize,
        is_cut: impl Fn(usize, usize, usize) -> bool,
    ) -> Attention {
        let nothing = vec![vec![]; self.n_heads];
        let mut all = Attention { scores: nothing.clone(), pattern: nothing, z: vec![] };
        for (n, q) in q.chunks(self.head_dim).enumerate() {
            let (dst, h) = (start + n / self.n_heads, n % self.n_heads);
            let (scores, weights, z) = self.attend(h, q, dst, k, v, |src| is_cut(h, dst, src));
            all.scores[h].extend(scores);
            all.pattern[h].extend(weights);
            all.z.extend(z);
        }
        all
    }

    /// Scores, weights and z of one query head at one position. Only what it reads is touched (A6).
    fn attend(
        &self,
        h: usize,
        q: &[f32],
        dst: usize,
        k: &[f32],
        v: &[f32],
        is_cut: impl Fn(usize) -> bool,
    ) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let (first, g) = (first_read(dst, self.window), kv_head(h, self.n_heads, self.n_kv_heads));
        let at = |src: usize| (src * self.n_kv_heads + g) * self.head_dim;
        // A2, D1
        let score = |src| match is_cut(src) {
            true => f32::NEG_INFINITY,
            false => dot(q, &k[at(src)..][..self.head_dim]) * self.scale,
        };
        let scores: Vec<f32> = (first..=dst).map(score).collect();
        // A3
        let top = Some(maximum(&scores)).filter(|top| *top > f32::NEG_INFINITY).unwrap_or(0.0);
        let e: Vec<f32> = scores.iter().map(|score| exp(score - top)).collect();
        let total = Some(sum(&e, first)).filter(|total| *total != 0.0).unwrap_or(1.0);
        // A4
        let mut z = vec![0.0; self.head_dim];
        for src in (first..=dst).filter(|src| !is_cut(*src)) {
            let value = &v[at(src)..][..self.head_dim];
            z.iter_mut().zip(value).for_each(|(z, v)| *z = e[src - first].mul_add(*v, *z));
        }
        z.iter_mut().for_each(|z| *z /= total);
        // A5
        (scores, e.iter().map(|e| e / total).collect(), z)
    }
}
