//! The interpreter's warps: divergence, shuffles, votes, barriers, memory, matrices, against plain Rust.

use crate::common::Rng;
use crate::emulator::{Gpu, Plain};
use crate::kernel::{launch, run};
use half::{bf16, f16};

/// What a kernel with one pointer to its result, one element a thread, gives.
fn threads<T: Plain>(text: &str, count: u32) -> Vec<T> {
    let mut gpu = Gpu::new();
    let out = gpu.output::<T>(count as usize);
    run(&mut gpu, text, count, &[out]);
    gpu.read(out)
}

#[test]
fn lanes_part_and_meet_again() {
    let text = "KERNEL(test)(u32* out) {
        u32 lane = threadIdx.x, steps = 0, n = lane + 1;
        while (n != 1) {
            if (n % 2) n = 3 * n + 1; else n /= 2;
            if (++steps > 40) break;
        }
        if (lane == 5) { out[5] = 99; return; }
        u32 together = __popc(__activemask());
        out[lane] = steps * 100 + together;
    }";
    let steps = |mut n: u32| {
        let mut steps = 0;
        while n != 1 && steps <= 40 {
            n = if n % 2 == 1 { 3 * n + 1 } else { n / 2 };
            steps += 1;
        }
        steps
    };
    let wanted: Vec<u32> = (0..32).map(|lane| if lane == 5 { 99 } else { steps(lane + 1) * 100 + 31 }).collect();
    assert_eq!(threads::<u32>(text, 32), wanted);
}

#[test]
fn shuffles_read_other_lanes() {
    type Source = fn(u32) -> u32;
    let shuffles: [(&str, Source); 7] = [
        ("__shfl_sync(~0u, v, 3)", |_| 3),
        ("__shfl_sync(~0u, v, lane + 1)", |lane| (lane + 1) % 32),
        ("__shfl_sync(~0u, v, 2, 8)", |lane| lane / 8 * 8 + 2),
        ("__shfl_up_sync(~0u, v, 3)", |lane| if lane < 3 { lane } else { lane - 3 }),
        ("__shfl_up_sync(~0u, v, 1, 4)", |lane| if lane % 4 == 0 { lane } else { lane - 1 }),
        ("__shfl_down_sync(~0u, v, 5, 16)", |lane| if lane % 16 + 5 < 16 { lane + 5 } else { lane }),
        ("__shfl_xor_sync(~0u, v, 9, 16)", |lane| lane ^ 9),
    ];
    for (code, source) in shuffles {
        let text =
            format!("KERNEL(test)(u32* out) {{ u32 lane = threadIdx.x, v = 1000 + 7 * lane; out[lane] = {code}; }}");
        let wanted: Vec<u32> = (0..32).map(|lane| 1000 + 7 * source(lane)).collect();
        assert_eq!(threads::<u32>(&text, 32), wanted, "{code}");
    }
}

#[test]
fn votes_and_reductions_ask_all_members() {
    let text = "KERNEL(test)(u32* out) {
        u32 t = threadIdx.x, lane = t % 32;
        u32 result = __ballot_sync(~0u, lane % 3 == 0) & 0xff;
        if (lane >= 16) result += __popc(__ballot_sync(0xffff0000u, lane > 20)) << 8;
        result += (__any_sync(~0u, lane == 40) | __all_sync(~0u, lane < 32) << 1) << 16;
        result += __reduce_max_sync(~0u, lane ^ 5) << 18;
        result += (__syncthreads_count(t % 5 == 0) + __syncthreads_or(t == 63)) << 24;
        out[t] = result + (__match_any_sync(~0u, lane / 16) == (lane < 16 ? 0xffffu : 0xffff0000u));
    }";
    let wanted =
        |t: u32| 0b0100_1001 + if t % 32 >= 16 { 11 << 8 } else { 0 } + (2 << 16) + (31 << 18) + (14 << 24) + 1;
    assert_eq!(threads::<u32>(text, 64), (0..64).map(wanted).collect::<Vec<_>>());
}

#[test]
fn warps_meet_at_barriers() {
    let text = "KERNEL(test)(u32* out) {
        __shared__ u32 fixed[96];
        extern __shared__ u32 added[];
        u32 t = threadIdx.x;
        for (u32 round = 0; round < 3; ++round) {
            fixed[t] = round ? added[95 - t] : t;
            __syncthreads();
            added[t] = fixed[(t + 32) % 96] + 1;
            __syncthreads();
        }
        out[t + blockIdx.x * blockDim.x] = added[t] + 1000 * blockIdx.x;
    }";
    let mut gpu = Gpu::new();
    let out = gpu.output::<u32>(192);
    launch(&mut gpu, text, (2, 96, 384), &[out]).unwrap();
    let (mut fixed, mut added): (Vec<u32>, Vec<u32>) = ((0..96).collect(), Vec::new());
    for round in 0..3 {
        if round > 0 {
            fixed = (0..96).map(|t| added[95 - t]).collect();
        }
        added = (0..96).map(|t| fixed[(t + 32) % 96] + 1).collect();
    }
    let wanted: Vec<u32> = added.iter().copied().chain(added.iter().map(|value| value + 1000)).collect();
    assert_eq!(gpu.read::<u32>(out), wanted);
}

/// Arrays of a thread, vectors of every width, signed bytes, constants known by pointer only.
#[test]
fn every_space_is_read_and_written() {
    let text = "struct alignas(16) Four { u32 v[4]; };
    KERNEL(test)(u32* out, const signed char* bytes, u32* counter, const Four* four) {
        u32 own[8], t = threadIdx.x;
        for (u32 i = 0; i < 8; ++i) own[(i * 3 + t) % 8] = i + t;
        Four f = four[t];
        __shared__ Four staged[32];
        staged[t] = f;
        __syncwarp();
        const u32* generic = t % 2 ? &staged[31 - t].v[1] : (const u32*)&four[t].v[2];
        atomicAdd(counter, 2u);
        atomicMax(counter + 1, 7 * t);
        u32 old = atomicCAS(counter + 2, 5u, 6u);
        out[t] = own[(5 * t) % 8] + 100 * *generic + (u32)(int)bytes[t] + 10000 * (old == 5);
    }";
    let mut gpu = Gpu::new();
    let four: Vec<u32> = (0..128).map(|i| i * i).collect();
    let bytes: Vec<i8> = (0..32).map(|i| i - 16).collect();
    let counter = gpu.variable::<u32>(&[1, 0, 5]);
    let (out, bytes_at, four_at) = (gpu.output::<u32>(32), gpu.buffer(&bytes), gpu.buffer(&four));
    run(&mut gpu, text, 32, &[out, bytes_at, counter, four_at]);
    assert_eq!(gpu.read::<u32>(counter), [65, 217, 6]);
    let wanted = (0..32u32).map(|t| {
        let own = (0..8).find(|i| (i * 3 + t) % 8 == 5 * t % 8).unwrap() + t;
        let generic = if t % 2 == 1 { four[4 * (31 - t as usize) + 1] } else { four[4 * t as usize + 2] };
        (own + 100 * generic).wrapping_add_signed(i32::from(bytes[t as usize])) + if t == 0 { 10000 } else { 0 }
    });
    assert_eq!(gpu.read::<u32>(out), wanted.collect::<Vec<_>>());
}

/// Two tiles in flight; the last one has rows that are not there and become zero.
#[test]
fn copies_arrive_when_they_are_waited_for() {
    let text = "KERNEL(test)(u32* out, const u32* in, u64 rows) {
        __shared__ alignas(16) u32 tile[2][128];
        u32 t = threadIdx.x, sum = 0;
        auto fetch = [&](u32 at) {
            u64 row = at * 32 + t;
            u32 valid = row < rows ? 16 : 0;
            asm volatile(\"cp.async.cg.shared.global [%0], [%1], 16, %2;\"
                :: \"r\"(shared_address(&tile[at % 2][4 * t])), \"l\"(in + 4 * row), \"r\"(valid) : \"memory\");
            asm volatile(\"cp.async.commit_group;\" ::: \"memory\");
        };
        fetch(0);
        for (u32 at = 0; at < 3; ++at) {
            if (at < 2) { fetch(at + 1); asm volatile(\"cp.async.wait_group 1;\" ::: \"memory\"); }
            else asm volatile(\"cp.async.wait_group 0;\" ::: \"memory\");
            __syncthreads();
            sum = 3 * sum + tile[at % 2][(4 * t + 5) % 128];
            __syncthreads();
        }
        out[t] = sum;
    }";
    let rows = 80;
    let input: Vec<u32> = (0..4 * rows).map(|i| i + 1).collect();
    let mut gpu = Gpu::new();
    let (out, input_at) = (gpu.output::<u32>(32), gpu.buffer(&input));
    run(&mut gpu, text, 32, &[out, input_at, u64::from(rows)]);
    let wanted = (0..32).map(|t| {
        let value = |tile: usize| input.get(128 * tile + (4 * t + 5) % 128).copied().unwrap_or(0);
        (0..3).fold(0, |sum, tile| 3 * sum + value(tile))
    });
    assert_eq!(gpu.read::<u32>(out), wanted.collect::<Vec<_>>());
}

/// D = A B + C of one warp, operands by way of ldmatrix, A also the transposed way.
fn product<T: Plain>(name: &str, depth: usize, transposed: bool, narrow: fn(f32) -> T, widen: fn(T) -> f32) {
    let rng = &mut Rng::new(depth as u64);
    let mut numbers = |count: usize| -> Vec<T> { (0..count).map(|_| narrow(rng.normal() as f32)).collect() };
    // A is 16 x depth, or depth x 16 where it is transposed on the way; B is depth x 8, row-major.
    let (a, b) = (numbers(16 * depth), numbers(depth * 8));
    let c: Vec<f32> = (0..128).map(|i| i as f32 / 16.0).collect();
    let (quads, pairs) = (depth / 4, depth / 8);
    let list =
        |first: usize, count: usize| (first..first + count).map(|at| format!("%{at}")).collect::<Vec<_>>().join(", ");
    let outputs =
        |name: &str, count: usize| (0..count).map(|i| format!("\"=r\"({name}[{i}])")).collect::<Vec<_>>().join(", ");
    let inputs =
        |name: &str, count: usize| (0..count).map(|i| format!("\"r\"({name}[{i}])")).collect::<Vec<_>>().join(", ");
    let a_row = if transposed {
        "(lane / 16 * 8 + lane % 8) * 16 + lane / 8 % 2 * 8"
    } else {
        "(lane % 16) * DEPTH + lane / 16 * 8"
    };
    let text = format!(
        "KERNEL(test)(float* d, const u16* a, const u16* b, const float* c) {{
            const u32 DEPTH = {depth};
            __shared__ alignas(16) u16 sa[16 * DEPTH], sb[DEPTH * 8];
            u32 lane = threadIdx.x, fa[{quads}], fb[{pairs}];
            for (u32 i = lane; i < 16 * DEPTH; i += 32) sa[i] = a[i];
            for (u32 i = lane; i < 8 * DEPTH; i += 32) sb[i] = b[i];
            __syncwarp();
            asm volatile(\"ldmatrix.sync.aligned.m8n8.x{quads}{trans}.shared.b16 {{{a_list}}}, [%{quads}];\"
                : {a_out} : \"r\"(shared_address(&sa[{a_row}])));
            asm volatile(\"ldmatrix.sync.aligned.m8n8.x{pairs}.trans.shared.b16 {{{b_list}}}, [%{pairs}];\"
                : {b_out} : \"r\"(shared_address(&sb[lane % DEPTH * 8])));
            u32 row = lane / 4, column = 2 * (lane % 4);
            float f[4] = {{c[row * 8 + column], c[row * 8 + column + 1], c[row * 8 + column + 64], c[row * 8 + column + 65]}};
            asm volatile(\"mma.sync.aligned.m16n8k{depth}.row.col.f32.{name}.{name}.f32 {{%0, %1, %2, %3}}, {{{ma}}}, {{{mb}}}, {{%0, %1, %2, %3}};\"
                : \"+f\"(f[0]), \"+f\"(f[1]), \"+f\"(f[2]), \"+f\"(f[3]) : {a_in}, {b_in});
            *(float2*)&d[row * 8 + column] = make_float2(f[0], f[1]);
            *(float2*)&d[row * 8 + column + 64] = make_float2(f[2], f[3]);
        }}",
        trans = if transposed { ".trans" } else { "" },
        a_list = list(0, quads),
        a_out = outputs("fa", quads),
        b_list = list(0, pairs),
        b_out = outputs("fb", pairs),
        ma = list(4, quads),
        mb = list(4 + quads, pairs),
        a_in = inputs("fa", quads),
        b_in = inputs("fb", pairs),
    );
    let mut gpu = Gpu::new();
    let (a_at, b_at, c_at, d_at) = (gpu.buffer(&a), gpu.buffer(&b), gpu.buffer(&c), gpu.output::<f32>(128));
    run(&mut gpu, &text, 32, &[d_at, a_at, b_at, c_at]);
    for (at, got) in gpu.read::<f32>(d_at).into_iter().enumerate() {
        let (row, column) = (at / 8, at % 8);
        let a = |k: usize| f64::from(widen(a[if transposed { k * 16 + row } else { row * depth + k }]));
        let wanted = f64::from(c[at]) + (0..depth).map(|k| a(k) * f64::from(widen(b[k * 8 + column]))).sum::<f64>();
        assert!((f64::from(got) - wanted).abs() < 1e-5, "{name} {depth} {transposed} at {at}: {got}, not {wanted}");
    }
}

#[test]
fn matrices_are_multiplied() {
    for transposed in [false, true] {
        product("bf16", 16, transposed, bf16::from_f32, bf16::to_f32);
        product("f16", 16, transposed, f16::from_f32, f16::to_f32);
        product("bf16", 8, transposed, bf16::from_f32, bf16::to_f32);
    }
}

#[test]
fn matrices_are_stored_as_they_are_loaded() {
    let text = "KERNEL(test)(u16* out, const u16* in) {
        __shared__ alignas(16) u16 tile[256], back[256];
        u32 lane = threadIdx.x, f[4];
        for (u32 i = lane; i < 256; i += 32) tile[i] = in[i];
        __syncwarp();
        asm volatile(\"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\"
            : \"=r\"(f[0]), \"=r\"(f[1]), \"=r\"(f[2]), \"=r\"(f[3]) : \"r\"(shared_address(&tile[8 * lane])));
        asm volatile(\"stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};\"
            :: \"r\"(shared_address(&back[8 * lane])), \"r\"(f[0]), \"r\"(f[1]), \"r\"(f[2]), \"r\"(f[3]));
        __syncwarp();
        for (u32 i = lane; i < 256; i += 32) out[i] = back[i];
    }";
    let mut gpu = Gpu::with_architecture((9, 0));
    let input: Vec<u16> = (0..256).map(|i| i * 7).collect();
    let (out, input_at) = (gpu.output::<u16>(256), gpu.buffer(&input));
    run(&mut gpu, text, 32, &[out, input_at]);
    let wanted = (0..256).map(|at: usize| input[at / 64 * 64 + at % 8 * 8 + at / 8 % 8]);
    assert_eq!(gpu.read::<u16>(out), wanted.collect::<Vec<_>>());
}
