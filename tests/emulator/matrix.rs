//! Products of small matrices on a warp: which lane holds which element, as the PTX ISA lays them out.

use super::half::{bf16_value, f16_value, tf32_value};
use super::instruction::{Lanes, Register, Type, WARP};

/// `mma.sync.m16n8k16` (or `k8`, `k4`): D (16 x 8) = A (16 x K) B (K x 8) + C.
///
/// Products are exact. They are added to C in float32, one after the other in the order of K; the machine adds several at
/// a time with fewer digits, and differs in the last bits.
pub(crate) struct Multiply {
    decode: fn(u64) -> f64,
    depth: usize,
    /// Elements of a register.
    parts: usize,
    pub(crate) d: Vec<Register>,
    a: Vec<Register>,
    b: Vec<Register>,
    c: Vec<Register>,
}

impl Multiply {
    pub(crate) fn new(
        element: Type,
        depth: usize,
        d: Vec<Register>,
        a: Vec<Register>,
        b: Vec<Register>,
        c: Vec<Register>,
    ) -> Option<Self> {
        let (decode, parts): (fn(u64) -> f64, _) = match element {
            Type::BF16 => (bf16_value, 2),
            Type::F16 => (f16_value, 2),
            _ => (tf32_value, 1),
        };
        let fits = [d.len(), a.len(), b.len(), c.len()] == [4, depth / (2 * parts), depth / (4 * parts), 4];
        fits.then_some(Self { decode, depth, parts, d, a, b, c })
    }

    /// The four registers of D.
    pub(crate) fn run(&self, registers: &[Lanes]) -> [Lanes; 4] {
        let value = |register: Register, lane: usize| registers[register][lane];
        let width = 32 / self.parts;
        let element = |register: Register, lane: usize, part: usize| {
            (self.decode)(value(register, lane) >> (width * part) & ((1 << width) - 1)) as f32
        };
        let mut a = [[0.0f32; 16]; 16];
        let mut b = [[0.0f32; 8]; 16];
        let mut sum = [[0.0f32; 8]; 16];
        for lane in 0..WARP {
            let (group, within) = (lane / 4, lane % 4);
            for part in 0..self.parts {
                for (at, &register) in self.a.iter().enumerate() {
                    let (row, column) = (group + 8 * (at % 2), self.parts * (within + 4 * (at / 2)) + part);
                    a[row][column] = element(register, lane, part);
                }
                for (at, &register) in self.b.iter().enumerate() {
                    b[self.parts * (within + 4 * at) + part][group] = element(register, lane, part);
                }
            }
            for at in 0..4 {
                let (row, column) = Self::place(lane, at);
                sum[row][column] = f32::from_bits(value(self.c[at], lane) as u32);
            }
        }
        for (a, sum) in a.iter().zip(&mut sum) {
            for (a, b) in a.iter().zip(&b).take(self.depth) {
                for (sum, b) in sum.iter_mut().zip(b) {
                    *sum += a * b;
                }
            }
        }
        let mut result = [[0; WARP]; 4];
        for (at, values) in result.iter_mut().enumerate() {
            for (lane, value) in values.iter_mut().enumerate() {
                let (row, column) = Self::place(lane, at);
                *value = u64::from(sum[row][column].to_bits());
            }
        }
        result
    }

    /// Row and column of a lane's element of C and D.
    fn place(lane: usize, at: usize) -> (usize, usize) {
        (lane / 4 + 8 * (at / 2), 2 * (lane % 4) + at % 2)
    }
}

/// The lane and the half of its register that hold an element of an 8 x 8 matrix.
pub(crate) fn fragment(row: usize, column: usize, transposed: bool) -> (usize, usize) {
    let (row, column) = if transposed { (column, row) } else { (row, column) };
    (4 * row + column / 2, column % 2)
}
