//! Rules C5 and C6: safetensors, GGUF, and quantised weights.

use crate::arithmetic::Tensor;
use crate::json::{self, Json};
use crate::{fail, Result};

/// A file's arrays, still as bytes.
#[derive(Default)]
pub struct File {
    bytes: Vec<u8>,
    pub arrays: Vec<Entry>,
    /// The pairs of a GGUF file.
    pub pairs: Vec<(String, Json)>,
}

pub struct Entry {
    pub name: String,
    kind: String,
    pub shape: Vec<usize>,
    begin: usize,
    end: usize,
}

impl File {
    pub fn find(&self, name: &str) -> Option<Tensor> {
        let entry = self.arrays.iter().find(|entry| entry.name == name)?;
        let data = dequantise(&entry.kind, &self.bytes[entry.begin..entry.end])?;
        Some(Tensor { shape: entry.shape.clone(), data })
    }
}

fn unfit<T>(message: &str) -> Result<T> {
    fail("FileFormatError", message)
}

/// C5
pub fn safetensors(bytes: Vec<u8>) -> Result<File> {
    let start = read_header(&bytes)?;
    let header = json::parse(std::str::from_utf8(&bytes[8..start]).or_else(|_| unfit("no UTF-8"))?)?;
    if !matches!(header, Json::Object(_)) {
        return unfit("the header is no object");
    }
    let mut arrays = vec![];
    for (name, about) in header.pairs().iter().filter(|pair| pair.0 != "__metadata__") {
        let kind = about.get("dtype").text().unwrap_or("");
        let size = match kind {
            "F64" | "I64" | "U64" => 8,
            "F32" | "I32" | "U32" => 4,
            "F16" | "BF16" | "I16" | "U16" => 2,
            "I8" | "U8" | "BOOL" => 1,
            _ => return unfit("an unknown dtype"),
        };
        let (shape, span) = (about.get("shape").sizes(), about.get("data_offsets").sizes());
        let (Some(shape), Some([begin, end])) = (shape, span.as_deref()) else {
            return unfit("no shape or offsets");
        };
        if bytes_of(&shape, 1, size).is_none_or(|n| begin.checked_add(n) != Some(*end)) {
            return unfit("shape and offsets differ");
        }
        let (begin, end) = (start.saturating_add(*begin), start.saturating_add(*end));
        arrays.push(Entry { name: name.clone(), kind: kind.into(), shape, begin, end });
    }
    arrays.sort_by_key(|a| (a.begin, a.end));
    let stop = arrays.iter().try_fold(start, |at, a| (a.begin == at).then_some(a.end));
    if stop != Some(bytes.len()) {
        return unfit("gaps, overlaps, or another length");
    }
    Ok(File { bytes, arrays, pairs: vec![] })
}

/// Where the header ends.
fn read_header(bytes: &[u8]) -> Result<usize> {
    let length = bytes.first_chunk().map(|n| u64::from_le_bytes(*n));
    let end = length.and_then(|n| usize::try_from(n).ok()?.checked_add(8));
    end.filter(|end| *end <= bytes.len()).map_or_else(|| unfit("the header is longer than the file"), Ok)
}

/// The bytes of an array that stands in blocks of `per` numbers, `size` bytes each; none if there is no such.
fn bytes_of(shape: &[usize], per: usize, size: usize) -> Option<usize> {
    if shape.last().is_some_and(|k| k % per != 0) {
        return None;
    }
    let count = shape.iter().try_fold(1_usize, |n, k| n.checked_mul(*k))?;
    (count / per).checked_mul(size)
}

/// C5
pub fn gguf(bytes: Vec<u8>) -> Result<File> {
    let mut r = Reader { bytes: &bytes, at: 0 };
    if r.take(4)? != b"GGUF" || !matches!(r.u32()?, 2 | 3) {
        return unfit("no GGUF of version 2 or 3");
    }
    let (n_tensors, n_pairs) = (r.u64()?, r.u64()?);
    let (mut pairs, mut arrays) = (vec![], vec![]);
    for _ in 0..n_pairs {
        let key = r.string()?;
        let kind = r.u32()?;
        pairs.push((key, r.value(kind, 0)?));
    }
    for _ in 0..n_tensors {
        arrays.push(r.tensor()?);
    }
    let about = pairs.iter().find(|pair| pair.0 == "general.alignment");
    let alignment = about.map_or(Some(32), |pair| pair.1.size()).filter(|n| n.is_power_of_two());
    let Some(alignment) = alignment else { return unfit("alignment") };
    let start = r.at.next_multiple_of(alignment);
    for a in &mut arrays {
        if a.begin % alignment != 0 || a.end.checked_add(start).is_none_or(|end| end > bytes.len()) {
            return unfit("an array outside of the file, or unaligned");
        }
        (a.begin, a.end) = (a.begin + start, a.end + start);
    }
    arrays.sort_by_key(|a| a.begin);
    if arrays.windows(2).any(|two| two[0].end > two[1].begin) {
        return unfit("arrays overlap");
    }
    Ok(File { bytes, arrays, pairs })
}

/// Reads a GGUF header; no count is believed before its bytes are there.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let taken = self.bytes[self.at..].get(..n).map_or_else(|| unfit("cut short"), Ok)?;
        self.at += n;
        Ok(taken)
    }
    fn bits<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.take(N)?.try_into().unwrap())
    }
    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.bits()?))
    }
    fn u64(&mut self) -> Result<usize> {
        Ok(u64::from_le_bytes(self.bits()?) as usize)
    }
    fn string(&mut self) -> Result<String> {
        let n = self.u64()?;
        String::from_utf8(self.take(n)?.to_vec()).or_else(|_| unfit("no UTF-8"))
    }
    fn value(&mut self, kind: u32, depth: usize) -> Result<Json> {
        let number = match kind {
            0 => self.bits::<1>()?[0] as f64,
            1 => self.bits::<1>()?[0] as i8 as f64,
            2 => u16::from_le_bytes(self.bits()?) as f64,
            3 => i16::from_le_bytes(self.bits()?) as f64,
            4 => self.u32()? as f64,
            5 => i32::from_le_bytes(self.bits()?) as f64,
            6 => f32::from_le_bytes(self.bits()?) as f64,
            7 => match self.bits()? {
                [truth @ 0..=1] => return Ok(Json::Bool(truth == 1)),
                _ => return unfit("a bool that is neither 0 nor 1"),
            },
            8 => return Ok(Json::Text(self.string()?)),
            9 if depth < 8 => {
                let (kind, count) = (self.u32()?, self.u64()?);
                return (0..count).map(|_| self.value(kind, depth + 1)).collect::<Result<_>>().map(Json::Array);
            }
            10 => u64::from_le_bytes(self.bits()?) as f64,
            11 => i64::from_le_bytes(self.bits()?) as f64,
            12 => f64::from_le_bytes(self.bits()?),
            _ => return unfit("an unknown type of value"),
        };
        Ok(Json::Number(number))
    }
    fn tensor(&mut self) -> Result<Entry> {
        let name = self.string()?;
        let n_dims = self.u32()?;
        let mut shape = (0..n_dims).map(|_| self.u64()).collect::<Result<Vec<_>>>()?;
        shape.reverse(); // innermost first
        let (number, begin) = (self.u32()?, self.u64()?);
        let Some(&(_, kind, per, size)) = KINDS.iter().find(|kind| kind.0 == number) else {
            return unfit("a kind");
        };
        let end = bytes_of(&shape, per, size).and_then(|n| begin.checked_add(n));
        let Some(end) = end.filter(|_| matches!(n_dims, 1..=4) && !shape.contains(&0)) else {
            return unfit("a shape");
        };
        Ok(Entry { name, kind: kind.into(), shape, begin, end })
    }
}

/// C5, C6: number in GGUF, name, numbers and bytes of a block.
const KINDS: [(u32, &str, usize, usize); 11] = [
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (30, "BF16", 1, 2),
];

/// C6: none if there is no such kind.
pub fn dequantise(kind: &str, bytes: &[u8]) -> Option<Vec<f32>> {
    let (_, _, per, size) = KINDS.iter().find(|row| row.1 == kind)?;
    let mut y = Vec::with_capacity(bytes.len() / size * per);
    for b in bytes.chunks_exact(*size) {
        let d = half(b);
        match kind {
            "F32" => y.push(f32::from_le_bytes(b.try_into().unwrap())),
            "F16" => y.push(d),
            "BF16" => y.push(f32::from_bits((b[1] as u32) << 24 | (b[0] as u32) << 16)),
            "Q8_0" => y.extend(b[2..].iter().map(|q| d * *q as i8 as f32)),
            "Q4_0" => y.extend((0..32).map(|i| d * (low_then_high(&b[2..], i) as f32 - 8.0))),
            "Q4_1" => y.extend((0..32).map(|i| (low_then_high(&b[4..], i) as f32).mul_add(d, half(&b[2..])))),
            "Q5_0" => y.extend((0..32).map(|i| d * (five_bits(&b[2..], i) - 16.0))),
            "Q5_1" => y.extend((0..32).map(|i| five_bits(&b[4..], i).mul_add(d, half(&b[2..])))),
            "Q6_K" => y.extend((0..256).map(|e| q6_k(b, e))),
            _ => y.extend((0..256).map(|e| q45_k(b, e, kind == "Q5_K"))),
        }
    }
    Some(y)
}

/// F16 to float32.
fn half(b: &[u8]) -> f32 {
    let bits = (*b.get(1).unwrap_or(&0) as u32) << 8 | b[0] as u32;
    let (sign, exponent, fraction) = (bits >> 15 << 31, bits >> 10 & 31, bits & 1023);
    match exponent {
        0 => f32::from_bits(sign | 0x3f800000) * fraction as f32 / 16777216.0,
        31 => f32::from_bits(sign | 0x7f800000 | fraction << 13),
        _ => f32::from_bits(sign | (exponent + 112) << 23 | fraction << 13),
    }
}

/// Byte j holds element j in its low four bits and element j + 16 in its high four.
fn low_then_high(qs: &[u8], i: usize) -> u8 {
    qs[i % 16] >> (i / 16 * 4) & 15
}

/// h, whose bit i is bit 4 of element i, and then qs.
fn five_bits(b: &[u8], i: usize) -> f32 {
    (low_then_high(&b[4..], i) | (b[i / 8] >> (i % 8) & 1) << 4) as f32
}

/// Element e of a block of Q4_K or Q5_K.
fn q45_k(b: &[u8], e: usize, five: bool) -> f32 {
    let (s, g, j) = (&b[4..16], e / 32, e % 32);
    let (scale, n) = if g < 4 {
        (s[g] & 63, s[g + 4] & 63)
    } else {
        (s[g + 4] & 15 | s[g - 4] >> 6 << 4, s[g + 4] >> 4 | s[g] >> 6 << 4)
    };
    let qs = &b[if five { 48 } else { 16 }..];
    let high = if five { b[16 + j] >> g & 1 } else { 0 };
    let q = qs[g / 2 * 32 + j] >> (g % 2 * 4) & 15 | high << 4;
    (q as f32).mul_add(half(b) * scale as f32, -(half(&b[2..]) * n as f32))
}

/// Element e of a block of Q6_K.
fn q6_k(b: &[u8], e: usize) -> f32 {
    let (i, g, j) = (e / 128, e / 32 % 4, e % 32);
    let low = b[64 * i + g % 2 * 32 + j] >> (g / 2 * 4) & 15;
    let high = b[128 + 32 * i + j] >> (2 * g) & 3;
    let scale = b[192 + e / 16] as i8 as f32;
    half(&b[208..]) * scale * ((low | high << 4) as f32 - 32.0)
}
