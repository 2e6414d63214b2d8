//! The modular mask inside a tile: for every (head, query modality) of a row block, what is added to the scores of a key
//! block, and which keys count as self. O(heads x M x keys of a block), filled only for the pairs that occur.

use super::plan::{KEYS, Sizes};
use crate::cpu::CpuReal;
use crate::cpu::buffer::Buffer;
use crate::cpu::kernel::softmax::Added;
use crate::dtype::{Element, Real};
use crate::error::Result;
use crate::ids::PADDING;
use crate::problem::AttendProblem;

/// What a key block holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    /// Keys of this one modality (-1: nothing but padding).
    Uniform(i32),
    /// Several modalities, or some padding among the keys.
    Mixed {
        /// Whether there is padding.
        padded: bool,
    },
}

impl Content {
    pub(super) fn of(ids: &[i32]) -> Self {
        match ids {
            [first, rest @ ..] if rest.iter().all(|id| id == first) => Self::Uniform(*first),
            _ => Self::Mixed { padded: ids.contains(&PADDING) },
        }
    }
}

/// Which keys a softmax runs over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// All visible keys ("joint").
    Whole,
    /// Keys of the query's modality ("split", first softmax).
    SelfKeys,
    /// Keys of other modalities ("split", second softmax).
    CrossKeys,
}

impl Part {
    /// The softmaxes of a row.
    pub(super) fn all(parts: usize) -> &'static [Self] {
        if parts == 1 { &[Self::Whole] } else { &[Self::SelfKeys, Self::CrossKeys] }
    }

    /// Whether a query of one modality sees a key of another in this part.
    pub(super) fn admits(self, query: i32, key: i32) -> bool {
        key != PADDING
            && match self {
                Self::Whole => true,
                Self::SelfKeys => key == query,
                Self::CrossKeys => key != query,
            }
    }
}

/// Tables of the current row block, key block and part; a row's table is found by (head in group, modality).
#[derive(Debug)]
pub(super) struct Tables<R: Real> {
    /// Added to scores in log2 units: bias, or minus infinity where the key is not for this query.
    added: Buffer<R>,
    /// 1 where the key is of the query's modality, else 0.
    own: Buffer<R>,
    /// What is added to the score of a key, by modality.
    numbers: Vec<R>,
    filled: Vec<bool>,
    own_filled: Vec<bool>,
    modalities: usize,
}

impl<R: CpuReal> Tables<R> {
    pub(super) fn new(sizes: &Sizes) -> Result<Self> {
        let slots = sizes.group * sizes.modalities;
        Ok(Self {
            added: Buffer::new(slots * KEYS, "the mask tables of a key block")?,
            own: Buffer::new(sizes.modalities * KEYS, "the modality tables of a key block")?,
            numbers: Vec::with_capacity(sizes.modalities + 1),
            filled: vec![false; slots],
            own_filled: vec![false; sizes.modalities],
            modalities: sizes.modalities,
        })
    }

    /// Forgets the tables of the previous key block or part.
    pub(super) fn clear(&mut self) {
        self.filled.fill(false);
        self.own_filled.fill(false);
    }

    /// What to add to the scores of a key block (`KEYS` numbers, if they differ) for a query of `modality` in head `head`
    /// of `group`.
    pub(super) fn added<T: Element<Acc = R>>(
        &mut self,
        problem: &AttendProblem<'_, T>,
        keys: Block<'_>,
        row: Row,
    ) -> Added<R> {
        let bias = |key: i32| match problem.bias {
            Some(bias) => bias.get([keys.batch, row.head, row.modality as usize, key as usize]) * R::LOG2_E,
            None => R::ZERO,
        };
        let added = |key: i32| if keys.part.admits(row.modality, key) { bias(key) } else { R::NEG_INFINITY };
        match keys.content {
            Content::Uniform(key) => return Added::Same(added(key)),
            Content::Mixed { padded: false } if keys.part == Part::Whole && problem.bias.is_none() => {
                return Added::Same(R::ZERO);
            }
            Content::Mixed { .. } => {}
        }
        let slot = row.head_in_group * self.modalities + row.modality as usize;
        let table = &mut self.added[slot * KEYS..][..KEYS];
        if !std::mem::replace(&mut self.filled[slot], true) {
            // Each modality's number once; padding, id -1, comes first.
            self.numbers.clear();
            self.numbers.extend((PADDING..self.modalities as i32).map(added));
            for (entry, &key) in table.iter_mut().zip(keys.ids) {
                *entry = self.numbers[(key - PADDING) as usize];
            }
        }
        Added::Each(table.as_ptr())
    }

    /// 1 for the keys of a modality, 0 for the others (`KEYS` numbers).
    pub(super) fn own(&mut self, keys: Block<'_>, modality: i32) -> *const R {
        let slot = modality as usize;
        let table = &mut self.own[slot * KEYS..][..KEYS];
        if !std::mem::replace(&mut self.own_filled[slot], true) {
            for (entry, &key) in table.iter_mut().zip(keys.ids) {
                *entry = if key == modality { R::ONE } else { R::ZERO };
            }
        }
        table.as_ptr()
    }
}

/// A key block in one part.
#[derive(Debug, Clone, Copy)]
pub(super) struct Block<'a> {
    pub(super) batch: usize,
    pub(super) ids: &'a [i32],
    pub(super) content: Content,
    pub(super) part: Part,
}

/// What a row's table depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) head: usize,
    pub(super) head_in_group: usize,
    pub(super) modality: i32,
}
