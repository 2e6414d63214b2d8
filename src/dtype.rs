//! Element types: what tensors store ([`Element`]) and what the arithmetic runs in ([`Real`]).

use half::{bf16, f16};
use std::fmt::{Debug, Display};
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub, SubAssign};

/// The dtype of a tensor, as its owner names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names say it")]
pub enum DType {
    Bool,
    Int8,
    Int16,
    Int32,
    Int64,
    UInt8,
    UInt16,
    UInt32,
    UInt64,
    Float16,
    BFloat16,
    Float32,
    Float64,
}

impl DType {
    /// Size of one element in bytes.
    pub const fn size(self) -> usize {
        match self {
            Self::Bool | Self::Int8 | Self::UInt8 => 1,
            Self::Int16 | Self::UInt16 | Self::Float16 | Self::BFloat16 => 2,
            Self::Int32 | Self::UInt32 | Self::Float32 => 4,
            Self::Int64 | Self::UInt64 | Self::Float64 => 8,
        }
    }

    /// The name PyTorch and NumPy use.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bool => "bool",
            Self::Int8 => "int8",
            Self::Int16 => "int16",
            Self::Int32 => "int32",
            Self::Int64 => "int64",
            Self::UInt8 => "uint8",
            Self::UInt16 => "uint16",
            Self::UInt32 => "uint32",
            Self::UInt64 => "uint64",
            Self::Float16 => "float16",
            Self::BFloat16 => "bfloat16",
            Self::Float32 => "float32",
            Self::Float64 => "float64",
        }
    }

    /// Whether this is one of the integer dtypes (bool is not).
    pub const fn is_integer(self) -> bool {
        !matches!(self, Self::Bool | Self::Float16 | Self::BFloat16 | Self::Float32 | Self::Float64)
    }

    /// Whether the operators take it for query, key and value.
    pub const fn is_float(self) -> bool {
        matches!(self, Self::Float16 | Self::BFloat16 | Self::Float32 | Self::Float64)
    }
}

/// A plain number type that a tensor of [`DType`] `DTYPE` stores.
pub trait Scalar: Copy + Send + Sync + Debug + 'static {
    /// The dtype whose elements have this type's layout.
    const DTYPE: DType;
}

macro_rules! scalar {
    ($($type:ty => $dtype:ident),* $(,)?) => { $(impl Scalar for $type { const DTYPE: DType = DType::$dtype; })* };
}
scalar!(i8 => Int8, i16 => Int16, i32 => Int32, i64 => Int64, u8 => UInt8, u16 => UInt16, u32 => UInt32, u64 => UInt64,
        f16 => Float16, bf16 => BFloat16, f32 => Float32, f64 => Float64);

/// A floating dtype of query, key and value: stored as is, computed in [`Element::Acc`].
pub trait Element: Scalar + Default {
    /// The type all arithmetic runs in: float32, or float64 for float64.
    type Acc: Real;
    /// Widens one element; exact.
    fn widen(self) -> Self::Acc;
    /// Rounds to nearest even.
    fn narrow(value: Self::Acc) -> Self;
}

/// A type the arithmetic runs in.
pub trait Real:
    Element<Acc = Self>
    + Display
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + SubAssign
    + MulAssign
{
    /// 0
    const ZERO: Self;
    /// 1
    const ONE: Self;
    /// Minus infinity: the score of what is not visible.
    const NEG_INFINITY: Self;
    /// Plus infinity.
    const INFINITY: Self;
    /// Converts a constant.
    fn from_f64(value: f64) -> Self;
    /// Widens for a report or a test.
    fn to_f64(self) -> f64;
    /// e to the power of self.
    fn exp(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// self * a + b, rounded once.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// Neither infinite nor NaN.
    fn is_finite(self) -> bool;
}

macro_rules! real {
    ($type:ident) => {
        impl Element for $type {
            type Acc = $type;
            #[inline(always)]
            fn widen(self) -> $type {
                self
            }
            #[inline(always)]
            fn narrow(value: $type) -> $type {
                value
            }
        }

        impl Real for $type {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const NEG_INFINITY: Self = $type::NEG_INFINITY;
            const INFINITY: Self = $type::INFINITY;
            #[inline(always)]
            fn from_f64(value: f64) -> Self {
                value as $type
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                f64::from(self)
            }
            #[inline(always)]
            fn exp(self) -> Self {
                self.exp()
            }
            #[inline(always)]
            fn ln(self) -> Self {
                self.ln()
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                self.sqrt()
            }
            #[inline(always)]
            fn mul_add(self, a: Self, b: Self) -> Self {
                self.mul_add(a, b)
            }
            #[inline(always)]
            fn is_finite(self) -> bool {
                self.is_finite()
            }
        }
    };
}
real!(f32);
real!(f64);

macro_rules! half {
    ($type:ident) => {
        impl Element for $type {
            type Acc = f32;
            #[inline(always)]
            fn widen(self) -> f32 {
                self.to_f32()
            }
            #[inline(always)]
            fn narrow(value: f32) -> $type {
                $type::from_f32(value)
            }
        }
    };
}
half!(f16);
half!(bf16);
