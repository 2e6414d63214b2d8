//! What a parsed kernel is made of: instructions over numbered registers.

/// Lanes of a warp.
pub(crate) const WARP: usize = 32;
/// One value a lane. A register of fewer than 64 bits has zeros above them, a predicate is 0 or 1.
pub(crate) type Lanes = [u64; WARP];
/// A register's place in the file of a warp. Immediates and special registers have places too, filled at the start.
pub(crate) type Register = usize;
/// What an arithmetic instruction does to a warp: destination, sources, mask of the lanes that take part.
pub(crate) type Function<const N: usize> = Box<dyn Fn(&mut Lanes, [&Lanes; N], u32) + Send + Sync>;

/// The fundamental types of PTX that the kernels use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[rustfmt::skip]
pub(crate) enum Type {
    Pred, B8, B16, B32, B64, B128, U8, U16, U32, U64, S8, S16, S32, S64, F16, F16x2, BF16, BF16x2, TF32, F32, F64,
}

impl Type {
    /// The type that a part of an opcode names.
    #[rustfmt::skip]
    pub(crate) fn parse(name: &str) -> Option<Self> {
        use Type::*;
        Some(match name {
            "pred" => Pred, "b8" => B8, "b16" => B16, "b32" => B32, "b64" => B64, "b128" => B128,
            "u8" => U8, "u16" => U16, "u32" => U32, "u64" => U64,
            "s8" => S8, "s16" => S16, "s32" => S32, "s64" => S64,
            "f16" => F16, "f16x2" => F16x2, "bf16" => BF16, "bf16x2" => BF16x2, "tf32" => TF32, "f32" => F32, "f64" => F64,
            _ => return None,
        })
    }

    pub(crate) fn bits(self) -> u32 {
        use Type::*;
        match self {
            Pred => 1,
            B8 | U8 | S8 => 8,
            B16 | U16 | S16 | F16 | BF16 => 16,
            B32 | U32 | S32 | F32 | F16x2 | BF16x2 | TF32 => 32,
            B64 | U64 | S64 | F64 => 64,
            B128 => 128,
        }
    }

    pub(crate) fn is_signed(self) -> bool {
        matches!(self, Self::S8 | Self::S16 | Self::S32 | Self::S64)
    }

    pub(crate) fn is_integer(self) -> bool {
        use Type::*;
        matches!(self, B8 | B16 | B32 | B64 | U8 | U16 | U32 | U64 | S8 | S16 | S32 | S64)
    }
}

/// The state spaces that hold bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Space {
    Generic,
    Global,
    Shared,
    Local,
    Param,
}

/// `[base + offset]`
#[derive(Debug, Clone, Copy)]
pub(crate) struct Address {
    pub(crate) base: Register,
    pub(crate) offset: i64,
}

/// `@p` or `@!p`
#[derive(Debug, Clone, Copy)]
pub(crate) struct Guard {
    pub(crate) register: Register,
    pub(crate) negated: bool,
}

/// Which lane a shuffle reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shuffle {
    Index,
    Up,
    Down,
    Butterfly,
}

/// What a vote or a reducing barrier asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Vote {
    All,
    Any,
    Uniform,
    Ballot,
    Count,
}

/// The next value of an atomically changed place: (old, operand, second operand of `cas`).
pub(crate) type Change = Box<dyn Fn(u64, u64, u64) -> u64 + Send + Sync>;

/// What an instruction does.
pub(crate) enum Operation {
    Compute1(Function<1>, Register, [Register; 1]),
    Compute2(Function<2>, Register, [Register; 2]),
    Compute3(Function<3>, Register, [Register; 3]),
    Compute4(Function<4>, Register, [Register; 4]),
    /// Elements of `bytes` each; a signed one is extended to `extend` bits.
    Load {
        space: Space,
        address: Address,
        to: Vec<Register>,
        bytes: usize,
        extend: Option<u32>,
    },
    Store {
        space: Space,
        address: Address,
        from: Vec<Register>,
        bytes: usize,
    },
    Atomic {
        space: Space,
        address: Address,
        to: Option<Register>,
        operands: [Register; 2],
        bytes: usize,
        change: Change,
    },
    Branch(usize),
    Exit,
    /// `reduce`: what it asks, of which predicate, and where the answer goes.
    Barrier {
        id: Register,
        threads: Option<Register>,
        reduce: Option<(Vote, Register, Register)>,
    },
    WarpSync(Register),
    Shuffle {
        mode: Shuffle,
        to: Register,
        inside: Option<Register>,
        value: Register,
        lane: Register,
        clamp: Register,
        members: Register,
    },
    Vote {
        vote: Vote,
        to: Register,
        predicate: Register,
        members: Register,
    },
    ActiveMask(Register),
    /// Lanes with the same value; `bytes` wide.
    MatchAny {
        to: Register,
        value: Register,
        members: Register,
    },
    /// Folds the members' values.
    Reduce {
        fold: Change,
        to: Register,
        value: Register,
        members: Register,
    },
    /// `valid`: how many bytes are read, zeros fill the rest.
    CopyAsync {
        to: Address,
        from: Address,
        bytes: usize,
        valid: Option<Register>,
    },
    CommitCopies,
    /// Waits until at most so many groups are in flight; None: until nothing is.
    WaitCopies(Option<usize>),
    LoadMatrix {
        to: Vec<Register>,
        transposed: bool,
        address: Address,
    },
    StoreMatrix {
        from: Vec<Register>,
        transposed: bool,
        address: Address,
    },
    Multiply(super::matrix::Multiply),
    /// Orders memory, which here is in order anyway.
    Fence,
}

/// One instruction and where it stands.
pub(crate) struct Instruction {
    pub(crate) operation: Operation,
    pub(crate) guard: Option<Guard>,
    /// Line of the PTX text, from 1.
    pub(crate) line: usize,
    /// Number of the file and line of the CUDA source, where the compiler named them.
    pub(crate) source: Option<(usize, usize)>,
}

/// Registers whose value the launch decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Special {
    Thread(usize),
    Threads(usize),
    Block(usize),
    Blocks(usize),
    Lane,
    Warp,
    /// The lanes whose number is `<`, `<=`, `=`, `>=`, `>` this one's.
    LanesBelow,
    LanesUpTo,
    LaneBit,
    LanesFrom,
    LanesAbove,
    DynamicShared,
    TotalShared,
}

/// A kernel, ready to run.
pub(crate) struct Kernel {
    pub(crate) name: String,
    pub(crate) instructions: Vec<Instruction>,
    /// Registers of a warp, those of immediates and special registers included.
    pub(crate) registers: usize,
    pub(crate) constants: Vec<(Register, u64)>,
    pub(crate) specials: Vec<(Register, Special)>,
    /// Bytes of its parameters.
    pub(crate) parameters: usize,
    /// Bytes of the shared memory that has a size; what the launch adds comes after it.
    pub(crate) shared: usize,
    /// Bytes a thread.
    pub(crate) local: usize,
}
