//! `doctor`: whether the host can migrate VFIO devices, check by check, with what would fix each.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;
use std::path::Path;

use rustix::fs::{MemfdFlags, memfd_create};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vfio_migration::{TlsDirectory, TlsError, TlsRemedy, TlsRole, TlsWarning};
use vfio_migration_device::host::{self, ConfigOption, KernelConfig, Roots};
use vfio_migration_types::{error_chain, rfc3339};

use crate::args::ask::DoctorCommand;
use crate::check_id::CheckId;
use crate::exit::{CliError, Exit};
use crate::output::{print, print_json};
use crate::units::format_size;
use crate::verbs::tls::remedy::fix;

/// CAP_IPC_LOCK (`include/uapi/linux/capability.h`): pins without limit.
const CAP_IPC_LOCK: u32 = 14;

/// What `doctor --json` prints.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct DoctorReport {
    /// Release of the kernel.
    pub(crate) kernel: Option<String>,
    /// A device of kernel VFIO can migrate in principle: nothing needed is missing.
    pub(crate) kernel_devices: bool,
    /// A device served over vfio-user can.
    pub(crate) vfio_user: bool,
    /// All checks, in the order of their text report.
    pub(crate) checks: Vec<HostCheck>,
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "Status")]
pub(crate) enum CheckStatus {
    /// As it should be.
    Ok,
    /// Migration works, but less well, or not for every device.
    Warn,
    /// Needed, and not there.
    Missing,
    /// It cannot be told.
    Unknown,
}

/// One check of the host.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Check")]
pub(crate) struct HostCheck {
    /// Stable name of the check.
    pub(crate) id: String,
    /// Whether the host has what migration needs here.
    pub(crate) status: CheckStatus,
    /// What the host has, in a sentence.
    pub(crate) found: String,
    /// What it means for migration.
    pub(crate) means: String,
    /// What fixes it: a command where one does; absent when nothing is to be fixed.
    pub(crate) fix: Option<String>,
}

pub(crate) fn run(options: &DoctorCommand) -> Result<Exit, CliError> {
    let roots = options.root.roots();
    let mut report = examine(&roots, options.memory.map(NonZeroU64::get));
    report.checks.extend(tls_creds(options));
    if options.json {
        print_json(&report)?
    } else {
        print(text(&report))?
    }
    Ok(if report.kernel_devices { Exit::Done } else { Exit::Failed })
}

fn examine(roots: &Roots, memory: Option<u64>) -> DoctorReport {
    let config = host::config(roots);
    let version = host::version(roots);
    let number = version.as_ref().and_then(|version| version.number);
    let release = version.map(|version| version.release);
    let mut checks = vec![kernel(release.as_deref(), number), config_file(&config)];
    checks.push(vfio(roots, &config));
    checks.extend(OPTIONS.iter().map(|option| option.check(roots, &config)));
    checks.push(variants(&config));
    checks.push(iommu(roots, &config));
    checks.extend(ways(roots, &config));
    checks.push(device_files(roots));
    checks.push(kvm(roots));
    checks.push(nested(roots));
    checks.push(hugepages(roots));
    checks.push(memlock(roots, memory));
    let memfd = memfd();
    let vfio_user = memfd.status == CheckStatus::Ok;
    checks.push(memfd);
    let missing = checks.iter().any(|check| check.status == CheckStatus::Missing);
    DoctorReport { kernel: release, kernel_devices: !missing, vfio_user, checks }
}

/// The certificates that a `vm` would be started with. A host that only sends, or only receives, has those for that alone.
fn tls_creds(options: &DoctorCommand) -> Option<HostCheck> {
    let dir = options.tls_creds.as_deref()?;
    let directory =
        TlsDirectory { pins: options.tls_pins.iter().copied().collect(), ..TlsDirectory::new(dir) };
    let examined = directory.examine();
    let mut wrong: Vec<String> = examined.errors().map(ToString::to_string).collect();
    let mut remedies: Vec<TlsRemedy> = examined.errors().filter_map(TlsError::remedy).collect();
    if let Some(TlsRemedy::Folder(folder)) =
        remedies.iter().find(|remedy| matches!(remedy, TlsRemedy::Folder(_))).cloned()
    {
        // Once, and not of each file.
        wrong = vec![format!("there is no folder {}", folder.display())];
        remedies = vec![TlsRemedy::Folder(folder)];
    }
    for TlsWarning { file, text, remedy } in &examined.warnings {
        let name = file.file_name().unwrap_or(file.as_os_str());
        wrong.push(format!("{}: {text}", name.display()));
        remedies.push(remedy.clone());
    }
    // A folder is wrong for each file in it.
    let mut told = BTreeSet::new();
    wrong.retain(|text| told.insert(text.clone()));
    let own = [(TlsRole::Server, &examined.server), (TlsRole::Client, &examined.client)];
    let until = own.into_iter().filter_map(|(role, own)| match own {
        Some(Ok(own)) => Some(format!("{} expires at {}", role.certificate_file(), rfc3339(own.not_after))),
        Some(Err(_)) | None => None,
    });
    let (status, found) =
        if wrong.is_empty() { (CheckStatus::Ok, until.collect()) } else { (CheckStatus::Warn, wrong) };
    let mut fixes: Vec<String> = Vec::new();
    for remedy in &remedies {
        let fix = fix(remedy, dir);
        if !fixes.contains(&fix) {
            fixes.push(fix);
        }
    }
    let means = "guests move over TLS with these alone";
    Some(check(CheckId::TlsCreds, status, found.join("; "), means, Some(&fixes.join("; "))))
}

fn check(
    id: CheckId,
    status: CheckStatus,
    found: impl Into<String>,
    means: &str,
    fix: Option<&str>,
) -> HostCheck {
    let fix = fix.filter(|_| status != CheckStatus::Ok).map(Into::into);
    HostCheck { id: id.name().into(), status, found: found.into(), means: means.into(), fix }
}

/// The v2 migration uAPI came with 5.18, PRE_COPY and the size estimate with 6.2.
fn kernel(release: Option<&str>, number: Option<(u32, u32)>) -> HostCheck {
    let status = match number {
        None => CheckStatus::Unknown,
        Some(number) if number < (5, 18) => CheckStatus::Missing,
        Some(number) if number < (6, 2) => CheckStatus::Warn,
        Some(_) => CheckStatus::Ok,
    };
    let means = "device migration needs 5.18; pre-copy of device state needs 6.2";
    check(
        CheckId::KernelVersion,
        status,
        release.unwrap_or("not said"),
        means,
        Some("install a newer kernel"),
    )
}

fn config_file(config: &KernelConfig) -> HostCheck {
    let (status, found) = match &config.source {
        Some(source) => (CheckStatus::Ok, source.display().to_string()),
        None => (CheckStatus::Unknown, "neither /proc/config.gz nor /boot/config-RELEASE can be read".into()),
    };
    let means = "without it the options below are unknown, and what is loaded decides";
    check(
        CheckId::KernelConfig,
        status,
        found,
        means,
        Some("install the kernel's package, or modprobe configs"),
    )
}

fn vfio(roots: &Roots, config: &KernelConfig) -> HostCheck {
    let option = config.option("VFIO");
    let (status, found) = match (host::has_module(roots, "vfio"), option, host::module_file(roots, "vfio")) {
        (true, ..) => (CheckStatus::Ok, "loaded"),
        (false, ConfigOption::BuiltIn, _) => (CheckStatus::Ok, "built in"),
        (false, ConfigOption::Off, _) => (CheckStatus::Missing, "the kernel is built without it"),
        (false, _, Some(true)) => (CheckStatus::Warn, "a module, not loaded"),
        (false, ConfigOption::Module, None) => (CheckStatus::Warn, "a module, not loaded"),
        (false, ConfigOption::Module, Some(false)) => {
            (CheckStatus::Missing, "a module that is not installed")
        }
        (false, ConfigOption::Unknown, Some(false) | None) => {
            (CheckStatus::Missing, "not loaded, and no module of it")
        }
    };
    let fix = match status {
        CheckStatus::Warn => "modprobe vfio-pci",
        _ => "install a kernel with CONFIG_VFIO, and its modules",
    };
    check(CheckId::Vfio, status, found, "VFIO itself: without it no device of the kernel migrates", Some(fix))
}

/// An option of the kernel that migration is better with.
struct Wanted {
    id: CheckId,
    option: &'static str,
    /// The module that is there with it: what is loaded speaks louder than a configuration. Empty for a part of another.
    module: &'static str,
    means: &'static str,
}

const OPTIONS: [Wanted; 6] = [
    Wanted {
        id: CheckId::ConfigVfioPci,
        option: "VFIO_PCI",
        module: "vfio_pci",
        means: "PCI functions as VFIO devices",
    },
    Wanted {
        id: CheckId::ConfigIommufd,
        option: "IOMMUFD",
        module: "iommufd",
        means: "without it no dirty tracking by the IOMMU, and DMA logs of devices may not report",
    },
    Wanted {
        id: CheckId::ConfigVfioDeviceCdev,
        option: "VFIO_DEVICE_CDEV",
        module: "",
        means: "a file per device, which dirty tracking by the IOMMU needs",
    },
    Wanted {
        id: CheckId::ConfigIommufdDriver,
        option: "IOMMUFD_DRIVER",
        module: "iova_bitmap",
        means: "without it DMA_LOGGING_REPORT answers EOPNOTSUPP, though logging starts",
    },
    Wanted { id: CheckId::ConfigVfioMdev, option: "VFIO_MDEV", module: "mdev", means: "mediated devices" },
    Wanted { id: CheckId::ConfigKvm, option: "KVM", module: "kvm", means: "guests on KVM" },
];

impl Wanted {
    fn check(&self, roots: &Roots, config: &KernelConfig) -> HostCheck {
        let option = config.option(self.option);
        let there = if self.module.is_empty() {
            // Only a kernel with it makes them (VFIO_DEVICE_CDEV).
            host::list(&roots.dev.join("vfio/devices")).is_ok_and(|files| !files.is_empty())
        } else {
            host::has_module(roots, self.module)
        };
        if there && matches!(option, ConfigOption::Off | ConfigOption::Unknown) {
            let found = match option {
                ConfigOption::Off => "there, though the kernel's configuration has it off",
                _ => "there",
            };
            return check(self.id, CheckStatus::Ok, found, self.means, None);
        }
        let status = match option {
            ConfigOption::BuiltIn | ConfigOption::Module => CheckStatus::Ok,
            ConfigOption::Off => CheckStatus::Warn,
            ConfigOption::Unknown => CheckStatus::Unknown,
        };
        let fix = format!("use a kernel with CONFIG_{}", self.option);
        check(self.id, status, option.to_string(), self.means, Some(&fix))
    }
}

/// Drivers with migration in Linux 7.3 (`drivers/vfio/pci`).
const VARIANTS: [&str; 6] =
    ["MLX5_VFIO_PCI", "HISI_ACC_VFIO_PCI", "PDS_VFIO_PCI", "QAT_VFIO_PCI", "VIRTIO_VFIO_PCI", "XE_VFIO_PCI"];

fn variants(config: &KernelConfig) -> HostCheck {
    let here: Vec<&str> = VARIANTS
        .into_iter()
        .filter(|name| matches!(config.option(name), ConfigOption::BuiltIn | ConfigOption::Module))
        .collect();
    let status = match (&config.source, here.is_empty()) {
        (None, _) => CheckStatus::Unknown,
        (_, true) => CheckStatus::Warn,
        (_, false) => CheckStatus::Ok,
    };
    let found = match status {
        CheckStatus::Unknown => "unknown".into(),
        CheckStatus::Warn => format!("none of {}", VARIANTS.join(", ")),
        _ => here.join(", "),
    };
    let means = "plain vfio-pci has no migration: a PCI function needs a variant driver made for it";
    check(
        CheckId::ConfigVariantDrivers,
        status,
        found,
        means,
        Some("use a kernel with the variant driver of your device"),
    )
}

fn iommu(roots: &Roots, config: &KernelConfig) -> HostCheck {
    let groups = host::list(&roots.sys.join("kernel/iommu_groups"));
    let mdev = host::has_module(roots, "mdev")
        || matches!(config.option("VFIO_MDEV"), ConfigOption::BuiltIn | ConfigOption::Module);
    let (status, found) = match groups {
        Ok(groups) if !groups.is_empty() => (CheckStatus::Ok, format!("{} groups", groups.len())),
        Ok(_) if mdev => (CheckStatus::Warn, "no groups".into()),
        Ok(_) => (CheckStatus::Missing, "no groups".into()),
        Err(error) => (CheckStatus::Unknown, error_chain(&error)),
    };
    let means = "without an IOMMU no PCI function is given to a guest; mediated devices may be";
    let fix = "turn VT-d or AMD-Vi on in the firmware, add intel_iommu=on to the kernel's command line, and restart; in a virtual machine, \
               have its host give it an IOMMU";
    check(CheckId::IommuGroups, status, found, means, Some(fix))
}

fn node(id: CheckId, path: &Path, means: &str, load: &str) -> HostCheck {
    let shown = path.display();
    match host::access_both_ways(path) {
        Ok(()) => check(id, CheckStatus::Ok, format!("{shown} may be opened"), means, None),
        Err(errno) if errno == rustix::io::Errno::NOENT => {
            check(id, CheckStatus::Warn, format!("there is no {shown}"), means, Some(load))
        }
        Err(errno) => {
            let fix = format!("setfacl -m u:{}:rw {shown}", user());
            check(id, CheckStatus::Warn, format!("{shown}: {errno}"), means, Some(&fix))
        }
    }
}

/// The two ways to memory, of which one is enough.
fn ways(roots: &Roots, config: &KernelConfig) -> [HostCheck; 2] {
    let load = |name: &str, module: &str| match (config.option(name), host::module_file(roots, module)) {
        (ConfigOption::Off, _) | (ConfigOption::Unknown, Some(false)) => {
            format!("use a kernel with CONFIG_{name}: this one has none")
        }
        (ConfigOption::Unknown, None) => {
            format!("modprobe {module}, or, where there is no such module, a kernel with CONFIG_{name}")
        }
        _ => format!("modprobe {module}"),
    };
    let means = "containers of IOMMU groups";
    let container = node(CheckId::DevVfio, &roots.dev.join("vfio/vfio"), means, &load("VFIO", "vfio"));
    let means = "iommufd, and dirty tracking by the IOMMU";
    let iommufd = node(CheckId::DevIommu, &roots.dev.join("iommu"), means, &load("IOMMUFD", "iommufd"));
    let mut both = [container, iommufd];
    if host::has_module(roots, "vfio") && both.iter().all(|check| check.status != CheckStatus::Ok) {
        for check in &mut both {
            check.status = CheckStatus::Missing;
            check.means.push_str("; one of the two is needed");
        }
    }
    both
}

/// The files that the devices are opened by, and whether the caller may.
fn device_files(roots: &Roots) -> HostCheck {
    let devices = host::scan(roots).devices;
    let bound = devices.iter().filter(|device| device.vfio);
    // What comes after the first has a line of its own.
    let files: BTreeMap<_, _> =
        bound.filter_map(|device| device.needs.first()).map(|file| (&file.path, file.refusal)).collect();
    let refused: Vec<String> = files
        .iter()
        .filter(|(_, refusal)| refusal.is_some())
        .map(|(path, _)| path.display().to_string())
        .collect();
    let means = "the VMM opens one of them for each device";
    match (files.len(), refused.is_empty()) {
        (0, _) => {
            let fix = "bind a device to VFIO: vfio-migrate devices says how";
            check(CheckId::DeviceFiles, CheckStatus::Warn, "no device is bound to VFIO", means, Some(fix))
        }
        (n, true) => {
            check(CheckId::DeviceFiles, CheckStatus::Ok, format!("{n}, all may be opened"), means, None)
        }
        (_, false) => {
            let fix = format!("setfacl -m u:{}:rw {}", user(), refused.join(" "));
            check(
                CheckId::DeviceFiles,
                if refused.len() == files.len() { CheckStatus::Missing } else { CheckStatus::Warn },
                format!("may not be opened: {}", refused.join(", ")),
                means,
                Some(&fix),
            )
        }
    }
}

/// The caller, whom a fix lets in: meant to be the user that the VMM has.
fn user() -> u32 {
    rustix::process::geteuid().as_raw()
}

fn kvm(roots: &Roots) -> HostCheck {
    let path = roots.dev.join("kvm");
    let means = "guests on KVM; without it there is only the software guest of the reference VMM";
    // Only the file of this very host can be asked.
    if path == Path::new("/dev/kvm") {
        return match vfio_migration_vmm::machine::kvm_answers() {
            Ok(()) => check(CheckId::DevKvm, CheckStatus::Ok, "/dev/kvm answers", means, None),
            Err(error) => check(
                CheckId::DevKvm,
                CheckStatus::Warn,
                error_chain(&error),
                means,
                Some("modprobe kvm_intel or kvm_amd; setfacl -m u:USER:rw /dev/kvm"),
            ),
        };
    }
    node(CheckId::DevKvm, &path, means, "modprobe kvm_intel or kvm_amd")
}

fn nested(roots: &Roots) -> HostCheck {
    let setting = |module: &str| {
        host::read_text(&roots.sys.join(format!("module/{module}/parameters/nested")), 16).ok()
    };
    let means = "guests that run KVM themselves; the tests on a booted kernel do not need it";
    match ["kvm_intel", "kvm_amd"].into_iter().find_map(setting).as_deref() {
        Some("Y" | "1") => check(CheckId::KvmNested, CheckStatus::Ok, "on", means, None),
        Some(_) => check(
            CheckId::KvmNested,
            CheckStatus::Warn,
            "off",
            means,
            Some("modprobe -r kvm_amd; modprobe kvm_amd nested=1"),
        ),
        None => check(
            CheckId::KvmNested,
            CheckStatus::Unknown,
            "neither kvm_intel nor kvm_amd is loaded",
            means,
            None,
        ),
    }
}

fn hugepages(roots: &Roots) -> HostCheck {
    let dir = roots.sys.join("kernel/mm/hugepages");
    let mut reserved = Vec::new();
    for size in host::list(&dir).unwrap_or_default() {
        let count = host::read_text(&dir.join(&size).join("nr_hugepages"), 64).ok();
        if let Some(count) = count.and_then(|count| count.parse::<u64>().ok()).filter(|count| *count > 0) {
            reserved.push(format!("{count} of {}", size.trim_start_matches("hugepages-")));
        }
    }
    let transparent =
        host::read_text(&roots.sys.join("kernel/mm/transparent_hugepage/shmem_enabled"), 256).ok();
    let on = transparent.is_some_and(|text| !text.contains("[never]") && !text.contains("[deny]"));
    let means = "mapping guest RAM for a device takes a call per page: with large pages it is much faster";
    match (reserved.is_empty(), on) {
        (false, _) => check(CheckId::Hugepages, CheckStatus::Ok, reserved.join(", "), means, None),
        (true, true) => {
            check(CheckId::Hugepages, CheckStatus::Ok, "transparent ones for shared memory", means, None)
        }
        (true, false) => {
            check(CheckId::Hugepages, CheckStatus::Warn, "none", means, Some("sysctl vm.nr_hugepages=N"))
        }
    }
}

/// The limit on locked memory against a guest's RAM, or, where no guest is named, against the host's.
fn memlock(roots: &Roots, guest: Option<u64>) -> HostCheck {
    let means = "guest RAM is pinned while a device of PCI is attached, once for all of them, and counted against this limit";
    let read = |name: &str| host::read_text(&roots.proc.join(name), 1 << 16).unwrap_or_default();
    let status = read("self/status");
    let capabilities = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let capabilities = capabilities.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    // A capability in a user namespace of one's own counts for nothing here.
    let map = read("self/uid_map");
    let initial = map.is_empty() || map.split_whitespace().eq(["0", "0", "4294967295"]);
    if capabilities >> CAP_IPC_LOCK & 1 == 1 && initial {
        return check(
            CheckId::Memlock,
            CheckStatus::Ok,
            "no limit for this caller (CAP_IPC_LOCK)",
            means,
            None,
        );
    }
    let total = read("meminfo");
    let total = total.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next());
    let host = total.and_then(|kib| kib.parse::<u64>().ok()).and_then(|kib| kib.checked_mul(1024));
    let (wanted, whose) = match guest {
        Some(guest) => (Some(guest), "a guest"),
        None => (host, "a host"),
    };
    let fix = match guest {
        Some(guest) => {
            let kib = guest.div_ceil(1024);
            format!("ulimit -l {kib}, or LimitMEMLOCK={kib}K in the service")
        }
        None => "ulimit -l unlimited, or LimitMEMLOCK=infinity in the service".into(),
    };
    let limits = read("self/limits");
    let limit = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"));
    let limit = limit.and_then(|line| line.split_whitespace().next());
    let bytes = limit.and_then(|bytes| bytes.parse::<u64>().ok());
    match (limit, bytes.zip(wanted)) {
        (Some("unlimited"), _) => check(CheckId::Memlock, CheckStatus::Ok, "unlimited", means, None),
        (_, Some((limit, wanted))) => {
            let found = format!("{} for {whose} of {}", format_size(limit), format_size(wanted));
            let status = match guest {
                _ if limit >= wanted => CheckStatus::Ok,
                Some(_) => CheckStatus::Missing,
                None => CheckStatus::Warn,
            };
            check(CheckId::Memlock, status, found, means, Some(&fix))
        }
        (Some(limit), None) => {
            check(CheckId::Memlock, CheckStatus::Warn, format!("{limit} bytes"), means, Some(&fix))
        }
        (None, None) => check(CheckId::Memlock, CheckStatus::Unknown, "not said", means, Some(&fix)),
    }
}

fn memfd() -> HostCheck {
    let means = "all that a device served over vfio-user needs";
    match memfd_create("vfio-migrate-doctor", MemfdFlags::CLOEXEC) {
        Ok(_) => check(CheckId::Memfd, CheckStatus::Ok, "works", means, None),
        Err(errno) => check(
            CheckId::Memfd,
            CheckStatus::Missing,
            format!("refused: {errno}"),
            means,
            Some("use Linux 3.17 or later, and allow memfd_create"),
        ),
    }
}

/// The report for people.
fn text(report: &DoctorReport) -> String {
    let mut text = String::new();
    let width = report.checks.iter().map(|check| check.id.len()).max().unwrap_or(0);
    for check in &report.checks {
        let status = match check.status {
            CheckStatus::Ok => "ok",
            CheckStatus::Warn => "warn",
            CheckStatus::Missing => "missing",
            CheckStatus::Unknown => "unknown",
        };
        text.push_str(&format!("{status:7}  {:width$}  {}\n", check.id, check.found));
        if check.status != CheckStatus::Ok {
            text.push_str(&format!("{:7}  {:width$}  {}\n", "", "", check.means));
            if let Some(fix) = &check.fix {
                text.push_str(&format!("{:7}  {:width$}  fix: {fix}\n", "", ""));
            }
        }
    }
    let word = |possible| if possible { "possible in principle" } else { "not possible" };
    text.push_str(&format!("\nkernel VFIO devices: {}\n", word(report.kernel_devices)));
    text.push_str(&format!("vfio-user devices: {}\n", word(report.vfio_user)));
    text
}
