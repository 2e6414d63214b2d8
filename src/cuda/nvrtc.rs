//! NVRTC, NVIDIA's run-time compiler: found and loaded at run time, so that building needs nothing of CUDA.
//!
//! Where it is looked for, in order: the path in `MODA_ATTN_NVRTC` (if that is set, nowhere else); a copy that the process
//! has already mapped, such as torch's; the NVIDIA packages of the Python environment; `CUDA_HOME` and `CUDA_PATH`; the
//! system's own search.

use crate::error::{Error, Result};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LOCAL, RTLD_NOW, Symbol};
use std::env;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::{Mutex, OnceLock, PoisonError};

/// Names that the releases we know have, newest first.
const NAMES: [&str; 2] = ["libnvrtc.so.13", "libnvrtc.so.12"];

/// The oldest release that is tested.
const OLDEST: (c_int, c_int) = (12, 1);

type Program = *mut c_void;
type Code = c_int;
type GetSize = unsafe extern "C" fn(Program, *mut usize) -> Code;
type GetBytes = unsafe extern "C" fn(Program, *mut c_char) -> Code;
type List = unsafe extern "C" fn(*mut c_int) -> Code;
type Create = unsafe extern "C" fn(
    *mut Program,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> Code;

/// What to compile to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Want {
    /// Machine code of one architecture, what the driver loads.
    Cubin,
    /// Assembly of a virtual architecture, readable.
    Ptx,
}

/// A compiled text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Cubin (an ELF file) or PTX (text that ends with a zero byte).
    pub bytes: Vec<u8>,
    /// What the compiler said: for a cubin the registers, shared memory and spills of every kernel.
    pub log: String,
}

/// The loaded compiler. There is one a process: [`Nvrtc::get`].
#[derive(Debug)]
pub struct Nvrtc {
    version: (u32, u32),
    origin: String,
    create: Symbol<Create>,
    compile: Symbol<unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Code>,
    destroy: Symbol<unsafe extern "C" fn(*mut Program) -> Code>,
    describe: Symbol<unsafe extern "C" fn(Code) -> *const c_char>,
    architectures: Vec<u32>,
    image_size: [Symbol<GetSize>; 2],
    image: [Symbol<GetBytes>; 2],
    log_size: Symbol<GetSize>,
    log: Symbol<GetBytes>,
    _library: Library,
}

/// Folders of Python packages to look in, as the extension module names them.
static SITE_PACKAGES: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Names the folders of Python packages (`site-packages`) whose `nvidia/*/lib` is looked in. Of no effect once loaded.
pub fn look_in(site_packages: Vec<PathBuf>) {
    *SITE_PACKAGES.lock().unwrap_or_else(PoisonError::into_inner) = site_packages;
}

impl Nvrtc {
    /// The process's compiler, loaded at the first call that finds one.
    pub fn get() -> Result<&'static Self> {
        static LOADED: OnceLock<Nvrtc> = OnceLock::new();
        if let Some(loaded) = LOADED.get() {
            return Ok(loaded);
        }
        let asked = env::var_os("MODA_ATTN_NVRTC").filter(|path| !path.is_empty()).map(PathBuf::from);
        let found = Self::find(asked.as_deref(), &folders())?;
        Ok(LOADED.get_or_init(|| found))
    }

    /// Looks for the compiler: at `asked` alone where that is given, else already mapped, in `folders`, by name.
    pub fn find(asked: Option<&Path>, folders: &[PathBuf]) -> Result<Self> {
        let mut looked = Vec::new();
        if let Some(path) = asked {
            return Self::load(path).map_err(|complaint| {
                let looked = format!("{} (MODA_ATTN_NVRTC: {complaint})", path.display());
                Error::CompilerMissing { looked }
            });
        }
        for name in NAMES {
            // SAFETY: RTLD_NOLOAD maps nothing and runs no code; it only finds what is mapped already.
            if let Ok(library) = unsafe { Library::open(Some(name), RTLD_NOW | libc::RTLD_NOLOAD) }
                && let Ok(loaded) = Self::with(library, format!("{name}, already loaded by this process"))
            {
                return Ok(loaded);
            }
        }
        looked.push("already loaded libraries".to_owned());
        for folder in folders {
            match libraries(folder, "libnvrtc.so.").first().map(|path| Self::load(path)) {
                Some(Ok(loaded)) => return Ok(loaded),
                Some(Err(complaint)) => looked.push(format!("{} ({complaint})", folder.display())),
                None => looked.push(folder.display().to_string()),
            }
        }
        for name in NAMES {
            if let Ok(loaded) = Self::load(Path::new(name)) {
                return Ok(loaded);
            }
        }
        looked.push(format!("the system's libraries ({})", NAMES.join(", ")));
        Err(Error::CompilerMissing { looked: looked.join(", ") })
    }

    /// Version, major and minor.
    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    /// Architectures it compiles for, ascending: 80 is sm_80.
    pub fn architectures(&self) -> &[u32] {
        &self.architectures
    }

    /// Where it was found, in words.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// Compiles a text with its macros for an architecture: (8, 0) is sm_80. `name` stands in the compiler's messages.
    pub fn compile(
        &self,
        (name, text): (&'static str, &str),
        defines: &[(&str, i64)],
        (major, minor): (u32, u32),
        want: Want,
    ) -> Result<Image> {
        let options = options(defines, (major, minor), want);
        let failed = |log: String| Error::Compile { text: name, options: options.join(" "), log };
        let c_string = |text: &str| CString::new(text).map_err(|_| failed("a zero byte in the text".to_owned()));
        let (c_text, c_name) = (c_string(text)?, c_string(name)?);
        let c_options = options.iter().map(|option| c_string(option)).collect::<Result<Vec<_>>>()?;
        let pointers: Vec<_> = c_options.iter().map(|option| option.as_ptr()).collect();

        let mut program = ptr::null_mut();
        // SAFETY: two strings that end with a zero byte; no headers.
        let code =
            unsafe { (self.create)(&raw mut program, c_text.as_ptr(), c_name.as_ptr(), 0, ptr::null(), ptr::null()) };
        if code != 0 {
            return Err(failed(self.describe(code)));
        }
        // SAFETY: the program just made, destroyed below; as many options as the pointers say.
        let compiled = unsafe { (self.compile)(program, pointers.len() as c_int, pointers.as_ptr()) };
        let log = self.read(program, &self.log_size, &self.log);
        let which = want as usize;
        let image = (compiled == 0).then(|| self.read(program, &self.image_size[which], &self.image[which]));
        // SAFETY: made above, not used below.
        unsafe { (self.destroy)(&raw mut program) };
        let log = log.map(|bytes| String::from_utf8_lossy(bytes.strip_suffix(&[0]).unwrap_or(&bytes)).into_owned());
        match image {
            Some(bytes) => Ok(Image { bytes: bytes.map_err(&failed)?, log: log.map_err(failed)? }),
            None => Err(failed(format!("{}\n{}", self.describe(compiled), log.unwrap_or_default()))),
        }
    }

    fn read(&self, program: Program, size: &GetSize, get: &GetBytes) -> std::result::Result<Vec<u8>, String> {
        let mut length = 0;
        // SAFETY: a live program.
        let code = unsafe { size(program, &raw mut length) };
        if code != 0 {
            return Err(self.describe(code));
        }
        let mut bytes = vec![0u8; length];
        // SAFETY: room for the length it has just given.
        let code = unsafe { get(program, bytes.as_mut_ptr().cast()) };
        if code == 0 { Ok(bytes) } else { Err(self.describe(code)) }
    }

    fn describe(&self, code: Code) -> String {
        // SAFETY: it returns a constant string for every code.
        let name = unsafe { CStr::from_ptr((self.describe)(code)) };
        name.to_string_lossy().into_owned()
    }

    /// Loads a library, first the builtins beside it: they are found by name, which the loader looks up nowhere else.
    fn load(path: &Path) -> std::result::Result<Self, String> {
        let beside = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        for builtins in beside.map(|folder| libraries(folder, "libnvrtc-builtins.so.")).unwrap_or_default() {
            // SAFETY: a library of NVIDIA's without initialisers of consequence. It stays mapped for good.
            if let Ok(library) = unsafe { Library::open(Some(builtins), RTLD_NOW | RTLD_GLOBAL) } {
                std::mem::forget(library);
            }
        }
        // SAFETY: as above; what is asked of it below has the types its header declares.
        let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.map_err(|error| error.to_string())?;
        Self::with(library, path.display().to_string())
    }

    fn with(library: Library, origin: String) -> std::result::Result<Self, String> {
        fn symbol<T>(library: &Library, name: &CStr) -> std::result::Result<Symbol<T>, String> {
            // SAFETY: every call below names a function of nvrtc.h together with the type declared there.
            unsafe { library.get(name.to_bytes_with_nul()) }.map_err(|error| error.to_string())
        }
        let version: Symbol<unsafe extern "C" fn(*mut c_int, *mut c_int) -> Code> = symbol(&library, c"nvrtcVersion")?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: two numbers to write.
        if unsafe { version(&raw mut major, &raw mut minor) } != 0 {
            return Err("nvrtcVersion fails".to_owned());
        }
        if (major, minor) < OLDEST {
            return Err(format!("it is NVRTC {major}.{minor}; wanted {}.{} or newer", OLDEST.0, OLDEST.1));
        }
        let count: Symbol<List> = symbol(&library, c"nvrtcGetNumSupportedArchs")?;
        let list: Symbol<List> = symbol(&library, c"nvrtcGetSupportedArchs")?;
        let mut length = 0;
        // SAFETY: one number to write.
        let counted = unsafe { count(&raw mut length) };
        let mut architectures = vec![0; length.max(0) as usize];
        // SAFETY: room for as many numbers as it has just said.
        if counted != 0 || unsafe { list(architectures.as_mut_ptr()) } != 0 {
            return Err("it does not say what architectures it compiles for".to_owned());
        }
        Ok(Self {
            version: (major as u32, minor as u32),
            architectures: architectures.into_iter().map(|number| number as u32).collect(),
            origin,
            create: symbol(&library, c"nvrtcCreateProgram")?,
            compile: symbol(&library, c"nvrtcCompileProgram")?,
            destroy: symbol(&library, c"nvrtcDestroyProgram")?,
            describe: symbol(&library, c"nvrtcGetErrorString")?,
            image_size: [symbol(&library, c"nvrtcGetCUBINSize")?, symbol(&library, c"nvrtcGetPTXSize")?],
            image: [symbol(&library, c"nvrtcGetCUBIN")?, symbol(&library, c"nvrtcGetPTX")?],
            log_size: symbol(&library, c"nvrtcGetProgramLogSize")?,
            log: symbol(&library, c"nvrtcGetProgramLog")?,
            _library: library,
        })
    }
}

/// The compiler's options; part of what a compiled image is known by.
pub fn options(defines: &[(&str, i64)], (major, minor): (u32, u32), want: Want) -> Vec<String> {
    let architecture = match want {
        Want::Cubin => format!("--gpu-architecture=sm_{major}{minor}"),
        Want::Ptx => format!("--gpu-architecture=compute_{major}{minor}"),
    };
    // Not every release takes a generic lambda in device code for a device function without being told.
    let mut options = vec![architecture, "--std=c++17".to_owned(), "--device-as-default-execution-space".to_owned()];
    options.push(match want {
        Want::Cubin => "--ptxas-options=-v".to_owned(),
        Want::Ptx => "--generate-line-info".to_owned(),
    });
    options.extend(defines.iter().map(|(name, value)| format!("-D{name}={value}")));
    options
}

/// What to compile to for a device of this compute capability with a compiler of these architectures: machine code of the
/// very architecture, else assembly of the newest older one, which the driver finishes.
pub fn code_for((major, minor): (u32, u32), known: &[u32]) -> Option<((u32, u32), Want)> {
    let device = 10 * major + minor;
    let best = known.iter().copied().filter(|&number| number <= device).max()?;
    let want = if best == device { Want::Cubin } else { Want::Ptx };
    Some(((best / 10, best % 10), want))
}

/// The folders to look in: `nvidia/*/lib` of the Python environment, then the toolkit's.
fn folders() -> Vec<PathBuf> {
    let mut sites = SITE_PACKAGES.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if let Some(environment) = env::var_os("VIRTUAL_ENV") {
        sites.extend(
            entries(&Path::new(&environment).join("lib")).into_iter().map(|python| python.join("site-packages")),
        );
    }
    let packages = sites.iter().flat_map(|site| entries(&site.join("nvidia"))).map(|package| package.join("lib"));
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(PathBuf::from);
    let toolkits = toolkits.flat_map(|home| [home.join("lib64"), home.join("lib")]);
    packages.filter(|folder| !libraries(folder, "libnvrtc.so.").is_empty()).chain(toolkits).collect()
}

/// The libraries of a folder whose names begin so, the newest first.
fn libraries(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let is_one =
        |path: &PathBuf| path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(prefix));
    let mut found: Vec<PathBuf> = entries(folder).into_iter().filter(is_one).collect();
    found.reverse();
    found
}

/// The entries of a folder in the order of their names; none where it cannot be read.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder)
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default();
    found.sort();
    found
}
