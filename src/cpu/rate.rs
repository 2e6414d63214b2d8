//! How fast this machine multiplies: a loop on registers alone, the ceiling that kernels are measured against.

use super::dot::Dot;
use super::parallel;
use super::simd::{Simd, Task};
use crate::dtype::Real;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Steps of every chain between two looks at the clock: about ten microseconds.
const STEPS: usize = 4096;

/// Floating point operations a second of independent chains of products, on all threads at once.
pub(super) fn rate<D: Dot>(dot: D, threads: usize, duration: Duration) -> f64 {
    let mut rates = vec![0.0; threads];
    parallel::run(&mut rates, threads, |rate, _| {
        let (start, mut operations) = (Instant::now(), 0);
        while start.elapsed() < duration {
            // As many chains as the matrix product has sums in registers.
            operations +=
                if D::Simd::TALL == 12 { dot.enter(Chains::<D, 24>(dot)) } else { dot.enter(Chains::<D, 12>(dot)) };
        }
        *rate += operations as f64 / start.elapsed().as_secs_f64();
    });
    rates.iter().sum()
}

/// Runs `COUNT` chains and returns how many operations that were.
struct Chains<D, const COUNT: usize>(D);

impl<D: Dot, const COUNT: usize> Task for Chains<D, COUNT> {
    type Output = usize;

    #[inline(always)]
    fn run(self) -> usize {
        let Self(dot) = self;
        let s = dot.simd();
        let mut units = [D::Unit::default(); 16];
        // Unknown to the compiler, else it would see that all chains are one.
        let numbers = black_box([D::Real::ONE; 16]);
        // SAFETY: a register holds at most 16 units or numbers.
        let (left, right, number) = unsafe {
            let ones = s.load(numbers.as_ptr());
            dot.store_right(units.as_mut_ptr(), [ones, ones]);
            let unit = || dot.units(black_box(units.as_ptr()));
            (unit(), unit(), || s.load(black_box(numbers.as_ptr())))
        };
        let mut sums: [<D::Simd as Simd>::Vector; COUNT] = std::array::from_fn(|_| number());
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = dot.dot(left, right, *sum);
            }
        }
        let total = sums.into_iter().fold(s.zero(), |total, sum| s.add(total, sum));
        black_box(s.sum(total));
        2 * STEPS * COUNT * D::Simd::LANES * D::DEPTH
    }
}
