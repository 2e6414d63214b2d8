//! The shared memory of a block, with the races between its warps.

use super::memory::{Checked, number};
use super::touch::Place;

/// The first line of a race: who did what before, and what is done now.
fn race(address: usize, before: &str, other: u32, now: &str) -> String {
    format!("shared byte {address} is {now}, which warp {other} {before} since the last barrier")
}

#[derive(Clone, Copy, Default)]
struct Byte {
    written: bool,
    /// A copy is on its way here: neither to be read nor to be written.
    in_flight: bool,
    /// The phase (between two barriers, from 1) in which it was last written, and by which warp.
    write_phase: u32,
    writer: u32,
    /// The phase in which it was last read, and by which warps.
    read_phase: u32,
    readers: u32,
    /// Which lane of its warp wrote it last, and after how many meetings of that warp.
    write_lane: u8,
    write_meeting: u32,
    /// The same of the last read.
    read_lane: u8,
    read_meeting: u32,
}

/// A thread of the block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Thread {
    pub(crate) warp: u32,
    pub(crate) lane: u8,
}

/// Lanes of one warp that touch the same byte need a `__syncwarp` between: they are not bound to run in step.
fn lane_race(address: usize, before: &str, other: u8, now: &str) -> String {
    format!("shared byte {address} is {now}, which lane {other} of the same warp {before} since the last __syncwarp")
}

/// Bytes shared by the warps of a block.
pub(crate) struct Shared {
    bytes: Vec<u8>,
    state: Vec<Byte>,
    /// Grows at every barrier of all warps.
    phase: u32,
    /// Of every warp, how often its lanes met: at barriers and at `__syncwarp`.
    meetings: [u32; 32],
}

impl Shared {
    pub(crate) fn new(length: usize) -> Self {
        Self { bytes: vec![0xff; length], state: vec![Byte::default(); length], phase: 1, meetings: [1; 32] }
    }

    /// All warps have met: what they did before is seen by all.
    pub(crate) fn next_phase(&mut self) {
        self.phase += 1;
        self.meetings.iter_mut().for_each(|meetings| *meetings += 1);
    }

    /// The lanes of a warp have met.
    pub(crate) fn meet(&mut self, warp: u32) {
        self.meetings[warp as usize] += 1;
    }

    /// A thread, now.
    pub(crate) fn place(&self, thread: Thread) -> Place {
        Place { thread, phase: self.phase, meeting: self.meetings[thread.warp as usize] }
    }

    fn range(&self, address: u64, size: usize) -> Checked<std::ops::Range<usize>> {
        if !address.is_multiple_of(size as u64) {
            return Err(format!("shared address {address} is not aligned to the {size} bytes of the access"));
        }
        let start = address as usize;
        match start.checked_add(size) {
            Some(end) if end <= self.bytes.len() => Ok(start..end),
            _ => Err(format!("{size} bytes at shared address {address:#x}; the block has {}", self.bytes.len())),
        }
    }

    pub(crate) fn load(&mut self, Thread { warp, lane }: Thread, address: u64, into: &mut [u8]) -> Checked<()> {
        let range = self.range(address, into.len())?;
        let (phase, meeting) = (self.phase, self.meetings[warp as usize]);
        for (at, byte) in self.state[range.clone()].iter_mut().enumerate() {
            let at = address as usize + at;
            if byte.in_flight {
                return Err(format!("shared byte {at} is read, and a copy to it is in flight"));
            }
            if !byte.written {
                return Err(format!("shared byte {at} is read and was never written"));
            }
            if byte.write_phase == phase && byte.writer != warp {
                return Err(race(at, "wrote", byte.writer, "read"));
            }
            if byte.write_phase == phase && byte.write_meeting == meeting && byte.write_lane != lane {
                return Err(lane_race(at, "wrote", byte.write_lane, "read"));
            }
            if byte.read_phase != phase {
                (byte.read_phase, byte.readers) = (phase, 0);
            }
            byte.readers |= 1 << warp;
            (byte.read_lane, byte.read_meeting) = (lane, meeting);
        }
        into.copy_from_slice(&self.bytes[range]);
        Ok(())
    }

    pub(crate) fn store(&mut self, thread: Thread, address: u64, from: &[u8]) -> Checked<()> {
        let range = self.claim(thread, address, from.len())?;
        for byte in &mut self.state[range.clone()] {
            byte.written = true;
        }
        self.bytes[range].copy_from_slice(from);
        Ok(())
    }

    /// A copy to these bytes begins: they are nobody's until it lands.
    pub(crate) fn take_off(&mut self, thread: Thread, address: u64, size: usize) -> Checked<()> {
        let range = self.claim(thread, address, size)?;
        for byte in &mut self.state[range] {
            byte.in_flight = true;
        }
        Ok(())
    }

    /// The copy has landed, and the warp that issued it may read it.
    pub(crate) fn land(&mut self, Thread { warp, lane }: Thread, address: u64, from: &[u8]) {
        let start = address as usize;
        let range = start..start + from.len();
        for byte in &mut self.state[range.clone()] {
            let write_meeting = self.meetings[warp as usize];
            *byte = Byte {
                written: true,
                in_flight: false,
                write_phase: self.phase,
                writer: warp,
                write_lane: lane,
                write_meeting,
                ..*byte
            };
        }
        self.bytes[range].copy_from_slice(from);
    }

    /// Checks and notes a write.
    fn claim(&mut self, Thread { warp, lane }: Thread, address: u64, size: usize) -> Checked<std::ops::Range<usize>> {
        let range = self.range(address, size)?;
        let (phase, meeting) = (self.phase, self.meetings[warp as usize]);
        for (at, byte) in self.state[range.clone()].iter_mut().enumerate() {
            let at = address as usize + at;
            if byte.in_flight {
                return Err(format!("shared byte {at} is written, and a copy to it is in flight"));
            }
            if byte.write_phase == phase && byte.writer != warp {
                return Err(race(at, "wrote", byte.writer, "written"));
            }
            let others = byte.readers & !(1 << warp);
            if byte.read_phase == phase && others != 0 {
                return Err(race(at, "read", others.trailing_zeros(), "written"));
            }
            if byte.write_phase == phase && byte.write_meeting == meeting && byte.write_lane != lane {
                return Err(lane_race(at, "wrote", byte.write_lane, "written"));
            }
            if byte.read_phase == phase && byte.read_meeting == meeting && byte.read_lane != lane {
                return Err(lane_race(at, "read", byte.read_lane, "written"));
            }
            (byte.write_phase, byte.writer) = (phase, warp);
            (byte.write_lane, byte.write_meeting) = (lane, meeting);
        }
        Ok(range)
    }

    /// Changes a place atomically: warps may meet there, but only to do that.
    pub(crate) fn change(&mut self, address: u64, size: usize, change: impl Fn(u64) -> u64) -> Checked<u64> {
        let range = self.range(address, size)?;
        if !self.state[range.clone()].iter().all(|byte| byte.written && !byte.in_flight) {
            return Err(format!("shared byte {address} is changed and was never written"));
        }
        let old = number(&self.bytes[range.clone()]);
        self.bytes[range].copy_from_slice(&change(old).to_le_bytes()[..size]);
        Ok(old)
    }
}
