//! JSON, read and written: just what the suite needs.

use crate::{fail, Result};

#[derive(Clone, Debug)]
pub enum Json {
    Null,
    Bool(bool),
    Number(f64),
    Text(String),
    Array(Vec<Json>),
    Object(Vec<(String, Json)>),
}

impl Json {
    /// The value of a key; Null where there is none.
    pub fn get(&self, key: &str) -> &Json {
        match self {
            Json::Object(pairs) => pairs.iter().find(|p| p.0 == key).map_or(&Json::Null, |p| &p.1),
            _ => &Json::Null,
        }
    }
    pub fn is_null(&self) -> bool {
        matches!(self, Json::Null)
    }
    pub fn text(&self) -> Option<&str> {
        if let Json::Text(text) = self {
            Some(text)
        } else {
            None
        }
    }
    pub fn bool(&self) -> Option<bool> {
        if let Json::Bool(truth) = self {
            Some(*truth)
        } else {
            None
        }
    }
    /// A number; `Infinity`, `-Infinity` and `NaN` are texts.
    pub fn number(&self) -> Option<f64> {
        match self {
            Json::Number(number) => Some(*number),
            Json::Text(text) => text.parse().ok(),
            _ => None,
        }
    }
    pub fn int(&self) -> Option<i64> {
        if let Json::Number(n) = self {
            Some(*n).filter(|n| n.fract() == 0.0).map(|n| n as i64)
        } else {
            None
        }
    }
    pub fn size(&self) -> Option<usize> {
        self.int().and_then(|n| n.try_into().ok())
    }
    pub fn items(&self) -> &[Json] {
        if let Json::Array(items) = self {
            items
        } else {
            &[]
        }
    }
    pub fn sizes(&self) -> Option<Vec<usize>> {
        self.items().iter().map(Json::size).collect()
    }
    pub fn pairs(&self) -> &[(String, Json)] {
        if let Json::Object(pairs) = self {
            pairs
        } else {
            &[]
        }
    }
}

pub fn parse(text: &str) -> Result<Json> {
    let mut reader = Reader { bytes: text.as_bytes(), at: 0 };
    let value = reader.value(0)?;
    reader.spaces();
    if reader.at < text.len() {
        fail("FileFormatError", "text after the JSON value")
    } else {
        Ok(value)
    }
}

/// A text as it stands in JSON, with its quotation marks.
pub fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c < ' ' => out += &format!("\\u{:04x}", c as u32),
            c => out.push(c),
        }
    }
    out + "\""
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn peek(&self) -> u8 {
        *self.bytes.get(self.at).unwrap_or(&0)
    }
    fn spaces(&mut self) {
        while matches!(self.peek(), b' ' | b'\t' | b'\r' | b'\n') {
            self.at += 1;
        }
    }
    /// Steps over `word` if it comes next.
    fn takes(&mut self, word: &str) -> bool {
        let comes = self.bytes[self.at..].starts_with(word.as_bytes());
        self.at += if comes { word.len() } else { 0 };
        comes
    }
    fn wrong<T>(&self) -> Result<T> {
        fail("FileFormatError", format!("no JSON at byte {}", self.at))
    }

    fn value(&mut self, depth: usize) -> Result<Json> {
        self.spaces();
        match self.peek() {
            _ if depth > 64 => self.wrong(),
            b'{' => self.list('}', |r| r.pair(depth + 1)).map(Json::Object),
            b'[' => self.list(']', |r| r.value(depth + 1)).map(Json::Array),
            b'"' => self.text().map(Json::Text),
            _ if self.takes("null") => Ok(Json::Null),
            _ if self.takes("true") => Ok(Json::Bool(true)),
            _ if self.takes("false") => Ok(Json::Bool(false)),
            _ => self.number(),
        }
    }

    fn list<T>(&mut self, end: char, item: impl Fn(&mut Self) -> Result<T>) -> Result<Vec<T>> {
        let (mut items, end) = (vec![], end.to_string());
        self.at += 1;
        self.spaces();
        if self.takes(&end) {
            return Ok(items);
        }
        loop {
            items.push(item(self)?);
            self.spaces();
            if self.takes(&end) {
                return Ok(items);
            }
            if !self.takes(",") {
                return self.wrong();
            }
        }
    }

    fn pair(&mut self, depth: usize) -> Result<(String, Json)> {
        self.spaces();
        let key = self.text()?;
        self.spaces();
        if self.takes(":") {
            Ok((key, self.value(depth)?))
        } else {
            self.wrong()
        }
    }

    fn number(&mut self) -> Result<Json> {
        let is_part = |b: &&u8| matches!(b, b'0'..=b'9' | b'-' | b'+' | b'.' | b'e' | b'E');
        let length = self.bytes[self.at..].iter().take_while(is_part).count();
        let word = std::str::from_utf8(&self.bytes[self.at..self.at + length]).unwrap_or("");
        let Ok(number) = word.parse() else { return self.wrong() };
        self.at += length;
        Ok(Json::Number(number))
    }

    fn text(&mut self) -> Result<String> {
        if !self.takes("\"") {
            return self.wrong();
        }
        let mut text: Vec<u8> = vec![];
        while !self.takes("\"") {
            let byte = self.peek();
            self.at += 1;
            match byte {
                b'\\' => text.extend(self.escape()?.to_string().bytes()),
                byte if byte < b' ' => return self.wrong(),
                byte => text.push(byte),
            }
        }
        String::from_utf8(text).or_else(|_| self.wrong())
    }

    /// What follows a backslash. Names of arrays need no pairs of surrogates: each becomes U+FFFD.
    fn escape(&mut self) -> Result<char> {
        let letter = self.peek() as char;
        self.at += 1;
        if let Some(at) = "nrtbf".find(letter) {
            return Ok(['\n', '\r', '\t', '\u{8}', '\u{c}'][at]);
        }
        match letter {
            '"' | '\\' | '/' => Ok(letter),
            'u' => {
                let digits = self.bytes.get(self.at..self.at + 4).and_then(|d| std::str::from_utf8(d).ok());
                let Some(unit) = digits.and_then(|d| u32::from_str_radix(d, 16).ok()) else {
                    return self.wrong();
                };
                self.at += 4;
                Ok(char::from_u32(unit).unwrap_or('\u{fffd}'))
            }
            _ => self.wrong(),
        }
    }
}
