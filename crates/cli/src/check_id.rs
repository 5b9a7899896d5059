//! The checks of `doctor`, by their stable names, and what each is about.

macro_rules! checks {
    ($($id:ident, $name:literal: $meaning:literal, $remedy:literal;)*) => {
        /// A check of the host.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum CheckId {
            $($id,)*
        }

        impl CheckId {
            /// Every check.
            pub(crate) const ALL: &[Self] = &[$(Self::$id),*];

            /// The name of the check, the same in every version.
            pub(crate) fn name(self) -> &'static str {
                match self { $(Self::$id => $name),* }
            }

            /// What is looked at, and what it is for.
            pub(crate) fn meaning(self) -> &'static str {
                match self { $(Self::$id => $meaning),* }
            }

            /// What helps where it is not as it should be.
            pub(crate) fn remedy(self) -> &'static str {
                match self { $(Self::$id => $remedy),* }
            }
        }
    };
}

checks! {
    KernelVersion, "kernel-version": "The release of the kernel.",
        "Install a newer kernel: device migration needs 5.18, pre-copy of device state 6.2.";
    KernelConfig, "kernel-config": "Whether the kernel says how it was built.",
        "Install the kernel's package, or `modprobe configs`.";
    Vfio, "vfio": "VFIO itself: without it no device of the kernel migrates.",
        "`modprobe vfio-pci`, or a kernel with CONFIG_VFIO.";
    ConfigVfioPci, "config-vfio-pci": "PCI functions as VFIO devices.",
        "A kernel with CONFIG_VFIO_PCI, and its module loaded.";
    ConfigIommufd, "config-iommufd": "iommufd: without it no dirty tracking by the IOMMU, and DMA logs of devices may not report.",
        "A kernel with CONFIG_IOMMUFD, and its module loaded.";
    ConfigVfioDeviceCdev, "config-vfio-device-cdev": "A file per device, which dirty tracking by the IOMMU needs.",
        "A kernel with CONFIG_VFIO_DEVICE_CDEV.";
    ConfigIommufdDriver, "config-iommufd-driver": "What a driver needs to report its DMA log.",
        "A kernel with CONFIG_IOMMUFD_DRIVER.";
    ConfigVfioMdev, "config-vfio-mdev": "Mediated devices.",
        "A kernel with CONFIG_VFIO_MDEV, and its module loaded.";
    ConfigKvm, "config-kvm": "Guests on KVM.",
        "A kernel with CONFIG_KVM, and its module loaded.";
    ConfigVariantDrivers, "config-variant-drivers": "VFIO variant drivers: plain vfio-pci has no migration.",
        "A kernel with the variant driver of your device.";
    IommuGroups, "iommu-groups": "The groups in which an IOMMU isolates devices.",
        "Turn VT-d or AMD-Vi on in the firmware and on the kernel's command line.";
    DevVfio, "dev-vfio": "`/dev/vfio/vfio`, containers of IOMMU groups; this or `dev-iommu` is enough.",
        "`modprobe vfio`.";
    DevIommu, "dev-iommu": "`/dev/iommu`, iommufd; this or `dev-vfio` is enough.",
        "`modprobe iommufd`.";
    TlsCreds, "tls-creds": "The certificates of `--tls-creds`: whether they can be used, and until when.",
        "`vfio-migrate tls host` makes new ones.";
    DeviceFiles, "device-files": "The files of devices that are bound to VFIO.",
        "`setfacl`, for this user.";
    DevKvm, "dev-kvm": "`/dev/kvm`: without it guests are emulated in software.",
        "`modprobe kvm_intel` or `kvm_amd`, and `setfacl`, for this user.";
    KvmNested, "kvm-nested": "Whether guests may have KVM of their own.",
        "Load the KVM module with `nested=1`.";
    Hugepages, "hugepages": "Large pages for guest RAM.",
        "`sysctl vm.nr_hugepages=N`.";
    Memlock, "memlock": "The limit on locked memory: all RAM of a guest with a kernel device is pinned.",
        "Raise this user's limit (`ulimit -l`).";
    Memfd, "memfd": "Memory that can be handed to a vfio-user server.",
        "A kernel with memfd_create.";
}
