//! A warp: registers of 32 lanes and where each of them stands in the program.
//!
//! Lanes at the same instruction form a front; the front that is furthest behind goes first, so that lanes that parted at a
//! branch meet again after it. A front at an instruction that wants lanes of other fronts waits for them.

use super::block::Block;
use super::instruction::{Address, Function, Guard, Kernel, Lanes, Operation, Register, Special, Vote, WARP};
use super::memory::Checked;

/// Lanes that stand at the same instruction.
#[derive(Debug, Clone, Copy)]
struct Front {
    next: usize,
    mask: u32,
    /// Until lanes join it.
    waiting: bool,
}

/// Why a warp gave the turn away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    Ended,
    Barrier(Arrival),
}

/// A warp at a barrier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Arrival {
    pub(crate) id: u64,
    pub(crate) threads: Option<u64>,
    pub(crate) reduce: Option<(Vote, Register, Register)>,
    /// Of the barrier instruction.
    pub(crate) at: usize,
}

/// Where a front goes.
enum Flow {
    Next,
    Jump(usize, u32),
    Exit(u32),
    Wait,
    Barrier(Arrival),
}

/// An error with the instruction that made it.
#[derive(Debug)]
pub(crate) struct Trap {
    pub(crate) message: String,
    pub(crate) at: usize,
}

/// A copy from global to shared memory on its way.
pub(super) struct Copy {
    pub(super) lane: usize,
    /// Number of its group among those of its lane.
    pub(super) group: usize,
    pub(super) to: u64,
    pub(super) bytes: Vec<u8>,
}

pub(crate) struct Warp {
    pub(crate) index: u32,
    pub(crate) registers: Vec<Lanes>,
    fronts: Vec<Front>,
    /// The lanes that the block has threads for.
    existing: u32,
    /// Bytes of all lanes, one after the other.
    pub(super) local: Vec<u8>,
    pub(super) copies: Vec<Copy>,
    pub(super) groups: [usize; WARP],
    pub(crate) executed: u64,
}

impl Warp {
    pub(crate) fn new(kernel: &Kernel, index: u32, block: &Block) -> Self {
        let threads = (block.threads - index * WARP as u32).min(WARP as u32);
        let existing = u32::MAX >> (WARP as u32 - threads);
        let mut registers = vec![[0; WARP]; kernel.registers];
        for &(register, value) in &kernel.constants {
            registers[register] = [value; WARP];
        }
        for &(register, special) in &kernel.specials {
            registers[register] = std::array::from_fn(|lane| {
                let bit = 1u64 << lane;
                match special {
                    Special::Thread(0) => u64::from(index) * WARP as u64 + lane as u64,
                    Special::Thread(_) => 0,
                    Special::Threads(0) => u64::from(block.threads),
                    Special::Threads(_) => 1,
                    Special::Block(axis) => u64::from(block.position[axis]),
                    Special::Blocks(axis) => u64::from(block.grid[axis]),
                    Special::Lane => lane as u64,
                    Special::Warp => u64::from(index),
                    Special::LanesBelow => bit - 1,
                    Special::LanesUpTo => bit | (bit - 1),
                    Special::LaneBit => bit,
                    Special::LanesFrom => u64::from(u32::MAX) & !(bit - 1),
                    Special::LanesAbove => u64::from(u32::MAX) & !(bit | (bit - 1)),
                    Special::DynamicShared => u64::from(block.dynamic_shared),
                    Special::TotalShared => u64::from(block.dynamic_shared) + kernel.shared as u64,
                }
            });
        }
        let fronts = vec![Front { next: 0, mask: existing, waiting: false }];
        let local = vec![0; kernel.local * WARP];
        Self { index, registers, fronts, existing, local, copies: Vec::new(), groups: [0; WARP], executed: 0 }
    }

    /// Runs until the warp ends or stands at a barrier.
    pub(crate) fn run(&mut self, kernel: &Kernel, block: &mut Block) -> Result<Stop, Trap> {
        loop {
            let alone = self.fronts.len() == 1 && !self.fronts[0].waiting;
            let current = if alone { Some(0) } else { self.settle()? };
            let Some(current) = current else { return Ok(Stop::Ended) };
            let Front { next: at, mask, .. } = self.fronts[current];
            let trap = |message: String| Trap { message, at };
            let instruction =
                kernel.instructions.get(at).ok_or_else(|| trap("beyond the last instruction".to_owned()))?;
            self.executed += 1;
            block.profile.executed[at] += 1;
            if self.executed > block.patience {
                return Err(trap(format!("{} instructions of one warp: an endless loop?", block.patience)));
            }
            let active = mask & instruction.guard.map_or(u32::MAX, |guard| self.guarded(guard));
            let flow = if active == 0 {
                Flow::Next
            } else {
                self.step(&instruction.operation, at, (active, mask), block).map_err(trap)?
            };
            let front = &mut self.fronts[current];
            match flow {
                Flow::Next => front.next += 1,
                Flow::Jump(target, taken) if taken == mask => front.next = target,
                Flow::Jump(target, taken) => {
                    *front = Front { next: at + 1, mask: mask & !taken, waiting: false };
                    self.fronts.push(Front { next: target, mask: taken, waiting: false });
                }
                Flow::Exit(ended) => {
                    *front = Front { next: at + 1, mask: mask & !ended, waiting: false };
                    self.fronts.retain(|front| front.mask != 0);
                    if !self.copies.is_empty() && self.fronts.is_empty() {
                        return Err(trap("the warp ends while copies of its own are in flight".to_owned()));
                    }
                }
                Flow::Wait => front.waiting = true,
                Flow::Barrier(arrival) => {
                    front.next += 1;
                    return Ok(Stop::Barrier(arrival));
                }
            }
        }
    }

    /// Joins fronts that met; the one that is furthest behind and does not wait.
    fn settle(&mut self) -> Result<Option<usize>, Trap> {
        let mut at = 0;
        while at < self.fronts.len() {
            let Front { next, .. } = self.fronts[at];
            if let Some(other) = (at + 1..self.fronts.len()).find(|&other| self.fronts[other].next == next) {
                let joined = self.fronts.swap_remove(other);
                self.fronts[at].mask |= joined.mask;
                self.fronts[at].waiting = false;
            } else {
                at += 1;
            }
        }
        let ready = (0..self.fronts.len()).filter(|&at| !self.fronts[at].waiting);
        match (ready.min_by_key(|&at| self.fronts[at].next), self.fronts.first()) {
            (None, Some(&Front { next, mask, .. })) => {
                let message = format!("lanes {mask:#010x} wait here for others, which never come");
                Err(Trap { message, at: next })
            }
            (ready, _) => Ok(ready),
        }
    }

    fn guarded(&self, guard: Guard) -> u32 {
        let set = mask(&self.registers[guard.register]);
        if guard.negated { !set } else { set }
    }

    /// Does one instruction. `active`: the lanes of the front that its guard lets through; `front`: all of them.
    fn step(
        &mut self,
        operation: &Operation,
        at: usize,
        (active, front): (u32, u32),
        block: &mut Block,
    ) -> Checked<Flow> {
        match *operation {
            Operation::Compute1(ref function, to, from) => self.compute(function, to, from, active),
            Operation::Compute2(ref function, to, from) => self.compute(function, to, from, active),
            Operation::Compute3(ref function, to, from) => self.compute(function, to, from, active),
            Operation::Compute4(ref function, to, from) => self.compute(function, to, from, active),
            Operation::Branch(target) => return Ok(Flow::Jump(target, active)),
            Operation::Exit => return Ok(Flow::Exit(active)),
            Operation::Fence => {}
            Operation::Barrier { id, threads, reduce } => {
                if active != self.existing {
                    return if front == active && front != self.alive() {
                        Ok(Flow::Wait)
                    } else {
                        Err(self.missing(active))
                    };
                }
                let uniform = |register: Register| self.registers[register][active.trailing_zeros() as usize];
                let arrival = Arrival { id: uniform(id), threads: threads.map(uniform), reduce, at };
                return Ok(Flow::Barrier(arrival));
            }
            Operation::WarpSync(members)
            | Operation::Shuffle { members, .. }
            | Operation::Vote { members, .. }
            | Operation::MatchAny { members, .. }
            | Operation::Reduce { members, .. } => {
                if !self.gathered(members, active)? {
                    return Ok(Flow::Wait);
                }
                self.collective(operation, active)?;
                if matches!(operation, Operation::WarpSync(_)) {
                    block.shared.meet(self.index);
                }
            }
            Operation::ActiveMask(to) => {
                self.everywhere(to, active, u64::from(active));
            }
            Operation::Multiply(ref multiply) => {
                self.whole(active)?;
                for (to, values) in multiply.d.iter().zip(multiply.run(&self.registers)) {
                    self.registers[*to] = values;
                }
            }
            Operation::LoadMatrix { .. } | Operation::StoreMatrix { .. } => {
                self.whole(active)?;
                self.access(operation, active, at, block)?;
            }
            _ => self.access(operation, active, at, block)?,
        }
        Ok(Flow::Next)
    }

    fn compute<const N: usize>(&mut self, function: &Function<N>, to: Register, from: [Register; N], active: u32) {
        let values = from.map(|register| self.registers[register]);
        function(&mut self.registers[to], values.each_ref(), active);
    }

    pub(crate) fn alive(&self) -> u32 {
        self.fronts.iter().fold(0, |alive, front| alive | front.mask)
    }

    fn missing(&self, active: u32) -> String {
        format!("lanes {:#010x} of the warp are missing here: {active:#010x} are there", self.existing & !active)
    }

    /// For what all lanes do together.
    fn whole(&self, active: u32) -> Checked<()> {
        if active == u32::MAX { Ok(()) } else { Err(self.missing(active)) }
    }

    /// Whether the member lanes are all here; false where the others may still come.
    fn gathered(&self, members: Register, active: u32) -> Checked<bool> {
        let lane = active.trailing_zeros() as usize;
        let members = self.registers[members][lane] as u32 & self.existing;
        if active & !members != 0 {
            return Err(format!("lanes {:#010x} are not in the member mask {members:#010x}", active & !members));
        }
        if members & !active == 0 {
            return Ok(true);
        }
        let gone = members & !self.alive();
        if gone != 0 {
            return Err(format!("lanes {gone:#010x} of the member mask {members:#010x} have ended"));
        }
        Ok(false)
    }

    /// The addresses of the active lanes.
    pub(super) fn addresses(&self, address: Address, active: u32) -> impl Iterator<Item = (usize, u64)> + use<> {
        let base = self.registers[address.base];
        bits(active).map(move |lane| (lane, base[lane].wrapping_add_signed(address.offset)))
    }
}

/// The lanes where a predicate holds.
pub(super) fn mask(predicate: &Lanes) -> u32 {
    predicate.iter().enumerate().fold(0, |mask, (lane, &value)| mask | (value as u32) << lane)
}

/// The numbers of the bits that are set.
pub(super) fn bits(mask: u32) -> impl Iterator<Item = usize> {
    (0..WARP).filter(move |lane| mask >> lane & 1 == 1)
}
