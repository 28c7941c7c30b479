//! Instruction sets: which kernels a machine can run, and which are chosen.

use std::fmt;

/// An instruction set that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Any machine: the twin of the others.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
    /// The same with VNNI.
    Avx512Vnni,
    /// aarch64.
    Neon,
}

/// The environment variable that overrides the choice.
pub const ISA_VARIABLE: &str = "MAINSTAY_CPU";

/// An instruction set was asked for that is unknown or not on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IsaError(String);

impl fmt::Display for IsaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for IsaError {}

impl Isa {
    /// All of them, slowest first.
    pub const ALL: [Isa; 5] = [Isa::Scalar, Isa::Neon, Isa::Avx2, Isa::Avx512, Isa::Avx512Vnni];

    /// As written in [`ISA_VARIABLE`].
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Vnni => "avx512vnni",
            Isa::Neon => "neon",
        }
    }

    /// Whether this machine has it.
    pub fn is_supported(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.is_supported()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => Isa::Avx512.is_supported() && is_x86_feature_detected!("avx512vnni"),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            _ => false,
        }
    }

    /// Those that this machine has, slowest first.
    pub fn supported() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.is_supported())
    }

    /// The fastest that this machine has.
    pub fn best() -> Isa {
        Isa::supported().last().unwrap_or(Isa::Scalar)
    }

    /// The one named by [`ISA_VARIABLE`]; the best where it is unset or empty.
    ///
    /// # Errors
    /// If the name is unknown or this machine does not have it.
    pub fn from_environment() -> Result<Isa, IsaError> {
        match std::env::var_os(ISA_VARIABLE) {
            None => Ok(Isa::best()),
            Some(value) if value.is_empty() => Ok(Isa::best()),
            Some(value) => Isa::named(&value.to_string_lossy()),
        }
    }

    /// The one of this name.
    ///
    /// # Errors
    /// If the name is unknown or this machine does not have it.
    pub fn named(name: &str) -> Result<Isa, IsaError> {
        let known: Vec<&str> = Isa::supported().map(Isa::name).collect();
        match Isa::ALL.into_iter().find(|isa| isa.name() == name) {
            Some(isa) if isa.is_supported() => Ok(isa),
            Some(_) => Err(IsaError(format!(
                "{ISA_VARIABLE}: this machine does not have `{name}`; expected one of {}",
                known.join(", ")
            ))),
            None => {
                Err(IsaError(format!("{ISA_VARIABLE}: expected one of {}, found `{name}`", known.join(", "))))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        assert_eq!(Isa::named("scalar"), Ok(Isa::Scalar));
        assert!(Isa::named("sse9").unwrap_err().to_string().contains("found `sse9`"));
        for isa in Isa::ALL {
            assert_eq!(Isa::named(isa.name()).is_ok(), isa.is_supported());
        }
        assert!(Isa::best().is_supported());
    }
}
