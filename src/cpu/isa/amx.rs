//! AMX: products of bfloat16 pairs by tiles of 16 x 16 sums. Everything but the products is [`Avx512Bf16`].
//!
//! The instructions are written in assembly: their intrinsics are not stable. Linux lends the tiles on request; whoever is
//! refused does without AMX.

#[cfg(test)]
mod emulator;
#[cfg(test)]
mod tests;

use super::avx512::Avx512;
use super::avx512bf16::{Avx512Bf16, Pair};
use crate::cpu::dot::Dot;
use crate::cpu::kernel::gemm::{Left, Right, Size, Target, multiply};
use crate::cpu::simd::Task;
use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, __m512, __m512i};
use std::cell::Cell;
use std::sync::OnceLock;

/// Rows of a tile, and units (pairs, float32 sums) of one of its rows.
const TILE: usize = 16;

/// The token: whoever holds one runs on a CPU with these instructions, in a process that may use them.
#[derive(Debug, Clone, Copy)]
pub struct Amx(Avx512Bf16);

impl Amx {
    /// A token where the CPU has the instructions and the system lets this process use them.
    pub fn new() -> Option<Self> {
        static FOUND: OnceLock<bool> = OnceLock::new();
        let pairs = Avx512Bf16::new()?;
        FOUND.get_or_init(|| has_tiles() && may_use_tiles()).then_some(Self(pairs))
    }

    /// A token on the caller's word.
    ///
    /// # Safety
    /// The CPU must have AVX-512 with BF16, AMX with BF16, and the process the system's permission.
    #[cfg(test)]
    pub const unsafe fn new_unchecked() -> Self {
        // SAFETY: the caller's promise.
        Self(unsafe { Avx512Bf16::new_unchecked() })
    }

    /// Whether the CPU has the instructions and the system lets this process use them.
    pub fn is_available() -> bool {
        Self::new().is_some()
    }
}

/// CPUID: tiles and their bfloat16 products, and a system that saves both parts of their state.
fn has_tiles() -> bool {
    const OSXSAVE: u32 = 1 << 27;
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    const STATE: u32 = 0b11 << 17;
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    let enabled: u32;
    // SAFETY: the system has turned on XGETBV, as OSXSAVE says; register 0 exists.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") enabled, out("edx") _, options(nomem, nostack)) };
    __cpuid_count(7, 0).edx & (AMX_BF16 | AMX_TILE) == (AMX_BF16 | AMX_TILE) && enabled & STATE == STATE
}

/// Asks for the tiles, once for all threads. Refused, for example, where a thread has too small a signal stack.
#[cfg(target_os = "linux")]
fn may_use_tiles() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: a request for a permission; it touches no memory.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn may_use_tiles() -> bool {
    false
}

/// What LDTILECFG reads: every tile's rows and bytes a row.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes: [u16; 16],
    rows: [u8; 16],
}

impl Configuration {
    /// Sums in tiles 0 to 3 (two of rows by two of columns), left operands in 4 and 5, right ones in 6 and 7.
    const fn new([upper, lower]: [usize; 2]) -> Self {
        let (upper, lower) = (upper as u8, lower as u8);
        let mut bytes = [0; 16];
        let mut tile = 0;
        while tile < 8 {
            bytes[tile] = 64;
            tile += 1;
        }
        let mut rows = [0; 16];
        [rows[0], rows[1], rows[2], rows[3]] = [upper, upper, lower, lower];
        [rows[4], rows[5], rows[6], rows[7]] = [upper, lower, TILE as u8, TILE as u8];
        Self { palette: 1, start_row: 0, reserved: [0; 14], bytes, rows }
    }
}

thread_local! {
    /// Rows of the two left tiles that this thread's tiles are configured for, while a task runs.
    static CONFIGURED: Cell<[usize; 2]> = const { Cell::new([0; 2]) };
}

/// Configures the tiles for these rows, unless they are. A tile must have a row: where there is no lower one it gets a row
/// that is not used.
///
/// # Safety
/// As [`Amx::new_unchecked`], inside [`Dot::enter`].
unsafe fn configure([upper, lower]: [usize; 2]) {
    let rows = [upper, lower.max(1)];
    if CONFIGURED.get() != rows {
        CONFIGURED.set(rows);
        let configuration = Configuration::new(rows);
        // SAFETY: the instruction reads the 64 bytes of a valid configuration.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, readonly)) };
    }
}

/// Gives the tiles back when a task ends, even by a panic.
struct Release;

impl Drop for Release {
    fn drop(&mut self) {
        CONFIGURED.set([0; 2]);
        // SAFETY: made in `enter` alone, by a token.
        unsafe { asm!("tilerelease", options(nomem, nostack)) };
    }
}

macro_rules! tile {
    (zero $tile:literal) => {
        asm!(concat!("tilezero tmm", $tile), options(nomem, nostack))
    };
    (load $tile:literal, $pointer:expr, $stride:expr) => {
        asm!(concat!("tileloadd tmm", $tile, ", [{0} + {1}]"), in(reg) $pointer, in(reg) 4 * $stride, options(nostack, readonly))
    };
    // Streamed: past the first cache, where the scores stay.
    (stream $tile:literal, $pointer:expr, $stride:expr) => {
        asm!(concat!("tileloaddt1 tmm", $tile, ", [{0} + {1}]"), in(reg) $pointer, in(reg) 4 * $stride, options(nostack, readonly))
    };
    (store $tile:literal, $pointer:expr, $stride:expr) => {
        asm!(concat!("tilestored [{0} + {1}], tmm", $tile), in(reg) $pointer, in(reg) 4 * $stride, options(nostack))
    };
    (dot $sum:literal, $left:literal, $right:literal) => {
        asm!(concat!("tdpbf16ps tmm", $sum, ", tmm", $left, ", tmm", $right), options(nomem, nostack))
    };
}

/// Units of depth that are transposed at a time.
const CHUNK: usize = 4 * TILE;

/// Left operands that lie transposed, row by row.
#[repr(align(64))]
struct Turned([Pair; 2 * TILE * CHUNK]);

impl Amx {
    /// C (+)= A B for a depth of whole tiles.
    ///
    /// # Safety
    /// As [`Dot::product`], inside [`Dot::enter`].
    #[inline(always)]
    unsafe fn whole_tiles(size: Size, a: Left<Pair>, b: Right<Pair>, c: Target<f32>) {
        let mut turned = Turned([Pair::default(); 2 * TILE * CHUNK]);
        for first in (0..size.rows).step_by(2 * TILE) {
            let count = (size.rows - first).min(2 * TILE);
            let rows = [count.min(TILE), count.saturating_sub(TILE)];
            // SAFETY: rows below the number of rows, depths below the depth; a chunk has room for two tiles of rows.
            unsafe {
                configure(rows);
                let a = Left { pointer: a.pointer.add(first * a.row_stride), ..a };
                let c = Target { pointer: c.pointer.add(first * c.row_stride), ..c };
                if a.depth_stride == 1 {
                    columns(rows, size, a, b, c);
                    continue;
                }
                for from in (0..size.depth).step_by(CHUNK) {
                    let size = Size { depth: (size.depth - from).min(CHUNK), ..size };
                    let a = Left { pointer: a.pointer.add(from * a.depth_stride), ..a };
                    for p in 0..size.depth {
                        for row in 0..count {
                            turned.0[row * CHUNK + p] = *a.pointer.add(row * a.row_stride + p * a.depth_stride);
                        }
                    }
                    let a = Left { pointer: turned.0.as_ptr(), row_stride: CHUNK, depth_stride: 1 };
                    let b = Right { pointer: b.pointer.add(from * b.row_stride), ..b };
                    columns(rows, size, a, b, Target { accumulate: c.accumulate || from > 0, ..c });
                }
            }
        }
    }
}

/// Up to two tiles of rows by all columns.
///
/// # Safety
/// As [`Dot::product`]; the tiles are configured for `rows`.
#[inline(always)]
unsafe fn columns(rows: [usize; 2], size: Size, a: Left<Pair>, b: Right<Pair>, c: Target<f32>) {
    for panel in 0..size.vectors.div_ceil(2) {
        // SAFETY: a panel below the number of panels, and its columns of C.
        unsafe {
            let b = Right { pointer: b.pointer.add(panel * b.panel_stride), ..b };
            let c = Target { pointer: c.pointer.add(2 * panel * TILE), ..c };
            match (rows[1] > 0, size.vectors - 2 * panel > 1) {
                (true, true) => block::<true, true>(size.depth, a, b, c),
                (true, false) => block::<true, false>(size.depth, a, b, c),
                (false, true) => block::<false, true>(size.depth, a, b, c),
                (false, false) => block::<false, false>(size.depth, a, b, c),
            }
        }
    }
}

/// Sums of up to two by two tiles.
///
/// # Safety
/// As [`columns`].
#[inline(always)]
unsafe fn block<const LOWER: bool, const WIDE: bool>(depth: usize, a: Left<Pair>, b: Right<Pair>, c: Target<f32>) {
    // SAFETY: every tile lies inside its operand, by the caller's contract; rows and columns are those configured.
    unsafe {
        let below = c.pointer.add(TILE * c.row_stride * usize::from(LOWER));
        if c.accumulate {
            tile!(load 0, c.pointer, c.row_stride);
            if WIDE {
                tile!(load 1, c.pointer.add(TILE), c.row_stride);
            }
            if LOWER {
                tile!(load 2, below, c.row_stride);
                if WIDE {
                    tile!(load 3, below.add(TILE), c.row_stride);
                }
            }
        } else {
            tile!(zero 0);
            tile!(zero 1);
            tile!(zero 2);
            tile!(zero 3);
        }
        for p in (0..depth).step_by(TILE) {
            let left = a.pointer.add(p);
            let right = b.pointer.add(p * b.row_stride);
            tile!(load 4, left, a.row_stride);
            tile!(stream 6, right, b.row_stride);
            tile!(dot 0, 4, 6);
            if WIDE {
                tile!(stream 7, right.add(TILE), b.row_stride);
                tile!(dot 1, 4, 7);
            }
            if LOWER {
                tile!(load 5, left.add(TILE * a.row_stride), a.row_stride);
                tile!(dot 2, 5, 6);
                if WIDE {
                    tile!(dot 3, 5, 7);
                }
            }
        }
        tile!(store 0, c.pointer, c.row_stride);
        if WIDE {
            tile!(store 1, c.pointer.add(TILE), c.row_stride);
        }
        if LOWER {
            tile!(store 2, below, c.row_stride);
            if WIDE {
                tile!(store 3, below.add(TILE), c.row_stride);
            }
        }
    }
}

// SAFETY (every block of this impl): the token proves the instructions; pointers are the callers' contract.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one reason for all, above")]
impl Dot for Amx {
    type Real = f32;
    type Simd = Avx512<f32>;
    type Unit = Pair;
    type Units = __m512i;
    const DEPTH: usize = 2;

    #[inline(always)]
    fn simd(self) -> Avx512<f32> {
        self.0.simd()
    }
    #[inline(always)]
    fn enter<K: Task>(self, task: K) -> K::Output {
        let _release = Release;
        self.0.enter(task)
    }
    #[inline(always)]
    unsafe fn repeat(self, pointer: *const Pair) -> __m512i {
        unsafe { self.0.repeat(pointer) }
    }
    #[inline(always)]
    unsafe fn units(self, pointer: *const Pair) -> __m512i {
        unsafe { self.0.units(pointer) }
    }
    #[inline(always)]
    fn dot(self, a: __m512i, b: __m512i, sum: __m512) -> __m512 {
        self.0.dot(a, b, sum)
    }
    #[inline(always)]
    unsafe fn store_left(self, row: *mut Pair, at: usize, numbers: __m512) {
        unsafe { self.0.store_left(row, at, numbers) };
    }
    #[inline(always)]
    unsafe fn load_left(self, row: *const Pair, at: usize) -> __m512 {
        unsafe { self.0.load_left(row, at) }
    }
    #[inline(always)]
    unsafe fn store_right(self, units: *mut Pair, rows: [__m512; 2]) {
        unsafe { self.0.store_right(units, rows) };
    }

    /// By tiles as deep as they go, the rest of the depth by vectors.
    #[inline(always)]
    unsafe fn product(self, size: Size, a: Left<Pair>, b: Right<Pair>, c: Target<f32>) {
        let deep = size.depth / TILE * TILE;
        unsafe {
            if deep > 0 {
                Self::whole_tiles(Size { depth: deep, ..size }, a, b, c);
            }
            if deep < size.depth || size.depth == 0 {
                let size = Size { depth: size.depth - deep, ..size };
                let a = Left { pointer: a.pointer.add(deep * a.depth_stride), ..a };
                let b = Right { pointer: b.pointer.add(deep * b.row_stride), ..b };
                multiply(self.0, size, a, b, Target { accumulate: c.accumulate || deep > 0, ..c });
            }
        }
    }
}
