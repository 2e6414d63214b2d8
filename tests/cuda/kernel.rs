//! Small kernels of the interpreter's own tests.

use crate::emulator::{Fault, Gpu, Program, Shape, Source};

/// Types and a few words for the texts below.
const HEAD: &str = "
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
#define KERNEL(name) extern \"C\" __global__ void name
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
";

/// Runs the kernel `test` of a text. Its one argument is a struct of 64-bit values.
pub(crate) fn launch(
    gpu: &mut Gpu,
    text: &str,
    (grid, block, shared): (u32, u32, u32),
    values: &[u64],
) -> Result<(), Fault> {
    let text = format!("{HEAD}#line 1 \"test.cu\"\n{text}");
    let source = Source { name: "test.cu", text, defines: Vec::new() };
    let program = Program::of(&source, gpu.architecture());
    let params: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    gpu.launch(&program, "test", Shape { grid: [grid, 1, 1], block, shared, params: &params })
}

/// The same on one block, where nothing may go wrong.
#[track_caller]
pub(crate) fn run(gpu: &mut Gpu, text: &str, threads: u32, values: &[u64]) {
    launch(gpu, text, (1, threads, 0), values).unwrap_or_else(|fault| panic!("{fault}"));
}
