//! A block of threads: warps in turn, from barrier to barrier.

use super::collective::answer;
use super::instruction::{Kernel, Vote, WARP};
use super::memory::Global;
use super::shared::Shared;
use super::warp::{Arrival, Stop, Trap, Warp, mask};

/// What a launch cost, instruction by instruction.
#[derive(Debug, Default)]
pub(crate) struct Profile {
    /// Executions by a warp.
    pub(crate) executed: Vec<u64>,
    /// Turns lost to bank conflicts.
    pub(crate) conflicts: Vec<u64>,
    pub(crate) conflicts_wanted: bool,
}

/// What the warps of a block share.
pub(crate) struct Block<'a> {
    pub(crate) global: &'a mut Global,
    pub(crate) shared: Shared,
    pub(crate) parameters: &'a [u8],
    pub(crate) profile: &'a mut Profile,
    pub(crate) threads: u32,
    pub(crate) position: [u32; 3],
    pub(crate) grid: [u32; 3],
    pub(crate) dynamic_shared: u32,
    pub(crate) patience: u64,
}

/// An error, with the warp whose it is.
pub(crate) struct Failure {
    pub(crate) trap: Trap,
    pub(crate) warp: u32,
}

impl Block<'_> {
    /// Runs all warps to their end.
    pub(crate) fn run(mut self, kernel: &Kernel) -> Result<(), Failure> {
        self.global.begin_block();
        let count = self.threads.div_ceil(WARP as u32);
        let mut warps: Vec<_> = (0..count).map(|index| Warp::new(kernel, index, &self)).collect();
        let mut stops: Vec<Option<Stop>> = vec![None; warps.len()];
        loop {
            for (warp, stop) in warps.iter_mut().zip(&mut stops).filter(|(_, stop)| stop.is_none()) {
                let index = warp.index;
                *stop = Some(warp.run(kernel, &mut self).map_err(|trap| Failure { trap, warp: index })?);
            }
            if stops.iter().all(|stop| *stop == Some(Stop::Ended)) {
                return Ok(());
            }
            self.release(&mut warps, &mut stops)?;
        }
    }

    /// Lets go the warps whose barrier is complete. Every warp has stopped: if there are none, there never will be.
    fn release(&mut self, warps: &mut [Warp], stops: &mut [Option<Stop>]) -> Result<(), Failure> {
        let arrivals: Vec<(usize, Arrival)> = stops.iter().enumerate().filter_map(arrival).collect();
        let (first, waiting) = arrivals[0];
        for (_, arrival) in &arrivals {
            let here: Vec<_> = arrivals.iter().filter(|(_, other)| other.id == arrival.id).collect();
            let wanted = arrival.threads.map_or(warps.len(), |threads| threads as usize / WARP);
            if here.len() != wanted {
                continue;
            }
            if wanted != warps.len() {
                let message = "a barrier of a part of the block is not supported".to_owned();
                return Err(Failure { trap: Trap { message, at: arrival.at }, warp: first as u32 });
            }
            if let Some((vote, ..)) = arrival.reduce {
                reduce(vote, &here, warps);
            }
            for &&(warp, _) in &here {
                stops[warp] = None;
            }
            self.shared.next_phase();
            return Ok(());
        }
        let missing: Vec<_> =
            (0..warps.len()).filter(|warp| !arrivals.iter().any(|(there, _)| there == warp)).collect();
        let message = match missing.as_slice() {
            [] => "warps wait at different barriers".to_owned(),
            _ => format!("warp {first} waits at a barrier that warps {missing:?} never reach: they have ended"),
        };
        Err(Failure { trap: Trap { message, at: waiting.at }, warp: first as u32 })
    }
}

fn arrival((warp, stop): (usize, &Option<Stop>)) -> Option<(usize, Arrival)> {
    match stop {
        Some(Stop::Barrier(arrival)) => Some((warp, *arrival)),
        _ => None,
    }
}

/// Gives every thread the answer to what all were asked.
fn reduce(vote: Vote, here: &[&(usize, Arrival)], warps: &mut [Warp]) {
    let asked = here.iter().filter_map(|&&(warp, arrival)| Some((warp, arrival.reduce?)));
    let answers: Vec<_> = asked
        .clone()
        .map(|(warp, (_, predicate, _))| {
            let all = warps[warp].alive();
            answer(vote, mask(&warps[warp].registers[predicate]) & all, all)
        })
        .collect();
    let result = match vote {
        Vote::Count => answers.iter().sum(),
        Vote::All => u64::from(answers.iter().all(|&answer| answer == 1)),
        _ => u64::from(answers.contains(&1)),
    };
    for (warp, (_, _, to)) in asked.collect::<Vec<_>>() {
        let all = warps[warp].alive();
        warps[warp].everywhere(to, all, result);
    }
}
