//! The one error type. Every message says which argument, what was given and what was wanted.

use thiserror::Error;

/// What can go wrong, one variant a cause. [`Error::kind`] says which built-in Python exception it also is.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument has the wrong rank or a dimension that does not fit the others.
    #[error("{argument} has shape {given}; wanted {wanted}")]
    Shape {
        /// The argument's public name.
        argument: &'static str,
        /// Its shape, as Python prints it.
        given: String,
        /// The shape or the relation that would have been right.
        wanted: String,
    },
    /// A modality id is outside `-1 .. M-1`.
    #[error("{argument}[{batch}, {token}] is {given}; wanted a modality id from -1 (padding) to {largest}")]
    Modality {
        /// The argument's public name.
        argument: &'static str,
        /// Batch row of the first offender.
        batch: usize,
        /// Token of the first offender.
        token: usize,
        /// The id found there.
        given: i64,
        /// The largest id that would have been right.
        largest: i64,
    },
    /// An option has a value that does not exist or that contradicts another one.
    #[error("{argument} is {given}; wanted {wanted}")]
    Option {
        /// The argument's public name.
        argument: &'static str,
        /// The value, printed.
        given: String,
        /// What would have been right.
        wanted: String,
    },
    /// A dtype that the operator does not support, or dtypes that do not go together.
    #[error("{argument} has dtype {given}; wanted {wanted}")]
    DType {
        /// The argument's public name.
        argument: &'static str,
        /// Its dtype.
        given: String,
        /// The dtypes that would have been right.
        wanted: String,
    },
    /// A tensor lives on a device this build has no kernel for, or on another device than the first one.
    #[error("{argument} is on device {given}; wanted {wanted}")]
    Device {
        /// The argument's public name.
        argument: &'static str,
        /// Its device.
        given: String,
        /// The device that would have been right.
        wanted: String,
    },
    /// An argument is not a tensor at all.
    #[error("{argument} is a {given}; wanted a tensor (an object that speaks DLPack)")]
    NotATensor {
        /// The argument's public name.
        argument: &'static str,
        /// The name of its type.
        given: String,
    },
    /// An instruction set was asked for that this machine lacks or this build does not know.
    #[error("MODA_ATTN_ISA asks for {given}; this machine and build offer {wanted}")]
    InstructionSet {
        /// What was asked for.
        given: String,
        /// What there is.
        wanted: String,
    },
    /// A modality id on a GPU is out of range. Kernels cannot raise, so it is found at a later call.
    #[error(
        "{argument}[{batch}, {token}] of an earlier call on {device} is {given}; wanted a modality id from -1 (padding) to \
         {largest}. That call took the token for padding"
    )]
    EarlierModality {
        /// The argument's public name.
        argument: &'static str,
        /// The device of that call.
        device: String,
        /// Batch row of the offender.
        batch: usize,
        /// Token of the offender.
        token: usize,
        /// The id found there.
        given: i64,
        /// The largest id that would have been right.
        largest: i64,
    },
    /// There is no CUDA driver on this machine.
    #[error("no CUDA driver was found (libcuda.so.1); it comes with NVIDIA's display driver")]
    DriverMissing,
    /// The CUDA driver refused a call.
    #[error("the CUDA driver refused {call}: {given}")]
    Driver {
        /// The driver's function.
        call: &'static str,
        /// Its complaint. It may be about a kernel that anybody launched earlier.
        given: String,
    },
    /// A GPU that the kernels cannot run on.
    #[error("{device} is {given}; wanted {wanted}")]
    Architecture {
        /// The device.
        device: String,
        /// Its architecture and name.
        given: String,
        /// What the kernels need.
        wanted: String,
    },
    /// Memory on a GPU could not be had.
    #[error("{device} has no memory left for {what}")]
    DeviceMemory {
        /// The device.
        device: String,
        /// What it was for.
        what: &'static str,
    },
    /// No run-time compiler was found, so no kernel can run on a GPU.
    #[error(
        "NVRTC, the compiler of the CUDA kernels, was not found in: {looked}. Install it (pip install nvidia-cuda-nvrtc) or \
         set MODA_ATTN_NVRTC to the path of libnvrtc.so"
    )]
    CompilerMissing {
        /// Where it was looked for.
        looked: String,
    },
    /// The run-time compiler refused a kernel: a defect of this library, or a compiler it does not know.
    #[error("NVRTC could not compile {text} ({options}): {log}")]
    Compile {
        /// The text's name.
        text: &'static str,
        /// The compiler's options.
        options: String,
        /// What it said.
        log: String,
    },
    /// Memory for a workspace or a result could not be had.
    #[error("could not allocate {bytes} bytes for {what}")]
    Allocation {
        /// Size of the request.
        bytes: usize,
        /// What it was for.
        what: &'static str,
    },
    /// A defect of this library: a panic caught before it could reach the caller.
    #[error("internal error in moda-attn, please report it: {0}")]
    Panic(String),
}

/// The built-in exception class that a Python user would catch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// `ValueError`
    Value,
    /// `TypeError`
    Type,
    /// `RuntimeError`
    Runtime,
    /// `MemoryError`
    Memory,
}

impl Error {
    /// The built-in exception class this error belongs to.
    pub const fn kind(&self) -> ErrorKind {
        match self {
            Self::Shape { .. }
            | Self::Modality { .. }
            | Self::EarlierModality { .. }
            | Self::Option { .. }
            | Self::Device { .. } => ErrorKind::Value,
            Self::DType { .. } | Self::NotATensor { .. } => ErrorKind::Type,
            Self::InstructionSet { .. }
            | Self::DriverMissing
            | Self::Driver { .. }
            | Self::Architecture { .. }
            | Self::CompilerMissing { .. }
            | Self::Compile { .. }
            | Self::Panic(_) => ErrorKind::Runtime,
            Self::DeviceMemory { .. } | Self::Allocation { .. } => ErrorKind::Memory,
        }
    }

    /// The variant's name, as `moda_attn.list_errors()` gives it.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Shape { .. } => "Shape",
            Self::Modality { .. } => "Modality",
            Self::Option { .. } => "Option",
            Self::DType { .. } => "DType",
            Self::Device { .. } => "Device",
            Self::NotATensor { .. } => "NotATensor",
            Self::InstructionSet { .. } => "InstructionSet",
            Self::EarlierModality { .. } => "EarlierModality",
            Self::DriverMissing => "DriverMissing",
            Self::Driver { .. } => "Driver",
            Self::Architecture { .. } => "Architecture",
            Self::DeviceMemory { .. } => "DeviceMemory",
            Self::CompilerMissing { .. } => "CompilerMissing",
            Self::Compile { .. } => "Compile",
            Self::Allocation { .. } => "Allocation",
            Self::Panic(_) => "Panic",
        }
    }

    /// One specimen of every variant, for the exported list of errors and the test that each has a case.
    pub fn specimens() -> Vec<Self> {
        let (argument, given, wanted) = ("argument", || "<given>".to_owned(), || "<wanted>".to_owned());
        let device = || "<device>".to_owned();
        vec![
            Self::Shape { argument, given: given(), wanted: wanted() },
            Self::Modality { argument, batch: 0, token: 0, given: 2, largest: 1 },
            Self::Option { argument, given: given(), wanted: wanted() },
            Self::DType { argument, given: given(), wanted: wanted() },
            Self::Device { argument, given: given(), wanted: wanted() },
            Self::NotATensor { argument, given: given() },
            Self::InstructionSet { given: given(), wanted: wanted() },
            Self::EarlierModality { argument, device: device(), batch: 0, token: 0, given: 2, largest: 1 },
            Self::DriverMissing,
            Self::Driver { call: "<call>", given: given() },
            Self::Architecture { device: device(), given: given(), wanted: wanted() },
            Self::DeviceMemory { device: device(), what: "<what>" },
            Self::CompilerMissing { looked: "<places>".to_owned() },
            Self::Compile { text: "<text>", options: "<options>".to_owned(), log: "<log>".to_owned() },
            Self::Allocation { bytes: 0, what: "<what>" },
            Self::Panic("<message>".to_owned()),
        ]
    }
}

/// A result with this crate's [`enum@Error`].
pub type Result<T> = std::result::Result<T, Error>;
