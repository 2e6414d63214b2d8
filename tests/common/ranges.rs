//! Key ranges of every pattern that models use.

use super::rng::Rng;
use moda_attn::range::KeyRanges;

/// Which keys the queries of a case may see beside the causal limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ranges {
    Absent,
    /// A window of random width that ends at the query.
    Window,
    /// Sequences of random length behind each other in a row, each seen only by its own queries.
    Packed,
    /// Every bound at random: out of range, empty and reversed ones too.
    Any,
    /// The same, one row of ranges for the whole batch.
    Shared,
}

impl Ranges {
    pub(crate) const ALL: [Self; 5] = [Self::Absent, Self::Window, Self::Packed, Self::Any, Self::Shared];

    pub(crate) fn draw(self, rng: &mut Rng, [batch, queries, keys]: [usize; 3]) -> Option<KeyRanges> {
        let batch = if self == Self::Shared { 1 } else { batch };
        let mut pairs = Vec::with_capacity(batch * queries);
        for _ in 0..batch {
            let (width, mut start, mut end) = (1 + rng.below(keys + 1) as i64, 0, 0);
            for query in 0..queries {
                let own = query as i64 + keys as i64 - queries as i64;
                let anywhere = |rng: &mut Rng| rng.below(keys + 5) as i64 - 2;
                pairs.push(match self {
                    Self::Absent => return None,
                    Self::Window => [own - width + 1, own + 1],
                    Self::Packed => {
                        if own >= end {
                            (start, end) = (own, own + 1 + rng.below(1 + keys / 2) as i64);
                        }
                        [start, end]
                    }
                    Self::Any | Self::Shared => [anywhere(rng), anywhere(rng)],
                });
            }
        }
        Some(KeyRanges::from_slice(&pairs, [batch, queries], keys))
    }
}
