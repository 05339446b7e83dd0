//! A port of nanokv, written from tests/conformance/SPEC.md and the vectors alone; labels such as A2 are its rules.
//! This page is the suite's door: one JSON request a line on standard input, one answer a line on standard output.

mod arithmetic;
mod attention;
mod cache;
mod choose;
mod config;
mod files;
mod json;
mod load;
mod model;

use arithmetic::*;
use attention::Heads;
use cache::Cache;
use choose::*;
use json::{quoted, Json};
use model::{Activation, Cut, Model, Pairs, Rope, Session};
use std::collections::{HashMap, HashSet};
use std::io::{BufRead, Write};

/// A refusal: its name in SPEC.md, and why.
#[derive(Debug)]
pub struct Error {
    kind: &'static str,
    message: String,
}
pub type Result<T> = std::result::Result<T, Error>;

pub fn fail<T>(kind: &'static str, message: impl Into<String>) -> Result<T> {
    Err(Error { kind, message: message.into() })
}

/// An output, as it is printed.
enum Output {
    Floats(Vec<f32>),
    Ints(Vec<i64>),
    Texts(Vec<String>),
}
use Output::*;

impl Output {
    fn printed(&self) -> String {
        match self {
            Floats(x) => {
                format!("\"{}\"", x.iter().map(|x| format!("{:08x}", x.to_bits())).collect::<String>())
            }
            Ints(x) => format!("{x:?}"),
            Texts(x) => format!("[{}]", x.iter().map(|x| quoted(x)).collect::<Vec<_>>().join(",")),
        }
    }
}
type Outputs = Vec<(String, Output)>;

fn ints(x: impl IntoIterator<Item = usize>) -> Output {
    Ints(x.into_iter().map(|x| x as i64).collect())
}

fn main() {
    let mut port = Port::default();
    for line in std::io::stdin().lock().lines() {
        let Ok(line) = line else { break };
        let request = json::parse(&line).unwrap_or(Json::Null);
        let id = quoted(request.get("id").text().unwrap_or(""));
        let answer = match port.answer(&request) {
            Ok(Some(outputs)) => {
                let all: Vec<_> =
                    outputs.iter().map(|(k, v)| format!("{}:{}", quoted(k), v.printed())).collect();
                format!("\"outputs\":{{{}}}", all.join(","))
            }
            Ok(None) => "\"skip\":\"not in this port\"".into(),
            Err(e) => format!("\"error\":{},\"message\":{}", quoted(e.kind), quoted(&e.message)),
        };
        println!("{{\"id\":{id},{answer}}}");
        std::io::stdout().flush().unwrap();
    }
}

/// The inputs of a request. What the runner doesn't send is no matter of SPEC.md: a panic.
struct Inputs<'a>(&'a Json);

impl Inputs<'_> {
    fn has(&self, name: &str) -> bool {
        !self.0.get(name).is_null()
    }
    fn size(&self, name: &str) -> usize {
        self.optional_size(name).unwrap_or_else(|| panic!("no {name}"))
    }
    fn optional_size(&self, name: &str) -> Option<usize> {
        self.0.get(name).size()
    }
    fn sizes(&self, name: &str) -> Vec<usize> {
        self.0.get(name).sizes().unwrap()
    }
    fn ints(&self, name: &str) -> Vec<i64> {
        ints_of(self.0.get(name))
    }
    fn number(&self, name: &str) -> f64 {
        self.0.get(name).number().unwrap_or_else(|| panic!("no {name}"))
    }
    fn text(&self, name: &str) -> &str {
        self.0.get(name).text().unwrap_or_else(|| panic!("no {name}"))
    }
    fn tensor(&self, name: &str) -> Tensor {
        let array = self.0.get(name);
        let data = array.get("f32").items().iter().map(|x| x.number().unwrap() as f32).collect();
        Tensor { shape: array.get("shape").sizes().unwrap(), data }
    }
    fn data(&self, name: &str) -> Vec<f32> {
        self.tensor(name).data
    }
    fn bytes(&self, name: &str) -> Vec<u8> {
        let digits = self.text(name).as_bytes().chunks(2).map(|d| std::str::from_utf8(d).unwrap());
        digits.map(|d| u8::from_str_radix(d, 16).unwrap()).collect()
    }
    fn pairs(&self) -> Pairs {
        if self.text("pairs") == "halves" {
            Pairs::Halves
        } else {
            Pairs::Neighbours
        }
    }
    fn settings(&self) -> Settings {
        let (top_k, top_p) = (self.0.get("top_k").int(), self.0.get("top_p").number());
        Settings { temperature: self.0.get("temperature").number().unwrap_or(1.0), top_k, top_p }
    }
    fn seed(&self) -> Result<u64> {
        let seed = self.0.get("seed").text().unwrap_or("0");
        seed.parse().or_else(|_| fail("NanokvError", format!("seed {seed}")))
    }
}

fn ints_of(list: &Json) -> Vec<i64> {
    list.items().iter().map(|x| x.int().unwrap()).collect()
}

#[derive(Default)]
struct Port {
    models: HashMap<String, Model>,
}

impl Port {
    /// None: an operation that the port doesn't have.
    fn answer(&mut self, request: &Json) -> Result<Option<Outputs>> {
        let i = Inputs(request.get("inputs"));
        let one = |name: &str, output| Ok(Some(vec![(name.to_string(), output)]));
        match request.get("op").text().unwrap_or("") {
            "kv_head" => {
                let (heads, kv_heads) = (i.size("n_heads"), i.size("n_kv_heads"));
                one("kv_head", ints((0..heads).map(|h| kv_head(h, heads, kv_heads))))
            }
            "reads" => {
                let (dst, src): (Vec<_>, Vec<_>) =
                    reads(i.size("start"), i.size("n"), i.optional_size("window")).into_iter().unzip();
                Ok(Some(vec![("dst".into(), ints(dst)), ("src".into(), ints(src))]))
            }
            "rope_pairs" => {
                let head_dim = i.size("head_dim");
                let two = |n| <[usize; 2]>::from(pair(n, head_dim, i.pairs()));
                one("pairs", ints((0..head_dim / 2).flat_map(two)))
            }
            "offset" => one("offset", ints([offset(&i.sizes("shape"), &i.sizes("index"))])),
            "number" => one("y", Floats(number(&i))),
            "linear" => {
                let (x, b) = (i.tensor("x"), i.has("b").then(|| i.tensor("b")));
                one("y", Floats(linear(x.shape[0], &x.data, &i.tensor("w"), b.as_ref())))
            }
            "dequantise" => one("y", Floats(files::dequantise(i.text("kind"), &i.bytes("data")).unwrap())),
            "rms_norm" => one("y", Floats(rms_norm(&i.data("x"), &i.data("w"), i.number("eps") as f32))),
            "layer_norm" => {
                one("y", Floats(layer_norm(&i.data("x"), &i.data("w"), &i.data("b"), i.number("eps") as f32)))
            }
            "rope_table" => {
                let divisors = i.has("divisors").then(|| i.0.get("divisors").items());
                let divisors = divisors.map(|d| d.iter().map(|d| d.number().unwrap()).collect());
                let rope = Rope { base: i.number("base"), divisors };
                let (cos, sin) = rope_table(&rope, i.size("head_dim"), i.size("start"), i.size("n"));
                Ok(Some(vec![("cos".into(), Floats(cos)), ("sin".into(), Floats(sin))]))
            }
            "rope" => {
                let mut x = i.tensor("x");
                rope(&mut x.data, x.shape[2], &i.data("cos"), &i.data("sin"), i.pairs());
                one("y", Floats(x.data))
            }
            "activate" => {
                let kind = match i.text("kind") {
                    "silu" => Activation::Silu,
                    "gelu_tanh" => Activation::GeluTanh,
                    "gelu" => Activation::Gelu,
                    _ => Activation::Relu,
                };
                let gate = i.has("gate").then(|| i.data("gate"));
                one("y", Floats(activate(kind, &i.data("up"), gate.as_deref())))
            }
            "attention" => Ok(Some(attention(&i))),
            "hash_words" => {
                let x = i.tensor("x");
                one(
                    "hash",
                    Texts(x.data.chunks(x.shape[1]).map(|row| format!("{:016x}", fnv1a(row))).collect()),
                )
            }
            "cache" => one("length", ints([cache(&i)?])),
            "block" => self.block(&i).map(Some),
            "run" => self.run(&i, request.get("want")).map(Some),
            "pcg32" => {
                let mut generator = Pcg32::new(i.seed()?, i.size("stream") as u64);
                one("words", Ints((0..i.size("n")).map(|_| generator.word() as i64).collect()))
            }
            "greedy" => one("token", ints([greedy(&i.data("logits"))])),
            "sample" => {
                let (logits, settings, mut generator) =
                    (i.data("logits"), i.settings(), Pcg32::new(i.seed()?, 0));
                settings.check()?;
                one("tokens", ints((0..i.size("n")).map(|_| sample(&logits, &settings, &mut generator))))
            }
            "generate" => {
                let mut session = Session::new(self.model(i.text("model"))?);
                let (prompt, n, stop) = (i.ints("tokens"), i.size("max_new_tokens"), i.ints("stop"));
                one("tokens", Ints(generate(&mut session, &prompt, n, &i.settings(), i.seed()?, &stop)?))
            }
            "check_config" => config::config(i.0.get("config")).and_then(|_| one("ok", Ints(vec![1]))),
            "check_weights" => {
                let shapes = i.0.get("shapes").pairs();
                let found: Vec<_> = shapes.iter().map(|(name, s)| (name.clone(), s.sizes().unwrap())).collect();
                config::check_shapes(&config::config(i.0.get("config"))?, &found)?;
                one("ok", Ints(vec![1]))
            }
            "open_file" => {
                let open = if i.text("kind") == "gguf" { files::gguf } else { files::safetensors };
                let mut names: Vec<_> = open(i.bytes("data"))?.arrays.into_iter().map(|a| a.name).collect();
                names.sort();
                one("names", Texts(names))
            }
            _ => Ok(None),
        }
    }

    fn model(&mut self, path: &str) -> Result<&Model> {
        if !self.models.contains_key(path) {
            self.models.insert(path.into(), load::load(path.as_ref())?);
        }
        Ok(&self.models[path])
    }

    /// One layer over given x, from an empty cache on.
    fn block(&mut self, i: &Inputs) -> Result<Outputs> {
        let mut session = Session::new(self.model(i.text("model"))?);
        let (x, mut outputs, mut start) = (i.tensor("x"), vec![], 0);
        session.cache.begin(x.shape[0])?;
        for (step, &t) in i.sizes("calls").iter().enumerate() {
            let mut x = x.data[start * x.shape[1]..][..t * x.shape[1]].to_vec();
            let mut see =
                |name, values: &[f32]| outputs.push((format!("step{step}.{name}"), Floats(values.to_vec())));
            session.layer(i.size("layer"), start, &mut x, &[], &mut see)?;
            start += t;
        }
        Ok(outputs)
    }

    /// Calls one after the other; those that are refused are no steps.
    fn run(&mut self, i: &Inputs, want: &Json) -> Result<Outputs> {
        let mut session = Session::new(self.model(i.text("model"))?);
        let want: HashSet<&str> = want.items().iter().filter_map(Json::text).collect();
        let (all_cuts, mut outputs, mut errors, mut step): (Vec<Cut>, _, _, _) = (cuts(i), vec![], vec![], 0);
        for tokens in i.0.get("calls").items() {
            let (tokens, start) = (ints_of(tokens), session.cache.length);
            let stop = start + tokens.len();
            let cuts: Vec<Cut> = all_cuts.iter().copied().filter(|c| (start..stop).contains(&c.dst)).collect();
            let n_layers = session.model.config.n_layers;
            let mut see = |name: String, values: &[f32]| {
                let rows = values.chunks(values.len() / tokens.len()).enumerate();
                let mut all: Outputs = rows
                    .map(|(t, row)| (of_position(&name, start + t, n_layers), Floats(row.to_vec())))
                    .collect();
                all.push((format!("step{step}.{name}"), Floats(values.to_vec())));
                outputs.extend(all.into_iter().filter(|output| want.contains(output.0.as_str())));
            };
            match session.call(&tokens, &cuts, &mut see) {
                Ok(_) => (step, _) = (step + 1, errors.push(String::new())),
                Err(error) => errors.push(error.kind.into()),
            }
        }
        outputs.push(("errors".into(), Texts(errors)));
        outputs.push(("length".into(), ints([session.cache.length])));
        Ok(outputs)
    }
}

/// B5: the name of one position's state.
fn of_position(name: &str, p: usize, n_layers: usize) -> String {
    match name.split_once('.') {
        Some((layer, "resid_pre")) => format!("{layer}.pos{p}"),
        Some((layer, "resid_post")) if layer == format!("layer{}", n_layers - 1) => {
            format!("layer{n_layers}.pos{p}")
        }
        Some((layer, site)) => format!("{layer}.pos{p}.{site}"),
        None => format!("pos{p}.{name}"),
    }
}

fn cuts(i: &Inputs) -> Vec<Cut> {
    let cut = |c: &Json| {
        let get = |key: &str| c.get(key).size().unwrap();
        Cut { layer: get("layer"), head: c.get("head").size(), dst: get("dst"), src: get("src") }
    };
    i.0.get("cuts").items().iter().map(cut).collect()
}

fn number(i: &Inputs) -> Vec<f32> {
    let x = || i.data("x");
    match i.text("function") {
        "fma" => {
            i.data("a").iter().zip(i.data("b")).zip(i.data("c")).map(|((a, b), c)| a.mul_add(b, c)).collect()
        }
        "exp" => x().into_iter().map(exp).collect(),
        "tanh" => x().into_iter().map(tanh).collect(),
        "erf" => x().into_iter().map(erf).collect(),
        "sum" => vec![sum(&x(), i.size("first"))],
        "sum_of_squares" => vec![sum_of_squares(&x(), i.size("first"))],
        _ => vec![maximum(&x())],
    }
}

fn attention(i: &Inputs) -> Outputs {
    let (q, k, v) = (i.tensor("q"), i.tensor("k"), i.data("v"));
    let heads = Heads {
        n_heads: q.shape[1],
        n_kv_heads: k.shape[1],
        head_dim: q.shape[2],
        scale: i.number("scale") as f32,
        window: i.optional_size("window"),
    };
    let cuts: Vec<_> = i.0.get("cuts").items().iter().map(|cut| cut.sizes().unwrap()).collect();
    let is_cut = |h, dst, src| cuts.contains(&vec![h, dst, src]);
    let all = heads.attention(&q.data, &k.data, &v, k.shape[0] - q.shape[0], is_cut);
    let named = [("scores", all.scores.concat()), ("pattern", all.pattern.concat()), ("z", all.z)];
    named.map(|(name, x)| (name.to_string(), Floats(x))).into()
}

/// J5
fn fnv1a(row: &[f32]) -> u64 {
    row.iter().fold(0xcbf29ce484222325, |h: u64, x| (h ^ x.to_bits() as u64).wrapping_mul(0x100000001b3))
}

/// Plays the actions upon a cache whose entries are one number long.
fn cache(i: &Inputs) -> Result<usize> {
    let mut cache = Cache::new(i.size("n_layers"), i.size("n_ctx"), 1);
    for call in i.0.get("actions").items() {
        cache.begin(call.items()[0].size().unwrap())?;
        for action in &call.items()[1..] {
            let [layer, first, n] = [1, 2, 3].map(|at| action.items()[at].size().unwrap());
            match action.items()[0].text() {
                Some("write") => cache.write(layer, first, &vec![0.0; n], &vec![0.0; n])?,
                _ => cache.read(layer, first + n).map(|_| ())?,
            }
        }
        cache.commit()?;
    }
    Ok(cache.length)
}
