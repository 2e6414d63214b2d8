//! PTX text to kernels: declarations, scopes, labels; `lower` does the single instructions.

use super::instruction::{Address, Guard, Instruction, Kernel, Operation, Register, Special, Type};
use super::integer::low;
use super::memory::{LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW};
use super::scan::{Statement, statements};
use std::collections::HashMap;

/// The kernels of a PTX text, and the files that its line numbers are of.
#[derive(Default)]
pub(crate) struct Module {
    pub(crate) kernels: Vec<Kernel>,
    pub(crate) files: HashMap<usize, String>,
}

/// A whole PTX text.
pub(crate) fn parse(text: &str) -> Result<Module, String> {
    let mut module = Module::default();
    let mut shared = Vec::new();
    let mut statements = statements(text)?.into_iter();
    while let Some((line, statement)) = statements.next() {
        let fail = |what: String| format!("PTX line {line}: {what}");
        let Statement::Directive(directive) = statement else {
            return Err(fail(format!("{statement:?} outside of a function")));
        };
        let words: Vec<_> = directive.split_whitespace().collect();
        if words.contains(&".entry") {
            let mut builder = Builder::new(&directive).map_err(fail)?;
            shared.iter().try_for_each(|text: &String| builder.declare_shared(text))?;
            builder.body(&mut statements)?;
            module.kernels.push(builder.finish()?);
        } else if words.contains(&".shared") {
            shared.push(directive);
        } else if let [".file", number, path, ..] = words[..] {
            let name = path.trim_matches('"').rsplit('/').next().unwrap_or_default();
            module.files.insert(number.parse().map_err(|_| fail("a file without number".to_owned()))?, name.to_owned());
        } else if words[0] == ".global" && words.contains(&"=") {
            // A constant of the text. Kernels hold its value; one that reads it by name fails, for it is not declared there.
        } else if ![".version", ".target", ".address_size"].contains(&words[0]) {
            return Err(fail(format!("{directive:?} is not supported outside of a function")));
        }
    }
    Ok(module)
}

/// Where a name leads to.
#[derive(Debug, Clone, Copy)]
enum Symbol {
    /// An address in a state space.
    Shared(u64),
    /// The shared memory that the launch adds.
    DynamicShared,
    Local(u64),
    Param(u64),
}

/// A register as an operand: its place and its width.
#[derive(Debug, Clone, Copy)]
pub(super) struct Named {
    pub(super) register: Register,
    pub(super) bits: u32,
}

#[derive(Default)]
struct Scope {
    number: usize,
    /// Registers declared one by one, and the prefixes of those declared as `%r<9>`.
    names: HashMap<String, Named>,
    prefixes: Vec<(String, u32)>,
}

/// A kernel in the making.
pub(super) struct Builder {
    kernel: Kernel,
    scopes: Vec<Scope>,
    count: usize,
    constants: HashMap<u64, Register>,
    specials: HashMap<Special, Register>,
    symbols: HashMap<String, Symbol>,
    /// Constants that are addresses in the dynamic shared memory.
    dynamic: HashMap<u64, Register>,
    /// Where a label (of a scope) leads, and the branches that name one, with the scopes around them.
    labels: HashMap<(usize, String), usize>,
    branches: Vec<(usize, String, Vec<usize>)>,
    guard: Option<Guard>,
    line: usize,
    source: Option<(usize, usize)>,
}

impl Builder {
    /// From `.visible .entry name(.param .align 8 .b8 name_param_0[56])`.
    fn new(header: &str) -> Result<Self, String> {
        let after = header.split_once(".entry").ok_or("no entry")?.1;
        let (name, parameters) = after.split_once('(').ok_or("an entry without parameters")?;
        let parameters = parameters.split_once(')').ok_or("parameters without end")?.0;
        let kernel = Kernel {
            name: name.trim().to_owned(),
            instructions: Vec::new(),
            registers: 0,
            constants: Vec::new(),
            specials: Vec::new(),
            parameters: 0,
            shared: 0,
            local: 0,
        };
        let mut builder = Self {
            kernel,
            scopes: Vec::new(),
            count: 0,
            constants: HashMap::new(),
            specials: HashMap::new(),
            symbols: HashMap::new(),
            dynamic: HashMap::new(),
            labels: HashMap::new(),
            branches: Vec::new(),
            guard: None,
            line: 0,
            source: None,
        };
        for parameter in parameters.split(',').filter(|text| !text.trim().is_empty()) {
            let (name, size, align) = variable(parameter)?;
            let start = builder.kernel.parameters.next_multiple_of(align);
            builder.symbols.insert(name, Symbol::Param(start as u64));
            builder.kernel.parameters = start + size.ok_or("a parameter without size")?;
        }
        Ok(builder)
    }

    /// Everything between the braces.
    fn body(&mut self, statements: &mut impl Iterator<Item = (usize, Statement)>) -> Result<(), String> {
        for (line, statement) in statements {
            self.line = line;
            let done = match statement {
                Statement::Open => {
                    self.count += 1;
                    self.scopes.push(Scope { number: self.count, ..Scope::default() });
                    Ok(())
                }
                Statement::Close => {
                    self.scopes.pop();
                    if self.scopes.is_empty() {
                        return Ok(());
                    }
                    Ok(())
                }
                Statement::Label(name) => {
                    let scope = self.scope().number;
                    self.labels.insert((scope, name), self.kernel.instructions.len());
                    Ok(())
                }
                Statement::Directive(text) => self.directive(&text),
                Statement::Instruction(ref text) => {
                    self.instruction(text).map_err(|error| format!("{error}, in {text:?}"))
                }
            };
            done.map_err(|error| format!("PTX line {line}: {error}"))?;
        }
        Err("a function without end".to_owned())
    }

    fn scope(&mut self) -> &mut Scope {
        self.scopes.last_mut().expect("inside the braces of a function")
    }

    fn directive(&mut self, text: &str) -> Result<(), String> {
        match text.split_whitespace().next().unwrap_or_default() {
            ".reg" => self.declare_registers(text),
            ".shared" => self.declare_shared(text),
            ".local" => {
                let (name, size, align) = variable(text)?;
                let start = self.kernel.local.next_multiple_of(align);
                self.symbols.insert(name, Symbol::Local(start as u64));
                self.kernel.local = start + size.ok_or("a local variable without size")?;
                Ok(())
            }
            ".loc" => {
                let numbers =
                    text.split_whitespace().skip(1).map_while(|number| number.parse().ok()).collect::<Vec<_>>();
                // Line 0 is the compiler's own doing.
                self.source = numbers.get(1).filter(|&&line| line > 0).map(|&line| (numbers[0], line));
                Ok(())
            }
            ".pragma" => Ok(()),
            _ => Err(format!("{text:?} is not supported")),
        }
    }

    /// `.reg .b32 %r<170>, x, y`
    fn declare_registers(&mut self, text: &str) -> Result<(), String> {
        let mut words = text.split_whitespace();
        let ty = words.nth(1).and_then(|ty| Type::parse(&ty[1..])).ok_or("a register without type")?;
        let names: String = words.collect();
        for name in names.split(',') {
            if let Some((prefix, _)) = name.split_once('<') {
                self.scope().prefixes.push((prefix.to_owned(), ty.bits()));
            } else {
                let named = Named { register: self.place(), bits: ty.bits() };
                self.scope().names.insert(name.to_owned(), named);
            }
        }
        Ok(())
    }

    fn declare_shared(&mut self, text: &str) -> Result<(), String> {
        let (name, size, align) = variable(text)?;
        let symbol = match size {
            Some(size) => {
                let start = self.kernel.shared.next_multiple_of(align);
                self.kernel.shared = start + size;
                Symbol::Shared(start as u64)
            }
            None => Symbol::DynamicShared,
        };
        self.symbols.insert(name, symbol);
        Ok(())
    }

    /// `@!%p1 opcode operands`
    fn instruction(&mut self, text: &str) -> Result<(), String> {
        let mut text = text;
        self.guard = None;
        if let Some(guarded) = text.strip_prefix('@') {
            let (name, rest) = guarded.split_once(char::is_whitespace).ok_or("a guard alone")?;
            let negated = name.starts_with('!');
            let register = self.named(name.trim_start_matches('!'))?.register;
            self.guard = Some(Guard { register, negated });
            text = rest.trim_start();
        }
        let (opcode, operands) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        self.lower(opcode, &super::scan::operands(operands))
    }

    pub(super) fn push(&mut self, operation: Operation) {
        let (guard, line, source) = (self.guard, self.line, self.source);
        self.kernel.instructions.push(Instruction { operation, guard, line, source });
    }

    /// A new place in the register file.
    pub(super) fn place(&mut self) -> Register {
        self.kernel.registers += 1;
        self.kernel.registers - 1
    }

    /// The register of a name.
    pub(super) fn named(&mut self, name: &str) -> Result<Named, String> {
        if let Some(&named) = self.scopes.iter().rev().find_map(|scope| scope.names.get(name)) {
            return Ok(named);
        }
        let prefix = name.trim_end_matches(|c: char| c.is_ascii_digit());
        for at in (0..self.scopes.len()).rev() {
            let found = self.scopes[at].prefixes.iter().find(|(declared, _)| declared == prefix);
            if let Some(&(_, bits)) = found {
                let named = Named { register: self.place(), bits };
                self.scopes[at].names.insert(name.to_owned(), named);
                return Ok(named);
            }
        }
        Err(format!("{name} is no register"))
    }

    /// Where a result goes; `_` is nowhere.
    pub(super) fn target(&mut self, name: &str) -> Result<Named, String> {
        if name == "_" {
            return Ok(Named { register: self.place(), bits: 64 });
        }
        self.named(name)
    }

    pub(super) fn constant(&mut self, value: u64) -> Register {
        if let Some(&register) = self.constants.get(&value) {
            return register;
        }
        let register = self.place();
        self.constants.insert(value, register);
        register
    }

    /// What is read: a register, a special one, an immediate or a name's address.
    pub(super) fn value(&mut self, text: &str, ty: Type) -> Result<Register, String> {
        if let Some(negated) = text.strip_prefix('!') {
            let from = self.value(negated, Type::Pred)?;
            let to = self.place();
            let not = super::integer::unary("not", Type::Pred).expect("exists");
            let guard = self.guard.take();
            self.push(Operation::Compute1(not, to, [from]));
            self.guard = guard;
            return Ok(to);
        }
        if let Some(special) = special(text) {
            if let Some(&register) = self.specials.get(&special) {
                return Ok(register);
            }
            let register = self.place();
            self.specials.insert(special, register);
            return Ok(register);
        }
        if let Some(value) = immediate(text) {
            return Ok(self.constant(low(value, ty.bits())));
        }
        let (name, offset) = name_and_offset(text)?;
        match self.symbols.get(name) {
            Some(&(Symbol::Shared(start) | Symbol::Local(start) | Symbol::Param(start))) => {
                Ok(self.constant(start.wrapping_add_signed(offset)))
            }
            Some(Symbol::DynamicShared) => {
                let offset = offset as u64;
                if let Some(&register) = self.dynamic.get(&offset) {
                    return Ok(register);
                }
                let register = self.place();
                self.dynamic.insert(offset, register);
                Ok(register)
            }
            None => Ok(self.named(text)?.register),
        }
    }

    /// `[base+offset]`
    pub(super) fn address(&mut self, text: &str) -> Result<Address, String> {
        let inside = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).ok_or("no address")?;
        let (name, offset) = name_and_offset(inside)?;
        Ok(Address { base: self.value(name, Type::U64)?, offset })
    }

    pub(super) fn branch(&mut self, label: &str) {
        let scopes = self.scopes.iter().map(|scope| scope.number).collect();
        self.branches.push((self.kernel.instructions.len(), label.to_owned(), scopes));
        self.push(Operation::Branch(usize::MAX));
    }

    /// What to add to an address of a state space to make it a generic one.
    pub(super) fn window(space: &str) -> Option<u64> {
        match space {
            "global" => Some(0),
            "shared" => Some(SHARED_WINDOW),
            "local" => Some(LOCAL_WINDOW),
            "param" => Some(PARAM_WINDOW),
            _ => None,
        }
    }

    fn finish(mut self) -> Result<Kernel, String> {
        for (at, name, scopes) in std::mem::take(&mut self.branches) {
            let target = scopes.iter().rev().find_map(|&scope| self.labels.get(&(scope, name.clone())));
            let target = *target.ok_or_else(|| format!("no label {name}"))?;
            self.kernel.instructions[at].operation = Operation::Branch(target);
        }
        // Dynamic shared memory begins aligned to 16 bytes, as any declared alignment here asks for.
        self.kernel.shared = self.kernel.shared.next_multiple_of(16);
        let start = self.kernel.shared as u64;
        self.kernel.constants = self.constants.into_iter().map(|(value, register)| (register, value)).collect();
        self.kernel.constants.extend(self.dynamic.into_iter().map(|(offset, at)| (at, start.wrapping_add(offset))));
        self.kernel.specials = self.specials.into_iter().map(|(special, register)| (register, special)).collect();
        Ok(self.kernel)
    }
}

/// Name, bytes (None where the launch decides) and alignment of `.shared .align 16 .b8 name[2112]`.
fn variable(text: &str) -> Result<(String, Option<usize>, usize), String> {
    let words: Vec<_> = text.split_whitespace().collect();
    let fail = || format!("{text:?} is no variable");
    let ty = words.iter().rev().find_map(|word| Type::parse(word.strip_prefix('.')?)).ok_or_else(fail)?;
    let size = ty.bits() as usize / 8;
    let align = words.iter().position(|&word| word == ".align").and_then(|at| words.get(at + 1)?.parse().ok());
    let last = words.last().ok_or_else(fail)?;
    let (name, count) = match last.split_once('[') {
        Some((name, "]")) => (name, None),
        Some((name, count)) => (name, Some(count.trim_end_matches(']').parse::<usize>().map_err(|_| fail())?)),
        None => (*last, Some(1)),
    };
    Ok((name.to_owned(), count.map(|count| count * size), align.unwrap_or(size)))
}

/// `name+12`, `name+-16` or `name` alone.
fn name_and_offset(text: &str) -> Result<(&str, i64), String> {
    let Some((name, offset)) = text.split_once('+') else { return Ok((text, 0)) };
    Ok((name, offset.parse().map_err(|_| format!("{offset} is no offset"))?))
}

/// An immediate's bits: 12, -12, 0x1f, 12U, 0f3F800000 or 0d3FF0000000000000.
fn immediate(text: &str) -> Option<u64> {
    if let Some(bits) = text.strip_prefix("0f").or_else(|| text.strip_prefix("0F")) {
        return u64::from_str_radix(bits, 16).ok().filter(|_| bits.len() == 8);
    }
    if let Some(bits) = text.strip_prefix("0d").or_else(|| text.strip_prefix("0D")) {
        return u64::from_str_radix(bits, 16).ok().filter(|_| bits.len() == 16);
    }
    let (negative, digits) = text.strip_prefix('-').map_or((false, text), |digits| (true, digits));
    let digits = digits.strip_suffix('U').unwrap_or(digits);
    let value = match digits.strip_prefix("0x") {
        Some(hexadecimal) => u64::from_str_radix(hexadecimal, 16).ok()?,
        None => digits.parse().ok()?,
    };
    Some(if negative { value.wrapping_neg() } else { value })
}

fn special(text: &str) -> Option<Special> {
    let axis = |name: &str| ["x", "y", "z"].iter().position(|&axis| axis == name);
    if let Some((name, part)) = text.strip_prefix('%')?.split_once('.') {
        return match name {
            "tid" => axis(part).map(Special::Thread),
            "ntid" => axis(part).map(Special::Threads),
            "ctaid" => axis(part).map(Special::Block),
            "nctaid" => axis(part).map(Special::Blocks),
            _ => None,
        };
    }
    Some(match text {
        "%laneid" => Special::Lane,
        "%warpid" => Special::Warp,
        "%lanemask_lt" => Special::LanesBelow,
        "%lanemask_le" => Special::LanesUpTo,
        "%lanemask_eq" => Special::LaneBit,
        "%lanemask_ge" => Special::LanesFrom,
        "%lanemask_gt" => Special::LanesAbove,
        "%dynamic_smem_size" => Special::DynamicShared,
        "%total_smem_size" => Special::TotalShared,
        _ => return None,
    })
}
