//! Rules C1 to C4: the shape of a model, and of its arrays.

use crate::json::Json;
use crate::model::{Activation, Config, Norm, Pairs, Rope};
use crate::{fail, Result};

const FIELDS: &str = "n_layers n_heads n_kv_heads head_dim d_model d_ff vocab_size n_ctx norm norm_eps rope rope_pairs \
    learned_positions activation gated_mlp attn_scale embed_scale window sliding rope_local qkv_bias out_bias mlp_bias \
    qk_norm post_norms tied_head";

const NULLABLE: [&str; 4] = ["rope", "rope_local", "window", "attn_scale"];

fn wrong<T>(field: &str) -> Result<T> {
    fail("ConfigError", format!("`{field}` is missing or not what C1 and C3 allow"))
}

/// C1 with its defaults, and C3.
pub fn config(json: &Json) -> Result<Config> {
    let size = |name: &str| json.get(name).size().filter(|n| *n > 0).map_or_else(|| wrong(name), Ok);
    let bool = |name: &str, default: bool| match json.get(name) {
        Json::Null => Ok(default),
        value => value.bool().map_or_else(|| wrong(name), Ok),
    };
    let number = |name: &str, default: f64, allowed: fn(f64) -> bool| match json.get(name) {
        Json::Null => Ok(default),
        value => value.number().filter(|x| x.is_finite() && allowed(*x)).map_or_else(|| wrong(name), Ok),
    };
    let name = |field: &str, default: &str| match json.get(field) {
        Json::Null => default.to_string(),
        value => value.text().unwrap_or("").to_string(),
    };
    if let Some((field, _)) = json.pairs().iter().find(|pair| !FIELDS.split(' ').any(|field| field == pair.0)) {
        return wrong(field);
    }
    if let Some((field, _)) =
        json.pairs().iter().find(|pair| pair.1.is_null() && !NULLABLE.contains(&pair.0.as_str()))
    {
        return wrong(field);
    }
    let head_dim = size("head_dim")?;
    let config = Config {
        n_layers: size("n_layers")?,
        n_heads: size("n_heads")?,
        n_kv_heads: size("n_kv_heads")?,
        head_dim,
        d_model: size("d_model")?,
        d_ff: json.get("d_ff").size().map_or_else(|| wrong("d_ff"), Ok)?,
        vocab_size: size("vocab_size")?,
        n_ctx: size("n_ctx")?,
        norm: match name("norm", "rms").as_str() {
            "rms" => Norm::Rms,
            "layer" => Norm::Layer,
            "none" => Norm::None,
            _ => return wrong("norm"),
        },
        norm_eps: number("norm_eps", 1e-5, |x| x >= 0.0)? as f32,
        rope: rope(json, "rope", head_dim)?,
        rope_pairs: match name("rope_pairs", "halves").as_str() {
            "halves" => Pairs::Halves,
            "neighbours" => Pairs::Neighbours,
            _ => return wrong("rope_pairs"),
        },
        learned_positions: bool("learned_positions", false)?,
        activation: match name("activation", "silu").as_str() {
            "silu" => Activation::Silu,
            "gelu_tanh" => Activation::GeluTanh,
            "gelu" => Activation::Gelu,
            "relu" => Activation::Relu,
            _ => return wrong("activation"),
        },
        gated_mlp: bool("gated_mlp", true)?,
        attn_scale: number("attn_scale", 1.0 / (head_dim as f64).sqrt(), |x| x > 0.0)? as f32,
        embed_scale: number("embed_scale", 1.0, |_| true)? as f32,
        window: (!json.get("window").is_null()).then(|| size("window")).transpose()?,
        sliding: {
            let all: Option<Vec<bool>> = json.get("sliding").items().iter().map(Json::bool).collect();
            all.map_or_else(|| wrong("sliding"), Ok)?
        },
        rope_local: rope(json, "rope_local", head_dim)?,
        qkv_bias: bool("qkv_bias", false)?,
        out_bias: bool("out_bias", false)?,
        mlp_bias: bool("mlp_bias", false)?,
        qk_norm: bool("qk_norm", false)?,
        post_norms: bool("post_norms", false)?,
        tied_head: bool("tied_head", true)?,
    };
    if config.n_heads % config.n_kv_heads != 0 {
        return wrong("n_kv_heads");
    }
    if !config.sliding.is_empty() && config.sliding.len() != config.n_layers {
        return wrong("sliding");
    }
    if config.sliding.contains(&true) && config.window.is_none() {
        return wrong("window");
    }
    if config.post_norms && config.norm != Norm::Rms {
        return wrong("post_norms");
    }
    Ok(config)
}

fn rope(json: &Json, field: &str, head_dim: usize) -> Result<Option<Rope>> {
    let (json, positive) = (json.get(field), |x: &f64| *x > 0.0 && x.is_finite());
    if json.is_null() {
        return Ok(None);
    }
    let Some(base) = json.get("base").number().filter(positive) else { return wrong(field) };
    let mut divisors = None;
    if !json.get("divisors").is_null() {
        divisors = json.get("divisors").items().iter().map(|d| d.number().filter(positive)).collect();
        if divisors.as_ref().map(Vec::len) != Some(head_dim / 2) {
            return wrong(field);
        }
    }
    if head_dim % 2 != 0 {
        wrong("head_dim")
    } else {
        Ok(Some(Rope { base, divisors }))
    }
}

/// C2: the arrays that a model has, and their shapes.
pub fn shapes(c: &Config) -> Vec<(String, Vec<usize>)> {
    let (d, f, hd) = (c.d_model, c.d_ff, c.head_dim);
    let (q, kv) = (c.n_heads * hd, c.n_kv_heads * hd);
    let normed = c.norm != Norm::None;
    let shifted = c.norm == Norm::Layer;
    let mut all = vec![];
    let mut put = |there: bool, name: String, shape: &[usize]| {
        if there {
            all.push((name, shape.to_vec()))
        }
    };
    put(true, "embed".into(), &[c.vocab_size, d]);
    put(c.learned_positions, "pos_embed".into(), &[c.n_ctx, d]);
    for l in 0..c.n_layers {
        let mut put =
            |there: bool, name: &str, shape: &[usize]| put(there, format!("blocks.{l}.{name}"), shape);
        for norm in ["attn_norm", "mlp_norm"] {
            put(normed, norm, &[d]);
            put(shifted, &format!("{norm}_bias"), &[d]);
        }
        for (name, n) in [("q", q), ("k", kv), ("v", kv)] {
            put(true, &format!("w{name}"), &[n, d]);
            put(c.qkv_bias, &format!("b{name}"), &[n]);
        }
        put(true, "wo", &[d, q]);
        put(c.out_bias, "bo", &[d]);
        put(c.gated_mlp, "w_gate", &[f, d]);
        put(c.gated_mlp && c.mlp_bias, "b_gate", &[f]);
        put(true, "w_up", &[f, d]);
        put(c.mlp_bias, "b_up", &[f]);
        put(true, "w_down", &[d, f]);
        put(c.mlp_bias, "b_down", &[d]);
        put(c.qk_norm, "q_norm", &[hd]);
        put(c.qk_norm, "k_norm", &[hd]);
        put(c.post_norms, "post_attn_norm", &[d]);
        put(c.post_norms, "post_mlp_norm", &[d]);
    }
    put(normed, "final_norm".into(), &[d]);
    put(shifted, "final_norm_bias".into(), &[d]);
    put(!c.tied_head, "head".into(), &[c.vocab_size, d]);
    all
}

/// C2: nothing missing, nothing that nobody asked for, every shape as it should be.
pub fn check_shapes(config: &Config, found: &[(String, Vec<usize>)]) -> Result<()> {
    let expected = shapes(config);
    if let Some(array) = expected.iter().find(|array| !found.contains(array)) {
        return fail("WeightsError", format!("{array:?} is missing or has another shape"));
    }
    if found.len() > expected.len() {
        return fail("WeightsError", "an array that nobody asked for");
    }
    Ok(())
}
