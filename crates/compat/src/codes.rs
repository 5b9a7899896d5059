//! The one table of reasons: every code with what it means, what it does to the verdict, and who can change it.
//!
//! Codes are stable: they may be added to, but one never changes its meaning.

use schemars::JsonSchema;
use serde::Serialize;

use crate::severity::{Severity, WhoCanFix};

/// What a code stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Explanation {
    /// Stable name of the reason, kebab-case: `dirty-all`.
    pub code: &'static str,
    /// What it does to the verdict, unless a policy allows it.
    pub severity: Severity,
    /// Who can change it.
    pub fix: WhoCanFix,
    /// What was found when a report has this code, in a sentence.
    pub meaning: &'static str,
    /// What it usually comes from.
    pub cause: &'static str,
    /// What to do about it.
    pub remedy: &'static str,
}

/// A code of the table.
pub(crate) type ReasonCode = &'static Explanation;

/// What `code` stands for.
pub fn explain(code: &str) -> Option<Explanation> {
    TABLE.iter().find(|entry| entry.code == code).map(|entry| **entry)
}

/// Every code, in the order of the table.
pub fn codes() -> impl Iterator<Item = &'static str> {
    TABLE.iter().map(|entry| entry.code)
}

/// Those of them that no two manifests give, but a session: the machine behind the manifest, the owner, a device that is tried.
pub fn session_codes() -> impl Iterator<Item = &'static str> {
    SessionCode::ALL.iter().filter(|code| !code.is_of_manifests()).map(|code| code.explanation().code)
}

/// A reason that a session gives beside those of the rules. There is none without an entry in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SessionCode {
    /// `manifest`: a manifest that cannot be read, or cannot be told.
    Manifest,
    /// `protocol-version`: no version that both sides speak.
    ProtocolVersion,
    /// `no-expectation`: it is not known whom to expect.
    NoExpectation,
    /// `other-source`: other sources are expected.
    OtherSource,
    /// `may-not-ask`: the source may only move.
    MayNotAsk,
    /// `may-not-move`: the source may only ask.
    MayNotMove,
    /// `other-vm`: another VM is expected.
    OtherVm,
    /// `old-epoch`: the VM is expected under a later epoch.
    OldEpoch,
    /// `too-large`: less RAM is expected.
    TooLarge,
    /// `too-many-attempts`: no further attempt is expected.
    TooManyAttempts,
    /// `too-many-arrivals`: no further guest is expected.
    TooManyArrivals,
    /// `vm-id`: the machine that was built is another VM.
    VmId,
    /// `ownership`: the journal says that the guest is somebody else's.
    Ownership,
    /// `state-dir`: the state directory cannot be used.
    StateDir,
    /// `machine`: the VMM cannot build the machine, or has a reason of its own to refuse it.
    Machine,
    /// `dirty-uncovered`: writes to a part of RAM that nobody logs.
    DirtyUncovered,
    /// `pci-left-behind`: the VMM's PCI functions that are no VFIO devices do not move.
    PciLeftBehind,
    /// `device-failed`: a device could not do what was tried with it.
    DeviceFailed,
    /// `device-missing`: the machine lacks a device.
    DeviceMissing,
    /// `device-not-migratable`: a device cannot migrate.
    DeviceNotMigratable,
    /// `rehearsal-obstacle`: a migration would not come to its end.
    RehearsalObstacle,
    /// `rehearsal-not-tried`: what a rehearsal left out.
    RehearsalNotTried,
}

impl SessionCode {
    const ALL: [Self; 22] = [
        Self::Manifest,
        Self::ProtocolVersion,
        Self::NoExpectation,
        Self::OtherSource,
        Self::MayNotAsk,
        Self::MayNotMove,
        Self::OtherVm,
        Self::OldEpoch,
        Self::TooLarge,
        Self::TooManyAttempts,
        Self::TooManyArrivals,
        Self::VmId,
        Self::Ownership,
        Self::StateDir,
        Self::Machine,
        Self::DirtyUncovered,
        Self::PciLeftBehind,
        Self::DeviceFailed,
        Self::DeviceMissing,
        Self::DeviceNotMigratable,
        Self::RehearsalObstacle,
        Self::RehearsalNotTried,
    ];

    /// The rules give it as well.
    fn is_of_manifests(self) -> bool {
        matches!(self, Self::DeviceMissing | Self::DeviceNotMigratable)
    }

    /// The code, as reports have it: `other-vm`.
    pub fn name(self) -> &'static str {
        self.explanation().code
    }

    pub(crate) fn explanation(self) -> ReasonCode {
        match self {
            Self::Manifest => &MANIFEST,
            Self::ProtocolVersion => &PROTOCOL_VERSION,
            Self::NoExpectation => &NO_EXPECTATION,
            Self::OtherSource => &OTHER_SOURCE,
            Self::MayNotAsk => &MAY_NOT_ASK,
            Self::MayNotMove => &MAY_NOT_MOVE,
            Self::OtherVm => &OTHER_VM,
            Self::OldEpoch => &OLD_EPOCH,
            Self::TooLarge => &TOO_LARGE,
            Self::TooManyAttempts => &TOO_MANY_ATTEMPTS,
            Self::TooManyArrivals => &TOO_MANY_ARRIVALS,
            Self::VmId => &VM_ID,
            Self::Ownership => &OWNERSHIP,
            Self::StateDir => &STATE_DIR,
            Self::Machine => &MACHINE,
            Self::DirtyUncovered => &DIRTY_UNCOVERED,
            Self::PciLeftBehind => &PCI_LEFT_BEHIND,
            Self::DeviceFailed => &DEVICE_FAILED,
            Self::DeviceMissing => &DEVICE_MISSING,
            Self::DeviceNotMigratable => &NOT_MIGRATABLE,
            Self::RehearsalObstacle => &REHEARSAL_OBSTACLE,
            Self::RehearsalNotTried => &REHEARSAL_NOT_TRIED,
        }
    }
}

macro_rules! table {
    ($($name:ident, $code:literal, $severity:ident, $fix:ident: $meaning:literal, $cause:literal, $remedy:literal;)*) => {
        $(pub(crate) static $name: Explanation = Explanation {
            code: $code,
            severity: Severity::$severity,
            fix: WhoCanFix::$fix,
            meaning: $meaning,
            cause: $cause,
            remedy: $remedy,
        };)*
        static TABLE: &[ReasonCode] = &[$(&$name),*];
    };
}

table! {
    // The machine.
    MACHINE_KIND, "machine-kind", No, Configuration:
        "The machines are of different kinds.",
        "The destination was built by another VMM, or by a version of it with another machine type.",
        "Build the destination with the source's machine type.";
    ACCELERATOR, "accelerator", No, Host:
        "Different hypervisors are behind the vCPUs, and their state does not fit each other.",
        "The destination host has no KVM, or may not use it.",
        "Give the destination the source's accelerator.";
    VCPUS, "vcpus", No, Configuration:
        "The machines have different numbers of vCPUs.",
        "The destination was configured by hand.",
        "Give the destination as many vCPUs as the source has.";
    RAM_LAYOUT, "ram-layout", No, Configuration:
        "RAM differs in size, place or order.",
        "The destination was given another amount of memory.",
        "Give the destination the source's memory.";
    CPU_FEATURES, "cpu-features", No, Host:
        "The destination's CPU lacks features that the guest was given.",
        "An older CPU, or features that the host's firmware or kernel has switched off.",
        "Choose a host with these features, or start guests with those only that the whole pool has.";
    SECTION_UNKNOWN, "section-unknown", No, Host:
        "The destination does not know a section of machine state.",
        "An older VMM at the destination.",
        "Bring the destination's VMM to the source's version.";
    SECTION_OLDER, "section-older", No, Host:
        "The destination knows only an older version of a section of machine state.",
        "An older VMM at the destination.",
        "Bring the destination's VMM to the source's version.";

    // Which device is which.
    DEVICE_DUPLICATE, "device-duplicate", No, Configuration:
        "One side has two devices of one name.",
        "A manifest put together by hand.",
        "Give each device a name of its own.";
    DEVICE_MISSING, "device-missing", No, Configuration:
        "The destination lacks a device.",
        "It was not configured, or has another name there.",
        "Add the device, or map its name to that of the destination's.";
    DEVICE_EXTRA, "device-extra", No, Configuration:
        "The destination has a device that the guest does not know.",
        "It was configured in addition, or has another name at the source.",
        "Remove the device, or map the source's name to it.";
    MAP_SOURCE, "map-source", No, Configuration:
        "The device map names a device that the source does not have.",
        "A map that was made for another VM, or a slip in a name.",
        "Correct the map.";
    MAP_DESTINATION, "map-destination", No, Configuration:
        "The device map names a device that the destination does not have.",
        "A map that was made for another host, or a slip in a name.",
        "Correct the map, or add the device.";
    MAP_TWICE, "map-twice", No, Configuration:
        "Two devices of the source come to stand on one of the destination.",
        "A map that names a destination twice, or names one that another device has by its name.",
        "Correct the map.";

    DEVICE_ADDRESS, "device-address", No, Configuration:
        "The guest would find the device at another address of its PCI bus.",
        "The devices were given in another order, or other slots were asked for.",
        "Give the destination's device the address that it has at the source: with `vm`, the same order of --device, or slot=N behind it.";
    UNKNOWN_DEVICE_ADDRESS, "unknown-device-address", Warning, Configuration:
        "One side does not say where on its PCI bus the guest sees the device.",
        "A VMM, or a version of one, that leaves it out of its manifest; or a manifest put together by hand.",
        "See to it yourself that the device has the same address at both sides.";

    // The model.
    DEVICE_MODEL, "device-model", No, Device:
        "The models differ, or only one side declares one.",
        "Devices of different makers or generations, or a driver of a version that declares no model.",
        "Choose a device of the source's model.";
    DEVICE_MODEL_MAJOR, "device-model-major", No, Device:
        "The models' versions are of different majors, and none is declared to load the other.",
        "A change of the device's state that its maintainer made on purpose.",
        "Choose a device of the source's major version.";
    DEVICE_MODEL_VERSION, "device-model-version", No, Device:
        "The destination's version of the model is older than the source's, and it does not declare that it loads the newer.",
        "The destination was not brought up to date yet.",
        "Update the destination's device, or create devices at the version that the whole pool loads (a baseline).";
    UNKNOWN_MODEL_VERSION, "unknown-model-version", Warning, Device:
        "One side does not say which version of the model it has.",
        "An older driver or server, or a site file that leaves it out.",
        "Declare the version.";
    DEVICE_PARAMETER, "device-parameter", No, Configuration:
        "The destination does not take a parameter's value.",
        "The destination's device was created with another value, or its hardware is smaller.",
        "Create the destination's device with the source's value.";
    DEVICE_PARAMETER_UNKNOWN, "device-parameter-unknown", No, Device:
        "The destination does not know a parameter that the source has switched on.",
        "An older device at the destination.",
        "Update the destination's device, or create devices with the parameter at its off-value.";
    DEVICE_PARAMETER_NEW, "device-parameter-new", No, Configuration:
        "The destination has switched on a parameter that the source does not know.",
        "A newer device at the destination, created with its defaults.",
        "Create the destination's device with the parameter at its off-value.";

    // Layout.
    DEVICE_PCI_IDENTITY, "device-pci-identity", No, Device:
        "The PCI identities differ.",
        "Different hardware, or a server that presents another function.",
        "Choose a device with the source's ids.";
    DEVICE_PCI_REVISION, "device-pci-revision", No, Device:
        "Only the PCI revisions differ, and the model is declared to be the same. The guest would see another revision from one moment to the next.",
        "Another stepping of the same hardware.",
        "If the guest's driver does not look at the revision: a rule of both sides that leaves it out (config_mask `ignore 0x8+1`, or the receiver's --config-rule 0x8+1=ignore).";
    CONFIG_EXEMPT, "config-exempt", Warning, Device:
        "Config space differs in bytes that a rule leaves out: the guest sees those of the destination.",
        "A rule of the site, of the device's maker, or of the receiver's --config-rule.",
        "Nothing, if the guest's driver does not look at these bytes.";
    CONFIG_UNTOLD, "config-untold", Note, Configuration:
        "A rule has bytes of config space compared that no manifest tells, so whether they are equal is found out when the guest is paused.",
        "A rule of the site, of the device's maker, or of the receiver's --config-rule that says `compare`.",
        "Nothing; `rehearse --pause` finds it out and undoes everything.";
    UNKNOWN_PCI_IDENTITY, "unknown-pci-identity", Warning, Device:
        "One side does not say what its PCI identity is.",
        "A manifest made without the device at hand, or of one that nobody opened.",
        "Describe the device where it is, with --probe where nobody uses it.";
    NO_PCI_IDENTITY, "no-pci-identity", Warning, Device:
        "The device has BARs or message interrupts, so it is a PCI function, and neither side says what its PCI identity is.",
        "A manifest made by hand, or by a program that leaves the identity out: two devices of different vendors would look the same.",
        "Describe the device where it is, with --probe where nobody uses it.";
    DEVICE_REGIONS, "device-regions", No, Device:
        "The regions differ in number, size or access.",
        "BARs of another size: other hardware, or a resizable BAR that was set otherwise.",
        "Choose a device with the source's regions, or set its BARs to the same size.";
    UNKNOWN_REGIONS, "unknown-regions", Warning, Device:
        "One side does not say what regions it has.",
        "A manifest made without the device at hand, or of one that nobody opened.",
        "Describe the device where it is, with --probe where nobody uses it.";
    DEVICE_IRQS, "device-irqs", No, Device:
        "The numbers of interrupt vectors differ.",
        "Another MSI-X count: the device was created with other queues, or its firmware with another limit.",
        "Create the destination's device with as many vectors.";
    UNKNOWN_IRQS, "unknown-irqs", Warning, Device:
        "One side does not say what interrupts it has.",
        "A manifest made without the device at hand, or of one that nobody opened.",
        "Describe the device where it is, with --probe where nobody uses it.";
    DEVICE_CAPABILITIES, "device-capabilities", No, Device:
        "The destination lacks a PCI capability of the source, or has it at another place or of another length.",
        "Other firmware, or hardware of another generation.",
        "Bring the firmware of both to one version, or choose another device.";
    UNKNOWN_CAPABILITIES, "unknown-capabilities", Warning, Device:
        "One side does not say what PCI capabilities it has.",
        "A manifest made without the device at hand, or of one that nobody opened.",
        "Describe the device where it is, with --probe where nobody uses it.";
    DEVICE_CONFIG_MASK, "device-config-mask", Warning, Device:
        "The two sides compare different bytes of config space; the destination's rules hold.",
        "Servers or site files of different versions.",
        "Declare the same rules at both sides.";

    // Versions of what is behind the device.
    FIRMWARE, "firmware", Warning, HostDriver:
        "The firmware versions differ; the model is declared to be the same, or it is the firmware that judges the state when it is loaded.",
        "Hosts that are updated one after the other.",
        "Bring the firmware of both to one version, or rehearse the migration.";
    UNKNOWN_FIRMWARE, "unknown-firmware", Warning, HostDriver:
        "One side does not say which firmware it has.",
        "The driver does not tell, or the firmware is missing.",
        "Look at the device's firmware, and name it in the site file.";
    HOST_DRIVER, "host-driver", Warning, HostDriver:
        "The versions of the host's driver behind the device differ; the model is declared to be the same.",
        "Hosts that are updated one after the other: a vGPU manager of another release.",
        "Bring both to one release, or see the maker's table of releases that fit.";
    UNKNOWN_HOST_DRIVER, "unknown-host-driver", Warning, HostDriver:
        "One side does not say which version of the host's driver is behind the device.",
        "A manifest that leaves it out.",
        "Name it in the site file.";

    FIELD_IGNORED, "field-ignored", Note, Device:
        "A field that a device's maker declared has no effect.",
        "A slip in its name, a field of a later version, or one that is found out from the device itself.",
        "Correct the server's manifest: docs/devices.md has every field that it may have.";

    // No model is declared: strict equality.
    STRICT_DRIVER, "strict-driver", No, HostDriver:
        "No model is declared, and the drivers differ.",
        "One side has the plain driver, or another maker's.",
        "Bind both devices to the same driver.";
    STRICT_DRIVER_VERSION, "strict-driver-version", No, HostDriver:
        "No model is declared, and the driver's versions differ.",
        "Hosts that are updated one after the other.",
        "Bring both to one version, or allow the difference in the policy.";
    STRICT_MODEL_VERSION, "strict-model-version", No, Device:
        "No model is declared, but a version is, and the versions differ.",
        "A manifest that leaves the model out.",
        "Declare the model.";
    STRICT_MDEV_TYPE, "strict-mdev-type", No, Configuration:
        "No model is declared, and the types of the mediated devices differ.",
        "The destination's device was created of another type.",
        "Create the destination's device of the source's type.";
    STRICT_FLAGS, "strict-flags", No, HostDriver:
        "No model is declared, and the migration flags differ.",
        "Drivers or firmware of different versions.",
        "Bring both to one version.";
    STRICT_FIRMWARE, "strict-firmware", No, HostDriver:
        "No model is declared, and the firmware versions differ, or one side does not say its own.",
        "Hosts that are updated one after the other; a device without its firmware.",
        "Bring the firmware of both to one version.";
    STRICT_HOST_DRIVER, "strict-host-driver", No, HostDriver:
        "No model is declared, and the versions of the host's driver behind the device differ.",
        "A vGPU manager of another release.",
        "Bring both to one release, or allow the difference in the policy where the maker does.";
    STRICT_PARAMETER, "strict-parameter", No, Configuration:
        "No model is declared, and a parameter differs.",
        "A setting of the device, ECC for example, that is not the same on both hosts.",
        "Set it alike on both hosts.";
    STRICT_FACT, "strict-fact", No, HostDriver:
        "No model is declared, and something the driver tells of the device differs.",
        "Hardware, firmware or settings that are not the same on both hosts.",
        "Choose a device of which the driver tells the same.";
    STRICT_CONFIG_MASK, "strict-config-mask", No, Device:
        "No model is declared, and the two sides compare different bytes of config space.",
        "Servers or site files of different versions.",
        "Declare the same rules at both sides.";
    STRICT_UNKNOWN, "strict-unknown", Note, HostDriver:
        "No model is declared, and neither side knows something that strict equality would compare.",
        "Most drivers tell nothing of their version or firmware.",
        "Nothing; name what is known in the site file to have it compared.";

    // Rules of drivers in the kernel's tree.
    MTTY_VERSION, "driver-mtty-version", No, HostDriver:
        "mtty takes exactly its own version of the stream, the minor included.",
        "Kernels with different versions of mtty.",
        "Bring both hosts to one kernel.";
    MTTY_PORTS, "driver-mtty-ports", No, Configuration:
        "mtty takes the state of a device with as many ports alone.",
        "One device is of type mtty-1, the other of type mtty-2.",
        "Create the destination's device of the source's type.";
    MIGDEV_VERSION, "driver-migdev-version", No, HostDriver:
        "migdev takes streams of its own version and of older ones.",
        "The destination's module was loaded with an older version.",
        "Load the destination's module with the source's version.";
    MIGDEV_STATE_SIZE, "driver-migdev-state-size", No, Configuration:
        "migdev takes the state of a device with a state of the same size alone.",
        "The modules were loaded with different sizes.",
        "Load the destination's module with the source's size.";
    HISI_VERSION, "driver-hisi-acc-version", No, HostDriver:
        "hisi_acc takes streams of its own major version alone.",
        "Kernels with different versions of the driver.",
        "Bring both hosts to one kernel.";
    HISI_DEVICE, "driver-hisi-acc-device", No, Device:
        "hisi_acc takes the state of the same device id alone.",
        "Accelerators of different kinds (SEC, HPRE, ZIP).",
        "Choose a device of the source's kind.";
    HISI_QUEUES, "driver-hisi-acc-queues", No, Configuration:
        "hisi_acc takes the state of as many queue pairs alone.",
        "The physical function was split into virtual functions otherwise.",
        "Split it as at the source.";
    HISI_ISOLATION, "driver-hisi-acc-isolation", No, Configuration:
        "hisi_acc takes the state of a device whose queues are isolated alike.",
        "A setting of the physical function.",
        "Set queue isolation as at the source.";
    QAT_CAPABILITIES, "driver-qat-capabilities", No, Device:
        "The destination's QAT device lacks capabilities of the source's.",
        "Another generation, or services that are switched off.",
        "Enable the source's services at the destination.";
    QAT_SUPERSET, "driver-qat-superset", Warning, Device:
        "The destination's QAT device has more capabilities than the source's; its driver takes that with a warning.",
        "Another generation, or more services.",
        "Nothing; the way back may be closed to guests that start there.";
    QAT_STATE_SIZE, "driver-qat-state-size", No, Device:
        "The source's QAT state is larger than the destination's device takes.",
        "Other firmware.",
        "Bring the firmware of both to one version.";
    XE_DEVICE, "driver-xe-device", No, Device:
        "xe takes the state of the same device id alone.",
        "Different GPUs.",
        "Choose the source's GPU.";
    XE_REVISION, "driver-xe-revision", No, Device:
        "xe takes the state of the same revision alone.",
        "Another stepping of the GPU.",
        "Choose the source's stepping.";
    DRIVER_VERSION_SKEW, "driver-version-skew", Warning, HostDriver:
        "The driver's versions differ; its stream carries a version of its own, or the firmware judges it.",
        "Hosts that are updated one after the other.",
        "Nothing, or rehearse the migration.";
    UNKNOWN_DRIVER_FACT, "unknown-driver-fact", Warning, HostDriver:
        "One side does not say something that its driver's own rule compares.",
        "The driver does not tell it, and the site file does not name it.",
        "Name it in the site file.";

    // What a live migration needs besides.
    NOT_MIGRATABLE, "device-not-migratable", No, HostDriver:
        "The device of one side has no migration at all.",
        "It is bound to a driver without it, plain vfio-pci for example, or its server does not implement it.",
        "Bind it to the vendor's variant driver, or take another server; `vfio-migrate devices` says more.";
    DIRTY_NONE, "dirty-none", SnapshotOnly, HostDriver:
        "Nothing logs the device's DMA writes at the source.",
        "Neither the driver nor the IOMMU can, or the kernel has no iommufd.",
        "Give the source a dirty tracker (see `vfio-migrate doctor`), move by snapshot, or allow one full copy while the guest is paused (--allow-all-dirty).";
    DIRTY_ALL, "dirty-all", SnapshotOnly, HostDriver:
        "All that the device may write counts as dirty at the source, each time.",
        "Neither the driver nor the IOMMU logs its writes.",
        "Give the source a dirty tracker, move by snapshot, or allow one full copy while the guest is paused (--allow-all-dirty).";
    UNKNOWN_DIRTY, "unknown-dirty", Warning, HostDriver:
        "The source does not say who logs the device's DMA writes.",
        "A manifest made without the device at hand, or of one that nobody opened.",
        "Describe the device where it is, with --probe where nobody uses it.";
    P2P_MISSING, "p2p-missing", No, HostDriver:
        "The machine has several devices, and this one cannot stop its peer-to-peer DMA.",
        "The driver lacks the P2P states.",
        "Move guests with one such device each, take another driver, or, where no device maps another's BAR for DMA, let the VMM say so.";
    UNKNOWN_FLAGS, "unknown-flags", Warning, HostDriver:
        "One side does not say which migration states the device has, or, of several devices, whether it can stop its peer-to-peer DMA.",
        "A manifest of a device that nobody opened.",
        "Describe it with --probe where nobody uses it, or ask the `vm` that has it.";
    IOMMU_PAGE_SIZE, "iommu-page-size", No, Host:
        "The smallest page of the destination's IOMMU is larger than that of the source's.",
        "Another CPU architecture, or a kernel with larger pages.",
        "Choose a host whose IOMMU has the source's page size.";

    // The host.
    HOST_VCPUS, "host-vcpus", No, Host:
        "The host cannot give as many vCPUs.",
        "It is smaller, or full.",
        "Choose another host.";
    HOST_MEMORY, "host-memory", No, Host:
        "The host cannot give as much memory.",
        "It is smaller, or full.",
        "Choose another host.";
    HOST_ACCEPTS, "host-accepts", No, Host:
        "The host does not take this model, this version or this parameter from others.",
        "Its manifest says what it accepts.",
        "Choose another host, or extend what it accepts.";
    HOST_STATE_SIZE, "host-state-size", No, Host:
        "The device's state is larger than the host bears.",
        "A limit in the host's manifest.",
        "Choose another host, or raise the limit.";
    HOST_NO_DEVICE, "host-no-device", No, Host:
        "The host has no free device for this one; the reasons against the nearest are listed too.",
        "All are of another kind, or taken by other devices of the machine.",
        "Choose another host, or create a device there.";
    UNKNOWN_HOST, "unknown-host", Warning, Host:
        "The host does not say whether it can give what the machine needs.",
        "A host manifest that leaves it out.",
        "Complete the host's manifest.";

    // The site's policy.
    POLICY_MODEL, "policy-model-required", No, Policy:
        "The policy wants a declared model, and the device has none.",
        "A driver that declares no model.",
        "Declare the model in the site file, or change the policy.";
    POLICY_STATE_SIZE, "policy-state-size", No, Policy:
        "The device's state is larger than the policy allows.",
        "A limit of the site's.",
        "Change the policy, or move by snapshot.";
    UNKNOWN_STATE_SIZE, "unknown-state-size", Warning, HostDriver:
        "There is a limit on the state's size, and the device does not say how large its state is.",
        "A kernel before 6.2, or a driver that gives no estimate.",
        "Name the size in the site file.";

    // What only a session finds.
    MANIFEST, "manifest", No, Host:
        "The source's manifest cannot be read at the destination.",
        "Another program speaks the protocol, or a manifest beyond what is taken.",
        "Look at the sentence of the reason, which says where the manifest is wrong.";
    PROTOCOL_VERSION, "protocol-version", No, Host:
        "The two sides have no version of the protocol in common.",
        "Releases that are far apart.",
        "Update the older side.";
    NO_EXPECTATION, "no-expectation", No, Configuration:
        "The destination does not know whom to expect, and takes nobody.",
        "The file of `vm --expect` is missing there, or wrong.",
        "Look at the log of the destination, or at its `status`, and mend the file: it is read anew for each source.";
    OTHER_SOURCE, "other-source", No, Configuration:
        "The destination does not expect this source.",
        "Its name or its key is not in what the destination was told to expect.",
        "Send from a host that is expected, or have this one added to the file of `vm --expect`: on this host `vfio-migrate tls show` tells its name, and `vfio-migrate tls pin` its key.";
    MAY_NOT_ASK, "may-not-ask", No, Configuration:
        "The destination does not let this source ask.",
        "What it was told to expect lets the source move, or nothing.",
        "Move without asking, or have `ask` added to what the source may.";
    MAY_NOT_MOVE, "may-not-move", No, Configuration:
        "The destination lets this source ask, and not move a guest there.",
        "What it was told to expect lets the source ask alone.",
        "Have `move` added to what the source may.";
    OTHER_VM, "other-vm", No, Configuration:
        "The destination waits for another VM.",
        "It was started with the identity of another, or told to expect another.",
        "Send the VM that is waited for, start the destination without an identity, or have the file of `vm --expect` changed.";
    OLD_EPOCH, "old-epoch", No, Configuration:
        "The source owns the VM under an epoch that is older than the destination expects.",
        "It has moved since, and this is an old copy of it.",
        "Find out where the VM runs; do not start the old copy.";
    TOO_LARGE, "too-large", No, Configuration:
        "The guest has more RAM than the destination expects.",
        "Another guest than was planned for, or a limit that is too low.",
        "Send it where there is room for it, or have `max_memory` raised.";
    TOO_MANY_ATTEMPTS, "too-many-attempts", No, Configuration:
        "As many attempts were made as the destination expects.",
        "The attempts before failed, or the last of them is still under way.",
        "Wait for the end of one that is under way; see why the others failed, and have the destination told to expect more.";
    TOO_MANY_ARRIVALS, "too-many-arrivals", No, Configuration:
        "As many guests have arrived as the destination expects.",
        "The guest that it was to take was there before.",
        "Have the destination told to expect another.";
    VM_ID, "vm-id", No, Configuration:
        "The destination's machine has the identity of another VM.",
        "It was started with the identity of another.",
        "Give both sides the same identity.";
    OWNERSHIP, "ownership", No, Configuration:
        "By the journal the VM belongs elsewhere, or here under a later epoch.",
        "It has moved since, and this is an old copy of it.",
        "Find out where the VM runs; do not start the old copy.";
    STATE_DIR, "state-dir", No, Host:
        "The directory of the ownership journal cannot be used at the destination.",
        "Missing permissions, a full disk, or another process of the same VM.",
        "Look at the sentence of the reason.";
    MACHINE, "machine", No, Host:
        "The destination cannot build the machine.",
        "A device that is in use, too little memory, or no KVM.",
        "Look at the sentence of the reason.";
    DIRTY_UNCOVERED, "dirty-uncovered", SnapshotOnly, Configuration:
        "Writes to a part of guest RAM that nobody logs: nobody would know which of its pages have changed.",
        "A VMM whose log leaves that part out, or devices of its own in other processes that log nothing; a device for which the VMM maps RAM by itself, and does not tell what.",
        "Log those writes, move by snapshot, or allow one full copy of that part while the guest is paused (--allow-all-dirty).";
    PCI_LEFT_BEHIND, "pci-left-behind", No, Configuration:
        "The device is a PCI function, and its VMM hands over its migration state alone.",
        "A VMM that names no PCI function with the device: config space, BARs and interrupts are in no device's own stream.",
        "Hand over the PCI function with the device; allow it in the policy where the VMM saves the function among its own state.";
    DEVICE_FAILED, "device-failed", No, HostDriver:
        "A device failed, or refused what it was given, when it was tried.",
        "State of a version or a configuration that the driver at the destination does not take.",
        "Look at the phase, the transition and the error number in the reason, and at the driver's log.";
    REHEARSAL_OBSTACLE, "rehearsal-obstacle", No, Configuration:
        "The migration would not come to its end within its limits, as was found by trying, before the guest was paused.",
        "RAM or a device's state changes faster than it can be sent, or the limit on the downtime is too short.",
        "Raise the limit, use a faster network, or migrate when the guest is less busy.";
    REHEARSAL_NOT_TRIED, "rehearsal-not-tried", Note, Device:
        "A device's state was not read or loaded in the rehearsal.",
        "The device has no pre-copy: its state can only be read while the guest is paused.",
        "Rehearse with a pause, which keeps the guest paused as long as a migration would.";
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn codes_are_unlike_each_other_and_every_word_is_there() {
        let all: Vec<&str> = codes().collect();
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len());
        for code in all {
            let entry = explain(code).unwrap();
            assert!(
                code.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-'),
                "{code}"
            );
            for text in [entry.meaning, entry.cause, entry.remedy] {
                assert!(text.ends_with('.') && text.len() > 10, "{code}: {text}");
            }
            assert_eq!(
                code.starts_with("unknown-"),
                entry.severity == Severity::Warning && entry.meaning.contains("not say"),
                "{code}"
            );
        }
        assert_eq!(explain("no-such-code"), None);
        assert!(session_codes().all(|code| explain(code).is_some()));
    }
}
