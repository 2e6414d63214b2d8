//! Every call that reaches the driver, in order: against a driver of the tests' own that runs nothing.

use crate::cache::folder;
use moda_attn::Error;
use moda_attn::cuda::driver::{self, Gpu};
use moda_attn::cuda::problem::IdsRecord;
use moda_attn::cuda::{DeviceTensor, Launch, attend};
use moda_attn::dtype::DType;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicU64;
use std::{env, fs};

/// Set in the processes that the tests start, with the fake driver's path: a process sees one driver and one GPU.
const INSIDE: &str = "MODA_ATTN_TEST_DRIVER";

/// Compiles the fake driver.
fn fake_driver(folder: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda_host/fake_driver.rs");
    let library = folder.join("libcuda.so");
    let mut command = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    command.args(["--edition=2024", "--crate-type=cdylib", "-Clink-arg=-Wl,-soname,libcuda.so", "-o"]);
    let output = command.arg(&library).arg(source).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    library
}

/// Runs this very test again in a process of its own with the fake driver; what the driver was asked, line by line.
fn again(name: &str, variables: &[(&str, &str)]) -> Vec<String> {
    let folder = folder(name);
    fs::create_dir_all(&folder).unwrap();
    let log = folder.join("calls");
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", &format!("driver::{name}"), "--nocapture"]);
    command.env(INSIDE, fake_driver(&folder)).env("FAKE_CUDA_LOG", &log).env("MODA_ATTN_CACHE", folder.join("cache"));
    let output = command.envs(variables.iter().copied()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let calls = fs::read_to_string(log).unwrap().lines().map(str::to_owned).collect();
    fs::remove_dir_all(folder).unwrap();
    calls
}

/// Whether this is the inner process; then the fake driver is loaded, under the name that the library looks for.
fn inside() -> bool {
    let Some(path) = env::var_os(INSIDE) else { return false };
    // SAFETY: a library without initialisers.
    let library = unsafe { libloading::Library::new(path) }.unwrap();
    std::mem::forget(library);
    true
}

fn plan(dtype: DType) -> Launch {
    let parts = DeviceTensor::contiguous(1 << 12, DType::Float32, [1, 2, 2, 30, 8]);
    attend::sum(parts, DeviceTensor::contiguous(1 << 16, dtype, [1, 2, 30, 8])).unwrap()
}

#[test]
fn launches_go_to_the_callers_stream_in_order() {
    if !inside() {
        let calls = again("launches_go_to_the_callers_stream_in_order", &[]);
        let launches: Vec<&str> = calls.iter().filter(|call| call.contains("Launch")).map(String::as_str).collect();
        let launch =
            |shared, stream| format!("cuLaunchKernel(attend_sum [2, 1, 1] x 256, {shared} shared, stream {stream})");
        let wanted = [launch(0, "0x77"), launch(100_000, "0x77"), launch(0, "0x0"), launch(90_000, "0x0")];
        assert_eq!(launches, wanted);
        let count = |name: &str| calls.iter().filter(|call| call.starts_with(name)).count();
        // Two kernels: each is loaded once, before the first launch, and asks once for its large shared memory.
        assert_eq!([count("cuModuleLoadData"), count("cuModuleGetFunction"), count("cuFuncSetAttribute")], [2, 2, 1]);
        assert_eq!(count("cuDevicePrimaryCtxRetain"), 1);
        // Relaxed for opening and for loading, and each time left as it was.
        let modes: Vec<&str> = calls.iter().filter_map(|call| call.strip_prefix("cuThreadExchange")).collect();
        assert_eq!(modes, ["StreamCaptureMode(2)", "StreamCaptureMode(0)"].repeat(modes.len() / 2));
        assert_eq!(modes.len(), 4);
        let first = calls.iter().position(|call| call.contains("Launch")).unwrap();
        assert!(calls[first..].iter().all(|call| !call.contains("Module")), "{calls:?}");
        // The context is entered for opening and for both calls, and left each time.
        let contexts: Vec<&str> = calls.iter().filter_map(|call| call.strip_prefix("cuCtxSetCurrent")).collect();
        assert_eq!(contexts, ["(0xc1)", "(0x0)", "(0xc1)", "(0x0)", "(0xc1)", "(0x0)"]);
        assert!(!calls.iter().any(|call| call.contains("Synchronize") || call.contains("MemAlloc")), "{calls:?}");
        return;
    }
    let gpu = Gpu::get(1).unwrap();
    assert_eq!(gpu.target().capability, (8, 0));
    let (small, large) = (plan(DType::BFloat16), Launch { shared: 100_000, ..plan(DType::Float16) });
    // SAFETY: the fake driver runs nothing.
    unsafe {
        gpu.run(&[small.clone(), large.clone()], 0x77).unwrap();
        gpu.run(&[small, Launch { shared: 90_000, ..large }], 0).unwrap();
        gpu.run(&[], 0).unwrap();
    }
}

#[test]
fn a_compiled_kernel_is_found_by_the_next_process() {
    if !inside() {
        let cache = folder("shared-cache");
        let variable = [("MODA_ATTN_CACHE", cache.to_str().unwrap())];
        again("a_compiled_kernel_is_found_by_the_next_process", &variable);
        let calls = again("a_compiled_kernel_is_found_by_the_next_process", &variable);
        assert!(calls.iter().any(|call| call.starts_with("cuModuleLoadData")));
        fs::remove_dir_all(cache).unwrap();
        return;
    }
    let files = || driver_cache().size().0;
    let before = files();
    // SAFETY: the fake driver runs nothing.
    unsafe { Gpu::get(0).unwrap().run(&[plan(DType::Float64)], 0) }.unwrap();
    assert_eq!(files(), 1, "{before} before");
}

fn driver_cache() -> &'static moda_attn::cuda::cache::Cache {
    moda_attn::cuda::cache::Cache::get()
}

#[test]
fn ids_out_of_range_are_raised_by_a_later_call() {
    if !inside() {
        again("ids_out_of_range_are_raised_by_a_later_call", &[]);
        return;
    }
    let gpu = Gpu::get(0).unwrap();
    gpu.check_record().unwrap();
    // SAFETY: the fake driver's device memory is host memory; the record lives as long as the process.
    let record = unsafe { AtomicU64::from_ptr(gpu.record() as *mut u64) };
    assert_eq!(record.load(std::sync::atomic::Ordering::Relaxed), IdsRecord::NONE.0);
    let word = (1 << 63) | (3 << 49) | (70 << 25) | ((-5i64 + (1 << 16)) as u64) << 8 | 2;
    record.store(word, std::sync::atomic::Ordering::Relaxed);
    let error = gpu.check_record().unwrap_err();
    assert_eq!(
        error.to_string(),
        "query_modality[3, 70] of an earlier call on cuda:0 is -5; wanted a modality id from -1 (padding) to 1. \
         That call took the token for padding"
    );
    gpu.check_record().unwrap();
}

/// What a failing driver makes of opening a GPU and running a plan.
fn outcome() -> Result<(), Error> {
    // SAFETY: the fake driver runs nothing.
    Gpu::get(0).and_then(|gpu| unsafe { gpu.run(&[plan(DType::BFloat16)], 0) })
}

#[test]
fn what_the_driver_refuses_is_said() {
    if !inside() {
        for call in ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuModuleGetFunction", "cuLaunchKernel"] {
            again("what_the_driver_refuses_is_said", &[("FAKE_CUDA_FAIL", &format!("{call}=700"))]);
        }
        return;
    }
    let call = env::var("FAKE_CUDA_FAIL").unwrap().replace("=700", "");
    let message = outcome().unwrap_err().to_string();
    assert!(message.starts_with(&format!("the CUDA driver refused {call}: CUDA_ERROR_ILLEGAL_ADDRESS")), "{message}");
    assert!(message.ends_with("(as the test wanted)"), "{message}");
}

#[test]
fn memory_that_runs_out_is_named() {
    if !inside() {
        for call in ["cuMemHostAlloc", "cuModuleLoadData", "cuLaunchKernel"] {
            again("memory_that_runs_out_is_named", &[("FAKE_CUDA_FAIL", &format!("{call}=2"))]);
        }
        return;
    }
    let error = outcome().unwrap_err();
    assert!(matches!(error, Error::DeviceMemory { .. }), "{error}");
    assert!(error.to_string().starts_with("cuda:0 has no memory left for "), "{error}");
}

#[test]
fn an_old_gpu_is_refused_by_name() {
    if !inside() {
        again("an_old_gpu_is_refused_by_name", &[("FAKE_CUDA_CAPABILITY", "75")]);
        return;
    }
    let message = outcome().unwrap_err().to_string();
    assert_eq!(message, "cuda:0 is sm_75 (Fake GPU); wanted sm_80 or newer");
    assert_eq!(driver::devices().unwrap().len(), 2);
}

#[test]
fn an_ordinal_that_does_not_exist_is_refused() {
    if !inside() {
        again("an_ordinal_that_does_not_exist_is_refused", &[]);
        return;
    }
    let message = Gpu::get(2).unwrap_err().to_string();
    assert!(message.starts_with("the CUDA driver refused cuDeviceGet: CUDA_ERROR_INVALID_DEVICE"), "{message}");
    assert_eq!(driver::version().unwrap(), (13, 2));
}

#[test]
fn without_a_driver_there_is_an_error_of_that_name() {
    if driver::is_present() {
        println!("skipped: this machine has a CUDA driver");
        return;
    }
    assert_eq!(Gpu::get(0).unwrap_err(), Error::DriverMissing);
    assert_eq!(driver::devices().unwrap_err(), Error::DriverMissing);
}
