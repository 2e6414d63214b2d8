//! What the lanes of a warp do together: shuffles, votes, reductions.

use super::instruction::{Operation, Register, Shuffle, Vote, WARP};
use super::memory::Checked;
use super::warp::{Warp, bits, mask};

impl Warp {
    /// One instruction for whose members all lanes are here.
    pub(super) fn collective(&mut self, operation: &Operation, active: u32) -> Checked<()> {
        match *operation {
            Operation::Shuffle { mode, to, inside, value, lane, clamp, .. } => {
                let values = self.registers[value];
                let (lanes, clamps) = (self.registers[lane], self.registers[clamp]);
                for lane in bits(active) {
                    let (source, within) = source(mode, lane, lanes[lane] as usize, clamps[lane] as usize);
                    if active >> source & 1 == 0 {
                        return Err(format!("lane {lane} reads lane {source}, which does not take part"));
                    }
                    self.registers[to][lane] = values[source];
                    if let Some(inside) = inside {
                        self.registers[inside][lane] = u64::from(within);
                    }
                }
            }
            Operation::Vote { vote, to, predicate, .. } => {
                let answer = answer(vote, mask(&self.registers[predicate]) & active, active);
                self.everywhere(to, active, answer);
            }
            Operation::MatchAny { to, value, .. } => {
                let values = self.registers[value];
                for lane in bits(active) {
                    let same = bits(active).filter(|&other| values[other] == values[lane]);
                    self.registers[to][lane] = same.fold(0, |same, other| same | 1 << other);
                }
            }
            Operation::Reduce { ref fold, to, value, .. } => {
                let values = self.registers[value];
                let result = bits(active).map(|lane| values[lane]).reduce(|sum, value| fold(sum, value, 0));
                self.everywhere(to, active, result.unwrap_or_default());
            }
            _ => {}
        }
        Ok(())
    }

    /// The same value in all active lanes.
    pub(crate) fn everywhere(&mut self, to: Register, active: u32, value: u64) {
        bits(active).for_each(|lane| self.registers[to][lane] = value);
    }
}

/// What a vote among `all` says, where `yes` hold the predicate.
pub(crate) fn answer(vote: Vote, yes: u32, all: u32) -> u64 {
    match vote {
        Vote::All => u64::from(yes == all),
        Vote::Any => u64::from(yes != 0),
        Vote::Uniform => u64::from(yes == 0 || yes == all),
        Vote::Ballot => u64::from(yes),
        Vote::Count => u64::from(yes.count_ones()),
    }
}

/// The lane that a shuffle reads, and whether the one it names lies inside of its segment.
fn source(mode: Shuffle, lane: usize, by: usize, clamp: usize) -> (usize, bool) {
    let (by, last, segment) = (by % WARP, clamp % WARP, clamp >> 8 & 31);
    let highest = lane & segment | last & !segment;
    let lowest = lane & segment;
    let (source, inside) = match mode {
        Shuffle::Up => (lane.wrapping_sub(by), lane as isize - by as isize >= highest as isize),
        Shuffle::Down => (lane + by, lane + by <= highest),
        Shuffle::Butterfly => (lane ^ by, lane ^ by <= highest),
        Shuffle::Index => {
            let source = lowest | by & !segment;
            (source, source <= highest)
        }
    };
    (if inside { source } else { lane }, inside)
}
