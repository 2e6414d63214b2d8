//! What a warp reads and writes in every state space.

use super::block::Block;
use super::instruction::{Address, Operation, Register, Space, WARP};
use super::integer::{low, sign_extended};
use super::matrix::fragment;
use super::memory::{Checked, LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, number};
use super::shared::Thread;
use super::warp::{Copy, Warp, bits};

/// The space and the address in it that a generic address means.
fn resolve(space: Space, address: u64) -> (Space, u64) {
    let inside = address & (SHARED_WINDOW - 1);
    match (space, address - inside) {
        (Space::Generic, SHARED_WINDOW) => (Space::Shared, inside),
        (Space::Generic, LOCAL_WINDOW) => (Space::Local, inside),
        (Space::Generic, PARAM_WINDOW) => (Space::Param, inside),
        (Space::Generic, _) => (Space::Global, address),
        (Space::Shared, _) => (Space::Shared, low(address, 32)),
        (space, _) => (space, address),
    }
}

impl Warp {
    /// A load, store, atomic, copy or matrix access of the active lanes.
    pub(super) fn access(&mut self, operation: &Operation, active: u32, at: usize, block: &mut Block) -> Checked<()> {
        match *operation {
            Operation::Load { space, address, ref to, bytes, extend } => {
                let mut buffer = [0; 32];
                let size = bytes * to.len();
                self.count_conflicts(space, address, size, active, at, block);
                for (lane, address) in self.addresses(address, active) {
                    self.load(block, lane, resolve(space, address), &mut buffer[..size])
                        .map_err(|e| of_lane(lane, &e))?;
                    for (element, &to) in buffer.chunks(bytes).zip(to) {
                        let value = number(element);
                        let extended = extend.map(|bits| low(sign_extended(value, 8 * bytes as u32), bits));
                        self.registers[to][lane] = extended.unwrap_or(value);
                    }
                }
            }
            Operation::Store { space, address, ref from, bytes } => {
                let mut buffer = [0; 32];
                let size = bytes * from.len();
                self.count_conflicts(space, address, size, active, at, block);
                for (lane, address) in self.addresses(address, active) {
                    for (element, &from) in buffer.chunks_mut(bytes).zip(from) {
                        element.copy_from_slice(&self.registers[from][lane].to_le_bytes()[..bytes]);
                    }
                    self.store(block, lane, resolve(space, address), &buffer[..size]).map_err(|e| of_lane(lane, &e))?;
                }
            }
            Operation::Atomic { space, address, to, operands, bytes, ref change } => {
                for (lane, address) in self.addresses(address, active) {
                    let [value, second] = operands.map(|register| self.registers[register][lane]);
                    let change = |old| change(old, value, second);
                    let old = match resolve(space, address) {
                        (Space::Global, address) => block.global.change(address, bytes, change),
                        (Space::Shared, address) => block.shared.change(address, bytes, change),
                        (space, _) => Err(format!("an atomic in {space:?} memory")),
                    };
                    let old = old.map_err(|error| of_lane(lane, &error))?;
                    if let Some(to) = to {
                        self.registers[to][lane] = old;
                    }
                }
            }
            Operation::CopyAsync { to, from, bytes, valid } => {
                self.begin_copies(to, from, (bytes, valid), active, block)?;
            }
            Operation::CommitCopies => bits(active).for_each(|lane| self.groups[lane] += 1),
            Operation::WaitCopies(keep) => self.land_copies(keep, active, block),
            Operation::LoadMatrix { ref to, transposed, address } => {
                self.load_matrices(to, transposed, address, at, block)?;
            }
            Operation::StoreMatrix { ref from, transposed, address } => {
                self.store_matrices(from, transposed, address, at, block)?;
            }
            _ => unreachable!("no access to memory"),
        }
        Ok(())
    }

    fn load(&mut self, block: &mut Block, lane: usize, (space, address): (Space, u64), into: &mut [u8]) -> Checked<()> {
        match space {
            Space::Shared => block.shared.load(self.thread(lane), address, into),
            Space::Global | Space::Generic => block.global.load(block.shared.place(self.thread(lane)), address, into),
            Space::Param => {
                let place = address as usize..(address as usize).saturating_add(into.len());
                let found = block.parameters.get(place).ok_or_else(|| format!("parameter byte {address} is none"))?;
                into.copy_from_slice(found);
                Ok(())
            }
            Space::Local => {
                let place = self.local_place(lane, address, into.len())?;
                into.copy_from_slice(&self.local[place]);
                Ok(())
            }
        }
    }

    fn store(&mut self, block: &mut Block, lane: usize, (space, address): (Space, u64), from: &[u8]) -> Checked<()> {
        match space {
            Space::Shared => block.shared.store(self.thread(lane), address, from),
            Space::Global | Space::Generic => block.global.store(block.shared.place(self.thread(lane)), address, from),
            Space::Param => Err("a parameter is written".to_owned()),
            Space::Local => {
                let place = self.local_place(lane, address, from.len())?;
                self.local[place].copy_from_slice(from);
                Ok(())
            }
        }
    }

    fn thread(&self, lane: usize) -> Thread {
        Thread { warp: self.index, lane: lane as u8 }
    }

    fn local_place(&self, lane: usize, address: u64, size: usize) -> Checked<std::ops::Range<usize>> {
        let each = self.local.len() / WARP;
        let start = address as usize;
        if start.checked_add(size).is_none_or(|end| end > each) || !start.is_multiple_of(size) {
            return Err(format!("{size} bytes at local address {address:#x}; a thread has {each}"));
        }
        Ok(lane * each + start..lane * each + start + size)
    }

    /// The bytes are read now and taken to be there when they are waited for.
    fn begin_copies(
        &mut self,
        to: Address,
        from: Address,
        (bytes, valid): (usize, Option<Register>),
        active: u32,
        block: &mut Block,
    ) -> Checked<()> {
        for ((lane, to), (_, from)) in self.addresses(to, active).zip(self.addresses(from, active)) {
            let count = valid.map_or(bytes, |valid| self.registers[valid][lane] as usize);
            let mut copied = vec![0; bytes];
            let (_, to) = resolve(Space::Shared, to);
            let place = block.shared.place(self.thread(lane));
            let mut copy = || {
                if count > bytes {
                    return Err(format!("{count} valid bytes of {bytes}"));
                }
                if count == bytes {
                    block.global.load(place, from, &mut copied)?;
                } else if count > 0 {
                    if from % bytes as u64 != 0 {
                        return Err(format!(
                            "global address {from:#x} is not aligned to the {bytes} bytes of the copy"
                        ));
                    }
                    for (at, byte) in copied[..count].iter_mut().enumerate() {
                        block.global.load(place, from + at as u64, std::slice::from_mut(byte))?;
                    }
                }
                block.shared.take_off(self.thread(lane), to, bytes)
            };
            copy().map_err(|error| of_lane(lane, &error))?;
            self.copies.push(Copy { lane, group: self.groups[lane], to, bytes: copied });
        }
        Ok(())
    }

    /// Lands the copies of the active lanes but those of their latest groups; without a number, really all.
    fn land_copies(&mut self, keep: Option<usize>, active: u32, block: &mut Block) {
        let groups = self.groups;
        let index = self.index;
        self.copies.retain(|copy| {
            let arrived = active >> copy.lane & 1 == 1
                && keep.is_none_or(|keep| copy.group < groups[copy.lane].saturating_sub(keep));
            if arrived {
                let thread = Thread { warp: index, lane: copy.lane as u8 };
                block.shared.land(thread, copy.to, &copy.bytes);
            }
            !arrived
        });
    }

    fn load_matrices(
        &mut self,
        to: &[Register],
        transposed: bool,
        address: Address,
        at: usize,
        block: &mut Block,
    ) -> Checked<()> {
        let lanes = lanes_below(8 * to.len());
        self.count_conflicts(Space::Shared, address, 16, lanes, at, block);
        let mut row = [0; 16];
        for (lane, address) in self.addresses(address, lanes) {
            let (_, address) = resolve(Space::Shared, address);
            block.shared.load(self.thread(lane), address, &mut row).map_err(|error| of_lane(lane, &error))?;
            for column in 0..8 {
                let (owner, half) = fragment(lane % 8, column, transposed);
                let value = number(&row[2 * column..2 * column + 2]);
                let register = &mut self.registers[to[lane / 8]][owner];
                let other = *register & 0xffff << (16 * (1 - half));
                *register = other | value << (16 * half);
            }
        }
        Ok(())
    }

    fn store_matrices(
        &mut self,
        from: &[Register],
        transposed: bool,
        address: Address,
        at: usize,
        block: &mut Block,
    ) -> Checked<()> {
        let lanes = lanes_below(8 * from.len());
        self.count_conflicts(Space::Shared, address, 16, lanes, at, block);
        let mut row = [0; 16];
        for (lane, address) in self.addresses(address, lanes) {
            for column in 0..8 {
                let (owner, half) = fragment(lane % 8, column, transposed);
                let value = self.registers[from[lane / 8]][owner] >> (16 * half);
                row[2 * column..2 * column + 2].copy_from_slice(&(value as u16).to_le_bytes());
            }
            let (_, address) = resolve(Space::Shared, address);
            block.shared.store(self.thread(lane), address, &row).map_err(|error| of_lane(lane, &error))?;
        }
        Ok(())
    }

    /// How many more turns an access to shared memory takes because lanes want different words of one bank.
    fn count_conflicts(&self, space: Space, address: Address, size: usize, active: u32, at: usize, block: &mut Block) {
        if space != Space::Shared || !block.profile.conflicts_wanted {
            return;
        }
        let words: Vec<_> =
            self.addresses(address, active).map(|(lane, address)| (lane, low(address, 32) / 4)).collect();
        let each = size.div_ceil(4);
        let lanes = WARP / each.max(1);
        for phase in 0..each {
            let mut banks = vec![Vec::new(); 32];
            for &(_, word) in words.iter().filter(|(lane, _)| lane / lanes == phase) {
                for word in word..word + each as u64 {
                    let bank: &mut Vec<u64> = &mut banks[word as usize % 32];
                    if !bank.contains(&word) {
                        bank.push(word);
                    }
                }
            }
            let turns = banks.iter().map(Vec::len).max().unwrap_or(0) as u64;
            block.profile.conflicts[at] += turns.saturating_sub(1);
        }
    }
}

fn lanes_below(count: usize) -> u32 {
    if count >= WARP { u32::MAX } else { (1 << count) - 1 }
}

fn of_lane(lane: usize, error: &str) -> String {
    format!("lane {lane}: {error}")
}
