//! Compiled kernels are found again, in memory and on disk, and never mistaken for others.

use moda_attn::cuda::cache::{Cache, Key};
use moda_attn::cuda::nvrtc::{Want, options};
use moda_attn::cuda::{Kernel, Source};
use moda_attn::{Error, Result};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

/// A fresh folder of the test's own.
pub(crate) fn folder(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("moda-attn-{}-{name}", std::process::id()));
    let _ = fs::remove_dir_all(&folder);
    folder
}

fn kernel(dtype: i64) -> Kernel {
    Kernel { source: Source::AttendSum, entry: "attend_sum", defines: vec![("DTYPE", dtype)] }
}

fn key(dtype: i64, architecture: (u32, u32), version: (u32, u32)) -> Key {
    Key::new(&kernel(dtype), &options(&kernel(dtype).defines, architecture, Want::Cubin), version)
}

fn unexpected() -> Result<Vec<u8>> {
    panic!("it was compiled before")
}

#[test]
fn a_second_call_and_a_second_process_find_the_first_ones_work() {
    let folder = folder("twice");
    let (cache, key) = (Cache::new(Some(folder.clone())), key(0, (8, 0), (13, 0)));
    assert_eq!(&*cache.image(key, || Ok(b"machine code".to_vec())).unwrap(), b"machine code");
    assert_eq!(&*cache.image(key, unexpected).unwrap(), b"machine code");
    let other = Cache::new(Some(folder.clone()));
    assert_eq!(&*other.image(key, unexpected).unwrap(), b"machine code");
    let (files, bytes) = other.size();
    assert!(files == 1 && bytes > 12, "{files} files of {bytes} bytes");
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn what_decides_the_code_decides_the_key() {
    let base = key(0, (8, 0), (13, 0));
    assert_eq!(base, key(0, (8, 0), (13, 0)));
    for other in [key(1, (8, 0), (13, 0)), key(0, (9, 0), (13, 0)), key(0, (8, 0), (13, 2)), key(0, (8, 0), (12, 0))] {
        assert_ne!(base, other);
    }
    let options = options(&[("DTYPE", 0)], (8, 0), Want::Ptx);
    assert_ne!(base, Key::new(&kernel(0), &options, (13, 0)));
}

#[test]
fn a_file_that_is_not_what_was_written_is_made_again() {
    let folder = folder("corrupt");
    let key = key(0, (8, 0), (13, 0));
    Cache::new(Some(folder.clone())).image(key, || Ok(vec![7; 1000])).unwrap();
    let path = fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
    let whole = fs::read(&path).unwrap();
    let mut flipped = whole.clone();
    flipped[500] ^= 1;
    for bad in
        [&b""[..], b"moda-attn 1\n", &whole[..whole.len() - 1], &flipped, b"something else altogether, and longer"]
    {
        fs::write(&path, bad).unwrap();
        let image = Cache::new(Some(folder.clone())).image(key, || Ok(vec![8; 10])).unwrap();
        assert_eq!(&*image, [8; 10]);
        assert_eq!(&*Cache::new(Some(folder.clone())).image(key, unexpected).unwrap(), [8; 10]);
    }
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn where_nothing_can_be_written_memory_has_to_do() {
    let folder = folder("locked");
    fs::create_dir_all(&folder).unwrap();
    // A file where the folder should be: not even root can write into it.
    let blocked = folder.join("file");
    fs::write(&blocked, "").unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o500)).unwrap();
    for cache in [Cache::new(Some(blocked.join("cache"))), Cache::new(None)] {
        let key = key(0, (8, 0), (13, 0));
        cache.image(key, || Ok(vec![1])).unwrap();
        assert_eq!(&*cache.image(key, unexpected).unwrap(), [1]);
        assert_eq!(cache.size(), (0, 0));
    }
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn what_cannot_be_compiled_is_not_remembered() {
    let (cache, key) = (Cache::new(None), key(0, (8, 0), (13, 0)));
    assert_eq!(cache.image(key, || Err(Error::DriverMissing)).unwrap_err(), Error::DriverMissing);
    assert_eq!(&*cache.image(key, || Ok(vec![3])).unwrap(), [3]);
}

#[test]
fn writers_at_once_leave_one_whole_file() {
    let folder = folder("race");
    let compiled = AtomicU32::new(0);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let cache = Cache::new(Some(folder.clone()));
                let image = cache.image(key(0, (8, 0), (13, 0)), || {
                    compiled.fetch_add(1, Ordering::Relaxed);
                    Ok(vec![5; 1 << 20])
                });
                assert!(image.unwrap().iter().all(|&byte| byte == 5));
            });
        }
    });
    assert!(compiled.into_inner() >= 1);
    assert_eq!(Cache::new(Some(folder.clone())).size().0, 1);
    fs::remove_dir_all(folder).unwrap();
}
