//! Who touched a byte of global memory last, and whether somebody else may touch it now.

use super::shared::Thread;

/// A thread of a block at a moment: its block has met at `phase - 1` barriers, its warp `meeting - 1` times, barriers included.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub(crate) thread: Thread,
    pub(crate) phase: u32,
    pub(crate) meeting: u32,
}

/// Who touched a byte: one thread, or several of the same launch, block and phase, or warp and meeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
enum Several {
    #[default]
    One,
    Lanes,
    Warps,
    Blocks,
}

/// The last touches of a byte.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Touch {
    /// Numbered over all launches, from 1.
    block: u32,
    phase: u32,
    meeting: u32,
    warp: u32,
    lane: u8,
    several: Several,
}

impl Touch {
    pub(crate) fn new(block: u32, Place { thread, phase, meeting }: Place) -> Self {
        Self { block, phase, meeting, warp: thread.warp, lane: thread.lane, several: Several::One }
    }

    /// How far apart those of this touch and of `now` are with nothing between that orders them; `first` is the first block
    /// of the launch.
    fn apart(self, now: Self, first: u32) -> Several {
        if self.block < first {
            Several::One
        } else if self.several == Several::Blocks || self.block != now.block {
            Several::Blocks
        } else if self.phase != now.phase {
            Several::One
        } else if self.several == Several::Warps || self.warp != now.warp {
            Several::Warps
        } else if self.meeting == now.meeting && (self.several == Several::Lanes || self.lane != now.lane) {
            Several::Lanes
        } else {
            Several::One
        }
    }

    /// This touch and one more that does not clash with it.
    pub(crate) fn and(self, now: Self, first: u32) -> Self {
        Self { several: self.apart(now, first), ..now }
    }

    /// Who did what, where one of the two is a write and nothing orders them.
    pub(crate) fn clash(self, now: Self, first: u32, what: &str) -> Option<String> {
        let apart = self.apart(now, first);
        let name = |kind: &str, number: u32| {
            if self.several == apart { format!("several {kind}s") } else { format!("{kind} {number}") }
        };
        match apart {
            Several::One => None,
            Several::Lanes => {
                let lane = name("lane", self.lane.into());
                Some(format!("{lane} of the same warp {what} since the last __syncwarp"))
            }
            Several::Warps => Some(format!("{} {what} since the last barrier", name("warp", self.warp))),
            Several::Blocks => Some(format!("{} {what} in the same launch", name("block", self.block - first))),
        }
    }
}
