//! Rows of modality ids.

use super::rng::Rng;
use moda_attn::ids::{Ids, PADDING};

/// Where the tokens of modalities other than text lie in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    First,
    Middle,
    Last,
    /// Modalities change at random from token to token.
    Interleaved,
    /// Text only.
    Absent,
}

impl Layout {
    pub(crate) const ALL: [Self; 5] = [Self::First, Self::Middle, Self::Last, Self::Interleaved, Self::Absent];
}

/// Where a row is padded; how far is random.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Padding {
    None,
    Left,
    Right,
    /// The last row of the batch is nothing but padding, the others have none.
    WholeRow,
}

impl Padding {
    pub(crate) const ALL: [Self; 4] = [Self::None, Self::Left, Self::Right, Self::WholeRow];
}

/// Ids (B, N) of `modalities` modalities.
pub(crate) fn ids(
    rng: &mut Rng,
    [batch, tokens]: [usize; 2],
    modalities: usize,
    layout: Layout,
    padding: Padding,
) -> Ids {
    let mut flat = Vec::with_capacity(batch * tokens);
    for b in 0..batch {
        let padded = match padding {
            Padding::None => 0,
            Padding::Left | Padding::Right => rng.below(tokens / 2 + 1),
            Padding::WholeRow => tokens * usize::from(b + 1 == batch),
        };
        let real = tokens - padded;
        let others = match layout {
            Layout::First => 0..real.div_ceil(2),
            Layout::Middle => real / 4..real - real / 4,
            Layout::Last => real / 2..real,
            Layout::Interleaved => 0..real,
            Layout::Absent => 0..0,
        };
        let id = |j: usize, rng: &mut Rng| match layout {
            _ if !others.contains(&j) || modalities == 1 => 0,
            Layout::Interleaved => rng.below(modalities) as i32,
            _ => 1 + (j - others.start) as i32 * (modalities as i32 - 1) / others.len() as i32,
        };
        if padding == Padding::Left {
            flat.extend(std::iter::repeat_n(PADDING, padded));
        }
        flat.extend((0..real).map(|j| id(j, rng)));
        if padding != Padding::Left {
            flat.extend(std::iter::repeat_n(PADDING, padded));
        }
    }
    Ids::new(&flat, [batch, tokens]).unwrap()
}
