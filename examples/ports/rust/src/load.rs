//! Rules C4 and C5: a model from nanokv's own folder, from Hugging Face's, or from a GGUF file.

use crate::arithmetic::{frequencies, Tensor};
use crate::config::{check_shapes, config, shapes};
use crate::files::{gguf, safetensors, File};
use crate::json::{self, Json};
use crate::model::{Config, Model, Rope};
use crate::{fail, Result};
use std::collections::HashMap;
use std::path::Path;

pub fn load(path: &Path) -> Result<Model> {
    if path.is_file() {
        return from_gguf(gguf(read(path)?)?);
    }
    let about = json::parse(&String::from_utf8_lossy(&read(&path.join("config.json"))?))?;
    if path.join("model.safetensors").exists() {
        return from_hugging_face(&about, safetensors(read(&path.join("model.safetensors"))?)?);
    }
    let (config, file) = (config(&about)?, safetensors(read(&path.join("weights.safetensors"))?)?);
    let found: Vec<_> = file.arrays.iter().map(|array| (array.name.clone(), array.shape.clone())).collect();
    check_shapes(&config, &found)?;
    assemble(config, |name| file.find(name))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).or_else(|error| fail("FileFormatError", format!("{}: {error}", path.display())))
}

/// C2: the arrays that the config asks for.
fn assemble(config: Config, find: impl Fn(&str) -> Option<Tensor>) -> Result<Model> {
    let mut arrays = HashMap::new();
    for (name, shape) in shapes(&config) {
        match find(&name) {
            Some(array) if array.shape == shape => arrays.insert(name, array),
            _ => return fail("WeightsError", format!("{name} is missing or not {shape:?}")),
        };
    }
    Ok(Model { config, arrays })
}

/// C4, C5: what an array is called in files of Hugging Face's (most families; GPT-2) and in GGUF; then comes `.weight` or
/// `.bias`.
const NAMES: [(&str, [&str; 3]); 16] = [
    ("embed", ["embed_tokens", "wte", "token_embd"]),
    ("pos_embed", ["", "wpe", "position_embd"]),
    ("final_norm", ["norm", "ln_f", "output_norm"]),
    ("head", ["lm_head", "lm_head", "output"]),
    ("attn_norm", ["input_layernorm", "ln_1", "attn_norm"]),
    ("wq", ["self_attn.q_proj", "attn.c_attn", "attn_q"]),
    ("wk", ["self_attn.k_proj", "attn.c_attn", "attn_k"]),
    ("wv", ["self_attn.v_proj", "attn.c_attn", "attn_v"]),
    ("wo", ["self_attn.o_proj", "attn.c_proj", "attn_output"]),
    ("q_norm", ["self_attn.q_norm", "", "attn_q_norm"]),
    ("k_norm", ["self_attn.k_norm", "", "attn_k_norm"]),
    ("mlp_norm", ["post_attention_layernorm", "ln_2", "ffn_norm"]),
    ("w_gate", ["mlp.gate_proj", "", "ffn_gate"]),
    ("w_up", ["mlp.up_proj", "mlp.c_fc", "ffn_up"]),
    ("w_down", ["mlp.down_proj", "mlp.c_proj", "ffn_down"]),
    ("post_mlp_norm", ["post_feedforward_layernorm", "", ""]),
];

/// The name in a file of C2's `blocks.3.bq`, without what stands before `layers.3.`, and C2's own name of the weight: `wq`.
fn stored_name(name: &str, column: usize, gemma: bool) -> Option<(String, &str)> {
    let (l, name) = name.strip_prefix("blocks.").and_then(|rest| rest.split_once('.')).unwrap_or(("", name));
    let weight = name.trim_end_matches("_bias");
    let is_bias = weight != name || name.starts_with('b');
    let of = |name: &str| NAMES.iter().find(|row| row.0 == name).map(|row| row.1[column]);
    let part = match name {
        "mlp_norm" if gemma => "pre_feedforward_layernorm",
        "post_attn_norm" => "post_attention_layernorm",
        _ => of(weight).or_else(|| of(&name.replacen('b', "w", 1)))?,
    };
    let prefix = if l.is_empty() { String::new() } else { format!("{}.{l}.", ["layers", "h", "blk"][column]) };
    Some((format!("{prefix}{part}.{}", if is_bias { "bias" } else { "weight" }), name))
}

fn object<const N: usize>(pairs: [(&str, Json); N]) -> Vec<(String, Json)> {
    pairs.into_iter().map(|(key, value)| (key.to_string(), value)).collect()
}

fn numbers(x: &[f64]) -> Json {
    Json::Array(x.iter().map(|x| Json::Number(*x)).collect())
}

fn text(word: &str) -> Json {
    Json::Text(word.into())
}

/// The value of the first key that is there, else the default.
fn setting(about: &Json, keys: &[&str], default: f64) -> f64 {
    keys.iter().find_map(|key| about.get(key).number()).unwrap_or(default)
}

/// C1: what a family has beside its sizes.
fn family(kind: &str, d_model: f64) -> Vec<(String, Json)> {
    let yes = Json::Bool(true);
    match kind {
        "qwen2" => object([("qkv_bias", yes)]),
        "qwen3" => object([("qk_norm", yes)]),
        "gpt2" => object([
            ("norm", text("layer")),
            ("learned_positions", yes.clone()),
            ("qkv_bias", yes.clone()),
            ("out_bias", yes.clone()),
            ("mlp_bias", yes),
            ("gated_mlp", Json::Bool(false)),
            ("activation", text("gelu_tanh")),
        ]),
        "gemma3_text" => object([
            ("qk_norm", yes.clone()),
            ("post_norms", yes),
            ("activation", text("gelu_tanh")),
            ("embed_scale", Json::Number(d_model.sqrt())),
        ]),
        _ => vec![],
    }
}

/// C4: settings that would change what is computed, and the value that changes nothing; -1: none but null.
const REFUSED: [(&str, f64); 11] = [
    ("attn_logit_softcapping", -1.0),
    ("final_logit_softcapping", -1.0),
    ("partial_rotary_factor", 1.0),
    ("num_experts", 0.0),
    ("num_local_experts", 0.0),
    ("quantization_config", -1.0),
    ("use_bidirectional_attention", 0.0),
    ("scale_attn_weights", 1.0),
    ("scale_attn_by_inverse_layer_idx", 0.0),
    ("add_cross_attention", 0.0),
    ("is_encoder_decoder", 0.0),
];
/// C5: the same of a GGUF file.
const GGUF_REFUSED: [(&str, f64); 6] = [
    ("attention.sliding_window", 0.0),
    ("expert_count", 0.0),
    ("attn_logit_softcapping", 0.0),
    ("final_logit_softcapping", 0.0),
    ("attention.causal", 1.0),
    ("use_parallel_residual", 0.0),
];

fn refuse(about: &Json, prefix: &str, refused: &[(&str, f64)]) -> Result<()> {
    for (key, harmless) in refused {
        let value = about.get(&format!("{prefix}{key}"));
        let number = value.number().or(value.bool().map(|yes| yes as u8 as f64));
        if !value.is_null() && number != Some(*harmless) {
            return fail("ConfigError", format!("{key} is not what this port computes"));
        }
    }
    Ok(())
}

/// C4
fn from_hugging_face(about: &Json, file: File) -> Result<Model> {
    let kind = about.get("model_type").text().unwrap_or("");
    if !["llama", "mistral", "qwen2", "qwen3", "gpt2", "gemma3_text"].contains(&kind) {
        return fail("ConfigError", format!("model_type {kind}"));
    }
    refuse(about, "", &REFUSED)?;
    let config = hugging_face_config(about, kind)?;
    let (gemma, gpt2) = (kind == "gemma3_text", kind == "gpt2");
    let prefix = if gpt2 { "transformer." } else { "model." };
    let stored = |name: &str| stored_name(name, gpt2 as usize, gemma).map_or(String::new(), |found| found.0);
    let mut known: Vec<String> = shapes(&config).iter().map(|array| stored(&array.0)).collect();
    known.push("lm_head.weight".into());
    let passed_over = |name: &str| {
        ["rotary_emb.inv_freq", "attn.bias", "attn.masked_bias"].iter().any(|end| name.ends_with(end))
    };
    for array in &file.arrays {
        let name = array.name.strip_prefix(prefix).unwrap_or(&array.name);
        if !known.iter().any(|known| known == name) && !passed_over(name) {
            return fail("WeightsError", format!("nobody asked for {name}"));
        }
    }
    assemble(config, |name| {
        let (stored, name) = stored_name(name, gpt2 as usize, gemma)?;
        let prefixed = format!("{prefix}{stored}");
        let mut array = file.find(&stored).or_else(|| file.find(&prefixed))?;
        if gpt2 && name.starts_with('w') {
            array = transposed(array)?;
        }
        if gpt2 && is_qkv(name) {
            array = third_of(array, name);
        }
        if gemma && name.ends_with("norm") {
            array.data.iter_mut().for_each(|w| *w += 1.0); // M3
        }
        Some(array)
    })
}

fn is_qkv(name: &str) -> bool {
    matches!(name, "wq" | "wk" | "wv" | "bq" | "bk" | "bv")
}

/// GPT-2 stores matrices as [inputs, outputs].
fn transposed(w: Tensor) -> Option<Tensor> {
    let &[n_in, n_out] = &w.shape[..] else { return None };
    let data =
        (0..n_out).flat_map(|n| (0..n_in).map(move |k| (n, k))).map(|(n, k)| w.data[k * n_out + n]).collect();
    Some(Tensor { shape: vec![n_out, n_in], data })
}

/// GPT-2 keeps q, k and v in one array.
fn third_of(array: Tensor, name: &str) -> Tensor {
    let (i, n) = ("qkv".find(&name[1..]).unwrap(), array.data.len() / 3);
    let mut shape = array.shape;
    shape[0] /= 3;
    Tensor { shape, data: array.data[i * n..][..n].to_vec() }
}

/// C4: the second table.
fn hugging_face_config(about: &Json, kind: &str) -> Result<Config> {
    let get = |keys: &[&str], default| setting(about, keys, default);
    let none = f64::NAN; // C3 refuses it: a field without a default
    let (gemma, mistral, qwen) = (kind == "gemma3_text", kind == "mistral", kind.starts_with("qwen"));
    let d = get(&["hidden_size", "n_embd"], none);
    let h = get(&["num_attention_heads", "n_head"], if gemma { 8.0 } else { none });
    let kv_heads = [(mistral, 8.0), (qwen, 32.0), (gemma, 4.0)].iter().find(|row| row.0).map_or(h, |row| row.1);
    let n_ctx =
        [(mistral || gemma, 131072.0), (qwen, 32768.0)].iter().find(|row| row.0).map_or(2048.0, |row| row.1);
    let l = get(&["num_hidden_layers", "n_layer"], none);
    let wide = [("qwen3", 128.0), ("gemma3_text", 256.0)].iter().find(|row| row.0 == kind);
    let hd = get(&["head_dim"], wide.map_or(d / h, |row| row.1));
    let sizes = [
        ("n_layers", l),
        ("n_heads", h),
        ("n_kv_heads", get(&["num_key_value_heads"], kv_heads)),
        ("head_dim", hd),
        ("d_model", d),
        ("d_ff", get(&["intermediate_size", "n_inner"], if kind == "gpt2" { 4.0 * d } else { none })),
        ("vocab_size", get(&["vocab_size"], none)),
        ("n_ctx", get(&["max_position_embeddings", "n_positions"], n_ctx)),
        ("norm_eps", get(&["rms_norm_eps", "layer_norm_epsilon"], if kind == "gpt2" { 1e-5 } else { 1e-6 })),
    ];
    let mut fields = object(sizes.map(|(key, value)| (key, Json::Number(value))));
    fields.extend(family(kind, d));
    fields.retain(|field| field.0 != "activation");
    let default = if kind == "gpt2" || gemma { "gelu_pytorch_tanh" } else { "silu" };
    let act =
        ["hidden_activation", "hidden_act", "activation_function"].iter().find_map(|key| about.get(key).text());
    let act = act.unwrap_or(default);
    let act = match act {
        "gelu_new" | "gelu_pytorch_tanh" => "gelu_tanh",
        "swish" => "silu",
        "silu" | "relu" | "gelu" => act,
        _ => return fail("ConfigError", format!("the activation {act}")),
    };
    fields.extend(object([("activation", text(act))]));
    let tied = about.get("tie_word_embeddings").bool().unwrap_or(gemma || kind == "gpt2");
    fields.extend(object([("tied_head", Json::Bool(tied))]));
    let on = |key: &str| Json::Bool(about.get(key).bool() == Some(true));
    if matches!(kind, "llama" | "qwen3" | "gemma3_text") {
        let attention = on("attention_bias");
        fields.extend(object([("qkv_bias", attention.clone()), ("out_bias", attention)]));
    }
    if kind == "llama" {
        fields.extend(object([("mlp_bias", on("mlp_bias"))]));
    }
    if kind != "gpt2" {
        let both = about.get("rope_parameters");
        let one = if both.get("full_attention").is_null() { both } else { both.get("full_attention") };
        let scaling = if one.is_null() { about.get("rope_scaling") } else { one };
        let base = setting(scaling, &["rope_theta"], get(&["rope_theta"], if gemma { 1e6 } else { 1e4 }));
        fields.extend(object([("rope", rope(base, scaling, hd as usize)?)]));
    }
    let no_window = about.pairs().iter().any(|pair| pair.0 == "sliding_window" && pair.1.is_null());
    if gemma || !no_window && (mistral || qwen && about.get("use_sliding_window").bool() == Some(true)) {
        let (pattern, full) = (get(&["sliding_window_pattern"], 6.0), get(&["max_window_layers"], 28.0));
        let slides = |l: f64| if gemma { (l + 1.0) % pattern != 0.0 } else { mistral || l >= full };
        let sliding = match about.get("layer_types").items() {
            [] => (0..l as usize).map(|l| Json::Bool(slides(l as f64))).collect(),
            types => types.iter().map(|kind| Json::Bool(kind.text() == Some("sliding_attention"))).collect(),
        };
        let window = Json::Number(get(&["sliding_window"], 4096.0));
        fields.extend(object([("window", window), ("sliding", Json::Array(sliding))]));
    }
    if gemma {
        let local = about.get("rope_parameters").get("sliding_attention");
        let base = setting(local, &["rope_theta"], get(&["rope_local_base_freq"], 1e4));
        fields.extend(object([
            ("rope_local", rope(base, local, hd as usize)?),
            ("attn_scale", Json::Number(1.0 / get(&["query_pre_attn_scalar"], 256.0).sqrt())),
        ]));
    }
    config(&Json::Object(fields))
}

/// C4: `rope_scaling` as divisors.
fn rope(base: f64, scaling: &Json, head_dim: usize) -> Result<Json> {
    let get = |key: &str| setting(scaling, &[key], f64::NAN);
    let plain = frequencies(&Rope { base, divisors: None }, head_dim);
    let divisors = match scaling.get("rope_type").text().or(scaling.get("type").text()).unwrap_or("default") {
        "default" => Json::Null,
        "linear" => numbers(&vec![get("factor"); plain.len()]),
        "llama3" => {
            let (low, high) = (get("low_freq_factor"), get("high_freq_factor"));
            let divisor = |frequency: &f64| {
                let w = get("original_max_position_embeddings") * frequency / (2.0 * std::f64::consts::PI);
                let m = ((w - low) / (high - low)).clamp(0.0, 1.0);
                1.0 / ((1.0 - m) / get("factor") + m)
            };
            numbers(&plain.iter().map(divisor).collect::<Vec<_>>())
        }
        other => return fail("ConfigError", format!("rope_type {other}")),
    };
    Ok(Json::Object(object([("base", Json::Number(base)), ("divisors", divisors)])))
}

/// C5: a GGUF model.
fn from_gguf(file: File) -> Result<Model> {
    let pairs = Json::Object(file.pairs.clone());
    let kind = pairs.get("general.architecture").text().unwrap_or("");
    if !["llama", "qwen2", "qwen3", "gpt2"].contains(&kind) {
        return fail("ConfigError", format!("architecture {kind}"));
    }
    refuse(&pairs, &format!("{kind}."), &GGUF_REFUSED)?;
    let get = |key: &str, default: f64| setting(&pairs, &[&format!("{kind}.{key}")], default);
    let (d, h) = (get("embedding_length", f64::NAN), get("attention.head_count", f64::NAN));
    let rows =
        file.arrays.iter().find(|array| array.name == "token_embd.weight").map_or(0, |array| array.shape[0]);
    let vocab = match pairs.get("tokenizer.ggml.tokens").items().len() {
        0 => rows,
        tokens => tokens,
    };
    let eps = if kind == "gpt2" { "attention.layer_norm_epsilon" } else { "attention.layer_norm_rms_epsilon" };
    let sizes = [
        ("n_layers", get("block_count", f64::NAN)),
        ("n_heads", h),
        ("n_kv_heads", get("attention.head_count_kv", h)),
        ("head_dim", get("attention.key_length", d / h)),
        ("d_model", d),
        ("d_ff", get("feed_forward_length", f64::NAN)),
        ("n_ctx", get("context_length", f64::NAN)),
        ("vocab_size", get("vocab_size", vocab as f64)),
        ("norm_eps", get(eps, f64::NAN)),
    ];
    let mut fields = object(sizes.map(|(key, value)| (key, Json::Number(value))));
    fields.extend(family(kind, d));
    fields.extend(object([("tied_head", Json::Bool(!file.arrays.iter().any(|a| a.name == "output.weight")))]));
    let has = |name: &str| Json::Bool(file.arrays.iter().any(|array| array.name == name));
    fields.extend(object([
        // what the family says stands before these
        ("qkv_bias", has("blk.0.attn_q.bias")),
        ("out_bias", has("blk.0.attn_output.bias")),
        ("mlp_bias", has("blk.0.ffn_up.bias")),
    ]));
    if get("attention.scale", 0.0) != 0.0 {
        fields.extend(object([("attn_scale", Json::Number(get("attention.scale", 0.0)))]));
    }
    if kind != "gpt2" {
        let scaling = pairs.get(&format!("{kind}.rope.scaling.type")).text().unwrap_or("linear");
        if !["linear", "none", ""].contains(&scaling) {
            return fail("ConfigError", format!("rope.scaling.type {scaling}"));
        }
        let factors = ["rope.scaling.factor", "rope.scale_linear"].map(|key| get(key, 0.0));
        let factor = factors.into_iter().find(|f| *f != 0.0 && scaling != "none").unwrap_or(1.0);
        let stored = file.find("rope_freqs.weight").map(|d| d.data);
        let all: Vec<f64> = match stored {
            Some(stored) => stored.iter().map(|d| factor * *d as f64).collect(),
            None => vec![factor; (get("attention.key_length", d / h) / 2.0) as usize],
        };
        let divisors = if all.iter().all(|d| *d == 1.0) { Json::Null } else { numbers(&all) };
        let base = Json::Number(get("rope.freq_base", 10000.0));
        fields.extend(object([("rope", Json::Object(object([("base", base), ("divisors", divisors)])))]));
    }
    if kind == "llama" {
        fields.extend(object([("rope_pairs", text("neighbours"))]));
    }
    assemble(config(&Json::Object(fields))?, |name| {
        let (stored, name) = stored_name(name, 2, false)?;
        if kind == "gpt2" && is_qkv(name) {
            let all = file.find(&stored.replace(&format!("attn_{}", &name[1..]), "attn_qkv"))?;
            return Some(third_of(all, name));
        }
        file.find(&stored)
    })
}
