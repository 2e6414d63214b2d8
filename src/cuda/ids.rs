//! Modality ids as the kernels read them: one code a token and a summary for every block of tokens, written once a call
//! into the workspace by a kernel; and the word in which that kernel reports an id out of range.

use super::launch::{Kernel, Launch, Parameters};
use super::problem::IdsArgument;
use super::source::Source;
use super::tensor::DeviceTensor;
use super::workspace::{Region, Workspace};
use crate::dtype::DType;

/// Tokens of a block: `TOKENS` of `kernels/ids.cuh`.
pub const TOKENS: usize = 64;

crate::parameters! {
    /// Argument of `encode_ids`.
    pub struct EncodeIdsParams {
        /// Ids (B, N) of any integer dtype.
        pub ids: u64,
        /// Context (B, N), bool; 0: every token.
        pub context: u64,
        /// Where the codes go.
        pub codes: u64,
        /// Where the summaries go.
        pub summaries: u64,
        /// The device's [`IdsRecord`](super::problem::IdsRecord).
        pub record: u64,
        /// Strides of the ids.
        pub ids_strides: [i64; 2],
        /// Strides of the context.
        pub context_strides: [i64; 2],
        /// N.
        pub tokens: i64,
        /// Blocks of a row.
        pub blocks: i64,
        /// dtype of the ids: see [`integer_kind`].
        pub kind: i32,
        /// M.
        pub modalities: i32,
        /// An [`IdsArgument`].
        pub argument: i32,
        /// 0.
        pub unused: i32,
    }
}

/// Codes u8 (B, blocks * TOKENS) and summaries u16 (B, blocks) of a tensor of ids, in the workspace.
#[derive(Debug, Clone, Copy)]
pub struct Codes {
    /// (B, N)
    shape: [usize; 2],
    bytes: Region,
    summaries: Region,
}

impl Codes {
    /// Room for the codes of ids (B, N).
    pub fn new(workspace: &mut Workspace, shape: [usize; 2]) -> Self {
        let blocks = shape[0].saturating_mul(shape[1].div_ceil(TOKENS));
        Self { shape, bytes: workspace.region(blocks, TOKENS), summaries: workspace.region(blocks, 2) }
    }

    /// Blocks of a row of tokens.
    pub const fn blocks(&self) -> usize {
        self.shape[1].div_ceil(TOKENS)
    }

    /// Address of the codes in a workspace that begins at `base`.
    pub const fn codes(&self, base: u64) -> u64 {
        self.bytes.at(base)
    }

    /// Address of the summaries.
    pub const fn summaries(&self, base: u64) -> u64 {
        self.summaries.at(base)
    }

    /// Writes both. Tokens outside `context` and ids that are not in `-1 .. modalities - 1` count as padding; the first of
    /// the latter goes to `record`. `None` where there is no token.
    pub fn encode(
        &self,
        (argument, ids): (IdsArgument, DeviceTensor<2>),
        context: Option<DeviceTensor<2>>,
        modalities: usize,
        (record, base): (u64, u64),
    ) -> Option<Launch> {
        assert_eq!(ids.shape, self.shape);
        let blocks = self.blocks();
        let grid = u32::try_from(self.shape[0] * blocks).unwrap_or(u32::MAX);
        if grid == 0 {
            return None;
        }
        let params = EncodeIdsParams {
            ids: ids.pointer,
            context: context.map_or(0, |context| context.pointer),
            codes: self.codes(base),
            summaries: self.summaries(base),
            record,
            ids_strides: ids.long_strides(),
            context_strides: context.map_or([0; 2], |context| context.long_strides()),
            tokens: self.shape[1] as i64,
            blocks: blocks as i64,
            kind: integer_kind(ids.dtype),
            modalities: modalities as i32,
            argument: argument as i32,
            unused: 0,
        };
        let kernel = Kernel { source: Source::Ids, entry: "encode_ids", defines: vec![("DTYPE", 0)] };
        Some(Launch { kernel, grid: [grid, 1, 1], block: TOKENS as u32, shared: 0, params: params.bytes() })
    }
}

/// How kernels are told an integer dtype: its size in bytes, negative where it is unsigned.
pub fn integer_kind(dtype: DType) -> i32 {
    let size = dtype.size() as i32;
    match dtype {
        DType::Int8 | DType::Int16 | DType::Int32 | DType::Int64 => size,
        DType::UInt8 | DType::UInt16 | DType::UInt32 | DType::UInt64 => -size,
        other => unreachable!("problems are validated: {}", other.name()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_of_every_row_is_encoded() {
        let mut workspace = Workspace::new();
        let codes = Codes::new(&mut workspace, [3, 130]);
        let ids = DeviceTensor::contiguous(4096, DType::UInt16, [3, 130]);
        let launch = codes.encode((IdsArgument::QueryModality, ids), None, 7, (8, 1 << 20)).unwrap();
        assert_eq!((launch.grid, launch.block), ([9, 1, 1], 64));
        assert_eq!([codes.codes(1 << 20), codes.summaries(1 << 20)], [1 << 20, (1 << 20) + 768]);
        assert!(workspace.bytes() >= 768 + 18);
        let nothing = Codes::new(&mut workspace, [3, 0]);
        let ids = DeviceTensor { shape: [3, 0], ..ids };
        assert_eq!(nothing.encode((IdsArgument::Modality, ids), None, 7, (8, 0)), None);
    }

    #[test]
    fn kinds_are_sizes_with_a_sign() {
        assert_eq!([DType::Int8, DType::UInt8, DType::UInt64].map(integer_kind), [1, -1, -8]);
    }
}
