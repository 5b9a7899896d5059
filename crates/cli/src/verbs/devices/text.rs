//! The report of `devices` for people.

use super::report::{CanMigrate, DeviceEntry, DevicesReport, DirtyTrackingKind, RegionReport};
use crate::units::format_size;

pub(super) fn text(report: &DevicesReport) -> String {
    let mut text = String::new();
    let width = report.devices.iter().map(|device| device.name.chars().count()).max().unwrap_or(0);
    for device in &report.devices {
        let count = |n: Option<u32>| n.map_or("?".to_owned(), |n| n.to_string());
        let or_dash = |word: &Option<String>| word.clone().unwrap_or_else(|| "-".into());
        let irqs = device.interrupts;
        let migration = match (device.migration, &device.flags) {
            (CanMigrate::Yes, Some(flags)) => flags.join(" "),
            (CanMigrate::Yes, None) => "yes".into(),
            (CanMigrate::No, _) => "no".into(),
            (CanMigrate::Unknown, _) if device.kind == "other" => {
                "unknown (only PCI devices can be asked)".into()
            }
            (CanMigrate::Unknown, _) => "unknown (the device was not opened; --probe does)".into(),
        };
        text.push_str(&format!(
            "{:width$}  {:9}  {:20}  {:9}  group {:4}  intx {} msi {} msix {}  migration: {migration}\n",
            device.name,
            device.kind,
            or_dash(&device.driver),
            or_dash(&device.id),
            device.iommu_group.map_or("-".into(), |group| group.to_string()),
            count(irqs.intx),
            count(irqs.msi),
            count(irqs.msix),
        ));
        text.push_str(&asked(device));
        for file in &device.files {
            let refusal = file.refusal.as_ref().map(|refusal| format!(": {refusal}")).unwrap_or_default();
            text.push_str(&format!("    opened by {}{refusal}\n", file.path));
        }
        for why in &device.why_not {
            text.push_str(&format!("    {}: {}; to change it: {}\n", why.code, why.text, why.change));
            for command in &why.commands {
                text.push_str(&format!("        {command}\n"));
            }
        }
    }
    if report.devices.is_empty() {
        text.push_str(
            "no VFIO device, and none that could be one; `vfio-migrate doctor` looks at the host\n",
        );
    }
    for problem in &report.problems {
        text.push_str(&format!("not looked at: {problem}\n"));
    }
    text
}

/// The facts that an asked device reported.
fn asked(device: &DeviceEntry) -> String {
    let mut text = String::new();
    if let Some(regions) = &device.regions {
        let shown = |region: &RegionReport| {
            let name = region.name.clone().unwrap_or_else(|| format!("region {}", region.index));
            format!("{name} {}", format_size(region.size))
        };
        let regions: Vec<String> = regions.iter().map(shown).collect();
        text.push_str(&format!("    regions: {}\n", regions.join(", ")));
    }
    if device.migration != CanMigrate::Yes {
        return text;
    }
    let size = device.stop_copy_size.map_or("not said".into(), format_size);
    let now = device.state.as_deref().unwrap_or("?");
    text.push_str(&format!("    state: {now}, {size} to save while stopped\n"));
    let log = match device.dirty_tracking {
        DirtyTrackingKind::DeviceLog => "by the device",
        DirtyTrackingKind::Iommufd => "by the IOMMU",
        DirtyTrackingKind::Type1 => "by the container",
        DirtyTrackingKind::None => "none",
        DirtyTrackingKind::Unknown => "unknown",
    };
    let why = device.dirty_tracking_why.as_deref().unwrap_or("not said");
    text.push_str(&format!("    dirty tracking: {log}: {why}\n"));
    text
}
