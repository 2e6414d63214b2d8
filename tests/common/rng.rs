//! A small deterministic random generator (splitmix64): the same seed gives the same case on every machine.

use moda_attn::dtype::Element;

#[derive(Debug, Clone)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1).
    pub(crate) fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal (Box-Muller).
    pub(crate) fn normal(&mut self) -> f64 {
        let (u, v) = (1.0 - self.uniform(), self.uniform());
        (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
    }

    /// An integer in `0 .. bound`.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    pub(crate) fn flip(&mut self) -> bool {
        self.below(2) == 1
    }

    pub(crate) fn pick<C: Copy>(&mut self, choices: &[C]) -> C {
        choices[self.below(choices.len())]
    }

    /// Normal values of standard deviation `spread`, rounded to what `T` can store.
    pub(crate) fn normals<T: Element>(&mut self, count: usize, spread: f64) -> Vec<T> {
        (0..count).map(|_| narrow(spread * self.normal())).collect()
    }
}

/// A float64 rounded to `T`.
pub(crate) fn narrow<T: Element>(value: f64) -> T {
    use moda_attn::dtype::Real;
    T::narrow(T::Acc::from_f64(value))
}

/// What a `T` holds, exactly.
pub(crate) fn widen<T: Element>(value: T) -> f64 {
    use moda_attn::dtype::Real;
    value.widen().to_f64()
}
