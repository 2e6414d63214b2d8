//! Ids out of range: how a kernel tells of them.

/// Where kernels report ids out of range: one word a device in mapped host memory, [`IdsRecord::NONE`] at first. A kernel
/// treats such a token as padding and lowers the word to its place and value by an atomic minimum, so that the first
/// offender stays whatever order threads run in. The host reads the word at a later call, raises and puts `NONE` back.
///
/// Bits from the top: argument 1, batch 14, token 24, id + 2^16 17, M 8. A number too large for its field is stored as the
/// largest one the field holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct IdsRecord(pub u64);

/// An id out of range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offender {
    /// Where it was given.
    pub argument: IdsArgument,
    /// Its batch row.
    pub batch: usize,
    /// Its token.
    pub token: usize,
    /// The id, clamped to -2^16 .. 2^16 - 1.
    pub given: i64,
    /// The largest id that would have been right.
    pub largest: i64,
}

impl IdsRecord {
    /// Nothing to report.
    pub const NONE: Self = Self(u64::MAX);

    /// What was reported.
    pub const fn offender(self) -> Option<Offender> {
        let Self(word) = self;
        if word == Self::NONE.0 {
            return None;
        }
        Some(Offender {
            argument: if word >> 63 == 0 { IdsArgument::Modality } else { IdsArgument::QueryModality },
            batch: (word >> 49 & 0x3fff) as usize,
            token: (word >> 25 & 0xff_ffff) as usize,
            given: (word >> 8 & 0x1_ffff) as i64 - (1 << 16),
            largest: (word & 0xff) as i64 - 1,
        })
    }
}

/// The arguments that hold ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum IdsArgument {
    /// `modality`
    Modality = 0,
    /// `query_modality`
    QueryModality = 1,
}

impl IdsArgument {
    /// The public name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Modality => "modality",
            Self::QueryModality => "query_modality",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_of_ids_tells_what_the_kernels_put_into_it() {
        assert_eq!(IdsRecord::NONE.offender(), None);
        let word = 1 << 63 | 3 << 49 | 70_000 << 25 | ((1 << 16) - 2) << 8 | 0xfe;
        let offender =
            Offender { argument: IdsArgument::QueryModality, batch: 3, token: 70_000, given: -2, largest: 253 };
        assert_eq!(IdsRecord(word).offender(), Some(offender));
    }
}
