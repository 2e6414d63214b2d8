//! A CUDA driver without a GPU: `libcuda.so` for the tests. It notes every call in the file that `FAKE_CUDA_LOG` names,
//! checks what can be checked of its arguments and runs nothing. Device memory is host memory.
//!
//! `FAKE_CUDA_FAIL=cuLaunchKernel=2` makes a function return an error, `FAKE_CUDA_CAPABILITY=75` makes it an older GPU.

use std::alloc::{Layout, alloc_zeroed};
use std::cell::Cell;
use std::env;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fs::OpenOptions;
use std::io::Write;
use std::ptr;

const INVALID_VALUE: c_int = 1;
const INVALID_IMAGE: c_int = 200;
const INVALID_CONTEXT: c_int = 201;
const NOT_FOUND: c_int = 500;
const CAPTURE_UNSUPPORTED: c_int = 900;

/// Two devices, each with a primary context of this address.
const CONTEXTS: [usize; 2] = [0xC0, 0xC1];

thread_local! { static CURRENT: Cell<usize> = const { Cell::new(0) }; }
thread_local! { static MODE: Cell<c_int> = const { Cell::new(0) }; }

/// Notes a call; its code, unless the test wants another.
fn note(call: &str, arguments: &str, code: c_int) -> c_int {
    if let Some(path) = env::var_os("FAKE_CUDA_LOG") {
        let mut log = OpenOptions::new().append(true).create(true).open(path).unwrap();
        writeln!(log, "{call}({arguments})").unwrap();
    }
    let wish = env::var("FAKE_CUDA_FAIL").unwrap_or_default();
    wish.split_once('=').filter(|(name, _)| *name == call).map_or(code, |(_, code)| code.parse().unwrap())
}

#[unsafe(no_mangle)]
extern "C" fn cuInit(_: c_uint) -> c_int {
    note("cuInit", "", 0)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> c_int {
    unsafe { *version = 13_020 };
    note("cuDriverGetVersion", "", 0)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> c_int {
    unsafe { *count = CONTEXTS.len() as c_int };
    note("cuDeviceGetCount", "", 0)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> c_int {
    unsafe { *device = ordinal };
    let code = if (ordinal as usize) < CONTEXTS.len() { 0 } else { 101 };
    note("cuDeviceGet", &ordinal.to_string(), code)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, length: c_int, _: c_int) -> c_int {
    let text = b"Fake GPU\0";
    assert!(length as usize >= text.len());
    unsafe { ptr::copy_nonoverlapping(text.as_ptr().cast(), name, text.len()) };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, _: c_int) -> c_int {
    let capability: c_int = env::var("FAKE_CUDA_CAPABILITY").map_or(80, |number| number.parse().unwrap());
    let number = match attribute {
        16 => 108,
        75 => capability / 10,
        76 => capability % 10,
        97 => 166_912,
        _ => return INVALID_VALUE,
    };
    unsafe { *value = number };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut usize, device: c_int) -> c_int {
    unsafe { *context = CONTEXTS[device as usize] };
    note("cuDevicePrimaryCtxRetain", &device.to_string(), 0)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxGetCurrent(context: *mut usize) -> c_int {
    unsafe { *context = CURRENT.get() };
    0
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCurrent(context: usize) -> c_int {
    CURRENT.set(context);
    note("cuCtxSetCurrent", &format!("{context:#x}"), 0)
}

/// The mode of a thread: at first 0, global.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuThreadExchangeStreamCaptureMode(mode: *mut c_int) -> c_int {
    let wanted = unsafe { mode.read() };
    unsafe { *mode = MODE.replace(wanted) };
    note("cuThreadExchangeStreamCaptureMode", &wanted.to_string(), 0)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemHostAlloc(memory: *mut *mut c_void, bytes: usize, flags: c_uint) -> c_int {
    unsafe { *memory = alloc_zeroed(Layout::from_size_align(bytes, 4096).unwrap()).cast() };
    note("cuMemHostAlloc", &format!("{bytes}, {flags}"), needs_relaxation())
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemHostGetDevicePointer_v2(device: *mut u64, host: *mut c_void, _: c_uint) -> c_int {
    unsafe { *device = host as u64 };
    note("cuMemHostGetDevicePointer_v2", &format!("{host:p}"), needs_context())
}

fn needs_context() -> c_int {
    if CURRENT.get() == 0 { INVALID_CONTEXT } else { 0 }
}

/// As if another thread captured a graph all the time.
fn needs_relaxation() -> c_int {
    if MODE.get() == 2 { needs_context() } else { CAPTURE_UNSUPPORTED }
}

/// A module is its image; a function is a leaked (name, shared memory).
#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleLoadData(module: *mut *const u8, image: *const u8) -> c_int {
    let is_elf = unsafe { std::slice::from_raw_parts(image, 4) } == b"\x7fELF";
    unsafe { *module = image };
    let code = if is_elf { needs_relaxation() } else { INVALID_IMAGE };
    note("cuModuleLoadData", "", code)
}

/// The bytes of an ELF file, which ends with its table of sections.
unsafe fn elf<'a>(image: *const u8) -> &'a [u8] {
    let half = |at: usize| unsafe { image.add(at).cast::<u16>().read_unaligned() } as usize;
    let sections = unsafe { image.add(40).cast::<u64>().read_unaligned() } as usize;
    unsafe { std::slice::from_raw_parts(image, sections + half(58) * half(60)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleGetFunction(function: *mut usize, module: *const u8, name: *const c_char) -> c_int {
    let name = unsafe { CStr::from_ptr(name) }.to_str().unwrap();
    let symbol = format!(".text.{name}\0");
    let found = unsafe { elf(module) }.windows(symbol.len()).any(|window| window == symbol.as_bytes());
    unsafe { *function = Box::leak(Box::new((name.to_owned(), 48 << 10))) as *mut (String, c_int) as usize };
    note("cuModuleGetFunction", name, if found { 0 } else { NOT_FOUND })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuFuncSetAttribute(function: *mut (String, c_int), attribute: c_int, value: c_int) -> c_int {
    let function = unsafe { &mut *function };
    let code = if attribute == 8 && value <= 166_912 { 0 } else { INVALID_VALUE };
    function.1 = value;
    note("cuFuncSetAttribute", &format!("{}, {value}", function.0), code)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuLaunchKernel(
    function: *const (String, c_int),
    x: c_uint,
    y: c_uint,
    z: c_uint,
    block: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    shared: c_uint,
    stream: usize,
    params: *const *const c_void,
    extra: *const c_void,
) -> c_int {
    let function = unsafe { &*function };
    let fits = [x, y, z, block].iter().all(|&size| size > 0) && (block_y, block_z) == (1, 1) && block <= 1024;
    let fits = fits && y <= 0xffff && z <= 0xffff && shared as c_int <= function.1 && extra.is_null();
    let given = !params.is_null() && !unsafe { *params }.is_null();
    let code = if fits && given { needs_context() } else { INVALID_VALUE };
    let arguments = format!("{} [{x}, {y}, {z}] x {block}, {shared} shared, stream {stream:#x}", function.0);
    note("cuLaunchKernel", &arguments, code)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorString(_: c_int, text: *mut *const c_char) -> c_int {
    unsafe { *text = c"as the test wanted".as_ptr() };
    0
}

// The run-time compiler, of which the driver's tests want one thing: that it refuses every text.

const REFUSAL: &CStr = c"no text pleases this compiler";

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcVersion(major: *mut c_int, minor: *mut c_int) -> c_int {
    unsafe { (*major, *minor) = (13, 0) };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetNumSupportedArchs(count: *mut c_int) -> c_int {
    unsafe { *count = 1 };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetSupportedArchs(list: *mut c_int) -> c_int {
    unsafe { *list = 80 };
    0
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcCreateProgram() -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcCompileProgram() -> c_int {
    6
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcDestroyProgram() -> c_int {
    0
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcGetErrorString(_: c_int) -> *const c_char {
    c"NVRTC_ERROR_COMPILATION".as_ptr()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetProgramLogSize(_: *mut c_void, size: *mut usize) -> c_int {
    unsafe { *size = REFUSAL.to_bytes_with_nul().len() };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetProgramLog(_: *mut c_void, log: *mut c_char) -> c_int {
    unsafe { ptr::copy_nonoverlapping(REFUSAL.as_ptr(), log, REFUSAL.to_bytes_with_nul().len()) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcGetCUBINSize() -> c_int {
    1
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcGetCUBIN() -> c_int {
    1
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcGetPTXSize() -> c_int {
    1
}

#[unsafe(no_mangle)]
extern "C" fn nvrtcGetPTX() -> c_int {
    1
}
