//! Rules K: the cache.

use crate::{fail, Result};

/// K: keys and values [S, G, hd] of each layer.
pub struct Cache {
    /// The positions that are committed.
    pub length: usize,
    /// Where the call ends that is under way.
    stop: usize,
    n_ctx: usize,
    entry: usize,
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
}

impl Cache {
    /// `entry` is the length of a slot's keys, G·hd.
    pub fn new(n_layers: usize, n_ctx: usize, entry: usize) -> Cache {
        Cache { length: 0, stop: 0, n_ctx, entry, keys: vec![vec![]; n_layers], values: vec![vec![]; n_layers] }
    }

    fn written(&self, layer: usize) -> usize {
        self.keys[layer].len() / self.entry
    }

    /// K5: a call of t positions begins.
    pub fn begin(&mut self, t: usize) -> Result<()> {
        if self.length + t > self.n_ctx {
            return fail("ContextFullError", format!("{} positions, room for {}", self.length + t, self.n_ctx));
        }
        self.stop = self.length + t;
        Ok(())
    }

    /// K1: slots are written in their order, once.
    pub fn write(&mut self, layer: usize, first: usize, k: &[f32], v: &[f32]) -> Result<()> {
        let next = self.written(layer);
        if first != next || first + k.len() / self.entry > self.stop {
            return fail("CacheError", format!("a write of slot {first}, {next} is next"));
        }
        self.keys[layer].extend(k);
        self.values[layer].extend(v);
        Ok(())
    }

    /// K2: keys and values of the slots before `stop`.
    pub fn read(&self, layer: usize, stop: usize) -> Result<(&[f32], &[f32])> {
        if stop > self.written(layer) {
            return fail("UnwrittenSlotError", format!("layer {layer} has no slot {}", stop - 1));
        }
        Ok((&self.keys[layer][..stop * self.entry], &self.values[layer][..stop * self.entry]))
    }

    /// K3
    pub fn commit(&mut self) -> Result<()> {
        if (0..self.keys.len()).any(|layer| self.written(layer) < self.stop) {
            return fail("CacheError", "a layer lacks a slot");
        }
        self.length = self.stop;
        Ok(())
    }

    /// K3: forgets what was not committed.
    pub fn roll_back(&mut self) {
        let kept = self.length * self.entry;
        self.keys.iter_mut().chain(&mut self.values).for_each(|x| x.truncate(kept));
    }
}
