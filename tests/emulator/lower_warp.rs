//! Instructions of a whole warp or block: barriers, shuffles, votes, copies, matrices.

use super::instruction::{Operation, Shuffle, Type, Vote};
use super::lower::{Opcode, change, exactly};
use super::matrix::Multiply;
use super::parse::Builder;

impl Builder {
    pub(super) fn lower_warp(&mut self, opcode: &mut Opcode, operands: &[String]) -> Result<(), String> {
        opcode.take("aligned");
        let u32 = Type::U32;
        match opcode.name {
            "bar" | "barrier" => self.lower_barrier(opcode, operands)?,
            "shfl" => {
                opcode.take("sync");
                let mode = match opcode.choose(&["idx", "up", "down", "bfly"]) {
                    Some("idx") => Shuffle::Index,
                    Some("up") => Shuffle::Up,
                    Some("down") => Shuffle::Down,
                    Some("bfly") => Shuffle::Butterfly,
                    _ => return Err("an unknown shuffle".to_owned()),
                };
                let [to, value, lane, clamp, members] = exactly(operands)?;
                let (to, inside) = to.split_once('|').map_or((to, None), |(to, inside)| (to, Some(inside)));
                let to = self.target(to)?.register;
                let inside = inside.map(|inside| self.target(inside)).transpose()?.map(|named| named.register);
                let [value, lane] = [self.value(value, u32)?, self.value(lane, u32)?];
                let [clamp, members] = [self.value(clamp, u32)?, self.value(members, u32)?];
                self.push(Operation::Shuffle { mode, to, inside, value, lane, clamp, members });
            }
            "vote" => {
                opcode.take("sync");
                let vote = Self::vote(opcode)?;
                let [to, predicate, members] = exactly(operands)?;
                let [predicate, members] = [self.value(predicate, Type::Pred)?, self.value(members, u32)?];
                let to = self.target(to)?.register;
                self.push(Operation::Vote { vote, to, predicate, members });
            }
            "activemask" => {
                let [to] = exactly(operands)?;
                let to = self.target(to)?.register;
                self.push(Operation::ActiveMask(to));
            }
            "match" => {
                if !(opcode.take("any") && opcode.take("sync")) {
                    return Err("a match that is not match.any.sync is not supported".to_owned());
                }
                let ty = opcode.ty()?;
                let [to, value, members] = exactly(operands)?;
                let [value, members] = [self.value(value, ty)?, self.value(members, u32)?];
                let to = self.target(to)?.register;
                self.push(Operation::MatchAny { to, value, members });
            }
            _ => {
                opcode.take("sync");
                let ty = opcode.ty()?;
                let kind = opcode.choose(&["add", "min", "max", "and", "or", "xor"]).ok_or("an unknown reduction")?;
                let fold = change(kind, ty).ok_or("a reduction of integers only")?;
                let [to, value, members] = exactly(operands)?;
                let [value, members] = [self.value(value, ty)?, self.value(members, u32)?];
                let to = self.target(to)?.register;
                self.push(Operation::Reduce { fold, to, value, members });
            }
        }
        Ok(())
    }

    /// `bar.sync 0`, `bar.sync 1, 128`, `bar.warp.sync m`, `bar.red.popc.u32 d, 0, p`
    fn lower_barrier(&mut self, opcode: &mut Opcode, operands: &[String]) -> Result<(), String> {
        opcode.take("cta");
        if opcode.take("warp") {
            opcode.take("sync");
            let [members] = exactly(operands)?;
            let members = self.value(members, Type::U32)?;
            self.push(Operation::WarpSync(members));
            return Ok(());
        }
        if opcode.take("red") {
            let vote = match opcode.choose(&["popc", "and", "or"]) {
                Some("popc") => Vote::Count,
                Some("and") => Vote::All,
                Some("or") => Vote::Any,
                _ => return Err("an unknown reduction".to_owned()),
            };
            let [to, id, predicate] = exactly(operands)?;
            let [id, predicate] = [self.value(id, Type::U32)?, self.value(predicate, Type::Pred)?];
            let to = self.target(to)?.register;
            self.push(Operation::Barrier { id, threads: None, reduce: Some((vote, predicate, to)) });
            return Ok(());
        }
        if !opcode.take("sync") {
            return Err("a barrier that is neither sync nor red is not supported".to_owned());
        }
        let id = self.value(operands.first().ok_or("no barrier")?, Type::U32)?;
        let threads = operands.get(1).map(|count| self.value(count, Type::U32)).transpose()?;
        self.push(Operation::Barrier { id, threads, reduce: None });
        Ok(())
    }

    pub(super) fn lower_tile(&mut self, opcode: &mut Opcode, operands: &[String]) -> Result<(), String> {
        match opcode.name {
            "cp" => self.lower_copy(opcode, operands)?,
            "ldmatrix" | "stmatrix" => {
                for part in ["sync", "aligned", "m8n8", "shared"] {
                    opcode.take(part);
                }
                let count = match opcode.choose(&["x1", "x2", "x4"]).ok_or("a number of matrices")? {
                    "x1" => 1,
                    "x2" => 2,
                    _ => 4,
                };
                let transposed = opcode.take("trans");
                if opcode.ty()? != Type::B16 {
                    return Err("matrices of 16-bit elements only".to_owned());
                }
                let [first, second] = exactly(operands)?;
                let (registers, address) = if opcode.name == "ldmatrix" { (first, second) } else { (second, first) };
                let address = self.address(address)?;
                let registers = self.registers(registers)?;
                if registers.len() != count {
                    return Err(format!("{} registers for {count} matrices", registers.len()));
                }
                self.push(match opcode.name {
                    "ldmatrix" => Operation::LoadMatrix { to: registers, transposed, address },
                    _ => Operation::StoreMatrix { from: registers, transposed, address },
                });
            }
            _ => {
                for part in ["sync", "aligned", "row", "col"] {
                    opcode.take(part);
                }
                let depth =
                    match opcode.choose(&["m16n8k16", "m16n8k8", "m16n8k4"]).ok_or("an unknown shape of a product")? {
                        "m16n8k16" => 16,
                        "m16n8k8" => 8,
                        _ => 4,
                    };
                let element = match opcode.types[..] {
                    [Type::F32, Type::BF16, Type::BF16, Type::F32] => Type::BF16,
                    [Type::F32, Type::F16, Type::F16, Type::F32] => Type::F16,
                    [Type::F32, Type::TF32, Type::TF32, Type::F32] if depth < 16 => Type::TF32,
                    _ => return Err(format!("a product of {:?} is not supported", opcode.types)),
                };
                let [d, a, b, c] = exactly(operands)?;
                let [d, a, b, c] = [self.registers(d)?, self.registers(a)?, self.registers(b)?, self.registers(c)?];
                let multiply = Multiply::new(element, depth, d, a, b, c).ok_or("the wrong number of registers")?;
                self.push(Operation::Multiply(multiply));
            }
        }
        Ok(())
    }

    /// `cp.async.cg.shared.global [a], [b], 16, n`
    fn lower_copy(&mut self, opcode: &mut Opcode, operands: &[String]) -> Result<(), String> {
        if !opcode.take("async") {
            return Err("cp without async is not supported".to_owned());
        }
        if opcode.take("commit_group") {
            self.push(Operation::CommitCopies);
            return Ok(());
        }
        if opcode.take("wait_all") {
            self.push(Operation::WaitCopies(None));
            return Ok(());
        }
        if opcode.take("wait_group") {
            let [count] = exactly(operands)?;
            self.push(Operation::WaitCopies(Some(count.parse().map_err(|_| "a number of groups")?)));
            return Ok(());
        }
        for part in ["ca", "cg", "shared", "global", "L2::64B", "L2::128B", "L2::256B"] {
            opcode.take(part);
        }
        let (to, from) = (self.address(operands.first().ok_or("no target")?)?, operands.get(1).ok_or("no source")?);
        let from = self.address(from)?;
        let bytes = operands.get(2).and_then(|bytes| bytes.parse().ok()).filter(|bytes| [4, 8, 16].contains(bytes));
        let bytes = bytes.ok_or("4, 8 or 16 bytes")?;
        let valid = operands.get(3).map(|valid| self.value(valid, Type::U32)).transpose()?;
        self.push(Operation::CopyAsync { to, from, bytes, valid });
        Ok(())
    }
}
