//! What tests use: a device with buffers, and launches of compiled kernels on it.

use super::block::{Block, Profile};
use super::instruction::Kernel;
use super::memory::Global;
use super::parse::{Module, parse};
use super::shared::Shared;
use half::{bf16, f16};
use moda_attn::cuda::Launch;
use moda_attn::cuda::nvrtc::{Nvrtc, Want, options};
use std::collections::HashMap;
use std::fmt::{self, Write};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

/// Most shared memory that a block can ask for.
fn most_shared(architecture: (u32, u32)) -> usize {
    match architecture {
        (8, 0 | 7) => 163 << 10,
        (8 | 12, _) => 99 << 10,
        _ => 227 << 10,
    }
}

/// Numbers that a buffer can hold.
pub(crate) trait Plain: Copy {
    const SIZE: usize;
    fn put(self, bytes: &mut Vec<u8>);
    fn get(bytes: &[u8]) -> Self;
}

macro_rules! plain {
    ($($type:ty),*) => {
        $(impl Plain for $type {
            const SIZE: usize = size_of::<$type>();
            fn put(self, bytes: &mut Vec<u8>) {
                bytes.extend(self.to_le_bytes());
            }
            fn get(bytes: &[u8]) -> Self {
                Self::from_le_bytes(bytes.try_into().expect("as many bytes as the type has"))
            }
        })*
    };
}

plain!(u8, i8, u16, i16, u32, i32, u64, i64, f32, f64, bf16, f16);

/// A text and its macros, as they are compiled.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Source {
    pub(crate) name: &'static str,
    pub(crate) text: String,
    pub(crate) defines: Vec<(&'static str, i64)>,
}

/// A compiled text.
pub(crate) struct Program {
    module: Module,
    ptx: String,
    source: Source,
}

/// Where and why a kernel failed.
#[derive(Debug)]
pub(crate) struct Fault {
    pub(crate) message: String,
    /// Kernel, block, warp, the line of the CUDA source and that of the PTX.
    pub(crate) place: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n{}", self.message, self.place)
    }
}

/// How a kernel of the text is launched; as `Launch`, without the kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape<'a> {
    pub(crate) grid: [u32; 3],
    pub(crate) block: u32,
    pub(crate) shared: u32,
    pub(crate) params: &'a [u8],
}

/// A device without hardware.
pub(crate) struct Gpu {
    global: Global,
    architecture: (u32, u32),
    count: usize,
    /// Instructions executed so far, by a warp each.
    pub(crate) executed: u64,
    /// Instructions after which a warp counts as caught in an endless loop.
    pub(crate) patience: u64,
    /// Whether bank conflicts are counted, and how many turns they cost so far.
    pub(crate) counting: bool,
    pub(crate) conflicts: u64,
}

impl Gpu {
    /// One of compute capability 8.0.
    pub(crate) fn new() -> Self {
        Self::with_architecture((8, 0))
    }

    pub(crate) fn with_architecture(architecture: (u32, u32)) -> Self {
        Self {
            global: Global::default(),
            architecture,
            count: 0,
            executed: 0,
            patience: 1 << 26,
            counting: profiling(),
            conflicts: 0,
        }
    }

    pub(crate) fn architecture(&self) -> (u32, u32) {
        self.architecture
    }

    /// An input: kernels read it and must not write it. Returns its address.
    pub(crate) fn buffer<T: Plain>(&mut self, values: &[T]) -> u64 {
        let name = self.name("input");
        self.global.add(&name, bytes(values), false)
    }

    /// A buffer that holds values and may be changed.
    pub(crate) fn variable<T: Plain>(&mut self, values: &[T]) -> u64 {
        let name = self.name("variable");
        self.global.add(&name, bytes(values), true)
    }

    /// An output of so many elements: what is not written cannot be read, not by kernels and not by the host.
    pub(crate) fn output<T: Plain>(&mut self, length: usize) -> u64 {
        let name = self.name("output");
        self.global.add_unwritten(&name, length * T::SIZE)
    }

    fn name(&mut self, kind: &str) -> String {
        self.count += 1;
        format!("buffer {} ({kind})", self.count)
    }

    /// What a buffer holds. Fails where a part of it was never written.
    #[track_caller]
    pub(crate) fn read<T: Plain>(&self, pointer: u64) -> Vec<T> {
        let bytes = self.global.contents(pointer).unwrap_or_else(|error| panic!("{error}"));
        bytes.chunks_exact(T::SIZE).map(T::get).collect()
    }

    /// What a buffer holds, with `None` where it was never written.
    pub(crate) fn read_written<T: Plain>(&self, pointer: u64) -> Vec<Option<T>> {
        let (bytes, written) = self.global.raw(pointer);
        let whole = written.chunks_exact(T::SIZE).map(|written| written.iter().all(|&written| written));
        bytes.chunks_exact(T::SIZE).zip(whole).map(|(bytes, whole)| whole.then(|| T::get(bytes))).collect()
    }

    /// Runs launches one after the other. Fails with the kernel's line at whatever is wrong with one of them.
    #[track_caller]
    pub(crate) fn run(&mut self, launches: &[Launch]) {
        self.try_run(launches).unwrap_or_else(|fault| panic!("{fault}"));
    }

    pub(crate) fn try_run(&mut self, launches: &[Launch]) -> Result<(), Fault> {
        for Launch { kernel, grid, block, shared, params } in launches {
            let source =
                Source { name: kernel.source.name(), text: text(kernel.source), defines: kernel.defines.clone() };
            let program = Program::of(&source, self.architecture);
            self.launch(&program, kernel.entry, Shape { grid: *grid, block: *block, shared: *shared, params })?;
        }
        Ok(())
    }

    /// Runs one kernel of a text.
    pub(crate) fn launch(&mut self, program: &Program, entry: &str, shape: Shape) -> Result<(), Fault> {
        let fault = |message: String| Fault { message, place: format!("in the launch of {entry}: {shape:?}") };
        let kernel = program.module.kernels.iter().find(|kernel| kernel.name == entry);
        let kernel = kernel.ok_or_else(|| fault(format!("{} has no such kernel", program.source.name)))?;
        let Shape { grid, block, shared, params } = shape;
        if params.len() != kernel.parameters {
            return Err(fault(format!("{} bytes of parameters, the kernel has {}", params.len(), kernel.parameters)));
        }
        if !(1..=1024).contains(&block) || grid.contains(&0) || grid[1].max(grid[2]) > 65535 {
            return Err(fault("no such grid or block".to_owned()));
        }
        let most = most_shared(self.architecture);
        if kernel.shared + shared as usize > most {
            return Err(fault(format!("{} bytes of shared memory, there are {most}", kernel.shared + shared as usize)));
        }
        let zeros = vec![0; kernel.instructions.len()];
        let mut profile = Profile { executed: zeros.clone(), conflicts: zeros, conflicts_wanted: self.counting };
        self.global.begin_launch();
        for z in 0..grid[2] {
            for y in 0..grid[1] {
                for x in 0..grid[0] {
                    let block = Block {
                        global: &mut self.global,
                        shared: Shared::new(kernel.shared + shared as usize),
                        parameters: params,
                        profile: &mut profile,
                        threads: block,
                        position: [x, y, z],
                        grid,
                        dynamic_shared: shared,
                        patience: self.patience,
                    };
                    block.run(kernel).map_err(|failure| {
                        let place = program.place(kernel, failure.trap.at);
                        let place = format!("in {entry}, block {:?}, warp {}, {place}", [x, y, z], failure.warp);
                        Fault { message: failure.trap.message, place }
                    })?;
                }
            }
        }
        self.executed += profile.executed.iter().sum::<u64>();
        self.conflicts += profile.conflicts.iter().sum::<u64>();
        if profiling() {
            eprintln!("{}", program.report(kernel, &profile, shape));
        }
        Ok(())
    }
}

impl Default for Gpu {
    fn default() -> Self {
        Self::new()
    }
}

/// Whether the costs of every compilation and launch are to be printed.
fn profiling() -> bool {
    std::env::var_os("MODA_ATTN_PROFILE").is_some()
}

fn bytes<T: Plain>(values: &[T]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(values.len() * T::SIZE);
    for value in values {
        value.put(&mut bytes);
    }
    bytes
}

/// The text of a kernel as its files say now: changing one compiles nothing of Rust anew.
fn text(source: moda_attn::cuda::Source) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cuda/kernels");
    let read =
        |name: &str| std::fs::read_to_string(folder.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    let pieces: Vec<_> = source.pieces().iter().map(|piece| (piece.name, read(piece.name))).collect();
    moda_attn::cuda::source::joined(pieces.iter().map(|(name, text)| (*name, text.as_str())))
}

/// PTX of a text, kept in the folder of the build so that the next run of the tests finds it compiled.
fn assembly(source: &Source, architecture: (u32, u32)) -> Result<String, String> {
    let nvrtc = Nvrtc::get().map_err(|error| error.to_string())?;
    let mut key = DefaultHasher::new();
    (source, nvrtc.version(), options(&source.defines, architecture, Want::Ptx)).hash(&mut key);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("ptx");
    let kept = folder.join(format!("{:016x}.ptx", key.finish()));
    if let Ok(ptx) = std::fs::read_to_string(&kept) {
        return Ok(ptx);
    }
    let start = Instant::now();
    let text = (source.name, source.text.as_str());
    let image = nvrtc.compile(text, &source.defines, architecture, Want::Ptx).map_err(|error| error.to_string())?;
    if profiling() {
        eprintln!("{} {:?}: compiled in {:?}", source.name, source.defines, start.elapsed());
    }
    let ptx = String::from_utf8_lossy(&image.bytes).trim_end_matches('\0').to_owned();
    // Another process may write the same: what is there under the name is always whole.
    let partial = kept.with_extension(std::process::id().to_string());
    let written = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&partial, &ptx));
    written.and_then(|()| std::fs::rename(&partial, &kept)).map_err(|error| format!("{}: {error}", kept.display()))?;
    Ok(ptx)
}

/// Every text is compiled once a process, whatever number of tests want it at the same time.
type Compiled = Mutex<HashMap<(Source, (u32, u32)), Arc<OnceLock<Arc<Program>>>>>;

impl Program {
    /// The compiled text. A compiler that is missing, or finds fault, fails the test.
    pub(crate) fn of(source: &Source, architecture: (u32, u32)) -> Arc<Self> {
        static COMPILED: OnceLock<Compiled> = OnceLock::new();
        let compiled = COMPILED.get_or_init(Compiled::default);
        let key = (source.clone(), architecture);
        let slot = Arc::clone(compiled.lock().expect("nobody panics here").entry(key).or_default());
        Arc::clone(slot.get_or_init(|| Arc::new(Self::compile(source, architecture).unwrap_or_else(|e| panic!("{e}")))))
    }

    fn compile(source: &Source, architecture: (u32, u32)) -> Result<Self, String> {
        let ptx = assembly(source, architecture)?;
        let module = parse(&ptx).map_err(|error| format!("{}: {error}", source.name))?;
        Ok(Self { module, ptx, source: source.clone() })
    }

    /// An instruction, with the line of the CUDA source that it comes from.
    fn place(&self, kernel: &Kernel, at: usize) -> String {
        let Some(instruction) = kernel.instructions.get(at) else { return "at its end".to_owned() };
        let ptx = self.ptx.lines().nth(instruction.line - 1).unwrap_or_default().trim();
        let source = instruction.source.map_or("no line".to_owned(), |(file, line)| self.source_line(file, line));
        format!("{source}\n    PTX line {}: {ptx}", instruction.line)
    }

    fn source_line(&self, file: usize, line: usize) -> String {
        let name = self.module.files.get(&file).map_or("?", String::as_str);
        let start = format!("#line 1 \"{name}\"");
        let text = self.source.text.split_once(&start).map_or(self.source.text.as_str(), |(_, after)| &after[1..]);
        format!("{name}:{line}: {}", text.lines().nth(line - 1).unwrap_or_default().trim())
    }

    /// Instructions executed, by line of the CUDA source, the most first.
    fn report(&self, kernel: &Kernel, profile: &Profile, shape: Shape) -> String {
        let mut lines: HashMap<_, (u64, u64)> = HashMap::new();
        for (at, instruction) in kernel.instructions.iter().enumerate() {
            let line = lines.entry(instruction.source).or_default();
            line.0 += profile.executed[at];
            line.1 += profile.conflicts[at];
        }
        let total: u64 = profile.executed.iter().sum();
        let conflicts: u64 = profile.conflicts.iter().sum();
        let mut lines: Vec<_> = lines.into_iter().collect();
        lines.sort_by_key(|&(source, (executed, conflicts))| (std::cmp::Reverse(executed + conflicts), source));
        let mut report = format!(
            "{} {:?}: grid {:?}, block {}, {} bytes of shared memory: {total} warp instructions, {conflicts} turns of bank conflicts",
            kernel.name,
            self.source.defines,
            shape.grid,
            shape.block,
            kernel.shared + shape.shared as usize,
        );
        for (source, (executed, conflicts)) in lines.into_iter().take(30) {
            let source = source.map_or("no line".to_owned(), |(file, line)| self.source_line(file, line));
            let _ = write!(report, "\n{executed:>10} {conflicts:>8}  {source}"); // to a String: never fails
        }
        report
    }
}
