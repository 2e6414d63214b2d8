//! Which instruction set runs, and why: chosen once, at first use.

pub use crate::cpu::Isa;
use crate::error::{Error, Result};
use std::env;
use std::sync::OnceLock;

/// The instruction set that runs and the reason it was chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// What runs.
    pub isa: Isa,
    /// Why, in words.
    pub reason: String,
}

/// The decision itself: what was asked for, out of what there is; unasked the widest of those that pay. Pure.
pub fn select(asked: Option<&str>, available: &[Isa], pays: impl Fn(Isa) -> bool) -> Result<Choice> {
    match asked {
        None => {
            let (paying, slow): (Vec<Isa>, Vec<Isa>) = available.iter().copied().partition(|&isa| pays(isa));
            let isa = paying.iter().copied().max().unwrap_or(Isa::Scalar);
            let widest = format!("the widest this machine has ({} is available)", names(&paying));
            let reason = match slow[..] {
                [] => widest,
                _ => format!("{widest}; {} would be slower on this CPU", names(&slow)),
            };
            Ok(Choice { isa, reason })
        }
        Some(name) => {
            let found = available.iter().copied().find(|isa| isa.name() == name);
            let error = || Error::InstructionSet { given: format!("{name:?}"), wanted: names(available) };
            found.map(|isa| Choice { isa, reason: "MODA_ATTN_ISA asks for it".to_owned() }).ok_or_else(error)
        }
    }
}

/// The choice for this process. `MODA_ATTN_ISA` is read once; an impossible wish is an error at every call.
pub fn choice() -> Result<&'static Choice> {
    static CHOICE: OnceLock<Result<Choice>> = OnceLock::new();
    CHOICE
        .get_or_init(|| {
            let available: Vec<Isa> = Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect();
            let asked = env::var("MODA_ATTN_ISA").ok().filter(|name| !name.is_empty());
            select(asked.as_deref(), &available, Isa::pays)
        })
        .as_ref()
        .map_err(Clone::clone)
}

fn names(available: &[Isa]) -> String {
    available.iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_widest_is_chosen_unless_asked_otherwise() {
        assert_eq!(select(None, &[Isa::Scalar, Isa::Avx2], |_| true).unwrap().isa, Isa::Avx2);
        assert_eq!(select(Some("scalar"), &[Isa::Scalar, Isa::Avx2], |_| true).unwrap().isa, Isa::Scalar);
    }

    #[test]
    fn what_does_not_pay_runs_only_when_asked_for() {
        let pays = |isa| isa != Isa::Avx512Bf16;
        let choice = select(None, &[Isa::Avx512, Isa::Avx512Bf16], pays).unwrap();
        assert_eq!(choice.isa, Isa::Avx512);
        assert!(choice.reason.contains("avx512bf16 would be slower"), "{}", choice.reason);
        assert_eq!(select(Some("avx512bf16"), &Isa::ALL, pays).unwrap().isa, Isa::Avx512Bf16);
    }

    #[test]
    fn what_the_machine_lacks_is_an_error_not_a_fallback() {
        for wish in ["avx512", "sse9"] {
            let error = select(Some(wish), &[Isa::Scalar, Isa::Avx2], |_| true).unwrap_err().to_string();
            assert!(error.contains(wish) && error.contains("scalar, avx2"), "{error}");
        }
    }
}
