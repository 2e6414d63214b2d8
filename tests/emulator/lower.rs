//! Single instructions: opcode and operands to operations. What is not known here is an error, never passed over.

use super::convert::{Rounding, convert, convert_pair};
use super::float::Float;
use super::instruction::{Operation, Register, Space, Type, Vote};
use super::integer;
use super::parse::Builder;

/// An opcode taken apart: `cvt.rn.bf16x2.f32` is `cvt` with the modifier `rn` and two types.
pub(super) struct Opcode<'a> {
    pub(super) name: &'a str,
    pub(super) types: Vec<Type>,
    modifiers: Vec<&'a str>,
}

impl<'a> Opcode<'a> {
    fn new(text: &'a str) -> Self {
        let mut parts = text.split('.');
        let name = parts.next().unwrap_or_default();
        let (types, modifiers): (Vec<_>, Vec<_>) = parts.partition(|part| Type::parse(part).is_some());
        Self { name, types: types.into_iter().filter_map(Type::parse).collect(), modifiers }
    }

    /// Whether a modifier is there; then it is dealt with.
    pub(super) fn take(&mut self, modifier: &str) -> bool {
        let at = self.modifiers.iter().position(|&part| part == modifier);
        at.map(|at| self.modifiers.remove(at)).is_some()
    }

    /// Which of several modifiers is there.
    pub(super) fn choose<'m>(&mut self, choices: &[&'m str]) -> Option<&'m str> {
        choices.iter().copied().find(|choice| self.take(choice))
    }

    /// The first modifier that `parse` knows.
    fn parse<T>(&mut self, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
        let at = self.modifiers.iter().position(|part| parse(part).is_some())?;
        parse(self.modifiers.remove(at))
    }

    /// Leaves out the modifiers that `ignored` names: they only say how fast something should go.
    fn ignore(&mut self, ignored: impl Fn(&str) -> bool) {
        self.modifiers.retain(|part| !ignored(part));
    }

    pub(super) fn ty(&self) -> Result<Type, String> {
        self.types.first().copied().ok_or_else(|| format!("{} without a type", self.name))
    }

    fn float(&mut self) -> Float {
        Float {
            flush: self.take("ftz"),
            saturate: self.take("sat"),
            keep_nan: self.take("NaN"),
            relu: self.take("relu"),
        }
    }

    fn space(&mut self) -> Space {
        match self.choose(&["global", "shared", "local", "param", "const"]) {
            Some("global" | "const") => Space::Global,
            Some("shared") => Space::Shared,
            Some("local") => Space::Local,
            Some("param") => Space::Param,
            _ => Space::Generic,
        }
    }

    /// Every modifier must have been dealt with.
    fn done(&self) -> Result<(), String> {
        if self.modifiers.is_empty() {
            Ok(())
        } else {
            Err(format!("{} with {:?} is not supported", self.name, self.modifiers))
        }
    }
}

/// As many operands as wanted.
pub(super) fn exactly<const N: usize>(operands: &[String]) -> Result<[&str; N], String> {
    let operands: Vec<_> = operands.iter().map(String::as_str).collect();
    operands.try_into().map_err(|given: Vec<_>| format!("{} operands, wanted {N}", given.len()))
}

/// The elements of `{a, b}`, or the operand alone.
pub(super) fn elements(operand: &str) -> Vec<&str> {
    match operand.strip_prefix('{').and_then(|inside| inside.strip_suffix('}')) {
        Some(inside) => inside.split(',').collect(),
        None => vec![operand],
    }
}

impl Builder {
    pub(super) fn lower(&mut self, opcode: &str, operands: &[String]) -> Result<(), String> {
        let mut opcode = Opcode::new(opcode);
        match opcode.name {
            "bra" => {
                opcode.ignore(|part| part == "uni");
                let [label] = exactly(operands)?;
                self.branch(label);
            }
            "ret" | "exit" => self.push(Operation::Exit),
            "mov" => self.lower_move(&opcode, operands)?,
            "cvta" => self.lower_cvta(&mut opcode, operands)?,
            "cvt" => self.lower_convert(&mut opcode, operands)?,
            "setp" => self.lower_compare(&mut opcode, operands)?,
            "selp" | "slct" => self.lower_select(&opcode, operands)?,
            "ld" | "ldu" | "st" => self.lower_access(&mut opcode, operands)?,
            "atom" | "red" => self.lower_atomic(&mut opcode, operands)?,
            "membar" | "fence" => {
                opcode.ignore(|_| true);
                self.push(Operation::Fence);
            }
            "bar" | "barrier" | "shfl" | "vote" | "activemask" | "match" | "redux" => {
                self.lower_warp(&mut opcode, operands)?;
            }
            "cp" | "ldmatrix" | "stmatrix" | "mma" => self.lower_tile(&mut opcode, operands)?,
            _ => self.lower_arithmetic(&mut opcode, operands)?,
        }
        opcode.done()
    }

    /// Whatever computes a value from values.
    fn lower_arithmetic(&mut self, opcode: &mut Opcode, operands: &[String]) -> Result<(), String> {
        let ty = opcode.ty()?;
        let part = opcode.choose(&["lo", "hi", "wide", "approx", "full", "l", "r"]);
        let shift = opcode.choose(&["wrap", "clamp"]);
        let name = [Some(opcode.name), part, shift].into_iter().flatten().collect::<Vec<_>>().join(".");
        let unknown = || format!("{name} of {ty:?} is not supported");
        let float = opcode.float();
        let is_float = !ty.is_integer() && ty != Type::Pred;
        if is_float {
            opcode.ignore(|part| part == "rn");
        }
        let to = self.target(operands.first().ok_or("no operands")?)?.register;
        let sources = &operands[1..];
        if name == "lop3" {
            let [a, b, c, table] = exactly(sources)?;
            let from = [self.value(a, ty)?, self.value(b, ty)?, self.value(c, ty)?];
            let table =
                u64::from_str_radix(table.trim_start_matches("0x"), if table.starts_with("0x") { 16 } else { 10 });
            let function = integer::lookup(table.map_err(|error| error.to_string())?);
            self.push(Operation::Compute3(function, to, from));
            return Ok(());
        }
        let mut from = Vec::new();
        for (at, source) in sources.iter().enumerate() {
            from.push(self.value(source, source_type(&name, ty, at))?);
        }
        let operation = match *from {
            [a] => {
                let function = if is_float { float.unary(&name, ty) } else { integer::unary(&name, ty) };
                Operation::Compute1(function.ok_or_else(unknown)?, to, [a])
            }
            [a, b] => {
                let function = if is_float { float.binary(&name, ty) } else { integer::binary(&name, ty) };
                Operation::Compute2(function.ok_or_else(unknown)?, to, [a, b])
            }
            [a, b, c] => {
                let function = if is_float { float.ternary(&name, ty) } else { integer::ternary(&name, ty) };
                Operation::Compute3(function.ok_or_else(unknown)?, to, [a, b, c])
            }
            [a, b, c, d] if name == "bfi" => {
                Operation::Compute4(integer::insert(ty).ok_or_else(unknown)?, to, [a, b, c, d])
            }
            _ => return Err(unknown()),
        };
        self.push(operation);
        Ok(())
    }

    /// `mov`, also from and to several registers: `mov.b64 {a, b}, c`, `mov.b32 a, {b, c}`.
    fn lower_move(&mut self, opcode: &Opcode, operands: &[String]) -> Result<(), String> {
        let ty = opcode.ty()?;
        let [to, from] = exactly(operands)?;
        let (targets, sources) = (elements(to), elements(from));
        match (targets.len(), sources.len()) {
            (1, 1) => {
                let (to, from) = (self.target(to)?.register, self.value(from, ty)?);
                self.push(Operation::Compute1(integer::lanes(|[a]| a), to, [from]));
            }
            (parts, 1) => {
                let from = self.value(from, ty)?;
                let bits = ty.bits() / parts as u32;
                for (at, target) in targets.into_iter().enumerate().filter(|&(_, target)| target != "_") {
                    let to = self.target(target)?.register;
                    let shift = bits * at as u32;
                    self.push(Operation::Compute1(
                        integer::lanes(move |[a]| integer::low(a >> shift, bits)),
                        to,
                        [from],
                    ));
                }
            }
            (1, parts) => {
                let to = self.target(to)?.register;
                let bits = ty.bits() / parts as u32;
                let from =
                    sources.iter().map(|source| self.value(source, part_type(bits))).collect::<Result<Vec<_>, _>>()?;
                match *from {
                    [a, b] => self.push(Operation::Compute2(integer::lanes(move |[a, b]| a | b << bits), to, [a, b])),
                    [a, b, c, d] => {
                        let joined =
                            integer::lanes(move |[a, b, c, d]| a | b << bits | c << (2 * bits) | d << (3 * bits));
                        self.push(Operation::Compute4(joined, to, [a, b, c, d]));
                    }
                    _ => return Err(format!("a move of {parts} parts")),
                }
            }
            _ => return Err("a move from several to several".to_owned()),
        }
        Ok(())
    }

    /// `cvta.to.global.u64 a, b` and `cvta.shared.u64 a, b`
    fn lower_cvta(&mut self, opcode: &mut Opcode, operands: &[String]) -> Result<(), String> {
        let back = opcode.take("to");
        let space = opcode.choose(&["global", "shared", "local", "param"]).ok_or("cvta without a space")?;
        let window = Self::window(space).expect("one of the above");
        let [to, from] = exactly(operands)?;
        let (to, from) = (self.target(to)?.register, self.value(from, Type::U64)?);
        let amount = if back { window.wrapping_neg() } else { window };
        self.push(Operation::Compute1(integer::lanes(move |[a]| a.wrapping_add(amount)), to, [from]));
        Ok(())
    }

    fn lower_convert(&mut self, opcode: &mut Opcode, operands: &[String]) -> Result<(), String> {
        let &[to, from] = opcode.types.as_slice() else { return Err("a conversion without two types".to_owned()) };
        let rounding = opcode.parse(Rounding::parse);
        let float = opcode.float();
        let unknown = || format!("a conversion from {from:?} to {to:?} ({rounding:?}) is not supported");
        if operands.len() == 3 {
            let [target, upper, lower] = exactly(operands)?;
            let sources = [self.value(upper, from)?, self.value(lower, from)?];
            let target = self.target(target)?.register;
            self.push(Operation::Compute2(convert_pair(to, rounding, float).ok_or_else(unknown)?, target, sources));
            return Ok(());
        }
        let [target, source] = exactly(operands)?;
        let source = self.value(source, from)?;
        let target = self.target(target)?.register;
        self.push(Operation::Compute1(convert(to, from, rounding, float).ok_or_else(unknown)?, target, [source]));
        Ok(())
    }

    /// `setp.lt.and.f32 p|q, a, b, c`: p = (a < b) and c, q = !(a < b) and c.
    fn lower_compare(&mut self, opcode: &mut Opcode, operands: &[String]) -> Result<(), String> {
        let ty = opcode.ty()?;
        let float = opcode.float();
        let combine = opcode.choose(&["and", "or", "xor"]);
        let relation = std::mem::take(&mut opcode.modifiers);
        let &[relation] = relation.as_slice() else { return Err(format!("a comparison by {relation:?}")) };
        let compare = || {
            let found = if ty.is_integer() { integer::compare(relation, ty) } else { float.compare(relation, ty) };
            found.ok_or_else(|| format!("the comparison {relation} of {ty:?} is not supported"))
        };
        let [targets, a, b] = exactly(&operands[..3.min(operands.len())])?;
        let from = [self.value(a, ty)?, self.value(b, ty)?];
        let with = operands.get(3).map(|with| self.value(with, Type::Pred)).transpose()?;
        let targets: Vec<_> = targets.split('|').collect();
        let mut results = Vec::new();
        for (at, target) in targets.iter().enumerate() {
            let to = self.target(target)?.register;
            // Both results are made of operands that neither may have overwritten: by way of places of their own.
            let place = if targets.len() == 1 && with.is_none() { to } else { self.place() };
            self.push(Operation::Compute2(compare()?, place, from));
            if at == 1 {
                self.push(Operation::Compute1(integer::lanes(|[a]| a ^ 1), place, [place]));
            }
            if let (Some(with), Some(combine)) = (with, combine) {
                let function = integer::binary(combine, Type::Pred).expect("and, or, xor");
                self.push(Operation::Compute2(function, place, [place, with]));
            }
            results.push((to, place));
        }
        for (to, place) in results.into_iter().filter(|(to, place)| to != place) {
            self.push(Operation::Compute1(integer::lanes(|[a]| a), to, [place]));
        }
        Ok(())
    }

    /// `selp.b32 d, a, b, p` and `slct.b32.s32 d, a, b, c`
    fn lower_select(&mut self, opcode: &Opcode, operands: &[String]) -> Result<(), String> {
        let ty = opcode.ty()?;
        let [to, a, b, by] = exactly(operands)?;
        let [a, b] = [self.value(a, ty)?, self.value(b, ty)?];
        let (by, function) = match opcode.types.get(1) {
            None => (self.value(by, Type::Pred)?, integer::lanes(|[a, b, by]| if by == 1 { a } else { b })),
            Some(Type::S32) => {
                (self.value(by, Type::S32)?, integer::lanes(|[a, b, by]| if by >> 31 == 0 { a } else { b }))
            }
            Some(other) => return Err(format!("a choice by {other:?} is not supported")),
        };
        let to = self.target(to)?.register;
        self.push(Operation::Compute3(function, to, [a, b, by]));
        Ok(())
    }

    fn lower_access(&mut self, opcode: &mut Opcode, operands: &[String]) -> Result<(), String> {
        let ty = opcode.ty()?;
        let space = opcode.space();
        // Cache hints. A volatile or relaxed access is an access: here each is made where it stands.
        let hints =
            ["nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "volatile", "relaxed", "gpu", "cta", "weak", "sys"];
        opcode.ignore(|part| hints.contains(&part) || part.starts_with("L1::") || part.starts_with("L2::"));
        opcode.ignore(|part| part == "v2" || part == "v4");
        let bytes = ty.bits() as usize / 8;
        if bytes > 8 {
            return Err("accesses of 128 bits to one register are not supported".to_owned());
        }
        let [first, second] = exactly(operands)?;
        let (address, registers) = if opcode.name == "st" { (first, second) } else { (second, first) };
        let address = self.address(address)?;
        if opcode.name == "st" {
            let from = elements(registers).into_iter().map(|name| self.value(name, ty)).collect::<Result<_, _>>()?;
            self.push(Operation::Store { space, address, from, bytes });
            return Ok(());
        }
        let names = elements(registers);
        let named = names.into_iter().map(|name| self.target(name)).collect::<Result<Vec<_>, _>>()?;
        let extend = ty.is_signed().then(|| named.iter().map(|named| named.bits).max().unwrap_or(64));
        let to = named.into_iter().map(|named| named.register).collect();
        self.push(Operation::Load { space, address, to, bytes, extend });
        Ok(())
    }

    /// `atom.global.add.u32 d, [a], b` and `red.global.add.u32 [a], b`
    fn lower_atomic(&mut self, opcode: &mut Opcode, operands: &[String]) -> Result<(), String> {
        let ty = opcode.ty()?;
        let space = opcode.space();
        opcode.ignore(|part| ["relaxed", "acquire", "release", "acq_rel", "gpu", "cta", "sys"].contains(&part));
        let kind =
            opcode.choose(&["add", "min", "max", "and", "or", "xor", "exch", "cas"]).ok_or("an unknown atomic")?;
        let (to, operands) = if opcode.name == "atom" {
            operands.split_first().map(|(to, rest)| (Some(to), rest))
        } else {
            Some((None, operands))
        }
        .ok_or("no operands")?;
        let address = self.address(operands.first().ok_or("no address")?)?;
        let values = operands[1..].iter().map(|value| self.value(value, ty)).collect::<Result<Vec<_>, _>>()?;
        let first = *values.first().ok_or("no value")?;
        let operands = [first, values.get(1).copied().unwrap_or(first)];
        let change = change(kind, ty).ok_or_else(|| format!("atomic {kind} of {ty:?} is not supported"))?;
        let to = to.map(|to| self.target(to)).transpose()?.map(|named| named.register);
        self.push(Operation::Atomic { space, address, to, operands, bytes: ty.bits() as usize / 8, change });
        Ok(())
    }

    /// What a vote asks.
    pub(super) fn vote(opcode: &mut Opcode) -> Result<Vote, String> {
        Ok(match opcode.choose(&["all", "any", "uni", "ballot"]).ok_or("an unknown vote")? {
            "all" => Vote::All,
            "any" => Vote::Any,
            "uni" => Vote::Uniform,
            _ => Vote::Ballot,
        })
    }

    pub(super) fn registers(&mut self, operand: &str) -> Result<Vec<Register>, String> {
        elements(operand).into_iter().map(|name| Ok(self.target(name)?.register)).collect()
    }
}

/// The type of a source operand that differs from the instruction's own.
fn source_type(name: &str, ty: Type, at: usize) -> Type {
    match (name, at) {
        ("mad.wide", 2) if ty.bits() == 32 => Type::U64,
        ("shl" | "shr", 1) | ("bfe", 1 | 2) | ("bfi", 2 | 3) | ("mad.wide", 2) => Type::U32,
        _ => ty,
    }
}

fn part_type(bits: u32) -> Type {
    match bits {
        8 => Type::B8,
        16 => Type::B16,
        _ => Type::B32,
    }
}

/// What an atomic instruction or a reduction of a warp does to a value.
pub(super) fn change(kind: &str, ty: Type) -> Option<super::instruction::Change> {
    let bits = ty.bits();
    if !ty.is_integer() {
        return None; // floats would make the result depend on the order of the blocks
    }
    let wide = move |value: u64| {
        if ty.is_signed() { i128::from(integer::sign_extended(value, bits) as i64) } else { i128::from(value) }
    };
    Some(match kind {
        "add" => Box::new(move |old, value, _| integer::low(old.wrapping_add(value), bits)),
        "min" => Box::new(move |old, value, _| if wide(value) < wide(old) { value } else { old }),
        "max" => Box::new(move |old, value, _| if wide(value) > wide(old) { value } else { old }),
        "and" => Box::new(|old, value, _| old & value),
        "or" => Box::new(|old, value, _| old | value),
        "xor" => Box::new(|old, value, _| old ^ value),
        "exch" => Box::new(|_, value, _| value),
        "cas" => Box::new(|old, expected, value| if old == expected { value } else { old }),
        _ => return None,
    })
}
