//! Every mistake that the interpreter finds, made once, and next to it what is not one.

use crate::emulator::{Fault, Gpu};
use crate::kernel::launch;

/// Runs a text with an input of 64 numbers, an output of 64 and one of 64 that may be changed.
fn outcome(text: &str, (grid, block, shared): (u32, u32, u32)) -> Result<(), Fault> {
    let mut gpu = Gpu::new();
    let numbers: Vec<u32> = (0..64).collect();
    let values = [gpu.buffer(&numbers), gpu.output::<u32>(64), gpu.variable(&numbers)];
    launch(&mut gpu, text, (grid, block, shared), &values)
}

fn kernel(body: &str) -> String {
    format!("KERNEL(test)(const u32* in, u32* out, u32* both) {{\nu32 t = threadIdx.x;\n{body}\n}}")
}

/// Fails unless the kernel is found out with these words, at the line that holds `here`.
#[track_caller]
fn found(body: &str, shape: (u32, u32, u32), words: &str) {
    let body = kernel(body);
    let fault = outcome(&body, shape).expect_err(words);
    assert!(fault.message.contains(words), "{words:?} is not in: {fault}");
    let line = 1 + body.lines().position(|line| line.contains("HERE")).expect("a line with HERE");
    assert!(fault.place.contains(&format!("test.cu:{line}:")), "not line {line}: {fault}");
}

#[track_caller]
fn fine(body: &str, shape: (u32, u32, u32)) {
    outcome(&kernel(body), shape).unwrap_or_else(|fault| panic!("{fault}"));
}

const WARP: (u32, u32, u32) = (1, 32, 0);
const TWO_WARPS: (u32, u32, u32) = (1, 64, 0);

#[test]
fn accesses_outside_of_a_buffer() {
    found("out[t] = in[t + 33]; // HERE", WARP, "4 bytes at byte 256 of buffer 1 (input), which has 256");
    found("out[t] = in[(long long)t - 1]; // HERE", WARP, "4 bytes at byte -4 of buffer 1 (input), which has 256");
    found("out[2 * t + 3] = t; // HERE", WARP, "of buffer 2 (output), which has 256");
    found("*(u32*)(u64)(t * 4) = 1; // HERE", WARP, "is in no buffer");
    found("extern __shared__ u32 s[]; s[t] = 1; // HERE", (1, 32, 124), "the block has 124");
    fine("extern __shared__ u32 s[]; s[t] = 1; out[t] = in[t + 32];", (1, 32, 128));
}

#[test]
fn misaligned_accesses() {
    found(
        "asm(\"st.global.v2.u32 [%0], {%1, %1};\" :: \"l\"(out + 1), \"r\"(t)); // HERE",
        WARP,
        "not aligned to the 8 bytes",
    );
    found(
        "__shared__ alignas(16) u32 s[64]; *(uint4*)&s[t % 3 + 2] = make_uint4(t, t, t, t); // HERE",
        WARP,
        "not aligned to the 16 bytes",
    );
}

#[test]
fn memory_that_was_never_written() {
    found("both[t] = out[t]; // HERE", WARP, "byte 0 of buffer 2 (output) is read and was never written");
    found(
        "__shared__ u32 s[64]; s[t] = t; __syncwarp(); \n out[t] = s[2 * t]; // HERE",
        WARP,
        "shared byte 128 is read and was never written",
    );
    fine("out[t] = 1; both[t] = out[t];", WARP);
}

#[test]
fn inputs_written() {
    found("((u32*)in)[t] = 1; // HERE", WARP, "buffer 1 (input) is written, which is an input");
}

#[test]
fn races_between_warps() {
    found("__shared__ u32 s[64]; s[t] = t;\n out[t] = s[63 - t]; // HERE", TWO_WARPS, "never written");
    found(
        "__shared__ u32 s[64]; s[t] = t; __syncthreads();\n u32 x = s[63 - t]; // HERE\n s[t] = x;",
        TWO_WARPS,
        "is read, which warp 0 wrote since the last barrier",
    );
    found(
        "__shared__ u32 s[1];\n if (t % 32 == 0) s[0] = t / 32; // HERE\n __syncthreads(); out[t] = s[0];",
        TWO_WARPS,
        "is written, which warp 0 wrote since",
    );
    found(
        "__shared__ u32 s[64]; s[t] = 0; __syncthreads();\n if (t < 32) s[t + 32] = 1; else\n out[t] = s[t]; // HERE",
        TWO_WARPS,
        "is read, which warp 0 wrote since",
    );
    fine("__shared__ u32 s[64]; s[t] = t; __syncthreads(); u32 x = s[63 - t]; __syncthreads(); s[t] = x;", TWO_WARPS);
    found(
        "__shared__ u32 s[64]; s[t] = t; __syncthreads();\n if (t < 32) out[t] = s[t + 32]; else\n s[t] = 1; // HERE",
        TWO_WARPS,
        "is written, which warp 0 read since",
    );
    // Bytes beside each other belong to different warps; all may read, and meet in atomics.
    fine(
        "__shared__ u8 s[64]; __shared__ u32 sum; s[t] = t; if (t == 0) sum = 0; __syncthreads();
        atomicAdd(&sum, (u32)s[0]); out[t] = s[63 - t];",
        TWO_WARPS,
    );
}

#[test]
fn races_between_lanes() {
    found(
        "__shared__ u32 s[32]; s[t] = t;\n out[t] = s[31 - t]; // HERE",
        WARP,
        "is read, which lane 31 of the same warp wrote since the last __syncwarp",
    );
    found(
        "__shared__ u32 s[32]; s[t] = t; __syncwarp(); out[t] = s[31 - t];\n s[t] = 0; // HERE\n __syncwarp(); both[t] = s[t ^ 1];",
        WARP,
        "is written, which lane 31 of the same warp read since the last __syncwarp",
    );
    fine(
        "__shared__ u32 s[32]; s[t] = t; __syncwarp(); out[t] = s[31 - t]; __syncwarp(); s[t] = 0; both[t] = s[t];",
        WARP,
    );
}

#[test]
fn races_in_global_memory() {
    found(
        "both[t] = t; // HERE\n out[t] = both[63 - t];",
        TWO_WARPS,
        "is written, which warp 0 read since the last barrier",
    );
    found(
        "if (t < 32) both[t] = 1; else\n out[t] = both[t - 32]; // HERE",
        TWO_WARPS,
        "is read, which warp 0 wrote since the last barrier",
    );
    found(
        "out[t] = both[0]; if (t == 63)\n both[0] = 1; // HERE",
        TWO_WARPS,
        "is written, which several warps read since the last barrier",
    );
    found(
        "both[t] = t;\n out[t] = both[t ^ 1]; // HERE",
        WARP,
        "is read, which lane 1 of the same warp wrote since the last __syncwarp",
    );
    fine("both[t] = t; __syncthreads(); out[t] = both[63 - t]; __syncthreads(); both[t] = 0;", TWO_WARPS);
    fine("both[t] = t; __syncwarp(); out[t] = both[t ^ 1]; __syncwarp(); both[t] += both[t];", WARP);
}

#[test]
fn races_between_blocks() {
    found("out[t] = blockIdx.x; // HERE", (2, 32, 0), "is written, which block 0 wrote in the same launch");
    found(
        "if (blockIdx.x == 0) both[t] = 1; else\n out[t] = both[t]; // HERE",
        (2, 32, 0),
        "is read, which block 0 wrote",
    );
    found(
        "if (blockIdx.x == 0) out[t] = both[t]; else\n both[t] = 1; // HERE",
        (2, 32, 0),
        "is written, which block 0 read",
    );
    fine("atomicAdd(both, 1u); out[t + 32 * blockIdx.x] = both[t + 32];", (2, 32, 0));
}

#[test]
fn copies_not_waited_for() {
    let copy = "asm volatile(\"cp.async.ca.shared.global [%0], [%1], 4;\" :: \"r\"(shared_address(&s[t])), \"l\"(in + t) : \"memory\");
        asm volatile(\"cp.async.commit_group;\" ::: \"memory\");";
    let wait = "asm volatile(\"cp.async.wait_group 0;\" ::: \"memory\");";
    found(
        &format!("__shared__ u32 s[32]; {copy}\n out[t] = s[t]; // HERE"),
        WARP,
        "is read, and a copy to it is in flight",
    );
    found(
        &format!("__shared__ u32 s[32]; {copy}\n s[t] = t; // HERE\n {wait}"),
        WARP,
        "is written, and a copy to it is in flight",
    );
    found(&format!("__shared__ u32 s[64]; {copy} {wait}\n out[t] = s[63 - t]; // HERE"), TWO_WARPS, "never written");
    found(
        &format!("__shared__ u32 s[64]; {copy} {wait}\n if (t > 31) out[t] = s[63 - t]; // HERE"),
        TWO_WARPS,
        "is read, which warp 0 wrote since",
    );
    let unfinished = outcome(&kernel(&format!("__shared__ u32 s[32]; {copy}")), WARP).unwrap_err();
    assert!(unfinished.message.contains("ends while copies of its own are in flight"), "{unfinished}");
    fine(&format!("__shared__ u32 s[64]; {copy} {wait} __syncthreads(); out[t] = s[63 - t];"), TWO_WARPS);
}

#[test]
fn lanes_that_are_missing() {
    found("if (t < 7) out[t] = __shfl_sync(~0u, t, 0); // HERE", WARP, "which never come");
    found("if (t > 7) return;\n out[t] = __shfl_sync(~0u, t, 0); // HERE", WARP, "which never come");
    found("out[t] = __shfl_sync(0xffu, t, 0); // HERE", WARP, "are not in the member mask");
    found(
        "if (t < 8) out[t] = __shfl_sync(0xffu, t, 9); // HERE",
        WARP,
        "lane 0 reads lane 9, which does not take part",
    );
    found(
        "__shared__ alignas(16) u32 s[128]; s[t] = 0; __syncwarp(); u32 x;
        if (t < 31) { asm volatile(\"ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];\"
        : \"=r\"(x) : \"r\"(shared_address(s))); /* HERE */ out[t] = x; }",
        WARP,
        "lanes 0x80000000 of the warp are missing here",
    );
    fine("if (t < 7) out[t] = __shfl_sync(0x7fu, t, 0); __syncwarp(); out[t] = __shfl_sync(~0u, t, 0);", WARP);
}

#[test]
fn barriers_that_not_all_reach() {
    found("if (t < 32) __syncthreads(); // HERE", TWO_WARPS, "waits at a barrier that warps [1] never reach");
    found("if (t < 40) __syncthreads(); // HERE", TWO_WARPS, "which never come");
    found("if (t == 3) return;\n __syncthreads(); // HERE", WARP, "which never come");
    // A block whose last warp is not full is one of fewer lanes, not one with missing ones.
    fine("__syncthreads(); out[t] = t;", (1, 41, 0));
}

#[test]
fn loops_without_end() {
    let text = kernel("volatile u32* flag = both;\n while (flag[1] == 1) {}");
    let mut gpu = Gpu::new();
    gpu.patience = 1000;
    let (numbers, out) = (gpu.variable::<u32>(&[1; 32]), gpu.output::<u32>(32));
    let fault = launch(&mut gpu, &text, WARP, &[numbers, out, numbers]).unwrap_err();
    assert!(fault.message.contains("an endless loop?") && fault.place.contains("while (flag[1] == 1)"), "{fault}");
}

#[test]
fn outputs_that_are_not_all_written() {
    let mut gpu = Gpu::new();
    let out = gpu.output::<u32>(40);
    launch(&mut gpu, "KERNEL(test)(u32* out) { out[threadIdx.x] = 1; }", WARP, &[out]).unwrap();
    assert_eq!(gpu.read_written::<u32>(out)[30..34], [Some(1), Some(1), None, None]);
    let read = std::panic::catch_unwind(|| gpu.read::<u32>(out));
    assert!(read.unwrap_err().downcast_ref::<String>().unwrap().contains("byte 128 of buffer 1 (output)"));
}

#[test]
fn instructions_that_are_not_known() {
    let known = std::panic::catch_unwind(|| fine("asm volatile(\"nanosleep.u32 5;\"); // HERE", WARP));
    let message = known.unwrap_err().downcast_ref::<String>().unwrap().clone();
    assert!(message.contains("nanosleep") && message.contains("PTX line"), "{message}");
}

#[test]
fn launches_that_do_not_fit() {
    let fault = outcome("KERNEL(test)(u32* out) { *out = 1; }", WARP).unwrap_err();
    assert!(fault.message.contains("24 bytes of parameters, the kernel has 8"), "{fault}");
    let fault = outcome(&kernel("out[t] = 1;"), (1, 32, 200 << 10)).unwrap_err();
    assert!(fault.message.contains("of shared memory"), "{fault}");
}

#[test]
fn bank_conflicts_are_counted() {
    let conflicts = |access: &str| {
        let mut gpu = Gpu::new();
        gpu.counting = true;
        let out = gpu.output::<u32>(32);
        let text = format!(
            "KERNEL(test)(u32* out) {{ __shared__ alignas(16) u32 s[1056]; u32 t = threadIdx.x; {access} __syncwarp();
            out[t] = s[0]; }}"
        );
        launch(&mut gpu, &text, WARP, &[out]).unwrap();
        gpu.conflicts
    };
    assert_eq!(conflicts("s[t] = t;"), 0);
    assert_eq!(conflicts("s[33 * t] = t;"), 0);
    assert_eq!(conflicts("s[32 * t] = t;"), 31);
    assert_eq!(conflicts("s[2 * t] = t;"), 1);
    // Four words a lane: eight lanes at a time.
    assert_eq!(conflicts("*(uint4*)&s[4 * t] = make_uint4(t, t, t, t);"), 0);
    assert_eq!(conflicts("*(uint4*)&s[32 * t] = make_uint4(t, t, t, t);"), 28);
}
