//! Rules G: choosing a token.

use crate::model::Session;
use crate::{fail, Result};

/// G1: PCG-XSH-RR 64/32.
pub struct Pcg32 {
    state: u64,
    increment: u64,
}

impl Pcg32 {
    pub fn new(seed: u64, stream: u64) -> Pcg32 {
        let mut generator = Pcg32 { state: 0, increment: stream.wrapping_mul(2).wrapping_add(1) };
        generator.word();
        generator.state = generator.state.wrapping_add(seed);
        generator.word();
        generator
    }
    pub fn word(&mut self) -> u32 {
        let old = self.state;
        self.state = old.wrapping_mul(6364136223846793005).wrapping_add(self.increment);
        ((((old >> 18) ^ old) >> 27) as u32).rotate_right((old >> 59) as u32)
    }
    /// In [0, 1).
    pub fn number(&mut self) -> f64 {
        self.word() as f64 / 4294967296.0
    }
}

pub struct Settings {
    pub temperature: f64,
    pub top_k: Option<i64>,
    pub top_p: Option<f64>,
}

impl Settings {
    /// G4
    pub fn check(&self) -> Result<()> {
        let wrong_p = self.top_p.is_some_and(|p| !(p > 0.0 && p <= 1.0));
        if !(self.temperature >= 0.0 && self.temperature.is_finite())
            || self.top_k.is_some_and(|k| k < 1)
            || wrong_p
        {
            return fail("NanokvError", "temperature, top_k or top_p");
        }
        Ok(())
    }
}

/// G2: the largest, of equal ones the lowest id.
pub fn greedy(logits: &[f32]) -> usize {
    (0..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best })
}

/// G3, in float64.
pub fn sample(logits: &[f32], settings: &Settings, generator: &mut Pcg32) -> usize {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap_or(std::cmp::Ordering::Equal));
    order.truncate(settings.top_k.map_or(order.len(), |k| k as usize));
    let logit = |i: usize| logits[order[i]] as f64;
    let (mut c, mut total) = (vec![], 0.0);
    for i in 0..order.len() {
        total += ((logit(i) - logit(0)) / settings.temperature).exp();
        c.push(total);
    }
    if let Some(p) = settings.top_p {
        let last = c.iter().position(|c| *c >= p * total).unwrap_or(c.len() - 1);
        c.truncate(last + 1);
    }
    let mark = generator.number() * c[c.len() - 1];
    order[c.iter().position(|c| *c > mark).unwrap_or(c.len() - 1)]
}

/// G4
pub fn generate(
    session: &mut Session,
    prompt: &[i64],
    max_new_tokens: usize,
    settings: &Settings,
    seed: u64,
    stop: &[i64],
) -> Result<Vec<i64>> {
    settings.check()?;
    let (mut generator, mut tokens) = (Pcg32::new(seed, 0), vec![]);
    let mut logits = session.call(prompt, &[], &mut |_, _| ())?;
    for _ in 0..max_new_tokens {
        let last = &logits[logits.len() - session.model.config.vocab_size..];
        let greedily = settings.temperature == 0.0;
        let token = (if greedily { greedy(last) } else { sample(last, settings, &mut generator) }) as i64;
        if stop.contains(&token) {
            break;
        }
        logits = session.call(&[token], &[], &mut |_, _| ())?;
        tokens.push(token);
    }
    Ok(tokens)
}
