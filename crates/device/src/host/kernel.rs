//! The running kernel: its version, its configuration, its modules.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::files::{ReadFailure, Roots, attribute, read_bytes, read_text};

/// Longest configuration, unpacked, in bytes.
const CONFIG_MAX: u64 = 4 << 20;
/// Longest `modules.dep`, and longest `/proc/modules`.
const MODULES_MAX: u64 = 32 << 20;

/// The version of a kernel, whole and as numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelVersion {
    /// The whole release: `6.12.1-amd64`.
    pub release: String,
    /// The first two numbers; `None` when it does not begin with any.
    pub number: Option<(u32, u32)>,
}

/// The release of the running kernel. `None` when procfs does not have it.
pub fn version(roots: &Roots) -> Option<KernelVersion> {
    let release = attribute(&roots.proc.join("sys/kernel/osrelease"))?;
    let digits = |text: &str| {
        let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        text.get(..end).and_then(|digits| digits.parse().ok())
    };
    let mut parts = release.splitn(3, '.');
    let number = parts.next().and_then(|major| major.parse().ok()).zip(parts.next().and_then(digits));
    Some(KernelVersion { release, number })
}

/// The setting of an option of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigOption {
    /// Built into the kernel.
    BuiltIn,
    /// Built as a module.
    Module,
    /// Not built, or not known to the kernel.
    Off,
    /// The configuration cannot be read.
    Unknown,
}

impl fmt::Display for ConfigOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BuiltIn => "built in",
            Self::Module => "a module",
            Self::Off => "off",
            Self::Unknown => "unknown",
        })
    }
}

/// The options that a kernel was built with.
#[derive(Clone, Debug, Default)]
pub struct KernelConfig {
    /// The file it is from; `None` when none was readable.
    pub source: Option<PathBuf>,
    options: BTreeMap<String, ConfigOption>,
}

impl KernelConfig {
    /// The setting of option `name` (without `CONFIG_`).
    pub fn option(&self, name: &str) -> ConfigOption {
        match (&self.source, self.options.get(name)) {
            (None, _) => ConfigOption::Unknown,
            (_, Some(option)) => *option,
            // What is off, or what this kernel does not know, is not in the file (or in a comment of it).
            (_, None) => ConfigOption::Off,
        }
    }
}

/// The configuration of the running kernel: from `/proc/config.gz`, `/boot/config-RELEASE` or
/// `/lib/modules/RELEASE/config`, the first that is one.
pub fn config(roots: &Roots) -> KernelConfig {
    let mut candidates = vec![roots.proc.join("config.gz")];
    if let Some(release) = version(roots).and_then(|version| one_name(version.release)) {
        candidates.push(roots.boot.join(format!("config-{release}")));
        candidates.push(roots.modules.join(&release).join("config"));
    }
    for path in candidates {
        if let Ok(text) = config_text(&path) {
            let options = options(&text);
            // A kernel without any option is no kernel: the file is something else.
            if !options.is_empty() {
                return KernelConfig { source: Some(path), options };
            }
        }
    }
    KernelConfig::default()
}

/// Whether the running kernel has `module` in it, loaded or built in. Built-in code without parameters may not show.
pub fn has_module(roots: &Roots, module: &str) -> bool {
    let name = module.replace('-', "_");
    if roots.sys.join("module").join(&name).is_dir() {
        return true;
    }
    read_text(&roots.proc.join("modules"), MODULES_MAX)
        .is_ok_and(|text| text.lines().any(|line| line.split_whitespace().next() == Some(name.as_str())))
}

/// Whether `module` can be loaded: `modules.dep` of the running release names it. `None` when there is no such file.
pub fn module_file(roots: &Roots, module: &str) -> Option<bool> {
    let release = one_name(version(roots)?.release)?;
    let text = read_text(&roots.modules.join(release).join("modules.dep"), MODULES_MAX).ok()?;
    let wanted = module.replace('_', "-");
    Some(text.lines().any(|line| {
        let path = line.split(':').next().unwrap_or_default();
        let file = path.rsplit('/').next().unwrap_or_default();
        file.split(".ko").next().is_some_and(|stem| stem.replace('_', "-") == wanted)
    }))
}

/// A release that is used as part of a path.
pub(super) fn one_name(release: String) -> Option<String> {
    (!release.contains('/') && release != "..").then_some(release)
}

fn config_text(path: &Path) -> Result<String, ReadFailure> {
    let bytes = read_bytes(path, CONFIG_MAX)?;
    let text = if bytes.starts_with(&[0x1f, 0x8b]) {
        let mut text = Vec::new();
        let nonsense = |_| ReadFailure::Nonsense("packed configuration");
        flate2::read::GzDecoder::new(&*bytes)
            .take(CONFIG_MAX + 1)
            .read_to_end(&mut text)
            .map_err(nonsense)?;
        if text.len() as u64 > CONFIG_MAX {
            return Err(ReadFailure::TooLong(CONFIG_MAX));
        }
        text
    } else {
        bytes
    };
    String::from_utf8(text).map_err(|_| ReadFailure::Nonsense("text"))
}

fn options(text: &str) -> BTreeMap<String, ConfigOption> {
    text.lines()
        .filter_map(|line| {
            let (name, value) = line.strip_prefix("CONFIG_")?.split_once('=')?;
            let value = match value.trim() {
                "y" => ConfigOption::BuiltIn,
                "m" => ConfigOption::Module,
                _ => return None,
            };
            Some((name.to_owned(), value))
        })
        .collect()
}
