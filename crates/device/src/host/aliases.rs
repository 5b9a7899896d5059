//! The VFIO variant driver made for a function: `alias vfio_pci:v… MODULE` lines in `modules.alias`, which
//! `drivers/vfio/pci` drivers have by `PCI_DRIVER_OVERRIDE_DEVICE_VFIO`.

use super::files::{Roots, read_text};
use super::kernel;

/// Longest `modules.alias` that is read, in bytes.
const ALIASES_MAX: u64 = 32 << 20;

/// The pairs of pattern and module, of `vfio_pci:` aliases.
#[derive(Clone, Debug, Default)]
pub(super) struct Variants(Vec<(String, String)>);

impl Variants {
    pub(super) fn read(roots: &Roots) -> Self {
        let release = kernel::version(roots).and_then(|version| kernel::one_name(version.release));
        let Some(release) = release else { return Self::default() };
        let path = roots.modules.join(release).join("modules.alias");
        Self::parse(&read_text(&path, ALIASES_MAX).unwrap_or_default())
    }

    fn parse(text: &str) -> Self {
        let line = |line: &str| {
            let (pattern, module) = line.strip_prefix("alias vfio_pci:")?.split_once(' ')?;
            // The command that is shown to a person is made of it.
            let plain =
                module.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-');
            (plain && !module.is_empty()).then(|| (pattern.to_owned(), module.to_owned()))
        };
        Self(text.lines().filter_map(line).collect())
    }

    /// The variant driver for a function of this modalias (`pci:v…`). The general `vfio-pci` is none.
    pub(super) fn of(&self, modalias: &str) -> Option<&str> {
        let name = modalias.strip_prefix("pci:")?;
        let made_for = |(pattern, module): &&(String, String)| {
            !matches!(module.as_str(), "vfio_pci" | "vfio-pci") && matches(pattern, name)
        };
        self.0.iter().find(made_for).map(|(_, module)| module.as_str())
    }
}

/// Whether `name` fits a pattern in which `*` matches anything.
fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else { return false };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else { return rest.is_empty() };
    for part in parts {
        let Some((_, after)) = rest.split_once(part) else { return false };
        rest = after;
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variant_is_found_by_its_alias_and_the_general_driver_is_none() {
        let variants = Variants::parse(
            "# aliases\nalias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci\n\
             alias pci:v000015B3d0000101Esv*sd*bc*sc*i* mlx5_core\n\
             alias vfio_pci:v000015B3d0000101Esv*sd*bc*sc*i* mlx5_vfio_pci\n\
             alias vfio_pci:v00001234d00000001sv*sd*bc*sc*i* evil;reboot\n",
        );
        let modalias = |ids: &str| format!("pci:{ids}sv000015B3sd00000001bc02sc00i00");
        assert_eq!(variants.of(&modalias("v000015B3d0000101E")), Some("mlx5_vfio_pci"));
        assert_eq!(variants.of(&modalias("v000015B3d0000101F")), None);
        assert_eq!(variants.of(&modalias("v00001234d00000001")), None);
    }

    #[test]
    fn patterns() {
        for (pattern, name, fits) in [
            ("ab", "ab", true),
            ("ab", "abc", false),
            ("a*c", "abc", true),
            ("a*c", "ab", false),
            ("*", "", true),
            ("a*b*c", "axbxc", true),
            ("a*b*c", "axc", false),
        ] {
            assert_eq!(matches(pattern, name), fits, "{pattern} {name}");
        }
    }
}
