//! The run-time compiler: found, loaded, and what it says of good and bad texts.

use moda_attn::Error;
use moda_attn::cuda::nvrtc::{Nvrtc, Want};
use moda_attn::cuda::{Kernel, Source};
use std::path::{Path, PathBuf};

#[test]
fn every_architecture_gets_machine_code_and_a_report() {
    let nvrtc = Nvrtc::get().unwrap();
    let kernel = Kernel { source: Source::AttendSum, entry: "attend_sum", defines: vec![("DTYPE", 2)] };
    for arch in [(8, 0), (9, 0)] {
        let image = nvrtc.compile((kernel.source.name(), &kernel.source.text()), &kernel.defines, arch, Want::Cubin);
        let image = image.unwrap();
        assert!(image.bytes.starts_with(b"\x7fELF"));
        assert!(image.log.contains("registers") && image.log.contains("attend_sum"), "{}", image.log);
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
fn folders_without_it_are_named() {
    let Err(error) = Nvrtc::find(None, &[PathBuf::from("/nowhere/lib")]) else {
        println!("skipped: this machine has NVRTC among the system's libraries, or it is loaded already");
        return;
    };
    assert!(error.to_string().contains("/nowhere/lib"), "{error}");
}
