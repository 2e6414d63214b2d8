//! How fast this machine multiplies: a loop on registers alone, the ceiling that kernels are measured against.

use super::simd::{Simd, Task};
use super::{Exec, parallel};
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Steps of every chain between two looks at the clock: about ten microseconds.
const STEPS: usize = 4096;

/// Floating point operations a second of independent chains of products, on all threads of `exec` at once.
pub(super) fn rate<S: Simd>(s: S, exec: Exec, duration: Duration) -> f64 {
    let mut rates = vec![0.0; exec.threads];
    parallel::run(&mut rates, exec.threads, |rate, _| {
        let (start, mut operations) = (Instant::now(), 0);
        while start.elapsed() < duration {
            // As many chains as the matrix product has sums in registers.
            operations += if S::TALL == 12 { s.vectorize(Chains::<S, 24>(s)) } else { s.vectorize(Chains::<S, 12>(s)) };
        }
        *rate += operations as f64 / start.elapsed().as_secs_f64();
    });
    rates.iter().sum()
}

/// Runs `COUNT` chains and returns how many operations that were.
struct Chains<S, const COUNT: usize>(S);

impl<S: Simd, const COUNT: usize> Task for Chains<S, COUNT> {
    type Output = usize;

    #[inline(always)]
    fn run(self) -> usize {
        let Self(s) = self;
        // Unknown to the compiler, else it would see that all chains are one.
        let numbers = black_box([<S::Real as crate::dtype::Real>::ONE; 16]);
        // SAFETY: a register holds at most 16 numbers.
        let number = || unsafe { s.load(black_box(numbers.as_ptr())) };
        let (left, right) = (number(), number());
        let mut sums: [S::Vector; COUNT] = std::array::from_fn(|_| number());
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = s.mul_add(left, right, *sum);
            }
        }
        let total = sums.into_iter().fold(s.zero(), |total, sum| s.add(total, sum));
        black_box(s.sum(total));
        2 * STEPS * COUNT * S::LANES
    }
}
