//! Compiled kernels, kept in memory and on disk, so that a kernel is compiled once a machine and not once a process.
//!
//! A file is written beside its place and renamed into it, so readers see all of it or nothing. What cannot be read, or
//! is not what was written, is compiled again; where nothing can be written, memory has to do.

use super::launch::Kernel;
use crate::error::Result;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::{env, fs, process};

/// First bytes of every file; another layout gets another number.
const MAGIC: &[u8; 12] = b"moda-attn 1\n";

/// Compiled images by key.
#[derive(Debug)]
pub struct Cache {
    folder: Option<PathBuf>,
    images: Mutex<HashMap<u128, Arc<[u8]>>>,
}

impl Cache {
    /// A cache in a folder, which is made at need, or in memory alone.
    pub fn new(folder: Option<PathBuf>) -> Self {
        Self { folder, images: Mutex::default() }
    }

    /// The process's cache, in [`default_folder`].
    pub fn get() -> &'static Self {
        static CACHE: OnceLock<Cache> = OnceLock::new();
        CACHE.get_or_init(|| Self::new(default_folder()))
    }

    /// Where files lie, if anywhere.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// Number of files and their bytes.
    pub fn size(&self) -> (usize, u64) {
        let entries = self.folder.as_ref().and_then(|folder| fs::read_dir(folder).ok()).into_iter().flatten().flatten();
        let files = entries.filter_map(|entry| entry.metadata().ok()).filter(fs::Metadata::is_file);
        files.fold((0, 0), |(count, bytes), file| (count + 1, bytes + file.len()))
    }

    /// The image of a key: from memory, from disk, or made now.
    pub fn image(&self, key: Key, compile: impl FnOnce() -> Result<Vec<u8>>) -> Result<Arc<[u8]>> {
        let known = self.images.lock().unwrap_or_else(PoisonError::into_inner).get(&key.hash).cloned();
        if let Some(image) = known {
            return Ok(image);
        }
        let path = self.folder.as_ref().map(|folder| folder.join(key.file_name()));
        let image = if let Some(image) = path.as_deref().and_then(read) {
            image
        } else {
            let image = compile()?;
            if let Some(path) = &path {
                // Without it the next process compiles again: slower, and nothing else.
                let _ = write(path, &image);
            }
            image
        };
        let image: Arc<[u8]> = image.into();
        self.images.lock().unwrap_or_else(PoisonError::into_inner).insert(key.hash, Arc::clone(&image));
        Ok(image)
    }
}

/// `MODA_ATTN_CACHE`, else `moda-attn/cuda` in `XDG_CACHE_HOME` or `~/.cache`; `None` where none of them is set, or the
/// first is set and empty.
pub fn default_folder() -> Option<PathBuf> {
    if let Some(asked) = env::var_os("MODA_ATTN_CACHE") {
        return Some(PathBuf::from(asked)).filter(|folder| !folder.as_os_str().is_empty());
    }
    let set = |name| env::var_os(name).filter(|folder| !folder.is_empty()).map(PathBuf::from);
    let caches = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")))?;
    Some(caches.join("moda-attn").join("cuda"))
}

/// What an image is known by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    name: &'static str,
    hash: u128,
}

impl Key {
    /// The key of a kernel's text, compiled with these options (its defines and architecture are among them) by a
    /// compiler of this version.
    pub fn new(kernel: &Kernel, options: &[String], (major, minor): (u32, u32)) -> Self {
        let mut hash = Fnv::new();
        hash.write(kernel.source.text().as_bytes());
        for option in options {
            hash.write(option.as_bytes());
        }
        hash.write(format!("nvrtc {major}.{minor}").as_bytes());
        Self { name: kernel.source.name(), hash: hash.0 }
    }

    fn file_name(self) -> String {
        format!("{}-{:032x}", self.name.trim_end_matches(".cu"), self.hash)
    }
}

/// FNV-1a on 128 bits: texts of our own need no defence against somebody who looks for collisions.
struct Fnv(u128);

impl Fnv {
    const fn new() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }

    /// Takes in a piece and its length, so that two pieces are not their concatenation.
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes.iter().chain(&bytes.len().to_le_bytes()) {
            self.0 = (self.0 ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
    }

    fn of(bytes: &[u8]) -> [u8; 16] {
        let mut hash = Self::new();
        hash.write(bytes);
        hash.0.to_le_bytes()
    }
}

/// The image in a file; `None` where there is none or it is not what was written.
fn read(path: &Path) -> Option<Vec<u8>> {
    let file = fs::read(path).ok()?;
    let (checksum, image) = file.strip_prefix(MAGIC)?.split_at_checked(16)?;
    (Fnv::of(image) == checksum).then(|| image.to_vec())
}

fn write(path: &Path, image: &[u8]) -> std::io::Result<()> {
    static WRITTEN: AtomicU64 = AtomicU64::new(0);
    let Some(folder) = path.parent() else { return Ok(()) };
    fs::create_dir_all(folder)?;
    let own = format!(".{}-{}", process::id(), WRITTEN.fetch_add(1, Ordering::Relaxed));
    let temporary = folder.join(own);
    let file = [MAGIC.as_slice(), &Fnv::of(image), image].concat();
    let done = fs::write(&temporary, file).and_then(|()| fs::rename(&temporary, path));
    if done.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    done
}
