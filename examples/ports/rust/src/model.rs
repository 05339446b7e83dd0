//! Rules C1, B, D and E: what a model is, and what a call computes.

use crate::arithmetic::*;
use crate::attention::Heads;
use crate::cache::Cache;
use crate::{fail, Result};
use std::collections::HashMap;

#[derive(Clone, Copy, PartialEq)]
pub enum Norm {
    Rms,
    Layer,
    None,
}

#[derive(Clone, Copy)]
pub enum Pairs {
    Halves,
    Neighbours,
}

#[derive(Clone, Copy)]
pub enum Activation {
    Silu,
    GeluTanh,
    Gelu,
    Relu,
}

#[derive(Clone)]
pub struct Rope {
    pub base: f64,
    pub divisors: Option<Vec<f64>>,
}

/// C1
#[derive(Clone)]
pub struct Config {
    pub n_layers: usize,
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub head_dim: usize,
    pub d_model: usize,
    pub d_ff: usize,
    pub vocab_size: usize,
    pub n_ctx: usize,
    pub norm: Norm,
    pub norm_eps: f32,
    pub rope: Option<Rope>,
    pub rope_pairs: Pairs,
    pub learned_positions: bool,
    pub activation: Activation,
    pub gated_mlp: bool,
    pub attn_scale: f32,
    pub embed_scale: f32,
    pub window: Option<usize>,
    pub sliding: Vec<bool>,
    pub rope_local: Option<Rope>,
    pub qkv_bias: bool,
    pub out_bias: bool,
    pub mlp_bias: bool,
    pub qk_norm: bool,
    pub post_norms: bool,
    pub tied_head: bool,
}

impl Config {
    fn slides(&self, layer: usize) -> bool {
        self.sliding.get(layer) == Some(&true)
    }
    pub fn window_of(&self, layer: usize) -> Option<usize> {
        self.window.filter(|_| self.slides(layer))
    }
    fn rope_of(&self, layer: usize) -> Option<&Rope> {
        self.rope_local.as_ref().filter(|_| self.slides(layer)).or(self.rope.as_ref())
    }
}

pub struct Model {
    pub config: Config,
    /// By the names of C2. Their shapes fit the config, so an array is there exactly if its field says so.
    pub arrays: HashMap<String, Tensor>,
}

/// D1: `head` none: all heads.
#[derive(Clone, Copy)]
pub struct Cut {
    pub layer: usize,
    pub head: Option<usize>,
    pub dst: usize,
    pub src: usize,
}

/// Is shown every state of a call, by the name of B5 without its step: `layer0.q`.
pub type See<'a> = dyn FnMut(String, &[f32]) + 'a;

/// A model and a cache.
pub struct Session<'m> {
    pub model: &'m Model,
    pub cache: Cache,
}

impl<'m> Session<'m> {
    pub fn new(model: &'m Model) -> Session<'m> {
        let c = &model.config;
        Session { model, cache: Cache::new(c.n_layers, c.n_ctx, c.n_kv_heads * c.head_dim) }
    }

    /// B1: the logits [T, V] of the tokens that follow what the cache holds. A call that is refused changes nothing (E2).
    pub fn call(&mut self, tokens: &[i64], cuts: &[Cut], see: &mut See) -> Result<Vec<f32>> {
        self.check(tokens, cuts)?;
        let result = self.forward(tokens, cuts, see);
        if result.is_err() {
            self.cache.roll_back();
        }
        result
    }

    /// E1, K5, D1, in this order.
    fn check(&mut self, tokens: &[i64], cuts: &[Cut]) -> Result<()> {
        let (c, start, stop) = (&self.model.config, self.cache.length, self.cache.length + tokens.len());
        if tokens.is_empty() {
            return fail("EmptyPromptError", "a call without a token");
        }
        if let Some(token) = tokens.iter().find(|token| !(0..c.vocab_size as i64).contains(token)) {
            return fail("TokenError", format!("token {token} of {}", c.vocab_size));
        }
        self.cache.begin(tokens.len())?;
        let reads = |cut: &Cut| (first_read(cut.dst, c.window_of(cut.layer))..=cut.dst).contains(&cut.src);
        let is_here = |cut: &Cut| {
            let head = cut.head.unwrap_or(0);
            cut.layer < c.n_layers && head < c.n_heads && (start..stop).contains(&cut.dst) && reads(cut)
        };
        if cuts.iter().all(is_here) {
            Ok(())
        } else {
            fail("EditError", "no such edge in this call")
        }
    }

    fn forward(&mut self, tokens: &[i64], cuts: &[Cut], see: &mut See) -> Result<Vec<f32>> {
        let (t, start) = (tokens.len(), self.cache.length);
        let mut x = self.embed(tokens, start);
        for l in 0..self.model.config.n_layers {
            self.layer(l, start, &mut x, cuts, see)?;
        }
        self.cache.commit()?;
        let head = if self.model.config.tied_head { "embed" } else { "head" };
        let logits = linear(t, &self.norm(&x, "final_norm"), self.array(head), None); // B4
        see("logits".into(), &logits);
        Ok(logits)
    }

    /// L3
    fn embed(&self, tokens: &[i64], start: usize) -> Vec<f32> {
        let (d, scale) = (self.model.config.d_model, self.model.config.embed_scale);
        let row = |name: &str, n: usize| self.array(name).data[n * d..][..d].to_vec();
        let mut x = vec![];
        for (t, token) in tokens.iter().enumerate() {
            let mut at = row("embed", *token as usize);
            if scale != 1.0 {
                at.iter_mut().for_each(|x| *x *= scale);
            }
            if self.model.config.learned_positions {
                add(&mut at, &row("pos_embed", start + t));
            }
            x.extend(at);
        }
        x
    }

    /// B1: a layer adds attention and then the MLP to x [T, D], whose first position is `start`.
    pub fn layer(&mut self, l: usize, start: usize, x: &mut [f32], cuts: &[Cut], see: &mut See) -> Result<()> {
        let see = &mut |site: &str, values: &[f32]| see(format!("layer{l}.{site}"), values);
        see("resid_pre", x);
        let attn_out = self.attention(l, start, x, cuts, see)?;
        see("attn_out", &attn_out);
        add(x, &attn_out);
        see("resid_mid", x);
        let mlp_out = self.mlp(l, x, see);
        see("mlp_out", &mlp_out);
        add(x, &mlp_out);
        see("resid_post", x);
        Ok(())
    }

    /// B2
    fn attention(
        &mut self,
        l: usize,
        start: usize,
        x: &[f32],
        cuts: &[Cut],
        see: &mut dyn FnMut(&str, &[f32]),
    ) -> Result<Vec<f32>> {
        let c = &self.model.config;
        let t = x.len() / c.d_model;
        let h = self.norm(x, &in_layer(l, "attn_norm"));
        see("ln1", &h);
        let mut q = self.linear(l, t, &h, "wq", "bq");
        let mut k = self.linear(l, t, &h, "wk", "bk");
        let v = self.linear(l, t, &h, "wv", "bv");
        if c.qk_norm {
            q = rms_norm(&q, &self.array(&in_layer(l, "q_norm")).data, c.norm_eps);
            k = rms_norm(&k, &self.array(&in_layer(l, "k_norm")).data, c.norm_eps);
        }
        if let Some(settings) = c.rope_of(l) {
            let (cos, sin) = rope_table(settings, c.head_dim, start, t);
            rope(&mut q, c.head_dim, &cos, &sin, c.rope_pairs);
            rope(&mut k, c.head_dim, &cos, &sin, c.rope_pairs);
        }
        see("q", &q);
        see("k", &k);
        see("v", &v);
        self.cache.write(l, start, &k, &v)?; // A1
        let (keys, values) = self.cache.read(l, start + t)?;
        let heads = Heads {
            n_heads: c.n_heads,
            n_kv_heads: c.n_kv_heads,
            head_dim: c.head_dim,
            scale: c.attn_scale,
            window: c.window_of(l),
        };
        let is_cut = |h, dst, src| {
            cuts.iter().any(|c| (c.layer, c.dst, c.src) == (l, dst, src) && c.head.unwrap_or(h) == h)
        };
        let attention = heads.attention(&q, keys, values, start, is_cut);
        for h in 0..c.n_heads {
            let square = |x, empty| by_slot(x, start, t, heads.window, empty);
            see(&format!("head{h}.scores"), &square(&attention.scores[h], f32::NEG_INFINITY));
            see(&format!("head{h}.pattern"), &square(&attention.pattern[h], 0.0));
        }
        see("z", &attention.z);
        let attn_out = self.linear(l, t, &attention.z, "wo", "bo");
        Ok(self.post_norm(attn_out, &in_layer(l, "post_attn_norm")))
    }

    /// B3
    fn mlp(&self, l: usize, x: &[f32], see: &mut dyn FnMut(&str, &[f32])) -> Vec<f32> {
        let c = &self.model.config;
        let t = x.len() / c.d_model;
        let h = self.norm(x, &in_layer(l, "mlp_norm"));
        see("ln2", &h);
        let gate = c.gated_mlp.then(|| self.linear(l, t, &h, "w_gate", "b_gate"));
        gate.iter().for_each(|gate| see("gate", gate));
        let up = self.linear(l, t, &h, "w_up", "b_up");
        see("up", &up);
        let units = activate(c.activation, &up, gate.as_deref());
        see("act", &units);
        self.post_norm(self.linear(l, t, &units, "w_down", "b_down"), &in_layer(l, "post_mlp_norm"))
    }

    fn array(&self, name: &str) -> &'m Tensor {
        &self.model.arrays[name]
    }

    fn linear(&self, l: usize, t: usize, x: &[f32], w: &str, b: &str) -> Vec<f32> {
        linear(t, x, self.array(&in_layer(l, w)), self.model.arrays.get(&in_layer(l, b)))
    }

    /// C1: the norm before each sublayer and before the head.
    fn norm(&self, x: &[f32], name: &str) -> Vec<f32> {
        let eps = self.model.config.norm_eps;
        match self.model.config.norm {
            Norm::Rms => rms_norm(x, &self.array(name).data, eps),
            Norm::Layer => {
                layer_norm(x, &self.array(name).data, &self.array(&format!("{name}_bias")).data, eps)
            }
            Norm::None => x.to_vec(),
        }
    }

    fn post_norm(&self, x: Vec<f32>, name: &str) -> Vec<f32> {
        if self.model.config.post_norms {
            rms_norm(&x, &self.array(name).data, self.model.config.norm_eps)
        } else {
            x
        }
    }
}

fn in_layer(l: usize, name: &str) -> String {
    format!("blocks.{l}.{name}")
}

/// T1
fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// B5: a head's [R] as [T, S], with `empty` where nothing is read.
fn by_slot(x: &[f32], start: usize, t: usize, window: Option<usize>, empty: f32) -> Vec<f32> {
    let mut square = vec![empty; t * (start + t)];
    for ((dst, src), x) in reads(start, t, window).into_iter().zip(x) {
        square[(dst - start) * (start + t) + src] = *x;
    }
    square
}
