//! PTX text to statements: comments away, scopes, labels, directives and instructions apart.

/// One statement of a module or of a function's body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Statement {
    /// `{`: a scope of registers and labels.
    Open,
    /// `}`
    Close,
    /// `name:`
    Label(String),
    /// Anything that begins with a dot, without its end.
    Directive(String),
    /// An instruction with its guard, without the semicolon.
    Instruction(String),
}

/// Directives that end with their line, not with a semicolon.
const LINES: [&str; 9] =
    [".version", ".target", ".address_size", ".file", ".loc", ".maxntid", ".minnctapersm", ".reqntid", ".maxnreg"];

/// The statements of a PTX text, each with its line (from 1).
pub(crate) fn statements(text: &str) -> Result<Vec<(usize, Statement)>, String> {
    let text = without_comments(text);
    let mut found = Vec::new();
    let (mut at, mut line) = (0, 1);
    loop {
        let blank = text[at..].len() - text[at..].trim_start().len();
        line += newlines(&text[at..at + blank]);
        at += blank;
        let rest = &text[at..];
        if rest.is_empty() {
            return Ok(found);
        }
        let (statement, length) = first(rest).ok_or_else(|| format!("PTX line {line}: a statement without end"))?;
        found.extend(statement.map(|statement| (line, statement)));
        line += newlines(&rest[..length]);
        at += length;
    }
}

/// The first statement of a text that begins with one (None for what is passed over), and its length.
fn first(text: &str) -> Option<(Option<Statement>, usize)> {
    let word = text.split(|c: char| c.is_whitespace() || c == ';').next()?;
    if text.starts_with('{') {
        return Some((Some(Statement::Open), 1));
    }
    if text.starts_with('}') {
        return Some((Some(Statement::Close), 1));
    }
    if word == ".section" {
        return Some((None, text.find('}')? + 1)); // debugging information
    }
    if text.starts_with('.') {
        let header = text.find('{').filter(|_| is_function(text));
        let length = match header {
            Some(body) => body,
            None if LINES.contains(&word) => text.find('\n').unwrap_or(text.len()),
            None => text.find(';')?,
        };
        let end = usize::from(header.is_none() && text[length..].starts_with(';'));
        return Some((Some(Statement::Directive(text[..length].trim().to_owned())), length + end));
    }
    let name = text.find(|c: char| !(c.is_alphanumeric() || "_$%".contains(c)))?;
    if text[name..].starts_with(':') && !text[name..].starts_with("::") {
        return Some((Some(Statement::Label(text[..name].to_owned())), name + 1));
    }
    let length = text.find(';')?;
    Some((Some(Statement::Instruction(text[..length].trim().to_owned())), length + 1))
}

/// Whether a directive opens a function, whose header ends at the brace of its body.
fn is_function(directive: &str) -> bool {
    let head = directive.split(['(', ';', '=']).next().unwrap_or_default();
    head.split_whitespace().any(|word| word == ".entry" || word == ".func")
}

fn newlines(text: &str) -> usize {
    text.bytes().filter(|&byte| byte == b'\n').count()
}

/// The same text, same lines, without comments of either kind.
fn without_comments(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('/') {
        kept.push_str(&rest[..at]);
        rest = &rest[at..];
        let length = match &rest.as_bytes()[..rest.len().min(2)] {
            b"//" => rest.find('\n').unwrap_or(rest.len()),
            b"/*" => rest.find("*/").map_or(rest.len(), |end| end + 2),
            _ => {
                kept.push('/');
                rest = &rest[1..];
                continue;
            }
        };
        kept.extend(rest[..length].chars().filter(|&c| c == '\n'));
        rest = &rest[length..];
    }
    kept + rest
}

/// The operands of an instruction: split at commas outside of brackets and braces.
pub(crate) fn operands(text: &str) -> Vec<String> {
    let mut found = vec![String::new()];
    let mut depth = 0;
    for c in text.chars() {
        match c {
            '{' | '[' => depth += 1,
            '}' | ']' => depth -= 1,
            _ => {}
        }
        if c == ',' && depth == 0 {
            found.push(String::new());
        } else if !c.is_whitespace() {
            found.last_mut().expect("never empty").push(c);
        }
    }
    found.retain(|operand| !operand.is_empty());
    found
}
