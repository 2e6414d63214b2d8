//! The run-time compiler: found, loaded, and what it says of good and bad texts.

use crate::cache::folder;
use moda_attn::Error;
use moda_attn::cuda::Source;
use moda_attn::cuda::nvrtc::{Nvrtc, Want, code_for};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

#[test]
fn every_architecture_gets_machine_code_and_a_report() {
    let nvrtc = Nvrtc::get().unwrap();
    let defines = [("DTYPE", 2), ("HEAD_DIM", 32), ("CAUSAL", 1), ("WARPS", 4), ("ROW_TILES", 1)];
    let (source, text) = (Source::AttendForward.name(), Source::AttendForward.text());
    let newer = nvrtc.architectures().iter().filter(|&&number| number >= 80);
    let architectures: Vec<_> = newer.map(|number| (number / 10, number % 10)).collect();
    assert!(architectures.contains(&(8, 0)) && architectures.contains(&(9, 0)), "{architectures:?}");
    for architecture in architectures {
        let image = nvrtc.compile((source, &text), &defines, architecture, Want::Cubin).unwrap();
        assert!(image.bytes.starts_with(b"\x7fELF"));
        assert!(image.log.contains("registers") && image.log.contains("attend_forward"), "{}", image.log);
    }
}

#[test]
fn assembly_is_text() {
    let text = Source::AttendSum.text();
    let image = Nvrtc::get().unwrap().compile(("attend_sum.cu", &text), &[("DTYPE", 1)], (8, 0), Want::Ptx).unwrap();
    let text = String::from_utf8(image.bytes).unwrap();
    assert!(text.contains(".entry attend_sum") && text.contains(".target sm_80"), "{text}");
}

#[test]
fn a_bad_text_is_shown_with_what_the_compiler_said() {
    let error =
        Nvrtc::get().unwrap().compile(("bad.cu", "int f( {"), &[("DTYPE", 0)], (8, 0), Want::Cubin).unwrap_err();
    assert!(matches!(error, Error::Compile { .. }));
    let message = error.to_string();
    assert!(message.contains("bad.cu") && message.contains("-DDTYPE=0") && message.contains("error"), "{message}");
}

#[test]
fn a_path_that_is_asked_for_and_wrong_is_an_error_not_a_fallback() {
    let error = Nvrtc::find(Some(Path::new("/nowhere/libnvrtc.so.13")), &[]).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("/nowhere/libnvrtc.so.13") && message.contains("MODA_ATTN_NVRTC"), "{message}");
}

#[test]
fn places_without_it_are_named() {
    const INSIDE: &str = "MODA_ATTN_TEST_PLACES";
    if env::var_os(INSIDE).is_none() {
        // A process of its own: the other tests here load the library, and what is loaded is found.
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", "nvrtc::places_without_it_are_named", "--nocapture"]).env(INSIDE, "1");
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        return;
    }
    let folder = folder("places");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("libnvrtc.so.13"), "not a library").unwrap();
    match Nvrtc::find(None, &[PathBuf::from("/nowhere/lib"), folder.clone()]) {
        Ok(found) => println!("skipped: {} is among the system's libraries", found.origin()),
        Err(error) => {
            let message = error.to_string();
            for place in ["already loaded", "/nowhere/lib, ", folder.to_str().unwrap(), "the system's libraries"] {
                assert!(message.contains(place), "{message}");
            }
        }
    }
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn an_architecture_gets_its_own_code_or_what_the_driver_finishes() {
    let known = [80, 86, 90, 120];
    assert_eq!(code_for((9, 0), &known), Some(((9, 0), Want::Cubin)));
    assert_eq!(code_for((8, 9), &known), Some(((8, 6), Want::Ptx)));
    assert_eq!(code_for((13, 0), &known), Some(((12, 0), Want::Ptx)));
    assert_eq!(code_for((7, 5), &known), None);
    assert!(Nvrtc::get().unwrap().architectures().contains(&90));
}
