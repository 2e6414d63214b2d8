//! The GPU itself: the only file that calls the CUDA driver, which is loaded at the first call and may be missing.
//!
//! The primary context is used, the one that PyTorch uses too, and streams are the caller's. Nothing here waits for the
//! device, and after the first launch of a kernel nothing is allocated: calls can be captured in a CUDA graph, first ones too.

use super::cache::{Cache, Key};
use super::launch::{Kernel, Launch};
use super::nvrtc::{self, Nvrtc, Want};
use super::problem::{IdsRecord, Offender, Target};
use crate::error::{Error, Result};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use std::collections::{HashMap, HashSet};
use std::ffi::{CString, c_int, c_void};
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;

/// Lowest compute capability of the kernels: asynchronous copies to shared memory and bfloat16 products begin there.
const LOWEST: (u32, u32) = (8, 0);

/// Shared memory that every kernel may use without asking.
const SHARED_BY_DEFAULT: u32 = 48 << 10;

/// A GPU as the driver describes it. Asking makes no context.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its name.
    pub name: String,
    /// What plans need to know.
    pub target: Target,
}

impl Found {
    /// Whether the kernels run on it.
    pub fn check(&self, ordinal: usize) -> Result<()> {
        let (major, minor) = self.target.capability;
        if (major, minor) >= LOWEST {
            return Ok(());
        }
        let given = format!("sm_{major}{minor} ({})", self.name);
        let wanted = format!("sm_{}{} or newer", LOWEST.0, LOWEST.1);
        Err(Error::Architecture { device: device_name(ordinal), given, wanted })
    }
}

/// Whether there is a driver, loaded or to be loaded.
pub fn is_present() -> bool {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: loading NVIDIA's driver library has no precondition.
    *PRESENT.get_or_init(|| unsafe { sys::is_culib_present() })
}

/// The newest CUDA version that the driver supports, major and minor.
pub fn version() -> Result<(u32, u32)> {
    begin()?;
    let mut number: c_int = 0;
    // SAFETY: one number to write.
    refused("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&raw mut number) }.result())?;
    Ok((number as u32 / 1000, number as u32 % 1000 / 10))
}

/// The GPUs of this process, in the order of their ordinals.
pub fn devices() -> Result<Vec<Found>> {
    begin()?;
    let count = refused("cuDeviceGetCount", result::device::get_count())?;
    (0..count as usize).map(|ordinal| find(ordinal).map(|(_, found)| found)).collect()
}

fn begin() -> Result<()> {
    if !is_present() {
        return Err(Error::DriverMissing);
    }
    refused("cuInit", result::init())
}

fn find(ordinal: usize) -> Result<(sys::CUdevice, Found)> {
    let device = refused("cuDeviceGet", result::device::get(ordinal as c_int))?;
    let ask = |attribute| {
        // SAFETY: a device that the driver has just given.
        let answer = unsafe { result::device::get_attribute(device, attribute) };
        refused("cuDeviceGetAttribute", answer).map(|number| number as u32)
    };
    let capability = (
        ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    let multiprocessors = ask(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    let shared_limit = ask(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
    let name = refused("cuDeviceGetName", result::device::get_name(device))?;
    Ok((device, Found { name, target: Target { capability, multiprocessors, shared_limit } }))
}

fn device_name(ordinal: usize) -> String {
    format!("cuda:{ordinal}")
}

fn refused<T>(call: &'static str, outcome: std::result::Result<T, DriverError>) -> Result<T> {
    outcome.map_err(|error| Error::Driver { call, given: print(error) })
}

/// The same for a call that needs memory on a device.
fn spared<T>(
    ordinal: usize,
    call: &'static str,
    what: &'static str,
    outcome: std::result::Result<T, DriverError>,
) -> Result<T> {
    match outcome {
        Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
            Err(Error::DeviceMemory { device: device_name(ordinal), what })
        }
        other => refused(call, other),
    }
}

/// The driver's name of an error and what it says about it.
fn print(error: DriverError) -> String {
    let DriverError(code) = error;
    match error.error_string() {
        Ok(text) => format!("{code:?} ({})", text.to_string_lossy()),
        Err(_) => format!("{code:?}"),
    }
}

/// A GPU in use: its primary context, the kernels loaded so far, the record of ids out of range.
#[derive(Debug)]
pub struct Gpu {
    ordinal: usize,
    found: Found,
    context: sys::CUcontext,
    record: &'static AtomicU64,
    record_address: u64,
    functions: Mutex<HashMap<Kernel, Function>>,
}

// SAFETY: a context may be current in any number of threads at once; the other fields are shared as their types allow.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

/// A loaded kernel and the dynamic shared memory it may use so far.
#[derive(Debug, Clone, Copy)]
struct Function {
    handle: sys::CUfunction,
    shared: u32,
}

/// The loaded kernel of a launch, where it may use as much shared memory as this one asks for.
fn fitting(functions: &HashMap<Kernel, Function>, launch: &Launch) -> Option<sys::CUfunction> {
    functions.get(&launch.kernel).filter(|known| known.shared >= launch.shared).map(|known| known.handle)
}

/// Makes a context current in this thread until it is dropped; then the one that was, or none, is again.
struct Entered {
    replaced: bool,
    before: sys::CUcontext,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if self.replaced {
            // SAFETY: the context that was current when this guard was made; null for none. A failure changes nothing.
            let _ = unsafe { result::ctx::set_current(self.before) };
        }
    }
}

/// Makes a context current that is never released.
fn enter(context: sys::CUcontext) -> Result<Entered> {
    let current = refused("cuCtxGetCurrent", result::ctx::get_current())?;
    let replaced = current != Some(context);
    if replaced {
        // SAFETY: a retained primary context.
        refused("cuCtxSetCurrent", unsafe { result::ctx::set_current(context) })?;
    }
    Ok(Entered { replaced, before: current.unwrap_or(std::ptr::null_mut()) })
}

/// Lets this thread load kernels and allocate while it or another one captures a CUDA graph, until it is dropped: neither
/// is work of a stream, so neither would be part of the graph.
struct Relaxed {
    before: sys::CUstreamCaptureMode,
}

impl Drop for Relaxed {
    fn drop(&mut self) {
        // SAFETY: one mode to read and to write. A failure changes nothing.
        let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut self.before) };
    }
}

fn relax() -> Result<Relaxed> {
    let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    // SAFETY: as above.
    let exchanged = unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) };
    refused("cuThreadExchangeStreamCaptureMode", exchanged.result())?;
    Ok(Relaxed { before: mode })
}

impl Gpu {
    /// The GPU of an ordinal, ready. It stays so for the life of the process, as PyTorch's contexts do.
    pub fn get(ordinal: usize) -> Result<&'static Self> {
        static GPUS: Mutex<Vec<&'static Gpu>> = Mutex::new(Vec::new());
        let mut gpus = GPUS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = gpus.iter().find(|known| known.ordinal == ordinal) {
            return Ok(known);
        }
        let gpu = Box::leak(Box::new(Self::open(ordinal)?));
        gpus.push(gpu);
        Ok(gpu)
    }

    fn open(ordinal: usize) -> Result<Self> {
        begin()?;
        let (device, found) = find(ordinal)?;
        found.check(ordinal)?;
        // SAFETY: a device that the driver has just given. The context is never released.
        let context = refused("cuDevicePrimaryCtxRetain", unsafe { result::primary_ctx::retain(device) })?;
        let (entered, _relaxed) = (enter(context)?, relax()?);
        let flags = sys::CU_MEMHOSTALLOC_DEVICEMAP | sys::CU_MEMHOSTALLOC_PORTABLE;
        // SAFETY: memory for one record, never freed.
        let memory = unsafe { result::malloc_host(size_of::<IdsRecord>(), flags) };
        let memory = spared(ordinal, "cuMemHostAlloc", "its record of ids", memory)?.cast::<u64>();
        // SAFETY: page-locked memory of this size, aligned to a page, that nobody else knows yet.
        unsafe { memory.write(IdsRecord::NONE.0) };
        let mut record_address = 0;
        // SAFETY: mapped memory that has just been allocated; one address to write.
        let mapped = unsafe { sys::cuMemHostGetDevicePointer_v2(&raw mut record_address, memory.cast(), 0) };
        refused("cuMemHostGetDevicePointer", mapped.result())?;
        drop(entered);
        // SAFETY: initialised above, aligned, never freed; whoever shares it, kernels included, accesses it atomically.
        let record = unsafe { AtomicU64::from_ptr(memory) };
        Ok(Self { ordinal, found, context, record, record_address, functions: Mutex::default() })
    }

    /// What plans need to know.
    pub fn target(&self) -> Target {
        self.found.target
    }

    /// Device address of the record of ids out of range.
    pub fn record(&self) -> u64 {
        self.record_address
    }

    /// What a kernel has reported since the last call, as the error it could not raise.
    pub fn check_record(&self) -> Result<()> {
        if self.record.load(Ordering::Relaxed) == IdsRecord::NONE.0 {
            return Ok(());
        }
        let word = IdsRecord(self.record.swap(IdsRecord::NONE.0, Ordering::Relaxed));
        let Some(Offender { argument, batch, token, given, largest }) = word.offender() else { return Ok(()) };
        let (argument, device) = (argument.name(), device_name(self.ordinal));
        Err(Error::EarlierModality { argument, device, batch, token, given, largest })
    }

    /// Launches a plan on a stream of this GPU's primary context, by its handle; 0 is the default stream. Every kernel
    /// is compiled, what is missing at the same time, and loaded before the first one runs.
    ///
    /// # Safety
    /// The addresses in the launches must be valid until the stream has worked them off.
    pub unsafe fn run(&self, launches: &[Launch], stream: u64) -> Result<()> {
        if launches.is_empty() {
            return Ok(());
        }
        let _entered = enter(self.context)?;
        let known: Option<Vec<_>> = {
            let functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
            launches.iter().map(|launch| fitting(&functions, launch)).collect()
        };
        let handles = known.map_or_else(|| self.prepare(launches), Ok)?;
        for (launch, handle) in launches.iter().zip(handles) {
            let ([x, y, z], argument) = (launch.grid, launch.params.as_ptr().cast_mut().cast::<c_void>());
            let (stream, block) = (stream as sys::CUstream, (launch.block, 1, 1));
            // SAFETY: a loaded kernel, whose one argument is read by the driver before it returns; what the argument
            // points to is the caller's promise.
            let outcome =
                unsafe { result::launch_kernel(handle, (x, y, z), block, launch.shared, stream, &mut [argument]) };
            spared(self.ordinal, "cuLaunchKernel", launch.kernel.entry, outcome)?;
        }
        Ok(())
    }

    /// The loaded kernels of a plan. A step of training needs some twenty, a second or more each to compile: threads of
    /// their own do it. The context is current.
    fn prepare(&self, launches: &[Launch]) -> Result<Vec<sys::CUfunction>> {
        let _relaxed = relax()?;
        let kernels: HashSet<&Kernel> = launches.iter().map(|launch| &launch.kernel).collect();
        thread::scope(|scope| {
            let compiled: Vec<_> = kernels.into_iter().map(|kernel| scope.spawn(|| self.image(kernel))).collect();
            compiled.into_iter().try_for_each(|thread| {
                thread.join().unwrap_or_else(|panic| resume_unwind(panic))?;
                Ok(())
            })
        })?;
        launches.iter().map(|launch| self.function(launch)).collect()
    }

    /// The kernel of a launch, loaded where it was not, with as much shared memory as it asks for. The context is current.
    fn function(&self, launch: &Launch) -> Result<sys::CUfunction> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(handle) = fitting(&functions, launch) {
            return Ok(handle);
        }
        let loaded = functions.get(&launch.kernel).map(|function| function.handle);
        let handle = loaded.map_or_else(|| self.load(&launch.kernel), Ok)?;
        if launch.shared > SHARED_BY_DEFAULT {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a loaded kernel.
            let set = unsafe { result::function::set_function_attribute(handle, attribute, launch.shared as c_int) };
            refused("cuFuncSetAttribute", set)?;
        }
        let shared = launch.shared.max(SHARED_BY_DEFAULT);
        functions.insert(launch.kernel.clone(), Function { handle, shared });
        Ok(handle)
    }

    fn load(&self, kernel: &Kernel) -> Result<sys::CUfunction> {
        let image = self.image(kernel)?;
        // SAFETY: what the compiler made: an ELF file or a text that ends with a zero byte. It is never unloaded.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) };
        let module = spared(self.ordinal, "cuModuleLoadData", kernel.source.name(), module)?;
        let entry = CString::new(kernel.entry).expect("a name without zero bytes");
        // SAFETY: the module just loaded.
        refused("cuModuleGetFunction", unsafe { result::module::get_function(module, entry) })
    }

    /// A compiled kernel, from the cache or made now.
    fn image(&self, kernel: &Kernel) -> Result<Arc<[u8]>> {
        let compiler = Nvrtc::get()?;
        let (architecture, want) = self.code_for(compiler.architectures())?;
        let options = nvrtc::options(&kernel.defines, architecture, want);
        Cache::get().image(Key::new(kernel, &options, compiler.version()), || {
            let text = kernel.source.text();
            compiler
                .compile((kernel.source.name(), &text), &kernel.defines, architecture, want)
                .map(|image| image.bytes)
        })
    }

    /// What to compile to for this GPU with a compiler of these architectures.
    fn code_for(&self, known: &[u32]) -> Result<((u32, u32), Want)> {
        let (major, minor) = self.target().capability;
        nvrtc::code_for((major, minor), known).ok_or_else(|| Error::Architecture {
            device: device_name(self.ordinal),
            given: format!("sm_{major}{minor} ({})", self.found.name),
            wanted: format!("an architecture that this NVRTC compiles for: {known:?}"),
        })
    }
}
